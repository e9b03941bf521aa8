"""The likelihood of trajectories: how much power the aligned sum of each patch gains over that of its noise.

Frame f of a patch is X_f = q_f S exp(2πi k·d_f) + n: a structure S that all frames share, with power P(k) in
units of the noise, damaged to q_f(k) by the exposure, and white noise. With S integrated out (a Gaussian
process of power P), the log-likelihood of the shifts d is, apart from constants,

    L(d) = Σ_k w(k) |T(k)|²,   T = Σ_f q_f X_f exp(−2πi k·d_f),   w = P / (1 + P Σ_f q_f²)

over half of the plane. Its gradient correlates each frame with the sum of all *others* (a frame's own term is
real and drops out), its weights are a Wiener filter instead of a fixed B-factor, and its unit is the nat, so
that a prior can be set against it. P is measured per ring from the cross terms of |T|², which the noise does
not enter on the average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

# The spread of patches' structure factors about their mean (1): carbon, empty ice.
_STRENGTH_SD = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Rings:
    """Rings of equal width in frequency: `index` of every term of a half spectrum, −1 where it is not used."""

    index: Int[Tensor, "h wr"]
    frequency: Float[Tensor, "r"]
    n_terms: Float[Tensor, "r"]
    squared_ky: Float[Tensor, "r"]
    squared_kx: Float[Tensor, "r"]

    def average(self, values: Float[Tensor, "h wr"]) -> Float[Tensor, "r"]:
        """Return the mean of `values` over each ring."""
        return self.total(values) / self.n_terms

    def total(self, values: Float[Tensor, "h wr"]) -> Float[Tensor, "r"]:
        """Return the sum of `values` over each ring."""
        n = len(self.frequency)
        sums = values.new_zeros(n + 1)
        return sums.index_add_(0, self.index.flatten() % (n + 1), values.flatten())[:n]

    def spread(self, values: Float[Tensor, "*b r"]) -> Float[Tensor, "*b h wr"]:
        """Return the half spectrum whose terms have their ring's value; zero where there is no ring."""
        padded = torch.nn.functional.pad(values, (0, 1))
        return padded[..., self.index % (len(self.frequency) + 1)]


def make_rings(
    shape_yx: tuple[int, int],
    pixel_size_yx_angstrom: tuple[float, float],
    *,
    high_pass_angstrom: float,
    device: torch.device,
) -> Rings:
    """Return the rings from 1/`high_pass_angstrom` to Nyquist, without the axes.

    Faults of whole detector rows and columns lie on the axes and would pull every shift towards zero.
    """
    ky = torch.fft.fftfreq(shape_yx[0], pixel_size_yx_angstrom[0], device=device)
    kx = torch.fft.rfftfreq(shape_yx[1], pixel_size_yx_angstrom[1], device=device)
    k = torch.hypot(ky[:, None], kx[None, :])
    nyquist = 0.5 / max(pixel_size_yx_angstrom)
    extent = min(n * p for n, p in zip(shape_yx, pixel_size_yx_angstrom, strict=True))
    # narrow enough for the Thon rings of 3 µm of defocus at 5 Å, wide enough to average
    width = max(1.5 / extent, nyquist / 150.0)
    n = max(1, math.floor(nyquist / width))
    index = (k / width).floor().to(torch.int64)
    is_used = (index < n) & (k >= 1.0 / high_pass_angstrom)
    is_used[0, :] = is_used[:, 0] = False
    index = torch.where(is_used, index, torch.full_like(index, -1))
    rings = Rings(
        index=index,
        frequency=(torch.arange(n, device=device) + 0.5) * width,
        n_terms=torch.ones(n, device=device),
        squared_ky=torch.zeros(n, device=device),
        squared_kx=torch.zeros(n, device=device),
    )
    ones = torch.ones(k.shape, device=device)
    fy = torch.fft.fftfreq(shape_yx[0], device=device)
    fx = torch.fft.rfftfreq(shape_yx[1], device=device)
    return Rings(
        index=index,
        frequency=rings.frequency,
        n_terms=rings.total(ones).clamp(min=1.0),
        squared_ky=rings.total(fy.square()[:, None] * ones),
        squared_kx=rings.total(fx.square()[None, :] * ones),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """P(k) of the mean patch per ring, in units of a frame's noise, and each patch's power relative to it."""

    power: Float[Tensor, "r"]
    strength: Float[Tensor, "patch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """The likelihood about given shifts: gradient and expected curvature per patch, in nats and pixels.

    `information[a, p]` is the matrix over the frames of patch p for axis a: a Laplacian, because only shifts
    of frames against each other count. `signal` is what these shifts show, for the next step's weights.
    """

    gradient: Float[Tensor, "patch frame 2"]
    information: Float[Tensor, "2 patch frame frame"]
    signal: Signal


class PatchLikelihood:
    """Whitened, damage-weighted spectra of the patches of a movie; pixels are those of the patches.

    Parameters
    ----------
    spectra
        Half spectra of the patches' frames; overwritten.
    damage
        q of each frame and ring.
    share
        Fraction of the patches' power that is independent (patches overlap).
    """

    def __init__(
        self,
        spectra: Complex[Tensor, "patch frame h wr"],
        shape_yx: tuple[int, int],
        rings: Rings,
        damage: Float[Tensor, "frame r"],
        *,
        share: float,
    ) -> None:
        self.rings = rings
        self.shape_yx = shape_yx
        self.n_patches, self.n_frames = int(spectra.shape[0]), int(spectra.shape[1])
        self._share = share
        self._damage = damage
        device = spectra.device
        self._fy = torch.fft.fftfreq(shape_yx[0], device=device)
        self._fx = torch.fft.rfftfreq(shape_yx[1], device=device)
        squares = damage.square()
        self._sum2 = squares.sum(dim=0)
        self._pairs = self._sum2.square() - squares.square().sum(dim=0)
        self._kyx = torch.stack(torch.broadcast_tensors(self._fy[:, None], self._fx[None, :]))
        noise = self._measure_noise(spectra)
        scale = rings.spread(damage / noise.sqrt())
        self._own_power = torch.empty(self.n_patches, len(rings.frequency), device=device)
        for p in range(self.n_patches):
            spectra[p] *= scale
            self._own_power[p] = rings.average(_power(spectra[p]))
        self._spectra = spectra
        # one patch's aligned frames: allocated once, it stays in the cache
        self._aligned = torch.empty_like(spectra[0])

    def _measure_noise(self, spectra: Tensor) -> Float[Tensor, "r"]:
        power = torch.zeros(self.rings.index.shape, device=spectra.device)
        for patch in spectra:
            power += _power(patch)
        mean = self.rings.average(power) / (self.n_patches * self.n_frames)
        return mean.clamp(min=1e-20)

    def _align(self, patch: int, shifts_px: Float[Tensor, "frame 2"]) -> Complex[Tensor, "frame h wr"]:
        """Return the patch's frames in place (valid until the next call)."""
        torch.mul(self._spectra[patch], _phases(shifts_px[:, 1], self._fx)[:, None, :], out=self._aligned)
        return self._aligned.mul_(_phases(shifts_px[:, 0], self._fy)[:, :, None])

    def measure(self, shifts_px: Float[Tensor, "patch frame 2"]) -> Signal:
        """Return the signal that frames moved by `shifts_px` share."""
        totals = [self._align(p, shifts_px[p]).sum(dim=0) for p in range(self.n_patches)]
        return self._signal_of(torch.stack([self.rings.average(_power(t[None])) for t in totals]))

    def slope(self, shifts_px: Float[Tensor, "patch frame 2"], signal: Signal, b_factor_px2: float) -> Slope:
        """Return gradient and expected curvature at `shifts_px`, the likelihood's terms damped by exp(−B k² / 2).

        The damping (k in cycles per pixel) widens the peaks while motion is still left.
        """
        squared_f = (self.rings.squared_ky + self.rings.squared_kx) / self.rings.n_terms
        damping = torch.exp(-0.5 * b_factor_px2 * squared_f) * self._share
        scaled = signal.strength[:, None] * signal.power
        weights = damping * scaled / (1.0 + scaled * self._sum2)
        power = torch.empty_like(self._own_power)
        gradient = torch.empty(self.n_patches, self.n_frames, 2, device=power.device)
        for p in range(self.n_patches):
            aligned = self._align(p, shifts_px[p])
            total = aligned.sum(dim=0)
            power[p] = self.rings.average(_power(total[None]))
            gradient[p] = self._gradient(aligned, total.conj() * self.rings.spread(weights[p]))
        information = torch.stack(
            [
                self._information(weights * scaled * squared)
                for squared in (self.rings.squared_ky, self.rings.squared_kx)
            ]
        )
        return Slope(gradient=gradient, information=information, signal=self._signal_of(power))

    def _gradient(
        self, aligned: Complex[Tensor, "frame h wr"], target: Complex[Tensor, "h wr"]
    ) -> Float[Tensor, "frame 2"]:
        # Im(target · Z) k is linear in the real and imaginary parts of Z: a product of two real matrices
        factors = torch.stack([target.imag * self._kyx, target.real * self._kyx], dim=-1).flatten(1)
        return 4.0 * math.pi * (torch.view_as_real(aligned).flatten(1) @ factors.T)

    def _information(self, weights: Float[Tensor, "patch r"]) -> Float[Tensor, "patch frame frame"]:
        # in double precision and with rows that sum to zero: the prior's root multiplies what is left of a shift of all
        squares = self._damage.square().to(torch.float64)
        pairs = torch.einsum("fr,pr,gr->pfg", squares, weights.to(torch.float64), squares)
        return 8.0 * math.pi**2 * (torch.diag_embed(pairs.sum(dim=-1)) - pairs)

    def _signal_of(self, power: Float[Tensor, "patch r"]) -> Signal:
        """Return P(k) ≥ 0 and the strengths from |T|², both shrunk by how uncertain they are."""
        if self.n_frames < 2:
            return Signal(power=torch.zeros_like(power[0]), strength=torch.ones_like(power[:, 0]))
        cross = power - self._own_power
        pairs = self._pairs.clamp(min=1e-12)
        n_terms = self.rings.n_terms * self.n_patches * self._share
        signal = shrink_power(cross.mean(dim=0) / pairs, 1.0 / (pairs * n_terms))
        weights = signal / (1.0 + signal * self._sum2) * self.rings.n_terms
        expected = (weights * signal * self._pairs).sum().clamp(min=1e-20)
        variance = (weights.square() / self.rings.n_terms * self._pairs).sum() / expected.square()
        # the posterior mean of a strength whose prior is 1 ± its spread
        trust = _STRENGTH_SD**2 / (_STRENGTH_SD**2 + variance)
        strength = 1.0 + trust * ((cross * weights).sum(dim=1) / expected - 1.0)
        return Signal(power=signal, strength=strength.clamp(min=0.05))


def shrink_power(found: Float[Tensor, "r"], variance: Float[Tensor, "r"]) -> Float[Tensor, "r"]:
    """Return a measured power (which noise may make negative), drawn to zero where it is within two standard errors."""
    found = found.clamp(min=0.0)
    return found.pow(3) / (found.square() + 4.0 * variance).clamp(min=1e-30)


def _power(spectra: Complex[Tensor, "frame h wr"]) -> Float[Tensor, "h wr"]:
    """Return Σ |X|² over the frames."""
    # frames first: a sum over the outermost axis streams through memory
    return torch.view_as_real(spectra).square().sum(dim=0).sum(dim=-1)


def _phases(shift: Float[Tensor, "*b"], frequency: Float[Tensor, "n"]) -> Complex[Tensor, "*b n"]:
    angle = -2.0 * math.pi * shift[..., None] * frequency
    return torch.polar(torch.ones_like(angle), angle)
