"""Scoring particles with an exported ranker: ONNX Runtime, NumPy, SciPy and Pillow, no torch.

One `OnnxRanker` is used from one thread. What it runs on is chosen by `providers.py`; on a GPU, images are prepared there and
kept in buffers of the device (`binding.py`), which needs torch. An int8 file is run one image at a time: its products take one
scale for all they are shown, so in a larger batch an image's score would depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from models.cryo_ief.config import ResizeMode
from models.cryo_ief.preprocess import preprocess_particles
from models.cryoranker.binding import DeviceBinding
from models.cryoranker.providers import ON_GPU, OPENVINO, ProviderChoice, open_session

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = Path(__file__).with_name("default.onnx")
"""The ranker that ships with icestream; its model card is this folder's README."""

_CACHED_BYTES = 2 * 2**20
"""What the widest activation of one run may take on a CPU: the shipped model does 800 images/s in runs of 16 (2 MiB), 630 in
runs of 64; ViT-B is fastest alone. 1 to 4 MiB make sense."""
_REQUIRED_METADATA = ("icestream_architecture", "input_size", "mean", "std", "resize_mode", "source_sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerInfo:
    """What an exported ranker says of itself."""

    architecture: str
    input_size_px: int
    mean: float
    std: float
    resize_mode: ResizeMode
    source_sha256: str
    precision: str


class OnnxRanker:
    """A ranker loaded from an ONNX file.

    Parameters
    ----------
    path
        A file written by `icestream export`, or `DEFAULT_MODEL`.
    provider
        What it shall run on; `auto` takes the best that works. What cannot be had is warned of and replaced by the CPU.
        `openvino-bf16` computes in bfloat16 where the processor has it: scores have a `model_hash` of their own.
    n_threads
        Threads of one inference and of preprocessing. One thread per worker is the fastest layout.
    batch_size
        Particles per inference; memory grows with it.
    outlier_sigmas
        Replace NaN, hot and dead pixels by the image's median before scoring (`preprocess.replace_outliers`); None, the
        released models' way, leaves them. Scores with the guard have a `model_hash` of their own.
    expected_sha256
        Refuse a file with another SHA-256.
    has_device_buffers
        Whether to prepare and bind images on the session's device; None does so on a GPU.
    """

    def __init__(
        self,
        path: Path = DEFAULT_MODEL,
        *,
        provider: ProviderChoice = "auto",
        n_threads: int = 1,
        batch_size: int = 64,
        outlier_sigmas: float | None = None,
        expected_sha256: str | None = None,
        has_device_buffers: bool | None = None,
    ) -> None:
        if batch_size < 1 or n_threads < 1:
            msg = f"batch_size, n_threads: {batch_size}, {n_threads}, must be 1 or more"
            raise ValueError(msg)
        if outlier_sigmas is not None and not outlier_sigmas > 0.0:
            msg = f"outlier_sigmas: {outlier_sigmas}, must be above 0"
            raise ValueError(msg)
        content = _read(path)
        found_sha256 = hashlib.sha256(content).hexdigest()
        if expected_sha256 is not None and found_sha256 != expected_sha256.lower():
            msg = f"{path}: SHA-256 {found_sha256}, expected {expected_sha256.lower()}"
            raise ValueError(msg)
        self.path = path
        self.outlier_sigmas = outlier_sigmas
        self.n_threads = n_threads
        self.batch_size = batch_size
        opened = open_session(path, content, choice=provider, n_threads=n_threads, max_batch=batch_size)
        self._session = opened.session
        self.provider = opened.provider
        """The execution provider in use, as the session reports it."""
        changes = "" if outlier_sigmas is None else f"outlier_sigmas={outlier_sigmas!r}"
        changes += "bf16" if provider == "openvino-bf16" and self.provider == OPENVINO else ""
        self.model_hash = hashlib.sha256(content + changes.encode()).hexdigest()
        """SHA-256 of the file (and of guard and bfloat16, if on): features and scores are kept under this key."""
        self.info = _read_info(path, self._session)
        self.feature_dim = int(self._session.get_outputs()[self._index_of("feature")].shape[1])
        is_on_gpu = self.provider in ON_GPU
        self.images_at_once = _images_at_once(self.info, self.feature_dim, is_on_gpu=is_on_gpu)
        """Images per run of the graph, whatever the batch; None takes the whole batch."""
        self._binding: DeviceBinding | None = None
        if is_on_gpu if has_device_buffers is None else has_device_buffers:
            self._binding = DeviceBinding(
                self._session,
                "cuda" if is_on_gpu else "cpu",
                input_size_px=self.info.input_size_px,
                feature_dim=self.feature_dim,
            )

    def score(self, images: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
        """Return scores `(b,)` in [0, 1] and unit features `(b, d)` of particle images `(b, n, n)`, protein white.

        An image that holds NaN or infinity has no score: it gets NaN, and a zero feature. With the guard on, only one
        without a finite pixel has none.
        """
        if images.ndim != 3 or images.shape[1] != images.shape[2]:
            msg = f"images: shape {images.shape}, must be (b, n, n) with square boxes"
            raise ValueError(msg)
        scores = np.empty(len(images), np.float32)
        features = np.empty((len(images), self.feature_dim), np.float16)
        for first in range(0, len(images), self.batch_size):
            part = slice(first, first + self.batch_size)
            scores[part], features[part] = self.infer(self.prepare(images[part]))
        is_finite = np.isfinite(images)
        is_usable = is_finite.all(axis=(1, 2)) if self.outlier_sigmas is None else is_finite.any(axis=(1, 2))
        is_bad = ~is_usable
        scores[is_bad] = np.nan
        features[is_bad] = 0
        return scores, features

    def prepare(self, images: NDArray[Any]) -> NDArray[np.float32] | Tensor:
        """Return the network's input `(b, 1, s, s)`: on the GPU where the session is there and can be fed from there."""
        info = self.info
        if self._binding is not None and self.outlier_sigmas is None:
            from models.cryo_ief.preprocess_torch import is_covered

            if is_covered(images.shape[1], info.input_size_px, info.resize_mode):
                return self._prepare_on_device(images, self._binding.device)
        return preprocess_particles(
            images,
            info.input_size_px,
            info.mean,
            info.std,
            info.resize_mode,
            n_threads=self.n_threads,
            outlier_sigmas=self.outlier_sigmas,
        )

    def infer(
        self, prepared: NDArray[np.float32] | Tensor
    ) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
        """Return scores `(b,)` and features `(b, d)` of prepared particles; `images_at_once` go through the graph together."""
        n_at_once = self.images_at_once or max(1, len(prepared))
        starts = range(0, max(1, len(prepared)), n_at_once)
        parts = [self._run(prepared[i : i + n_at_once]) for i in starts]
        scores, features = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
        return np.asarray(scores, np.float32), np.asarray(features).astype(np.float16)

    def _prepare_on_device(self, images: NDArray[Any], device: str) -> Tensor:
        import torch

        from models.cryo_ief.preprocess_torch import preprocess_tensor

        info = self.info
        stack = torch.from_numpy(np.ascontiguousarray(images, np.float32)).to(device)
        return preprocess_tensor(stack, info.input_size_px, info.mean, info.std, info.resize_mode)

    def _run(self, prepared: NDArray[np.float32] | Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if self._binding is not None and not isinstance(prepared, np.ndarray):
            return self._binding.run_tensor(prepared)
        particles = np.asarray(prepared)
        if self._binding is not None and len(particles):
            return self._binding.run(particles)
        score, feature = self._session.run(["score", "feature"], {"particles": particles})
        return np.asarray(score, np.float32).reshape(-1), np.asarray(feature, np.float32)

    def _index_of(self, output: str) -> int:
        return [item.name for item in self._session.get_outputs()].index(output)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}), a ranker is an ONNX file"
        raise ValueError(msg) from error


def _images_at_once(info: RankerInfo, width: int, *, is_on_gpu: bool) -> int | None:
    """Return how many images keep the widest activation, the MLPs' inside, within a core's cache."""
    if info.precision == "int8":
        return 1
    patch = re.search(r"-p(\d+)-", info.architecture)
    if is_on_gpu or patch is None:
        return None
    n_tokens = (info.input_size_px // int(patch[1])) ** 2 + 1
    return max(1, _CACHED_BYTES // (n_tokens * 4 * width * 4))


def _read_info(path: Path, session: Any) -> RankerInfo:  # noqa: ANN401 - onnxruntime has no types
    metadata = session.get_modelmeta().custom_metadata_map
    outputs = {item.name for item in session.get_outputs()}
    inputs = [item.name for item in session.get_inputs()]
    missing = [key for key in _REQUIRED_METADATA if key not in metadata]
    if missing or inputs != ["particles"] or not {"score", "feature"} <= outputs:
        msg = (
            f"{path}: not a ranker: inputs {inputs}, outputs {sorted(outputs)}, missing metadata {missing};"
            " a ranker has input particles, outputs score and feature, and icestream's metadata"
        )
        raise ValueError(msg)
    resize_mode = metadata["resize_mode"]
    if resize_mode not in ("hartley", "bicubic"):
        msg = f"{path}: resize_mode {resize_mode!r}, must be 'hartley' or 'bicubic'"
        raise ValueError(msg)
    try:
        return RankerInfo(
            architecture=metadata["icestream_architecture"],
            input_size_px=int(metadata["input_size"]),
            mean=float(metadata["mean"]),
            std=float(metadata["std"]),
            resize_mode=cast("ResizeMode", resize_mode),
            source_sha256=metadata["source_sha256"],
            precision=metadata.get("icestream_precision", "unknown"),
        )
    except ValueError as error:
        msg = f"{path}: metadata input_size, mean or std is not a number ({error})"
        raise ValueError(msg) from error
