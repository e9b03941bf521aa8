"""Labelled particle images for training and judging a ranker, cut from small simulated fields.

A field is a piece of micrograph in the particle's own pixel size, protein white: particles at random poses and places,
aggregates, broken pieces, ice crystals, a carbon edge, the ice's own structure, all seen through one CTF; then
white and slowly varying noise. Boxes are cut at particles, at wrong centres, on junk and on places where a blob
picker would stumble over noise, have a plane fitted to their background subtracted, and go through the model's
own preprocessing.

The label in [0, 1] says how well the box serves a reconstruction: 1 for one whole centred particle, falling to 0 when the
centre is off by `OFFSET_BAD` of the diameter, when a neighbour overlaps, and on anything else.
SNR is the variance of the CTF-modulated particle inside its diameter over that of the noise per pixel of the box.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from models.cryoranker.specimen import DIAMETER_PX, GRID_PX, ViewPool
from models.fourier.transforms import fourier_resize, good_size
from models.optics.ctf import evaluate_ctf, frequency_grid

OFFSET_GOOD = 0.08
"""Off-centre by less than this fraction of the diameter costs nothing: alignment absorbs it."""
OFFSET_BAD = 0.30
"""Off-centre by this fraction of the diameter or more is a wrong pick."""
MOST_JUNK = 2
"""Aggregates tried in a field, and broken pieces: 0 to this many; those that come too near to a particle fall away."""
_BOXES_PX = (64, 64, 72, 80, 96, 112, 128)
_WEAK_SNR = (0.03, 0.1)
"""Where most sessions' particles lie at the usual pixel sizes."""


class Kind(IntEnum):
    """What a box was cut from."""

    PARTICLE = 0
    OFF_CENTRE = 1
    CROWDED = 2
    NOISE = 3
    ICE_CRYSTAL = 4
    CARBON = 5
    AGGREGATE = 6
    FRAGMENT = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldConditions:
    """What one field is drawn with; `snr` and `box_size_px` can be fixed for an evaluation."""

    box_size_px: int
    box_to_diameter: float
    snr: float
    defocus_angstrom: float
    astigmatism_angstrom: float
    astigmatism_angle_deg: float
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float
    b_factor_angstrom2: float
    structural_fraction: float
    """Part of the noise variance that comes from the specimen's ice and so is modulated by the CTF."""
    background_sigma: float
    """Standard deviation of the slowly varying background over that of the noise."""
    noise_slope: float
    """The shot noise's amplitude at Nyquist over that at zero frequency, less 1; linear between (detector, dose weights)."""
    spacing: float
    """Least distance of two particle centres over the diameter."""
    has_carbon: bool

    @property
    def diameter_px(self) -> float:
        """The particle's diameter in pixels of the box."""
        return self.box_size_px / self.box_to_diameter


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBoxes:
    """Boxes of one size with labels, kinds and the conditions that they share."""

    images: Float[Tensor, "b n n"]
    labels: NDArray[np.float32]
    kinds: NDArray[np.int8]
    conditions: FieldConditions
    pixel_size_angstrom: float
    field: Float[Tensor, "h w"]
    """The field that the boxes were cut from, protein white."""
    corners_yx_px: NDArray[np.int64]
    """First row and column of each box in the field, `(b, 2)`."""
    signal_scale: float
    """What the pool's views were multiplied by."""


def draw_conditions(
    rng: np.random.Generator,
    *,
    snr: float | None = None,
    box_size_px: int | None = None,
    weak_part: float = 0.0,
) -> FieldConditions:
    """Draw a field's conditions: defocus 0.5-3 µm, SNR 0.015-0.4 (log-uniform), box over diameter 1.2-2.1.

    One field in sixteen is far clearer (SNR up to 5): strong scatterers at low magnification, class averages.
    `weak_part` of all fields have an SNR of 0.03-0.1 instead.
    """
    range_of_snr = (0.4, 5.0) if rng.random() < 1 / 16 else (0.015, 0.4)
    if weak_part > 0.0 and rng.random() < weak_part:
        range_of_snr = _WEAK_SNR
    voltage_kv, cs_mm = [(300.0, 2.7), (200.0, 2.7), (200.0, 1.4)][rng.integers(3)]
    return FieldConditions(
        box_size_px=int(rng.choice(_BOXES_PX)) if box_size_px is None else box_size_px,
        box_to_diameter=float(rng.uniform(1.2, 2.1)),
        snr=float(np.exp(rng.uniform(*np.log(range_of_snr)))) if snr is None else snr,
        defocus_angstrom=float(rng.uniform(5_000, 30_000)),
        astigmatism_angstrom=float(rng.uniform(0, 800)),
        astigmatism_angle_deg=float(rng.uniform(0, 180)),
        voltage_kv=voltage_kv,
        cs_mm=cs_mm,
        amplitude_contrast=float(rng.choice((0.07, 0.1))),
        b_factor_angstrom2=float(rng.uniform(30, 300)),
        structural_fraction=float(rng.uniform(0.0, 0.35)),
        background_sigma=float(rng.choice((0.0, 0.1, 0.3, 0.6)) * rng.uniform(0.3, 1.0)),
        noise_slope=float(rng.uniform(-0.5, 0.3)),
        spacing=float(rng.uniform(0.9, 2.2)),
        has_carbon=bool(rng.random() < 0.15),
    )


def simulate_boxes(
    pools: Sequence[ViewPool],
    rng: np.random.Generator,
    *,
    n_fields: int,
    snr: float | None = None,
    box_size_px: int | None = None,
    weak_part: float = 0.0,
    most_junk: int = MOST_JUNK,
) -> Iterator[LabelledBoxes]:
    """Yield the boxes of `n_fields` fields, each of one structure drawn from the pools."""
    for _ in range(n_fields):
        pool = pools[int(rng.integers(len(pools)))]
        conditions = draw_conditions(rng, snr=snr, box_size_px=box_size_px, weak_part=weak_part)
        yield simulate_field(pool, conditions, rng, most_junk=most_junk)


def simulate_field(
    pool: ViewPool, conditions: FieldConditions, rng: np.random.Generator, *, most_junk: int = MOST_JUNK
) -> LabelledBoxes:
    """Return the boxes cut from one field of the structure; `most_junk` as in `SimulatedSet`."""
    return _Field(pool, conditions, rng, most_junk).boxes()


@dataclass(frozen=True, slots=True)
class _Pick:
    y: float
    x: float
    label: float
    kind: Kind


class _Field:
    """One field under construction: the object, what is where, and what its noise is."""

    def __init__(
        self, pool: ViewPool, conditions: FieldConditions, rng: np.random.Generator, most_junk: int
    ) -> None:
        self.pool, self.conditions, self.rng, self.most_junk = pool, conditions, rng, most_junk
        self.torch_generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self.diameter = conditions.diameter_px
        self.size = good_size(int(4.2 * self.diameter + conditions.box_size_px))
        self.pixel_size_angstrom = pool.diameter_angstrom / self.diameter
        # Views are resampled by whole even sizes, so the diameter is met to about a fiftieth.
        self.view_px = view_size_px(self.diameter)
        self.object = torch.zeros((self.size, self.size))
        self.absorption = torch.zeros((self.size, self.size))
        self.texture = torch.ones((self.size, self.size))
        self.particles: list[tuple[float, float]] = []
        self.junk: list[tuple[float, float, float, Kind]] = []

    def boxes(self) -> LabelledBoxes:
        self._place_particles()
        self._normalise_signal()
        self._place_junk()
        image = self._image()
        picks = self._picks(image)
        n = self.conditions.box_size_px
        corners = np.array([self._corner(pick) for pick in picks], np.int64).reshape(-1, 2)
        stack = torch.stack([image[y : y + n, x : x + n] for y, x in corners.tolist()])
        return LabelledBoxes(
            images=self._with_outliers(remove_plane(stack)),
            labels=np.array([pick.label for pick in picks], np.float32),
            kinds=np.array([pick.kind for pick in picks], np.int8),
            conditions=self.conditions,
            pixel_size_angstrom=self.pixel_size_angstrom,
            field=image,
            corners_yx_px=corners,
            signal_scale=self.scale,
        )

    def _view(self, views: Tensor) -> Tensor:
        view = views[int(self.rng.integers(len(views)))]
        return fourier_resize(view, (self.view_px, self.view_px))

    def _add(self, view: Tensor, y: float, x: float) -> None:
        """Add a view at whole pixels; parts outside the field fall away."""
        n = view.shape[-1]
        top, left = round(y) - n // 2, round(x) - n // 2
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + n, self.size), min(left + n, self.size)
        if y0 < y1 and x0 < x1:
            self.object[y0:y1, x0:x1] += view[y0 - top : y1 - top, x0 - left : x1 - left]

    def _place_particles(self) -> None:
        step = self.conditions.spacing * self.diameter
        for _ in range(60):
            y, x = self.rng.uniform(0, self.size, 2)
            # A few land closer than the spacing: crowding is a label of its own.
            least = step * (0.5 if self.rng.random() < 0.08 else 1.0)
            if all(math.hypot(y - py, x - px) > least for py, px in self.particles):
                self.particles.append((float(round(y)), float(round(x))))
                self._add(self._view(self.pool.views), y, x)

    def _normalise_signal(self) -> None:
        """Scale so that the CTF-modulated particle has unit variance inside its diameter."""
        n = self.view_px
        views = fourier_resize(self.pool.views[:16], (n, n))
        pad = torch.nn.functional.pad(views, (n // 2, n // 2, n // 2, n // 2))
        seen = self._through_ctf(pad)[:, n // 2 : n // 2 + n, n // 2 : n // 2 + n]
        axis = torch.arange(n) - n // 2
        inside = torch.hypot(axis[:, None].float(), axis[None, :].float()) <= self.diameter / 2
        self.scale = 1.0 / float(seen[:, inside].std().clamp(min=1e-12))
        self.object *= self.scale
        self.noise_sigma = 1.0 / math.sqrt(self.conditions.snr)
        self.peak = float((views * self.scale).amax(dim=(-2, -1)).mean())

    def _place_junk(self) -> None:
        for _ in range(int(self.rng.integers(0, self.most_junk + 1))):
            self._place_aggregate()
        for _ in range(int(self.rng.integers(0, self.most_junk + 1))):
            y, x = self.rng.uniform(0, self.size, 2)
            if self._clearance(y, x) > 1.0:
                self._add(self._view(self.pool.fragments) * self.scale, y, x)
                self.junk.append((y, x, 0.3 * self.diameter, Kind.FRAGMENT))
        for _ in range(int(self.rng.integers(1, 5)) if self.rng.random() < 0.5 else 0):
            self._place_crystal()
        if self.conditions.has_carbon:
            self._place_carbon()

    def _place_aggregate(self) -> None:
        y, x = self.rng.uniform(0, self.size, 2)
        if self._clearance(y, x) < 0.8:
            return
        spread = self.rng.uniform(0.2, 0.7) * self.diameter
        for _ in range(int(self.rng.integers(3, 9))):
            dy, dx = self.rng.normal(0.0, spread, 2)
            views = self.pool.views if self.rng.random() < 0.5 else self.pool.fragments
            self._add(self._view(views) * self.scale, y + dy, x + dx)
        self.junk.append((y, x, spread + 0.4 * self.diameter, Kind.AGGREGATE))

    def _place_crystal(self) -> None:
        """Add a faceted blob far denser than protein: the intersection of random half-planes, slightly soft."""
        y, x = self.rng.uniform(0, self.size, 2)
        radius = self.diameter * float(np.exp(self.rng.uniform(np.log(0.08), np.log(0.8))))
        axis = torch.arange(self.size, dtype=torch.float32)
        dy, dx = axis[:, None] - y, axis[None, :] - x
        inside = torch.full((self.size, self.size), math.inf)
        turn = self.rng.uniform(0, math.pi)
        for side in range(int(self.rng.integers(4, 9))):
            angle = turn + 2.0 * math.pi * side / 6.0 + self.rng.normal(0.0, 0.15)
            reach = radius * self.rng.uniform(0.6, 1.1)
            inside = torch.minimum(inside, reach - (dy * math.sin(angle) + dx * math.cos(angle)))
        inside = torch.minimum(inside, 1.2 * radius - torch.hypot(dy, dx))
        thickness = (inside.clamp(min=0.0) / radius).pow(self.rng.uniform(0.3, 1.0))
        strength = self.peak * float(np.exp(self.rng.uniform(np.log(1.5), np.log(12.0))))
        sign = -1.0 if self.rng.random() < 0.1 else 1.0  # ethane and holes are brighter than ice, not darker
        self.object += sign * strength * thickness
        self.absorption += sign * strength * thickness * self.rng.uniform(0.0, 0.3)
        self.junk.append((y, x, radius, Kind.ICE_CRYSTAL))

    def _place_carbon(self) -> None:
        """Cover a part of the field behind a slightly bent edge with a thick, textured film."""
        angle, offset = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(-0.3, 0.3) * self.size
        bend = self.rng.uniform(0, 0.2) / self.size
        axis = torch.arange(self.size, dtype=torch.float32) - self.size / 2
        along = axis[:, None] * math.cos(angle) - axis[None, :] * math.sin(angle)
        across = axis[:, None] * math.sin(angle) + axis[None, :] * math.cos(angle) - offset + bend * along**2
        is_film = torch.sigmoid(across / self.rng.uniform(0.5, 3.0))
        self.texture = 1.0 + is_film * self.rng.uniform(1.0, 5.0)
        self.absorption += is_film * self.noise_sigma * self.rng.uniform(0.2, 2.5)
        self.object += is_film * self.peak * self.rng.uniform(0.5, 3.0)
        self.film = is_film > 0.5

    def _through_ctf(self, stack: Tensor) -> Tensor:
        return through_ctf(stack, self.conditions, self.pixel_size_angstrom)

    def _noise(self) -> Tensor:
        return torch.randn((self.size, self.size), generator=self.torch_generator)

    def _image(self) -> Tensor:
        c = self.conditions
        ice = self._through_ctf(self._noise())
        ice = ice * (self.noise_sigma * math.sqrt(c.structural_fraction) / float(ice.std()))
        # A film has more structure than ice: its texture multiplies the ice's, and never vanishes under it.
        extra = (self.texture - 1.0) * 0.3 * self.noise_sigma
        ice = ice * self.texture + self._through_ctf(self._noise() * extra)
        shot = coloured(self._noise(), c.noise_slope) * (
            self.noise_sigma * math.sqrt(1.0 - c.structural_fraction)
        )
        coarse = max(2, self.size // max(8, int(c.box_size_px * self.rng.uniform(0.4, 1.5))))
        drift = torch.randn((1, 1, coarse + 2, coarse + 2), generator=self.torch_generator)
        drift = torch.nn.functional.interpolate(drift, (self.size, self.size), mode="bicubic")[0, 0]
        background = drift * (c.background_sigma * self.noise_sigma) + self.absorption
        return self._through_ctf(self.object) + ice + shot + background

    def _clearance(self, y: float, x: float, *, skip: int = -1) -> float:
        """Return the distance to the nearest particle's centre over the diameter."""
        far = [math.hypot(y - py, x - px) for i, (py, px) in enumerate(self.particles) if i != skip]
        return min(far, default=math.inf) / self.diameter

    def _is_inside(self, y: float, x: float) -> bool:
        margin = self.conditions.box_size_px / 2 + 1
        return margin <= y <= self.size - margin and margin <= x <= self.size - margin

    def _spoiling_junk(self, y: float, x: float) -> Kind | None:
        """Return the junk that spoils a particle at (y, x), if any.

        Crystals spoil the box wherever they reach into it, being brighter than all else; the rest does where it
        covers the particle's inner part.
        """
        for jy, jx, radius, kind in self.junk:
            is_crystal = kind is Kind.ICE_CRYSTAL
            reach = 0.42 * self.conditions.box_size_px if is_crystal else 0.35 * self.diameter
            if math.hypot(y - jy, x - jx) < radius + reach:
                return kind
        if self.conditions.has_carbon:
            reach = int(0.4 * self.diameter)
            window = self.film[
                max(0, int(y) - reach) : int(y) + reach, max(0, int(x) - reach) : int(x) + reach
            ]
            if bool(window.any()):
                return Kind.CARBON
        return None

    def _picks(self, image: Tensor) -> list[_Pick]:
        picks = [pick for i in range(len(self.particles)) for pick in self._picks_at_particle(i)]
        picks += [
            _Pick(y + dy, x + dx, 0.0, kind)
            for y, x, radius, kind in self.junk
            for dy, dx in [self.rng.normal(0.0, 0.3 * radius, 2)]
            if self._is_inside(y + dy, x + dx) and self._clearance(y + dy, x + dx) > OFFSET_BAD
        ]
        picks += self._picks_on_noise(image, n_picks=max(3, len(picks) // 3))
        return picks

    def _picks_at_particle(self, index: int) -> Iterator[_Pick]:
        y, x = self.particles[index]
        offsets = [0.06 * math.sqrt(self.rng.random())]
        if self.rng.random() < 0.5:
            offsets.append(self.rng.uniform(0.08, 0.6))
        for offset in offsets:
            turn = self.rng.uniform(0, 2 * math.pi)
            py = y + offset * self.diameter * math.sin(turn)
            px = x + offset * self.diameter * math.cos(turn)
            if not self._is_inside(py, px) or self._clearance(py, px, skip=index) < offset:
                continue
            centring = float(np.clip((OFFSET_BAD - offset) / (OFFSET_BAD - OFFSET_GOOD), 0.0, 1.0))
            clearance = self._clearance(y, x, skip=index)
            freedom = float(np.clip((clearance - 0.45) / (0.8 - 0.45), 0.0, 1.0))
            spoiler = self._spoiling_junk(py, px)
            if spoiler is not None:
                yield _Pick(py, px, 0.1 * centring * freedom, spoiler)
            elif offset > OFFSET_GOOD:
                yield _Pick(py, px, centring * freedom, Kind.OFF_CENTRE)
            else:
                yield _Pick(py, px, freedom, Kind.PARTICLE if freedom > 0.99 else Kind.CROWDED)

    def _picks_on_noise(self, image: Tensor, *, n_picks: int) -> Iterator[_Pick]:
        """Yield places without a particle; half of them where a blob picker's response to the noise is large."""
        step = max(2, int(self.diameter / 2))
        blurred = box_means(image, step)
        for i in range(n_picks):
            tries = self.rng.uniform(0, self.size, (24, 2))
            free = [(y, x) for y, x in tries if self._is_inside(y, x) and self._clearance(y, x) > 0.6]
            if not free:
                continue
            if i % 2:
                free.sort(key=lambda yx: -float(self._response(blurred, yx, step)))
            y, x = free[0]
            kind = self._spoiling_junk(y, x)
            yield _Pick(y, x, 0.0, Kind.NOISE if kind is None else kind)

    @staticmethod
    def _response(blurred: Tensor, yx: tuple[float, float], step: int) -> Tensor:
        limit = blurred.shape[0] - 1
        return blurred[min(limit, max(0, int(yx[0]) - step // 2)), min(limit, max(0, int(yx[1]) - step // 2))]

    def _corner(self, pick: _Pick) -> tuple[int, int]:
        n = self.conditions.box_size_px
        top, left = round(pick.y) - n // 2, round(pick.x) - n // 2
        return min(max(top, 0), self.size - n), min(max(left, 0), self.size - n)

    def _with_outliers(self, stack: Tensor) -> Tensor:
        """Give one box in thirty a hot or dead pixel: the stretch to grey levels feels it."""
        out = stack.clone()
        for box in out:
            if self.rng.random() < 1 / 30:
                y, x = self.rng.integers(0, box.shape[0], 2)
                box[y, x] = float(box.std() * self.rng.uniform(6, 14) * self.rng.choice((-1.0, 1.0)))
        return out


def view_size_px(diameter_px: float) -> int:
    """Return the size to which a pool's views are resampled for particles of this diameter."""
    return 2 * max(8, round(0.5 * GRID_PX * diameter_px / DIAMETER_PX))


def through_ctf(
    stack: Float[Tensor, "*b n n"], conditions: FieldConditions, pixel_size_angstrom: float
) -> Float[Tensor, "*b n n"]:
    """Return images as the microscope shows them: CTF and B-factor envelope."""
    n = stack.shape[-1]
    seen: Tensor = torch.fft.irfft2(
        torch.fft.rfft2(stack) * transfer(conditions, n, pixel_size_angstrom), s=(n, n)
    )
    return seen


def transfer(conditions: FieldConditions, n: int, pixel_size_angstrom: float) -> Float[Tensor, "n m"]:
    """Return CTF times envelope on the half spectrum of an `n` px image."""
    c = conditions
    ky, kx = frequency_grid((n, n), pixel_size_angstrom)
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=c.defocus_angstrom + c.astigmatism_angstrom / 2,
        defocus_v_angstrom=c.defocus_angstrom - c.astigmatism_angstrom / 2,
        astigmatism_angle_deg=c.astigmatism_angle_deg,
        voltage_kv=c.voltage_kv,
        cs_mm=c.cs_mm,
        amplitude_contrast=c.amplitude_contrast,
    )
    envelope: Tensor = ctf * torch.exp(-0.25 * c.b_factor_angstrom2 * (ky.square() + kx.square()))
    return envelope


def shot_amplitude(n: int, slope: float) -> Float[Tensor, "n m"]:
    """Return the shot noise's amplitude over frequency (half spectrum), of mean square 1 over the whole plane."""
    ky, kx = frequency_grid((n, n), 1.0)
    amplitude = 1.0 + slope * (2.0 * torch.hypot(ky, kx)).clamp(max=1.0)
    doubled = torch.ones(n // 2 + 1)
    doubled[1 : (n + 1) // 2] = 2.0
    return amplitude / ((amplitude.square() * doubled).sum() / (n * n)).sqrt()


def coloured(noise: Float[Tensor, "n n"], slope: float) -> Float[Tensor, "n n"]:
    """Return white noise with the amplitudes of `shot_amplitude`; its variance stays."""
    n = noise.shape[-1]
    out: Tensor = torch.fft.irfft2(torch.fft.rfft2(noise) * shot_amplitude(n, slope), s=(n, n))
    return out


def box_means(image: Float[Tensor, "n n"], side_px: int) -> Float[Tensor, "m m"]:
    """Return the means over all squares of a side that fit into the image."""
    sums = torch.nn.functional.pad(image.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    s = side_px
    return ((sums[s:, s:] - sums[s:, :-s] - sums[:-s, s:] + sums[:-s, :-s]) / (s * s)).float()


def remove_plane(stack: Float[Tensor, "b n n"]) -> Float[Tensor, "b n n"]:
    """Return boxes less the plane fitted to the pixels outside the inscribed circle of 0.75 box, as RELION does."""
    n = stack.shape[-1]
    axis = torch.arange(n, dtype=torch.float32) - n // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    outside = torch.hypot(y, x) > 0.375 * n
    basis = torch.stack((torch.ones_like(x), y / n, x / n), dim=-1)
    design = basis[outside]
    coefficients = stack[:, outside] @ torch.linalg.pinv(design).T
    return stack - torch.einsum("bc,yxc->byx", coefficients, basis)
