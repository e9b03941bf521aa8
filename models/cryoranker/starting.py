"""The network that a fine-tuning starts from: a checkpoint, or the ranker that ships, read back from its ONNX file.

An exported ranker has its BatchNorms folded into the layers beside them and its weights as factors of products. Both are
undone: weights are found by the names of the biases they are added to, and each BatchNorm comes back as the identity (in a
convolutional stem with the convolution's bias). Once it has the mean and variance of the data in front of it (`settle_norms`), it
does the same in evaluation and nearly so in training, where it would else take the batch's scale away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from models.cryo_ief.config import VitConfig
from models.cryo_ief.encode import encode_grey
from models.cryo_ief.layouts import Layout, config_from_tensors, load_model
from models.cryo_ief.stem import ImageBatchNorm
from models.cryo_ief.vit import CryoVit
from models.cryoranker.serve import DEFAULT_MODEL
from models.weights import load_checkpoint
from models.workers import SharedBatchNorm

DEFAULT = "default"
"""Names the ranker that ships with icestream where a checkpoint is asked for."""
_PREFIX = "vit."


def is_exported(checkpoint: str) -> bool:
    """Return whether a start is an ONNX file, whose norms have to be settled on data."""
    return checkpoint == DEFAULT or checkpoint.endswith(".onnx")


def starting_network(checkpoint: str) -> CryoVit:
    """Return the network of a checkpoint, of an exported ranker, or of the shipped one (`DEFAULT`)."""
    if not is_exported(checkpoint):
        loaded = load_checkpoint(Path(checkpoint))
        return load_model(loaded.tensors, loaded.metadata.get("model")).model
    return network_from_onnx(DEFAULT_MODEL if checkpoint == DEFAULT else Path(checkpoint))


def network_from_onnx(path: Path) -> CryoVit:
    """Return the network of a float32 ONNX file of `icestream export`; raise ValueError for any other."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import numpy_helper

    try:
        exported = onnx.load(str(path))
    except (OSError, DecodeError) as error:
        msg = f"{path}: not a readable ONNX file ({error})"
        raise ValueError(msg) from error
    facts = {entry.key: entry.value for entry in exported.metadata_props}
    if facts.get("icestream_precision") != "fp32" or "icestream_layout" not in facts:
        found = facts.get("icestream_precision", "no metadata of icestream")
        msg = f"{path}: {found}, must be a float32 file of `icestream export`"
        raise ValueError(msg)
    constants = {i.name: numpy_helper.to_array(i) for i in exported.graph.initializer}
    tensors = _unpruned(_named(exported.graph, constants))
    layout = Layout(facts["icestream_layout"])
    read = config_from_tensors(tensors, layout)
    config = VitConfig.from_dict(
        read.to_dict()
        | {
            "n_heads": _n_heads(facts["icestream_architecture"]),
            "mean": float(facts["mean"]),
            "std": float(facts["std"]),
            "resize_mode": facts["resize_mode"],
        }
    )
    return load_model(_with_identity_norms(tensors, config), config.to_dict()).model


def settle_norms(model: CryoVit, grey: UInt8[NDArray[np.uint8], "n s s"]) -> None:
    """Give each BatchNorm the statistics of these images, and the weights with which it stays the map that it was."""
    norms = [module for module in model.modules() if isinstance(module, SharedBatchNorm)]
    sums = [[torch.zeros(norm.num_features, dtype=torch.float64) for _ in range(2)] for norm in norms]
    counts = [0] * len(norms)

    def watch(index: int) -> Any:  # noqa: ANN401 - a hook of torch's
        def add(_module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            values = given[0].movedim(1, -1) if isinstance(norms[index], ImageBatchNorm) else given[0]
            rows = values.reshape(-1, values.shape[-1]).double()
            counts[index] += len(rows)
            sums[index][0] += rows.sum(dim=0)
            sums[index][1] += rows.square().sum(dim=0)

        return add

    hooks = [norm.register_forward_pre_hook(watch(i)) for i, norm in enumerate(norms)]
    encode_grey(model, grey)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for norm, (first, second), n in zip(norms, sums, counts, strict=True):
            mean = first / n
            variance = (second / n - mean.square()).clamp_min(0.0)
            before = {name: value.double() for name, value in norm.state_dict().items()}
            scale = before["weight"] / torch.sqrt(before["running_var"] + norm.eps)
            state = {
                "running_mean": mean,
                "running_var": variance,
                "weight": scale * torch.sqrt(variance + norm.eps),
                "bias": before["bias"] + (mean - before["running_mean"]) * scale,
            }
            for name, value in state.items():
                getattr(norm, name).copy_(value)


def _named(graph: Any, constants: dict[str, NDArray[Any]]) -> dict[str, Tensor]:  # noqa: ANN401 - onnx has no types
    """Return the graph's constants by parameter name: a product's factor is the weight of the bias added to it."""
    found = {
        name.removeprefix(_PREFIX): torch.from_numpy(value.copy())
        for name, value in constants.items()
        if name.startswith(_PREFIX)
    }
    factors = {
        node.output[0]: constants[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for product, bias in (node.input, reversed(node.input)):
            if product in factors and bias.startswith(_PREFIX) and bias.endswith(".bias"):
                name = bias.removeprefix(_PREFIX).removesuffix("bias") + "weight"
                found[name] = torch.from_numpy(factors[product].T.copy())
    return found


def _unpruned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the last block's query, key and value as one layer again."""
    whole: dict[str, Tensor] = {}
    for name, value in tensors.items():
        block, is_query, kind = name.partition(".query.")
        if is_query:
            whole[f"{block}.attn.qkv.{kind}"] = torch.cat((value, tensors[f"{block}.key_value.{kind}"]))
        elif ".key_value." in name:
            continue
        elif ".proj." in name and ".attn." not in name and name.startswith("blocks."):
            whole[name.replace(".proj.", ".attn.proj.")] = value
        else:
            whole[name] = value
    return whole


def _with_identity_norms(tensors: dict[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
    norms: dict[str, Tensor] = {}
    for place, module in CryoVit(config).named_modules():
        if isinstance(module, SharedBatchNorm):
            norms |= {f"{place}.{name}": value for name, value in module.state_dict().items()}
            norms[f"{place}.running_var"] -= module.eps  # so that the square root is 1
    biases = {name: name.replace(".convolutions.", ".norms.") for name in tensors if _is_of_stem(name)}
    kept = {name: value for name, value in tensors.items() if name not in biases}
    return kept | norms | {norm: tensors[name] for name, norm in biases.items()}


def _is_of_stem(name: str) -> bool:
    return ".convolutions." in name and name.endswith(".bias")


def _n_heads(architecture: str) -> int:
    heads = next(part[1:] for part in architecture.split("-") if part[:1] == "h" and part[1:].isdigit())
    return int(heads)
