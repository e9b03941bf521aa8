"""Hot and dead pixels, rows and columns in the mean of a movie."""

import numpy as np
import pytest
import torch

from models.motion.defects import DefectFiller, find_defects

SHAPE = (192, 256)


def expose(electrons_per_px, seed=0, n_frames=40):
    """Return the mean frame of counts under a beam that is 30 % brighter at the bottom."""
    rng = np.random.default_rng(seed)
    beam = electrons_per_px * (1 + 0.3 * np.arange(SHAPE[0])[:, None] / SHAPE[0])
    counts = rng.poisson(beam, SHAPE).astype(np.float32)
    return torch.from_numpy(counts / n_frames)


@pytest.mark.parametrize("electrons_per_px", [5.0, 30.0, 100.0])
def test_a_sound_camera_has_no_defects(electrons_per_px):
    assert not find_defects(expose(electrons_per_px)).any()


def test_a_dead_pixel_is_found_where_chance_would_leave_no_pixel_empty():
    mean = expose(25.0)  # too few counts for six standard deviations
    mean[20, 30] = 0
    assert torch.nonzero(find_defects(mean)).tolist() == [[20, 30]]


def test_empty_pixels_of_a_faint_movie_are_no_defects():
    mean = expose(3.0)
    assert int((mean == 0).sum()) > 500
    assert not find_defects(mean).any()


@pytest.mark.parametrize("level", [0.0, 0.3, 5.0], ids=["dead", "weak", "hot"])
@pytest.mark.parametrize("electrons_per_px", [3.0, 30.0])
def test_defective_rows_and_columns_are_found_whole_and_nothing_else(level, electrons_per_px):
    mean = expose(electrons_per_px)
    mean[50:52] *= level
    mean[:, 100] *= level
    mean[-1] *= level
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[50:52] = expected[:, 100] = expected[-1] = True
    found = find_defects(mean)
    assert found[expected].all()
    assert int((found & ~expected).sum()) <= 2  # Poisson's upper tail at 3 counts


def test_a_sharp_edge_of_the_support_film_is_no_defective_row():
    mean = expose(30.0)
    mean[:80] *= 0.3
    assert not find_defects(mean).any()


def test_a_camera_with_a_failed_block_is_refused():
    mean = expose(30.0)
    mean[:100, :128] = 0
    with pytest.raises(ValueError, match="26% of the pixels are dead or hot, at most 10%"):
        find_defects(mean)


def test_filled_rows_have_the_mean_and_the_noise_of_the_rest():
    frame = expose(30.0, n_frames=1)
    dead = torch.zeros(SHAPE, dtype=torch.bool)
    dead[50:52] = True
    frame[dead] = 0
    filled = DefectFiller(dead, np.random.default_rng(0)).fill_(frame.clone())
    around = torch.cat([frame[40:50], frame[52:62]])
    assert float(filled[50:52].mean()) == pytest.approx(float(around.mean()), rel=0.03)
    assert float(filled[50:52].std()) == pytest.approx(float(around.std()), rel=0.15)
