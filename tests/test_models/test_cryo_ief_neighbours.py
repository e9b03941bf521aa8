"""k-NN scores and the probe, on features whose answer is known; pose classes as the paper builds them."""

import numpy as np
import pytest
import torch

from models.cryo_ief.encode import Encoded
from models.cryo_ief.neighbours import knn_accuracy, probe_quality, quality_classes
from models.cryoranker.dataset import LabelledParticles
from models.cryoranker.judge_features import judge_features, majority_fraction
from models.cryoranker.metrics import average_precision, roc_auc, threshold_curves
from models.cryoranker.pose_sets import (
    N_POSE_CLASSES,
    PosedParticles,
    PoseSet,
    class_centres,
    classify_views,
    simulate_pose_set,
)
from models.cryoranker.specimen import DIAMETER_PX, random_rotations

PHANTOMS = ("phantom:7:mass_kda=60", "phantom:8:mass_kda=200")


def at(*degrees: float):
    angle = np.deg2rad(np.array(degrees, float))
    return np.stack((np.cos(angle), np.sin(angle)), axis=1)


def test_nearest_neighbour_score_equals_the_hand_counted_fraction():
    # 0° and 4° are each other's nearest; 9° lies nearest to 4°; 90° and 95° are each other's.
    features, classes = at(0, 4, 9, 90, 95), np.array([0, 0, 1, 1, 2])
    assert knn_accuracy(features, classes) == pytest.approx(2 / 5)


def test_three_neighbours_vote_and_the_length_of_features_does_not_matter():
    features, classes = at(0, 2, 5, 7, 60) * np.array([[1], [9], [0.1], [3], [2]]), np.array([0, 1, 0, 0, 0])
    # Image 1 (2°) is outvoted 0, 0, 0; every other one has a majority of class 0.
    assert knn_accuracy(features, classes, k=3) == pytest.approx(4 / 5)


def test_no_image_votes_for_itself():
    features = np.eye(4)
    assert knn_accuracy(features, np.arange(4)) == 0.0


def test_as_many_neighbours_as_images_are_refused():
    with pytest.raises(ValueError, match="k: 3 of 3"):
        knn_accuracy(np.eye(3), np.arange(3), k=3)


def test_blocks_of_rows_give_what_the_whole_gives():
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(2100, 5)), rng.integers(0, 3, 2100)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T - 3 * np.eye(2100)
    expected = (classes[similarity.argmax(1)] == classes).mean()
    assert knn_accuracy(features, classes) == pytest.approx(expected)


def test_quality_classes_split_at_the_papers_bounds():
    labels = np.array([0.0, 0.29, 0.3, 0.5, 0.7, 0.71, 1.0])
    assert quality_classes(labels).tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_the_probe_scores_structures_it_was_not_fitted_on():
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(4), 60), np.tile([0.0, 1.0, 0.5], 80)
    features = rng.normal(size=(240, 6))
    features[:, 2] += 4 * labels
    found = probe_quality(features, labels, groups)
    assert set(groups[found.rows]) == {1, 3}
    clear = labels[found.rows] != 0.5
    assert roc_auc(found.scores[clear], labels[found.rows][clear] == 1.0) > 0.9


def test_a_probe_needs_good_and_bad_ones():
    with pytest.raises(ValueError, match="needs both"):
        probe_quality(np.eye(4), np.ones(4), np.arange(4))


def test_centres_are_twelve_directions_as_far_apart_as_can_be():
    centres = class_centres()
    assert centres.shape == (N_POSE_CLASSES, 3)
    angles = torch.rad2deg(torch.arccos((centres @ centres.T).clamp(-1, 1)))
    nearest = (angles + 360 * torch.eye(12)).min(dim=1).values
    torch.testing.assert_close(nearest, torch.full((12,), 63.4349), atol=1e-3, rtol=0)


def test_the_nearer_half_of_each_class_is_kept():
    views = random_rotations(4000, torch.Generator().manual_seed(0))[:, 2]
    classes, is_kept = classify_views(views)
    counts = np.bincount(classes, minlength=12)
    assert counts.min() > 250
    assert is_kept.sum() == (counts // 2).sum()
    cosine = (views @ class_centres().T).max(dim=1).values.numpy()
    for number in range(12):
        members = classes == number
        assert cosine[members & is_kept].min() >= cosine[members & ~is_kept].max()


@pytest.fixture(scope="module")
def posed(tmp_path_factory):
    spec = PoseSet(structures=PHANTOMS, images_per_class=6, snr=5.0, input_size_px=32)
    folder = tmp_path_factory.mktemp("sets")
    first = simulate_pose_set(spec, folder)
    again = simulate_pose_set(spec, folder)
    np.testing.assert_array_equal(first.grey, again.grey)
    assert len(list(folder.iterdir())) == 1
    return first


def test_a_set_holds_equally_many_images_of_each_structure_and_view(posed):
    assert posed.grey.shape == (2 * 12 * 6, 32, 32)
    assert np.bincount(posed.structure).tolist() == [72, 72]
    for index in (0, 1):
        assert np.bincount(posed.pose_class[posed.structure == index]).tolist() == [6] * 12


def test_particles_are_white_centred_and_as_large_as_promised(posed):
    mean = posed.grey.astype(float).mean(axis=0)
    axis = np.arange(32) - 16
    radius = np.hypot(axis[:, None], axis[None, :])
    outside = (radius > DIAMETER_PX / 4 + 2) & (radius < 16)  # the box was halved
    assert mean[radius < 5].mean() > mean[outside].mean() + 20


def test_pixels_tell_the_structures_of_clear_images_apart(posed):
    spectra = np.abs(np.fft.rfft2(posed.grey / 255.0))[:, :8, :8].reshape(len(posed), -1)
    assert knn_accuracy(spectra[:, 1:], posed.structure) > 0.75


def test_a_lower_ratio_of_signal_to_noise_is_harder_and_is_another_set(posed, tmp_path):
    spec = PoseSet(structures=PHANTOMS, images_per_class=6, snr=0.02, input_size_px=32)
    noisy = simulate_pose_set(spec, tmp_path)
    clear, dim = (s.grey.astype(float).mean(axis=0) for s in (posed, noisy))
    assert np.ptp(dim) < 0.5 * np.ptp(clear)


def test_impossible_sets_are_refused():
    with pytest.raises(ValueError, match="images_per_class"):
        PoseSet(structures=PHANTOMS, images_per_class=1, snr=0.1, input_size_px=32)


def labelled_like(n_per_structure=20):
    rng = np.random.default_rng(1)
    n = 4 * n_per_structure
    return LabelledParticles(
        grey=rng.integers(0, 256, (n, 8, 8)).astype(np.uint8),
        labels=np.tile([0.0, 1.0], n // 2).astype(np.float32),
        kinds=np.zeros(n, np.int8),
        snr=np.full(n, 0.1, np.float32),
        structure=np.repeat(np.arange(4), n_per_structure).astype(np.int16),
    )


def test_a_perfect_encoder_gets_full_marks_and_a_blind_one_none():
    labelled = labelled_like()
    rng = np.random.default_rng(0)
    structure, pose = (index.ravel() for index in np.meshgrid(np.arange(4), np.arange(12), indexing="ij"))
    structure, pose = np.repeat(structure, 3), np.repeat(pose, 3)
    codes = np.concatenate((np.eye(4)[structure], np.eye(12)[pose]), axis=1)
    grey = np.zeros((len(codes), 8, 8), np.uint8)
    views = PosedParticles(grey=grey, structure=structure.astype(np.int16), pose_class=pose.astype(np.int16))

    def knowing(images):
        is_posed = len(images) == len(codes)
        features = codes if is_posed else np.stack((labelled.labels, 1 - labelled.labels), axis=1)
        noise = 1e-3 * rng.normal(size=features.shape)
        return Encoded(features=(features + noise).astype(np.float32), scores=None)

    def blind(images):
        features = rng.normal(size=(len(images), 8)).astype(np.float32)
        return Encoded(features=features, scores=rng.random(len(images)).astype(np.float32))

    names = ("a", "b", "c", "d")
    good = judge_features(knowing, views, labelled, names).quality
    assert (good.knn_structure, good.knn_pose, good.knn_quality, good.probe.auc) == (1.0, 1.0, 1.0, 1.0)
    assert good.head is None
    poor = judge_features(blind, views, labelled, names).quality
    assert poor.knn_structure < 0.5
    assert poor.knn_pose < 0.3
    assert poor.head is not None
    assert 0.2 < poor.head.auc < 0.8
    assert majority_fraction(np.array([0, 0, 1])) == pytest.approx(2 / 3)


def test_threshold_curves_equal_the_hand_computed_values():
    curves = threshold_curves(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, False, True, False]))
    assert curves.threshold.tolist() == [0.9, 0.8, 0.1]
    assert curves.precision.tolist() == pytest.approx([1.0, 2 / 3, 0.5])
    assert curves.recall.tolist() == [0.5, 1.0, 1.0]
    assert curves.false_positive_rate.tolist() == [0.0, 0.5, 1.0]


def test_threshold_curves_enclose_auc_and_average_precision():
    rng = np.random.default_rng(2)
    is_good = rng.random(200) < 0.3
    scores = rng.normal(size=200) + is_good
    curves = threshold_curves(scores, is_good)
    area = np.trapezoid([0, *curves.recall], [0, *curves.false_positive_rate])
    assert area == pytest.approx(roc_auc(scores, is_good))
    steps = np.sum(np.diff(curves.recall, prepend=0.0) * curves.precision)
    assert steps == pytest.approx(average_precision(scores, is_good))
