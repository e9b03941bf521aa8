"""Evaluation by use: pickers and pose networks trained on generated data, tried on micrographs that no training saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.cryogem.arms import make_arms
from actors.cryogem.downstream_picking import PickingResult, evaluate_picking
from actors.cryogem.downstream_poses import PoseResult, evaluate_poses
from actors.cryogem.evaluation import common_bank
from actors.cryogem.truth import read_truth
from models.cryogem.picker import PickerTraining
from models.cryogem.pose_network import PoseTraining
from stream.records.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class DownstreamSettings:
    """What is trained, and how much: the defaults take minutes on one core.

    `n_picking` generated micrographs train a picker (10 in the paper), `n_poses` give the particles of a pose network (100,000
    particles in the paper). `box_px` is the side of the pose network's images.
    """

    is_picking: bool
    is_poses: bool
    n_picking: int = 10
    n_poses: int = 40
    n_unseen: int | None = None
    box_px: int = 48
    seed: int = 0
    topaz: Path | None = None
    picker: PickerTraining = field(default_factory=PickerTraining)
    poses: PoseTraining = field(default_factory=PoseTraining)


@dataclass(frozen=True, slots=True, kw_only=True)
class Downstream:
    """What was asked for; the rest is None."""

    picking: PickingResult | None
    poses: PoseResult | None


def evaluate_downstream(
    folders: Sequence[Path],
    truth: Path,
    settings: DownstreamSettings,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> Downstream:
    """Train on generated data of every arm and measure on unseen micrographs of known truth."""
    bank = common_bank(folders)
    unseen = read_truth(truth, bank, limit=settings.n_unseen)
    if not unseen:
        raise InputError(truth, "the truth names a micrograph that the training did not see")
    n_frames = max(
        settings.n_picking if settings.is_picking else 0, settings.n_poses if settings.is_poses else 0
    )
    arms = make_arms(bank, folders, n_frames, settings.seed, on_progress=on_progress)
    picking = poses = None
    if settings.is_picking:
        picking = evaluate_picking(
            arms,
            unseen,
            read_truth(truth, bank, is_training=True, limit=settings.n_picking),
            bank.facts,
            n_training=settings.n_picking,
            training=settings.picker,
            topaz=settings.topaz,
            on_progress=on_progress,
        )
    if settings.is_poses:
        poses = evaluate_poses(
            arms,
            unseen,
            bank.facts,
            truth=truth,
            box_px=settings.box_px,
            training=settings.poses,
            seed=settings.seed,
            on_progress=on_progress,
        )
    return Downstream(picking=picking, poses=poses)
