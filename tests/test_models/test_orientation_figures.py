"""Pictures: they are written, of the asked size and content, also for maps that show nothing."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from models.reconstruction.figures import (
    save_fsc_picture,
    save_map_picture,
    save_orientation_picture,
    view_histogram,
)
from models.reconstruction.fsc import masked_fsc
from models.reconstruction.grids import random_rotations
from models.reconstruction.masks import gaussian_lowpass, spherical_mask
from models.reconstruction.orientation import orientation_diagnostics
from models.reconstruction.orientation_page import write_orientation_page


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def halves() -> tuple[torch.Tensor, torch.Tensor]:
    ball = spherical_mask(32, 9, 3)
    molecule = 8 * ball * gaussian_lowpass(torch.randn(32, 32, 32, generator=gen()), 2.0, 6.0)
    return tuple(molecule + 0.3 * torch.randn(32, 32, 32, generator=gen(h)) for h in (1, 2))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_a_map_shows_its_density_white_where_it_is(tmp_path):
    volume = torch.zeros(32, 32, 32)
    volume[16, 24, 8] = 1.0
    volume = gaussian_lowpass(volume, 1.0, 6.0)
    save_map_picture(volume, tmp_path / "a.png", pixel_size_angstrom=2.0, title="one atom")
    save_map_picture(volume.flip(1), tmp_path / "b.png", pixel_size_angstrom=2.0, title="one atom")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.shape == b.shape
    assert a.shape[1] > 600
    # y runs upwards in the first column, so that the atom is above the middle in `a` and below it in `b`.
    rows = slice(0, a.shape[0] // 2), slice(0, a.shape[1] // 3)
    assert np.abs(a[rows] - b[rows]).max() > 100


def test_fsc_and_orientation_pictures_are_written_with_and_without_poses(tmp_path, halves):
    mask = spherical_mask(32, 11, 3)
    curves = masked_fsc(*halves, mask, 2.0, generator=gen())
    save_fsc_picture(curves, tmp_path / "deep" / "fsc.png", title="ball")
    views = random_rotations(200, gen())
    for name, rotations in (("without", None), ("with", views)):
        diagnostics = orientation_diagnostics(
            *halves, mask, 2.0, generator=gen(), rotations=rotations, n_null=1
        )
        save_orientation_picture(diagnostics, tmp_path / f"{name}.png")
    assert pixels(tmp_path / "deep" / "fsc.png").std() > 10
    assert np.abs(pixels(tmp_path / "with.png") - pixels(tmp_path / "without.png")).max() > 100


def test_noise_is_drawn_and_called_no_resolution(tmp_path):
    a, b = (torch.randn(24, 24, 24, generator=gen(s)) for s in (1, 2))
    curves = masked_fsc(a, b, torch.ones_like(a), 2.0, generator=gen())
    assert curves.resolution_angstrom is None
    save_fsc_picture(curves, tmp_path / "fsc.png")
    save_orientation_picture(
        orientation_diagnostics(a, b, None, 2.0, generator=gen(), n_null=0), tmp_path / "o.png"
    )
    assert (tmp_path / "o.png").stat().st_size > 10_000


def test_the_view_histogram_counts_every_view_in_the_bin_that_holds_it():
    directions, counts = view_histogram(torch.tensor([[0.0, 0.0, 1.0]] * 3 + [[1.0, 0.0, 0.0]]))
    assert counts.sum() == 4
    assert int(counts.max()) == 3
    assert float(directions[int(counts.argmax()), 2]) > 0.98


def test_the_page_needs_nothing_from_outside_and_holds_every_directions_curve(tmp_path, halves):
    mask = spherical_mask(32, 11, 3)
    views = random_rotations(300, gen())
    diagnostics = orientation_diagnostics(*halves, mask, 2.0, generator=gen(), rotations=views, n_null=1)
    write_orientation_page(diagnostics, tmp_path / "a" / "o.html", title="<b> & co", resolution_angstrom=7.1)
    page = (tmp_path / "a" / "o.html").read_text()
    assert "&lt;b&gt; &amp; co" in page
    assert not re.search(r"""(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import""", page)
    assert f"{diagnostics.cfar:.3f}" in page
    assert f"{diagnostics.sphericity:.3f}" in page
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found.group(1))
    cfsc = np.frombuffer(base64.b64decode(data["cfsc"]), dtype=np.int8).reshape(1536, data["shells"])
    direction = 700
    expected = diagnostics.cfsc[direction].numpy()
    shown = np.where(cfsc[direction] == -128, np.nan, cfsc[direction] / 100)
    np.testing.assert_allclose(shown, expected, atol=0.0051)
    assert sum(data["views"]) == 300
    assert len(data["directions"]) == 3 * 1536


def test_a_page_without_poses_or_resolution_says_so(tmp_path):
    a, b = (torch.randn(24, 24, 24, generator=gen(s)) for s in (1, 2))
    diagnostics = orientation_diagnostics(a, b, None, 2.0, generator=gen(), n_null=0)
    write_orientation_page(diagnostics, tmp_path / "o.html")
    page = (tmp_path / "o.html").read_text()
    assert "<td>none</td>" in page
    assert "SCF*" not in page
    assert "NaN" not in page.split("<script>")[0]
