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
    """Return the XML document (UTF-8, one line, as EPU writes it)."""
    pixel_m = exposure.pixel_size_angstrom * 1e-10
    area = exposure.pixel_size_angstrom**2
    root = ET.Element(f"{{{_FEI}}}MicroscopeImage")
    _add(root, "name", "Empty")
    _add(root, "uniqueID", str(uuid.uuid5(uuid.NAMESPACE_URL, exposure.unique_name)))
    custom = _add(root, "CustomData")
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
        unit = _add(element, "unit")
        _add(unit, "_x003C_PrefixExponent_x003E_k__BackingField", "1", namespace=_COMMON)
        _add(unit, "_x003C_Symbol_x003E_k__BackingField", "m", namespace=_COMMON)
    _add_microscope(root, exposure)
    for prefix, namespace in (("", _FEI), ("i", _XSI)):
        ET.register_namespace(prefix, namespace)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=False))


def _add_microscope(root: ET.Element, exposure: EpuExposure) -> None:
    data = _add(root, "microscopeData")
    acquisition = _add(data, "acquisition")
    moment = datetime.fromtimestamp(exposure.acquired_at, UTC)
    _add(acquisition, "acquisitionDateTime", moment.isoformat(timespec="microseconds"))
    camera = _add(acquisition, "camera")
    binning = _add(camera, "Binning")
    for axis in ("x", "y"):
        _add(binning, axis, "1", namespace=_DRAWING)
    specific = _add(camera, "CameraSpecificInput")
    _add_pair(specific, "ElectronCountingEnabled", "boolean", "true")
    if exposure.n_fractions is not None:
        value = _add_pair(specific, "FractionationSettings", None, None)
        value.set(f"{{{_XSI}}}type", "b:EquidistantFractionation")
        _add(value, "NumberOffractions", str(exposure.n_fractions), namespace=_OMP)
    _add(camera, "ExposureTime", repr(exposure.exposure_time_s))
    _add(camera, "Name", "EF-Falcon")
    area = _add(camera, "ReadoutArea")
    _add(area, "height", str(exposure.shape_yx_px[0]), namespace=_DRAWING)
    _add(area, "width", str(exposure.shape_yx_px[1]), namespace=_DRAWING)
    core = _add(data, "core")
    _add(core, "ApplicationSoftware", "icestream virtual microscope")
    _add(_add(data, "gun"), "AccelerationVoltage", repr(exposure.voltage_kv * 1e3))
    optics = _add(data, "optics")
    shift = _add(optics, "BeamShift")
    _add(shift, "_x", repr(exposure.beam_shift_xy[0]), namespace=_TYPES)
    _add(shift, "_y", repr(exposure.beam_shift_xy[1]), namespace=_TYPES)
    _add(optics, "Defocus", repr(-exposure.defocus_um * 1e-6))


def _add(parent: ET.Element, name: str, text: str | None = None, *, namespace: str = _FEI) -> ET.Element:
    element = ET.SubElement(parent, f"{{{namespace}}}{name}")
    element.text = text
    return element


def _add_pair(parent: ET.Element, key: str, kind: str | None, value: str | None) -> ET.Element:
    pair = _add(parent, "KeyValueOfstringanyType", namespace=_ARRAYS)
    _add(pair, "Key", key, namespace=_ARRAYS)
    element = _add(pair, "Value", value, namespace=_ARRAYS)
    if kind is not None:
        element.set(f"{{{_XSI}}}type", f"b:{kind}")
    return element
