"""Features of an Inception v3 that the user brings, for the Fréchet distance as papers report it (Heusel et al. 2017).

The weights cannot be shipped. Two kinds of file are read, and neither runs code of its own:

- `.onnx`: any network with one image input and an output of 2048 values per image (the pooled layer); ONNX Runtime, on the CPU;
- `.safetensors`, `.pt`, `.pth`: the state dictionary of timm's `inception_v3`, read through `models.weights`.

TorchScript files are refused: they hold a program. Patches are grey; they become three equal channels in [-1, 1], resized
bilinearly to the network's input (299 px unless the ONNX file fixes another). Inceptions of different origin give different
distances, so a result names the file by its hash.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from models.cryo_ief.timm_door import load_timm
from models.cryogem.evaluation import Features
from models.cryoranker.providers import open_session
from models.weights import load_checkpoint, sha256_of_file

FEATURES = 2048
_SIDE_PX = 299
_UNUSED = ("AuxLogits.", "fc.")
_TORCH_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def inception_features(path: Path, *, batch_size: int = 16) -> Features:
    """Return the feature function of a user's Inception file; raise ValueError for one that is not."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, an Inception is a .onnx, .safetensors or .pt file")
    if path.suffix == ".onnx":
        return _onnx_features(path, batch_size)
    if path.suffix in _TORCH_SUFFIXES:
        return _timm_features(path, batch_size)
    raise ValueError(f"{path}: an Inception is a .onnx, .safetensors or .pt file")


def describe_inception(path: Path) -> str:
    """Return what a result says of the network it was measured with."""
    return f"inception {sha256_of_file(path)}"


def _onnx_features(path: Path, batch_size: int) -> Features:
    # the file's bytes are given, not its path: one that reaches for other files (external data) is refused
    session = open_session(path, path.read_bytes(), choice="cpu", n_threads=1, max_batch=batch_size).session
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[1] not in (1, 3):
        shapes = [i.shape for i in inputs]
        raise ValueError(f"{path}: inputs {shapes}, must be one of shape (batch, 1 or 3, height, width)")
    channels = int(inputs[0].shape[1])
    sides = [side if isinstance(side, int) else _SIDE_PX for side in inputs[0].shape[2:]]
    name, output = inputs[0].name, _pooled_output(path, session)
    fixed = inputs[0].shape[0]

    def run(batch: torch.Tensor) -> NDArray[np.floating]:
        rows = batch.expand(-1, channels, -1, -1).numpy()
        found = np.asarray(session.run([output], {name: rows})[0])
        return found.reshape(len(found), -1)

    return _batched(path, run, (sides[0], sides[1]), fixed if isinstance(fixed, int) else batch_size)


def _pooled_output(path: Path, session: Any) -> str:  # noqa: ANN401 - onnxruntime has no types
    for output in session.get_outputs():
        shape = output.shape
        if len(shape) in (2, 4) and shape[1] == FEATURES and all(s == 1 for s in shape[2:]):
            return str(output.name)
    shapes = [o.shape for o in session.get_outputs()]
    raise ValueError(f"{path}: outputs {shapes}, one must be (batch, {FEATURES}), the pooled layer")


def _timm_features(path: Path, batch_size: int) -> Features:
    if _is_torchscript(path):
        raise ValueError(f"{path}: a TorchScript program, must be weights alone; export it to ONNX")
    timm = load_timm()
    loaded = load_checkpoint(path)
    state = {key: value for key, value in loaded.tensors.items() if not key.startswith(_UNUSED)}
    network = timm.create_model("inception_v3", pretrained=False, num_classes=0)
    missing, unexpected = network.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{path}: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}, "
            "must be the state dictionary of timm's inception_v3"
        )
    network.eval()

    def run(batch: torch.Tensor) -> NDArray[np.floating]:
        with torch.inference_mode():
            return network(batch.expand(-1, 3, -1, -1)).numpy()

    return _batched(path, run, (_SIDE_PX, _SIDE_PX), batch_size)


def _is_torchscript(path: Path) -> bool:
    """Say whether a file is an archive that `torch.jit` wrote: it holds the program's constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _batched(
    path: Path,
    run: Callable[[torch.Tensor], NDArray[np.floating]],
    shape_yx: tuple[int, int],
    batch_size: int,
) -> Features:
    def compute(patches: NDArray[np.float32]) -> NDArray[np.floating]:
        parts = []
        for start in range(0, len(patches), batch_size):
            part = torch.from_numpy(np.ascontiguousarray(patches[start : start + batch_size]))[:, None]
            n = len(part)
            if n < batch_size:  # networks exported for one batch size take no other
                part = torch.cat((part, part[-1:].expand(batch_size - n, -1, -1, -1)))
            resized = functional.interpolate(
                part.clamp(-1.0, 1.0), size=shape_yx, mode="bilinear", align_corners=False, antialias=True
            )
            parts.append(run(resized)[:n])
        found = np.concatenate(parts).astype(np.float64)
        if found.shape[1] != FEATURES or not np.isfinite(found).all():
            raise ValueError(f"{path}: features {found.shape}, must be {FEATURES} finite values per image")
        return found

    return compute
