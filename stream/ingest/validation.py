"""The verdict on one file at rest: an `Exposure`, or the reason why not.

Runs in a thread of `ExposureSource`; it reads the file and shares nothing but the gain reference, which is
read once. An `InputError` may mean that the file is incomplete (ask again later), a `ConfigurationError`
stands at once: waiting changes no setting.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stream.ingest.eer import EerUpsampling
from stream.ingest.files import identify_file
from stream.ingest.gain import (
    GainConvention,
    GainReference,
    check_gain,
    check_gain_turned,
    orient_gain,
    read_gain,
)
from stream.ingest.metadata import Sidecar, check_against_configuration, find_sidecar, read_sidecar
from stream.ingest.movie_reader import (
    MovieHeader,
    check_content,
    inspect_micrograph,
    inspect_movie,
    iterated_shape,
)
from stream.ingest.particle_sets import read_particle_table, split_by_micrograph
from stream.records.errors import ConfigurationError, InputError
from stream.records.particles import derive_exposure_id
from stream.records.values import AcquisitionMetadata, Exposure, FileIdentity, InputKind


@dataclass(frozen=True, slots=True, kw_only=True)
class GainSettings:
    """Which gain reference, how it lies (or that this is yet to be found) and which way it applies."""

    path: Path
    flip_x: bool = False
    flip_y: bool = False
    rotate_deg: int = 0
    convention: GainConvention = "auto"
    is_orientation_sought: bool = False
    eer_upsampling: EerUpsampling = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedAcquisition:
    """What the configuration says of every movie; None = not compared. `allow_factor_two`: super-resolution."""

    pixel_size_angstrom: float | None = None
    voltage_kv: float | None = None
    dose_e_per_angstrom2: float | None = None
    allow_factor_two: bool = False


class GainCheck:
    """The gain reference, read and turned when the first movie asks for it."""

    def __init__(self, settings: GainSettings) -> None:
        self._settings = settings
        self._gain: GainReference | None = None
        self._lock = threading.Lock()

    def check(self, header: MovieHeader, item: str) -> None:
        """Refuse a reference that cannot be read or has not the movie's shape."""
        s = self._settings
        with self._lock:
            if self._gain is None:
                try:
                    raw = read_gain(s.path, convention=s.convention)
                except InputError as error:
                    # The fault lies with the setting, not with the movie: waiting will not cure it.
                    raise ConfigurationError(
                        f"gain reference {error.item}", error.rule, error.value
                    ) from error
                self._gain = orient_gain(raw, flip_x=s.flip_x, flip_y=s.flip_y, rotate_deg=s.rotate_deg)
        if s.is_orientation_sought:
            check_gain_turned(self._gain, header.shape_yx, item)
        elif (
            self._gain.shape_yx != header.shape_yx
        ):  # one of the sensor's pixels holds for up-sampled frames, too
            check_gain(self._gain, iterated_shape(header, eer_upsampling=s.eer_upsampling), item)


def validate_image_file(
    path: Path,
    relative_path: str,
    kind: InputKind,
    *,
    expected: ExpectedAcquisition,
    gain: GainCheck | None,
    is_metadata_awaited: bool = False,
) -> Exposure:
    """Return the exposure of a movie or micrograph; its `name` is for the caller to make unique.

    Parameters
    ----------
    is_metadata_awaited
        A missing EPU XML or mdoc counts as incomplete.

    Raises
    ------
    InputError
        The file, or the metadata beside it, is broken or (still) incomplete.
    ConfigurationError
        Gain, pixel size, voltage or dose contradict the configuration.
    """
    header = inspect_movie(path) if kind is InputKind.MOVIE else inspect_micrograph(path)
    sidecar = read_sidecar(path)
    if is_metadata_awaited and find_sidecar(path) is None:
        raise InputError(
            path, "the microscope's metadata lie beside the movie (EPU .xml or SerialEM .mdoc)", "none"
        )
    _check_frame_count(path, kind, header, sidecar)
    if gain is not None and kind is InputKind.MOVIE:
        gain.check(header, str(path))
    check_against_configuration(
        sidecar.metadata,
        path,
        header_pixel_size_angstrom=header.pixel_size_angstrom,
        pixel_size_angstrom=expected.pixel_size_angstrom,
        voltage_kv=expected.voltage_kv,
        dose_e_per_angstrom2=expected.dose_e_per_angstrom2,
        allow_factor_two=expected.allow_factor_two,
    )
    check_content(path, header)
    return Exposure(
        exposure_id=derive_exposure_id(relative_path),
        name=path.stem,
        kind=kind,
        file=identify_file(path),
        n_frames=header.n_frames,
        shape_yx=header.shape_yx,
        metadata=_merge(sidecar.metadata, header),
    )


def _check_frame_count(path: Path, kind: InputKind, header: MovieHeader, sidecar: Sidecar) -> None:
    promised = sidecar.n_frames
    if kind is not InputKind.MOVIE or promised is None or header.format.value == "eer":
        return  # metadata of an EER count fractions, the file raw frames
    if header.n_frames < promised:
        value = f"{header.n_frames} frames, {promised} by {sidecar.metadata.source}"
        raise InputError(path, "a movie has every frame that the microscope wrote (file truncated)", value)


def _merge(metadata: AcquisitionMetadata, header: MovieHeader) -> AcquisitionMetadata:
    if metadata.pixel_size_angstrom is not None or header.pixel_size_angstrom is None:
        return metadata
    return replace(
        metadata, pixel_size_angstrom=header.pixel_size_angstrom, source=metadata.source or "header"
    )


def validate_particle_file(
    path: Path,
    relative_path: str,
    expected: ExpectedAcquisition,
    *,
    root: Path | None,
    require_ctf: bool = True,
) -> list[Exposure]:
    """Return one exposure per micrograph of a particle file; every stack and index has been checked.

    The voltage must agree with the configuration; the pixel size is the file's own (particles are rescaled).
    """
    table = read_particle_table(path, root=root, require_ctf=require_ctf)
    for voltage_kv in np.unique(table.voltage_kv[np.isfinite(table.voltage_kv)]).tolist():
        stated = AcquisitionMetadata(voltage_kv=voltage_kv, source=str(path))
        check_against_configuration(stated, path, voltage_kv=expected.voltage_kv)
    file: FileIdentity = identify_file(path)
    exposures = []
    for group in split_by_micrograph(table):
        first = group.rows[0]
        exposures.append(
            Exposure(
                exposure_id=derive_exposure_id(relative_path, group.name),
                name=_safe_stem(group.name),
                kind=InputKind.PARTICLES,
                file=file,
                n_frames=len(group.rows),
                shape_yx=(table.box_size_px, table.box_size_px),
                metadata=AcquisitionMetadata(
                    pixel_size_angstrom=_known(table.pixel_size_angstrom[first]),
                    voltage_kv=_known(table.voltage_kv[first]),
                    source=str(path),
                ),
                micrograph_name=group.name,
            )
        )
    return exposures


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _safe_stem(group_name: str) -> str:
    """A file name out of a micrograph's name or `stack:PATH#PART`."""
    name, separator, part = group_name.removeprefix("stack:").partition("#")
    stem = Path(name).name
    for suffix in (".mrcs", ".mrc", ".tiff", ".tif", ".eer"):
        stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    return f"{stem}_{part}" if separator and group_name.startswith("stack:") else stem
