"""What a finished run folder says about its views and its growth, for the record that the controller judges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stream.records.figures import GrowthFigures, RunFigures, TiltFigures, ViewFigures


def read_run_figures(folder: Path) -> RunFigures:
    """Read orientation.json and summary.json; what an engine did not write or could not determine is None."""
    orientation, summary = _read(folder / "orientation.json"), _read(folder / "summary.json")
    return RunFigures(views=_views(orientation), growth=_growth(summary.get("growth")))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _views(orientation: Mapping[str, Any]) -> ViewFigures | None:
    forecast = orientation.get("views")
    if forecast is None:
        return None
    rot, tilt = forecast["missing_rot_tilt_deg"] or (None, None)
    return ViewFigures(
        efficiency=orientation.get("view_efficiency"),
        missing_fraction=forecast["missing_fraction"],
        missing_rot_deg=rot,
        missing_tilt_deg=tilt,
        tilts=tuple(TiltFigures(**item) for item in forecast["tilts"]),
        recommended_tilt_deg=forecast["recommended_tilt_deg"],
    )


def _growth(growth: Mapping[str, Any] | None) -> GrowthFigures | None:
    if growth is None or not growth["points"]:
        return None
    last = growth["points"][-1]
    return GrowthFigures(
        n_particles=last["n_particles"],
        resolution_angstrom=last["resolution_angstrom"],
        slope_per_ln_n=growth["slope_per_ln_n"],
        slope_sd=growth["slope_sd"],
        ssnr_angstrom_at_2n=growth["predicted_angstrom_at_2n"]["ssnr"],
    )
