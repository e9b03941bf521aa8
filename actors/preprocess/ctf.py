"""The CTF of a micrograph: fit, ice ratio, picture and values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.settings import PreprocessSettings
from models.fourier.spectra import centred_from_half
from models.optics.ctf import electron_wavelength_angstrom, evaluate_ctf
from models.optics.ctf_fit import CtfStatus, FittedCtf, Microscope, fit_ctf, profile_ctf
from models.optics.ctf_local import LocalDefocus, fit_local_defocus
from models.optics.ice import estimate_crystalline_ice, estimate_ice_ratio, first_maximum_angstrom
from stream.records.values import CtfFit, Optics
from stream.sinks.pictures import write_ctf_picture
from stream.store.files import replacing
from stream.store.layout import OutputLayout

_FIT_KEYS = (
    "defocus_u_angstrom",
    "defocus_v_angstrom",
    "astigmatism_angle_deg",
    "phase_shift_deg",
    "ctf_fit_angstrom",
    "defocus_sd_angstrom",
    "astigmatism_sd_angstrom",
    "thickness_angstrom",
    "defocus_gradient_angstrom_per_um",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CtfMeasurement:
    """What was measured on one micrograph's power spectrum; None = could not be determined."""

    fit: CtfFit
    ice_ratio: float | None
    crystalline_ice: float | None = None
    local: LocalDefocus | None = None

    def defocus_offsets_angstrom(self, centres_yx_px: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return what to add to the micrograph's defocus at these positions `(pick yx)`; 0 where it is flat."""
        if self.local is None:
            return np.zeros(len(centres_yx_px))
        return self.local.defocus_at(centres_yx_px[:, 0], centres_yx_px[:, 1])


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
        crystals = estimate_crystalline_ice(power, pixel)
        local = fit_local_defocus(image, pixel, microscope, fitted, settings.ctf_search)
    with clock.measure("write"):
        write_ctf_files(layout, name, power, pixel, microscope, fitted, ice_ratio, crystals, local)
    return CtfMeasurement(
        fit=to_record(fitted, local), ice_ratio=ice_ratio, crystalline_ice=crystals, local=local
    )


def make_microscope(optics: Optics) -> Microscope:
    """Return the optics in the mathematics' own record."""
    return Microscope(
        voltage_kv=optics.voltage_kv, cs_mm=optics.cs_mm, amplitude_contrast=optics.amplitude_contrast
    )


def to_record(fitted: FittedCtf, local: LocalDefocus | None = None) -> CtfFit:
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
        defocus_gradient_angstrom_per_um=None if local is None else local.gradient_angstrom_per_um,
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
    crystalline_ice: float | None,
    local: LocalDefocus | None = None,
) -> None:
    """Write ctf/NAME.png and ctf/NAME.json; without rings the file holds the status and no values."""
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
    write_ctf_picture(
        layout.ctf_picture(name),
        centred_from_half(power).cpu().numpy(),
        model.numpy(),
        k=profile.k,
        contrast=profile.contrast,
        ctf2=profile.ctf2,
        lines=_describe(fitted, local),
        fit_resolution_angstrom=fitted.fit_resolution_angstrom if fitted.is_reliable else None,
        pixel_size_angstrom=pixel,
    )
    document = {
        "status": fitted.status.value,
        **(describe_fit(to_record(fitted, local))),
        "significance": fitted.significance,
        "angle_sd_deg": fitted.angle_sd_deg if fitted.is_reliable else None,
        "phase_shift_sd_deg": fitted.phase_shift_sd_deg if fitted.is_reliable else None,
        "ice_ratio": ice_ratio,
        "crystalline_ice": crystalline_ice,
        "pixel_size_angstrom": pixel,
        "local_defocus": None if local is None or not local.is_significant else asdict(local),
    }
    with replacing(layout.ctf_values(name)) as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


def describe_fit(fit: CtfFit | None) -> dict[str, float | bool | None]:
    """Return the fit under the names of the command line's JSON; without rings (or a fit) the values are None."""
    judged = {
        "ctf_score": None if fit is None else fit.score,
        "ctf_confidence": None if fit is None else fit.confidence,
        "ctf_is_reliable": fit is not None and fit.is_reliable,
    }
    if fit is None or not fit.is_reliable:
        return {**dict.fromkeys(_FIT_KEYS), **judged}
    values = (
        fit.defocus_u_angstrom,
        fit.defocus_v_angstrom,
        fit.astigmatism_angle_deg,
        fit.phase_shift_deg,
        fit.fit_resolution_angstrom,
        fit.defocus_sd_angstrom,
        fit.astigmatism_sd_angstrom,
        fit.thickness_angstrom,
        fit.defocus_gradient_angstrom_per_um,
    )
    return {**dict(zip(_FIT_KEYS, values, strict=True)), **judged}


def _describe(fitted: FittedCtf, local: LocalDefocus | None) -> list[str]:
    """Return the lines of text in the picture's corner."""
    if fitted.status is CtfStatus.NO_RINGS:
        return ["no Thon rings found"]
    astigmatism = fitted.defocus_u_angstrom - fitted.defocus_v_angstrom
    lines = [
        f"defocus {fitted.defocus_mean_angstrom:.0f} ± {fitted.defocus_sd_angstrom:.0f} Å",
        f"astigmatism {astigmatism:.0f} ± {fitted.astigmatism_sd_angstrom:.0f} Å at {fitted.astigmatism_angle_deg:.0f}°",
        f"rings to {fitted.fit_resolution_angstrom:.1f} Å, score {fitted.score:.2f}",
    ]
    if fitted.status is CtfStatus.WEAK:
        lines.append("weak: values uncertain")
    if fitted.phase_shift_deg:
        lines.append(f"phase shift {fitted.phase_shift_deg:.0f} ± {fitted.phase_shift_sd_deg:.0f}°")
    if fitted.thickness_angstrom is not None:
        lines.append(f"ice {fitted.thickness_angstrom / 10.0:.0f} nm thick")
    if local is not None and local.is_significant:
        lines.append(f"defocus slope {local.gradient_angstrom_per_um:.0f} Å/µm")
    return lines
