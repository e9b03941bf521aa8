"""What is known of motion before a movie is seen, and how it combines with the likelihood.

Trajectories are Gaussian processes: smooth modes over the field, each with an amplitude that varies smoothly in
τ = log(1 + N / 5) of the exposure N in e/Å², because specimens move fastest in the first electrons (Matérn 5/2 with
a length of 2, about what 30 e/Å² span). The whole-frame mode has, besides, a jitter from frame
to frame (stage and camera). The three amplitudes are those that make the movie most probable (its evidence),
so that a movie without local motion is left as it is, and a noisy one follows a smooth path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

_SETTLING_E_PER_ANGSTROM2 = 5.0
_LENGTH = 2.0
# Steps of a factor two: the posterior hardly changes in between. Zero is a choice for local motion and jitter.
_STEPS_ANGSTROM = {
    "drift_angstrom": tuple(0.25 * 2.0**i for i in range(9)),
    "jitter_angstrom": (0.0, *(0.02 * 2.0**i for i in range(7))),
    "local_angstrom": (0.0, *(0.05 * 2.0**i for i in range(9))),
}
_START_ANGSTROM = {"drift_angstrom": 16.0, "jitter_angstrom": 0.08, "local_angstrom": 0.4}
# Parts of a smooth mode below a thousandth of its amplitude are left out.
_MIN_EIGENVALUE = 1e-6
# What motion of no consequence costs, in nats: local motion has to be that much more probable than none.
_MIN_EVIDENCE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionPrior:
    """Amplitudes in Å per axis: of the whole frame's drift and jitter, of each linear mode's rms over the field."""

    drift_angstrom: float
    jitter_angstrom: float
    local_angstrom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """Mean of the modes' amplitudes and their covariance, in the units of the likelihood (pixels)."""

    mean: Float[Tensor, "2 mode frame"]
    covariance: Float[Tensor, "2 mf mf"]
    prior: MotionPrior


def time_kernel(exposures: Float[Tensor, "frame"]) -> Float[Tensor, "frame frame"]:
    """Return the correlation of a mode's amplitude between frames of the given accumulated exposures."""
    tau = torch.log1p(exposures.to(torch.float64) / _SETTLING_E_PER_ANGSTROM2)
    distance = math.sqrt(5.0) * (tau[:, None] - tau[None, :]).abs() / _LENGTH
    return (1.0 + distance + distance.square() / 3.0) * torch.exp(-distance)


class MotionPosterior:
    """Combines information and prior; `mode_scale` is each mode's amplitude relative to a linear mode's, first the whole frame's."""

    def __init__(
        self, kernel: Float[Tensor, "frame frame"], mode_scale: tuple[float, ...], pixel_size_angstrom: float
    ) -> None:
        self._kernel = kernel
        self._scale = torch.tensor(mode_scale, dtype=torch.float64, device=kernel.device)
        self._pixel = pixel_size_angstrom
        self._n_modes, self._n_frames = len(mode_scale), len(kernel)
        values, vectors = torch.linalg.eigh(kernel)
        kept = values > _MIN_EIGENVALUE * values[-1]
        self._smooth_root = vectors[:, kept] * values[kept].sqrt()

    def solve(
        self,
        information: Float[Tensor, "2 mf mf"],
        vector: Float[Tensor, "2 mf"],
        start: MotionPrior | None = None,
    ) -> Posterior:
        """Return the posterior under the most probable prior; from `start` it is looked for step by step.

        `vector` is information @ current + gradient, the right-hand side of the unregularised normal equations.
        """
        information, vector = information.to(torch.float64), vector.to(torch.float64)

        prior = self._most_probable(information, vector, start)
        root = self._root(prior)
        inner = _inner(root, information)
        covariance = root @ torch.cholesky_inverse(torch.linalg.cholesky(inner)) @ root.T
        mean = (covariance @ vector[..., None])[..., 0]
        return Posterior(
            mean=mean.reshape(2, self._n_modes, self._n_frames), covariance=covariance, prior=prior
        )

    def _most_probable(self, information: Tensor, vector: Tensor, start: MotionPrior | None) -> MotionPrior:
        def evidence(prior: MotionPrior) -> float:
            return self._evidence(information, vector, prior)

        prior = MotionPrior(**_START_ANGSTROM) if start is None else start
        for name, steps in _STEPS_ANGSTROM.items():
            if name == "local_angstrom" and self._n_modes == 1:
                return replace(prior, local_angstrom=0.0)
            prior = max((replace(prior, **{name: step}) for step in steps), key=evidence)
        still = replace(prior, local_angstrom=0.0)
        return prior if evidence(prior) > evidence(still) + _MIN_EVIDENCE else still

    def _root(self, prior: MotionPrior) -> Float[Tensor, "mf rank"]:
        """Return a root of the prior covariance of (mode, frame); smooth modes have only a few degrees of freedom."""
        n, rank = self._smooth_root.shape
        eye = torch.eye(n, dtype=torch.float64, device=self._kernel.device)
        drift = (prior.drift_angstrom / self._pixel) ** 2 * (self._kernel + 1e-9 * eye)
        jitter = (prior.jitter_angstrom / self._pixel) ** 2 * eye
        root = torch.zeros(
            self._n_modes * n, n + (self._n_modes - 1) * rank, dtype=torch.float64, device=eye.device
        )
        root[:n, :n] = torch.linalg.cholesky(drift + jitter)
        for m in range(1, self._n_modes):
            amplitude = self._scale[m] * prior.local_angstrom / self._pixel
            first = n + (m - 1) * rank
            root[m * n : (m + 1) * n, first : first + rank] = amplitude * self._smooth_root
        return root

    def _evidence(self, information: Tensor, vector: Tensor, prior: MotionPrior) -> float:
        """Return the log evidence of both axes, apart from what does not depend on the prior."""
        root = self._root(prior)
        factor = torch.linalg.cholesky(_inner(root, information))
        seen = torch.linalg.solve_triangular(factor, (root.T @ vector[..., None]), upper=False)
        log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum()
        return float(0.5 * (seen.square().sum() - log_det))


def _inner(root: Tensor, information: Tensor) -> Tensor:
    inner: Tensor = root.T @ information @ root
    return inner + torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
