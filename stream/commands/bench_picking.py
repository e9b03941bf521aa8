"""Benchmark of picking: blobs and templates on simulated micrographs of known truth, blobs on expert picks."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from torch import Tensor

    from models.picking.maxima import Picks
    from models.picking.template import MapTemplates
    from models.simulation.exposure import ExposureTruth

_PIXEL_ANGSTROM = 2.0
_STRUCTURE = "phantom:3:mass_kda=300"
_APOFERRITIN_DIAMETER_ANGSTROM = 125.0
# Picks below this calibrated score are not ranked: there is one on every sixth particle-sized area of noise.
_LOWEST_SCORE = 1.0

FloatArray = NDArray[np.floating]


def run_picking_benchmark(
    *,
    n_micrographs: int = 4,
    snrs: tuple[float, ...] = (0.005, 0.02, 0.05, 0.1),
    seed: int = 5,
) -> list[dict[str, Any]]:
    """Return a row per signal-to-noise ratio, one for noise alone, and one for expert picks where the data are.

    The SNR is the variance of the particles' image inside their circles over that of the white noise, at 2 Å a
    pixel. Templates are projections of the true map at 20 Å or worse; the baseline is the blob picker on the
    same micrographs. `value` is the area under the precision-recall curve of the templates.
    """
    from models.picking.matching import is_away_from_border

    exposures, templates, diameter = _simulate(n_micrographs, seed)
    figures = []
    for snr in (*snrs, 0.0):
        rows: dict[str, list[tuple[FloatArray, NDArray[np.bool_]]]] = {"blob": [], "template": []}
        seconds = {"blob": 0.0, "template": 0.0}
        n_true, areas = 0, 0.0
        for number, (clean, signal_variance, truth) in enumerate(exposures):
            image = _add_noise(clean, signal_variance, snr, 100 * seed + number)
            centres = truth.coordinates_yx_px if snr > 0.0 else np.zeros((0, 2))
            shape = (int(image.shape[0]), int(image.shape[1]))
            inside = is_away_from_border(centres, shape, 0.5 * diameter / _PIXEL_ANGSTROM)
            n_true += int(inside.sum())
            areas += image.numel() * (_PIXEL_ANGSTROM / diameter) ** 2
            for picker, judged in rows.items():
                started = time.process_time()
                picks = _pick(picker, image, templates, truth, diameter)
                seconds[picker] += time.process_time() - started
                judged.append(_judge(picks, centres, inside, diameter))
        if snr > 0.0:
            figures.append(_figure(snr, rows, n_true, seconds, n_micrographs))
        else:
            figures.append(_noise_figure(rows, areas))
    apoferritin = _expert_figure()
    return [*figures, apoferritin] if apoferritin else figures


def _simulate(
    n_micrographs: int, seed: int
) -> tuple[list[tuple[Tensor, float, ExposureTruth]], MapTemplates, float]:
    from models.picking.template import make_templates
    from models.simulation.session import build_microscope
    from models.simulation.settings import MicroscopeSettings, SessionSettings, SpecimenSettings

    settings = SessionSettings(
        specimen=SpecimenSettings(particles_per_exposure=60.0, junk_fraction=0.0, ice_gradient=0.1),
        microscope=MicroscopeSettings(
            shape_yx_px=(1024, 1024),
            pixel_size_angstrom=_PIXEL_ANGSTROM,
            dose_e_per_angstrom2=10.0,
            n_frames=1,
            motion_angstrom=0.0,
            local_motion_angstrom=0.0,
        ),
        seed=seed,
    )
    microscope = build_microscope(_STRUCTURE, settings)
    diameter = microscope.diameter_angstrom
    exposures = []
    for index in range(n_micrographs):
        exposure = microscope.expose(index)
        clean = exposure.expected_frame(0)
        is_particle = _circles(exposure.truth.coordinates_yx_px, clean.shape, 0.5 * diameter)
        variance = float(clean[is_particle].var()) - float(clean[~is_particle].var())
        exposures.append((clean, variance, exposure.truth))
    templates = make_templates(microscope.truth_volume, _PIXEL_ANGSTROM, diameter_angstrom=diameter)
    return exposures, templates, diameter


def _circles(centres: FloatArray, shape: tuple[int, ...], radius_angstrom: float) -> NDArray[np.bool_]:
    from scipy import ndimage

    grid = np.ones(shape, dtype=bool)
    rows = np.rint(centres).astype(int)
    grid[rows[:, 0], rows[:, 1]] = False
    return np.asarray(ndimage.distance_transform_edt(grid) <= radius_angstrom / _PIXEL_ANGSTROM)


def _add_noise(clean: Tensor, signal_variance: float, snr: float, seed: int) -> Tensor:
    """Return the micrograph at this SNR; at 0 there is noise alone."""
    import torch

    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return clean + noise * (signal_variance / snr) ** 0.5 if snr > 0.0 else noise


def _pick(
    picker: str, image: Tensor, templates: MapTemplates, truth: ExposureTruth, diameter: float
) -> Picks:
    from models.optics.ctf import evaluate_ctf
    from models.picking.blob import BlobSettings, pick_blobs
    from models.picking.template import TemplatePickSettings, pick_templates

    if picker == "blob":
        # a blob's diameter is that of a ball of the same projected area, below the greatest extent
        blobs = BlobSettings(
            min_diameter_angstrom=0.6 * diameter,
            max_diameter_angstrom=0.9 * diameter,
            min_distance_angstrom=0.7 * diameter,
            border_angstrom=0.5 * diameter,
            threshold=_LOWEST_SCORE,
        )
        return pick_blobs(image, _PIXEL_ANGSTROM, blobs)
    ctf = partial(
        evaluate_ctf,
        defocus_u_angstrom=truth.ctf.defocus_u_angstrom,
        defocus_v_angstrom=truth.ctf.defocus_v_angstrom,
        astigmatism_angle_deg=truth.ctf.astigmatism_angle_deg,
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    settings = TemplatePickSettings(
        min_distance_angstrom=0.7 * diameter, border_angstrom=0.5 * diameter, threshold=_LOWEST_SCORE
    )
    return pick_templates(image, _PIXEL_ANGSTROM, templates, ctf, settings)


def _judge(
    picks: Picks, centres: FloatArray, is_counted: NDArray[np.bool_], diameter: float
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return scores and which picks are right; picks of particles near the border are left out."""
    from models.picking.matching import TOLERANCE_DIAMETERS, judge_picks

    tolerance = TOLERANCE_DIAMETERS * diameter / _PIXEL_ANGSTROM
    judged = judge_picks(picks.centres_yx_px, picks.scores, centres, is_counted, tolerance_px=tolerance)
    return judged.scores, judged.is_right


def f1_score(n_right: int, n_picks: int, n_true: int) -> float:
    """Return the harmonic mean of precision and recall."""
    return 2.0 * n_right / max(n_picks + n_true, 1)


def _figure(
    snr: float,
    rows: dict[str, list[tuple[FloatArray, NDArray[np.bool_]]]],
    n_true: int,
    seconds: dict[str, float],
    n_micrographs: int,
) -> dict[str, Any]:
    from models.picking.blob import DEFAULT_THRESHOLD
    from models.picking.matching import average_precision

    found: dict[str, Any] = {}
    for picker, parts in rows.items():
        scores = np.concatenate([part[0] for part in parts])
        is_right = np.concatenate([part[1] for part in parts])
        kept = scores >= DEFAULT_THRESHOLD
        n_right = int(is_right[kept].sum())
        found[f"{picker}_auprc"] = average_precision(scores, is_right, n_true)
        found[f"{picker}_f1"] = f1_score(n_right, int(kept.sum()), n_true)
        found[f"{picker}_precision"] = n_right / max(int(kept.sum()), 1)
        found[f"{picker}_recall"] = n_right / max(n_true, 1)
        found[f"{picker}_cpu_s"] = seconds[picker] / n_micrographs
    return {
        "name": f"picking SNR {snr:g}",
        "value": found["template_auprc"],
        "unit": "AUPRC (templates)",
        "baseline": "blobs on the same micrographs",
        "ratio": found["template_auprc"] / max(found["blob_auprc"], 1e-9),
        "n_particles": n_true,
        **found,
    }


def _noise_figure(
    rows: dict[str, list[tuple[FloatArray, NDArray[np.bool_]]]], areas: float
) -> dict[str, Any]:
    from scipy.stats import norm

    counts = {picker: np.concatenate([part[0] for part in parts]) for picker, parts in rows.items()}
    expected = areas * float(norm.sf(2.0))
    return {
        "name": "picking noise alone",
        "value": float((counts["template"] >= 2.0).sum()),
        "unit": "template picks above 2",
        "baseline": f"{expected:.1f} expected",
        "ratio": float((counts["template"] >= 2.0).sum()) / expected,
        **{
            f"{picker}_above_{z}": int((scores >= z).sum())
            for picker, scores in counts.items()
            for z in (2, 3, 4)
        },
        "expected_above_3": areas * float(norm.sf(3.0)),
    }


def _expert_figure() -> dict[str, Any] | None:
    """Return F1 on the expert picks of EMPIAR-10146, or None where ICESTREAM_TEST_DATA does not lead to them."""
    folder = Path(os.environ.get("ICESTREAM_TEST_DATA", "")) / "micrographs" / "apoferritin_empiar10146"
    if not folder.is_dir():
        return None
    import torch
    from PIL import Image

    from models.picking.blob import BlobSettings, pick_blobs
    from models.picking.matching import TOLERANCE_DIAMETERS

    image = np.asarray(Image.open(folder / "May08_03.05.02.bin_avg.png"), dtype=np.float32)
    table = np.loadtxt(folder / "May08_03.05.02_GT_coords.csv", delimiter=",", skiprows=1)
    truth, pixel, diameter = table[:, [1, 0]], 1.5, _APOFERRITIN_DIAMETER_ANGSTROM
    settings = BlobSettings(
        min_diameter_angstrom=0.85 * diameter,
        max_diameter_angstrom=1.15 * diameter,
        border_angstrom=0.5 * diameter,
    )
    picks = pick_blobs(torch.from_numpy(image), pixel, settings)
    tolerance = TOLERANCE_DIAMETERS * diameter / pixel
    distance = np.linalg.norm(picks.centres_yx_px[:, None] - truth[None], axis=-1)
    rows, columns = linear_sum_assignment(np.where(distance <= tolerance, distance, 1e6))
    n_right = int((distance[rows, columns] <= tolerance).sum())
    return {
        "name": "picking apoferritin (expert picks)",
        "value": f1_score(n_right, len(picks.scores), len(truth)),
        "unit": "F1 (blobs)",
        "baseline": "0.85, the least that is accepted",
        "ratio": f1_score(n_right, len(picks.scores), len(truth)) / 0.85,
        "precision": n_right / len(picks.scores),
        "recall": n_right / len(truth),
        "masked_fraction": picks.excluded_fraction,
    }
