"""The CTF of a micrograph: fit, ice ratio, picture and values."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.settings import PreprocessSettings
from models.fourier.spectra import centred_from_half
from models.optics.ctf import electron_wavelength_angstrom, evaluate_ctf
from models.optics.ctf_fit import FittedCtf, Microscope, fit_ctf, profile_ctf
from models.optics.ice import estimate_ice_ratio, first_maximum_angstrom
from stream.records.values import CtfFit, Optics
from stream.sinks.pictures import write_ctf_picture
from stream.store.files import replacing
from stream.store.layout import OutputLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class CtfMeasurement:
    """What was measured on one micrograph's power spectrum; None = could not be determined."""

    fit: CtfFit
    ice_ratio: float | None
    crystalline_ice: float | None = None

    def defocus_offsets_angstrom(self, centres_yx_px: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return what to add to the micrograph's defocus at these positions `(pick yx)`."""
        return np.zeros(len(centres_yx_px))


def measure_ctf(
    image: Tensor,
    pixel: float,
    settings: PreprocessSettings,
    layout: OutputLayout,
    name: str,
    clock: StageClock,
) -> CtfMeasurement:
    """Fit the CTF of a micrograph and write its picture and values."""
    microscope = make_microscope(settings.optics)
    with clock.measure("ctf"):
        fitted, power = fit_ctf(image, pixel, microscope, settings.ctf_search)
        ice_ratio = judge_ice(power, pixel, microscope, fitted)
    with clock.measure("write"):
        write_ctf_files(layout, name, power, pixel, microscope, fitted, ice_ratio)
    return CtfMeasurement(fit=to_record(fitted), ice_ratio=ice_ratio)


def make_microscope(optics: Optics) -> Microscope:
    """Return the optics in the mathematics' own record."""
    return Microscope(
        voltage_kv=optics.voltage_kv, cs_mm=optics.cs_mm, amplitude_contrast=optics.amplitude_contrast
    )


def to_record(fitted: FittedCtf) -> CtfFit:
    """Return the fit as the record that travels."""
    return CtfFit(
        defocus_u_angstrom=fitted.defocus_u_angstrom,
        defocus_v_angstrom=fitted.defocus_v_angstrom,
        astigmatism_angle_deg=fitted.astigmatism_angle_deg,
        phase_shift_deg=fitted.phase_shift_deg,
        fit_resolution_angstrom=fitted.fit_resolution_angstrom,
        score=fitted.score,
        is_reliable=fitted.is_reliable,
        defocus_sd_angstrom=fitted.defocus_sd_angstrom,
        astigmatism_sd_angstrom=fitted.astigmatism_sd_angstrom,
        confidence=fitted.confidence,
        thickness_angstrom=fitted.thickness_angstrom,
    )


def judge_ice(power: Tensor, pixel: float, microscope: Microscope, fitted: FittedCtf) -> float | None:
    """Return the ice ratio against the fitted CTF's first maximum; None without rings."""
    if not fitted.is_reliable:
        return None
    mean = 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom)
    wavelength = electron_wavelength_angstrom(microscope.voltage_kv)
    return estimate_ice_ratio(
        power, pixel, first_maximum_angstrom(mean, wavelength, microscope.amplitude_contrast)
    )


def write_ctf_files(
    layout: OutputLayout,
    name: str,
    power: Tensor,
    pixel: float,
    microscope: Microscope,
    fitted: FittedCtf,
    ice_ratio: float | None,
) -> None:
    """Write ctf/NAME.png and ctf/NAME.json."""
    n = int(power.shape[0])
    k = torch.fft.fftshift(torch.fft.fftfreq(n, pixel))
    model = evaluate_ctf(
        k[:, None].expand(n, n),
        k[None, :].expand(n, n),
        defocus_u_angstrom=fitted.defocus_u_angstrom,
        defocus_v_angstrom=fitted.defocus_v_angstrom,
        astigmatism_angle_deg=fitted.astigmatism_angle_deg,
        voltage_kv=microscope.voltage_kv,
        cs_mm=microscope.cs_mm,
        amplitude_contrast=microscope.amplitude_contrast,
        phase_shift_deg=fitted.phase_shift_deg,
    ).square()
    profile = profile_ctf(power, pixel, microscope, fitted)
    rings = f"rings to {fitted.fit_resolution_angstrom:.1f} Å" if fitted.is_reliable else "no rings found"
    write_ctf_picture(
        layout.ctf_picture(name),
        centred_from_half(power).numpy(),
        model.numpy(),
        k=profile.k,
        contrast=profile.contrast,
        ctf2=profile.ctf2,
        lines=(
            f"defocus {fitted.defocus_u_angstrom:.0f} / {fitted.defocus_v_angstrom:.0f} Å",
            f"angle {fitted.astigmatism_angle_deg:.0f} deg, score {fitted.score:.2f}",
            rings,
        ),
        # half as far again as rings are seen, but no less than 8 Å and no more than Nyquist
        shown_fraction=min(1.0, 2.0 * pixel * 1.5 / min(fitted.fit_resolution_angstrom, 8.0)),
    )
    document = {
        **asdict(fitted),
        "status": fitted.status.value,
        "is_reliable": fitted.is_reliable,
        "ice_ratio": ice_ratio,
        "pixel_size_angstrom": pixel,
    }
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in document.items()}
    with replacing(layout.ctf_values(name)) as temporary:
        temporary.write_text(json.dumps(plain, indent=2) + "\n")
