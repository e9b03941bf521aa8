"""`icestream bench vit-b` counts the products that are made, and its three figures come out of one run."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.cryo_ief.config import vit_config
from models.cryo_ief.export import ExportedVit
from models.cryo_ief.vit import CryoVit
from stream.commands.bench_vit import _gflops, _Turn, flop_per_image, run_vit_benchmark
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


def test_inference_and_products_are_medians_over_turns():
    turns = [
        _Turn(scores=np.zeros(1, np.float32), inference_s=s, gemm_s={"torch": 2.0 * s, "numpy": s})
        for s in (0.5, 0.25, 9.0)
    ]
    inference, products = _gflops(turns, 40e9)
    assert inference == pytest.approx(80.0)
    assert products["numpy"] == pytest.approx(2e-9 * 2048**3 / 0.5)
    assert products["torch"] == pytest.approx(products["numpy"] / 2.0)


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
    assert inference["baseline_value"] == max(inference["gemm_gflops"].values())
    assert 0.1 < inference["ratio"] < 1.2
    assert 0.0 < hidden["ratio"] < 2.0
