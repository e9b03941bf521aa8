"""What the virtual microscope is told: specimen, optics, camera. Values are checked once, here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecimenSettings:
    """Particles and ice of one grid.

    `junk_fraction` is the expected number of junk objects (ice crystals, aggregates) per particle, and also
    the probability that an exposure shows a carbon edge or an empty area. `contrast` scales the particles'
    potential (1 = as the atoms say). `preferred_fraction` of the particles have view directions within
    `preferred_spread_deg` of one of `n_preferred_views` directions, the rest are uniform.
    """

    particles_per_exposure: float = 60.0
    min_spacing_diameters: float = 0.9
    ice_thickness_angstrom: tuple[float, float] = (250.0, 450.0)
    ice_gradient: float = 0.25
    ice_granularity: float = 1.0
    contrast: float = 1.0
    junk_fraction: float = 0.05
    preferred_fraction: float = 0.0
    preferred_spread_deg: float = 12.0
    n_preferred_views: int = 2

    def __post_init__(self) -> None:
        _require("particles_per_exposure", self.particles_per_exposure, minimum=0.0, maximum=20000.0)
        _require("junk_fraction", self.junk_fraction, minimum=0.0, maximum=1.0)
        _require("preferred_fraction", self.preferred_fraction, minimum=0.0, maximum=1.0)
        _require("ice_thickness_angstrom", min(self.ice_thickness_angstrom), minimum=50.0, maximum=5000.0)
        _require("contrast", self.contrast, minimum=0.0, maximum=10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroscopeSettings:
    """Optics, exposure and camera of one session.

    `motion_angstrom` is the typical length of the whole-frame path (EMPIAR-10204 at 31 e/Å²: 9-17 Å),
    `local_motion_angstrom` the typical beam-induced displacement at the edge of the field (there: 1-3 Å).
    """

    shape_yx_px: tuple[int, int] = (1024, 1024)
    pixel_size_angstrom: float = 1.5
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    phase_shift_deg: float = 0.0
    dose_e_per_angstrom2: float = 40.0
    n_frames: int = 16
    defocus_um: tuple[float, float] = (0.8, 2.2)
    astigmatism_angstrom: float = 300.0
    b_factor_angstrom2: float = 40.0
    motion_angstrom: float = 10.0
    local_motion_angstrom: float = 2.0
    has_gain: bool = True
    defect_fraction: float = 2e-5

    def __post_init__(self) -> None:
        _require("shape_yx_px", min(self.shape_yx_px), minimum=32, maximum=32768)
        _require("pixel_size_angstrom", self.pixel_size_angstrom, minimum=0.05, maximum=50.0)
        _require("voltage_kv", self.voltage_kv, minimum=20.0, maximum=1500.0)
        _require("dose_e_per_angstrom2", self.dose_e_per_angstrom2, minimum=0.01, maximum=1000.0)
        _require("n_frames", self.n_frames, minimum=1, maximum=20000)
        _require("defocus_um", min(self.defocus_um), minimum=-20.0, maximum=20.0)
        if self.defocus_um[0] > self.defocus_um[1]:
            raise ValueError(f"defocus_um: {self.defocus_um}, must be MIN,MAX with MIN ≤ MAX")

    @property
    def dose_per_frame_e_per_angstrom2(self) -> float:
        """Electrons/Å² of each frame."""
        return self.dose_e_per_angstrom2 / self.n_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """Everything an exposure depends on besides the structure; `seed` starts every draw."""

    specimen: SpecimenSettings = field(default_factory=SpecimenSettings)
    microscope: MicroscopeSettings = field(default_factory=MicroscopeSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        _require("seed", self.seed, minimum=0, maximum=2**62)


def _require(name: str, value: float, *, minimum: float, maximum: float) -> None:
    if not minimum <= value <= maximum:
        raise ValueError(f"{name}: {value}, must lie in [{minimum}, {maximum}]")
