"""`icestream orientation`: FSC, conical FSC, cFAR with its isotropic null, sphericity, SCF* and E_od of half-maps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from models.reconstruction.fsc import FscCurves
    from models.reconstruction.orientation import OrientationDiagnostics

_PIXEL_TOLERANCE = 0.01
"""Relative; headers store the box edge in float32 and programs round it, 1 % is another magnification."""

_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


@dataclass(frozen=True, slots=True)
class _Map:
    data: Tensor
    pixel_size_angstrom: float | None
    """None where the header does not say."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "orientation",
        help="Measure resolution and how evenly directions are resolved: FSC, cFAR, sphericity, SCF*, E_od.\n\n"
        "Half-maps are unfiltered MRC cubes (also .gz, .bz2). Without --mask a soft mask is made from their sum. "
        "cFAR is to be read against cfar_null, what isotropic maps of this box, mask and signal would have.\n\n"
        "Example: icestream orientation half1.mrc half2.mrc --mask mask.mrc --poses poses.star --out diagnostics",
    )(orientation)


def orientation(
    half1: Annotated[Path, typer.Argument(help="First half-map (MRC).")],
    half2: Annotated[Path, typer.Argument(help="Second half-map (MRC).")],
    mask: Annotated[Path | None, typer.Option(help="Soft mask in [0, 1] (MRC).")] = None,
    poses: Annotated[
        Path | None,
        typer.Option(help="STAR with rlnAngleRot/Tilt/Psi; gives SCF*, E_od and the view histogram."),
    ] = None,
    symmetry: Annotated[str, typer.Option(help="Point group that the maps have.")] = "C1",
    pixel_size_angstrom: Annotated[
        float | None, typer.Option(help="Pixel size in Å where the headers do not say.")
    ] = None,
    rule: Annotated[str, typer.Option(help="Correction for the mask: relion or cryosparc.")] = "relion",
    n_null: Annotated[int, typer.Option(min=0, help="Synthetic isotropic map pairs behind cfar_null.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of random phases, null maps and the draw of views.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for fsc.star, orientation.json, orientation.html, mask.mrc and pictures."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the orientation diagnostics of a half-map pair."""
    if rule not in ("relion", "cryosparc"):
        raise ConfigurationError("--rule", "is relion or cryosparc", rule)
    document = measure_orientation(
        half1,
        half2,
        mask=mask,
        poses=poses,
        symmetry=symmetry,
        pixel_size_angstrom=pixel_size_angstrom,
        rule="relion" if rule == "relion" else "cryosparc",
        n_null=n_null,
        seed=seed,
        out=out,
    )
    if as_json:
        print_json(document)
    else:
        _print_summary(document)


def measure_orientation(
    half1: Path,
    half2: Path,
    *,
    mask: Path | None = None,
    poses: Path | None = None,
    symmetry: str = "C1",
    pixel_size_angstrom: float | None = None,
    rule: Literal["relion", "cryosparc"] = "relion",
    n_null: int = 20,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure, write the files if `out` is given, and return the command's JSON document."""
    import torch

    from models.fourier.point_groups import normalise_symmetry, symmetry_matrices
    from models.reconstruction.fsc import masked_fsc
    from models.reconstruction.orientation import orientation_diagnostics
    from models.reconstruction.tilt import forecast_views

    try:
        group_name = normalise_symmetry(symmetry)
    except ValueError as error:
        raise ConfigurationError("--symmetry", "is Cn, Dn, T, O, I, I1 or I2", symmetry) from error
    maps = {path: _read_map(path) for path in (half1, half2)}
    a, b = maps[half1], maps[half2]
    if a.data.shape != b.data.shape:
        raise InputError(half2, f"has the shape of {half1}, {_shape(a)}", _shape(b))
    given_mask = None if mask is None else _read_mask(mask, half1, a)
    sizes = {half1: a.pixel_size_angstrom, half2: b.pixel_size_angstrom}
    if mask is not None and given_mask is not None:
        sizes[mask] = given_mask.pixel_size_angstrom
    pixel = _one_pixel_size(sizes, pixel_size_angstrom)
    mask_data = _automatic_mask(half1, a.data + b.data, pixel) if given_mask is None else given_mask.data
    rotations = None if poses is None else _read_rotations(poses)
    generator = torch.Generator().manual_seed(seed)
    curves = masked_fsc(a.data, b.data, mask_data, pixel, rule=rule, generator=generator)
    group = None if group_name == "C1" else symmetry_matrices(group_name)
    diagnostics = orientation_diagnostics(
        a.data,
        b.data,
        mask_data,
        pixel,
        generator=generator,
        symmetry_matrices=group,
        rotations=rotations,
        n_null=n_null,
    )
    document = _document(curves, diagnostics)
    views = None if rotations is None else forecast_views(rotations, generator=generator, group=group)
    document |= {
        "views": None if views is None else views.summary(),
        "half1": str(half1),
        "half2": str(half2),
        "mask": "made from the half-maps" if mask is None else str(mask),
        "poses": None if poses is None else str(poses),
        "symmetry": group_name,
        "seed": seed,
    }
    if out is not None:
        _write_results(out, document, curves, diagnostics, (a.data + b.data) / 2, mask_data)
    return document


def _document(curves: FscCurves, diagnostics: OrientationDiagnostics) -> dict[str, Any]:
    document = {
        "resolution_angstrom": curves.resolution_angstrom,
        "is_at_nyquist": curves.is_at_nyquist,
        "unmasked_resolution_angstrom": curves.unmasked_resolution_angstrom,
        "fsc_rule": curves.rule,
        "fsc_corrected": curves.corrected.tolist(),
        **diagnostics.summary(),
    }
    # Undefined values (empty cones) are NaN in arrays and null in JSON.
    return {
        name: [None if isinstance(v, float) and math.isnan(v) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in document.items()
    }


def _read_map(path: Path) -> _Map:
    import mrcfile
    import numpy as np
    import torch

    if not path.is_file():
        raise InputError(path, "is an MRC file", "no such file")
    try:
        with mrcfile.open(path) as mrc:
            data = np.array(mrc.data, dtype=np.float32)
            pixel_zyx = [float(mrc.voxel_size[axis]) for axis in "zyx"]
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise InputError(path, "is a readable MRC volume", error) from error
    if data.ndim != 3 or len(set(data.shape)) != 1:
        raise InputError(path, "is a cube", " × ".join(str(n) for n in data.shape))
    if data.shape[0] < 16:
        raise InputError(path, "has a box of at least 16 px", data.shape[0])
    if not np.isfinite(data).all():
        raise InputError(
            path, "has finite values", f"{int((~np.isfinite(data)).sum())} NaN or infinite voxels"
        )
    if float(data.std()) == 0:
        raise InputError(path, "is not constant", float(data.flat[0]))
    if max(pixel_zyx) - min(pixel_zyx) > _PIXEL_TOLERANCE * max(pixel_zyx):
        raise InputError(path, "has one pixel size along z, y and x", pixel_zyx)
    return _Map(torch.from_numpy(data), pixel_zyx[0] if pixel_zyx[0] > 0 else None)


def _read_mask(path: Path, half1: Path, half: _Map) -> _Map:
    mask = _read_map(path)
    if mask.data.shape != half.data.shape:
        raise InputError(path, f"has the shape of {half1}, {_shape(half)}", _shape(mask))
    low, high = float(mask.data.min()), float(mask.data.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise InputError(path, "has values from 0 to 1", f"{low:.3g} to {high:.3g}")
    return _Map(mask.data.clamp(0.0, 1.0), mask.pixel_size_angstrom)


def _shape(volume: _Map) -> str:
    return " × ".join(str(n) for n in volume.data.shape)


def _one_pixel_size(sizes: dict[Path, float | None], chosen: float | None) -> float:
    """Return the pixel size on which headers and option agree; say who does not."""
    if chosen is not None and not (math.isfinite(chosen) and chosen > 0):
        raise ConfigurationError("--pixel-size-angstrom", "is positive", chosen)
    known: list[tuple[object, float]] = [(path, size) for path, size in sizes.items() if size is not None]
    if chosen is not None:
        known.insert(0, ("--pixel-size-angstrom", chosen))
    if not known:
        raise ConfigurationError("--pixel-size-angstrom", "is given where no header has a pixel size")
    source, pixel = known[0]
    for other, size in known[1:]:
        if abs(size - pixel) > _PIXEL_TOLERANCE * pixel:
            raise InputError(other, f"has the pixel size of {source}, {pixel:.4g} Å", f"{size:.4g} Å")
    return pixel


def _automatic_mask(half1: Path, total: Tensor, pixel_size_angstrom: float) -> Tensor:
    from models.reconstruction.masks import mask_from_map

    try:
        return mask_from_map(total, pixel_size_angstrom)
    except ValueError as error:
        raise InputError(half1, "has density to make a mask from (or give --mask)", error) from error


def _read_rotations(path: Path) -> Tensor:
    import starfile
    import torch

    from models.fourier.rotations import euler_to_matrix

    if not path.is_file():
        raise InputError(path, "is a STAR file", "no such file")
    try:
        blocks = starfile.read(path, always_dict=True)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise InputError(path, "is a readable STAR file", error) from error
    for block in blocks.values():
        columns = getattr(block, "columns", ())
        if all(name in columns for name in _ANGLES):
            try:
                angles = torch.tensor(block[list(_ANGLES)].to_numpy(float), dtype=torch.float32)
            except ValueError as error:
                raise InputError(path, "has numbers as angles", error) from error
            if not len(angles) or not bool(torch.isfinite(angles).all()):
                raise InputError(path, "has finite angles for at least one particle", len(angles))
            return euler_to_matrix(angles)
    raise InputError(
        path, f"has a table with {', '.join(_ANGLES)}", ", ".join(map(str, blocks)) or "no table"
    )


def _write_results(
    out: Path,
    document: dict[str, Any],
    curves: FscCurves,
    diagnostics: OrientationDiagnostics,
    mean_map: Tensor,
    mask: Tensor,
) -> None:
    import mrcfile
    import pandas as pd
    import starfile

    from models.reconstruction.figures import save_fsc_picture, save_map_picture, save_orientation_picture
    from models.reconstruction.fsc import fsc_table
    from models.reconstruction.orientation_page import write_orientation_page
    from stream.store.files import replacing

    with replacing(out / "fsc.star") as temporary:
        starfile.write({"fsc": pd.DataFrame(fsc_table(curves))}, temporary)
    with replacing(out / "orientation.json") as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with replacing(out / "mask.mrc") as temporary, mrcfile.new(temporary) as mrc:
        mrc.set_data(mask.numpy())
        mrc.voxel_size = curves.pixel_size_angstrom
    with replacing(out / "map.png") as temporary:
        save_map_picture(mean_map, temporary, pixel_size_angstrom=curves.pixel_size_angstrom)
    with replacing(out / "fsc.png") as temporary:
        save_fsc_picture(curves, temporary)
    with replacing(out / "orientation.png") as temporary:
        save_orientation_picture(diagnostics, temporary)
    with replacing(out / "orientation.html") as temporary:
        write_orientation_page(diagnostics, temporary, resolution_angstrom=curves.resolution_angstrom)
    names = "fsc.star orientation.json mask.mrc map.png fsc.png orientation.png orientation.html"
    console.print(f"written to {out}: {names}", highlight=False, soft_wrap=True)


def _print_summary(document: dict[str, Any]) -> None:
    resolution = document["resolution_angstrom"]
    if resolution is None:
        typer.echo("resolution  none: the half-maps do not correlate beyond chance")
    else:
        limit = " (Nyquist: finer pixels may show more)" if document["is_at_nyquist"] else ""
        typer.echo(
            f"resolution  {resolution:.2f} Å at FSC 0.143, corrected ({document['fsc_rule']} rule){limit}"
        )
    null = document["cfar_null"]
    against = "" if null is None else f"; isotropic maps like these {null:.2f}"
    if document["cfar_ratio"] is not None:
        against += f", ratio {document['cfar_ratio']:.2f}"
    typer.echo(f"cFAR        {document['cfar']:.3f}{against}")
    typer.echo(
        f"directions  {document['worst_resolution_angstrom']:.1f} Å (worst) to "
        f"{document['best_resolution_angstrom']:.1f} Å (best)"
    )
    typer.echo(f"sphericity  {document['sphericity']:.3f} (3D FSC body at 0.5; 1 is a sphere)")
    typer.echo(
        f"signal      {document['relative_signal_min']:.2f} to {document['relative_signal_max']:.2f} of the mean "
        "by view"
    )
    if document["scf_star"] is not None:
        typer.echo(
            f"SCF*        {document['scf_star']:.3f} from {document['n_views']} views (even: above 0.81)"
        )
        typer.echo(
            f"E_od        {document['view_efficiency']:.3f} (efficiency of the views; good: above 0.8)"
        )
        views = document["views"]
        typer.echo(f"views       {views['missing_fraction']:.0%} missing")
        tilted = ", ".join(f"{t['scf_star']:.2f} at {t['tilt_deg']:.0f}°" for t in views["tilts"][1:])
        typer.echo(f"stage tilt  SCF* would be {tilted}")
