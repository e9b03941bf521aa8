"""Local resolution: regions of known resolution, flat maps, noise, RELION beside it, bad input."""

from __future__ import annotations

import shutil
import subprocess

import mrcfile
import pytest
import torch

from models.reconstruction.local_resolution import local_resolution
from models.reconstruction.masks import spherical_mask
from models.reconstruction.volume_io import write_volume

SIZE, PIXEL = 64, 2.5


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut(volume: torch.Tensor, resolution_angstrom: float) -> torch.Tensor:
    """A sharp low-pass."""
    full, half = torch.fft.fftfreq(SIZE, PIXEL), torch.fft.rfftfreq(SIZE, PIXEL)
    k2 = full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2
    return torch.fft.irfftn(torch.fft.rfftn(volume) * (k2 <= resolution_angstrom**-2), s=volume.shape)


def pair(left_angstrom: float, right_angstrom: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-maps with common signal to one resolution at x < 0, to another at x > 0, and white noise everywhere (FSC 0.8)."""
    field = torch.randn((SIZE,) * 3, generator=gen(1))
    x = (torch.arange(SIZE) - SIZE // 2).float()
    right = torch.sigmoid(x)[None, None, :]
    signal = cut(field, left_angstrom) * (1 - right) + cut(field, right_angstrom) * right
    return tuple(signal + 0.5 * torch.randn((SIZE,) * 3, generator=gen(h)) for h in (2, 3))


def sides(volume: torch.Tensor) -> tuple[float, float]:
    inner = slice(SIZE // 2 - 14, SIZE // 2 + 14)
    left = volume[inner, inner, SIZE // 2 - 20 : SIZE // 2 - 10]
    right = volume[inner, inner, SIZE // 2 + 10 : SIZE // 2 + 20]
    return float(left.median()), float(right.median())


def test_two_regions_have_their_own_resolution():
    mask = spherical_mask(SIZE, 28, 3)
    found = local_resolution(*pair(14.0, 8.0), mask, PIXEL)
    left, right = sides(found.volume)
    assert left == pytest.approx(14.0, rel=0.1)
    assert right == pytest.approx(8.0, rel=0.1)
    quantiles = found.quantiles()
    assert quantiles["p10"] < quantiles["median"] < quantiles["p90"]
    assert float(found.volume[0, 0, 0]) == pytest.approx(found.outside_angstrom)


def test_a_uniform_map_has_one_resolution_everywhere():
    found = local_resolution(*pair(10.0, 10.0), spherical_mask(SIZE, 26, 3), PIXEL)
    values = found.volume[found.is_inside]
    assert float(values.median()) == pytest.approx(10.0, rel=0.08)
    assert float(torch.quantile(values, 0.9) - torch.quantile(values, 0.1)) < 1.5


def test_identical_maps_reach_nyquist_and_noise_reaches_nothing():
    a, b = (torch.randn((SIZE,) * 3, generator=gen(s)) for s in (4, 5))
    mask = spherical_mask(SIZE, 24, 3)
    same = local_resolution(a, a, mask, PIXEL)
    assert float(same.volume[same.is_inside].max()) == pytest.approx(2 * PIXEL, rel=0.01)
    noise = local_resolution(a, b, mask, PIXEL)
    assert float(noise.volume[noise.is_inside].median()) > 30.0


def test_maps_of_other_shapes_and_empty_masks_are_refused():
    a = torch.zeros((16,) * 3)
    with pytest.raises(ValueError, match="equal cubes"):
        local_resolution(a, a[:8], a, PIXEL)
    with pytest.raises(ValueError, match="mask"):
        local_resolution(a, a, a, PIXEL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="RELION is not installed")
def test_regions_agree_with_relions_local_resolution(tmp_path):
    """RELION's threshold is 0.143 and its window harder; on a signal that ends sharply both find its end."""
    halves = pair(14.0, 8.0)
    for h, half in enumerate(halves, start=1):
        write_volume(tmp_path / f"half{h}_class001_unfil.mrc", half, PIXEL)
    subprocess.run(
        ["relion_postprocess", "--i", "half1_class001_unfil.mrc", "--locres", "--angpix", str(PIXEL),
         "--locres_sampling", "20", "--locres_randomize_at", "25", "--adhoc_bfac", "-1", "--o", "loc"],
        cwd=tmp_path, check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    with mrcfile.open(tmp_path / "loc_locres.mrc") as handle:
        theirs = sides(torch.from_numpy(handle.data.copy()))
    ours = sides(local_resolution(*halves, spherical_mask(SIZE, 28, 3), PIXEL).volume)
    assert ours[0] == pytest.approx(theirs[0], rel=0.15)
    assert ours[1] == pytest.approx(theirs[1], rel=0.15)
