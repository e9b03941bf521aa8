"""Particles as the reconstruction sees them: Fourier coefficients and CTF values on one half plane."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from models.optics.ctf import electron_wavelength_angstrom, evaluate_ctf
from models.reconstruction.projector import HalfPlane
from models.reconstruction.sufficient import ring_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class CtfParameters:
    """CTF of `b` images: tensors are per image, plain numbers hold for all of them."""

    defocus_u_angstrom: Tensor
    defocus_v_angstrom: Tensor
    astigmatism_angle_deg: Tensor
    phase_shift_deg: Tensor
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float

    @classmethod
    def of_columns(
        cls, columns: Mapping[str, Tensor], *, voltage_kv: float, cs_mm: float, amplitude_contrast: float
    ) -> CtfParameters:
        """Take rlnDefocusU, rlnDefocusV, rlnDefocusAngle and (0 if absent) rlnPhaseShift."""
        u = columns["rlnDefocusU"].float()
        return cls(
            defocus_u_angstrom=u,
            defocus_v_angstrom=columns["rlnDefocusV"].float(),
            astigmatism_angle_deg=columns["rlnDefocusAngle"].float(),
            phase_shift_deg=columns.get("rlnPhaseShift", torch.zeros_like(u)).float(),
            voltage_kv=voltage_kv,
            cs_mm=cs_mm,
            amplitude_contrast=amplitude_contrast,
        )

    def evaluate(self, plane: HalfPlane, pixel_size_angstrom: float) -> Float[Tensor, "b k"]:
        """Return the CTF of every image at the plane's frequencies."""
        box_angstrom = plane.box_size_px * pixel_size_angstrom
        return evaluate_ctf(
            plane.ky / box_angstrom,
            plane.kx / box_angstrom,
            defocus_u_angstrom=self.defocus_u_angstrom,
            defocus_v_angstrom=self.defocus_v_angstrom,
            astigmatism_angle_deg=self.astigmatism_angle_deg,
            phase_shift_deg=self.phase_shift_deg,
            voltage_kv=self.voltage_kv,
            cs_mm=self.cs_mm,
            amplitude_contrast=self.amplitude_contrast,
        )


@dataclass(frozen=True, slots=True)
class ParticleData:
    """Images of one box and pixel size, white particles: `coefficients` ≈ `ctf` · central slice."""

    plane: HalfPlane
    pixel_size_angstrom: float
    coefficients: Tensor
    ctf: Tensor

    def __len__(self) -> int:
        return int(self.coefficients.shape[0])

    @property
    def box_size_px(self) -> int:
        """The side of the images these coefficients came from."""
        return self.plane.box_size_px

    @property
    def box_angstrom(self) -> float:
        """The side in Å; shell s is the resolution box_angstrom / s."""
        return self.plane.box_size_px * self.pixel_size_angstrom

    def take(self, indices: Tensor) -> ParticleData:
        """Return the images at `indices`."""
        return ParticleData(
            self.plane, self.pixel_size_angstrom, self.coefficients[indices], self.ctf[indices]
        )

    def within(self, max_shell: float) -> ParticleData:
        """Return the coefficients up to a radius."""
        n = self.plane.count_within(max_shell)
        return ParticleData(
            self.plane.cropped(n), self.pixel_size_angstrom, self.coefficients[:, :n], self.ctf[:, :n]
        )

    def with_ctf(self, ctf: Float[Tensor, "b k"]) -> ParticleData:
        """Return the same images under other CTF values."""
        return ParticleData(self.plane, self.pixel_size_angstrom, self.coefficients, ctf)

    def times(self, factor: Float[Tensor, "b k"]) -> ParticleData:
        """Return images and CTF times a factor, under which their relation to the map stays what it is."""
        return ParticleData(
            self.plane, self.pixel_size_angstrom, self.coefficients * factor, self.ctf * factor
        )

    def with_random_phases(self, generator: torch.Generator) -> ParticleData:
        """Keep every coefficient's amplitude and draw its phase: images of the same power and no content."""
        phases = 2.0 * math.pi * torch.rand(self.coefficients.shape, generator=generator)
        values = torch.polar(self.coefficients.abs(), phases)
        return ParticleData(self.plane, self.pixel_size_angstrom, values, self.ctf)

    def mean_power(self) -> Float[Tensor, "s"]:
        """Return the images' mean power per ring: an upper bound of the noise that needs no model."""
        n_shells = int(self.plane.shell.max()) + 1
        return ring_mean(self.coefficients.abs().square(), self.plane.shell, n_shells)


@dataclass(frozen=True, slots=True)
class DefocusModel:
    """What a CTF at another defocus follows from: cos χ, and π λ / box² in rad per Å of defocus and shell², per image."""

    quadrature: Float[Tensor, "b k"]
    phase_per_angstrom: Float[Tensor, " b"]

    def take(self, index: Tensor) -> DefocusModel:
        """Return the images at `index`."""
        return DefocusModel(self.quadrature[index], self.phase_per_angstrom[index])

    def ctf_at(
        self, ctf: Float[Tensor, "b k"], radius: Float[Tensor, " k"], offset_angstrom: Float[Tensor, " b"]
    ) -> Float[Tensor, "b k"]:
        """Return the CTF with the defocus changed by an offset: sin χ cos aδ + cos χ sin aδ."""
        angle = (self.phase_per_angstrom * offset_angstrom)[:, None] * radius.square()
        return ctf * torch.cos(angle) + self.quadrature * torch.sin(angle)


def particle_defocus(ctf: CtfParameters, plane: HalfPlane, pixel_size_angstrom: float) -> DefocusModel:
    """Return what the CTF of these images at another defocus follows from."""
    box_angstrom = plane.box_size_px * pixel_size_angstrom
    rate = math.pi * electron_wavelength_angstrom(ctf.voltage_kv) / box_angstrom**2
    # cos χ is the CTF with a quarter of a wave more.
    ahead = replace(ctf, phase_shift_deg=ctf.phase_shift_deg + 90.0)
    n = len(ctf.defocus_u_angstrom)
    return DefocusModel(ahead.evaluate(plane, pixel_size_angstrom), torch.full((n,), rate))


def particle_data(
    images: Float[Tensor, "b n n"],
    pixel_size_angstrom: float,
    ctf: CtfParameters | None,
    *,
    max_shell: int | None = None,
) -> ParticleData:
    """Transform images and evaluate their CTF; `ctf=None` means images without a CTF (all ones)."""
    n = int(images.shape[-1])
    plane = HalfPlane.of(n, n // 2 - 1 if max_shell is None else max_shell)
    coefficients = torch.cat([plane.coefficients(part) for part in images.float().split(512)])
    values = torch.ones(coefficients.shape) if ctf is None else ctf.evaluate(plane, pixel_size_angstrom)
    return ParticleData(plane, pixel_size_angstrom, coefficients, values)
