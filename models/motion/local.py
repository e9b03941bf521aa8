"""Motion of the whole frame and within it: all patches together, smooth in space and time.

A trajectory is the sum of six modes over the field, orthonormal combinations of RELION's {1, x, x², y, y², xy};
each has one amplitude per frame and axis. All amplitudes are found together, as the posterior mean of
`models.motion.prior` under the likelihood of `models.motion.likelihood`, by Fisher scoring: the spectra stay
where they are, and each round measures the likelihood's slope at the shifts so far. The first rounds are damped
by a large B-factor, so that motion of several pixels is within the peaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.fourier.transforms import shift_phases
from models.motion.align import AlignmentSettings, CroppedMovie, align_whole_frames
from models.motion.dose import critical_exposure
from models.motion.likelihood import PatchLikelihood, Slope, make_rings
from models.motion.prior import MotionPosterior, MotionPrior, Posterior, time_kernel

_N_SPACE, _N_TIME = 6, 3
# A patch is that much wider than its share of the field; the rims are tapered.
_PATCH_OVERLAP = 1.25
# Quadratic modes move less than linear ones: 0.2 against 0.65 Å rms in EMPIAR-10204 (RELION's fits).
_MODE_SCALE = (1.0, 1.0, 0.4, 1.0, 0.4, 0.4)
# Windows fall off over so many (cropped) pixels at the edge of the field, where content has been wrapped around.
_EDGE_RIM_PX = 8.0
_B_FACTORS_ANGSTROM2 = (1500.0, 300.0)
# Exposure per frame that is assumed where none is known: it only sets how fast the motion may settle.
_TYPICAL_EXPOSURE = 1.0
# Patches of fewer (cropped) pixels show nothing; a field of fewer than three of them has whole-frame motion alone.
_MIN_PATCH_PX = 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalMotion:
    """Local motion, to be added to the whole-frame shifts; its mean over the field is zero.

    `amplitudes` are the factors of {1, u, u², v, v², uv} for u = x / width − 0.5 and v = y / height − 0.5 in each
    frame, in movie pixels, zero in the first frame. `patch_shifts_px` are the field's values at the patches'
    centres, `prior_angstrom` the amplitude that the movie itself spoke for.
    """

    amplitudes: Float[Tensor, "2 6 frame"]
    patch_centres_yx_px: Float[Tensor, "patch 2"]
    patch_shifts_px: Float[Tensor, "patch frame 2"]
    prior_angstrom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MovieMotion:
    """Trajectories of a movie: corrections (y, x) in movie pixels relative to the first frame.

    `uncertainty_px` is the posterior's own rms error of a trajectory per axis, about each place's mean shift.
    `local` is None where none was asked for or none could be shown.
    """

    shifts_px: Float[Tensor, "frame 2"]
    local: LocalMotion | None
    uncertainty_px: float


def spatial_basis(v: Float[Tensor, "*p"], u: Float[Tensor, "*p"]) -> Float[Tensor, "*p 6"]:
    """Return {1, u, u², v, v², uv}, RELION's order (u along x, v along y)."""
    return torch.stack([torch.ones_like(u), u, u.square(), v, v.square(), u * v], dim=-1)


def evaluate_local_motion(
    local: LocalMotion, v: Float[Tensor, "*p"], u: Float[Tensor, "*p"], frame: int
) -> Float[Tensor, "*p 2"]:
    """Return the local correction (y, x) in movie pixels at positions (v, u) in [−0.5, 0.5] for one frame."""
    return spatial_basis(v, u) @ local.amplitudes[:, :, frame].T


def fit_polynomial(local: LocalMotion) -> Float[Tensor, "2 6 3"]:
    """Return RELION's 18 coefficients per axis, {1, x, x², y, y², xy} × {t, t², t³}, t the frame's index from zero.

    The least-squares fit to `local.amplitudes`: a cubic cannot follow motion that settles within a few frames.
    """
    n = int(local.amplitudes.shape[-1])
    t = torch.arange(n, dtype=torch.float64, device=local.amplitudes.device) / max(1, n - 1)
    powers = torch.stack([t, t.square(), t.pow(3)], dim=-1)
    values = local.amplitudes.to(torch.float64).flatten(0, 1).T
    # the pseudo-inverse also serves movies of fewer than four frames
    coefficients = (torch.linalg.pinv(powers) @ values).T.reshape(2, _N_SPACE, _N_TIME)
    scale = torch.tensor([float(max(1, n - 1)) ** -(p + 1) for p in range(_N_TIME)], dtype=torch.float64)
    return (coefficients * scale.to(coefficients.device)).to(torch.float32)


def estimate_motion(
    movie: CroppedMovie,
    settings: AlignmentSettings,
    *,
    exposures_e_per_angstrom2: Float[Tensor, "frame"] | None = None,
    voltage_kv: float = 300.0,
    has_local: bool = True,
) -> MovieMotion:
    """Return the motion of a movie: whole frames first, then all patches together.

    `exposures_e_per_angstrom2` (at the end of each frame) says how much high resolution late frames have left.
    A field of fewer than three patches of 32 cropped pixels along an axis has whole-frame motion alone.
    """
    shifts = align_whole_frames(movie, settings)
    n_frames = len(shifts)
    if n_frames == 1:
        return MovieMotion(shifts_px=shifts, local=None, uncertainty_px=0.0)
    patches = _Layout(movie, settings, has_local=has_local)
    spectra = patches.cut(movie, shifts)
    rings = make_rings(
        patches.shape_yx,
        movie.cropped_pixel_yx_angstrom,
        high_pass_angstrom=settings.high_pass_angstrom,
        device=spectra.device,
    )
    damage = torch.ones(n_frames, len(rings.frequency), device=spectra.device)
    doses = _TYPICAL_EXPOSURE * torch.arange(1.0, n_frames + 1.0, device=spectra.device)
    if exposures_e_per_angstrom2 is not None:
        doses = exposures_e_per_angstrom2.to(spectra.device)
        damage = torch.exp(-0.5 * doses[:, None] / critical_exposure(rings.frequency, voltage_kv))
    likelihood = PatchLikelihood(spectra, patches.shape_yx, rings, damage, share=patches.share)
    posterior = _maximise(likelihood, patches, shifts / shifts.new_tensor(movie.scale_yx), doses, settings)
    return _as_motion(movie, patches, posterior)


def _maximise(
    likelihood: PatchLikelihood,
    patches: _Layout,
    applied_px: Float[Tensor, "frame 2"],
    doses: Float[Tensor, "frame"],
    settings: AlignmentSettings,
) -> Posterior:
    """Climb from the shifts `applied_px` (cropped pixels), which the patches' spectra have had already."""
    modes = patches.modes
    solver = MotionPosterior(time_kernel(doses), _MODE_SCALE[: modes.shape[1]], patches.pixel_size_angstrom)
    current = torch.zeros(2, modes.shape[1], likelihood.n_frames, dtype=torch.float64, device=modes.device)
    current[:, 0] = (applied_px - applied_px.mean(dim=0)).T
    applied = current.clone()
    prior: MotionPrior | None = None
    signal = likelihood.measure(
        torch.zeros(likelihood.n_patches, likelihood.n_frames, 2, device=modes.device)
    )
    iteration = 0
    while True:
        is_damped = iteration < len(_B_FACTORS_ANGSTROM2)
        b_factor = _B_FACTORS_ANGSTROM2[iteration] if is_damped else 0.0
        field = torch.einsum("pm,amf->pfa", modes, current - applied)
        slope = likelihood.slope(field.to(torch.float32), signal, b_factor / patches.pixel_size_angstrom**2)
        posterior = solver.solve(*_normal_equations(slope, modes, current), prior)
        moved = torch.einsum("pm,amf->pfa", modes, posterior.mean - current)
        # a shift that all frames of a patch share is neither seen nor of any consequence
        change = float((moved - moved.mean(dim=1, keepdim=True)).square().mean().sqrt())
        # the first undamped round still has the signal of the damped one before it
        is_settled = iteration > len(_B_FACTORS_ANGSTROM2) and change < settings.tolerance_px
        if is_settled or iteration + 1 >= settings.max_iterations:
            return posterior
        signal, prior, current = slope.signal, posterior.prior, posterior.mean
        iteration += 1


def _normal_equations(
    slope: Slope, modes: Float[Tensor, "patch mode"], current: Float[Tensor, "2 mode frame"]
) -> tuple[Float[Tensor, "2 mf mf"], Float[Tensor, "2 mf"]]:
    n = modes.shape[1] * slope.gradient.shape[1]
    information = torch.einsum("pm,apfg,pn->amfng", modes, slope.information.to(torch.float64), modes)
    information = information.reshape(2, n, n)
    gradient = torch.einsum("pm,pfa->amf", modes, slope.gradient.to(torch.float64)).reshape(2, n)
    return information, (information @ current.reshape(2, n, 1))[..., 0] + gradient


def _as_motion(movie: CroppedMovie, patches: _Layout, posterior: Posterior) -> MovieMotion:
    amplitudes = (posterior.mean - posterior.mean[:, :, :1]).to(torch.float32)
    amplitudes = amplitudes * amplitudes.new_tensor(movie.scale_yx)[:, None, None]
    shifts = amplitudes[:, 0].T
    uncertainty = _uncertainty(posterior, patches.modes) * math.sqrt(movie.scale_yx[0] * movie.scale_yx[1])
    local = None
    if posterior.prior.local_angstrom > 0:
        # the orthonormal modes as combinations of {1, u, u², v, v², uv}
        amplitudes = torch.einsum("sm,amf->asf", _mode_matrix(shifts.device)[:, 1:], amplitudes[:, 1:])
        field = torch.einsum(
            "ps,asf->pfa", spatial_basis(patches.centres[:, 0], patches.centres[:, 1]), amplitudes
        )
        local = LocalMotion(
            amplitudes=amplitudes,
            patch_centres_yx_px=(patches.centres + 0.5) * shifts.new_tensor(movie.movie_yx),
            patch_shifts_px=field,
            prior_angstrom=posterior.prior.local_angstrom,
        )
    return MovieMotion(shifts_px=shifts, local=local, uncertainty_px=uncertainty)


def _uncertainty(posterior: Posterior, modes: Float[Tensor, "patch mode"]) -> float:
    """Return the rms over patches and frames of the posterior SD, less each patch's mean over the frames."""
    n_modes, n_frames = posterior.mean.shape[1:]
    covariance = posterior.covariance.reshape(2, n_modes, n_frames, n_modes, n_frames)
    per_patch = torch.einsum("pm,amfng,pn->apfg", modes, covariance, modes)
    variance = per_patch.diagonal(dim1=-2, dim2=-1).mean(dim=-1) - per_patch.mean(dim=(-2, -1))
    return float(variance.clamp(min=0.0).mean().sqrt())


def _mode_matrix(device: torch.device) -> Float[Tensor, "6 6"]:
    """Return the orthonormal modes over the unit square (columns) as factors of {1, u, u², v, v², uv}."""
    a, b = math.sqrt(12.0), math.sqrt(180.0)
    columns = [
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, a, 0.0, 0.0, 0.0, 0.0],
        [-b / 12.0, 0.0, b, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, a, 0.0, 0.0],
        [-b / 12.0, 0.0, 0.0, 0.0, b, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 12.0],
    ]
    return torch.tensor(columns, device=device).T


class _Layout:
    """Where the patches lie: a grid of tapered, overlapping windows, or the whole field as one."""

    def __init__(self, movie: CroppedMovie, settings: AlignmentSettings, *, has_local: bool) -> None:
        pixel = movie.cropped_pixel_yx_angstrom
        self.pixel_size_angstrom = math.sqrt(pixel[0] * pixel[1])
        inner = [movie.movie_yx[a] / movie.scale_yx[a] for a in (0, 1)]
        grid = _grid(movie, settings)
        self.is_whole = not has_local or min(inner) < 3 * _MIN_PATCH_PX
        device = movie.spectra.device
        if self.is_whole:
            self.shape_yx = movie.cropped_yx
            self.share = 1.0
            self.centres = torch.zeros(1, 2, device=device)
            self.modes = torch.ones(1, 1, dtype=torch.float64, device=device)
            return
        sizes = [2 * int(min(n, n / g * _PATCH_OVERLAP) // 2) for n, g in zip(inner, grid, strict=True)]
        self.shape_yx = (sizes[0], sizes[1])
        starts = [
            [round(i * (n - size) / (g - 1)) for i in range(g)]
            for n, size, g in zip(inner, sizes, grid, strict=True)
        ]
        tapers = [
            [_taper(size, is_first=i == 0, is_last=i == g - 1, device=device) for i in range(g)]
            for size, g in zip(sizes, grid, strict=True)
        ]
        self._corners = [(y, x) for y in starts[0] for x in starts[1]]
        self._windows = torch.stack([y[:, None] * x[None, :] for y in tapers[0] for x in tapers[1]])
        self.share = min(1.0, inner[0] * inner[1] / float(self._windows.square().sum()))
        middles = [
            [(start + _centroid(taper)) / n - 0.5 for start, taper in zip(*pair, strict=True)]
            for n, *pair in zip(inner, starts, tapers, strict=True)
        ]
        self.centres = torch.tensor([(y, x) for y in middles[0] for x in middles[1]], device=device)
        basis = spatial_basis(self.centres[:, 0], self.centres[:, 1]).to(torch.float64)
        self.modes = basis @ _mode_matrix(device).to(torch.float64)

    def cut(
        self, movie: CroppedMovie, shifts_px: Float[Tensor, "frame 2"]
    ) -> Complex[Tensor, "patch frame h wr"]:
        """Return the spectra of all patches of all frames, whole-frame shifts applied."""
        shifts = shifts_px / shifts_px.new_tensor(movie.scale_yx)
        h, w = self.shape_yx
        if self.is_whole:
            return (movie.spectra * shift_phases(self.shape_yx, shifts))[None]
        spectra = torch.empty(
            (len(self._corners), len(shifts), h, w // 2 + 1),
            dtype=torch.complex64,
            device=movie.spectra.device,
        )
        for f, spectrum in enumerate(movie.spectra):
            phases = shift_phases(movie.cropped_yx, shifts[f])
            aligned = torch.fft.irfft2(spectrum * phases, s=movie.cropped_yx)
            cuts = torch.stack([aligned[y : y + h, x : x + w] for y, x in self._corners])
            spectra[:, f] = torch.fft.rfft2(cuts * self._windows)
        return spectra


def _grid(movie: CroppedMovie, settings: AlignmentSettings) -> tuple[int, int]:
    y, x = (
        min(8, max(3, round(n * movie.pixel_size_angstrom / settings.patch_angstrom))) for n in movie.movie_yx
    )
    return y, x


def _taper(n: int, *, is_first: bool, is_last: bool, device: torch.device) -> Float[Tensor, "n"]:
    """Return a window that rises over what neighbours share, as the root of a raised cosine; briefly at the field's edge."""
    rim = max(1.0, n * (1.0 - 1.0 / _PATCH_OVERLAP))
    position = torch.arange(n, device=device) + 0.5
    rise = position / (_EDGE_RIM_PX if is_first else rim)
    fall = (n - position) / (_EDGE_RIM_PX if is_last else rim)
    return torch.sin(0.5 * math.pi * torch.minimum(rise, fall).clamp(max=1.0))


def _centroid(window: Float[Tensor, "n"]) -> float:
    """Return where the window's power has its middle, in pixels from its start."""
    weights = window.square()
    return float((weights * (torch.arange(len(window), device=window.device) + 0.5)).sum() / weights.sum())
