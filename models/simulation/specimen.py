"""What lies under the beam: particles with poses and heights, ice, junk. Draws only; nothing is rendered here.

Positions are (y, x) in px of the unbinned frame; heights are Å above the middle of the ice, along the beam
(a particle at height h has the micrograph's defocus minus h). Heights fall on layers `LAYER_ANGSTROM` apart,
so that each layer is imaged with its exact CTF.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch

from models.fourier.rotations import matrix_to_euler
from models.simulation.settings import SpecimenSettings

FloatArray = npt.NDArray[np.float64]

LAYER_ANGSTROM = 40.0
"""Spacing of layers: the phase error of half a layer at 3 Å and 300 kV would be 0.14 rad, and truth has none."""


class JunkKind(Enum):
    """What is not a particle."""

    ICE_CRYSTAL = "ice_crystal"
    AGGREGATE = "aggregate"
    CARBON = "carbon"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Junk:
    """One junk object: its centre, the radius it spoils, its angle (of the edge's normal) in degrees.

    For `CARBON` and `EMPTY` the object is the half-plane beyond the line through (y, x) with that normal.
    """

    kind: JunkKind
    y_px: float
    x_px: float
    radius_px: float
    angle_deg: float

    def signed_distance_px(self, y: npt.ArrayLike, x: npt.ArrayLike) -> FloatArray:
        """Return the distance to the object's edge; negative inside."""
        dy, dx = np.asarray(y) - self.y_px, np.asarray(x) - self.x_px
        if self.kind in (JunkKind.CARBON, JunkKind.EMPTY):
            angle = math.radians(self.angle_deg)
            return np.asarray(-(dx * math.cos(angle) + dy * math.sin(angle)))
        return np.asarray(np.hypot(dy, dx) - self.radius_px)


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """One exposure's specimen; row i of every array is particle i.

    `coordinates_yx_px` may lie outside the frame by up to a particle's radius (they are cut by the border).
    """

    coordinates_yx_px: FloatArray
    euler_deg: FloatArray
    height_angstrom: FloatArray
    junk: tuple[Junk, ...]
    ice_thickness_angstrom: float
    ice_slope_yx: tuple[float, float]

    @property
    def n_particles(self) -> int:
        """Number of particles, those beyond the border included."""
        return len(self.coordinates_yx_px)


def draw_specimen(
    settings: SpecimenSettings,
    *,
    shape_yx_px: tuple[int, int],
    pixel_size_angstrom: float,
    diameter_angstrom: float,
    session_views: FloatArray,
    rng: np.random.Generator,
) -> Specimen:
    """Draw one exposure's particles and junk."""
    thickness = float(rng.uniform(*settings.ice_thickness_angstrom))
    thickness = max(thickness, 0.8 * diameter_angstrom)
    direction = float(rng.uniform(0.0, 2.0 * math.pi))
    slope = settings.ice_gradient * float(rng.uniform(0.2, 1.0))
    diameter_px = diameter_angstrom / pixel_size_angstrom
    junk = _draw_junk(settings, shape_yx_px, pixel_size_angstrom, diameter_px, rng)
    margin = 0.5 * diameter_px
    area = (shape_yx_px[0] + 2 * margin) * (shape_yx_px[1] + 2 * margin) / (shape_yx_px[0] * shape_yx_px[1])
    wanted = float(np.clip(rng.normal(1.0, 0.12), 0.76, 1.24)) * settings.particles_per_exposure * area
    coordinates = place_particles(
        round(wanted),
        shape_yx_px=shape_yx_px,
        margin_px=margin,
        spacing_px=settings.min_spacing_diameters * diameter_px,
        junk=junk,
        rng=rng,
    )
    n = len(coordinates)
    room = max(0.0, 0.5 * (thickness - diameter_angstrom))
    heights = np.round(rng.uniform(-room, room, size=n) / LAYER_ANGSTROM) * LAYER_ANGSTROM
    return Specimen(
        coordinates_yx_px=coordinates,
        euler_deg=draw_poses(n, settings, session_views, rng),
        height_angstrom=heights,
        junk=junk,
        ice_thickness_angstrom=thickness,
        ice_slope_yx=(slope * math.sin(direction), slope * math.cos(direction)),
    )


def draw_views(n_views: int, rng: np.random.Generator) -> FloatArray:
    """Return unit vectors, uniform on the sphere: the preferred view directions of a session."""
    views = rng.normal(size=(n_views, 3))
    return np.asarray(views / np.linalg.norm(views, axis=1, keepdims=True), dtype=np.float64)


def draw_poses(
    n: int, settings: SpecimenSettings, preferred_views: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Return (rot, tilt, psi) in degrees; the in-plane angle psi is always uniform.

    A preferred view is a direction in the specimen's frame (R's third row), scattered by a Gaussian of
    `preferred_spread_deg` about its centre.
    """
    views = draw_views(n, rng)
    is_preferred = rng.random(n) < settings.preferred_fraction
    chosen = preferred_views[rng.integers(len(preferred_views), size=n)]
    scatter = rng.normal(size=(n, 3)) * math.tan(math.radians(settings.preferred_spread_deg))
    near = chosen + scatter
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    views = np.where(is_preferred[:, None], near, views)
    tilt = np.degrees(np.arccos(np.clip(views[:, 2], -1.0, 1.0)))
    rot = np.degrees(np.arctan2(views[:, 1], views[:, 0]))
    psi = rng.uniform(-180.0, 180.0, size=n)
    return np.stack((rot, tilt, psi), axis=1)


def place_particles(
    n_wanted: int,
    *,
    shape_yx_px: tuple[int, int],
    margin_px: float,
    spacing_px: float,
    junk: tuple[Junk, ...],
    rng: np.random.Generator,
) -> FloatArray:
    """Return up to `n_wanted` centres no nearer to each other than `spacing_px`, and off the junk.

    Random sequential placement on a cell grid; it ends early when no room is found in 40 tries.
    """
    cells: dict[tuple[int, int], list[tuple[float, float]]] = {}
    low, high = -margin_px, (shape_yx_px[0] + margin_px, shape_yx_px[1] + margin_px)
    placed: list[tuple[float, float]] = []
    for _ in range(n_wanted):
        for _ in range(40):
            y, x = float(rng.uniform(low, high[0])), float(rng.uniform(low, high[1]))
            if any(float(item.signed_distance_px(y, x)) < 0.5 * spacing_px for item in junk):
                continue
            cell = (math.floor(y / spacing_px), math.floor(x / spacing_px))
            near = (
                p for a in (-1, 0, 1) for b in (-1, 0, 1) for p in cells.get((cell[0] + a, cell[1] + b), ())
            )
            if all(math.hypot(y - py, x - px) >= spacing_px for py, px in near):
                cells.setdefault(cell, []).append((y, x))
                placed.append((y, x))
                break
    return np.array(placed, dtype=np.float64).reshape(-1, 2)


def _draw_junk(
    settings: SpecimenSettings,
    shape_yx_px: tuple[int, int],
    pixel_size_angstrom: float,
    diameter_px: float,
    rng: np.random.Generator,
) -> tuple[Junk, ...]:
    junk: list[Junk] = []
    height, width = shape_yx_px
    edge_draw = float(rng.random())
    if edge_draw < settings.junk_fraction:
        kind = JunkKind.CARBON if edge_draw < 0.6 * settings.junk_fraction else JunkKind.EMPTY
        angle = float(rng.uniform(-180.0, 180.0))
        reach = float(rng.uniform(0.15, 0.4)) * min(shape_yx_px)
        y = 0.5 * height + math.sin(math.radians(angle)) * reach
        x = 0.5 * width + math.cos(math.radians(angle)) * reach
        junk.append(Junk(kind=kind, y_px=y, x_px=x, radius_px=0.5 * min(shape_yx_px), angle_deg=angle))
    n_objects = int(rng.poisson(settings.junk_fraction * settings.particles_per_exposure))
    for _ in range(n_objects):
        is_crystal = rng.random() < 0.5
        radius = (
            float(rng.uniform(80.0, 260.0)) / pixel_size_angstrom
            if is_crystal
            else float(rng.uniform(0.8, 1.8)) * diameter_px
        )
        junk.append(
            Junk(
                kind=JunkKind.ICE_CRYSTAL if is_crystal else JunkKind.AGGREGATE,
                y_px=float(rng.uniform(0.0, height)),
                x_px=float(rng.uniform(0.0, width)),
                radius_px=min(radius, 0.25 * min(shape_yx_px)),
                angle_deg=float(rng.uniform(-180.0, 180.0)),
            )
        )
    return tuple(junk)


def random_rotations(n: int, rng: np.random.Generator) -> FloatArray:
    """Return Euler angles (rot, tilt, psi) in degrees, uniform on SO(3)."""
    q = rng.normal(size=(n, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    matrices = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    return np.asarray(matrix_to_euler(torch.from_numpy(matrices)).numpy(), dtype=np.float64)
