"""Exporting a Vision Transformer to ONNX: BatchNorm folded, last block pruned, two outputs, metadata inside, parity checked.

The graph takes `particles` `(b, 1, s, s)` float32, already preprocessed, and gives `feature` `(b, d)`, of length 1, and
(where the model has a ranking head) `score` `(b,)`. What the graph needs to be served is in its metadata. An export
whose scores leave torch's by more than the precision's tolerance is not written.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from models.cryo_ief.config import Head
from models.cryo_ief.exported_blocks import prune_last_block, refine_cls_token
from models.cryo_ief.stem import ConvolutionalStem
from models.cryo_ief.vit import CryoVit, TokenBatchNorm, unit_feature

Precision = Literal["fp32", "fp16", "int8"]

OPSET = 20
FORMAT = "icestream-ranker-1"
"""Metadata value by which a server knows the file."""
MAX_SCORE_DIFF = {"fp32": 1e-4, "fp16": 5e-3}
"""Largest allowed |score − torch's|; int8 is held to a rank correlation instead."""
MIN_INT8_SPEARMAN = 0.995
_PARITY_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written and how far it is from torch on the check images."""

    path: Path
    precision: Precision
    max_abs_score_diff: float
    min_feature_cosine: float
    score_spearman: float
    n_checked: int


class ExportedVit(nn.Module):
    """The network as it is exported: folded (int8: smoothed on particles), unit-length feature and, with a head, the score."""

    def __init__(self, model: CryoVit, *, smoothed_on: Float[Tensor, "b 1 s s"] | None = None) -> None:
        super().__init__()
        self.vit = fold_batch_norm(model) if smoothed_on is None else smooth_activations(model, smoothed_on)
        prune_last_block(self.vit.blocks)
        if smoothed_on is not None:
            refine_cls_token(self.vit.blocks)
        self.has_score = model.config.head is not Head.NONE

    def forward(self, particles: Tensor) -> tuple[Tensor, ...]:
        """Return (score, feature), or (feature,) for an encoder."""
        cls_token = self.vit.encode(particles.to(self.vit.cls_token.dtype)).float()
        feature = unit_feature(cls_token)
        return (self.vit.score(self.vit.head(cls_token)), feature) if self.has_score else (feature,)

    def half_encoder(self) -> ExportedVit:
        """Return a copy whose encoder is float16; head, softmax and the feature's length stay float32.

        (A v1.5 feature has length 500 and more: its square does not fit into float16.)
        """
        half = copy.deepcopy(self)
        half.vit.half()
        half.vit.head.float()
        return half


def fold_batch_norm(model: CryoVit) -> CryoVit:
    """Return a copy whose BatchNorms have gone into the MLPs' first layers: W·s and b + W·t (and a stem's into its convolutions).

    In evaluation BatchNorm is x·s + t with s = γ/√(σ² + ε) and t = β − μ·s per channel, so this is the same function.
    """
    folded = copy.deepcopy(model).eval()
    _fold_stem(folded)
    blocks: Any = folded.blocks  # timm's blocks have no types
    for block in blocks:
        norm, linear = block.norm2, block.mlp.fc1
        if not isinstance(norm, TokenBatchNorm):
            continue
        with torch.no_grad():
            state = {name: value.double() for name, value in norm.state_dict().items()}
            scale = state["weight"] / torch.sqrt(state["running_var"] + norm.eps)
            offset = state["bias"] - state["running_mean"] * scale
            weight = linear.weight.double()
            linear.bias.copy_(linear.bias.double() + weight @ offset)
            linear.weight.copy_(weight * scale)
        block.norm2 = nn.Identity()
    return folded


def _fold_stem(model: CryoVit) -> None:
    if isinstance(model.patch_embed, ConvolutionalStem):
        model.patch_embed = model.patch_embed.folded()


def export_onnx(
    model: CryoVit,
    path: Path,
    *,
    layout: str,
    source_sha256: str,
    precision: Precision = "fp32",
    check_particles: Float[Tensor, "b 1 s s"] | None = None,
    extra_metadata: dict[str, str] | None = None,
    min_int8_spearman: float = MIN_INT8_SPEARMAN,
) -> ExportReport:
    """Write `model` to `path` and return how well the file agrees with torch.

    `check_particles` are preprocessed images to compare on; without them, unit normal noise is used. Raises
    `ValueError` where agreement is worse than the precision's tolerance, and leaves no file then.
    """
    particles = _default_check(model, precision) if check_particles is None else check_particles
    calibration = particles[: max(1, len(particles) // 2)] if precision == "int8" else None
    exported = ExportedVit(model, smoothed_on=calibration).eval()
    metadata = {
        "icestream_format": FORMAT,
        "icestream_architecture": model.config.architecture,
        "icestream_layout": layout,
        "icestream_precision": precision,
        "input_size": str(model.config.input_size_px),
        "mean": repr(model.config.mean),
        "std": repr(model.config.std),
        "resize_mode": model.config.resize_mode,
        "source_sha256": source_sha256,
        **(extra_metadata or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / "model.onnx"
        _write_graph(exported.half_encoder() if precision == "fp16" else exported, temporary)
        if precision == "int8":
            _quantise(temporary)
        report = _compare(model, temporary, particles, precision)
        _check_tolerance(report, min_int8_spearman)
        metadata["parity"] = json.dumps(
            {
                "max_abs_score_diff": report.max_abs_score_diff,
                "min_feature_cosine": report.min_feature_cosine,
                "score_spearman": report.score_spearman,
                "n_checked": report.n_checked,
            }
        )
        _write_metadata(temporary, metadata)
        temporary.replace(path)
    return ExportReport(
        path=path,
        precision=precision,
        max_abs_score_diff=report.max_abs_score_diff,
        min_feature_cosine=report.min_feature_cosine,
        score_spearman=report.score_spearman,
        n_checked=report.n_checked,
    )


class ChannelAffine(nn.Module):
    """x·scale + offset per channel: what BatchNorm is in evaluation."""

    def __init__(self, scale: Float[Tensor, " c"], offset: Float[Tensor, " c"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(offset)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scale and shift every channel."""
        return tokens * self.weight + self.bias


def smooth_activations(model: CryoVit, particles: Float[Tensor, "b 1 s s"]) -> CryoVit:
    """Return the same function with channel ranges balanced between the norms and the weights behind them.

    Int8 products take one scale for all channels of their input, so a few wide channels cost the others their
    digits. Dividing channel j of a norm's output by √(max|x_j| / max|w_j|), and multiplying the weights by it,
    shares the range (SmoothQuant, Xiao et al. 2023, α = 0.5). The BatchNorms stay in front of the MLPs as affine
    maps, because folding them would give the products the raw residual stream. `particles` show the ranges.
    """
    smooth = copy.deepcopy(model).eval()
    _fold_stem(smooth)
    blocks: Any = smooth.blocks  # timm's blocks have no types
    for block in blocks:
        norm = block.norm2
        if isinstance(norm, TokenBatchNorm):
            state = norm.state_dict()
            scale = state["weight"] / torch.sqrt(state["running_var"] + norm.eps)
            block.norm2 = ChannelAffine(scale, state["bias"] - state["running_mean"] * scale)
    pairs = [(b.norm1, b.attn.qkv) for b in blocks] + [(b.norm2, b.mlp.fc1) for b in blocks]
    ranges: dict[int, Tensor] = {}

    def note_range(number: int, inputs: tuple[Tensor, ...]) -> None:
        widest = inputs[0].detach().abs().amax(dim=(0, 1))
        ranges[number] = torch.maximum(ranges.get(number, widest), widest)

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, number=number: note_range(number, inputs))
        for number, (_, linear) in enumerate(pairs)
    ]
    with torch.inference_mode():
        for batch in torch.split(particles, _PARITY_BATCH):
            smooth.encode(batch)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for number, (norm, linear) in enumerate(pairs):
            weight_range = linear.weight.abs().amax(dim=0).clamp(min=1e-6)
            ratio = (ranges[number].clone().clamp(min=1e-6) / weight_range).sqrt()
            norm.weight /= ratio
            norm.bias /= ratio
            linear.weight *= ratio
    return smooth


def _default_check(model: CryoVit, precision: Precision) -> Tensor:
    n = 256 if precision == "int8" and model.config.width < 384 else 4 * _PARITY_BATCH
    n = 8 if model.config.width > 384 else n
    size = model.config.input_size_px
    return torch.randn((n, 1, size, size), generator=torch.Generator().manual_seed(0))


def _write_graph(exported: ExportedVit, path: Path) -> None:
    size = exported.vit.config.input_size_px
    example = torch.zeros((2, 1, size, size))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            exported,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["particles"],
            output_names=["score", "feature"] if exported.has_score else ["feature"],
            dynamic_shapes={"particles": {0: torch.export.Dim("b", min=1, max=65536)}},
            verbose=False,
        )
    if program is None:
        msg = f"{path}: the exporter returned nothing"
        raise ValueError(msg)
    program.save(str(path), external_data=False)
    _tidy(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and version warnings out of the command's output.

    The quantiser warns on the root logger.
    """
    names = ("torch.onnx", "onnxscript", "onnx_ir", None)
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _tidy(path: Path) -> None:
    """Drop the intermediate shapes that the exporter writes: ORT's quantisation finds them contradictory.

    And transpose the weights that two products share, which the exporter leaves to run time: the quantiser, which takes
    constants alone, would pass both over.
    """
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    weights = {weight.name: weight for weight in model.graph.initializer}
    for node in [
        node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights
    ]:
        values = onnx.numpy_helper.to_array(weights[node.input[0]])
        order = next(attribute.ints for attribute in node.attribute if attribute.name == "perm")
        turned = np.ascontiguousarray(values.transpose(tuple(order)))
        model.graph.initializer.append(onnx.numpy_helper.from_array(turned, node.output[0]))
        model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input}
    for weight in [weight for weight in model.graph.initializer if weight.name not in used]:
        model.graph.initializer.remove(weight)
    onnx.save(model, path)


def _quantise(path: Path) -> None:
    """Replace weights by int8 (dynamic quantisation, per channel) in matrix products; the patch embedding stays."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            path, path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    _tidy(path)


def _write_metadata(path: Path, metadata: dict[str, str]) -> None:
    import onnx

    graph = onnx.load(path)
    # The exporter notes every node's stack, with the exporting machine's paths.
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output):
        del part.metadata_props[:]
    onnx.helper.set_model_props(graph, metadata)
    graph.doc_string = ""
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


def _compare(model: CryoVit, path: Path, particles: Tensor, precision: Precision) -> ExportReport:
    """Compare the file with the network as it was given, in evaluation."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        outputs = [model(batch) for batch in torch.split(particles, _PARITY_BATCH)]
        cls_token, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        feature = unit_feature(cls_token).numpy()
        score = model.score(logits).numpy() if model.config.head is not Head.NONE else None
    model.train(was_training)
    found = _run(path, particles.numpy(), one_by_one=precision == "int8")
    cosine = (feature.astype(np.float64) * found[-1]).sum(axis=1)
    diff, spearman = 0.0, 1.0
    if score is not None:
        diff = float(np.abs(score - found[0]).max())
        spearman = float(stats.spearmanr(score, found[0]).statistic) if len(particles) > 2 else 1.0
    return ExportReport(
        path=path,
        precision=precision,
        max_abs_score_diff=diff,
        min_feature_cosine=float(cosine.min()),
        score_spearman=spearman,
        n_checked=len(particles),
    )


def _run(path: Path, particles: NDArray[np.float32], *, one_by_one: bool) -> list[NDArray[np.float32]]:
    """Run the file as a server would: int8 one image at a time, everything else in batches."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # An uneven last batch shows that the batch axis is dynamic.
    step = 1 if one_by_one else _PARITY_BATCH + 1
    if one_by_one:
        session.run(None, {"particles": particles[:2]})
    parts: list[Any] = [
        session.run(None, {"particles": particles[i : i + step]}) for i in range(0, len(particles), step)
    ]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _check_tolerance(report: ExportReport, min_int8_spearman: float) -> None:
    if report.precision == "int8":
        if not report.score_spearman >= min_int8_spearman:
            msg = (
                f"export: rank correlation with torch {report.score_spearman:.4f} at int8,"
                f" at least {min_int8_spearman} is required"
            )
            raise ValueError(msg)
        return
    limit = MAX_SCORE_DIFF[report.precision]
    if not report.max_abs_score_diff <= limit or not report.min_feature_cosine >= 1.0 - limit:
        msg = (
            f"export: scores differ from torch by {report.max_abs_score_diff:.2e}, feature cosine"
            f" {report.min_feature_cosine:.6f} at {report.precision}, at most {limit:.0e} is allowed"
        )
        raise ValueError(msg)
