"""A session folder with known truth, whose noise the physics stage does not contain.

Micrographs come from the virtual microscope (counting noise, granular ice, junk, MTF). Added here: ice of uneven thickness that
darkens in blots, and a detector's own noise that is correlated between neighbours and along rows. CryoGEM has to
learn these; noise by formula cannot have them. For tests and benchmarks:
`python -m actors.cryogem.virtual_session FOLDER --micrographs 24`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from scipy import ndimage

from actors.preprocess.ctf import describe_fit
from models.fourier.filters import low_pass_filter
from models.reconstruction.volume_io import write_volume
from models.simulation.exposure import ExposureTruth, VirtualMicroscope
from models.simulation.session import specimen_volume
from models.simulation.settings import MicroscopeSettings, SessionSettings, SpecimenSettings
from stream.records.values import CtfFit, Optics, RunId
from stream.sinks.mrc_images import write_micrograph
from stream.sinks.relion_star import make_particle_optics, write_particles_star, write_picks_star
from stream.store.files import replacing
from stream.store.layout import OutputLayout

_MAP_RESOLUTION_ANGSTROM = 12.0
_PURPOSE = 77
TRUTH_STAR = Path("truth/particles.star")


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualSessionSettings:
    """What the session holds.

    The noises are standard deviations: the detector's and its rows' relative to counting noise, the ice's thickness
    relative to its mean free path.
    """

    n_micrographs: int = 12
    shape_yx_px: tuple[int, int] = (512, 512)
    pixel_size_angstrom: float = 4.0
    structure: str = "phantom:3:mass_kda=600"
    particles_per_micrograph: float = 60.0
    defocus_um: tuple[float, float] = (1.5, 2.8)
    detector_noise: float = 0.7
    row_noise: float = 0.15
    ice_unevenness: float = 0.05
    seed: int = 11


def write_virtual_session(folder: Path, settings: VirtualSessionSettings) -> OutputLayout:
    """Write a session folder as `icestream run` would leave it, and the truth beside (`TRUTH_STAR`)."""
    layout = OutputLayout(folder)
    volume, diameter = specimen_volume(settings.structure, settings.pixel_size_angstrom)
    physics = MicroscopeSettings(
        shape_yx_px=settings.shape_yx_px,
        pixel_size_angstrom=settings.pixel_size_angstrom,
        defocus_um=settings.defocus_um,
        dose_e_per_angstrom2=30.0,
        n_frames=8,
    )
    specimen = SpecimenSettings(particles_per_exposure=settings.particles_per_micrograph, junk_fraction=0.02)
    microscope = VirtualMicroscope(
        volume, diameter, SessionSettings(specimen=specimen, microscope=physics, seed=settings.seed)
    )
    tables = []
    for index in range(settings.n_micrographs):
        name = f"virtual_{index:04d}"
        image, truth = microscope.micrograph(index)
        rng = np.random.default_rng((settings.seed, index, _PURPOSE))
        noisy = add_detector_noise(image, settings, rng)
        write_micrograph(layout.micrograph(name), noisy, settings.pixel_size_angstrom)
        write_picks_star(layout.picks(name), truth.coordinates_yx_px, np.ones(truth.n_particles))
        _write_json(layout.ctf_values(name), _ctf_document(truth, settings.pixel_size_angstrom))
        tables.append(_truth_table(layout.micrograph(name).relative_to(folder), truth))
    optics = Optics(
        voltage_kv=physics.voltage_kv, cs_mm=physics.cs_mm, amplitude_contrast=physics.amplitude_contrast
    )
    write_particles_star(
        folder / TRUTH_STAR,
        pd.concat(tables, ignore_index=True),
        make_particle_optics(
            optics, image_pixel_size_angstrom=settings.pixel_size_angstrom, image_size_px=volume.shape[0]
        ),
    )
    run = layout.run(RunId("run-truth"))
    run.mkdir(parents=True, exist_ok=True)
    k = [torch.fft.fftfreq(volume.shape[0], settings.pixel_size_angstrom)] * 2
    k.append(torch.fft.rfftfreq(volume.shape[0], settings.pixel_size_angstrom))
    k2 = k[0].square()[:, None, None] + k[1].square()[None, :, None] + k[2].square()[None, None, :]
    coarse = torch.fft.irfftn(
        torch.fft.rfftn(volume) * low_pass_filter(k2, _MAP_RESOLUTION_ANGSTROM), s=volume.shape
    )
    with replacing(run / "map.mrc") as temporary:
        write_volume(temporary, coarse, settings.pixel_size_angstrom)
    _write_json(run / "summary.json", {"symmetry": "C1", "resolution_angstrom": _MAP_RESOLUTION_ANGSTROM})
    document = {
        "microscope": {
            "voltage_kv": physics.voltage_kv,
            "cs_mm": physics.cs_mm,
            "amplitude_contrast": physics.amplitude_contrast,
        },
        "particle": {"diameter_angstrom": float(diameter)},
        "engine": {"symmetry": "C1"},
    }
    with replacing(layout.session) as temporary:
        temporary.write_text(yaml.safe_dump(document))
    return layout


def add_detector_noise(
    image: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    settings: VirtualSessionSettings,
    rng: np.random.Generator,
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return a micrograph through uneven ice, with noise correlated over neighbours (σ 0.7 px) and along rows."""
    shape = image.shape
    blots = ndimage.gaussian_filter(rng.standard_normal(shape), min(shape) / 12, mode="wrap")
    thickness = settings.ice_unevenness * blots / blots.std()
    counting = float(np.sqrt(image.mean()))
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 0.7, mode="wrap")
    detector = settings.detector_noise * counting * smooth / smooth.std()
    rows = settings.row_noise * counting * rng.standard_normal((shape[0], 1))
    return np.asarray(image * np.exp(-thickness) + detector + rows, dtype=np.float32)


def _truth_table(micrograph: Path, truth: ExposureTruth) -> pd.DataFrame:
    """Return the particles of one micrograph; the coordinates are the particles' centres, so origins are 0."""
    return pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@{micrograph}" for i in range(truth.n_particles)],
            "rlnMicrographName": str(micrograph),
            "rlnCoordinateX": truth.coordinates_yx_px[:, 1],
            "rlnCoordinateY": truth.coordinates_yx_px[:, 0],
            "rlnAngleRot": truth.euler_deg[:, 0],
            "rlnAngleTilt": truth.euler_deg[:, 1],
            "rlnAnglePsi": truth.euler_deg[:, 2],
            "rlnDefocusU": truth.defocus_u_angstrom,
            "rlnDefocusV": truth.defocus_v_angstrom,
            "rlnDefocusAngle": truth.astigmatism_angle_deg,
            "rlnPhaseShift": truth.phase_shift_deg,
            "rlnOpticsGroup": 1,
        }
    )


def _ctf_document(truth: ExposureTruth, pixel_size_angstrom: float) -> dict[str, float | bool | None]:
    """Return what the service would write of a perfect fit."""
    fit = CtfFit(
        defocus_u_angstrom=truth.ctf.defocus_u_angstrom,
        defocus_v_angstrom=truth.ctf.defocus_v_angstrom,
        astigmatism_angle_deg=truth.ctf.astigmatism_angle_deg,
        phase_shift_deg=truth.ctf.phase_shift_deg,
        fit_resolution_angstrom=2.0 * pixel_size_angstrom,
        score=1.0,
        is_reliable=True,
    )
    return {**describe_fit(fit), "pixel_size_angstrom": pixel_size_angstrom}


def _write_json(path: Path, document: dict[str, float | bool | None] | dict[str, object]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Write a session from the command line."""
    usual = VirtualSessionSettings()
    parser = argparse.ArgumentParser(prog="python -m actors.cryogem.virtual_session")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--micrographs", type=int, default=usual.n_micrographs)
    parser.add_argument("--seed", type=int, default=usual.seed)
    given = parser.parse_args(arguments)
    write_virtual_session(
        given.folder, VirtualSessionSettings(n_micrographs=given.micrographs, seed=given.seed)
    )


if __name__ == "__main__":
    main()
