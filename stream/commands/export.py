"""`icestream export`: a checkpoint becomes an ONNX file that the service can score with, parity checked."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from models.cryo_ief.config import ResizeMode, VitConfig

_CHECK_PHANTOM = "phantom:900001:mass_kda=90:symmetry=C1"
"""Images to compare on come from this small phantom, which no training set contains."""
_CHECK_SEED = 20_240


class ExportPrecision(StrEnum):
    """Arithmetic of the exported graph."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command("export")
    def export(
        checkpoint: Annotated[Path, typer.Argument(help="A .safetensors or torch checkpoint.")],
        onnx: Annotated[Path, typer.Option("--onnx", help="File to write.")],
        precision: Annotated[ExportPrecision, typer.Option(help="Arithmetic.")] = ExportPrecision.FP32,
        resize: Annotated[
            str | None, typer.Option(help="hartley or bicubic, instead of what the checkpoint says.")
        ] = None,
        expected_sha256: Annotated[str | None, typer.Option(help="Refuse a file with another hash.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Convert a CryoRanker or Cryo-IEF checkpoint to ONNX and check that it gives the same scores.

        The layout (CryoRanker v1, v1.5, Cryo-IEF) is read from the keys. The authors' released weights are for academic
        use only; icestream ships none of them.

        Example: icestream export cryo_ranker_v1.5_vit_b_model.safetensors --onnx ranker.onnx --precision int8
        """
        result = export_checkpoint(
            checkpoint, onnx, precision=precision, resize=resize, expected_sha256=expected_sha256
        )
        if as_json:
            print_json(result)
        else:
            console.print(
                f"{onnx}: {result['layout']}, {result['architecture']}, {precision.value};"
                f" scores agree with torch to {result['max_abs_score_diff']:.1e}"
            )


def export_checkpoint(
    checkpoint: Path,
    onnx: Path,
    *,
    precision: ExportPrecision = ExportPrecision.FP32,
    resize: str | None = None,
    expected_sha256: str | None = None,
) -> dict[str, Any]:
    """Export a checkpoint and return the command's JSON document."""
    from dataclasses import replace

    from models.cryo_ief.config import Head
    from models.cryo_ief.export import export_onnx
    from models.cryo_ief.layouts import load_model
    from models.weights import load_checkpoint, sha256_of_file

    if resize not in (None, "hartley", "bicubic"):
        raise InputError("--resize", "must be hartley or bicubic", resize)
    try:
        loaded = load_checkpoint(checkpoint, expected_sha256=expected_sha256)
        found = load_model(loaded.tensors, loaded.metadata.get("model"))
        model = found.model
        if resize is not None:
            model.config = replace(model.config, resize_mode=cast("ResizeMode", resize))
        # Int8 is held to a rank correlation, which few images say little about; a wide network takes its time.
        n_small, n_wide = (256, 48) if precision is ExportPrecision.INT8 else (48, 16)
        check = check_particles(model.config, n=n_small if model.config.width < 384 else n_wide)
        report = export_onnx(
            model,
            onnx,
            layout=found.layout.value,
            source_sha256=loaded.sha256,
            precision=precision.value,
            check_particles=check,
        )
    except ValueError as error:
        raise InputError(checkpoint, "a checkpoint that can be exported", error) from error
    return {
        "layout": found.layout.value,
        "sha256": sha256_of_file(onnx),
        "max_abs_score_diff": report.max_abs_score_diff if model.config.head is not Head.NONE else None,
        "score_spearman": report.score_spearman if model.config.head is not Head.NONE else None,
        "min_feature_cosine": report.min_feature_cosine,
        "n_checked": report.n_checked,
        "architecture": model.config.architecture,
        "precision": precision.value,
        "source_sha256": loaded.sha256,
        "onnx": onnx,
    }


def check_particles(config: VitConfig, *, n: int) -> Tensor:
    """Return `n` simulated particles and junk boxes, preprocessed for a model."""
    import torch

    from models.cryo_ief.preprocess import normalise_grey_levels
    from models.cryoranker.dataset import SimulatedSet, simulate_set

    spec = SimulatedSet(
        structures=(_CHECK_PHANTOM,),
        seed=_CHECK_SEED,
        fields_per_structure=max(3, n // 8),
        input_size_px=config.input_size_px,
        resize_mode=config.resize_mode,
        n_views=32,
        n_fragments=6,
    )
    grey = simulate_set(spec).grey[:n]
    return torch.from_numpy(normalise_grey_levels(grey, config.mean, config.std))
