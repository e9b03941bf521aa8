"""The execution provider: what the session says counts, every step down is a warning, buffers on the device give the same scores.

GPU providers are played by a stand-in for ONNX Runtime; OpenVINO's is asked where it is installed.
"""

import logging
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from models.cryo_ief.preprocess import preprocess_particles, to_grey_levels
from models.cryo_ief.preprocess_torch import is_covered, preprocess_tensor, to_grey_tensor
from models.cryoranker.binding import DeviceBinding
from models.cryoranker.providers import CPU, CUDA, OPENVINO, TENSORRT, open_session
from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker

CONTENT = DEFAULT_MODEL.read_bytes()


class StandIn:
    """ONNX Runtime on a machine of which is known what it offers, what its sessions take and what they refuse.

    A session of a provider that is not in `works` takes the CPU, as ONNX Runtime does; one in `raises` raises.
    """

    GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel
    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, available, *, works=(), raises=(), precision="fp16"):
        self.available, self.works, self.raises = available, works, raises
        self.precision = precision
        self.asked = []

    def get_available_providers(self):
        return [*self.available, CPU]

    def InferenceSession(self, content, options, providers):  # noqa: N802 - the name is ONNX Runtime's
        names = [entry if isinstance(entry, str) else entry[0] for entry in providers]
        self.asked.append(providers)
        for name in names:
            if name in self.raises:
                raise RuntimeError(f"{name} failed to load its library\nand more")
        taken = [name for name in names if name in (*self.works, CPU)]
        metadata = SimpleNamespace(
            custom_metadata_map={"input_size": "64", "icestream_precision": self.precision}
        )
        return SimpleNamespace(
            get_providers=lambda: taken, disable_fallback=lambda: None, get_modelmeta=lambda: metadata
        )


def choose(runtime, choice="auto"):
    return open_session(DEFAULT_MODEL, CONTENT, choice=choice, max_batch=128, runtime=runtime).provider


def warnings_of(caplog):
    return [(r.provider, r.reason) for r in caplog.records if r.message == "ranker_provider_not_used"]


def test_the_best_provider_that_works_is_taken(caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    caplog.set_level(logging.INFO)
    for works, expected in (((TENSORRT, CUDA), TENSORRT), ((CUDA,), CUDA)):
        caplog.clear()
        assert choose(StandIn((TENSORRT, CUDA), works=works)) == expected
        chosen = [r for r in caplog.records if r.message == "ranker_provider_chosen"]
        assert [(r.provider, r.asked_for) for r in chosen] == [(expected, "auto")]
    assert choose(StandIn((OPENVINO,), works=(OPENVINO,))) == OPENVINO


def test_a_gpu_build_without_a_gpu_runs_on_the_cpu_and_says_so_for_each_provider(
    caplog, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose(StandIn((TENSORRT, CUDA))) == CPU
    assert warnings_of(caplog) == [
        (TENSORRT, f"the session took {CPU}"),
        (CUDA, f"the session took {CPU}"),
    ]


def test_a_provider_whose_session_fails_is_passed_over_with_its_reason(caplog):
    assert choose(StandIn((CUDA,), raises=(CUDA,))) == CPU
    assert warnings_of(caplog) == [(CUDA, f"{CUDA} failed to load its library")]


@pytest.mark.parametrize("choice", ["tensorrt", "cuda", "openvino"])
def test_what_is_asked_for_and_not_installed_is_warned_of(choice, caplog):
    runtime = StandIn(())
    assert choose(runtime, choice) == CPU
    assert all("not in this build" in reason for _, reason in warnings_of(caplog))
    assert len(warnings_of(caplog)) == (2 if choice == "tensorrt" else 1)


def test_auto_on_a_plain_build_takes_the_cpu_without_a_warning(caplog):
    assert choose(StandIn(())) == CPU
    assert not warnings_of(caplog)


def test_an_int8_file_stays_on_the_cpu_with_a_word_on_what_a_gpu_would_take(caplog):
    runtime = StandIn((CUDA, OPENVINO), works=(CUDA, OPENVINO), precision="int8")
    assert choose(runtime) == CPU
    assert [provider for provider, _ in warnings_of(caplog)] == [CUDA, OPENVINO]
    assert "export fp16" in warnings_of(caplog)[0][1]
    assert choose(runtime, "cuda") == CUDA


def test_two_builds_of_onnx_runtime_in_one_environment_are_warned_of(caplog, monkeypatch):
    """They share one folder: the one that was installed last decides what there is."""
    installed = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("models.cryoranker.providers.version", version)
    choose(StandIn(()))
    (record,) = [r for r in caplog.records if r.message == "several_onnxruntime_builds"]
    assert record.builds == ["onnxruntime", "onnxruntime-gpu"]
    caplog.clear()
    del installed["onnxruntime"]
    choose(StandIn(()))
    assert not caplog.records


def test_an_unknown_provider_is_refused():
    with pytest.raises(ValueError, match="provider: 'tpu', must be one of auto, tensorrt"):
        OnnxRanker(DEFAULT_MODEL, provider="tpu")


def test_tensorrt_plans_one_engine_for_all_batches_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    runtime = StandIn((TENSORRT, CUDA), works=(TENSORRT, CUDA))
    choose(runtime)
    (name, options), (second, cuda), (last, _) = runtime.asked[-1]
    assert (name, second, last) == (TENSORRT, CUDA, CPU)
    assert options["trt_profile_min_shapes"] == "particles:1x1x64x64"
    assert options["trt_profile_max_shapes"] == "particles:128x1x64x64"
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_path"].startswith(str(tmp_path))
    assert cuda == {"use_tf32": "0"}


@pytest.mark.parametrize(
    ("choice", "hint"), [("auto", "f32"), ("openvino", "f32"), ("openvino-bf16", "bf16")]
)
def test_openvino_computes_in_bfloat16_only_when_asked_to(choice, hint):
    runtime = StandIn((OPENVINO,), works=(OPENVINO,))
    assert choose(runtime, choice) == OPENVINO
    name, options = runtime.asked[-1][0]
    assert name == OPENVINO
    assert hint in options["load_config"]


@pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(), reason="needs onnxruntime-openvino"
)
def test_openvino_gives_the_cpus_scores():
    images = np.random.default_rng(0).normal(size=(9, 96, 96)).astype(np.float32)
    ranker = OnnxRanker(DEFAULT_MODEL, provider="openvino", batch_size=4)
    assert ranker.provider == OPENVINO
    expected = OnnxRanker(DEFAULT_MODEL, provider="cpu").score(images)
    np.testing.assert_allclose(ranker.score(images)[0], expected[0], atol=1e-4)
    coarse = OnnxRanker(DEFAULT_MODEL, provider="openvino-bf16", batch_size=4)
    np.testing.assert_allclose(coarse.score(images)[0], expected[0], atol=5e-2)
    assert coarse.model_hash != ranker.model_hash == OnnxRanker(DEFAULT_MODEL, provider="cpu").model_hash


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", ["cuda", "auto"])
def test_a_gpu_gives_the_cpus_scores(choice):
    images = np.random.default_rng(0).normal(size=(150, 96, 96)).astype(np.float32)
    ranker = OnnxRanker(DEFAULT_MODEL, provider=choice, batch_size=64)
    assert ranker.provider in (CUDA, TENSORRT)
    expected = OnnxRanker(DEFAULT_MODEL, provider="cpu").score(images)
    np.testing.assert_allclose(ranker.score(images)[0], expected[0], atol=2e-3)


@pytest.mark.parametrize("box", [64, 96, 40])
def test_device_buffers_give_the_same_scores_for_any_batch(box):
    """40 px lie below the model's input, so that the NumPy path prepares them and the binding takes them up."""
    images = np.random.default_rng(box).normal(size=(11, box, box)).astype(np.float32)
    images[3] = 0.5
    images[7, 2, 2] = np.nan
    bound, plain = (OnnxRanker(batch_size=4, has_device_buffers=has) for has in (True, False))
    usable = [i for i in range(11) if i not in (3, 7)]
    for part in (images, images[:5], images):
        scores, features = bound.score(part)
        expected, expected_features = plain.score(part)
        rows = [i for i in usable if i < len(part)]
        np.testing.assert_allclose(scores[rows], expected[rows], atol=2e-3)
        np.testing.assert_allclose(features[rows], expected_features[rows], atol=2e-2)
        assert np.isnan(scores[7:8]).all()


def test_results_of_a_bound_run_are_not_overwritten_by_the_next():
    ranker = OnnxRanker(has_device_buffers=False)
    n = ranker.info.input_size_px
    binding = DeviceBinding(ranker._session, "cpu", input_size_px=n, feature_dim=ranker.feature_dim)
    first, second = (np.random.default_rng(i).normal(size=(2, 1, n, n)).astype(np.float32) for i in (0, 1))
    scores, features = binding.run(first)
    kept = scores.copy(), features.copy()
    binding.run(second)
    np.testing.assert_array_equal(scores, kept[0])
    np.testing.assert_array_equal(features, kept[1])
    np.testing.assert_allclose(binding.run_tensor(torch.from_numpy(first))[0], scores, atol=1e-6)


def test_a_failed_run_gives_its_buffers_back_so_that_a_smaller_batch_may_fit():
    ranker = OnnxRanker(has_device_buffers=True)
    session = ranker._session

    class Small:
        def io_binding(self):
            return session.io_binding()

        def run_with_iobinding(self, binding):
            if self.n > 4:
                raise RuntimeError("BFCArena: Failed to allocate memory")
            session.run_with_iobinding(binding)

    small = Small()
    n = ranker.info.input_size_px
    binding = DeviceBinding(small, "cpu", input_size_px=n, feature_dim=ranker.feature_dim)
    particles = np.random.default_rng(0).normal(size=(8, 1, n, n)).astype(np.float32)
    small.n = 8
    with pytest.raises(RuntimeError, match="Failed to allocate"):
        binding.run(particles)
    assert not binding._by_size
    small.n = 4
    np.testing.assert_allclose(binding.run(particles[:4])[0], ranker.infer(particles[:4])[0], atol=1e-6)


@pytest.mark.parametrize(("box", "size"), [(320, 224), (301, 224), (96, 64), (64, 64)])
def test_preparing_on_the_device_agrees_to_one_grey_level_in_a_few_pixels(box, size):
    images = np.random.default_rng(box).normal(size=(3, box, box)).astype(np.float32)
    found = to_grey_tensor(torch.from_numpy(images), size, "hartley").numpy().astype(int)
    difference = np.abs(found - to_grey_levels(images, size))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 3e-3
    prepared = preprocess_tensor(torch.from_numpy(images), size, 0.4, 0.2, "hartley").numpy()
    expected = preprocess_particles(images, size, 0.4, 0.2)
    assert prepared.shape == expected.shape == (3, 1, size, size)
    assert np.abs(prepared - expected).max() < 1.01 / 255 / 0.2


def test_what_the_device_does_not_prepare_is_named():
    assert is_covered(64, 64, "bicubic")
    assert not is_covered(96, 64, "bicubic")
    assert not is_covered(48, 64, "hartley")
    with pytest.raises(ValueError, match="boxes of 48 px to 64 px"):
        to_grey_tensor(torch.zeros(1, 48, 48), 64, "hartley")
