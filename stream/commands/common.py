"""What every command shares: JSON on stdout, everything else on stderr, exit codes 0 / 1 / 2."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
PixelSize = Annotated[float, typer.Option("--pixel-size-angstrom", help="Pixel size in Å.")]

console = Console(stderr=True)
"""Progress and words for people go to stderr; stdout is for results."""


def print_json(document: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one JSON document; NaN and infinities, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_plain(document), indent=2) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON values have no narrower type
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
