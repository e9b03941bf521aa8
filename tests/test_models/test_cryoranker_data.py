"""Simulated training data: labels mean what they say, seeds decide everything."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.cryo_ief.image_sets import grey_statistics
from models.cryoranker.dataset import (
    SimulatedSet,
    augment,
    phantom_names,
    simulate_set,
    simulate_set_cached,
)
from models.cryoranker.simulate import Kind, draw_conditions, remove_plane, simulate_field
from models.cryoranker.specimen import DIAMETER_PX, GRID_PX, render_pool, structure_named

PHANTOM = "phantom:7:mass_kda=60"


@pytest.fixture(scope="module")
def pool():
    generator = torch.Generator().manual_seed(0)
    return render_pool(structure_named(PHANTOM), n_views=24, n_fragments=6, generator=generator)


def test_views_are_centred_white_and_as_large_as_promised(pool):
    assert pool.views.shape == (24, GRID_PX, GRID_PX)
    mean = pool.views.mean(0).clamp(min=0)
    axis = torch.arange(GRID_PX) - GRID_PX // 2
    radius = torch.hypot(axis[:, None].float(), axis[None, :].float())
    inside = float(mean[radius <= DIAMETER_PX / 2].sum() / mean.sum())
    assert inside > 0.9
    assert float(mean[radius < 5].mean()) > 5 * abs(float(mean[radius > 28].mean()))


def test_good_particles_average_to_a_centred_bright_blob_and_noise_picks_do_not(pool):
    rng = np.random.default_rng(0)
    sums = {True: [], False: []}
    for _ in range(12):
        conditions = replace(
            draw_conditions(rng, snr=1.0, box_size_px=64),
            background_sigma=0.0,
            has_carbon=False,
            defocus_angstrom=20_000.0,
        )
        boxes = simulate_field(pool, conditions, rng)
        for image, label, kind in zip(boxes.images, boxes.labels, boxes.kinds, strict=True):
            if kind == Kind.PARTICLE and label > 0.9:
                sums[True].append(image)
            elif kind == Kind.NOISE:
                sums[False].append(image)
    contrast = {}
    for is_good, images in sums.items():
        assert len(images) > 8
        mean = torch.stack(images).mean(0)
        contrast[is_good] = float(mean[26:38, 26:38].mean() - mean[:6].mean())
    assert contrast[True] > 0.5
    assert contrast[True] > 3 * abs(contrast[False])


def test_labels_lie_in_range_and_good_ones_are_centred_particles(pool):
    rng = np.random.default_rng(1)
    for _ in range(10):
        boxes = simulate_field(pool, draw_conditions(rng), rng)
        assert ((boxes.labels >= 0) & (boxes.labels <= 1)).all()
        assert torch.isfinite(boxes.images).all()
        good = boxes.kinds[boxes.labels > 0.7]
        assert set(good.tolist()) <= {Kind.PARTICLE, Kind.OFF_CENTRE, Kind.CROWDED}
        junk = np.isin(
            boxes.kinds, [Kind.NOISE, Kind.AGGREGATE, Kind.FRAGMENT, Kind.ICE_CRYSTAL, Kind.CARBON]
        )
        assert (boxes.labels[junk] <= 0.3).all()


def test_signal_to_noise_ratio_is_what_was_asked_for(pool):
    rng = np.random.default_rng(2)
    conditions = replace(
        draw_conditions(rng, snr=0.05, box_size_px=64),
        structural_fraction=0.0,
        background_sigma=0.0,
        has_carbon=False,
    )
    boxes = simulate_field(pool, conditions, rng)
    noise = boxes.images[torch.from_numpy(boxes.kinds == Kind.NOISE)]
    assert float(noise.std()) == pytest.approx(0.05**-0.5, rel=0.25)


def test_weak_part_draws_weak_fields_and_leaves_a_fixed_snr_alone():
    def drawn(part, **fixed):
        rng = np.random.default_rng(5)
        return np.array([draw_conditions(rng, weak_part=part, **fixed).snr for _ in range(400)])

    def is_weak(snr):
        return float(((snr >= 0.03) & (snr <= 0.1)).mean())

    assert is_weak(drawn(0.0)) == pytest.approx(np.log(0.1 / 0.03) / np.log(0.4 / 0.015), abs=0.08)
    assert is_weak(drawn(1.0)) == 1.0
    assert (drawn(0.5, snr=0.05) == 0.05).all()


def test_more_junk_gives_more_aggregates_and_broken_pieces(pool):
    def n_junk(most_junk):
        rng = np.random.default_rng(6)
        conditions = replace(draw_conditions(rng, box_size_px=64), spacing=2.2)
        kinds = [simulate_field(pool, conditions, rng, most_junk=most_junk).kinds for _ in range(12)]
        return int(np.isin(np.concatenate(kinds), [Kind.AGGREGATE, Kind.FRAGMENT]).sum())

    assert n_junk(0) == 0
    assert n_junk(6) > 1.5 * n_junk(2) > 0


def test_plane_is_removed_from_the_background_and_the_rest_stays():
    axis = torch.arange(32, dtype=torch.float32)
    plane = 3.0 + 0.2 * axis[:, None] - 0.1 * axis[None, :]
    bump = torch.zeros(32, 32)
    bump[14:19, 14:19] = 5.0
    torch.testing.assert_close(remove_plane((plane + bump)[None])[0], bump, atol=1e-4, rtol=0.0)


def test_same_seed_gives_the_same_bytes_from_any_number_of_processes(tmp_path):
    spec = SimulatedSet(
        structures=(PHANTOM,),
        seed=3,
        fields_per_structure=2,
        input_size_px=32,
        n_views=8,
        n_fragments=4,
    )
    first, again = simulate_set(spec), simulate_set_cached(spec, tmp_path)
    cached = simulate_set_cached(spec, tmp_path)
    other = simulate_set(replace(spec, seed=4))
    np.testing.assert_array_equal(first.grey, again.grey)
    np.testing.assert_array_equal(first.grey, cached.grey)
    np.testing.assert_array_equal(first.labels, cached.labels)
    assert first.grey.shape != other.grey.shape or (first.grey != other.grey).any()


def test_phantom_names_depend_on_their_own_seed_alone():
    assert phantom_names(range(10, 14))[2:] == phantom_names(range(12, 14))


def test_grey_statistics_are_those_of_numpy():
    grey = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)
    mean, std = grey_statistics(grey)
    assert mean == pytest.approx((grey / 255.0).mean())
    assert std == pytest.approx((grey / 255.0).std())


def test_augmentation_keeps_each_images_grey_levels_up_to_contrast_and_never_writes_its_input():
    grey = torch.randint(60, 200, (16, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = grey.clone()
    out = augment(grey, 0.5, 0.1, torch.Generator().manual_seed(1))
    assert torch.equal(grey, before)
    assert out.shape == (16, 1, 8, 8)
    for image, source in zip(out, grey, strict=True):
        a, b = image.flatten().sort().values, source.flatten().float().sort().values
        assert float(torch.corrcoef(torch.stack((a, b)))[0, 1]) > 0.98


def test_rotation_by_any_angle_turns_an_off_centre_spot_about_the_centre():
    grey = torch.zeros((200, 33, 33), dtype=torch.uint8)
    grey[:, 15:18, 24:27] = 255
    out = augment(grey, 0.0, 1.0, torch.Generator().manual_seed(2), rotation_probability=1.0, max_shift_px=0)
    flat = out[:, 0].flatten(1).argmax(1)
    radius = torch.hypot((flat // 33 - 16).float(), (flat % 33 - 16).float())
    assert float((radius - 9).abs().max()) < 2.5
    assert len({int(i) for i in flat}) > 20
