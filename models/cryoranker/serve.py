"""Scoring particles with an exported ranker: ONNX Runtime, NumPy, SciPy and Pillow, no torch.

One `OnnxRanker` is used from one thread. The provider in use is what the session says after it was made: asking for
CUDA where there is none falls back to the CPU, with a warning in the log. Spin-waiting is off, because it halves the throughput
of several single-threaded workers on one machine.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from models.cryo_ief.config import ResizeMode
from models.cryo_ief.preprocess import preprocess_particles

log = logging.getLogger(__name__)

DEFAULT_MODEL = Path(__file__).with_name("default.onnx")
"""The ranker that ships with icestream; its model card is this folder's README."""

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
    providers
        ONNX Runtime execution providers in order of preference; None takes the CPU.
    n_threads
        Threads of one inference and of preprocessing. One thread per worker is the fastest layout.
    batch_size
        Particles per inference; memory grows with it.
    outlier_sigmas
        Replace NaN, hot and dead pixels by the image's median before scoring (`preprocess.replace_outliers`); None, the
        released models' way, leaves them. Scores with the guard have a `model_hash` of their own.
    """

    def __init__(
        self,
        path: Path = DEFAULT_MODEL,
        *,
        providers: Sequence[str] | None = None,
        n_threads: int = 1,
        batch_size: int = 64,
        outlier_sigmas: float | None = None,
    ) -> None:
        if batch_size < 1 or n_threads < 1:
            msg = f"batch_size, n_threads: {batch_size}, {n_threads}, must be 1 or more"
            raise ValueError(msg)
        content = _read(path)
        self.path = path
        guard = b"" if outlier_sigmas is None else f"outlier_sigmas={outlier_sigmas!r}".encode()
        self.model_hash = hashlib.sha256(content + guard).hexdigest()
        """SHA-256 of the file (and of the guard, if on): features and scores are kept under this key."""
        self.outlier_sigmas = outlier_sigmas
        self.n_threads = n_threads
        self.batch_size = batch_size
        self._session = _open_session(path, content, providers, n_threads)
        self.info = _read_info(path, self._session)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if providers and self.providers[0] != providers[0]:
            log.warning("%s: %s asked for, %s in use", path, providers[0], self.providers[0])
        self.feature_dim = int(self._session.get_outputs()[self._index_of("feature")].shape[1])

    @property
    def provider(self) -> str:
        """The execution provider in use, as the session reports it."""
        return self.providers[0]

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
            prepared = preprocess_particles(
                images[part],
                self.info.input_size_px,
                self.info.mean,
                self.info.std,
                self.info.resize_mode,
                n_threads=self.n_threads,
                outlier_sigmas=self.outlier_sigmas,
            )
            scores[part], features[part] = self.score_prepared(prepared)
        is_finite = np.isfinite(images)
        is_usable = is_finite.all(axis=(1, 2)) if self.outlier_sigmas is None else is_finite.any(axis=(1, 2))
        is_bad = ~is_usable
        scores[is_bad] = np.nan
        features[is_bad] = 0
        return scores, features

    def score_prepared(
        self, particles: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
        """Return scores and features of preprocessed particles `(b, 1, s, s)`, in one inference."""
        score, feature = self._session.run(["score", "feature"], {"particles": particles})
        return np.asarray(score, np.float32).reshape(-1), np.asarray(feature, np.float32).astype(np.float16)

    def _index_of(self, output: str) -> int:
        return [item.name for item in self._session.get_outputs()].index(output)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}), a ranker is an ONNX file"
        raise ValueError(msg) from error


def _open_session(path: Path, content: bytes, providers: Sequence[str] | None, n_threads: int) -> Any:  # noqa: ANN401 - onnxruntime has no types
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    available = set(onnxruntime.get_available_providers())
    wanted = [name for name in providers or () if name in available]
    if "CPUExecutionProvider" not in wanted:
        wanted.append("CPUExecutionProvider")
    try:
        return onnxruntime.InferenceSession(content, options, providers=wanted)
    except Exception as error:  # ONNX Runtime's errors share no other base
        msg = f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})"
        raise ValueError(msg) from error


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
