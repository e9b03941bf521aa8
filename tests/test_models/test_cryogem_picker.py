"""The trained picker: its loss by hand, its targets, and that training finds what labels say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.cryogem.picker import (
    LabelledMicrograph,
    PickerTraining,
    focal_loss,
    heat_map,
    pick_with_network,
    train_picker,
)
from models.picking.matching import average_precision, is_away_from_border, judge_picks

DIAMETER_ANGSTROM, PIXEL_ANGSTROM = 160.0, 8.0


def micrograph(seed: int, *, contrast: float = 1.2) -> LabelledMicrograph:
    """Return dark rings (labelled) and dark discs (not) of equal area in noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256]
    image, centres = np.zeros((256, 256)), []
    cells = rng.permutation(25)
    for rank, cell in enumerate(cells[:20]):
        at = np.array(divmod(int(cell), 5)) * 48 + 32 + rng.uniform(-8, 8, 2)
        radius = np.hypot(y - at[0], x - at[1])
        if rank < 12:
            image -= contrast * ((radius < 10) & (radius > 6))
            centres.append(at)
        else:
            image -= contrast * (radius < 8)
    noisy = image + rng.standard_normal(image.shape)
    return LabelledMicrograph(
        image=torch.from_numpy(noisy.astype(np.float32)),
        centres_yx_px=np.array(centres),
        pixel_size_angstrom=PIXEL_ANGSTROM,
        diameter_angstrom=DIAMETER_ANGSTROM,
    )


def test_focal_loss_is_the_sum_by_hand():
    # logits 0: p = 1/2 everywhere; one peak, one pixel half way, one far away, one masked
    target = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    used = torch.tensor([[True, True], [True, False]])
    log_half = math.log(0.5)
    expected = -(0.25 * log_half + 0.5**4 * 0.25 * log_half + 0.25 * log_half)
    assert float(focal_loss(torch.zeros(2, 2), target, used)) == pytest.approx(expected, rel=1e-5)
    # what is certain and right costs nothing; a particle that is missed costs its logarithm
    right = torch.tensor([[30.0, -30.0], [-30.0, 30.0]])
    assert float(focal_loss(right, target, used)) == pytest.approx(0.0, abs=1e-6)
    missed = torch.tensor([[-30.0, -30.0], [-30.0, -30.0]])
    assert float(focal_loss(missed, target, used)) == pytest.approx(30.0, rel=1e-4)


def test_a_frame_without_particles_counts_its_false_ones():
    loss = focal_loss(torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool))
    assert float(loss) == pytest.approx(16 * 0.25 * math.log(2.0), rel=1e-5)


def test_heat_map_is_one_at_its_centres():
    target = heat_map(np.array([[5.2, 8.0], [20.0, 21.0], [99.0, 3.0]]), (32, 40), 16.0)
    assert target[5, 8] == target[20, 21] == 1.0
    assert int((target >= 1.0).sum()) == 2
    # 0.12 diameters are 1.92 px
    assert float(target[5, 10]) == pytest.approx(math.exp(-0.5 * (2 / 1.92) ** 2), rel=1e-5)


def test_training_ranks_labelled_shapes_above_others():
    network = train_picker([micrograph(i) for i in range(6)], PickerTraining(epochs=15, width=8))
    scores, right, n_true = [], [], 0
    for seed in (100, 101):
        unseen = micrograph(seed)
        picks = pick_with_network(network, unseen.image, PIXEL_ANGSTROM, DIAMETER_ANGSTROM)
        assert (np.diff(picks.scores) <= 0).all()
        judged = judge_picks(
            picks.centres_yx_px,
            picks.scores,
            unseen.centres_yx_px,
            is_away_from_border(unseen.centres_yx_px, (256, 256), 10.0),
            tolerance_px=7.0,
        )
        scores.append(judged.scores)
        right.append(judged.is_right)
        n_true += judged.n_true
    # rings are 12 of 20 shapes: shapes in any order have 0.6
    assert average_precision(np.concatenate(scores), np.concatenate(right), n_true) > 0.8


def test_the_same_seed_gives_the_same_picker():
    first, again = (train_picker([micrograph(1)], PickerTraining(epochs=1, width=4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_set_without_particles_is_refused():
    empty = LabelledMicrograph(
        image=torch.zeros(64, 64),
        centres_yx_px=np.zeros((0, 2)),
        pixel_size_angstrom=8.0,
        diameter_angstrom=160.0,
    )
    with pytest.raises(ValueError, match="must hold a particle"):
        train_picker([empty], PickerTraining())
