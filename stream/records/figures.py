"""What a run tells beyond its resolution: how its views lie, and how its resolution grows with particles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TiltFigures:
    """SCF* foretold for a stage tilt: of tilted particles alone, and mixed with as many untilted ones.

    `unsampled_fraction` is the part of Fourier space that the tilted views leave out.
    """

    tilt_deg: float
    scf_star: float
    scf_star_mixed: float
    unsampled_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewFigures:
    """Where views are missing; None = nowhere, or not needed.

    `missing_rot_deg`, `missing_tilt_deg` are the middle of the largest gap as RELION's angles, `missing_fraction` the
    share of all views with less than a fifth of their even share.
    """

    efficiency: float | None
    missing_fraction: float
    missing_rot_deg: float | None
    missing_tilt_deg: float | None
    tilts: tuple[TiltFigures, ...]
    recommended_tilt_deg: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthFigures:
    """1/d² = slope · ln N + constant, fitted over random parts of the particles (ResLog).

    `resolution_angstrom` is that of all `n_particles` by the same measure; `ssnr_angstrom_at_2n` what twice as many
    would give if only the signal-to-noise ratio grew.
    """

    n_particles: float
    resolution_angstrom: float
    slope_per_ln_n: float
    slope_sd: float
    ssnr_angstrom_at_2n: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What a run folder says about views and growth; None = not measured."""

    views: ViewFigures | None = None
    growth: GrowthFigures | None = None
