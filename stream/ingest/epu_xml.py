"""The `MicroscopeImage` XML that EPU writes beside each movie: same elements, order and units as EPU 3.

Metres, volts and electrons/m² as in the original; only the elements that describe the exposure are filled.
"""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from datetime import UTC, datetime

_FEI = "http://schemas.datacontract.org/2004/07/Fei.SharedObjects"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_XSD = "http://www.w3.org/2001/XMLSchema"
_ARRAYS = "http://schemas.microsoft.com/2003/10/Serialization/Arrays"
_COMMON = "http://schemas.datacontract.org/2004/07/Fei.Common.Types"
_TYPES = "http://schemas.datacontract.org/2004/07/Fei.Types"
_DRAWING = "http://schemas.datacontract.org/2004/07/System.Drawing"
_OMP = "http://schemas.datacontract.org/2004/07/Fei.Applications.Common.Omp.Interface"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpuExposure:
    """What one exposure's XML says, in icestream's units; `acquired_at` in seconds since the epoch."""

    unique_name: str
    acquired_at: float
    pixel_size_angstrom: float
    dose_e_per_angstrom2: float
    voltage_kv: float
    defocus_um: float
    n_fractions: int | None
    shape_yx_px: tuple[int, int]
    beam_shift_xy: tuple[float, float]
    exposure_time_s: float = 3.0


def format_epu_xml(exposure: EpuExposure) -> bytes:
    """Return the XML document (UTF-8, one line, prefixes declared where EPU declares them)."""
    pixel_m = exposure.pixel_size_angstrom * 1e-10
    area = exposure.pixel_size_angstrom**2
    root = ET.Element("MicroscopeImage", {"xmlns": _FEI, "xmlns:i": _XSI})
    _add(root, "name", "Empty")
    _add(root, "uniqueID", str(uuid.uuid5(uuid.NAMESPACE_URL, exposure.unique_name)))
    custom = _add(root, "CustomData", a=_ARRAYS)
    for key, kind, value in (
        ("DoseOnCamera", "double", repr(exposure.dose_e_per_angstrom2 * area)),
        ("Detectors[EF-Falcon].CommercialName", "string", "icestream virtual camera"),
        ("Detectors[EF-Falcon].ElectronCounted", "boolean", "true"),
        ("DoseRate", "double", repr(exposure.dose_e_per_angstrom2 * area / exposure.exposure_time_s)),
        ("Dose", "double", repr(exposure.dose_e_per_angstrom2 * 1e20)),
        ("PhasePlateUsed", "boolean", "false"),
        ("AppliedDefocus", "double", repr(-exposure.defocus_um * 1e-6)),
    ):
        _add_pair(custom, key, kind, value)
    scale = _add(_add(root, "SpatialScale"), "pixelSize")
    for axis in ("x", "y"):
        element = _add(scale, axis)
        _add(element, "numericValue", repr(pixel_m))
        unit = _add(element, "unit", a=_COMMON)
        _add(unit, "a:_x003C_PrefixExponent_x003E_k__BackingField", "1")
        _add(unit, "a:_x003C_Symbol_x003E_k__BackingField", "m")
    _add_microscope(root, exposure)
    return ET.tostring(root, encoding="unicode").encode()


def _add_microscope(root: ET.Element, exposure: EpuExposure) -> None:
    data = _add(root, "microscopeData")
    acquisition = _add(data, "acquisition")
    moment = datetime.fromtimestamp(exposure.acquired_at, UTC)
    _add(acquisition, "acquisitionDateTime", moment.isoformat(timespec="microseconds"))
    camera = _add(acquisition, "camera")
    binning = _add(camera, "Binning", a=_DRAWING)
    for axis in ("x", "y"):
        _add(binning, f"a:{axis}", "1")
    specific = _add(camera, "CameraSpecificInput", a=_ARRAYS)
    _add_pair(specific, "ElectronCountingEnabled", "boolean", "true")
    if exposure.n_fractions is not None:
        pair = _add(specific, "a:KeyValueOfstringanyType")
        _add(pair, "a:Key", "FractionationSettings")
        value = _add(pair, "a:Value", b=_OMP)
        value.set("i:type", "b:EquidistantFractionation")
        _add(value, "b:NumberOffractions", str(exposure.n_fractions))
    _add(camera, "ExposureTime", repr(exposure.exposure_time_s))
    _add(camera, "Name", "EF-Falcon")
    area = _add(camera, "ReadoutArea", a=_DRAWING)
    _add(area, "a:height", str(exposure.shape_yx_px[0]))
    _add(area, "a:width", str(exposure.shape_yx_px[1]))
    core = _add(data, "core")
    _add(core, "ApplicationSoftware", "icestream virtual microscope")
    _add(_add(data, "gun"), "AccelerationVoltage", repr(exposure.voltage_kv * 1e3))
    optics = _add(data, "optics")
    shift = _add(optics, "BeamShift", a=_TYPES)
    _add(shift, "a:_x", repr(exposure.beam_shift_xy[0]))
    _add(shift, "a:_y", repr(exposure.beam_shift_xy[1]))
    _add(optics, "Defocus", repr(-exposure.defocus_um * 1e-6))


def _add(parent: ET.Element, name: str, text: str | None = None, **prefixes: str) -> ET.Element:
    """Append an element; `prefixes` are namespaces that it declares."""
    element = ET.SubElement(parent, name, {f"xmlns:{key}": value for key, value in prefixes.items()})
    element.text = text
    return element


def _add_pair(parent: ET.Element, key: str, kind: str, value: str) -> None:
    pair = _add(parent, "a:KeyValueOfstringanyType")
    _add(pair, "a:Key", key)
    _add(pair, "a:Value", value, b=_XSD).set("i:type", f"b:{kind}")
