"""The physics stage: from a virtual specimen to the noise-free micrograph (CryoGEM eq. 2, 3, 8, 9).

I_phy = g * [W · (P - b)], with P the specimen's projection, W the ice weight map, g the point spread function of eq. 8.
Projections are in units of the mean peak of the particle's projections, so that a micrograph does not depend on its
brightest overlap. b is the background: with b = 0 the weight map acts on particles alone (eq. 3 to the letter); the
released code puts every frame on a pedestal of its brightest pixel, which is b = 1 here and makes the ice visible.
Eq. 8 has protein dark: it is minus the CTF of `models.optics.ctf`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from models.cryogem.bank import SessionBank
from models.cryogem.contrast import FrameScale, fit_scale, mean_profile
from models.cryogem.ice_weights import spread_ice_weights
from models.cryogem.specimen import VirtualSpecimen, draw_rotations, place_on_free_pixels
from models.fourier.transforms import good_size
from models.optics.ctf import evaluate_ctf, frequency_grid
from models.optics.ctf_fit import Microscope
from models.simulation.imaging import CtfTruth, add_patch
from models.simulation.projection import Projector

ImagingForm = Literal["physics", "projection"]
ContrastSource = Literal["given", "session"]

_BATCH = 32
_REFERENCE_VIEWS = 24
_REFERENCE_FRAMES = 4
_CLIP_SD = 2.0
_LEAST_DEFOCUS_ANGSTROM = 1000.0
_CTF_REACH_PX = 12
"""Canvas beyond a particle's box: what the CTF spreads farther than this is below 1 % of the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicsSettings:
    """How micrographs are made from a bank.

    `mask_threshold` 0.9 puts a pixel into the particle mask where a particle's projection is above 0.1 of its own
    maximum. `background` is b of the module's docstring, `snr` the variance of I_phy over that of the noise added before
    translation; with `contrast` "session" both are fitted, so that particles and ice show as plainly as the session's. `conformation_weights` are relative frequencies of the bank's volumes (None: equal).
    `imaging` "projection" leaves out ice and CTF: I_phy is minus the specimen, as unpaired translation is used without
    physics (an ablation: with `training.nce_form: unguided` it is CUT; CTFs of generated particles then mean nothing).
    """

    mask_threshold: float = 0.9
    background: float = 1.0
    snr: float = 0.1
    contrast: ContrastSource = "given"
    conformation_weights: tuple[float, ...] | None = None
    imaging: ImagingForm = "physics"

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_threshold < 1.0:
            raise ValueError(f"mask_threshold: {self.mask_threshold}, must lie in (0, 1)")
        if self.snr <= 0.0:
            raise ValueError(f"snr: {self.snr}, must be over 0")
        if self.contrast not in get_args(ContrastSource):
            raise ValueError(
                f"contrast: {self.contrast!r}, must be one of {', '.join(get_args(ContrastSource))}"
            )
        if self.imaging not in get_args(ImagingForm):
            raise ValueError(f"imaging: {self.imaging!r}, must be one of {', '.join(get_args(ImagingForm))}")
        if not 0.0 <= self.background <= 10.0:
            raise ValueError(f"background: {self.background}, must lie in [0, 10]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """What is fixed instead of drawn; None is drawn.

    Positions are (y, x) in pixels of the frame; rotations act on xyz column vectors and are used in turn;
    `defocus_angstrom` replaces the mean of u and v; `ice_map` is an index into the bank's maps, -1 even ice.
    """

    centres_yx_px: NDArray[np.float64] | None = None
    rotations: NDArray[np.float32] | None = None
    conformation: int | None = None
    defocus_angstrom: float | None = None
    ice_map: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imaging:
    """The CTF and the ice map (-1: even ice) that one frame is seen with."""

    ctf: CtfTruth
    ice_map: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedField:
    """A specimen's projection on a canvas that begins `margin_px` before the frame, and what is known of it.

    The mask covers the frame. `is_border` marks particles whose mask crosses the frame's edge, `is_overlapping` those
    whose mask shares pixels with another particle's.
    """

    projection: Float[Tensor, "ch cw"]
    mask: Bool[Tensor, "h w"]
    margin_px: int
    specimen: VirtualSpecimen
    is_border: NDArray[np.bool_]
    is_overlapping: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicsStage:
    """Draws and renders frames of one bank; make it with `build_physics`."""

    bank: SessionBank
    settings: PhysicsSettings
    projectors: Sequence[Projector] = field(repr=False)
    peak: float
    background: float
    noise_sd: float
    """Standard deviation of the noise added before translation, from the mean variance of a few frames."""
    snr: float
    """The ratio of variances that it stands for."""

    @property
    def margin_px(self) -> int:
        """Width of the canvas beyond the frame, on the sides before it."""
        return self.projectors[0].box_px // 2 + _CTF_REACH_PX

    def draw_specimen(self, rng: np.random.Generator, controls: Controls | None = None) -> VirtualSpecimen:
        """Draw the particles of one frame."""
        controls = controls or Controls()
        facts = self.bank.facts
        n_wanted = facts.counts.draw(rng)
        centres = controls.centres_yx_px
        if centres is None:
            centres = place_on_free_pixels(n_wanted, self.bank.shape_yx, facts.spacing_px, rng)
        else:
            n_wanted = len(centres)
        rotations = draw_rotations(len(centres), facts.symmetry, rng)
        if controls.rotations is not None:
            rotations = controls.rotations[np.arange(len(centres)) % len(controls.rotations)]
        n_volumes = len(self.projectors)
        weights = np.asarray(self.settings.conformation_weights or (1.0,) * n_volumes, dtype=np.float64)
        conformations = rng.choice(n_volumes, size=len(centres), p=weights / weights.sum())
        if controls.conformation is not None:
            conformations = np.full(len(centres), controls.conformation)
        return VirtualSpecimen(
            centres_yx_px=np.asarray(centres, dtype=np.float64).reshape(-1, 2),
            rotations=np.asarray(rotations, dtype=np.float32),
            conformations=np.asarray(conformations, dtype=np.int64),
            n_wanted=n_wanted,
        )

    def draw_imaging(self, rng: np.random.Generator, controls: Controls | None = None) -> Imaging:
        """Draw defocus from the Gaussian fitted to the session's CTFs (its astigmatism from one of them), and the ice."""
        controls = controls or Controls()
        rows = self.bank.ctfs.double().numpy()
        mean = rows[:, :2].mean(axis=1)
        row = rows[rng.integers(len(rows))]
        drawn = float(np.clip(rng.normal(), -_CLIP_SD, _CLIP_SD) * mean.std() + mean.mean())
        ice_map = int(rng.integers(len(self.bank.ice_maps)))
        defocus = max(drawn, _LEAST_DEFOCUS_ANGSTROM)
        if controls.defocus_angstrom is not None:
            defocus = controls.defocus_angstrom
        half = 0.5 * float(row[0] - row[1])
        return Imaging(
            ctf=CtfTruth(
                defocus_u_angstrom=defocus + half,
                defocus_v_angstrom=defocus - half,
                astigmatism_angle_deg=float(row[2]),
                phase_shift_deg=float(row[3]),
            ),
            ice_map=ice_map if controls.ice_map is None else controls.ice_map,
        )

    def render(self, specimen: VirtualSpecimen) -> RenderedField:
        """Project every particle and add them up; find the mask, and who crosses the border or another."""
        height, width = self.bank.shape_yx
        margin = self.margin_px
        canvas = torch.zeros(good_size(height + 2 * margin), good_size(width + 2 * margin))
        covered = torch.zeros(canvas.shape, dtype=torch.int16)
        outlines: list[tuple[Tensor, tuple[int, int]]] = []
        for rows in np.array_split(
            np.arange(specimen.n_particles), max(1, -(-specimen.n_particles // _BATCH))
        ):
            place = specimen.centres_yx_px[rows] + margin
            whole = np.floor(place)
            images = self._project(specimen, rows, (place - whole).astype(np.float32))
            for image, corner in zip(images, whole.astype(int).tolist(), strict=True):
                add_patch(canvas, image, corner[0], corner[1])
                outline = (image > (1.0 - self.settings.mask_threshold) * image.max()).to(torch.int16)
                add_patch(covered, outline, corner[0], corner[1])
                outlines.append((outline, (corner[0], corner[1])))
        frame = (slice(margin, margin + height), slice(margin, margin + width))
        inside = torch.zeros(canvas.shape, dtype=torch.bool)
        inside[frame] = True
        is_border, is_overlapping = [], []
        for outline, (y, x) in outlines:
            half = outline.shape[0] // 2
            part = (
                slice(y - half, y - half + outline.shape[0]),
                slice(x - half, x - half + outline.shape[1]),
            )
            own = outline > 0
            is_border.append(bool((own & ~inside[part]).any()))
            is_overlapping.append(bool((own & (covered[part] > 1)).any()))
        return RenderedField(
            projection=canvas,
            mask=covered[frame] > 0,
            margin_px=margin,
            specimen=specimen,
            is_border=np.array(is_border, dtype=bool),
            is_overlapping=np.array(is_overlapping, dtype=bool),
        )

    def image(self, rendered: RenderedField, imaging: Imaging) -> Float[Tensor, "h w"]:
        """Return I_phy of a whole frame."""
        height, width = self.bank.shape_yx
        margin = rendered.margin_px
        seen = self.image_canvas(rendered.projection, self.ice_canvas(imaging, rendered), imaging)
        return seen[margin : margin + height, margin : margin + width]

    def frame_mean(self, rendered: RenderedField, imaging: Imaging) -> float:
        """Return the mean of I_phy over the frame, without imaging it: the specimen's times the transfer of its mean."""
        height, width = self.bank.shape_yx
        margin = rendered.margin_px
        frame = (slice(margin, margin + height), slice(margin, margin + width))
        if self.settings.imaging == "projection":
            return self.background - float(rendered.projection[frame].mean())
        specimen = self.ice_canvas(imaging, rendered)[frame] * (rendered.projection[frame] - self.background)
        turn = math.radians(imaging.ctf.phase_shift_deg) + math.asin(
            self.bank.facts.microscope.amplitude_contrast
        )
        return -math.sin(turn) * float(specimen.mean())

    def ice_canvas(self, imaging: Imaging, rendered: RenderedField) -> Float[Tensor, "ch cw"]:
        """Return the ice map on the field's canvas, continued beyond the frame as it ends there."""
        height, width = rendered.projection.shape
        if imaging.ice_map < 0:
            return torch.ones(height, width)
        frame_height, frame_width = self.bank.shape_yx
        spread = spread_ice_weights(self.bank.ice_maps[imaging.ice_map], (frame_height, frame_width))
        margin = rendered.margin_px
        rest = (width - frame_width - margin, height - frame_height - margin)
        pads = (margin, rest[0], margin, rest[1])
        return torch.nn.functional.pad(spread[None, None], pads, mode="replicate")[0, 0]

    def image_canvas(
        self, projection: Float[Tensor, "h w"], ice: Float[Tensor, "h w"], imaging: Imaging
    ) -> Float[Tensor, "h w"]:
        """Return eq. 3 on a canvas, whose edges wrap around; without physics, the specimen's negative."""
        if self.settings.imaging == "projection":
            return self.background - projection
        return image_specimen(
            ice * (projection - self.background),
            imaging.ctf,
            self.bank.facts.microscope,
            self.bank.facts.pixel_size_angstrom,
        )

    def _project(
        self, specimen: VirtualSpecimen, rows: NDArray[np.intp], shifts: NDArray[np.float32]
    ) -> Tensor:
        box = self.projectors[0].box_px
        images = torch.zeros(len(rows), box, box)
        for index, projector in enumerate(self.projectors):
            chosen = np.flatnonzero(specimen.conformations[rows] == index)
            if len(chosen):
                matrices = torch.from_numpy(specimen.rotations[rows[chosen]])
                images[chosen] = projector.project(matrices, torch.from_numpy(shifts[chosen]))
        return images / self.peak


def image_specimen(
    specimen: Float[Tensor, "h w"], ctf: CtfTruth, microscope: Microscope, pixel_size_angstrom: float
) -> Float[Tensor, "h w"]:
    """Return a projected specimen convolved with the point spread function of eq. 8 (protein dark)."""
    shape = (int(specimen.shape[0]), int(specimen.shape[1]))
    ky, kx = frequency_grid(shape, pixel_size_angstrom)
    transfer = -evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=ctf.defocus_u_angstrom,
        defocus_v_angstrom=ctf.defocus_v_angstrom,
        astigmatism_angle_deg=ctf.astigmatism_angle_deg,
        voltage_kv=microscope.voltage_kv,
        cs_mm=microscope.cs_mm,
        amplitude_contrast=microscope.amplitude_contrast,
        phase_shift_deg=ctf.phase_shift_deg,
    )
    return torch.fft.irfft2(torch.fft.rfft2(specimen) * transfer, s=shape)


def build_physics(bank: SessionBank, settings: PhysicsSettings) -> PhysicsStage:
    """Prepare the projectors, and measure the scale of projections and of the noise on a few draws of their own."""
    n_volumes = len(bank.volumes)
    weights = settings.conformation_weights
    if weights is not None and (len(weights) != n_volumes or min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(
            f"conformation_weights: {weights}, must be {n_volumes} weights of at least 0, one over 0"
        )
    projectors = [Projector(volume, bank.facts.pixel_size_angstrom) for volume in bank.volumes]
    rng = np.random.default_rng(0)
    views = torch.from_numpy(draw_rotations(_REFERENCE_VIEWS, "C1", rng))
    peak = float(torch.stack([p.project(views).amax(dim=(-2, -1)).mean() for p in projectors]).mean())
    if not peak > 0.0:
        raise ValueError(f"volumes: mean peak of projections {peak}, a particle has positive density")
    stage = PhysicsStage(
        bank=bank,
        settings=settings,
        projectors=projectors,
        peak=peak,
        background=settings.background,
        noise_sd=1.0,
        snr=settings.snr,
    )
    rendered, seen = [], []
    for _ in range(_REFERENCE_FRAMES):
        rendered.append(stage.render(stage.draw_specimen(rng)))
        seen.append(stage.draw_imaging(rng))
    if settings.contrast == "session":
        scale = _fit_session(stage, rendered, seen)
        snr, noise_sd = scale.signal_variance / scale.noise_variance, math.sqrt(scale.noise_variance)
        return replace(stage, background=scale.background, noise_sd=noise_sd, snr=snr)
    variances = [float(stage.image(r, i).var()) for r, i in zip(rendered, seen, strict=True)]
    return replace(stage, noise_sd=float(np.sqrt(np.mean(variances) / settings.snr)))


def _fit_session(
    stage: PhysicsStage, rendered: Sequence[RenderedField], seen: Sequence[Imaging]
) -> FrameScale:
    """Return background and noise that give a few frames the session's contrast."""
    facts = stage.bank.facts
    diameter_px = facts.diameter_angstrom / facts.pixel_size_angstrom
    frames = [
        [replace(stage, background=b).image(r, i) for r, i in zip(rendered, seen, strict=True)]
        for b in (0.0, 1.0)
    ]
    centres = [r.specimen.centres_yx_px for r in rendered]
    profile = mean_profile(frames[0], centres, diameter_px)
    if facts.contrast is None or profile is None:
        which = "the session's picks" if facts.contrast is None else "the particles of a few frames"
        raise ValueError(f"contrast: session, {which} are too few to measure it; take given")
    return fit_scale(facts.contrast, profile, frames[0], frames[1], diameter_px)
