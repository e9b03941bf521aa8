"""Likelihood of images over a grid of rotations × shifts as matrix products.

For an image F with CTF c and noise variance σ² per complex coefficient, at rotation j and applied shift t,
log p = 2 Re⟨c F e^{−2πi k·t}/σ², P_j⟩ − ⟨c²/σ², |P_j|²⟩ + const: one product of (images × shifts) with the
projections, one of images with the projections' power.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.reconstruction.grids import half_turned
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import HalfPlane, extract_slices

MAX_SCORES = 6_000_000
"""Scores held at a time (24 MB): larger blocks fall out of the cache, smaller ones starve the products."""


_fast_lock = threading.Lock()
_fast_users = 0
_precision_before = "none"


@contextmanager
def fast_products() -> Iterator[None]:
    """Let CPUs with bf16 tiles round the inputs of float32 products; scores then err by ~0.2 % of their spread.

    Measured on one AMX core: 300 instead of 130 GFLOP/s. PyTorch has this switch for the process alone (a product of
    bf16 inputs with a float32 result exists on GPUs only), so users are counted: of threads that overlap the last
    one restores what was there before the first.
    """
    global _fast_users, _precision_before  # noqa: PLW0603 - the switch itself is the process's
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        yield
        return
    with _fast_lock:
        if _fast_users == 0:
            _precision_before = matmul.fp32_precision
            matmul.fp32_precision = "bf16"
        _fast_users += 1
    try:
        yield
    finally:
        with _fast_lock:
            _fast_users -= 1
            if _fast_users == 0:
                matmul.fp32_precision = _precision_before


@dataclass(frozen=True, slots=True)
class ShiftSearch:
    """Shifts (x, y) in px to try, with their log prior."""

    shifts_xy_px: Tensor
    log_prior: Tensor

    @classmethod
    def gaussian(cls, shifts_xy_px: Float[Tensor, "t 2"], sigma_px: float) -> ShiftSearch:
        """Weigh shifts by a Gaussian of their length, normalised over the grid."""
        log = -0.5 * shifts_xy_px.square().sum(-1) / sigma_px**2
        return cls(shifts_xy_px, log - torch.logsumexp(log, 0))


@dataclass(frozen=True, slots=True)
class Projections:
    """Slices `(j, 2k)` at a grid of rotations, laid out for the products, and their power.

    Where `is_paired` the second half of the rows are the first half's conjugates (`grids.half_turned`), and `power` has
    the first half's rows alone.
    """

    stacked: Tensor
    power: Tensor
    is_paired: bool = False

    @classmethod
    def of(cls, slices: Complex[Tensor, "j k"]) -> Projections:
        """Take slices that have no mates."""
        return cls(torch.cat((slices.real, slices.imag), dim=1), slices.abs().square())

    @classmethod
    def of_grid(
        cls, cube: Float[Tensor, "2 d d d"], rotations: Float[Tensor, "j 3 3"], plane: HalfPlane
    ) -> Projections:
        """Slice a cube at a grid whose second half is the first `half_turned`, as `so3_grid` gives it."""
        first, second = rotations.chunk(2)
        if len(first) != len(second) or not torch.allclose(half_turned(first), second, atol=1e-5):
            raise ValueError(
                f"rotations: {len(rotations)}, the second half is the first turned by 180 degrees"
            )
        slices = extract_slices(cube, first, plane)
        real, imaginary = slices.real, slices.imag
        stacked = torch.cat((torch.cat((real, imaginary), dim=1), torch.cat((real, -imaginary), dim=1)))
        return cls(stacked, real.square() + imaginary.square(), is_paired=True)

    def cropped(self, n_coefficients: int) -> Projections:
        """Return the leading coefficients alone."""
        n, k = n_coefficients, self.power.shape[1]
        return Projections(
            torch.cat((self.stacked[:, :n], self.stacked[:, k : k + n]), dim=1),
            self.power[:, :n].contiguous(),
            self.is_paired,
        )


def weighted_images(data: ParticleData, inverse_noise: Float[Tensor, "k"]) -> tuple[Tensor, Tensor]:
    """Return (c F / σ², c² / σ²) of every image."""
    return data.ctf * data.coefficients * inverse_noise, data.ctf.square() * inverse_noise


def shifted_matrix(weighted: Tensor, phases: Tensor) -> Float[Tensor, "b t k2"]:
    """Return the images at every shift, real and imaginary parts side by side."""
    shifted = weighted[:, None, :] * phases[None]
    return torch.cat((shifted.real, shifted.imag), dim=-1)


def score_block(
    matrix: Float[Tensor, "b t k2"],
    weights: Float[Tensor, "b k"],
    projections: Projections,
    search: ShiftSearch,
    inverse_temperature: float,
) -> Float[Tensor, "b t j"]:
    """Return β · log likelihood + log shift prior for a block of images."""
    b, t, k2 = matrix.shape
    power = (inverse_temperature * weights) @ projections.power.T
    images = (2.0 * inverse_temperature * matrix).view(b * t, k2)
    if not projections.is_paired:
        scores = (images @ projections.stacked.T).view(b, t, -1)
        return scores.sub_(power[:, None, :]).add_(search.log_prior[None, :, None])
    # Of a pair, Re⟨x, p⟩ and Re⟨x, p̄⟩ are sum and difference of the parts' products: half the work for both.
    n, k = projections.power.shape
    even = (images[:, :k] @ projections.stacked[:n, :k].T).view(b, t, n)
    odd = (images[:, k:] @ projections.stacked[:n, k:].T).view(b, t, n)
    even.sub_(power[:, None, :]).add_(search.log_prior[None, :, None])
    scores = even.new_empty((b, t, 2 * n))
    torch.add(even, odd, out=scores[..., :n])
    torch.sub(even, odd, out=scores[..., n:])
    return scores


def block_size(n_shifts: int, n_rotations: int) -> int:
    """Return how many images to score at a time."""
    return max(1, MAX_SCORES // (n_shifts * n_rotations))


def add_slice_sums(
    sums: Float[Tensor, "j k2"],
    weight_sums: Float[Tensor, "j k"],
    posterior: Float[Tensor, "b t j"],
    matrix: Float[Tensor, "b t k2"],
    weights: Float[Tensor, "b k"],
) -> None:
    """Add Σ p·X and Σ p·w per rotation; by gathering where few rotations hold 99 % of the mass."""
    per_rotation = posterior.sum(1)
    mass, index = per_rotation.topk(min(96, per_rotation.shape[1]), dim=1)
    covered = mass.cumsum(1)
    enough = covered.mean(0) >= 0.99
    b, t, _ = posterior.shape
    if not bool(enough.any()):
        sums.addmm_(posterior.view(b * t, -1).T, matrix.view(b * t, -1))
        weight_sums.addmm_(per_rotation.T, weights)
        return
    m = int(enough.int().argmax()) + 1
    index, scale = index[:, :m], 1.0 / covered[:, m - 1].clamp_min(1e-6)
    chosen = torch.gather(posterior, 2, index[:, None, :].expand(-1, t, -1)) * scale[:, None, None]
    sums.index_add_(0, index.reshape(-1), torch.bmm(chosen.transpose(1, 2), matrix).view(b * m, -1))
    shares = chosen.sum(1)
    weight_sums.index_add_(0, index.reshape(-1), (shares[:, :, None] * weights[:, None, :]).view(b * m, -1))
