"""Annotated synthetic micrographs as files: images, masks, particle stacks, and their truth in four formats.

Micrograph i depends on (seed, i) alone and is computed on one thread, so the same seed gives the same bytes for any number
of worker processes. A folder holds
    micrographs/NAME.mrc, .png    grey values of the session's scale; the same as bytes
    masks/NAME.png                particle mask, 255 on particles
    particles/NAME.mrcs           every particle, white, background normalised; beyond the border mirrored
    particles.star, micrographs.star    RELION 3.1: optics, CTF, poses, flags
    topaz.txt                     image_name, x_coord, y_coord
    poses.pkl, ctf.pkl            cryoDRGN: (rotations, shifts as fractions of the box); nine CTF columns
    summary.json                  scale, counts, what was asked for
"""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from actors.cryogem.config import GenerateConfig, NoiseName
from models.cryogem.bank import load_bank
from models.cryogem.baselines import NoiseFit, NoiseModel, add_noise, fit_noise
from models.cryogem.greys import from_network_range, levels_to_network_range, to_network_range
from models.cryogem.networks import UnetGenerator
from models.cryogem.pairs import Purpose, random_stream, torch_stream
from models.cryogem.physics import Controls, PhysicsStage, RenderedField, build_physics
from models.cryogem.translation import add_input_noise, load_generator, translate
from models.fourier.rotations import euler_to_matrix, matrix_to_euler
from models.picking.extract import BoxSettings, extract_particles
from stream.records.errors import ConfigurationError, InputError
from stream.records.particles import derive_exposure_id, derive_particle_uid
from stream.records.values import Optics
from stream.sinks.mrc_images import write_micrograph, write_stack
from stream.sinks.relion_star import (
    make_micrograph_optics,
    make_particle_optics,
    read_picks_star,
    write_micrographs_star,
    write_particles_star,
)
from stream.store.files import replacing

BANK_FILE, GENERATOR_FILE = "bank.safetensors", "generator.safetensors"
Noise = Callable[[Tensor, np.random.Generator], Tensor]
_FIT_FRAMES = 4
_BOX_PER_DIAMETER = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The micrographs, the annotations, and how many particles they have."""

    micrographs: tuple[Path, ...]
    annotations: Path
    n_particles: int
    n_border: int
    n_overlapping: int


def generate_micrographs(
    config: GenerateConfig, *, on_progress: Callable[[int, int], None] | None = None
) -> GenerationResult:
    """Generate a data set into `config.out`."""
    tables: list[pd.DataFrame] = []
    rows: list[dict[str, Any]] = []
    with _single_thread():
        context = _Context.load(config)
        for done, (row, table) in enumerate(_produce(config, context), start=1):
            rows.append(row)
            tables.append(table)
            if on_progress is not None:
                on_progress(done, config.n_micrographs)
    particles = pd.concat(tables, ignore_index=True)
    _write_tables(config, context, pd.DataFrame(rows), particles)
    return GenerationResult(
        micrographs=tuple(config.out / row["rlnMicrographName"] for row in rows),
        annotations=config.out / "particles.star",
        n_particles=len(particles),
        n_border=int(particles["icestreamBorder"].sum()),
        n_overlapping=int(particles["icestreamOverlap"].sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What every micrograph needs; loaded once per process."""

    config: GenerateConfig
    stage: PhysicsStage
    make_noisy: Noise
    controls: Controls
    box_px: int

    @classmethod
    def load(cls, config: GenerateConfig) -> _Context:
        folder = config.training
        try:
            bank = load_bank(folder / BANK_FILE)
            network, physics = load_generator(folder / GENERATOR_FILE)
            stage = build_physics(bank, physics)
        except ValueError as error:
            raise InputError(folder, f"a training folder of CryoGEM ({error})") from error
        wanted = config.box_size_px
        if wanted is None:
            wanted = 2 * math.ceil(
                0.5 * _BOX_PER_DIAMETER * bank.facts.diameter_angstrom / bank.facts.pixel_size_angstrom
            )
        return cls(
            config=config,
            stage=stage,
            make_noisy=make_noise(config.noise, stage, network.to(config.device)),
            controls=_read_controls(config, stage),
            box_px=wanted,
        )

    def controls_of(self, index: int) -> Controls:
        """Return the controls of one micrograph: the defocus values take turns."""
        wanted = self.config.controls.defocus_angstrom
        if not wanted:
            return self.controls
        values = {name: getattr(self.controls, name) for name in Controls.__dataclass_fields__}
        return Controls(**{**values, "defocus_angstrom": wanted[index % len(wanted)]})


def make_noise(model: NoiseName, stage: PhysicsStage, network: UnetGenerator) -> Noise:
    """Return the function that turns I_phy into a noisy micrograph in the networks' range."""
    if model == "none":
        return lambda physics, _rng: to_network_range(physics)
    if model == "cryogem":
        return lambda physics, rng: translate(
            network, add_input_noise(physics, float(physics.mean()), stage, torch_stream(rng))
        )
    return noise_by_formula(model, fit_session_noise(stage))


def untranslated(stage: PhysicsStage) -> Noise:
    """Return the function that adds the white noise that the generator is given, and no more."""
    return lambda physics, rng: add_input_noise(physics, float(physics.mean()), stage, torch_stream(rng))


def noise_by_formula(model: NoiseModel, fit: NoiseFit) -> Noise:
    """Return the function that adds fitted noise."""
    return lambda physics, rng: add_noise(physics, model, fit, rng)


def fit_session_noise(stage: PhysicsStage) -> NoiseFit:
    """Fit the noise by formula to the bank's training micrographs."""
    physics = []
    for index in range(_FIT_FRAMES):
        rng = random_stream(0, Purpose.VALIDATION, index)
        physics.append(stage.image(stage.render(stage.draw_specimen(rng)), stage.draw_imaging(rng)))
    real = [levels_to_network_range(levels) for levels in stage.bank.training_micrographs]
    facts = stage.bank.facts
    diameter_px = facts.diameter_angstrom / facts.pixel_size_angstrom
    return fit_noise(physics, real, facts.greys, diameter_px=diameter_px)


def _read_controls(config: GenerateConfig, stage: PhysicsStage) -> Controls:
    given, bank = config.controls, stage.bank
    centres = None
    if given.positions is not None:
        centres, _ = read_picks_star(given.positions)
        limits = np.asarray(bank.shape_yx) - 1
        if not len(centres) or (centres < 0).any() or (centres > limits).any():
            rule = f"positions lie in the generated micrographs, {bank.shape_yx[1]} x {bank.shape_yx[0]} px"
            raise InputError(given.positions, rule, f"{len(centres)} positions")
    if given.conformation is not None and not 0 <= given.conformation < len(bank.volumes):
        rule = f"the conformation is 0 … {len(bank.volumes) - 1}"
        raise ConfigurationError("controls.conformation", rule, given.conformation)
    if any(value <= 0 for value in given.defocus_angstrom):
        raise ConfigurationError(
            "controls.defocus_angstrom", "underfocus in Å is over 0", given.defocus_angstrom
        )
    ice = {"drawn": None, "even": -1}.get(str(given.ice), given.ice)
    if isinstance(ice, int) and not -1 <= ice < len(bank.ice_maps):
        raise ConfigurationError("controls.ice", f"the ice map is 0 … {len(bank.ice_maps) - 1}", ice)
    rotations = None
    if given.poses:
        rotations = euler_to_matrix(torch.tensor(given.poses, dtype=torch.float64)).numpy().astype(np.float32)
    return Controls(
        centres_yx_px=centres,
        rotations=rotations,
        conformation=given.conformation,
        ice_map=ice if ice is None else int(ice),
    )


_worker_context: _Context | None = None


def _produce(config: GenerateConfig, context: _Context) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    if config.workers == 1:
        for index in range(config.n_micrographs):
            yield _write_micrograph(context, index)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked torch may hang on its threads' locks
    with ProcessPoolExecutor(config.workers, spawn, _start_worker, (config,)) as pool:
        yield from pool.map(_work, range(config.n_micrographs))


def _start_worker(config: GenerateConfig) -> None:
    global _worker_context  # noqa: PLW0603 - a worker process has one context for its life
    torch.set_num_threads(1)
    _worker_context = _Context.load(config)


def _work(index: int) -> tuple[dict[str, Any], pd.DataFrame]:
    if _worker_context is None:
        raise RuntimeError("the worker was started without its context")
    return _write_micrograph(_worker_context, index)


def _write_micrograph(context: _Context, index: int) -> tuple[dict[str, Any], pd.DataFrame]:
    """Make one micrograph, write its files, and return its rows of the tables."""
    config, stage = context.config, context.stage
    facts = stage.bank.facts
    rng = random_stream(config.seed, Purpose.GENERATION, index)
    controls = context.controls_of(index)
    rendered = stage.render(stage.draw_specimen(rng, controls))
    imaging = stage.draw_imaging(rng, controls)
    image = context.make_noisy(stage.image(rendered, imaging), rng)
    name = f"synthetic_{index:06d}"
    micrograph = from_network_range(image, facts.greys)
    path = f"micrographs/{name}.mrc"
    write_micrograph(config.out / path, micrograph.numpy(), facts.pixel_size_angstrom)
    _write_png(config.out / f"micrographs/{name}.png", (image + 1.0) * 127.5)
    _write_png(config.out / f"masks/{name}.png", rendered.mask.float() * 255.0)
    _write_particles(context, config.out / f"particles/{name}.mrcs", micrograph, rendered)
    ctf = {
        "rlnDefocusU": imaging.ctf.defocus_u_angstrom,
        "rlnDefocusV": imaging.ctf.defocus_v_angstrom,
        "rlnDefocusAngle": imaging.ctf.astigmatism_angle_deg,
        "rlnPhaseShift": imaging.ctf.phase_shift_deg,
    }
    row = {"rlnMicrographName": path, "rlnOpticsGroup": 1, **ctf, "icestreamIceMap": imaging.ice_map}
    return row, _particle_table(name, path, rendered, ctf, index)


def _particle_table(
    name: str, micrograph: str, rendered: RenderedField, ctf: dict[str, float], index: int
) -> pd.DataFrame:
    specimen = rendered.specimen
    euler = matrix_to_euler(torch.from_numpy(specimen.rotations.astype(np.float64))).numpy()
    exposure = derive_exposure_id(micrograph)
    uids = [derive_particle_uid(exposure, i) for i in range(specimen.n_particles)]
    return pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@particles/{name}.mrcs" for i in range(specimen.n_particles)],
            "rlnMicrographName": micrograph,
            "rlnCoordinateX": specimen.centres_yx_px[:, 1],
            "rlnCoordinateY": specimen.centres_yx_px[:, 0],
            "rlnAngleRot": euler[:, 0],
            "rlnAngleTilt": euler[:, 1],
            "rlnAnglePsi": euler[:, 2],
            "rlnOriginXAngst": 0.0,
            "rlnOriginYAngst": 0.0,
            **ctf,
            "rlnOpticsGroup": 1,
            "rlnRandomSubset": index % 2 + 1,
            "icestreamConformation": specimen.conformations,
            "icestreamBorder": rendered.is_border.astype(np.int64),
            "icestreamOverlap": rendered.is_overlapping.astype(np.int64),
            "icestreamUid": np.array(uids, dtype=np.uint64),
        }
    )


def _write_particles(context: _Context, path: Path, micrograph: Tensor, rendered: RenderedField) -> None:
    """Write every particle; the micrograph is mirrored beyond its border for those that it cuts."""
    box, facts = context.box_px, context.stage.bank.facts
    pad = min(box, min(micrograph.shape) - 1)
    padded = torch.nn.functional.pad(micrograph[None, None], (pad, pad, pad, pad), mode="reflect")[0, 0]
    radius = min(0.5 * facts.diameter_angstrom / facts.pixel_size_angstrom, 0.5 * box)
    settings = BoxSettings(box_size_px=box, extract_box_px=box, background_radius_px=radius)
    centres = rendered.specimen.centres_yx_px + pad
    write_stack(
        path,
        (batch.numpy() for batch in extract_particles(padded, centres, settings)),
        n_images=len(centres),
        box_size_px=box,
        pixel_size_angstrom=facts.pixel_size_angstrom,
        is_float16=False,
    )


def _write_tables(
    config: GenerateConfig, context: _Context, micrographs: pd.DataFrame, particles: pd.DataFrame
) -> None:
    facts = context.stage.bank.facts
    scope = facts.microscope
    optics = Optics(
        voltage_kv=scope.voltage_kv, cs_mm=scope.cs_mm, amplitude_contrast=scope.amplitude_contrast
    )
    pixel, box = facts.pixel_size_angstrom, context.box_px
    write_particles_star(
        config.out / "particles.star",
        particles,
        make_particle_optics(optics, image_pixel_size_angstrom=pixel, image_size_px=box),
    )
    write_micrographs_star(
        config.out / "micrographs.star",
        micrographs,
        make_micrograph_optics(optics, micrograph_pixel_size_angstrom=pixel),
    )
    _write_topaz(config.out / "topaz.txt", particles)
    _write_cryodrgn(config.out, particles, optics, pixel, box)
    asked = asdict(config)
    summary = {
        "micrographs": len(micrographs),
        "particles": len(particles),
        "border": int(particles["icestreamBorder"].sum()),
        "overlapping": int(particles["icestreamOverlap"].sum()),
        "pixel_size_angstrom": pixel,
        "session_micrograph_pixel_size_angstrom": facts.micrograph_pixel_size_angstrom,
        "box_size_px": box,
        "diameter_angstrom": facts.diameter_angstrom,
        "symmetry": facts.symmetry,
        "noise": config.noise,
        "seed": config.seed,
        "controls": {k: str(v) if isinstance(v, Path) else v for k, v in asked["controls"].items()},
    }
    with replacing(config.out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")


def _write_topaz(path: Path, particles: pd.DataFrame) -> None:
    """Write Topaz's table: names without extension, whole pixels."""
    lines = ["image_name\tx_coord\ty_coord"]
    for name, x, y in zip(
        particles["rlnMicrographName"], particles["rlnCoordinateX"], particles["rlnCoordinateY"], strict=True
    ):
        lines.append(f"{Path(name).stem}\t{round(x)}\t{round(y)}")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _write_cryodrgn(out: Path, particles: pd.DataFrame, optics: Optics, pixel: float, box: int) -> None:
    """Write cryoDRGN's pickles: its rotation is RELION's matrix; boxes are centred, so shifts are 0."""
    angles = particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(np.float64, copy=True)
    rotations = euler_to_matrix(torch.from_numpy(angles)).numpy().astype(np.float32)
    n = len(particles)
    poses = (rotations, np.zeros((n, 2), np.float32))
    columns = [
        np.full(n, box),
        np.full(n, pixel),
        *(particles[c].to_numpy(np.float64) for c in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")),
        np.full(n, optics.voltage_kv),
        np.full(n, optics.cs_mm),
        np.full(n, optics.amplitude_contrast),
        particles["rlnPhaseShift"].to_numpy(np.float64),
    ]
    for name, document in (("poses.pkl", poses), ("ctf.pkl", np.stack(columns, axis=1).astype(np.float32))):
        with replacing(out / name) as temporary:
            temporary.write_bytes(pickle.dumps(document, protocol=4))


def _write_png(path: Path, levels: Tensor) -> None:
    grey = levels.clamp(0.0, 255.0).round().to(torch.uint8).numpy()
    with replacing(path) as temporary:
        Image.fromarray(grey).save(temporary, format="PNG", compress_level=1)


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread of torch, as in worker processes: sums have the same order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
