"""The virtual microscope: exposures and micrographs, each from (seed, index) alone.

Every draw comes from `numpy.random.SeedSequence((seed, index, purpose))`, so exposures can be made in any
order, in any process, and frames be read again, with the same bytes. Frames are rendered one at a time: the
still exit image is cut into overlapping tiles whose spectra are kept; per frame each tile gets its own shift,
the radiation damage and the camera's MTF.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.transforms import good_size
from models.optics.ctf import frequency_grid
from models.simulation.camera import Camera, build_camera, camera_mtf, draw_poisson
from models.simulation.imaging import CtfTruth, ExitImage, render_exit_image
from models.simulation.motion import Motion, draw_motion
from models.simulation.projection import Projector
from models.simulation.settings import MicroscopeSettings, SessionSettings
from models.simulation.specimen import Junk, Specimen, draw_specimen, draw_views

FloatArray = npt.NDArray[np.float64]

_SPECIMEN, _AMORPHOUS, _MOTION, _NOISE, _CAMERA, _VIEWS = range(6)
_SESSION_INDEX = 2**31
"""The index under which a session's own draws (camera, preferred views) are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposureTruth:
    """What is known of an exposure; row i of every array is a particle whose centre lies in the frame.

    Coordinates are (y, x) px of the unbinned first frame, poses (rot, tilt, psi) in degrees with zero shift
    (the particle's centre *is* the coordinate); defocus per particle in Å.
    """

    index: int
    coordinates_yx_px: FloatArray
    euler_deg: FloatArray
    defocus_u_angstrom: FloatArray
    defocus_v_angstrom: FloatArray
    astigmatism_angle_deg: float
    phase_shift_deg: float
    ctf: CtfTruth
    junk: tuple[Junk, ...]
    motion: Motion
    ice_thickness_angstrom: float

    @property
    def n_particles(self) -> int:
        """Number of particles whose centre lies in the frame."""
        return len(self.coordinates_yx_px)


class SimulatedExposure:
    """One exposure: its truth, and frames that are rendered when they are read (each time the same)."""

    def __init__(
        self,
        *,
        truth: ExposureTruth,
        exit_image: ExitImage,
        settings: MicroscopeSettings,
        camera: Camera,
        seed: int,
    ) -> None:
        self.truth = truth
        self.settings = settings
        self._exit_image = exit_image
        self._camera = camera
        self._seed = seed

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return self.settings.n_frames

    @property
    def shape_yx_px(self) -> tuple[int, int]:
        """Shape of every frame."""
        return self.settings.shape_yx_px

    @cached_property
    def _tiles(self) -> _Tiles:
        return _Tiles(self._exit_image, self.settings)

    def frames(self) -> Iterator[npt.NDArray[np.uint8] | npt.NDArray[np.uint16]]:
        """Yield raw frames in order."""
        for frame in range(self.n_frames):
            yield self.frame(frame)

    def frame(self, frame: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
        """Return one raw frame of counts."""
        rng = _generator(self._seed, self.truth.index, _NOISE, frame)
        return self._camera.expose(self.expected_frame(frame).numpy(), rng)

    def expected_frame(self, frame: int) -> Float[Tensor, "h w"]:
        """Return the mean electrons per pixel of one frame, before gain and counting."""
        contrast = self._tiles.render(frame, self.truth.motion)
        dose_per_px = self.settings.dose_per_frame_e_per_angstrom2 * self.settings.pixel_size_angstrom**2
        return (
            dose_per_px
            * _in_frame(self._exit_image.transmission, self._exit_image, self.shape_yx_px)
            * (1.0 + contrast)
        )


class VirtualMicroscope:
    """A session: one structure, one camera, one set of settings; makes exposures by index.

    Parameters
    ----------
    volume
        Potential difference to ice in volts, at the microscope's pixel size, origin at the middle voxel.
    diameter_angstrom
        Greatest extent of the particle, for spacing and ice thickness.
    settings
        The session's settings.
    """

    def __init__(
        self, volume: Float[Tensor, "d d d"], diameter_angstrom: float, settings: SessionSettings
    ) -> None:
        self.settings = settings
        self.diameter_angstrom = diameter_angstrom
        self.truth_volume = volume
        self._projector = Projector(volume, settings.microscope.pixel_size_angstrom)
        self.camera = build_camera(settings.microscope, _generator(settings.seed, _SESSION_INDEX, _CAMERA))
        self._views = draw_views(
            max(1, settings.specimen.n_preferred_views), _generator(settings.seed, _SESSION_INDEX, _VIEWS)
        )

    @property
    def gain(self) -> npt.NDArray[np.float32]:
        """The gain reference: raw counts times this are electrons."""
        return self.camera.gain

    def expose(self, index: int) -> SimulatedExposure:
        """Return exposure `index` as a movie."""
        truth, exit_image = self._make(index)
        return SimulatedExposure(
            truth=truth,
            exit_image=exit_image,
            settings=self.settings.microscope,
            camera=self.camera,
            seed=self.settings.seed,
        )

    def micrograph(self, index: int) -> tuple[npt.NDArray[np.float32], ExposureTruth]:
        """Return exposure `index` as perfect motion correction and dose weighting would leave it.

        Electrons per pixel, gain-corrected, with white noise; the signal carries √⟨q²⟩ of the damage q (what
        optimal dose weights leave relative to the noise; Grant & Grigorieff 2015, eq. 9).
        """
        truth, exit_image = self._make(index)
        settings = self.settings.microscope
        shape = (int(exit_image.contrast.shape[0]), int(exit_image.contrast.shape[1]))
        ky, kx = frequency_grid(shape, settings.pixel_size_angstrom)
        k = torch.hypot(ky, kx)
        squared = torch.zeros_like(k)
        for frame in range(settings.n_frames):
            squared += damage_envelope(k, _mid_dose(settings, frame), settings.voltage_kv).square()
        envelope = (squared / settings.n_frames).sqrt() * camera_mtf(shape)
        contrast = torch.fft.irfft2(torch.fft.rfft2(exit_image.contrast) * envelope, s=shape)
        electrons = settings.dose_e_per_angstrom2 * settings.pixel_size_angstrom**2 * exit_image.transmission
        expected = _in_frame(electrons * (1.0 + contrast), exit_image, settings.shape_yx_px).clamp_min(0.0)
        counts = draw_poisson(expected.numpy(), _generator(self.settings.seed, index, _NOISE, 2**20))
        return counts.astype(np.float32), truth

    def _make(self, index: int) -> tuple[ExposureTruth, ExitImage]:
        settings = self.settings
        seed = settings.seed
        rng = _generator(seed, index, _SPECIMEN)
        ctf = _draw_ctf(settings.microscope, rng)
        specimen = draw_specimen(
            settings.specimen,
            shape_yx_px=settings.microscope.shape_yx_px,
            pixel_size_angstrom=settings.microscope.pixel_size_angstrom,
            diameter_angstrom=self.diameter_angstrom,
            session_views=self._views,
            rng=rng,
        )
        motion = draw_motion(settings.microscope, _generator(seed, index, _MOTION))
        exit_image = render_exit_image(
            specimen,
            self._projector,
            ctf,
            settings.specimen,
            settings.microscope,
            margin_px=_margin_px(settings.microscope, motion),
            rng=_generator(seed, index, _AMORPHOUS),
        )
        return _truth_of(index, specimen, ctf, motion, settings.microscope), exit_image


def simulate_exposure(microscope: VirtualMicroscope, exposure_index: int) -> SimulatedExposure:
    """Return one exposure as a movie with its truth."""
    return microscope.expose(exposure_index)


def simulate_micrograph(
    microscope: VirtualMicroscope, exposure_index: int
) -> tuple[npt.NDArray[np.float32], ExposureTruth]:
    """Return one exposure as an ideally corrected micrograph (electrons per px) with its truth."""
    return microscope.micrograph(exposure_index)


def damage_envelope(
    k: Float[Tensor, "*k"], dose_e_per_angstrom2: float, voltage_kv: float
) -> Float[Tensor, "*k"]:
    """Return the amplitude left after a dose: exp(-N / 2 Nc(k)), Nc = 0.245 k^-1.665 + 2.81 e/Å².

    Grant & Grigorieff 2015, eq. 2-3, at 300 kV; at 200 kV Nc is multiplied by 0.8, between by interpolation.
    """
    critical = 0.245 * k.clamp_min(1e-6).pow(-1.665) + 2.81
    factor = min(1.0, max(0.5, 0.8 + 0.2 * (voltage_kv - 200.0) / 100.0))
    return torch.exp(-0.5 * dose_e_per_angstrom2 / (critical * factor))


class _Tiles:
    """Overlapping tiles of the exit image: windows that sum to one, spectra kept, shifted per frame."""

    _CORE_PX, _TAPER_PX, _GUARD_PX = 160, 48, 8

    def __init__(self, exit_image: ExitImage, settings: MicroscopeSettings) -> None:
        self._shape = settings.shape_yx_px
        self._settings = settings
        self._margin = exit_image.margin_px
        core = min(self._CORE_PX, max(32, max(self._shape) // 3))
        self._hop = core
        self._size = good_size(core + self._TAPER_PX + 2 * self._GUARD_PX)
        reach = self._size + core  # the last origin lies beyond the frame by up to a core
        self._pad = reach
        height, width = self._shape
        self._origins = [
            (y, x) for y in range(-core, height + core, core) for x in range(-core, width + core, core)
        ]
        window = self._window(core)
        canvas = torch.nn.functional.pad(exit_image.contrast, (reach, reach, reach, reach))
        tiles = []
        for y, x in self._origins:
            top = y + self._margin + reach - self._TAPER_PX // 2 - self._GUARD_PX
            left = x + self._margin + reach - self._TAPER_PX // 2 - self._GUARD_PX
            tiles.append(canvas[top : top + self._size, left : left + self._size] * window)
        self._spectra = torch.fft.rfft2(torch.stack(tiles))
        ky, kx = frequency_grid((self._size, self._size), settings.pixel_size_angstrom)
        self._k = torch.hypot(ky, kx)
        self._mtf = camera_mtf((self._size, self._size))
        self._fy = torch.fft.fftfreq(self._size)
        self._fx = torch.fft.rfftfreq(self._size)

    def _window(self, core: int) -> Float[Tensor, "s s"]:
        """Return a flat square of `core` plus raised-cosine edges; neighbours `core` apart sum to one."""
        line = torch.arange(self._size, dtype=torch.float32) - self._GUARD_PX
        rise = ((line + 0.5) / self._TAPER_PX).clamp(0.0, 1.0)
        fall = ((line + 0.5 - core) / self._TAPER_PX).clamp(0.0, 1.0)
        profile = torch.sin(0.5 * math.pi * rise).square() - torch.sin(0.5 * math.pi * fall).square()
        return profile[:, None] * profile[None, :]

    def render(self, frame: int, motion: Motion) -> Float[Tensor, "h w"]:
        """Return the contrast of one frame: every tile moved by its own displacement."""
        settings = self._settings
        envelope = self._mtf * damage_envelope(self._k, _mid_dose(settings, frame), settings.voltage_kv)
        origins = np.array(self._origins, dtype=np.float64)
        centres = origins + 0.5 * self._hop
        local = motion.local_yx_px(centres[:, 0], centres[:, 1])[frame]
        shift = local + motion.global_yx_px[frame]
        whole = np.round(shift)
        remainder = torch.from_numpy((shift - whole).astype(np.float32))
        phase_y = torch.polar(torch.ones(()), -2.0 * math.pi * remainder[:, 0, None] * self._fy)
        phase_x = torch.polar(torch.ones(()), -2.0 * math.pi * remainder[:, 1, None] * self._fx)
        height, width = self._shape
        pad = self._pad + 2 * self._hop
        out = torch.zeros(height + 2 * pad, width + 2 * pad)
        offset = pad - self._TAPER_PX // 2 - self._GUARD_PX
        for start in range(0, len(origins), 16):
            part = slice(start, start + 16)
            spectra = self._spectra[part] * envelope * phase_y[part, :, None] * phase_x[part, None, :]
            for tile, origin, step in zip(
                torch.fft.irfft2(spectra, s=(self._size, self._size)),
                self._origins[part],
                whole[part].astype(int).tolist(),
                strict=True,
            ):
                y, x = origin[0] + step[0] + offset, origin[1] + step[1] + offset
                if 0 <= y <= out.shape[0] - self._size and 0 <= x <= out.shape[1] - self._size:
                    out[y : y + self._size, x : x + self._size] += tile
        return out[pad : pad + height, pad : pad + width]


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def _mid_dose(settings: MicroscopeSettings, frame: int) -> float:
    return (frame + 0.5) * settings.dose_per_frame_e_per_angstrom2


def _in_frame(image: Tensor, exit_image: ExitImage, shape_yx_px: tuple[int, int]) -> Tensor:
    margin = exit_image.margin_px
    return image[margin : margin + shape_yx_px[0], margin : margin + shape_yx_px[1]]


def _margin_px(settings: MicroscopeSettings, motion: Motion) -> int:
    """Return a margin that holds the drift and, up to 100 Å, what the CTF carries in from outside."""
    drift_px = float(np.abs(motion.global_yx_px).max(initial=0.0))
    spread_px = min(100.0 / settings.pixel_size_angstrom, 0.25 * min(settings.shape_yx_px))
    return math.ceil(drift_px + spread_px) + 16


def _draw_ctf(settings: MicroscopeSettings, rng: np.random.Generator) -> CtfTruth:
    mean = 1e4 * float(rng.uniform(*settings.defocus_um))
    half = 0.5 * settings.astigmatism_angstrom * float(rng.uniform(0.2, 1.0))
    return CtfTruth(
        defocus_u_angstrom=mean + half,
        defocus_v_angstrom=mean - half,
        astigmatism_angle_deg=float(rng.uniform(0.0, 180.0)),
        phase_shift_deg=settings.phase_shift_deg,
    )


def _truth_of(
    index: int, specimen: Specimen, ctf: CtfTruth, motion: Motion, settings: MicroscopeSettings
) -> ExposureTruth:
    y, x = specimen.coordinates_yx_px.T
    inside = (y >= 0) & (y <= settings.shape_yx_px[0] - 1) & (x >= 0) & (x <= settings.shape_yx_px[1] - 1)
    height = specimen.height_angstrom[inside]
    return ExposureTruth(
        index=index,
        coordinates_yx_px=specimen.coordinates_yx_px[inside],
        euler_deg=specimen.euler_deg[inside],
        defocus_u_angstrom=ctf.defocus_u_angstrom - height,
        defocus_v_angstrom=ctf.defocus_v_angstrom - height,
        astigmatism_angle_deg=ctf.astigmatism_angle_deg,
        phase_shift_deg=ctf.phase_shift_deg,
        ctf=ctf,
        junk=specimen.junk,
        motion=motion,
        ice_thickness_angstrom=specimen.ice_thickness_angstrom,
    )
