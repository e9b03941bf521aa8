"""One real micrograph, cut into fields, as a session folder that CryoGEM can be trained on.

Where only a micrograph or a few are at hand (test data, one day's screening), its fields take the place of a session's micrographs: they
share optics and detector, and differ in ice and particles. The CTF is fitted to the whole micrograph. Without a map a hollow
ball stands for particles such as ferritin, which look like one at low resolution:
`python -m actors.cryogem.field_session IMAGE --picks PICKS.csv --pixel-size-angstrom 1.5 --shell-angstrom 38 61 --out SESSION`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from actors.preprocess.ctf import describe_fit, to_record
from models.optics.ctf_fit import Microscope, fit_ctf
from models.reconstruction.volume_io import write_volume
from stream.records.errors import InputError
from stream.records.values import RunId
from stream.sinks.mrc_images import write_micrograph
from stream.sinks.relion_star import write_picks_star
from stream.store.files import replacing
from stream.store.layout import OutputLayout

_SHELL_RESOLUTION_ANGSTROM = 12.0
_SHELL_PIXEL_ANGSTROM = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldSessionSettings:
    """What the micrograph is, and how it is cut: `fields_yx` rows and columns.

    The particle is a map file, or a hollow ball of inner and outer radius `shell_angstrom`.
    """

    pixel_size_angstrom: float
    diameter_angstrom: float
    fields_yx: tuple[int, int] = (3, 3)
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    symmetry: str = "C1"
    map: Path | None = None
    shell_angstrom: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.map is None) == (self.shell_angstrom is None):
            raise ValueError("map, shell_angstrom: exactly one of them says what the particle is")
        if min(self.fields_yx) < 1 or self.fields_yx[0] * self.fields_yx[1] < 2:
            raise ValueError(f"fields_yx: {self.fields_yx}, must be two fields or more")
        if self.shell_angstrom is not None and not 0.0 <= self.shell_angstrom[0] < self.shell_angstrom[1]:
            raise ValueError(
                f"shell_angstrom: {self.shell_angstrom}, must be an inner and a larger outer radius"
            )


def write_field_session(
    folder: Path, image: NDArray[np.float32], picks_yx_px: NDArray[np.float64], settings: FieldSessionSettings
) -> OutputLayout:
    """Write a session whose micrographs are the fields of one; fields without a pick are CryoGEM's to leave out."""
    layout = OutputLayout(folder)
    scope = Microscope(
        voltage_kv=settings.voltage_kv,
        cs_mm=settings.cs_mm,
        amplitude_contrast=settings.amplitude_contrast,
    )
    fitted, _ = fit_ctf(torch.tensor(image), settings.pixel_size_angstrom, scope)
    ctf = {**describe_fit(to_record(fitted)), "pixel_size_angstrom": settings.pixel_size_angstrom}
    height, width = (n // f for n, f in zip(image.shape, settings.fields_yx, strict=True))
    for row in range(settings.fields_yx[0]):
        for column in range(settings.fields_yx[1]):
            name = f"field_{row}_{column}"
            corner = np.array([row * height, column * width])
            part = image[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
            local = picks_yx_px - corner
            own = local[((local >= 0) & (local <= np.array([height, width]) - 1)).all(axis=1)]
            write_micrograph(
                layout.micrograph(name), np.ascontiguousarray(part), settings.pixel_size_angstrom
            )
            write_picks_star(layout.picks(name), own, np.ones(len(own)))
            _write_json(layout.ctf_values(name), ctf)
    run = layout.run(RunId("run-given"))
    run.mkdir(parents=True, exist_ok=True)
    with replacing(run / "map.mrc") as temporary:
        if settings.map is not None:
            temporary.write_bytes(settings.map.read_bytes())
        elif settings.shell_angstrom is not None:
            write_volume(temporary, make_shell(*settings.shell_angstrom), _SHELL_PIXEL_ANGSTROM)
    _write_json(run / "summary.json", {"symmetry": settings.symmetry})
    document = {
        "microscope": {
            "voltage_kv": settings.voltage_kv,
            "cs_mm": settings.cs_mm,
            "amplitude_contrast": settings.amplitude_contrast,
        },
        "particle": {"diameter_angstrom": settings.diameter_angstrom},
        "engine": {"symmetry": settings.symmetry},
    }
    with replacing(layout.session) as temporary:
        temporary.write_text(yaml.safe_dump(document))
    return layout


def make_shell(inner_angstrom: float, outer_angstrom: float) -> Tensor:
    """Return a hollow ball's density, its edges as soft as a map at 12 Å, in a box of twice its diameter."""
    n = 2 * round(2.0 * outer_angstrom / _SHELL_PIXEL_ANGSTROM)
    axis = (torch.arange(n, dtype=torch.float32) - n // 2) * _SHELL_PIXEL_ANGSTROM
    radius = (axis[:, None, None].square() + axis[None, :, None].square() + axis.square()).sqrt()
    width = 0.5 * _SHELL_RESOLUTION_ANGSTROM
    return torch.sigmoid(4.0 * (outer_angstrom - radius) / width) * torch.sigmoid(
        4.0 * (radius - inner_angstrom) / width
    )


def read_image(path: Path) -> NDArray[np.float32]:
    """Return a micrograph from MRC or TIFF, or from a grey PNG as some data sets give theirs."""
    if path.suffix.lower() == ".png":
        from PIL import Image

        with Image.open(path) as opened:
            return np.asarray(opened, dtype=np.float32)
    from stream.ingest.movie_reader import read_micrograph

    return read_micrograph(path)


def read_picks(path: Path) -> NDArray[np.float64]:
    """Return picks (y, x) from a CSV file with a header and columns x, y, in pixels."""
    try:
        rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(path, f"picks are a CSV file of x and y in pixels ({error})") from error
    if rows.shape[1] < 2 or not len(rows):
        raise InputError(path, "picks are a CSV file of x and y in pixels", rows.shape)
    return rows[:, [1, 0]].astype(np.float64)


def _write_json(path: Path, document: dict[str, float | bool | None] | dict[str, str]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Write a session from the command line."""
    parser = argparse.ArgumentParser(prog="python -m actors.cryogem.field_session")
    parser.add_argument("image", type=Path, help="MRC, TIFF or PNG, dark protein")
    parser.add_argument("--picks", type=Path, required=True, help="CSV of x, y in pixels, with a header")
    parser.add_argument("--pixel-size-angstrom", type=float, required=True)
    parser.add_argument("--diameter-angstrom", type=float, required=True)
    parser.add_argument("--fields", type=int, nargs=2, default=(3, 3), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--symmetry", default="C1")
    parser.add_argument("--voltage-kv", type=float, default=300.0)
    parser.add_argument("--cs-mm", type=float, default=2.7)
    particle = parser.add_mutually_exclusive_group(required=True)
    particle.add_argument("--map", type=Path)
    particle.add_argument("--shell-angstrom", type=float, nargs=2, metavar=("INNER", "OUTER"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    settings = FieldSessionSettings(
        pixel_size_angstrom=given.pixel_size_angstrom,
        diameter_angstrom=given.diameter_angstrom,
        fields_yx=(given.fields[0], given.fields[1]),
        voltage_kv=given.voltage_kv,
        cs_mm=given.cs_mm,
        symmetry=given.symmetry,
        map=given.map,
        shell_angstrom=None if given.shell_angstrom is None else tuple(given.shell_angstrom),
    )
    write_field_session(given.out, read_image(given.image), read_picks(given.picks), settings)


if __name__ == "__main__":
    main()
