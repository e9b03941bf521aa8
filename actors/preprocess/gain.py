"""The gain reference of a session: read once per worker, and how it lies found from the movies themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from actors.preprocess.settings import PreprocessSettings
from models.motion.gain import (
    MIN_CONTRAST_SE,
    GainScore,
    GainVerdict,
    relative_detail,
    residual_gain,
    search_orientation,
)
from models.motion.gain import GainSearch as GainScores
from stream.ingest.gain import (
    GainConvention,
    GainReference,
    check_gain,
    check_gain_turned,
    orient_gain,
    read_gain,
    upsample_gain,
)
from stream.ingest.movie_reader import inspect_movie, iterate_chosen
from stream.records.errors import ConfigurationError, InputError
from stream.records.values import Exposure, GainOrientation

log = logging.getLogger(__name__)

# Electrons per pixel of one movie that are looked at: as many as show a gain of 1 % at 100 standard errors on a 4k
# camera, and a fraction of what reading the whole movie costs.
_ELECTRONS_PER_PX = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OrientedGain:
    """How the gain reference was found to lie (None: it was not), and why, in words."""

    orientation: GainOrientation | None
    contrast: float
    n_movies: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionGain:
    """A gain reference, turned and of the frames' shape, and its fine detail."""

    reference: GainReference
    detail: Float[Tensor, "y x"]

    def residual(self, corrected_mean: Float[Tensor, "y x"]) -> float | None:
        """Return the part of the reference's detail that is left in the mean of the corrected frames: 0 is right."""
        found = residual_gain(corrected_mean, self.detail)
        return None if found is None else found.share


@lru_cache(maxsize=1)
def _load_gain(
    path: Path,
    mtime_ns: int,
    *,
    convention: GainConvention,
    orientation: GainOrientation,
    shape_yx: tuple[int, int],
    upsampling: int,
) -> SessionGain:
    """Read and turn a gain reference; kept between exposures until the file, or what is asked of it, changes."""
    del mtime_ns  # part of the cache's key alone
    gain = orient_gain(
        read_gain(path, convention=convention),
        flip_x=orientation.flip_x,
        flip_y=orientation.flip_y,
        rotate_deg=orientation.rotate_deg,
    )
    gain = upsample_gain(gain, shape_yx, factor=upsampling)
    return SessionGain(reference=gain, detail=_detail(gain))


def _detail(gain: GainReference) -> Tensor:
    return relative_detail(torch.from_numpy(gain.values), torch.from_numpy(~gain.defect_mask))


def load_session_gain(
    settings: PreprocessSettings, shape_yx: tuple[int, int], item: str, *, upsampling: int = 1
) -> SessionGain | None:
    """Return the session's gain reference, turned and of the frames' shape; None where there is none.

    Parameters
    ----------
    shape_yx
        Shape of the frames that it is to be applied to.
    upsampling
        How many times finer than the sensor's pixels these frames are (EER); a reference of the sensor is spread.
    """
    if settings.gain is None:
        return None
    gain = _load_gain(
        settings.gain,
        settings.gain.stat().st_mtime_ns,
        convention=settings.gain_convention,
        orientation=GainOrientation(
            flip_x=settings.gain_flip_x, flip_y=settings.gain_flip_y, rotate_deg=settings.gain_rotate_deg
        ),
        shape_yx=shape_yx,
        upsampling=upsampling,
    )
    check_gain(gain.reference, shape_yx, item)
    return gain


def orient_session_gain(exposures: Sequence[Exposure], settings: PreprocessSettings) -> OrientedGain:
    """Find how the session's gain reference lies from the uncorrected frames of these movies.

    A movie that cannot be read, or has another shape than the first, is left out and named in the note.

    Raises
    ------
    InputError
        No movie could be read.
    ConfigurationError
        There is no reference, it cannot be read, or it has not the movies' shape in any orientation.
    """
    if settings.gain is None:
        raise ConfigurationError(
            "acquisition.gain", "names a gain reference whose orientation is sought", "none"
        )
    gain = _read_any_gain(settings.gain, settings.gain_convention)
    torch.set_num_threads(settings.n_threads)
    total: NDArray[np.float32] | None = None
    n_read, problems = 0, []
    for exposure in exposures:
        path = exposure.file.path
        try:
            mean = read_raw_mean(path, None if total is None else total.shape)
        except InputError as error:
            problems.append(error)
            continue
        if total is None:
            check_gain_turned(gain, (mean.shape[0], mean.shape[1]), path)
        total = mean if total is None else total + mean
        n_read += 1
    if total is None:
        raise problems[0]
    try:
        scores = search_orientation(
            torch.from_numpy(total), torch.from_numpy(gain.values), torch.from_numpy(~gain.defect_mask)
        )
    except ValueError as error:
        raise InputError(exposures[0].file.path, str(error)) from error
    note = _describe(scores, n_read, settings.gain)
    if problems:
        note += f"; left out: {'; '.join(str(problem) for problem in problems)}"
    log.info(
        "gain_oriented verdict=%s contrast=%.1f movies=%d", scores.verdict.value, scores.contrast, n_read
    )
    return OrientedGain(
        orientation=_orientation_of(scores.scores[0]) if scores.verdict is GainVerdict.FOUND else None,
        contrast=scores.contrast,
        n_movies=len(exposures),
        note=note,
    )


def read_raw_mean(path: str, shape_yx: tuple[int, ...] | None = None) -> NDArray[np.float32]:
    """Return the mean of a movie's uncorrected frames `(h w)`, evenly spread over it, up to about 16 e/px.

    Another shape than `shape_yx`, where that is given, is an InputError.
    """
    header = inspect_movie(path)
    if shape_yx is not None and header.shape_yx != shape_yx:
        raise InputError(path, f"the movies have one shape, {shape_yx}", header.shape_yx)
    middle = next(iterate_chosen(path, header, (header.n_frames // 2,)))
    # float movies may be in other units than electrons: then some frames more or fewer are read
    per_frame = max(float(middle.mean()), 1e-3)
    n = min(header.n_frames, max(1, int(np.ceil(_ELECTRONS_PER_PX / per_frame))))
    positions = np.unique(np.linspace(0, header.n_frames - 1, n).round().astype(int)).tolist()
    total = np.zeros(header.shape_yx, dtype=np.float32)
    for frame in iterate_chosen(path, header, positions):
        total += frame
    if not total.any():
        raise InputError(
            path, "a movie has a frame that is not all zero", f"{len(positions)} frames looked at"
        )
    total /= np.float32(len(positions))
    return total


def _read_any_gain(path: Path, convention: GainConvention) -> GainReference:
    try:
        return read_gain(path, convention=convention)
    except InputError as error:
        # the fault lies with the setting, not with a movie
        raise ConfigurationError(f"gain reference {error.item}", error.rule, error.value) from error


def _orientation_of(score: GainScore) -> GainOrientation:
    turn = score.turn
    return GainOrientation(flip_x=turn.flip_x, flip_y=turn.flip_y, rotate_deg=turn.rotate_deg)


def _describe(found: GainScores, n_movies: int, path: Path) -> str:
    """Say in one line what was found, and where nothing was, what to do."""
    movies = f"{n_movies} movie{'' if n_movies == 1 else 's'}"
    if found.verdict is GainVerdict.UNIFORM:
        return f"{path.name} is uniform: every orientation fits {movies} alike"
    best = found.scores[0]
    lead = f"leads by {found.contrast:.1f} standard errors over {movies}"
    if found.verdict is GainVerdict.FOUND:
        return f"{path.name} fits {best.turn} (correlation {best.correlation:.4f}, {lead})"
    if found.verdict is GainVerdict.INVERTED:
        return (
            f"{path.name} fits {best.turn}, but the other way about (correlation {best.correlation:.4f}, {lead}): "
            "it divides where it should multiply, or is divided by where it multiplies; set "
            "acquisition.gain_convention: divide (or multiply)"
        )
    table = ", ".join(
        f"{score.turn} {score.correlation:+.4f} ± {score.standard_error:.4f}" for score in found.scores
    )
    return (
        f"no orientation of {path.name} stands out: the best {lead}, at least {MIN_CONTRAST_SE:g} are needed; "
        f"it may be of another camera or outdated. Correlations: {table}"
    )
