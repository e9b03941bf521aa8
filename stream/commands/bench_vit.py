"""Benchmark of the full-size ranker (ViT-B/14): the scoring path against a plain PyTorch loop and the machine's GEMM.

Weights are random, because the authors' are not ours to ship; the time of a network does not depend on them.
Everything runs with one compute thread, alternates `n_repeats` times in one process, and medians count. The float32 network is
held against matrix products in turns of one run of the graph and one product, in processor time: others on the machine come and go
within seconds, and a ratio of minutes' averages would be theirs. One thread is also what NumPy's BLAS gets: its other threads
spin for a while after a product, and their time would be counted with what comes next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stream.commands.bench_score import write_stacks
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from models.cryo_ief.config import VitConfig
    from models.cryo_ief.export import Precision
    from models.cryo_ief.vit import CryoVit
    from models.cryoranker.serve import OnnxRanker

_GEMM_SIZE = 2048


def run_vit_benchmark(
    folder: Path,
    *,
    n_particles: int = 48,
    box_size_px: int = 256,
    n_per_exposure: int = 16,
    batch_size: int = 8,
    n_repeats: int = 3,
    size: str = "base",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return three figures: int8 path against the eager loop, fp32 inference against GEMM, path against inference.

    The GEMM peak is the best that a library at hand makes of a large square product in float32, PyTorch's (MKL) or NumPy's
    (OpenBLAS). What they make of the network's own products, without anything between them, is told beside it.

    The eager loop is what the authors' own code does: a DataLoader with one worker that reads and resizes one
    particle at a time, and the float32 network in evaluation mode. The second figure counts the products that the exported
    graph makes: its last block computes the CLS token alone.
    """
    import torch
    from scipy.stats import spearmanr
    from threadpoolctl import threadpool_limits

    if n_particles < 2 * batch_size:
        raise ConfigurationError(
            "bench vit-b", f"at least two batches of {batch_size} particles", n_particles
        )
    threadpool_limits(1)  # holds until the process ends, as torch's does
    torch.set_num_threads(1)
    model, fp32, int8, particles = _export(folder, size, batch_size, n_particles, seed)
    # what was prepared for the network, mirrored out to the box of an extracted particle
    rim = (box_size_px - particles.shape[-1]) // 2
    images = np.pad(particles, ((0, 0), (rim, rim), (rim, rim)), mode="reflect")
    stacks = write_stacks(folder, images, n_per_exposure)
    flop = flop_per_image(model, is_exported=True)

    found: dict[str, NDArray[np.float32]] = {}
    seconds: dict[str, list[float]] = {}
    cpu_s: dict[str, float] = {}

    def measure(name: str, run: Callable[[], NDArray[np.float32] | None]) -> None:
        started, started_cpu = time.perf_counter(), _processor_s()
        scores = run()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        cpu_s[name] = cpu_s.get(name, 0.0) + _processor_s() - started_cpu
        if scores is not None:
            found[name] = scores

    prepared = _prepare(fp32, images)
    paths = iter(folder / f"cache{repeat}" for repeat in range(n_repeats))
    turns: list[_Turn] = []
    block = block_products(model.config)
    for _ in range(n_repeats):
        measure("eager", lambda: _score_eagerly(model, stacks, batch_size))
        measure("int8", lambda: _score_prepared(int8, prepared, batch_size))
        measure("path", lambda: _score_path(int8, stacks, batch_size, next(paths)))
        turns += _take_turns(fp32, prepared, block)
    found["fp32"] = np.concatenate([turn.scores for turn in turns[: len(turns) // n_repeats]])
    rate = {name: n_particles / float(np.median(s)) for name, s in seconds.items()}
    inference = flop / float(np.median([turn.inference_s for turn in turns])) / 1e9
    square = _medians([turn.square_gflops for turn in turns])
    own = _medians([turn.block_gflops for turn in turns])
    common: dict[str, Any] = {
        "n_particles": n_particles,
        "box_size_px": box_size_px,
        "batch_size": batch_size,
        "n_threads": 1,
        "architecture": model.config.architecture,
        "gflop_per_image": flop_per_image(model, is_exported=False) / 1e9,
        "gflop_per_image_exported": flop / 1e9,
    }
    return [
        {
            "name": "vit-b path",
            "value": rate["path"],
            "unit": "particles/s from stacks to the cache, int8",
            "baseline": "PyTorch eager float32 with a DataLoader, same run",
            "baseline_value": rate["eager"],
            "ratio": rate["path"] / rate["eager"],
            "cpu_ratio": cpu_s["eager"] / cpu_s["path"],
            "spearman": float(spearmanr(found["path"], found["eager"]).statistic),
            "provider": int8.provider,
            **common,
        },
        {
            "name": "vit-b float32 inference",
            "value": inference,
            "unit": "GFLOP per processor second",
            "baseline": f"best library's float32 product of {_GEMM_SIZE} x {_GEMM_SIZE}, in turns, same run",
            "baseline_value": max(square.values()),
            "ratio": inference / max(square.values()),
            "square_gflops": square,
            "own_products_gflops": own,
            "ratio_to_own_products": inference / max(own.values()),
            "provider": fp32.provider,
            "images_at_once": fp32.images_at_once,
            "images_per_s": inference * 1e9 / flop,
            "max_abs_score_difference": float(np.abs(found["fp32"] - found["eager"]).max()),
        },
        {
            "name": "vit-b path hidden behind inference",
            "value": rate["path"],
            "unit": "particles/s",
            "baseline": "int8 inference alone on prepared images, same run",
            "baseline_value": rate["int8"],
            "ratio": rate["path"] / rate["int8"],
            "cpu_ratio": cpu_s["int8"] / cpu_s["path"],
            "seconds": seconds,
        },
    ]


def _processor_s() -> float:
    """Return the processor time of this process and of the DataLoader's workers that have ended."""
    return sum(os.times()[:4])


def flop_per_image(model: CryoVit, *, is_exported: bool) -> float:
    """Return multiply-adds × 2 of one image: blocks (24 t d² + 4 t² d each) and patch embedding.

    In an exported graph the last block has keys and values of all tokens (4 t d²) and the CLS token's row of the rest.
    """
    c = model.config
    n_patches = (c.input_size_px // c.patch_size_px) ** 2
    t, d = n_patches + 1, c.width
    block = (8 + 4 * c.mlp_ratio) * t * d**2 + 4 * t**2 * d
    last = 4 * t * d**2 + (4 + 4 * c.mlp_ratio) * d**2 + 4 * t * d if is_exported else block
    return float((c.depth - 1) * block + last + 2 * n_patches * c.patch_size_px**2 * d)


def _export(
    folder: Path, size: str, batch_size: int, n_particles: int, seed: int
) -> tuple[CryoVit, OnnxRanker, OnnxRanker, NDArray[np.float32]]:
    import torch

    from models.cryo_ief.config import vit_config
    from models.cryo_ief.export import export_onnx
    from models.cryo_ief.vit import CryoVit
    from models.cryoranker.serve import OnnxRanker
    from stream.commands.export import check_particles

    torch.manual_seed(seed)
    model = CryoVit(vit_config(size))
    check = check_particles(model.config, n=max(64, n_particles))
    _settle_batch_norms(model, check[:32])
    rankers = []
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    for precision in precisions:
        path = folder / f"{precision}.onnx"
        export_onnx(
            model,
            path,
            layout="benchmark",
            source_sha256="0" * 64,
            precision=precision,
            check_particles=check[:48] if precision == "int8" else check[:8],
            min_int8_spearman=0.0,  # random weights; what int8 does to ranks is a figure of this benchmark
        )
        rankers.append(OnnxRanker(path, n_threads=1, batch_size=batch_size))
    return model, rankers[0], rankers[1], check[:n_particles, 0].numpy()


def _settle_batch_norms(model: CryoVit, particles: Tensor) -> None:
    """Give the BatchNorms the statistics of particles, as training would; without them images hardly differ."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in torch.split(particles, 8):
            model(batch)
    model.eval()


def _prepare(ranker: OnnxRanker, images: NDArray[np.float32]) -> NDArray[np.float32]:
    from models.cryo_ief.preprocess import preprocess_particles

    info = ranker.info
    return preprocess_particles(images, info.input_size_px, info.mean, info.std, info.resize_mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One run of the graph and each library's products after it, in processor time."""

    scores: NDArray[np.float32]
    inference_s: float
    square_gflops: dict[str, float]
    """Of a square product, by library."""
    block_gflops: dict[str, float]
    """Of the products of one block of the network, by library."""


Product = tuple[NDArray[np.float32], NDArray[np.float32]]


def _take_turns(ranker: OnnxRanker, prepared: NDArray[np.float32], block: list[Product]) -> list[_Turn]:
    """Run the graph on as many images at once as a server does, and products between; every library warms up first."""
    square = np.random.default_rng(0).standard_normal((_GEMM_SIZE, _GEMM_SIZE), dtype=np.float32)
    _gflops_of([(square, square)])
    n_at_once = ranker.images_at_once or len(prepared)
    turns = []
    for start in range(0, len(prepared), n_at_once):
        images = prepared[start : start + n_at_once]
        started = time.process_time()
        scores, _ = ranker.infer(images)
        inference_s = (time.process_time() - started) / len(images)
        turns.append(
            _Turn(
                scores=scores,
                inference_s=inference_s,
                square_gflops=_gflops_of([(square, square)]),
                block_gflops=_gflops_of(block),
            )
        )
    return turns


def _gflops_of(products: list[Product]) -> dict[str, float]:
    """Return what each library makes of matrix products, GFLOP per processor second."""
    import torch

    flop = sum(2.0 * left.size * right.shape[-1] for left, right in products)
    tensors = [(torch.from_numpy(left), torch.from_numpy(right)) for left, right in products]
    found = {}
    for name, pairs in (("torch", tensors), ("numpy", products)):
        started = time.process_time()
        for left, right in pairs:
            left @ right
        found[name] = flop / (time.process_time() - started) / 1e9
    return found


def block_products(config: VitConfig) -> list[Product]:
    """Return random matrices whose products are those of one Transformer block for one image."""
    noise = np.random.default_rng(0)
    t, d = (config.input_size_px // config.patch_size_px) ** 2 + 1, config.width
    head, inside = d // config.n_heads, int(config.mlp_ratio * d)
    linear = [((t, d), (d, 3 * d)), ((t, d), (d, d)), ((t, d), (d, inside)), ((t, inside), (inside, d))]
    attention = [((t, head), (head, t)), ((t, t), (t, head))] * config.n_heads
    return [
        (noise.standard_normal(left, dtype=np.float32), noise.standard_normal(right, dtype=np.float32))
        for left, right in linear + attention
    ]


def _medians(rates: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([rate[name] for rate in rates])) for name in rates[0]}


def _score_prepared(
    ranker: OnnxRanker, prepared: NDArray[np.float32], batch_size: int
) -> NDArray[np.float32]:
    starts = range(0, len(prepared), batch_size)
    return np.concatenate([ranker.infer(prepared[s : s + batch_size])[0] for s in starts])


def _score_path(
    ranker: OnnxRanker, stacks: list[tuple[Path, tuple[int, int, int]]], batch_size: int, folder: Path
) -> NDArray[np.float32]:
    from actors.ranker import BatchingRanker
    from stream.store.feature_cache import FeatureCache

    with FeatureCache(folder) as cache, ThreadPoolExecutor(2) as callers:
        batching = BatchingRanker(ranker, cache, batch_size=batch_size)
        first = np.cumsum([0, *(shape[0] for _, shape in stacks)])

        def score(number: int) -> NDArray[np.float32]:
            path, shape = stacks[number]
            indices = np.arange(shape[0])
            uids = (indices + 1 + first[number]).astype(np.uint64)
            return batching.score_images(uids, np.full(shape[0], str(path), dtype=object), indices).scores

        scores = np.concatenate(list(callers.map(score, range(len(stacks)))))
        batching.close()
    return scores


def _score_eagerly(
    model: CryoVit, stacks: list[tuple[Path, tuple[int, int, int]]], batch_size: int
) -> NDArray[np.float32]:
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(_OneByOne(model, stacks), batch_size=batch_size, num_workers=1)  # type: ignore[arg-type,var-annotated]
    with torch.no_grad():
        return np.concatenate([model.score(model(batch)[1]).numpy() for batch in loader])


class _OneByOne:
    """A map-style data set that opens the stack and resizes one particle per item."""

    def __init__(self, model: CryoVit, stacks: list[tuple[Path, tuple[int, int, int]]]) -> None:
        self._config = model.config
        self._items = [(path, shape, i) for path, shape in stacks for i in range(shape[0])]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        from models.cryo_ief.preprocess import preprocess_particles

        path, shape, i = self._items[index]
        c = self._config
        image = np.asarray(np.memmap(path, np.float32, "r", 1024, shape)[i : i + 1])
        prepared = preprocess_particles(image, c.input_size_px, c.mean, c.std, c.resize_mode)
        return np.asarray(prepared[0])
