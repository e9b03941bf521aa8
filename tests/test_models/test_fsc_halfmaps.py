"""Fourier shell correlation: identities, known signal-to-noise ratios, noise, and a published pair of half-maps."""

from __future__ import annotations

import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from models.reconstruction.fsc import (
    correct_by_random,
    find_crossing,
    fourier_shell_correlation,
    fsc_table,
    independent_fraction_of_mask,
    masked_fsc,
    randomise_phases,
    resolution_at,
    shell_index,
)
from models.reconstruction.masks import mask_from_map, spherical_mask

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))


def noise(size: int, seed: int) -> torch.Tensor:
    return torch.randn((size, size, size), generator=torch.Generator().manual_seed(seed))


def with_spectrum(field: torch.Tensor, amplitude_of_shell: torch.Tensor) -> torch.Tensor:
    size = field.shape[0]
    index = shell_index(size).clamp_max(size // 2)
    return torch.fft.irfftn(torch.fft.rfftn(field) * amplitude_of_shell[index], s=field.shape)


@pytest.mark.parametrize("size", [32, 33])
def test_a_map_correlates_perfectly_with_itself_and_its_negative_perfectly_against(size):
    a = noise(size, 1)
    assert fourier_shell_correlation(a, a).shape == (size // 2 + 1,)
    torch.testing.assert_close(
        fourier_shell_correlation(a, 3 * a), torch.ones(size // 2 + 1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        fourier_shell_correlation(a, -a), -torch.ones(size // 2 + 1), atol=1e-5, rtol=0
    )


def test_shells_agree_with_a_direct_sum_over_the_full_transform():
    a, b = noise(16, 2), noise(16, 3) + 0.3 * noise(16, 2)
    A, B = torch.fft.fftn(a), torch.fft.fftn(b)
    k = torch.fft.fftfreq(16) * 16
    radius = torch.round((k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2).sqrt())
    for shell in range(9):
        at = radius == shell
        power = A[at].abs().square().sum() * B[at].abs().square().sum()
        expected = (A[at] * B[at].conj()).real.sum() / power.sqrt()
        assert float(fourier_shell_correlation(a, b)[shell]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_two_noise_maps_have_no_resolution_masked_or_not(seed):
    a, b = noise(48, 10 + seed), noise(48, 100 + seed)
    fsc = fourier_shell_correlation(a, b)
    assert float(fsc[12:].abs().max()) < 0.1
    assert resolution_at(fsc, 0.143, 3.0, 48) is None
    mask = spherical_mask(48, 12, 5)
    curves = masked_fsc(a, b, mask, 3.0, generator=torch.Generator().manual_seed(seed))
    assert curves.resolution_angstrom is None
    assert not curves.is_at_nyquist


def test_a_mask_cut_from_the_noise_itself_never_makes_a_resolution():
    for seed in range(25):
        a, b = noise(32, 2 * seed), noise(32, 2 * seed + 1)
        mask = mask_from_map(a + b, 3.0)
        for rule in ("relion", "cryosparc"):
            curves = masked_fsc(a, b, mask, 3.0, rule=rule, generator=torch.Generator().manual_seed(seed))
            assert curves.resolution_angstrom is None


def test_half_maps_that_come_masked_already_are_judged_by_what_they_fill():
    ball = spherical_mask(32, 8, 3)
    for seed in range(25):
        a, b = ball * noise(32, 2 * seed), ball * noise(32, 2 * seed + 1)
        curves = masked_fsc(
            a, b, mask_from_map(a + b, 3.0), 3.0, generator=torch.Generator().manual_seed(seed)
        )
        assert curves.resolution_angstrom is None


def test_a_known_signal_to_noise_ratio_gives_its_fsc_and_its_resolution():
    size, shells = 64, torch.arange(33.0)
    ssnr = 20.0 * torch.exp(-shells / 4.0)
    signal = with_spectrum(noise(size, 1), ssnr.sqrt())
    fsc = fourier_shell_correlation(signal + noise(size, 2), signal + noise(size, 3))
    expected = ssnr / (1 + ssnr)
    assert float((fsc - expected)[5:].abs().max()) < 0.06
    shell = 4.0 * np.log(20.0 * (1 / 0.143 - 1))
    assert resolution_at(fsc, 0.143, 2.0, size) == pytest.approx(128.0 / shell, rel=0.05)


def test_the_crossing_is_interpolated_between_shells():
    fsc = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.9, 0.5, 0.1, 0.0, 0.0])
    assert resolution_at(fsc, 0.3, 2.0, 16) == pytest.approx(32.0 / 5.5)


def test_a_curve_that_never_falls_is_reported_at_nyquist_with_a_flag():
    crossing = find_crossing(torch.ones(17), 0.143, 2.0, 32)
    assert crossing.resolution_angstrom == pytest.approx(4.0)
    assert crossing.is_at_nyquist


def test_in_a_small_mask_the_correction_is_no_lottery() -> None:
    """Noise alone in a rod of 2 % of the box: one draw of phases correlates by 0.1, the curve that is used hardly does."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn((2, 40, 40, 40), generator=generator)
    axis = torch.arange(40.0) - 20
    is_rod = (axis[:, None, None].abs() < 14) & (axis[:, None].square() + axis.square() < 25.0)
    mask = is_rod.float()
    first, second = (masked_fsc(a, b, mask, 2.0, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    shells = slice(first.randomised_from_shell + 6, 20)
    single = [
        fourier_shell_correlation(*(randomise_phases(v, 2, generator) * mask for v in (a, b)))[shells]
        for _ in range(6)
    ]
    assert float(torch.stack(single).std(0).mean()) > 0.04
    assert float((first.random - second.random)[shells].abs().mean()) < 0.025
    assert bool((first.corrected <= first.masked + 1e-6).all())


def test_phase_randomisation_keeps_amplitudes_and_low_shells_and_kills_the_correlation_beyond():
    a = noise(32, 4)
    randomised = randomise_phases(a, 6, torch.Generator().manual_seed(0))
    index = shell_index(32)
    A, R = torch.fft.rfftn(a), torch.fft.rfftn(randomised)
    torch.testing.assert_close(R[index < 6], A[index < 6], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(R.abs(), A.abs(), atol=0.05, rtol=1e-3)
    fsc = fourier_shell_correlation(a, randomised)
    assert float(fsc[:6].min()) > 0.999
    assert float(fsc[8:].abs().max()) < 0.12


def test_correction_removes_what_a_tight_hard_mask_adds_to_noise():
    size = 64
    low = with_spectrum(noise(size, 1), torch.where(torch.arange(33) < 8, 30.0, 0.0))
    a, b = low + noise(size, 2), low + noise(size, 3)
    mask = (spherical_mask(size, 14, 0) * (1 + 0.5 * torch.sign(noise(size, 9)))).clamp(0, 1)
    curves = masked_fsc(a, b, mask, 2.0, generator=torch.Generator().manual_seed(1))
    assert curves.randomised_from_shell == 8
    assert float(curves.masked[12:].mean()) > 0.15
    assert abs(float(curves.corrected[12:].mean())) < 0.1
    torch.testing.assert_close(curves.corrected[:10], curves.masked[:10])


def test_correction_follows_the_published_formula():
    masked, random = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.1]), torch.tensor([1.0, 1.0, 0.9, 0.4, 0.2])
    corrected = correct_by_random(masked, random, 1)
    torch.testing.assert_close(corrected, torch.tensor([1.0, 0.9, 0.8, 0.5, -0.125]))


def test_the_mask_makes_coefficients_dependent_in_the_stated_share():
    assert independent_fraction_of_mask(torch.ones(8, 8, 8)) == pytest.approx(1.0)
    half = torch.ones(8, 8, 8)
    half[:4] = 0
    assert independent_fraction_of_mask(half) == pytest.approx(0.5)


def test_the_table_has_relions_columns_one_row_per_shell():
    a = noise(16, 1)
    curves = masked_fsc(a, a, torch.ones_like(a), 2.0, generator=torch.Generator().manual_seed(1))
    table = fsc_table(curves)
    assert {len(column) for column in table.values()} == {9}
    assert table["rlnAngstromResolution"][8] == pytest.approx(4.0)
    assert table["rlnFourierShellCorrelationMaskedMaps"][3] == pytest.approx(1.0, abs=1e-5)


def test_shapes_that_differ_are_refused_by_name():
    with pytest.raises(ValueError, match="cube"):
        fourier_shell_correlation(torch.zeros(4, 4, 6), torch.zeros(4, 4, 6))
    with pytest.raises(ValueError, match="equal"):
        fourier_shell_correlation(noise(8, 1), noise(10, 1))
    with pytest.raises(ValueError, match="mask"):
        masked_fsc(noise(8, 1), noise(8, 2), torch.ones(9, 9, 9), 1.0, generator=torch.Generator())


@pytest.mark.realdata
def test_the_published_crossing_of_a_public_pair_of_half_maps_is_found():
    paths = [DATA / f"maps/3D_density_map_h{h}.mrc.gz" for h in (1, 2)]
    if not all(path.exists() for path in paths):
        pytest.skip(f"needs {paths[0]}")
    halves = []
    for path in paths:
        with mrcfile.open(path) as file:
            halves.append(torch.from_numpy(np.array(file.data, dtype=np.float32)))
    fsc = fourier_shell_correlation(*halves)
    assert resolution_at(fsc, 0.143, 2.0, 100) == pytest.approx(9.8, abs=0.15)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["relion31_postprocess_job021", "relion31_postprocess_job030"])
def test_the_correction_reproduces_published_tables_of_relion_postprocess(name):
    path = DATA / f"reference_results/{name}.star"
    if not path.exists():
        pytest.skip(f"needs {path}")
    blocks = starfile.read(path, always_dict=True)

    def column(label: str) -> torch.Tensor:
        return torch.tensor(blocks["fsc"][label].to_numpy(float), dtype=torch.float32)

    unmasked = column("rlnFourierShellCorrelationUnmaskedMaps")
    start = next(s for s in range(1, len(unmasked)) if float(unmasked[s]) < 0.8)
    corrected = correct_by_random(
        column("rlnFourierShellCorrelationMaskedMaps"),
        column("rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"),
        start,
    )
    torch.testing.assert_close(corrected, column("rlnFourierShellCorrelationCorrected"), atol=2e-5, rtol=0)
    box, pixel = 2 * (len(unmasked) - 1), 0.5 / float(column("rlnResolution")[-1])
    # RELION reports the last shell above 0.143, we interpolate: at most one shell finer.
    published = float(blocks["general"]["rlnFinalResolution"])
    one_shell_finer = 1.0 / (1.0 / published + 1.0 / (box * pixel))
    found = resolution_at(corrected, 0.143, pixel, box)
    assert one_shell_finer <= found <= published * 1.0001
