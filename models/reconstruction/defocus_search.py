"""Defocus of single particles, searched around the micrograph's value with the pose given.

χ is linear in defocus, so that with X = Re⟨F, P⟩ and Y = |P|² the likelihood over an offset δ,
2 Σ sin(χ + aδ) X − Σ sin²(χ + aδ) Y with a = π λ k² (Zivanov et al. 2018), is a matrix product of sums over narrow
rings with the sines and cosines of aδ and 2aδ.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.particle_data import DefocusModel, ParticleData
from models.reconstruction.projector import extract_slices

RANGE_ANGSTROM = 2000.0
"""Farther from its micrograph's mean no particle lies: ice is thinner than 2000 Å, tilts are in the local CTF."""

PRIOR_SD_ANGSTROM = 500.0
"""Half of usual ice is within this; it keeps images that tell little at the micrograph's value."""

_STEP_ANGSTROM = 25.0
_RINGS_PER_SHELL = 4
_BLOCK = 512


def search_defocus(
    data: ParticleData,
    model: DefocusModel,
    scales: Float[Tensor, " b"],
    cube: Float[Tensor, "2 d d d"],
    inverse_noise: Float[Tensor, "b s"],
    rotations: Float[Tensor, "b 3 3"],
    shifts_xy_px: Float[Tensor, "b 2"],
    max_shell: float,
) -> Float[Tensor, " b"]:
    """Return the most probable defocus offset of every image in Å (to add to u and v).

    `data.ctf` is sin χ at offset 0 without scale. The offset lies within ± `RANGE_ANGSTROM`, under a Gaussian prior.
    """
    near = data.within(max_shell)
    plane = near.plane
    n_steps = int(RANGE_ANGSTROM / _STEP_ANGSTROM)
    offsets = _STEP_ANGSTROM * torch.arange(-n_steps, n_steps + 1)
    prior = -0.5 * (offsets / PRIOR_SD_ANGSTROM).square()
    ring = (plane.radius * _RINGS_PER_SHELL).round().long()
    # The mean square radius of a ring's coefficients; the phase within a ring differs by less than a tenth.
    n_rings = int(ring.max()) + 1
    counts = torch.bincount(ring, minlength=n_rings).float().clamp_min(1.0)
    square = torch.zeros(n_rings).index_add_(0, ring, plane.radius.square()) / counts
    found = []
    for index in torch.arange(len(near)).split(_BLOCK):
        few, own, s = near.take(index), model.take(index), scales[index][:, None]
        sine, cosine = few.ctf, own.quadrature[:, : len(plane)]
        noise = inverse_noise[index][:, plane.shell]
        slices = extract_slices(cube, rotations[index], plane)
        centred = few.coefficients * plane.phases(shifts_xy_px[index])
        cross = 2.0 * s * (centred.conj() * slices).real * noise
        power = 0.5 * s.square() * slices.abs().square() * noise
        empty = torch.zeros((len(few), n_rings))
        # sin² = ½ − ½ cos 2χ, of which the constant does not matter.
        parts = [
            empty.index_add(1, ring, v)
            for v in (
                cross * sine,
                cross * cosine,
                power * (cosine.square() - sine.square()),
                -2.0 * power * sine * cosine,
            )
        ]
        scores = []
        for rate in own.phase_per_angstrom.unique():
            angle = rate * square[:, None] * offsets
            waves = torch.cat((angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()))
            of_rate = own.phase_per_angstrom == rate
            scores.append((of_rate, torch.cat([p[of_rate] for p in parts], dim=1) @ waves + prior))
        total = torch.zeros((len(few), len(offsets)))
        for of_rate, values in scores:
            total[of_rate] = values
        found.append(_peak(total, offsets))
    return torch.cat(found)


def _peak(scores: Float[Tensor, "b o"], offsets: Float[Tensor, " o"]) -> Float[Tensor, " b"]:
    """Return the offset of the largest score, between the steps by a parabola."""
    best = scores.argmax(1).clamp(1, scores.shape[1] - 2)
    rows = torch.arange(len(scores))
    left, middle, right = (scores[rows, best + i] for i in (-1, 0, 1))
    curvature = (left - 2.0 * middle + right).clamp_max(-1e-6)
    step = (0.5 * (left - right) / curvature).clamp(-0.5, 0.5)
    return offsets[best] + step * (offsets[1] - offsets[0])
