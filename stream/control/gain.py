"""The gain reference: how it is turned, and whether it still fits.

With automatic orientation no movie is preprocessed before the answer: a wrongly turned reference leaves its
pattern in every frame, and the motion search locks onto it. One movie is asked first, because it mostly
suffices; then 2, 4 and 8, whose mean shows the pattern better.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice

from stream.control.settings import ControllerSettings
from stream.records.commands import OrientGain
from stream.records.events import GainOriented
from stream.records.values import Exposure, ExposureId, GainOrientation

ASKED_WITH = (1, 2, 4, 8)
"""Movies per question; noise falls with the square root, so more than 8 would have to be many more."""

REMEDY = (
    "set acquisition.gain_flip_x, gain_flip_y and gain_rotate_deg, and acquisition.gain_orientation: given, and "
    "start again"
)

CLEARED_AT = 0.8
"""The alarm is over at this share of its limit, so that a figure at the limit does not ring at every movie."""


class GainSearch:
    """What is known of how the gain reference is turned."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._is_sought = settings.is_gain_orientation_sought
        self._max_attempts = settings.max_attempts
        self.orientation: GainOrientation | None = None
        self.in_flight: OrientGain | None = None
        self.is_given_up = False
        self._n_tried = 0
        self._n_failures = 0
        self._note = ""

    @property
    def hold(self) -> str | None:
        """Why movies wait for the gain reference, or None."""
        if not self._is_sought or self.orientation is not None:
            return None
        if self.is_given_up:
            return f"no orientation of the gain reference fits the movies: {REMEDY} ({self._note})"
        return "the orientation of the gain reference is not known yet"

    def ask(self, movies: Iterable[Exposure], *, is_input_ended: bool) -> OrientGain | None:
        """Return the next question when it is due: `movies` are those that wait, in order of arrival."""
        if self.hold is None or self.in_flight is not None or self.is_given_up:
            return None
        wanted = next(n for n in ASKED_WITH if n > self._n_tried)
        waiting = tuple(islice(movies, wanted))
        if len(waiting) < wanted and not is_input_ended:
            return None
        if len(waiting) <= self._n_tried:
            self.is_given_up = bool(waiting)
            return None
        self.in_flight = OrientGain(exposures=waiting)
        return self.in_flight

    def take(self, event: GainOriented) -> bool:
        """Take an answer; False when nothing was asked."""
        if self.in_flight is None:
            return False
        self._n_tried = len(self.in_flight.exposures)
        self.in_flight, self._n_failures, self._note = None, 0, event.note
        self.orientation = event.orientation
        self.is_given_up = event.orientation is None and self._n_tried >= ASKED_WITH[-1]
        return True

    def is_asking_about(self, exposure_id: ExposureId) -> bool:
        """Tell whether the question in work is (also) about this exposure."""
        return self.in_flight is not None and any(
            exposure.exposure_id == exposure_id for exposure in self.in_flight.exposures
        )

    def take_failure(self, reason: str, *, is_machine: bool) -> None:
        """Take a question that has no answer: asked again, but for ever only when a movie was to blame."""
        self.in_flight = None
        self._n_failures += int(is_machine)
        if self._n_failures >= self._max_attempts:
            self._note = f"failed {self._n_failures} times, last: {reason}"
            self.is_given_up = True

    def reopen(self) -> list[OrientGain]:
        """Begin anew after a restart, which may have brought another reference; what was asked is asked again."""
        self._n_failures = 0
        if self.in_flight is not None:
            return [self.in_flight]
        if self.is_given_up:
            self.is_given_up, self._n_tried = False, 0
        return []


class ResidualWatch:
    """Tells once when the gain reference no longer fits, and once when it fits again."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._recent: deque[float] = deque(maxlen=settings.n_gain_residual_movies)
        self._limit = settings.max_gain_residual
        self.is_over = False

    @property
    def mean(self) -> float | None:
        """Mean residual of the last movies, or None before there are enough."""
        if len(self._recent) < (self._recent.maxlen or 0):
            return None
        return sum(self._recent) / len(self._recent)

    def take(self, residual: float) -> str | None:
        """Take one movie's figure; return what is to be told when the limit was crossed."""
        self._recent.append(residual)
        mean = self.mean
        if mean is None:
            return None
        figure = f"mean residual {mean:+.3f} over {len(self._recent)} movies"
        if not self.is_over and abs(mean) > self._limit:
            self.is_over = True
            return f"the gain reference no longer fits: {figure} (rule: at most ±{self._limit:g})"
        if self.is_over and abs(mean) <= CLEARED_AT * self._limit:
            self.is_over = False
            return f"the gain reference fits again: {figure}"
        return None


def describe_orientation(orientation: GainOrientation) -> str:
    """Say in words how the reference is turned."""
    flips = [
        axis for axis, is_flipped in (("x", orientation.flip_x), ("y", orientation.flip_y)) if is_flipped
    ]
    turn = f"turned by {orientation.rotate_deg}°" if orientation.rotate_deg else "not turned"
    return f"{turn}, {'flipped in ' + ' and '.join(flips) if flips else 'not flipped'}"
