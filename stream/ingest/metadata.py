"""What the microscope wrote beside a movie: EPU XML and SerialEM mdoc, and whether the settings agree.

Found by name: `X.xml` beside `X.tiff`, `X_fractions.tiff`, `X_Fractions.mrc` or `X_EER.eer` (EPU), and
`X.tif.mdoc` or `X.mdoc` (SerialEM). Units are converted here and nowhere later: metres to Å, volts to kV,
e/m² to e/Å². A sidecar that is there but broken is an error, because it may be half written.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stream.ingest.files import translate_os_error
from stream.records.errors import ConfigurationError, InputError
from stream.records.values import AcquisitionMetadata

PIXEL_SIZE_TOLERANCE = 0.02
"""Relative; calibrations are good to about 1 %, wrong magnifications differ by 10 % and more."""
VOLTAGE_TOLERANCE = 0.01
DOSE_TOLERANCE = 0.2
"""Relative; EPU's and SerialEM's dose follow a calibration that ages, and dose through ice is lower."""

MAX_SIDECAR_BYTES = 64 * 1024 * 1024

_EPU_ENDINGS = re.compile(r"(_fractions|_eer|_gain_corrected)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """The metadata, and the number of frames that the microscope says it wrote (None = not said)."""

    metadata: AcquisitionMetadata
    n_frames: int | None


def find_sidecar(movie_path: str | Path) -> Path | None:
    """Return the EPU XML or SerialEM mdoc that belongs to the movie, None when there is none."""
    movie = Path(movie_path)
    bare = _EPU_ENDINGS.sub("", movie.stem)
    names = [
        f"{movie.name}.mdoc",
        f"{movie.stem}.mdoc",
        f"{bare}.xml",
        f"{movie.stem}.xml",
        f"{movie.name}.xml",
    ]
    for name in dict.fromkeys(names):
        candidate = movie.with_name(name)
        if candidate.is_file():
            return candidate
    return None


def read_acquisition_metadata(movie_path: str | Path) -> AcquisitionMetadata:
    """Return what the file beside the movie says; all None when there is no such file."""
    return read_sidecar(movie_path).metadata


def read_sidecar(movie_path: str | Path) -> Sidecar:
    """Return metadata and promised number of frames from the file beside the movie."""
    path = find_sidecar(movie_path)
    if path is None:
        return Sidecar(metadata=AcquisitionMetadata(), n_frames=None)
    if path.suffix.lower() == ".mdoc":
        return parse_mdoc(_read_text(path), path)
    return parse_epu_xml(_read_text(path), path)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise InputError(path, "a metadata file has at most 64 MiB", path.stat().st_size)
        data = path.read_bytes()
    except OSError as error:
        raise translate_os_error(path, error) from error
    # SerialEM writes the code page of its Windows; the keys that are read are ASCII.
    encoding = "utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig"
    return data.decode(encoding, errors="replace")


def parse_epu_xml(text: str, path: str | Path) -> Sidecar:
    """Return what an EPU `MicroscopeImage` document says (pixel size in m, voltage in V, dose in e/m²)."""
    try:
        # The declaration may name an encoding that the decoded text no longer has.
        root = ET.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))  # noqa: S314 - expat >= 2.4.1 refuses entity bombs
    except ET.ParseError as error:
        raise InputError(path, "an EPU metadata file is complete XML", error) from error
    if _local(root.tag) != "MicroscopeImage":
        raise InputError(path, "an EPU metadata file holds a MicroscopeImage", _local(root.tag))
    pixel_size = _measured(
        _scaled(root, "SpatialScale/pixelSize/x/numericValue", 1e10, path), "pixelSize", path
    )
    settings = _key_values(root)
    dose = _measured(_number(settings.get("Dose"), "Dose", path), "Dose", path)
    on_camera = _measured(_number(settings.get("DoseOnCamera"), "DoseOnCamera", path), "DoseOnCamera", path)
    if dose is not None:
        dose_angstrom = dose * 1e-20
    elif on_camera is not None and pixel_size is not None:
        dose_angstrom = on_camera / pixel_size**2
    else:
        dose_angstrom = None
    shift_x = _scaled(root, "microscopeData/optics/BeamShift/_x", 1.0, path)
    shift_y = _scaled(root, "microscopeData/optics/BeamShift/_y", 1.0, path)
    metadata = AcquisitionMetadata(
        pixel_size_angstrom=pixel_size,
        dose_e_per_angstrom2=dose_angstrom,
        voltage_kv=_measured(
            _scaled(root, "microscopeData/gun/AccelerationVoltage", 1e-3, path), "AccelerationVoltage", path
        ),
        beam_shift_group=_shift_text(shift_x, shift_y),
        acquired_at=_text(root, "microscopeData/acquisition/acquisitionDateTime"),
        source=str(path),
    )
    return Sidecar(metadata=metadata, n_frames=_epu_fractions(root, path))


def _epu_fractions(root: ET.Element, path: str | Path) -> int | None:
    for element in root.iter():
        name = _local(element.tag)
        if name == "NumberOffractions":
            return int(_number(element.text, name, path) or 0) or None
        if name == "DoseFractions":
            return len(element) or None
    return None


def _local(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]


def _find(root: ET.Element, route: str) -> ET.Element | None:
    element = root
    for name in route.split("/"):
        child = next((child for child in element if _local(child.tag) == name), None)
        if child is None:
            return None
        element = child
    return element


def _text(root: ET.Element, route: str) -> str | None:
    element = _find(root, route)
    text = None if element is None or element.text is None else element.text.strip()
    return text or None


def _scaled(root: ET.Element, route: str, factor: float, path: str | Path) -> float | None:
    value = _number(_text(root, route), route.rsplit("/", 2)[-2], path)
    return None if value is None else value * factor


def _number(text: str | None, name: str, path: str | Path) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(path, f"{name} is a number", text) from error
    if not math.isfinite(value):
        raise InputError(path, f"{name} is a finite number", text)
    return value


def _measured(value: float | None, name: str, path: str | Path) -> float | None:
    """Return a positive number, None for the 0 that microscopes write where something was not measured."""
    if value is not None and value < 0:
        raise InputError(path, f"{name} is not negative", value)
    return value or None


def _key_values(root: ET.Element) -> dict[str, str]:
    """The `KeyValueOf…` pairs of EPU's custom data that hold plain text."""
    found: dict[str, str] = {}
    for pair in root.iter():
        if _local(pair.tag).startswith("KeyValueOf") and len(pair) == 2:
            key, value = pair
            if key.text and len(value) == 0 and value.text:
                found[key.text] = value.text
    return found


def _shift_text(shift_x: float | None, shift_y: float | None) -> str | None:
    """The beam shift as it was set, rounded; clustering into optics groups happens over a whole session."""
    if shift_x is None or shift_y is None:
        return None
    # + 0.0 so that a rounded minus zero is no group of its own
    return f"{round(shift_x, 4) + 0.0:.4f},{round(shift_y, 4) + 0.0:.4f}"


def parse_mdoc(text: str, path: str | Path) -> Sidecar:
    """Return what a SerialEM mdoc of one exposure says: its only `FrameSet` or `ZValue` section.

    Raises
    ------
    InputError
        Several sections (a tilt series or montage), none, or a value that is no number.
    """
    general, sections = _mdoc_sections(text)
    if len(sections) != 1:
        raise InputError(
            path, "the mdoc of a movie has one FrameSet or ZValue section", f"{len(sections)} sections"
        )
    values = general | sections[0]

    def measured(name: str) -> float | None:
        return _measured(_number(values.get(name), name, path), name, path)

    shift = (values.get("ImageShift") or "").split()
    shift_xy = [_number(part, "ImageShift", path) for part in shift]
    n_frames = _number(values.get("NumSubFrames"), "NumSubFrames", path)
    metadata = AcquisitionMetadata(
        pixel_size_angstrom=measured("PixelSpacing"),
        dose_e_per_angstrom2=measured("ExposureDose"),
        voltage_kv=measured("Voltage"),
        beam_shift_group=_shift_text(shift_xy[0], shift_xy[1]) if len(shift_xy) == 2 else None,
        acquired_at=values.get("DateTime"),
        source=str(path),
    )
    return Sidecar(metadata=metadata, n_frames=int(n_frames) if n_frames else None)


def _mdoc_sections(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    general: dict[str, str] = {}
    sections: list[dict[str, str]] = []
    current = general
    for line in text.splitlines():
        stripped = line.strip()
        if re.match(r"\[\s*(FrameSet|ZValue|MontSection)\s*=", stripped):
            current = {}
            sections.append(current)
        elif "=" in stripped and not stripped.startswith("["):
            key, value = stripped.split("=", 1)
            current[key.strip()] = value.strip()
    return general, sections


def check_against_configuration(
    metadata: AcquisitionMetadata,
    item: object,
    *,
    header_pixel_size_angstrom: float | None = None,
    pixel_size_angstrom: float | None = None,
    voltage_kv: float | None = None,
    dose_e_per_angstrom2: float | None = None,
    allow_factor_two: bool = False,
) -> None:
    """Refuse a movie whose own metadata contradict the settings; a value that either side lacks is not compared.

    Parameters
    ----------
    pixel_size_angstrom, voltage_kv, dose_e_per_angstrom2
        The settings: pixel size of the movie's pixels, total dose of the exposure.
    allow_factor_two
        The camera works in super-resolution: metadata may give half or twice the pixel size.

    Raises
    ------
    ConfigurationError
        Names both values and both sources.
    """
    source = metadata.source or str(item)
    comparisons: Mapping[str, tuple[str, float | None, float | None, str, float]] = {
        "pixel size": (source, metadata.pixel_size_angstrom, pixel_size_angstrom, "Å", PIXEL_SIZE_TOLERANCE),
        "pixel size of the header": (
            str(item), header_pixel_size_angstrom, pixel_size_angstrom, "Å", PIXEL_SIZE_TOLERANCE,
        ),
        "voltage": (source, metadata.voltage_kv, voltage_kv, "kV", VOLTAGE_TOLERANCE),
        "dose": (source, metadata.dose_e_per_angstrom2, dose_e_per_angstrom2, "e/Å²", DOSE_TOLERANCE),
    }  # fmt: skip
    for name, (where, found, configured, unit, tolerance) in comparisons.items():
        if found is None or configured is None:
            continue
        factors = (1.0, 0.5, 2.0) if allow_factor_two and unit == "Å" else (1.0,)
        if any(abs(found - factor * configured) <= tolerance * factor * configured for factor in factors):
            continue
        rule = f"{name} agrees with the configuration within {tolerance:.0%}"
        value = f"{found:.5g} {unit} in {where}, {configured:.5g} {unit} in the configuration"
        raise ConfigurationError(item, rule, value)
