"""Networks and losses against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from models.cryogem.losses import (
    contrast,
    contrast_released,
    contrast_unguided,
    discriminator_loss,
    generator_loss,
    has_both_labels,
    mask_nce_loss,
    sample_anywhere,
    sample_places,
)
from models.cryogem.networks import (
    FeatureHeads,
    NetworkSettings,
    PatchDiscriminator,
    UnetGenerator,
    initialise,
)

SMALL = NetworkSettings(
    depth=4, generator_filters=4, discriminator_filters=4, nce_levels=(1, 2, 3), head_width=8
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_networks_have_the_papers_sizes():
    settings = NetworkSettings()
    assert n_parameters(UnetGenerator(settings)) == 79_571_329
    assert n_parameters(PatchDiscriminator(settings)) == 11_030_401
    assert n_parameters(FeatureHeads(settings)) == 707_072
    assert settings.encoder_channels == (64, 128, 256, 512, 512, 512, 512, 512, 512, 512)


def test_generator_keeps_the_shape_and_its_range():
    network = UnetGenerator(SMALL)
    initialise(network, gen())
    out = network(torch.randn(1, 1, 48, 32, generator=gen(1)))
    assert out.shape == (1, 1, 48, 32)
    assert float(out.detach().abs().max()) <= 1.0
    with pytest.raises(ValueError, match="multiples of 16"):
        network(torch.zeros(1, 1, 40, 32))


def test_encoding_a_few_levels_gives_the_same_features_as_all():
    network = UnetGenerator(SMALL)
    initialise(network, gen())
    image = torch.randn(1, 1, 32, 32, generator=gen(1))
    few, all_levels = network.encode(image, 2), network.encode(image, 3)
    assert [f.shape[-1] for f in all_levels] == [16, 8, 4]
    assert all(torch.equal(a, b) for a, b in zip(few, all_levels, strict=False))


def test_a_patch_of_the_discriminator_sees_70_pixels():
    network = PatchDiscriminator(NetworkSettings(discriminator_filters=1))
    initialise(network, gen())
    image = torch.zeros(1, 1, 256, 256, requires_grad=True)
    # without instance norm, which sees everything: the convolutions alone
    value = image
    for convolution in network.convolutions:
        value = torch.nn.functional.leaky_relu(convolution(value), 0.2)
    logits = network.judge(value)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert image.grad is not None
    rows = image.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_initial_weights_follow_the_generator():
    a, b, c = UnetGenerator(SMALL), UnetGenerator(SMALL), UnetGenerator(SMALL)
    initialise(a, gen(3))
    initialise(b, gen(3))
    initialise(c, gen(4))
    first = [m.down[1].weight for m in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    weights = torch.cat([p.detach().flatten() for n, p in a.named_parameters() if "weight" in n])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.05)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="nce_levels"):
        NetworkSettings(depth=4, nce_levels=(1, 4))
    with pytest.raises(ValueError, match="depth"):
        NetworkSettings(depth=1, nce_levels=(1,))


def test_heads_take_the_cell_that_a_pixel_lies_in():
    heads = FeatureHeads(SMALL)
    initialise(heads, gen())
    features = [
        torch.randn(1, c, 32 // 2**level, 32 // 2**level, generator=gen(level))
        for level, c in ((1, 4), (2, 8), (3, 16))
    ]
    vectors = heads(features, torch.tensor([[31, 8], [0, 0]]))
    expected = torch.nn.functional.normalize(heads.heads[1](features[1][0, :, 7, 2]), dim=0)
    assert torch.allclose(vectors[1][0], expected, atol=1e-6)
    assert all(torch.allclose(v.norm(dim=1), torch.ones(2), atol=1e-5) for v in vectors)


def test_contrast_is_equation_5():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    positives = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    negatives = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    t = 0.5
    first = -math.log(math.exp(0.6 / t) / (math.exp(0.6 / t) + math.exp(1 / t) + math.exp(0.8 / t) + 1.0))
    second = -math.log(math.exp(1 / t) / (math.exp(1 / t) + 1.0 + math.exp(0.6 / t) + math.exp(-1 / t)))
    assert contrast(anchors, positives, negatives, t).tolist() == pytest.approx([first, second], rel=1e-5)


def test_released_form_groups_the_same_numbers_by_negatives():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    positives = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    negatives = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    t = 0.5
    # row 0: positive 0.6 against negative 0 · (anchor 0, anchor 1) = (1, 0)
    first = -math.log(math.exp(0.6 / t) / (math.exp(0.6 / t) + math.exp(1 / t) + 1.0))
    # row 1: positive 1 against negative 1 · anchors = (0.8, 0.6)
    second = -math.log(math.exp(1 / t) / (math.exp(1 / t) + math.exp(0.8 / t) + math.exp(0.6 / t)))
    assert contrast_released(anchors, positives, negatives, t).tolist() == pytest.approx(
        [first, second], rel=1e-5
    )
    with pytest.raises(ValueError, match="as many as anchors"):
        contrast_released(anchors, positives, negatives[:1], t)


def test_unguided_form_has_all_others_as_negatives():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    positives = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    t = 0.5
    first = -math.log(math.exp(0.6 / t) / (math.exp(0.6 / t) + math.exp(0.8 / t)))
    second = -math.log(math.exp(0.6 / t) / (math.exp(0.6 / t) + math.exp(0.8 / t)))
    assert contrast_unguided(anchors, positives, t).tolist() == pytest.approx([first, second], rel=1e-5)


def test_mask_nce_averages_directions_and_levels_of_equation_6():
    def unit(seed, n):
        return torch.nn.functional.normalize(torch.randn(n, 3, generator=gen(seed)), dim=1)

    source, output = [unit(1, 5), unit(2, 5)], [unit(3, 5), unit(4, 5)]
    t = 0.07
    expected = 0.0
    for z, z_hat in zip(source, output, strict=True):
        particle = contrast(z[:2], z_hat[:2], z_hat[2:], t).mean()
        background = contrast(z[2:], z_hat[2:], z_hat[:2], t).mean()
        expected += 0.25 * float(particle + background)
    assert float(mask_nce_loss(source, output, 2, temperature=t)) == pytest.approx(expected, rel=1e-5)


def test_nce_is_small_where_output_keeps_the_source_and_large_where_labels_swap():
    on, off = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    kept = mask_nce_loss([torch.cat((on, off))], [torch.cat((on, off))], 4)
    swapped = mask_nce_loss([torch.cat((on, off))], [torch.cat((off, on))], 4)
    assert float(kept) < 1e-4
    assert float(swapped) > 10.0


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 0.2])
    assert float(discriminator_loss(real, fake, "lsgan")) == pytest.approx(0.5 * (0.125 + 0.02))
    assert float(generator_loss(fake, "lsgan")) == pytest.approx(0.5 * (1.0 + 0.64))

    def log_d(x):
        return math.log(1 / (1 + math.exp(-x)))

    by_hand = -0.5 * ((log_d(0.5) + log_d(1.0)) / 2 + (log_d(-0.0) + log_d(-0.2)) / 2)
    assert float(discriminator_loss(real, fake, "log")) == pytest.approx(by_hand, rel=1e-5)
    assert float(generator_loss(fake, "log")) == pytest.approx((log_d(0.0) + log_d(-0.2)) / 2, rel=1e-5)


def test_sampling_never_crosses_labels():
    mask = torch.rand(64, 48, generator=gen(1)) > 0.9
    places = sample_places(mask, 256, gen(2))
    assert len(places.particle) == len(places.background) == 256
    assert bool(mask[places.particle[:, 0], places.particle[:, 1]].all())
    assert not bool(mask[places.background[:, 0], places.background[:, 1]].any())
    again = sample_places(mask, 256, gen(2))
    assert torch.equal(places.particle, again.particle)


def test_few_pixels_are_drawn_again_and_too_few_are_refused():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[3:7, 3:7] = True
    assert len(sample_places(mask, 256, gen()).particle) == 256
    mask[3, 3] = False
    assert not has_both_labels(mask)
    with pytest.raises(ValueError, match="15 of 1024 pixels are particle"):
        sample_places(mask, 256, gen())
    with pytest.raises(ValueError, match="1024 of 1024"):
        sample_places(torch.ones(32, 32, dtype=torch.bool), 4, gen())


def test_unguided_places_fall_anywhere():
    places = sample_anywhere((16, 32), 500, gen())
    both = torch.cat((places.particle, places.background)).float()
    assert len(both) == 1000
    assert both.mean(0).tolist() == pytest.approx([7.5, 15.5], abs=0.8)
    assert both.max(0).values.tolist() == [15.0, 31.0]
