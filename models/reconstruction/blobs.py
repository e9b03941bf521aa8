"""A phantom of Gaussian blobs whose projections are known in closed form, independent of the Fourier slicer.

It is the yardstick of this package: analytic images with CTF and noise, true poses, and the measure of a set of
poses against them up to the global rotation and hand that no reconstruction can know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.rotations import euler_to_matrix
from models.reconstruction.grids import random_rotations, rotation_angle_deg
from models.reconstruction.particle_data import CtfParameters, ParticleData
from models.reconstruction.projector import HalfPlane


@dataclass(frozen=True, slots=True)
class BlobPhantom:
    """Gaussians at `centres_xyz` (px from the box centre) of standard deviation `sigmas` (px) and `weights`."""

    box_size_px: int
    centres_xyz: Tensor
    sigmas: Tensor
    weights: Tensor

    @classmethod
    def random(
        cls,
        box_size_px: int,
        generator: torch.Generator,
        *,
        n_blobs: int = 40,
        radius_fraction: float = 0.28,
        sigma_fraction: float = 0.022,
        group: Float[Tensor, "g 3 3"] | None = None,
    ) -> BlobPhantom:
        """Draw blobs in an ellipsoid with semi-axes 1 : 0.8 : 0.65 of `radius_fraction` of the box."""
        points = torch.randn((n_blobs, 3), generator=generator)
        points = points / points.norm(dim=1, keepdim=True)
        points = points * torch.rand((n_blobs, 1), generator=generator) ** (1 / 3)
        points = points * torch.tensor([1.0, 0.8, 0.65]) * radius_fraction * box_size_px
        sigmas = sigma_fraction * box_size_px * (0.8 + 0.6 * torch.rand(n_blobs, generator=generator))
        weights = 0.5 + torch.rand(n_blobs, generator=generator)
        if group is not None:
            points = (group @ points.T).transpose(1, 2).reshape(-1, 3)
            sigmas, weights = sigmas.repeat(len(group)), weights.repeat(len(group))
        centre = (points * weights[:, None]).sum(0) / weights.sum()
        return cls(box_size_px, points - centre, sigmas, weights)

    def volume(self) -> Float[Tensor, "n n n"]:
        """Return the density on the grid (z, y, x)."""
        axis = torch.arange(self.box_size_px).float() - self.box_size_px // 2
        total = torch.zeros((self.box_size_px,) * 3)
        for (x, y, z), sigma, weight in zip(self.centres_xyz, self.sigmas, self.weights, strict=True):
            gx, gy, gz = (torch.exp(-0.5 * ((axis - c) / sigma).square()) for c in (x, y, z))
            total += weight * gz[:, None, None] * gy[None, :, None] * gx[None, None, :]
        return total

    def slices(self, rotations: Float[Tensor, "j 3 3"], plane: HalfPlane) -> Tensor:
        """Return the exact DFT of the projections at R: sums of Gaussians, complex `(j, k)`."""
        amplitude = self.weights * (2 * math.pi) ** 1.5 * self.sigmas**3
        k2 = (plane.radius / self.box_size_px).square()
        envelope = amplitude[:, None] * torch.exp(-2 * math.pi**2 * self.sigmas[:, None] ** 2 * k2)
        out = []
        for rotation in rotations:
            xy = self.centres_xyz @ rotation[:2].T
            angle = xy[:, :1] * plane.kx + xy[:, 1:] * plane.ky
            angle = angle * (-2 * math.pi / self.box_size_px)
            out.append(
                torch.complex((envelope * torch.cos(angle)).sum(0), (envelope * torch.sin(angle)).sum(0))
            )
        return torch.stack(out)


@dataclass(frozen=True, slots=True)
class BlobSet:
    """Simulated images of a phantom with their truth; `origin_xy_px` centres an image (RELION's sign)."""

    data: ParticleData
    rotations: Tensor
    origin_xy_px: Tensor
    ctf: CtfParameters


def simulate_blob_images(
    phantom: BlobPhantom,
    n_images: int,
    generator: torch.Generator,
    *,
    snr: float,
    pixel_size_angstrom: float = 3.0,
    shift_sigma_px: float = 1.5,
    rotations: Float[Tensor, "j 3 3"] | None = None,
) -> BlobSet:
    """Return images with CTF (300 kV, 1-2.2 µm), Gaussian shifts and white noise of variance signal/SNR.

    The SNR is the ratio of variances over the full box (facts §2.2), signal after the CTF.
    """
    n = phantom.box_size_px
    plane = HalfPlane.of(n, n // 2 - 1)
    poses = random_rotations(n_images, generator) if rotations is None else rotations
    defocus = 10000.0 + 12000.0 * torch.rand(n_images, generator=generator)
    ctf = CtfParameters(
        defocus_u_angstrom=defocus + 150.0,
        defocus_v_angstrom=defocus - 150.0,
        astigmatism_angle_deg=180.0 * torch.rand(n_images, generator=generator),
        phase_shift_deg=torch.zeros(n_images),
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    origin = shift_sigma_px * torch.randn((n_images, 2), generator=generator)
    values = ctf.evaluate(plane, pixel_size_angstrom)
    signal = values * phantom.slices(poses, plane) * plane.phases(-origin)
    signal_power = 2.0 * signal[:, 1:].abs().square().sum(1).mean() / n**4
    noise_variance = signal_power / snr * n**2  # of a complex coefficient of the unnormalised DFT
    noise = torch.randn((2, *signal.shape), generator=generator) * torch.sqrt(noise_variance / 2)
    data = ParticleData(plane, pixel_size_angstrom, signal + torch.complex(noise[0], noise[1]), values)
    return BlobSet(data, poses, origin, ctf)


def images_of(data: ParticleData) -> Float[Tensor, "b n n"]:
    """Return the real-space images of coefficients on a half plane (their mean included)."""
    return data.plane.images(data.coefficients)


def pose_errors_deg(
    estimated: Float[Tensor, "b 3 3"],
    truth: Float[Tensor, "b 3 3"],
    group: Float[Tensor, "g 3 3"] | None = None,
    *,
    is_hand_free: bool = True,
) -> Float[Tensor, "b"]:
    """Return each pose's error after the best global rotation (and hand, and the group's choice of copy).

    R_est = D R_true G with D = 1, or the half turn about the beam for a mirrored map.
    """
    copies = torch.eye(3)[None] if group is None else group
    turn = euler_to_matrix(torch.tensor([0.0, 0.0, 180.0]))
    best: Tensor | None = None
    for hand in (torch.eye(3), turn) if is_hand_free else (torch.eye(3),):
        moved = hand @ truth
        # Candidates: what single particles say of G; then the average over those that agree.
        for i in torch.linspace(0, len(truth) - 1, min(60, len(truth))).long():
            g = moved[i].T @ estimated[i]
            for _ in range(3):
                equivalents = moved[:, None] @ (copies @ torch.eye(3))[None] @ g
                angles = rotation_angle_deg(equivalents, estimated[:, None])
                error, copy = angles.min(1)
                relative = (moved @ copies[copy]).transpose(1, 2) @ estimated
                near = error <= error.median()
                u, _, vh = torch.linalg.svd(relative[near].mean(0))
                g = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ vh))])) @ vh
            if best is None or error.median() < best.median():
                best = error
    assert best is not None  # noqa: S101 - the loop above always runs
    return best
