"""Template picking: projections of a map, with the micrograph's CTF, turned in the plane, on a binned micrograph.

The map is low-passed to 20 Å or worse, so that finer detail cannot be picked into the particles, and scores are
calibrated for the number of templates (`calibration.py`): noise alone gives as few picks as a single template
would. Templates depend on the map alone and are made once; each micrograph's CTF is applied to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from models.fourier.filters import low_pass_filter, squared_frequencies
from models.fourier.point_groups import symmetry_matrices
from models.fourier.rotations import euler_to_matrix
from models.fourier.transforms import centred_irfft2, centred_rfft2, good_size
from models.fourier.volumes import resample_volume
from models.optics.ctf import frequency_grid
from models.picking.blob import DEFAULT_THRESHOLD
from models.picking.calibration import calibrate_on_noise
from models.picking.correlation import CONTAMINATION_SD, TemplateBank, coarsen_micrograph, correlate
from models.picking.maxima import Picks, find_maxima
from models.simulation.projection import Projector

Ctf = Callable[[Float[Tensor, "h wr"], Float[Tensor, "h wr"]], Float[Tensor, "h wr"]]
"""The CTF at frequencies (ky, kx) in 1/Å, positive at low frequency (`evaluate_ctf` less its parameters)."""

# A template's support ends at this many radii: the surround tells a particle from a slope, but is not a neighbour.
_SUPPORT = 1.3
# The finest detail of templates: that of no map is better known than this when a session begins.
_MIN_LOW_PASS_ANGSTROM = 20.0
# Pixels per low-pass period, a little above Nyquist's 2.
_OVERSAMPLING = 2.4
# Views nearer than this look alike at a seventh of a diameter.
_MIN_VIEW_SPACING_DEG = 15.0
_NOISE_SIDE_PX = 288


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePickSettings:
    """Where picks may be; lengths in Å, `threshold` a calibrated z-score (safe: 2-4), as for blobs."""

    threshold: float = DEFAULT_THRESHOLD
    min_distance_angstrom: float | None = None
    max_picks: int = 2000
    border_angstrom: float = 0.0
    contamination_sd: float = CONTAMINATION_SD


@dataclass(frozen=True, slots=True, kw_only=True)
class MapTemplates:
    """Projections `(t, n, n)` of a map without CTF, protein white; row i shows `view[i]` turned by `in_plane_deg[i]`.

    `diameter_angstrom` is the particle's; the box is twice as wide, which leaves room for the CTF's rings.
    """

    images: Float[Tensor, "t n n"]
    view: NDArray[np.int64]
    in_plane_deg: NDArray[np.float32]
    pixel_size_angstrom: float
    diameter_angstrom: float
    low_pass_angstrom: float

    @property
    def n_views(self) -> int:
        """Number of view directions."""
        return int(self.view.max()) + 1


def make_templates(
    volume: Float[Tensor, "d d d"],
    pixel_size_angstrom: float,
    *,
    diameter_angstrom: float,
    symmetry: str = "C1",
    n_views: int = 40,
    in_plane_step_deg: float = 10.0,
    low_pass_angstrom: float | None = None,
) -> MapTemplates:
    """Project a map (protein positive) over the asymmetric unit and all turns in the plane.

    The map is cut to a soft sphere of the diameter and low-passed to `low_pass_angstrom` (None: a seventh of the
    diameter, at least 20 Å). There are at most `n_views` views, no nearer than 15°. Raises ValueError for a
    low pass that leaves fewer than four periods over the diameter, and for a map without contrast.
    """
    low_pass = low_pass_angstrom or max(_MIN_LOW_PASS_ANGSTROM, diameter_angstrom / 7.0)
    if not 2.0 * pixel_size_angstrom <= low_pass <= 0.5 * diameter_angstrom:
        raise ValueError(
            f"low_pass_angstrom: {low_pass:g}, must lie between two voxels ({2.0 * pixel_size_angstrom:g} Å) "
            f"and half of the diameter ({0.5 * diameter_angstrom:g} Å)"
        )
    pixel = max(low_pass / _OVERSAMPLING, pixel_size_angstrom)
    box = good_size(2 * math.ceil(diameter_angstrom / pixel) + 4)
    coarse = resample_volume(volume, pixel_size_angstrom, pixel, box) * _soft_sphere(
        box, 0.55 * diameter_angstrom / pixel
    )
    if float(coarse.std()) <= 0.0:
        raise ValueError("volume: the same value throughout, a map has contrast")
    views = asymmetric_views(symmetry, n_views)
    turns = np.arange(0.0, 360.0, in_plane_step_deg)
    view, turn = (a.ravel() for a in np.meshgrid(np.arange(len(views)), turns, indexing="ij"))
    euler = np.stack([views[view, 0], views[view, 1], turn], axis=1)
    matrices = euler_to_matrix(torch.from_numpy(euler)).float()
    images = Projector(coarse, pixel).project(matrices)
    filtered = centred_rfft2(images) * low_pass_filter(squared_frequencies((box, box), pixel), low_pass)
    return MapTemplates(
        images=centred_irfft2(filtered, (box, box)),
        view=view.astype(np.int64),
        in_plane_deg=turn.astype(np.float32),
        pixel_size_angstrom=pixel,
        diameter_angstrom=diameter_angstrom,
        low_pass_angstrom=low_pass,
    )


def asymmetric_views(symmetry: str, n_views: int) -> NDArray[np.float64]:
    """Return (rot, tilt) in degrees of about `n_views` directions, even over the group's asymmetric unit.

    The unit holds the directions that are nearer to a fixed one than their symmetry mates are (a Dirichlet
    cell); of a golden-angle spiral over the whole sphere those inside it are kept.
    """
    group = symmetry_matrices(symmetry).double().numpy()
    spacing = math.radians(_MIN_VIEW_SPACING_DEG)
    wanted = max(1, min(n_views, math.ceil(4.0 * math.pi / (len(group) * spacing**2))))
    n = wanted * len(group)
    i = np.arange(n)
    z = 1.0 - 2.0 * (i + 0.5) / n
    azimuth = i * math.pi * (3.0 - math.sqrt(5.0))
    radius = np.sqrt(1.0 - z * z)
    points = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), z], axis=1)
    # a direction on no symmetry axis or mirror of any group
    anchor = np.array([0.479, 0.311, 0.821])
    mates = np.einsum("gij,nj->gni", group, points) @ anchor
    inside = points[mates[0] >= mates.max(axis=0) - 1e-9]
    tilt = np.degrees(np.arccos(np.clip(inside[:, 2], -1.0, 1.0)))
    rot = np.degrees(np.arctan2(inside[:, 1], inside[:, 0]))
    return np.stack([rot, tilt], axis=1)


def _soft_sphere(box_px: int, radius_px: float) -> Float[Tensor, "n n n"]:
    """Return 1 inside the radius, falling to 0 over the next sixth of it."""
    axis = torch.arange(box_px, dtype=torch.float32) - box_px // 2
    r = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    fall = ((r - radius_px) / max(radius_px / 6.0, 1.0)).clamp(0.0, 1.0)
    return 0.5 + 0.5 * torch.cos(math.pi * fall)


def template_bank(templates: MapTemplates, ctf: Ctf | None) -> TemplateBank:
    """Return the templates as this CTF images them, on the support that they are compared over."""
    images, box = templates.images, int(templates.images.shape[-1])
    if ctf is not None:
        ky, kx = frequency_grid((box, box), templates.pixel_size_angstrom)
        images = centred_irfft2(centred_rfft2(images) * ctf(ky, kx), (box, box))
    radius = _SUPPORT * 0.5 * templates.diameter_angstrom / templates.pixel_size_angstrom
    half, middle = math.ceil(radius), box // 2
    axis = torch.arange(-half, half + 1, dtype=torch.float32)
    cut = slice(middle - half, middle + half + 1)
    return TemplateBank(
        templates=images[:, cut, cut],
        support=axis.square()[:, None] + axis.square()[None, :] <= radius**2,
    )


def pick_templates(
    micrograph: Float[Tensor, "h w"],
    pixel_size_angstrom: float,
    templates: MapTemplates,
    ctf: Ctf | None,
    settings: TemplatePickSettings,
) -> Picks:
    """Pick what looks like the templates; the correlation runs on the micrograph's device."""
    if pixel_size_angstrom > 1.2 * templates.pixel_size_angstrom:
        raise ValueError(
            f"pixel_size_angstrom: {pixel_size_angstrom}, must not exceed the templates' "
            f"({templates.pixel_size_angstrom:.3g} Å)"
        )
    coarse = coarsen_micrograph(
        micrograph,
        pixel_size_angstrom,
        coarse_pixel_angstrom=templates.pixel_size_angstrom,
        diameter_angstrom=templates.diameter_angstrom,
        contamination_sd=settings.contamination_sd,
    )
    pixel = coarse.pixel_size_angstrom
    on_cpu = template_bank(templates, ctf)
    device = micrograph.device
    bank = TemplateBank(templates=on_cpu.templates.to(device), support=on_cpu.support.to(device))
    calibration = calibrate_on_noise(
        lambda noise: correlate(noise, bank)[0],
        diameter_px=templates.diameter_angstrom / pixel,
        n_support_px=float(bank.support.sum()),
        side_px=_NOISE_SIDE_PX,
        device=device,
    )
    response, which = (found.cpu() for found in correlate(coarse.flat, bank))
    distance = settings.min_distance_angstrom or 0.75 * templates.diameter_angstrom
    maxima = find_maxima(
        response,
        coarse.mask,
        threshold=calibration.raw_threshold(settings.threshold),
        min_distance_px=distance / pixel,
        border_px=settings.border_angstrom / pixel,
        max_picks=settings.max_picks,
    )
    best = which.numpy()[maxima.pixels_yx[:, 0], maxima.pixels_yx[:, 1]]
    return Picks(
        centres_yx_px=(maxima.centres_yx * np.asarray(coarse.scale_yx)).astype(np.float32),
        scores=calibration.calibrate(maxima.values).astype(np.float32),
        diameters_angstrom=np.full(len(best), templates.diameter_angstrom, dtype=np.float32),
        mask=coarse.mask.numpy(),
        template_index=templates.view[best],
        in_plane_deg=templates.in_plane_deg[best],
    )
