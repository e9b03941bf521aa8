"""What a run folder says about views and growth reaches the record that the controller judges."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from actors.engines.run_figures import read_run_figures
from actors.engines.run_folder import RunFolder, measure_orientation
from models.fourier.rotations import euler_to_matrix
from stream.records.figures import RunFigures


def blob(size_px: int) -> torch.Tensor:
    axis = torch.arange(size_px) - size_px // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.exp(-(x**2 + y**2 + 2 * z**2).float() / 20.0)


def test_the_views_of_a_run_are_written_and_read_back(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    noise = [0.2 * torch.randn(24, 24, 24, generator=draw) for _ in range(2)]
    angles = torch.rand(500, 3, generator=draw) * torch.tensor([360.0, 20.0, 360.0])
    diagnostics = measure_orientation(
        blob(24) + noise[0],
        blob(24) + noise[1],
        torch.ones(24, 24, 24),
        4.0,
        torch.eye(3)[None],
        euler_to_matrix(angles),
        RunFolder(tmp_path),
    )
    views = read_run_figures(tmp_path).views
    assert views is not None
    assert views.efficiency == pytest.approx(diagnostics.view_efficiency)
    assert [t.tilt_deg for t in views.tilts] == [0.0, 20.0, 30.0, 40.0]
    assert views.recommended_tilt_deg == 40.0
    assert views.missing_fraction > 0.7
    assert views.missing_tilt_deg is not None
    assert views.missing_tilt_deg > 75.0
    figures = RunFigures(views=views)
    assert msgspec.json.decode(msgspec.json.encode(figures), type=RunFigures) == figures


def test_growth_is_read_from_the_summary(tmp_path: Path) -> None:
    growth = {
        "points": [
            {"n_particles": 500.0, "resolution_angstrom": 9.0, "inverse_square_sd": 0.001, "n_unions": 8},
            {"n_particles": 4000.0, "resolution_angstrom": 7.5, "inverse_square_sd": 0.0, "n_unions": 1},
        ],
        "b_factor_angstrom2": 200.0,
        "slope_per_ln_n": 0.01,
        "slope_sd": 0.002,
        "predicted_angstrom_at_2n": {"line": 7.0, "ssnr": None},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"growth": growth}))
    found = read_run_figures(tmp_path).growth
    assert found is not None
    assert (found.n_particles, found.resolution_angstrom) == (4000.0, 7.5)
    assert (found.slope_per_ln_n, found.slope_sd, found.ssnr_angstrom_at_2n) == (0.01, 0.002, None)


def test_an_engine_that_wrote_neither_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"growth": None}))
    assert read_run_figures(tmp_path) == RunFigures()
