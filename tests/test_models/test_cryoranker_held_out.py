"""Held-out boxes and their yardsticks: the picker's score, and what a box's signal allows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.cryoranker.held_out import HeldOutSpec, held_out_sets, picker_scores
from models.cryoranker.metrics import roc_auc
from models.cryoranker.simulate import (
    Kind,
    box_means,
    coloured,
    draw_conditions,
    shot_amplitude,
    simulate_field,
)
from models.cryoranker.specimen import render_pool, structure_named
from models.cryoranker.templates import noise_power, template_log_odds

PHANTOM = "phantom:8:mass_kda=60"


@pytest.fixture(scope="module")
def pool():
    generator = torch.Generator().manual_seed(0)
    return render_pool(structure_named(PHANTOM), n_views=24, n_fragments=6, generator=generator)


@pytest.fixture(scope="module")
def fields(pool):
    rng = np.random.default_rng(3)
    conditions = [
        replace(
            draw_conditions(rng, snr=0.1, box_size_px=64),
            has_carbon=False,
            background_sigma=0.0,
            box_to_diameter=1.5,
        )
        for _ in range(6)
    ]
    return [simulate_field(pool, given, rng) for given in conditions]


def _of_kind(fields, values, kind, *, is_good):
    found = [
        part[(boxes.kinds == kind) & ((boxes.labels > 0.7) if is_good else (boxes.labels <= 0.3))]
        for boxes, part in zip(fields, values, strict=True)
    ]
    return np.concatenate(found)


def test_who_knows_the_templates_tells_whole_particles_from_noise_and_wrong_centres(fields, pool):
    odds = [template_log_odds(boxes, pool) for boxes in fields]
    good = _of_kind(fields, odds, Kind.PARTICLE, is_good=True)
    for kind in (Kind.NOISE, Kind.OFF_CENTRE):
        bad = _of_kind(fields, odds, kind, is_good=False)
        assert min(len(good), len(bad)) >= 8
        scores, is_good = np.concatenate((good, bad)), np.arange(len(good) + len(bad)) < len(good)
        assert roc_auc(scores, is_good) > 0.97
    assert np.median(good) > 3.0
    assert np.median(_of_kind(fields, odds, Kind.NOISE, is_good=False)) < -3.0


def test_template_odds_fall_when_the_particle_leaves_the_centre(fields, pool):
    boxes = fields[0]
    moved = replace(boxes, images=torch.roll(boxes.images, 16, dims=2))
    is_good = (boxes.kinds == Kind.PARTICLE) & (boxes.labels > 0.7)
    before, after = template_log_odds(boxes, pool)[is_good], template_log_odds(moved, pool)[is_good]
    assert (before > after).mean() > 0.9


def test_expected_noise_power_is_that_of_boxes_without_particles(fields):
    for boxes in fields[:3]:
        noise = boxes.images[torch.from_numpy(boxes.kinds == Kind.NOISE)]
        n = boxes.conditions.box_size_px
        found = torch.fft.rfft2(noise - noise.mean(dim=(1, 2), keepdim=True)).abs().square().mean(0) / n**2
        expected = noise_power(boxes.conditions, n, boxes.pixel_size_angstrom)
        fine = (torch.fft.fftfreq(n)[:, None] ** 2 + torch.fft.rfftfreq(n)[None, :] ** 2) > 0.15**2
        assert float(found[fine].mean() / expected[fine].mean()) == pytest.approx(1.0, abs=0.25)


def test_the_pickers_score_is_high_on_particles_and_low_on_empty_ice(fields):
    scores = [picker_scores(boxes) for boxes in fields]
    good = _of_kind(fields, scores, Kind.PARTICLE, is_good=True)
    noise = _of_kind(fields, scores, Kind.NOISE, is_good=False)
    is_good = np.arange(len(good) + len(noise)) < len(good)
    assert roc_auc(np.concatenate((good, noise)), is_good) > 0.8
    assert np.median(good) > np.median(noise) + 1.0


def test_held_out_sets_are_kept_and_do_not_depend_on_what_is_made_with_them(tmp_path):
    spec = HeldOutSpec(
        structures=(PHANTOM,), snr=0.05, box_size_px=32, fields_per_structure=1, n_views=8, n_fragments=3
    )
    other = replace(spec, snr=0.1)
    alone = held_out_sets((spec,), tmp_path / "a")[0]
    together = held_out_sets((other, spec), tmp_path / "b")[1]
    again = held_out_sets((spec,), tmp_path / "a")[0]
    np.testing.assert_array_equal(alone.images, together.images)
    np.testing.assert_array_equal(alone.images, again.images)
    np.testing.assert_array_equal(alone.template_scores, together.template_scores)
    assert len(alone) == len(alone.picker_scores) == len(alone.labels)


def test_coloured_noise_keeps_its_variance_and_leans_as_asked():
    noise = torch.randn((256, 256), generator=torch.Generator().manual_seed(0))
    for slope in (-0.5, 0.3):
        out = coloured(noise, slope)
        assert float(out.var()) == pytest.approx(1.0, abs=0.03)
        amplitude = shot_amplitude(256, slope)
        assert float(amplitude[128, 0] / amplitude[0, 0]) == pytest.approx(1.0 + slope)


def test_box_means_are_those_of_every_square():
    image = torch.randn((20, 20), generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.avg_pool2d(image[None, None], 5, stride=1)[0, 0]
    torch.testing.assert_close(box_means(image, 5), expected, atol=1e-5, rtol=0.0)
