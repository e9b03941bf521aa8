"""The run folder: what an engine leaves behind, each file written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import starfile
import torch
from torch import Tensor

from actors.engines.base import STATE_NAME, EngineOutput, EngineSettings
from actors.engines.particle_images import LoadedParticles
from models.fourier.rotations import matrix_to_euler
from models.reconstruction.figures import (
    save_fsc_picture,
    save_local_resolution_picture,
    save_map_picture,
    save_orientation_picture,
)
from models.reconstruction.fsc import FscCurves
from models.reconstruction.local_resolution import LocalResolution
from models.reconstruction.orientation import OrientationDiagnostics, orientation_diagnostics
from models.reconstruction.orientation_page import write_orientation_page
from models.reconstruction.refinement import RefinementResult
from models.reconstruction.tilt import forecast_views
from models.reconstruction.volume_io import write_volume
from stream.sinks.relion_star import write_particles_star
from stream.store.files import replacing

ORIENTATION_SEED = 7
"""The diagnostics draw null maps and views; a fixed seed makes two measurements of one folder agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What `summary.json` tells."""

    particles: LoadedParticles
    settings: EngineSettings
    curves: FscCurves
    diagnostics: OrientationDiagnostics
    b_factor_angstrom2: float | None
    n_iterations: int
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    growth: Mapping[str, Any] | None = None
    local_resolution: Mapping[str, float] | None = None
    images: Mapping[str, Any] | None = None
    cross_evidence: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names and writers of the files below one run's folder."""

    path: Path

    @property
    def initial_map(self) -> Path:
        """The initial model."""
        return self.path / "initial.mrc"

    @property
    def initial_summary(self) -> Path:
        """What was tried for it."""
        return self.path / "initial.json"

    @property
    def half1(self) -> Path:
        """First unfiltered half map."""
        return self.path / "half1.mrc"

    @property
    def half2(self) -> Path:
        """Second unfiltered half map."""
        return self.path / "half2.mrc"

    @property
    def mask(self) -> Path:
        """The soft solvent mask of the FSC."""
        return self.path / "mask.mrc"

    @property
    def poses(self) -> Path:
        """Particles with poses."""
        return self.path / "poses.star"

    @property
    def state(self) -> Path:
        """The sums that a later run continues from."""
        return self.path / STATE_NAME

    @property
    def growth_picture(self) -> Path:
        """Resolution against the number of particles."""
        return self.path / "growth.png"

    @property
    def summary(self) -> Path:
        """The run in numbers."""
        return self.path / "summary.json"

    def has_initial_model(self, digest: str) -> bool:
        """Say whether an initial model of the same particles and settings lies here already."""
        if not (self.initial_map.is_file() and self.initial_summary.is_file()):
            return False
        return self.read_json(self.initial_summary).get("digest") == digest

    def write_json(self, path: Path, document: Mapping[str, Any]) -> None:
        """Write a document; NaN and infinities become null."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(_plain(document), indent=2) + "\n")

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read a document."""
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    def write_maps(self, maps: Mapping[str, Tensor], pixel_size_angstrom: float) -> None:
        """Write NAME.mrc for each map."""
        for name, volume in maps.items():
            with replacing(self.path / f"{name}.mrc") as temporary:
                write_volume(temporary, volume, pixel_size_angstrom)

    def write_fsc(self, curves: FscCurves) -> None:
        """Write the curves with RELION's column names."""
        frequency = curves.frequencies_per_angstrom.numpy()
        with np.errstate(divide="ignore"):
            resolution = np.where(frequency > 0, 1.0 / frequency, 999.0)
        table = pd.DataFrame(
            {
                "rlnSpectralIndex": np.arange(len(frequency)),
                "rlnResolution": frequency,
                "rlnAngstromResolution": resolution,
                "rlnFourierShellCorrelationCorrected": curves.corrected.numpy(),
                "rlnFourierShellCorrelationUnmaskedMaps": curves.unmasked.numpy(),
                "rlnFourierShellCorrelationMaskedMaps": curves.masked.numpy(),
                "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": curves.random.numpy(),
            }
        )
        with replacing(self.path / "fsc.star") as temporary:
            starfile.write({"fsc": table}, temporary)

    def write_poses(self, particles: LoadedParticles, result: RefinementResult) -> None:
        """Write every particle that was used: its address, CTF (refined where it was), half set, pose, scale, weight."""
        euler = matrix_to_euler(result.rotations).numpy()
        origin = (result.shifts_xy_px * particles.data.pixel_size_angstrom).numpy()
        columns = particle_columns(particles) | {
            "rlnAngleRot": euler[:, 0],
            "rlnAngleTilt": euler[:, 1],
            "rlnAnglePsi": euler[:, 2],
            "rlnOriginXAngst": origin[:, 0],
            "rlnOriginYAngst": origin[:, 1],
            "rlnRandomSubset": particles.half_set.numpy(),
            "rlnLogLikeliContribution": result.log_likelihood_gain.numpy(),
            "rlnGroupScaleCorrection": result.scales.numpy(),
            "icestreamWeight": result.weights.numpy(),
        }
        for name in ("rlnDefocusU", "rlnDefocusV"):
            columns[name] = columns[name] + result.defocus_offset_angstrom.numpy()
        write_particles_star(self.poses, pd.DataFrame(columns), optics_block(particles))

    def write_pictures(
        self,
        volume: Tensor,
        curves: FscCurves,
        diagnostics: OrientationDiagnostics,
        pixel_size_angstrom: float,
    ) -> None:
        """Write map.png, fsc.png, orientation.png and orientation.html."""
        with replacing(self.path / "map.png") as temporary:
            save_map_picture(volume, temporary, pixel_size_angstrom=pixel_size_angstrom)
        with replacing(self.path / "fsc.png") as temporary:
            save_fsc_picture(curves, temporary)
        with replacing(self.path / "orientation.png") as temporary:
            save_orientation_picture(diagnostics, temporary)
        with replacing(self.path / "orientation.html") as temporary:
            write_orientation_page(diagnostics, temporary, resolution_angstrom=curves.resolution_angstrom)

    def write_local_resolution(
        self, local: LocalResolution, volume: Tensor, pixel_size_angstrom: float
    ) -> Mapping[str, float]:
        """Write locres.mrc (Å) and locres.png; return the quantiles over the mask."""
        self.write_maps({"locres": local.volume}, pixel_size_angstrom)
        with replacing(self.path / "locres.png") as temporary:
            save_local_resolution_picture(volume, local, temporary)
        return local.quantiles()

    def write_summary(self, summary: RunSummary) -> EngineOutput:
        """Write summary.json and return the record of the engine interface."""
        output = EngineOutput(
            folder=self.path,
            map=self.path / "map.mrc",
            half1=self.half1,
            half2=self.half2,
            mask=self.mask,
            fsc_star=self.path / "fsc.star",
            poses_star=self.poses,
            resolution_angstrom=summary.curves.resolution_angstrom,
            cfar=_finite(summary.diagnostics.cfar),
            cfar_null=_finite(summary.diagnostics.cfar_null),
            scf_star=_finite(summary.diagnostics.scf_star),
            n_particles=len(summary.particles.data),
            n_excluded=summary.particles.n_excluded,
            note="; ".join(summary.notes),
            seconds=dict(summary.seconds),
            provenance=_provenance(summary),
        )
        document = {
            "resolution_angstrom": output.resolution_angstrom,
            "unmasked_resolution_angstrom": summary.curves.unmasked_resolution_angstrom,
            "cfar": output.cfar,
            "cfar_null": output.cfar_null,
            "scf_star": output.scf_star,
            "sphericity": _finite(summary.diagnostics.sphericity),
            "view_efficiency": _finite(summary.diagnostics.view_efficiency),
            "symmetry": summary.settings.symmetry,
            "n_particles": output.n_particles,
            "n_excluded": output.n_excluded,
            "b_factor_angstrom2": summary.b_factor_angstrom2,
            "local_resolution_angstrom": summary.local_resolution,
            "growth": summary.growth,
            "images": summary.images,
            "cross_evidence": summary.cross_evidence,
            "note": output.note,
            "seconds": output.seconds,
            "provenance": output.provenance,
        }
        self.write_json(self.summary, document)
        return output


def measure_orientation(
    half1: Tensor,
    half2: Tensor,
    mask: Tensor,
    pixel_size_angstrom: float,
    group: Tensor,
    rotations: Tensor,
    folder: RunFolder,
) -> OrientationDiagnostics:
    """Measure the diagnostics of a half-map pair and what its views lack; write orientation.json."""
    diagnostics = orientation_diagnostics(
        half1,
        half2,
        mask,
        pixel_size_angstrom,
        generator=torch.Generator().manual_seed(ORIENTATION_SEED),
        symmetry_matrices=group,
        rotations=rotations,
    )
    forecast = forecast_views(
        rotations, generator=torch.Generator().manual_seed(ORIENTATION_SEED), group=group
    )
    folder.write_json(folder.path / "orientation.json", diagnostics.summary() | {"views": forecast.summary()})
    return diagnostics


def particle_columns(particles: LoadedParticles) -> dict[str, Any]:
    """Return address, CTF, place and uid of every image in use, as columns of a STAR file."""
    table, rows = particles.table, particles.rows
    names = zip(table.stack_indices[rows], table.stack_paths[rows], strict=True)
    columns: dict[str, Any] = {
        "rlnImageName": [f"{index + 1:06d}@{path}" for index, path in names],
        "rlnOpticsGroup": table.optics_groups[rows],
        "rlnDefocusU": table.defocus_u_angstrom[rows],
        "rlnDefocusV": table.defocus_v_angstrom[rows],
        "rlnDefocusAngle": table.astigmatism_angle_deg[rows],
        "rlnPhaseShift": np.nan_to_num(table.phase_shift_deg[rows]),
    }
    if all(table.micrograph_names[row] is not None for row in rows):
        columns["rlnMicrographName"] = [str(table.micrograph_names[row]) for row in rows]
    if np.isfinite(table.coordinate_x_px[rows]).all() and np.isfinite(table.coordinate_y_px[rows]).all():
        columns["rlnCoordinateX"] = table.coordinate_x_px[rows]
        columns["rlnCoordinateY"] = table.coordinate_y_px[rows]
    if table.uids is not None:
        columns["icestreamUid"] = table.uids[rows]
    return columns


def optics_block(particles: LoadedParticles) -> pd.DataFrame:
    """Return one row per optics group of the images in use."""
    table, rows = particles.table, particles.rows
    groups, first = np.unique(table.optics_groups[rows], return_index=True)
    own = rows[first]
    tilt = table.beam_tilt_xy_mrad
    tilts = {} if tilt is None else {"rlnBeamTiltX": tilt[own, 0], "rlnBeamTiltY": tilt[own, 1]}
    return pd.DataFrame(
        {
            "rlnOpticsGroup": groups,
            "rlnOpticsGroupName": [f"opticsGroup{g}" for g in groups],
            "rlnVoltage": table.voltage_kv[own],
            "rlnSphericalAberration": table.cs_mm[own],
            "rlnAmplitudeContrast": table.amplitude_contrast[own],
            "rlnImagePixelSize": table.pixel_size_angstrom[own],
            "rlnImageSize": [table.box_size_px] * len(groups),
            "rlnImageDimensionality": [2] * len(groups),
        }
        | tilts
    )


def _provenance(summary: RunSummary) -> dict[str, Any]:
    settings = summary.settings
    return {
        "engine": "embedded",
        "particles": summary.particles.table.source,
        "box_px": summary.particles.data.box_size_px,
        "pixel_size_angstrom": summary.particles.data.pixel_size_angstrom,
        "fsc_rule": summary.curves.rule,
        "fsc_threshold": summary.curves.threshold,
        "n_iterations": summary.n_iterations,
        "symmetry": settings.symmetry,
        "seed": settings.seed,
        "effort": settings.effort,
        "n_starts": settings.n_starts,
        "mask_diameter_angstrom": settings.mask_diameter_angstrom,
        "mask": None if settings.mask is None else str(settings.mask),
        "refine_defocus": settings.refine_defocus,
        "torch": torch.__version__,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON values have no narrower type
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
