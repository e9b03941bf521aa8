"""Pictures of a reconstruction for people: the map, its FSC curves, its orientation diagnostics (PNG).

Figures are built without pyplot, so that nothing global is touched and any thread may draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from models.reconstruction.cones import healpix_pixel
from models.reconstruction.fsc import GOLD_STANDARD_THRESHOLD, FscCurves
from models.reconstruction.grids import healpix_directions
from models.reconstruction.local_resolution import LocalResolution
from models.reconstruction.orientation import OrientationDiagnostics
from models.reconstruction.unions import GrowthCurve

_DPI = 110
VIEW_ORDER = 3
"""HEALPix order of the view histogram: 768 bins of 7.3°."""

_BLUE, _ORANGE, _GREY, _RED = "#1f5fa8", "#d9822b", "#8a8f98", "#b3262a"


def save_map_picture(
    volume: Float[Tensor, "n n n"], path: Path, *, pixel_size_angstrom: float | None = None, title: str = ""
) -> None:
    """Write the three central slices (above) and the three projections (below) of a map, density white."""
    array = volume.detach().cpu().numpy()
    middle = array.shape[0] // 2
    slices = (array[middle], array[:, middle], array[:, :, middle])
    projections = tuple(array.sum(axis=axis) for axis in range(3))
    figure = _figure(8.4, 5.9)
    for row, images in enumerate((slices, projections)):
        low = min(float(np.quantile(image, 0.01)) for image in images)
        high = max(float(np.quantile(image, 0.998)) for image in images)
        for column, (image, names) in enumerate(zip(images, ("xy", "xz", "yz"), strict=True)):
            axes = figure.add_subplot(2, 3, 3 * row + column + 1)
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bilinear")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{names[0]} →", fontsize=8, labelpad=2)
            axes.set_ylabel(f"{names[1]} →", fontsize=8, labelpad=2)
            kind, along = (
                ("slice", "through the middle") if row == 0 else ("projection", f"along {'zyx'[column]}")
            )
            axes.set_title(f"{kind} {along}", fontsize=9)
            if pixel_size_angstrom is not None and row == 0 and column == 0:
                _draw_scale_bar(axes, array.shape[0], pixel_size_angstrom)
    if title:
        figure.suptitle(title, fontsize=11)
    _save(figure, path)


def save_fsc_picture(curves: FscCurves, path: Path, *, title: str = "") -> None:
    """Write the four FSC curves against spatial frequency, with the threshold and the resolution."""
    figure = _figure(7.2, 4.6)
    axes = figure.add_subplot()
    frequency = curves.frequencies_per_angstrom.numpy()
    lines = (
        ("corrected", curves.corrected, _BLUE, 2.2, "-"),
        ("masked", curves.masked, _ORANGE, 1.3, "-"),
        ("unmasked", curves.unmasked, _GREY, 1.3, "-"),
        ("phases randomised", curves.random, _RED, 1.0, "--"),
    )
    for label, curve, colour, width, style in lines:
        axes.plot(frequency[1:], curve.numpy()[1:], style, color=colour, linewidth=width, label=label)
    _draw_threshold(axes, curves.threshold)
    if curves.resolution_angstrom is None:
        found = "no resolution: the half-maps do not correlate"
    else:
        axes.axvline(1.0 / curves.resolution_angstrom, color=_BLUE, linewidth=0.8, linestyle=":")
        found = f"{curves.resolution_angstrom:.2f} Å at {curves.threshold:.3g}"
        found += " (Nyquist)" if curves.is_at_nyquist else ""
    axes.set_title(f"{title}  {found}".strip(), fontsize=11)
    _finish_curves(axes, float(frequency[-1]))
    _save(figure, path)


def save_orientation_picture(diagnostics: OrientationDiagnostics, path: Path, *, title: str = "") -> None:
    """Write the cFSC fan, resolution by direction, its histogram and (if poses are known) the view histogram."""
    figure = _figure(11.5, 7.8)
    _draw_fan(figure.add_subplot(2, 2, 1), diagnostics)
    axes = figure.add_subplot(2, 2, 2, projection="mollweide")
    resolution = torch.cat([diagnostics.direction_resolution_angstrom] * 2)
    directions = torch.cat((diagnostics.directions, -diagnostics.directions))
    image = _draw_sphere(axes, directions, resolution.numpy(), "viridis_r", 4)
    figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.7, pad=0.08, label="Å at cFSC 0.143")
    axes.set_title("resolution by direction", fontsize=10)
    _draw_resolution_histogram(figure.add_subplot(2, 2, 3), diagnostics)
    if diagnostics.views is None:
        _draw_relative_signal(figure, figure.add_subplot(2, 2, 4, projection="mollweide"), diagnostics)
    else:
        _draw_views(figure, figure.add_subplot(2, 2, 4, projection="mollweide"), diagnostics)
    figure.suptitle("   ".join(part for part in (title, _verdict(diagnostics)) if part), fontsize=11)
    _save(figure, path)


def save_class_montage(
    images: Float[Tensor, "c n n"],
    captions: Sequence[str],
    path: Path,
    *,
    n_columns: int = 10,
    title: str = "",
) -> None:
    """Write class averages in rows of ten, each with its caption, grey values per image."""
    n = len(images)
    n_columns = min(n_columns, max(1, n))
    n_rows = math.ceil(n / n_columns)
    figure = _figure(1.2 * n_columns, 1.42 * n_rows + (0.35 if title else 0.0))
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if i < n:
            image = images[i].detach().cpu().numpy()
            low, high = np.quantile(image, [0.01, 0.998])
            axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), interpolation="bilinear")
            axes.set_title(captions[i], fontsize=6.5, pad=2)
    if title:
        figure.suptitle(title, fontsize=10)
    _save(figure, path)


def save_local_resolution_picture(
    volume: Float[Tensor, "n n n"], local: LocalResolution, path: Path, *, title: str = ""
) -> None:
    """Write the three central slices coloured by local resolution, density as brightness, and the histogram."""
    array, values = volume.detach().cpu().numpy(), local.volume.numpy()
    is_inside = local.is_inside.numpy()
    middle = array.shape[0] // 2
    low, high = (float(q) for q in np.quantile(values[is_inside], [0.02, 0.98]))
    high = max(high, low + 0.1)
    colours = colormaps["turbo"]
    dark, bright = (float(q) for q in np.quantile(array[is_inside], [0.02, 0.995]))
    figure = _figure(12.0, 3.6)
    for column, name in enumerate(("xy", "xz", "yz")):
        at = tuple(middle if axis == column else slice(None) for axis in range(3))
        colour = colours(np.clip((values[at] - low) / (high - low), 0.0, 1.0))[..., :3]
        light = np.clip((array[at] - dark) / max(bright - dark, 1e-12), 0.0, 1.0)[..., None]
        grey = np.repeat(0.6 * light, 3, axis=2)
        picture = np.where(is_inside[at][..., None], (0.25 + 0.75 * light) * colour, grey)
        axes = figure.add_subplot(1, 4, column + 1)
        axes.imshow(picture, origin="lower", interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{name} slice through the middle", fontsize=9)
    axes = figure.add_subplot(1, 4, 4)
    counts, edges = np.histogram(values[is_inside], bins=40, range=(low, high))
    centres = 0.5 * (edges[1:] + edges[:-1])
    bars = colours((centres - low) / (high - low))
    axes.bar(centres, counts / is_inside.sum(), width=edges[1] - edges[0], color=bars)
    axes.set_xlabel("local resolution / Å", fontsize=9)
    axes.set_ylabel("share of the mask", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    median = local.quantiles()["median"]
    axes.set_title(f"median {median:.1f} Å (local FSC {local.threshold:g})", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    _save(figure, path)


def save_growth_picture(curve: GrowthCurve, path: Path, *, title: str = "") -> None:
    """Write resolution against the number of particles: unions with error bars, the fitted line, a prediction."""
    figure = _figure(6.4, 4.4)
    axes = figure.add_subplot()
    n = np.array([point.n_particles for point in curve.points])
    y = np.array([point.resolution_angstrom**-2 for point in curve.points])
    sd = np.array([point.inverse_square_sd for point in curve.points])
    axes.errorbar(n, y, yerr=sd, fmt="o", color=_BLUE, capsize=3, label="unions of random groups, ± SD")
    span = np.geomspace(n[0], 4 * n[-1], 50)
    line = curve.slope * np.log(span) + curve.intercept
    axes.plot(span, line, "--", color=_GREY, linewidth=1.2, label="1/d² = slope · ln N + constant")
    scaled = [curve.predict(float(m))[1] for m in span if m > n[-1]]
    more = [m for m in span if m > n[-1]]
    axes.plot(
        more,
        [math.nan if d is None else d**-2 for d in scaled],
        color=_ORANGE,
        linewidth=1.2,
        label="signal-to-noise ratio grows with N",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([*n, 2 * n[-1], 4 * n[-1]])
    axes.set_xticklabels([f"{m:,.0f}" for m in (*n, 2 * n[-1], 4 * n[-1])])
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-6), high)
    ticks = np.linspace(max(low, 1e-6), high, 6)
    axes.set_yticks(ticks)
    axes.set_yticklabels([f"{tick**-0.5:.2f}" for tick in ticks])
    axes.set_xlabel("particles", fontsize=9)
    axes.set_ylabel("resolution / Å (scale of 1/d²)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    b_factor = curve.b_factor_angstrom2
    growth = "no gain with N" if b_factor is None else f"B = {b_factor:.0f} Å²"
    axes.set_title(f"{title}  {growth}".strip(), fontsize=11)
    _save(figure, path)


def view_histogram(
    views: Float[Tensor, "n 3"], order: int = VIEW_ORDER
) -> tuple[Float[Tensor, "v 3"], NDArray[np.int64]]:
    """Return HEALPix directions and how many views fall nearest to each."""
    directions = healpix_directions(order)
    pixels = healpix_pixel(torch.nn.functional.normalize(views.float(), dim=-1), 2**order)
    return directions, np.bincount(pixels.numpy(), minlength=len(directions))


def _verdict(diagnostics: OrientationDiagnostics) -> str:
    parts = [f"cFAR {diagnostics.cfar:.2f}"]
    if diagnostics.cfar_null is not None:
        parts.append(f"(isotropic maps like these: {diagnostics.cfar_null:.2f})")
    if diagnostics.scf_star is not None:
        parts.append(f"SCF* {diagnostics.scf_star:.2f}")
    return "  ".join(parts)


def _draw_fan(axes: Any, diagnostics: OrientationDiagnostics) -> None:  # noqa: ANN401 - matplotlib is untyped
    box_angstrom = diagnostics.box_px * diagnostics.pixel_size_angstrom
    mean, sd = diagnostics.cfsc_mean.numpy(), diagnostics.cfsc_sd.numpy()
    frequency = np.arange(len(mean)) / box_angstrom
    low, high = diagnostics.cfsc_min.numpy(), diagnostics.cfsc_max.numpy()
    axes.fill_between(frequency, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="minimum to maximum")
    axes.fill_between(
        frequency, mean - sd, mean + sd, color=_BLUE, alpha=0.35, linewidth=0, label="mean ± SD"
    )
    axes.plot(frequency, mean, color=_BLUE, linewidth=1.8, label="mean of directions")
    axes.plot(frequency, diagnostics.global_fsc.numpy(), color="black", linewidth=1.0, label="global FSC")
    axes.plot(frequency, diagnostics.fso.numpy(), ":", color=_ORANGE, linewidth=1.4, label="FSO")
    _draw_threshold(axes, GOLD_STANDARD_THRESHOLD)
    axes.set_title("conical FSC, 20° half-angle", fontsize=10)
    _finish_curves(axes, float(frequency[-1]))


def _draw_resolution_histogram(axes: Any, diagnostics: OrientationDiagnostics) -> None:  # noqa: ANN401
    """Crossings fall on shells, so shells are the bins."""
    box_angstrom = diagnostics.box_px * diagnostics.pixel_size_angstrom
    shell = torch.round(box_angstrom / diagnostics.direction_resolution_angstrom).long().numpy()
    counts = np.bincount(shell, minlength=diagnostics.box_px // 2 + 1)
    axes.bar(
        np.arange(len(counts)) / box_angstrom, counts / counts.sum(), width=0.9 / box_angstrom, color=_BLUE
    )
    axes.set_ylabel("share of directions", fontsize=9)
    axes.set_title(
        f"crossing of 0.143: {diagnostics.worst_resolution_angstrom:.1f} Å (worst) to "
        f"{diagnostics.best_resolution_angstrom:.1f} Å (best)",
        fontsize=10,
    )
    _angstrom_ticks(axes, (diagnostics.box_px // 2) / box_angstrom)


def _draw_views(figure: Figure, axes: Any, diagnostics: OrientationDiagnostics) -> None:  # noqa: ANN401
    views = diagnostics.views if diagnostics.views is not None else torch.zeros(0, 3)
    directions, counts = view_histogram(views)
    image = _draw_sphere(axes, directions, counts.astype(float), "magma", VIEW_ORDER)
    figure.colorbar(
        image, ax=axes, orientation="horizontal", shrink=0.7, pad=0.08, label="particles per 7° bin"
    )
    axes.set_title(f"views of {len(views)} particles", fontsize=10)


def _draw_relative_signal(figure: Figure, axes: Any, diagnostics: OrientationDiagnostics) -> None:  # noqa: ANN401
    directions = torch.cat((diagnostics.directions, -diagnostics.directions))
    values = torch.cat([diagnostics.relative_signal] * 2).numpy()
    image = _draw_sphere(axes, directions, values, "viridis", 4)
    figure.colorbar(
        image, ax=axes, orientation="horizontal", shrink=0.7, pad=0.08, label="below 1: views are missed"
    )
    axes.set_title("relative signal by view (icestream)", fontsize=10)


def _draw_sphere(
    axes: Any,  # noqa: ANN401
    directions: Float[Tensor, "v 3"],
    values: NDArray[np.floating[Any]],
    colours: str,
    order: int,
) -> Any:  # noqa: ANN401
    """Paint values of HEALPix centres on a Mollweide map, each pixel of the picture by its nearest centre."""
    longitude = np.radians(np.linspace(-180, 180, 181))
    latitude = np.radians(np.linspace(-90, 90, 91))
    middle_lon, middle_lat = 0.5 * (longitude[1:] + longitude[:-1]), 0.5 * (latitude[1:] + latitude[:-1])
    lon, lat = np.meshgrid(middle_lon, middle_lat)
    points = np.stack((np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)), axis=-1)
    of_pixel = np.zeros(len(directions))
    of_pixel[healpix_pixel(directions, 2**order).numpy()] = values
    pixel = healpix_pixel(torch.from_numpy(points.reshape(-1, 3)), 2**order).numpy()
    image = axes.pcolormesh(
        longitude, latitude, of_pixel[pixel].reshape(lon.shape), cmap=colours, rasterized=True
    )
    axes.set_xticklabels([])
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, linewidth=0.3)
    return image


def _draw_threshold(axes: Any, threshold: float) -> None:  # noqa: ANN401
    axes.axhline(threshold, color="black", linewidth=0.7, linestyle="--")
    axes.text(0.005, threshold + 0.015, f"{threshold:.3g}", fontsize=8, transform=axes.get_yaxis_transform())


def _finish_curves(axes: Any, highest_per_angstrom: float) -> None:  # noqa: ANN401
    axes.axhline(0.0, color="black", linewidth=0.5)
    axes.set_ylim(-0.1, 1.05)
    axes.set_ylabel("correlation", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    _angstrom_ticks(axes, highest_per_angstrom)


def _angstrom_ticks(axes: Any, highest_per_angstrom: float) -> None:  # noqa: ANN401
    """Label the axis of spatial frequency in Å, which is how people read it."""
    axes.set_xlim(0.0, highest_per_angstrom)
    ticks = np.linspace(0.0, highest_per_angstrom, 7)[1:]
    axes.set_xticks(ticks)
    axes.set_xticklabels([f"{1.0 / tick:.1f}" for tick in ticks])
    axes.set_xlabel("resolution / Å", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_scale_bar(axes: Any, size_px: int, pixel_size_angstrom: float) -> None:  # noqa: ANN401
    """Draw a bar of 1, 2 or 5 times a power of ten Å, about a quarter of the box."""
    target = 0.25 * size_px * pixel_size_angstrom
    decade = 10.0 ** math.floor(math.log10(target))
    length = max(step * decade for step in (1, 2, 5) if step * decade <= target)
    left, low = 0.05 * size_px, 0.06 * size_px
    axes.plot([left, left + length / pixel_size_angstrom], [low, low], color="white", linewidth=2.5)
    axes.text(left, low + 0.02 * size_px, f"{length:g} Å", color="white", fontsize=8)


def _figure(width_in: float, height_in: float) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The software stamp would make equal pictures differ between versions.
    figure.savefig(path, format="png", metadata={"Software": None})
