"""Which execution provider runs a ranker: chosen when its session is opened, read back from the session, logged.

Order of preference: TensorRT, CUDA, OpenVINO, CPU, of those that the installed ONNX Runtime names. That it names a provider
does not mean that the machine has the device: a session that cannot have its provider takes the CPU and says so on
stderr alone. So every candidate gets a session of its own that is asked afterwards what it runs on; each candidate that
fails is a warning in the log, the one that holds an info line. Once a session stands it never changes its provider:
ONNX Runtime's own silent retry on the CPU is switched off.

Int8 files are made for ONNX Runtime's own CPU kernels: OpenVINO runs them three times slower, a GPU would copy to and fro.
`auto` leaves them on the CPU, with a warning where there is something better for another file.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

log = logging.getLogger(__name__)

ProviderChoice = Literal["auto", "tensorrt", "cuda", "openvino", "openvino-bf16", "cpu"]
"""What may be asked for; `auto` takes the best one that gives the file's own precision."""
PROVIDER_CHOICES: tuple[str, ...] = get_args(ProviderChoice)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
ON_GPU = (TENSORRT, CUDA)
"""Providers whose sessions take buffers on a CUDA device."""

_CANDIDATES: dict[ProviderChoice, tuple[str, ...]] = {
    "auto": (TENSORRT, CUDA, OPENVINO, CPU),
    "tensorrt": (TENSORRT, CUDA, CPU),
    "cuda": (CUDA, CPU),
    "openvino": (OPENVINO, CPU),
    "openvino-bf16": (OPENVINO, CPU),
    "cpu": (CPU,),
}
_BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
_TENSORRT_CACHE = Path("~/.cache/icestream/tensorrt")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSession:
    """A session and the provider that it says it runs on."""

    session: Any
    provider: str


def open_session(
    path: Path,
    content: bytes,
    *,
    choice: ProviderChoice = "auto",
    n_threads: int = 1,
    max_batch: int = 64,
    runtime: Any = None,  # noqa: ANN401 - onnxruntime has no types
) -> OpenedSession:
    """Open the ONNX file `content`, read from `path`, on the first candidate that holds.

    `max_batch` is what TensorRT plans its engine for; `runtime` stands in for the module onnxruntime. Raises
    `ValueError` where the file cannot be opened even on the CPU.
    """
    if choice not in PROVIDER_CHOICES:
        msg = f"provider: {choice!r}, must be one of {', '.join(PROVIDER_CHOICES)}"
        raise ValueError(msg)
    if runtime is None:
        import onnxruntime

        runtime = onnxruntime
    _check_builds()
    available = tuple(runtime.get_available_providers())
    candidates = _CANDIDATES[choice]
    others = [name for name in candidates if name != CPU and name in available]
    metadata = _read_metadata(runtime, path, content) if others else {}
    if choice == "auto" and metadata.get("icestream_precision") == "int8":
        for name in others:
            _warn(path, name, "int8 files run on the CPU; export fp16 for a GPU, fp32 for OpenVINO")
        candidates = (CPU,)
    for name in candidates:
        if name not in available:
            if choice != "auto":
                _warn(path, name, f"not in this build of ONNX Runtime (it has {', '.join(available)})")
            continue
        try:
            providers = list(_with_options(name, metadata, choice, n_threads, max_batch))
            session = runtime.InferenceSession(content, _options(runtime, n_threads), providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no other base
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if name == CPU:
                msg = f"{path}: not a readable ONNX file ({reason})"
                raise ValueError(msg) from error
            _warn(path, name, reason)
            continue
        in_use = session.get_providers()[0]
        if in_use != name:
            _warn(path, name, f"the session took {in_use}")
            continue
        session.disable_fallback()
        log.info(
            "ranker_provider_chosen", extra={"model": str(path), "provider": in_use, "asked_for": choice}
        )
        return OpenedSession(session=session, provider=in_use)
    msg = f"{path}: this build of ONNX Runtime has no {CPU}"
    raise ValueError(msg)


def _check_builds() -> None:
    """Warn where several builds of ONNX Runtime are installed: they share a folder, and the last one written wins."""
    found = []
    for name in _BUILDS:
        with contextlib.suppress(PackageNotFoundError):
            version(name)
            found.append(name)
    if len(found) > 1:
        log.warning(
            "several_onnxruntime_builds",
            extra={"builds": found, "remedy": "uninstall all of them, then install one"},
        )


def _warn(path: Path, provider: str, reason: str) -> None:
    log.warning(
        "ranker_provider_not_used", extra={"model": str(path), "provider": provider, "reason": reason}
    )


def _options(runtime: Any, n_threads: int) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """Return the options of a session; spin-waiting is off, it halves the throughput of workers that share cores."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _with_options(
    name: str, metadata: dict[str, str], choice: ProviderChoice, n_threads: int, max_batch: int
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the provider and those behind it that take the nodes which it does not know, each with its options.

    Float32 means float32: TF32 is off on CUDA and bfloat16 on OpenVINO unless it is asked for, because scores are kept
    under the file's hash whatever computed them. TensorRT has no such switch and may use TF32.
    """
    if name == TENSORRT:
        yield TENSORRT, _tensorrt_options(metadata, max_batch)
    if name in ON_GPU:
        yield CUDA, {"use_tf32": "0"}
    if name == OPENVINO:
        hint = "bf16" if choice == "openvino-bf16" else "f32"
        config = json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": hint}})
        yield OPENVINO, {"device_type": "CPU", "num_of_threads": str(n_threads), "load_config": config}
    yield CPU, {}


def _read_metadata(runtime: Any, path: Path, content: bytes) -> dict[str, str]:  # noqa: ANN401 - onnxruntime has no types
    """Return what the file says of itself, before it is known where it will run."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = runtime.InferenceSession(content, options, providers=[CPU])
    except Exception as error:  # ONNX Runtime's errors share no other base
        msg = f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})"
        raise ValueError(msg) from error
    return dict(session.get_modelmeta().custom_metadata_map)


def _tensorrt_options(metadata: dict[str, str], max_batch: int) -> dict[str, str]:
    """Return options under which one engine serves every batch up to `max_batch` and is built once per machine."""
    size = metadata.get("input_size", "224")
    shapes = {
        "min": f"particles:1x1x{size}x{size}",
        "opt": f"particles:{max_batch}x1x{size}x{size}",
        "max": f"particles:{max_batch}x1x{size}x{size}",
    }
    folder = _TENSORRT_CACHE.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_fp16_enable": "1" if metadata.get("icestream_precision") == "fp16" else "0",
        **{f"trt_profile_{which}_shapes": shape for which, shape in shapes.items()},
    }
