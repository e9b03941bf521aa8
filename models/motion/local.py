"""Local (beam-induced) motion: patches of the globally aligned movie and a smooth polynomial in x, y, t.

The model is MotionCor2's, as RELION stores it: 18 coefficients per axis, {1, x, x², y, y², xy} × {t, t², t³}.
Instead of fitting one noisy peak per patch and frame, the 36 coefficients maximise the *sum* of all patch
correlations along the modelled trajectories, which is the least-squares solution for white noise and needs
no rejection of outliers. The model is accepted when it, fitted on one half of the patches (a chess board),
raises the correlation of the other half; otherwise the movie keeps its whole-frame motion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.fourier.transforms import shift_phases
from models.motion.align import (
    AlignmentSettings,
    CroppedMovie,
    correlation_weights,
    correlation_window,
    sum_shifted,
)

_N_SPACE, _N_TIME = 6, 3
# Offsets of the correlation windows, in cropped pixels: motion left after the global alignment is below 15 Å.
_WINDOW_STEP_PX = 0.5
# A patch is that much wider than its share of the field, so that no particle lies on every patch's rim.
_PATCH_OVERLAP = 1.25
# Half width of the correlation windows: local motion beyond it is not physical.
_REACH_ANGSTROM = 15.0
# Prior spread of each of the 36 degrees of freedom, as the rms over the field and the frames: local motion
# in real movies is 1-3 Å in all (shared out over some ten terms that matter).
_PRIOR_ANGSTROM = 0.25
# A held-out rise below this fraction, or below that many of its standard errors, is not worth a warp.
_MIN_GAIN = 0.002
_MIN_SIGNIFICANCE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalMotion:
    """A polynomial model of local motion, to be added to the whole-frame shifts.

    `coefficients` is `(yx, space, time)` for u = x / width − 0.5, v = y / height − 0.5 and t = frame index
    from zero, in movie pixels; `gain_held_out` is the relative rise of the correlation of patches that the
    model was not fitted on; `residual_rms_px` compares it with the patches' own (noisy) peaks.
    """

    coefficients: Float[Tensor, "2 6 3"]
    patch_centres_yx_px: Float[Tensor, "patch 2"]
    patch_shifts_px: Float[Tensor, "patch frame 2"]
    residual_rms_px: float
    gain_held_out: float


def spatial_basis(v: Float[Tensor, "*p"], u: Float[Tensor, "*p"]) -> Float[Tensor, "*p 6"]:
    """Return {1, u, u², v, v², uv}, RELION's order (u along x, v along y)."""
    return torch.stack([torch.ones_like(u), u, u.square(), v, v.square(), u * v], dim=-1)


def time_basis(t: Float[Tensor, "*t"]) -> Float[Tensor, "*t 3"]:
    """Return {t, t², t³}."""
    return torch.stack([t, t.square(), t.pow(3)], dim=-1)


def evaluate_local_motion(
    coefficients: Float[Tensor, "2 6 3"], v: Float[Tensor, "*p"], u: Float[Tensor, "*p"], frame: float
) -> Float[Tensor, "*p 2"]:
    """Return the local correction (y, x) in movie pixels at positions (v, u) in [−0.5, 0.5] for one frame."""
    at_time = coefficients @ time_basis(torch.tensor(float(frame)))
    return spatial_basis(v, u) @ at_time.T


def estimate_local_motion(
    movie: CroppedMovie,
    global_shifts_px: Float[Tensor, "frame 2"],
    settings: AlignmentSettings,
    *,
    patch_angstrom: float = 300.0,
    n_rounds: int = 3,
) -> LocalMotion | None:
    """Return the local motion that is left after the global shifts, or None when none can be shown.

    `patch_angstrom` is the target width of a patch; the grid has 4 to 8 patches along an axis.
    """
    n_frames = len(movie.spectra)
    if n_frames < 5:
        return None
    patches = _Patches(movie, global_shifts_px, settings, patch_angstrom)
    if patches.n < 9:
        return None
    coefficients = torch.zeros(2, _N_SPACE, _N_TIME)
    windows = torch.zeros(0)
    unmoved = patches.correlate(coefficients)
    gain = _held_out_gain(patches, unmoved)
    if gain is None:
        return None
    for round_index in range(n_rounds):
        windows = unmoved if round_index == 0 else patches.correlate(coefficients)
        coefficients = patches.fit(windows, coefficients, torch.arange(patches.n))
    peaks = patches.peaks(windows)
    model = patches.evaluate(coefficients)
    scale = torch.tensor(movie.scale_yx)
    times = torch.tensor([float(n_frames - 1) ** -(p + 1) for p in range(_N_TIME)])
    residual = (peaks - model) * scale
    return LocalMotion(
        coefficients=coefficients * scale[:, None, None] * times,
        patch_centres_yx_px=patches.centres * torch.tensor(movie.movie_yx, dtype=torch.float32),
        patch_shifts_px=peaks * scale,
        residual_rms_px=float(residual.square().mean().sqrt()),
        gain_held_out=gain,
    )


class _Patches:
    """Spectra of the patches of one movie, `(patch, frame, h, wr)` cropped pixels, one patch at a time."""

    def __init__(
        self,
        movie: CroppedMovie,
        shifts_px: Float[Tensor, "frame 2"],
        settings: AlignmentSettings,
        patch_angstrom: float,
    ) -> None:
        pixel = movie.pixel_size_angstrom * math.sqrt(movie.scale_yx[0] * movie.scale_yx[1])
        inner = [movie.movie_yx[a] / movie.scale_yx[a] for a in (0, 1)]
        grid = [min(8, max(4, round(n * pixel / patch_angstrom))) for n in inner]
        sizes = [2 * int(min(n, n / g * _PATCH_OVERLAP) // 2) for n, g in zip(inner, grid, strict=True)]
        self._shape = (sizes[0], sizes[1])
        starts = [
            np.linspace(0, n - size, g).round().astype(int)
            for n, size, g in zip(inner, sizes, grid, strict=True)
        ]
        self._corners = [(int(y), int(x)) for y in starts[0] for x in starts[1]]
        self.is_white = torch.tensor([(i + j) % 2 == 0 for i in range(grid[0]) for j in range(grid[1])])
        centres = [((y + sizes[0] / 2) / inner[0], (x + sizes[1] / 2) / inner[1]) for y, x in self._corners]
        self.centres = torch.tensor(centres, dtype=torch.float32)
        self.n = len(self._corners)
        self.n_frames = len(movie.spectra)
        self._prior_px = _PRIOR_ANGSTROM / pixel
        radius = max(3, math.ceil(_REACH_ANGSTROM / pixel))
        self._offsets = torch.arange(-radius, radius + _WINDOW_STEP_PX / 2, _WINDOW_STEP_PX)
        weights = correlation_weights(self._shape, pixel, settings)
        self._spectra = self._cut(movie, shifts_px, weights.sqrt())
        self._space = spatial_basis(self.centres[:, 0] - 0.5, self.centres[:, 1] - 0.5)
        self._time = time_basis(torch.linspace(0.0, 1.0, self.n_frames))

    def _cut(
        self, movie: CroppedMovie, shifts_px: Tensor, filters: Float[Tensor, "h wr"]
    ) -> Complex[Tensor, "patch frame h wr"]:
        h, w = self._shape
        window = torch.hann_window(h + 2)[1:-1, None].sqrt() * torch.hann_window(w + 2)[None, 1:-1].sqrt()
        scale = torch.tensor(movie.scale_yx)
        spectra = torch.empty((self.n, self.n_frames, h, w // 2 + 1), dtype=torch.complex64)
        for frame in range(self.n_frames):
            phases = shift_phases(movie.cropped_yx, shifts_px[frame] / scale)
            aligned = torch.fft.irfft2(movie.spectra[frame] * phases, s=movie.cropped_yx)
            cuts = torch.stack([aligned[y : y + h, x : x + w] for y, x in self._corners])
            spectra[:, frame] = torch.fft.rfft2(cuts * window) * filters
        return spectra

    def evaluate(self, coefficients: Float[Tensor, "2 6 3"]) -> Float[Tensor, "patch frame 2"]:
        return torch.einsum("ps,ast,ft->pfa", self._space, coefficients, self._time)

    def correlate(self, coefficients: Float[Tensor, "2 6 3"]) -> Float[Tensor, "patch frame s s"]:
        """Correlate each frame with the sum of the others, shifted by the model, in units of its noise."""
        model = self.evaluate(coefficients)
        n = len(self._offsets)
        windows = torch.empty(self.n, self.n_frames, n, n)
        for p, spectra in enumerate(self._spectra):
            total = sum_shifted(spectra, self._shape, model[p])
            own = spectra * shift_phases(self._shape, model[p])
            cross = (total - own) * spectra.conj()
            noise = cross.abs().square().sum(dim=(-2, -1)).mean().sqrt()
            windows[p] = correlation_window(cross, self._shape, self._offsets) / noise.clamp(min=1e-20)
        return windows

    def score(self, windows: Tensor, shifts: Float[Tensor, "patch frame 2"]) -> Float[Tensor, "patch"]:
        """Return each patch's correlation, summed over its frames, along given trajectories."""
        radius = float(self._offsets[-1])
        grid = torch.stack([shifts[..., 1], shifts[..., 0]], dim=-1) / radius
        flat = windows.flatten(0, 1)[:, None]
        values = torch.nn.functional.grid_sample(
            flat, grid.flatten(0, 1)[:, None, None], mode="bicubic", padding_mode="border", align_corners=True
        )
        return values.reshape(shifts.shape[:2]).sum(dim=1)

    def fit(self, windows: Tensor, start: Float[Tensor, "2 6 3"], used: Tensor) -> Float[Tensor, "2 6 3"]:
        """Maximise the correlation of the patches `used` over the coefficients, from `start`."""
        coefficients = start.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([coefficients], max_iter=40, line_search_fn="strong_wolfe")

        # the log-likelihood of white noise is the correlation (in units of its noise) times the signal's
        # strength, which is what a frame correlates with the others by on the average
        strength = (self.score(windows[used], self.evaluate(start)[used]) / self.n_frames).clamp(min=0.0)
        strength = strength / _PATCH_OVERLAP**2

        def closure() -> Tensor:
            optimiser.zero_grad()
            field = self.evaluate(coefficients)
            prior = 0.5 * field.square().sum(dim=-1).mean() / self._prior_px**2
            loss = prior - (strength * self.score(windows[used], field[used])).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        return coefficients.detach()

    def peaks(self, windows: Float[Tensor, "patch frame s s"]) -> Float[Tensor, "patch frame 2"]:
        """Return each patch's own trajectory, correlations averaged over neighbouring frames."""
        kernel = torch.tensor([0.25, 0.75, 1.0, 0.75, 0.25])
        padded = torch.nn.functional.pad(windows.permute(0, 2, 3, 1).flatten(0, 2)[:, None], (2, 2))
        smooth = torch.nn.functional.conv1d(padded, kernel[None, None])[:, 0]
        n = len(self._offsets)
        smooth = smooth.reshape(self.n, n, n, self.n_frames).permute(0, 3, 1, 2)
        best = smooth.flatten(2).argmax(dim=2)
        peaks = torch.stack([self._offsets[best // n], self._offsets[best % n]], dim=-1)
        return peaks - peaks[:, :1]


def _held_out_gain(patches: _Patches, windows: Tensor) -> float | None:
    """Return the relative rise of the correlation on patches that a fit has not seen, None if it may be chance.

    The windows are those of the unmoved patches: a reference that a model has been fitted to would favour
    that model. The rise must exceed one and a half times its standard error over the patches.
    """
    zero = torch.zeros(2, _N_SPACE, _N_TIME)
    still = patches.score(windows, patches.evaluate(zero))
    moved = torch.empty_like(still)
    for colour in (True, False):
        seen = torch.nonzero(patches.is_white == colour)[:, 0]
        unseen = torch.nonzero(patches.is_white != colour)[:, 0]
        model = patches.fit(windows, zero, seen)
        moved[unseen] = patches.score(windows[unseen], patches.evaluate(model)[unseen])
    rise = moved - still
    error = float(rise.std()) / math.sqrt(patches.n)
    gain = float(rise.sum()) / max(abs(float(still.sum())), 1e-20)
    is_significant = float(rise.mean()) > _MIN_SIGNIFICANCE * max(error, 1e-20)
    return gain if is_significant and gain > _MIN_GAIN else None
