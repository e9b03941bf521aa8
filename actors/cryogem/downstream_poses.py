"""What generated particles are worth for pose estimation: errors of networks trained on them (CryoGEM §5.3, appendix C.3).

One network per arm is trained with eq. 11 on particles cut from the arm's micrographs and predicts the poses of particles cut from
unseen micrographs of known truth. Particles are cut where they are up to a twentieth of the box off centre, at random and known, so
that shifts have to be predicted too. Reported are eq. 13, the error of the whole rotation, and where the FSC of two half maps
at the predicted poses falls to 0.5. Predictions are in the frame of the map that the particles were made from; where the truth is a
refinement of its own (another frame), it has to be aligned to that map first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.cryogem.arms import Arm
from actors.cryogem.truth import KnownMicrograph
from models.cryogem.bank import BankFacts
from models.cryogem.pairs import Purpose, random_stream
from models.cryogem.pose_map import resolve_poses
from models.cryogem.pose_network import PosedParticles, PoseTraining, predict_poses, train_pose_network
from models.cryogem.poses import rotation_errors_deg, view_errors_deg
from models.cryogem.specimen import draw_rotations
from models.fourier.point_groups import symmetry_matrices
from models.picking.extract import BoxSettings, boxes_inside, extract_particles
from models.reconstruction.particle_data import CtfParameters, ParticleData, particle_data
from stream.records.errors import InputError

_BOX_PER_DIAMETER = 1.5
_OFF_CENTRE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseErrors:
    """Mean angle between view directions (eq. 13), median of the whole rotation's angle, mean shift error, resolution.

    The shift error is the mean distance in pixels of the network's images; the resolution is None where the half maps
    do not correlate.
    """

    view_error_deg: float
    rotation_error_deg: float
    shift_error_px: float
    resolution_angstrom: float | None
    resolution_px: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseResult:
    """Errors by arm; `true poses` is the best that reconstruction can do, `random poses` is chance."""

    errors: Mapping[str, PoseErrors]
    n_particles: int
    n_training_particles: int
    box_px: int
    pixel_size_angstrom: float


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Box in working pixels, and in pixels of the network's images."""

    working_px: int
    network_px: int
    facts: BankFacts

    @property
    def pixel_size_angstrom(self) -> float:
        return self.facts.pixel_size_angstrom * self.working_px / self.network_px


def evaluate_poses(
    arms: Sequence[Arm],
    unseen: Sequence[KnownMicrograph],
    facts: BankFacts,
    *,
    truth: Path,
    box_px: int,
    training: PoseTraining,
    seed: int,
    on_progress: Callable[[str], None] | None = None,
) -> PoseResult:
    """Train a network per arm on all particles of its micrographs and measure all on the particles of `unseen`."""
    group = symmetry_matrices(facts.symmetry)
    wanted = 2 * math.ceil(0.5 * _BOX_PER_DIAMETER * facts.diameter_angstrom / facts.pixel_size_angstrom)
    boxes = _Boxes(max(wanted, box_px), box_px, facts)
    rows = _unseen_particles(unseen, boxes, truth, seed)
    images = _as_data(rows, boxes, facts)
    known = rows.particles
    errors: dict[str, PoseErrors] = {}

    def measure(name: str, rotations: Tensor, shifts: Tensor) -> None:
        found = resolve_poses(
            images, rotations, shifts * box_px, group, diameter_angstrom=facts.diameter_angstrom
        )
        distance = (shifts - known.shifts).norm(dim=-1) * box_px
        errors[name] = PoseErrors(
            view_error_deg=float(view_errors_deg(rotations, known.rotations, group).mean()),
            rotation_error_deg=float(rotation_errors_deg(rotations, known.rotations, group).median()),
            shift_error_px=float(distance.mean()),
            resolution_angstrom=found.resolution_angstrom,
            resolution_px=found.resolution_px,
        )
        if on_progress is not None:
            on_progress(f"poses, {name}: {errors[name]}")

    measure("true poses", known.rotations, known.shifts)
    chance = draw_rotations(len(known), facts.symmetry, random_stream(seed, Purpose.DOWNSTREAM, 0, 3))
    measure("random poses", torch.from_numpy(chance), torch.zeros_like(known.shifts))
    n_training = 0
    for arm in arms:
        particles = _arm_particles(arm, boxes)
        n_training = len(particles)
        network = train_pose_network(particles, group, training)
        measure(arm.name, *predict_poses(network, known.images))
    return PoseResult(
        errors=errors,
        n_particles=len(known),
        n_training_particles=n_training,
        box_px=box_px,
        pixel_size_angstrom=boxes.pixel_size_angstrom,
    )


@dataclass(frozen=True, slots=True)
class _KnownParticles:
    particles: PosedParticles
    ctf: Tensor


def _unseen_particles(
    unseen: Sequence[KnownMicrograph], boxes: _Boxes, truth: Path, seed: int
) -> _KnownParticles:
    parts, ctfs = [], []
    for index, micrograph in enumerate(unseen):
        if micrograph.rotations is None or micrograph.ctf is None:
            raise InputError(truth, "the truth has angles and defocus for each particle", micrograph.name)
        rng = random_stream(seed, Purpose.DOWNSTREAM, index, 2)
        particles, kept = _cut(micrograph.image, micrograph.centres_yx_px, micrograph.rotations, boxes, rng)
        parts.append(particles)
        ctfs.append(micrograph.ctf[kept])
    joined = _join(parts)
    if len(joined) < 2:
        raise InputError(truth, "two or more particles lie wholly inside unseen micrographs", len(joined))
    return _KnownParticles(joined, torch.cat(ctfs))


def _arm_particles(arm: Arm, boxes: _Boxes) -> PosedParticles:
    parts = []
    for index, frame in enumerate(arm.frames):
        rng = random_stream(arm.seed, Purpose.DOWNSTREAM, index, 4)
        rotations = torch.from_numpy(frame.specimen.rotations)
        parts.append(_cut(arm.image(index), frame.specimen.centres_yx_px, rotations, boxes, rng)[0])
    return _join(parts)


def _cut(
    image: Tensor, centres: np.ndarray, rotations: Tensor, boxes: _Boxes, rng: np.random.Generator
) -> tuple[PosedParticles, Tensor]:
    """Return the particles whose boxes lie inside, off centre by a known draw, and their rows."""
    box = boxes.working_px
    offsets = rng.uniform(-_OFF_CENTRE, _OFF_CENTRE, size=centres.shape)
    middles = centres - offsets * box
    shape = (int(image.shape[0]), int(image.shape[1]))
    kept = np.flatnonzero(boxes_inside(middles, shape, box))
    radius = 0.5 * boxes.facts.diameter_angstrom / boxes.pixel_size_angstrom
    settings = BoxSettings(
        box_size_px=box,
        extract_box_px=boxes.network_px,
        background_radius_px=min((1.0 + 2.0 * _OFF_CENTRE) * radius, 0.5 * boxes.network_px),
    )
    parts = list(extract_particles(image, middles[kept], settings))
    empty = torch.zeros(0, boxes.network_px, boxes.network_px)
    rows = torch.from_numpy(kept)
    particles = PosedParticles(
        images=torch.cat(parts) if parts else empty,
        rotations=rotations[rows],
        shifts=torch.from_numpy(offsets[kept]).float(),
    )
    return particles, rows


def _join(parts: Sequence[PosedParticles]) -> PosedParticles:
    return PosedParticles(
        images=torch.cat([p.images for p in parts]),
        rotations=torch.cat([p.rotations for p in parts]),
        shifts=torch.cat([p.shifts for p in parts]),
    )


def _as_data(rows: _KnownParticles, boxes: _Boxes, facts: BankFacts) -> ParticleData:
    scope = facts.microscope
    ctf = CtfParameters(
        defocus_u_angstrom=rows.ctf[:, 0],
        defocus_v_angstrom=rows.ctf[:, 1],
        astigmatism_angle_deg=rows.ctf[:, 2],
        phase_shift_deg=rows.ctf[:, 3],
        voltage_kv=scope.voltage_kv,
        cs_mm=scope.cs_mm,
        amplitude_contrast=scope.amplitude_contrast,
    )
    return particle_data(rows.particles.images, boxes.pixel_size_angstrom, ctf)
