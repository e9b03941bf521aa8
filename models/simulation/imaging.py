"""From specimen to the exit image: layers of potential, each with its CTF, summed as weak-phase contrast.

Contrast c is defined by I = T (1 + c), T the smooth transmission of ice and carbon. For a weak phase object
c = -2 σ Σ_layers CTF_layer * V_layer with σ the interaction constant in rad/(V Å) and V the projected
potential *difference* to ice in V Å (Kirkland 2010, eq. 3.74; sign as in CryoGEM eq. 8: protein is dark).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.rotations import euler_to_matrix
from models.fourier.transforms import good_size
from models.optics.ctf import electron_wavelength_angstrom, evaluate_ctf, frequency_grid
from models.simulation.projection import Projector
from models.simulation.settings import MicroscopeSettings, SpecimenSettings
from models.simulation.specimen import LAYER_ANGSTROM, Junk, JunkKind, Specimen, random_rotations
from models.simulation.structure import POTENTIAL_PER_SCATTERING_V_ANGSTROM2, form_factor

ICE_MOLECULES_PER_ANGSTROM3 = 0.0311
CARBON_ATOMS_PER_ANGSTROM3 = 0.09
ICE_MEAN_FREE_PATH_ANGSTROM = 3100.0
"""Inelastic mean free path in ice at 300 kV with an energy filter (Rice et al. 2018: 3000-4000 Å)."""

_MIN_CONTRAST, _MAX_CONTRAST = -0.95, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CtfTruth:
    """The micrograph's CTF at the middle of the ice; underfocus positive, u ≥ v, angle from x to u."""

    defocus_u_angstrom: float
    defocus_v_angstrom: float
    astigmatism_angle_deg: float
    phase_shift_deg: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitImage:
    """The still picture of an exposure on a canvas larger than the frame by `margin_px` on every side."""

    contrast: Float[Tensor, "h w"]
    transmission: Float[Tensor, "h w"]
    margin_px: int


def interaction_constant_rad_per_v_angstrom(voltage_kv: float) -> float:
    """Return σ = 2π m e λ / h²: 6.53e-4 rad/(V Å) at 300 kV, 7.29e-4 at 200 kV."""
    wavelength = electron_wavelength_angstrom(voltage_kv)
    energy = voltage_kv * 1e3
    rest = 510998.95
    return 2.0 * math.pi / (wavelength * energy) * (rest + energy) / (2.0 * rest + energy)


def render_exit_image(
    specimen: Specimen,
    projector: Projector,
    ctf: CtfTruth,
    specimen_settings: SpecimenSettings,
    settings: MicroscopeSettings,
    *,
    margin_px: int,
    rng: np.random.Generator,
) -> ExitImage:
    """Render particles, ice, carbon and junk; `rng` draws the amorphous structure and junk's poses."""
    shape = (
        good_size(settings.shape_yx_px[0] + 2 * margin_px),
        good_size(settings.shape_yx_px[1] + 2 * margin_px),
    )
    pixel = settings.pixel_size_angstrom
    ky, kx = frequency_grid(shape, pixel)
    k2 = ky.square() + kx.square()
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    thickness = _thickness_map(specimen, shape, margin_px, settings.shape_yx_px)
    carbon = _half_plane(specimen.junk, JunkKind.CARBON, shape, margin_px, softness_px=20.0 / pixel)
    layers = _particle_layers(specimen, projector, specimen_settings.contrast, shape, margin_px)
    junk = _junk_potential(specimen, projector, shape, margin_px, pixel, rng, generator)
    heights = sorted({*layers, *_ice_heights(specimen.ice_thickness_angstrom)})
    ice_heights = _ice_heights(specimen.ice_thickness_angstrom)
    ice_amplitude = _ice_amplitude(k2, pixel) * specimen_settings.ice_granularity
    total = torch.zeros(k2.shape, dtype=torch.complex64)
    for height in heights:
        layer = layers.get(height)
        spectrum = torch.zeros_like(total) if layer is None else torch.fft.rfft2(layer)
        if height in ice_heights and specimen_settings.ice_granularity > 0:
            spectrum = spectrum + _ice_layer(thickness / len(ice_heights), ice_amplitude, generator)
        if height == ice_heights[0]:
            spectrum = spectrum + torch.fft.rfft2(junk)
            if carbon is not None:
                spectrum = spectrum + _carbon_layer(carbon, k2, pixel, generator)
        total += spectrum * evaluate_ctf(
            ky,
            kx,
            defocus_u_angstrom=ctf.defocus_u_angstrom - height,
            defocus_v_angstrom=ctf.defocus_v_angstrom - height,
            astigmatism_angle_deg=ctf.astigmatism_angle_deg,
            voltage_kv=settings.voltage_kv,
            cs_mm=settings.cs_mm,
            amplitude_contrast=settings.amplitude_contrast,
            phase_shift_deg=ctf.phase_shift_deg,
        )
    total = total * torch.exp(-0.25 * settings.b_factor_angstrom2 * k2)
    sigma = interaction_constant_rad_per_v_angstrom(settings.voltage_kv)
    contrast = -2.0 * sigma * torch.fft.irfft2(total, s=shape)
    absorbed = thickness / ICE_MEAN_FREE_PATH_ANGSTROM
    if carbon is not None:
        absorbed = absorbed + 0.25 * carbon
    return ExitImage(
        contrast=contrast.clamp(_MIN_CONTRAST, _MAX_CONTRAST),
        transmission=torch.exp(-absorbed),
        margin_px=margin_px,
    )


def _ice_heights(thickness_angstrom: float) -> list[float]:
    n = max(1, round(thickness_angstrom / (2.0 * LAYER_ANGSTROM)))
    half = (n - 1) // 2
    return [2.0 * LAYER_ANGSTROM * (i - half) for i in range(n)]


def _canvas_axes(shape: tuple[int, int], margin_px: int) -> tuple[Tensor, Tensor]:
    """Return the frame's coordinates (y column, x row) of every canvas pixel."""
    y = torch.arange(shape[0], dtype=torch.float32) - margin_px
    x = torch.arange(shape[1], dtype=torch.float32) - margin_px
    return y[:, None], x[None, :]


def _thickness_map(
    specimen: Specimen, shape: tuple[int, int], margin_px: int, frame_yx_px: tuple[int, int]
) -> Float[Tensor, "h w"]:
    """Return the ice's thickness in Å: a slope across the frame, and almost none in an empty area."""
    y, x = _canvas_axes(shape, margin_px)
    slope_y, slope_x = specimen.ice_slope_yx
    relative = 1.0 + slope_y * (y / frame_yx_px[0] - 0.5) + slope_x * (x / frame_yx_px[1] - 0.5)
    thickness = specimen.ice_thickness_angstrom * relative.clamp_min(0.05)
    empty = _half_plane(specimen.junk, JunkKind.EMPTY, shape, margin_px, softness_px=40.0)
    return thickness if empty is None else thickness * (1.0 - 0.9 * empty)


def _half_plane(
    junk: tuple[Junk, ...], kind: JunkKind, shape: tuple[int, int], margin_px: int, *, softness_px: float
) -> Float[Tensor, "h w"] | None:
    """Return a map that is 1 inside the junk's half-plane and 0 outside, or None where there is none."""
    y, x = _canvas_axes(shape, margin_px)
    for item in junk:
        if item.kind is kind:
            angle = math.radians(item.angle_deg)
            depth = (x - item.x_px) * math.cos(angle) + (y - item.y_px) * math.sin(angle)
            return torch.sigmoid(4.0 * depth / softness_px)
    return None


def _particle_layers(
    specimen: Specimen, projector: Projector, contrast: float, shape: tuple[int, int], margin_px: int
) -> dict[float, Tensor]:
    """Return projected potentials (V Å) by height."""
    layers: dict[float, Tensor] = {}
    if not specimen.n_particles or contrast == 0.0:
        return layers
    for start in range(0, specimen.n_particles, 32):
        part = slice(start, start + 32)
        matrices = euler_to_matrix(torch.from_numpy(specimen.euler_deg[part])).float()
        place = torch.from_numpy(specimen.coordinates_yx_px[part]) + margin_px
        whole = place.floor()
        images = contrast * projector.project(matrices, (place - whole).float())
        for image, corner, height in zip(
            images, whole.long().tolist(), specimen.height_angstrom[part].tolist(), strict=True
        ):
            if height not in layers:
                layers[height] = torch.zeros(shape)
            add_patch(layers[height], image, corner[0], corner[1])
    return layers


def add_patch(canvas: Tensor, patch: Tensor, centre_y: int, centre_x: int) -> None:
    """Add a patch with its middle pixel at the given canvas pixel, in place, cut at the border."""
    size = patch.shape[0]
    top, left = centre_y - size // 2, centre_x - size // 2
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(canvas.shape[0], top + size), min(canvas.shape[1], left + size)
    if y0 < y1 and x0 < x1:
        canvas[y0:y1, x0:x1] += patch[y0 - top : y1 - top, x0 - left : x1 - left]


def _ice_amplitude(k2: Tensor, pixel_size_angstrom: float) -> Tensor:
    """Return the amplitude per pixel (V Å for 1 Å of ice) of the projected potential of vitreous ice.

    Random molecules would scatter as f²; liquid-like order multiplies by the structure factor S(k): 0.07 at
    low frequency, a peak at 1/3.7 Å, 1 far out.
    """
    molecule = form_factor(8, k2) + 2.0 * form_factor(1, k2)
    k = k2.sqrt()
    structure = 0.07 + 0.93 * torch.sigmoid((k - 0.24) / 0.015) + 0.7 * torch.exp(-(((k - 0.27) / 0.02) ** 2))
    power = ICE_MOLECULES_PER_ANGSTROM3 * structure / pixel_size_angstrom**2
    return POTENTIAL_PER_SCATTERING_V_ANGSTROM2 * molecule * power.sqrt()


def _ice_layer(thickness: Tensor, amplitude: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(thickness.shape, generator=generator) * thickness.sqrt()
    spectrum: Tensor = torch.fft.rfft2(noise) * amplitude
    return spectrum


def _carbon_layer(
    carbon: Tensor, k2: Tensor, pixel_size_angstrom: float, generator: torch.Generator
) -> Tensor:
    """Return the spectrum of 150 Å of amorphous carbon, granular, with its mean potential's step."""
    thickness = 150.0
    power = CARBON_ATOMS_PER_ANGSTROM3 * thickness * 0.4 / pixel_size_angstrom**2
    amplitude = POTENTIAL_PER_SCATTERING_V_ANGSTROM2 * form_factor(6, k2) * math.sqrt(power)
    noise = torch.fft.rfft2(torch.randn(carbon.shape, generator=generator) * carbon)
    spectrum: Tensor = noise * amplitude + torch.fft.rfft2(carbon * (4.0 * thickness))
    return spectrum


def _junk_potential(
    specimen: Specimen,
    projector: Projector,
    shape: tuple[int, int],
    margin_px: int,
    pixel_size_angstrom: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Float[Tensor, "h w"]:
    """Return the projected potential (V Å) of ice crystals and aggregates."""
    canvas = torch.zeros(shape)
    y, x = _canvas_axes(shape, margin_px)
    for item in specimen.junk:
        if item.kind is JunkKind.ICE_CRYSTAL:
            canvas += _ice_crystal(item, y, x, pixel_size_angstrom, rng, generator)
        elif item.kind is JunkKind.AGGREGATE:
            n = int(rng.integers(5, 14))
            euler = torch.from_numpy(random_rotations(n, rng))
            offsets = rng.normal(size=(n, 2)) * 0.4 * item.radius_px
            for image, offset in zip(
                projector.project(euler_to_matrix(euler).float()), offsets.tolist(), strict=True
            ):
                add_patch(
                    canvas,
                    image,
                    round(item.y_px + offset[0]) + margin_px,
                    round(item.x_px + offset[1]) + margin_px,
                )
    return canvas


def _ice_crystal(
    item: Junk,
    y: Tensor,
    x: Tensor,
    pixel_size_angstrom: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """Return a lumpy dome of crystalline ice (V Å), with lattice fringes where the pixels resolve them."""
    dy, dx = y - item.y_px, x - item.x_px
    bearing = torch.atan2(dy, dx)
    radius = torch.full_like(bearing, item.radius_px)
    for lobe in (2, 3, 5):
        radius = radius * (
            1.0 + float(rng.uniform(0.0, 0.15)) * torch.cos(lobe * bearing + float(rng.uniform(0.0, 6.28)))
        )
    dome = (1.0 - (dy.square() + dx.square()) / radius.square()).clamp_min(0.0).sqrt()
    height = float(rng.uniform(80.0, 300.0))
    potential = 4.3 * height * dome
    spacing_px = 3.9 / pixel_size_angstrom
    if spacing_px > 2.0:
        angle = math.radians(item.angle_deg)
        wave = (dx * math.cos(angle) + dy * math.sin(angle)) * (2.0 * math.pi / spacing_px)
        potential = potential * (1.0 + 0.25 * torch.cos(wave))
    return potential * (1.0 + 0.05 * torch.randn(dome.shape, generator=generator))
