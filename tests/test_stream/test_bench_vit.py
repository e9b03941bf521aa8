"""`icestream bench vit-b` counts the products that are made, and its three figures come out of one run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.cryo_ief.config import vit_config
from models.cryo_ief.export import ExportedVit
from models.cryo_ief.vit import CryoVit
from stream.commands.bench_vit import block_products, flop_per_image, run_vit_benchmark
from stream.records.errors import ConfigurationError


@pytest.mark.parametrize("is_exported", [False, True])
def test_counted_products_are_those_that_torch_counts(is_exported):
    torch.manual_seed(0)
    model = CryoVit(vit_config("nano")).eval()
    size = model.config.input_size_px
    network = ExportedVit(model).eval() if is_exported else model
    # The counter knows nothing of the fused attention on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, size, size))
    assert flop_per_image(model, is_exported=is_exported) == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )


def test_the_products_of_a_block_are_those_that_are_counted():
    config = vit_config("nano")
    counted = sum(2.0 * left.size * right.shape[-1] for left, right in block_products(config))
    t, d = (config.input_size_px // config.patch_size_px) ** 2 + 1, config.width
    assert counted == pytest.approx((8 + 4 * config.mlp_ratio) * t * d**2 + 4 * t**2 * d)
    assert all(left.shape[1] == right.shape[0] for left, right in block_products(config))


def test_too_few_particles_for_two_batches_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="at least two batches of 8"):
        run_vit_benchmark(tmp_path, n_particles=8)


@pytest.mark.slow
def test_a_small_network_goes_through_the_whole_benchmark(tmp_path):
    path, inference, hidden = run_vit_benchmark(
        tmp_path, n_particles=16, n_per_exposure=6, batch_size=4, n_repeats=1, size="tiny"
    )
    assert path["spearman"] > 0.9  # a tiny network with random weights; scores hardly differ
    assert inference["max_abs_score_difference"] < 1e-4
    assert inference["baseline_value"] == max(inference["square_gflops"].values())
    assert 0.1 < inference["ratio"] < 1.2
    assert 0.0 < hidden["ratio"] < 2.0
