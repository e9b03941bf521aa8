"""Orientation diagnostics of a half-map pair: conical FSC, cFAR with its isotropic null, FSO, sphericity, signal.

cFAR is the smallest over the largest k²-weighted area under the conical FSC (double cone of 20°, 3,072
HEALPix directions) up to its crossing of 0.143. It lies in [0, 1]; low values mean that some directions of the
map carry less. It is biased low in small boxes and under tight masks, hence it is always given with
`cfar_null`, the same number for isotropic data of our signal-to-noise ratio, and with their ratio.

A conical FSC is a half-map FSC: its 0.143 corresponds to 0.5 against a noise-free truth. No symmetry is assumed
unless a point group is handed in. `relative_signal` is icestream's own definition and not comparable with
other programs until somebody has compared them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from models.reconstruction.cones import (
    Cone,
    Region,
    Slab,
    directional_sums,
    half_directions,
)
from models.reconstruction.efficiency import ViewEfficiency, view_efficiency
from models.reconstruction.fsc import (
    GOLD_STANDARD_THRESHOLD,
    fourier_shell_correlation,
    shell_index,
    shell_sum,
)
from models.reconstruction.sampling import Sampling, sampling_factor, view_directions
from models.reconstruction.sphericity import sphericity

CONE_HALF_ANGLE_DEG = 20.0
CONE = Cone(CONE_HALF_ANGLE_DEG)
MINIMUM_MEMBERS = 5
"""Coefficient pairs a cone needs on a shell; below, its FSC is undefined (shells 1-3 have empty cones)."""

CFAR_LIMIT = 0.5
"""Below it CryoSPARC's guide speaks of anisotropy; perfect data in a small box may lie near it."""

SCF_LIMIT = 0.81
"""8/π², the value of ideal side views."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrientationDiagnostics:
    """What `orientation_diagnostics` found; curves have one value per shell (NaN where undefined).

    `directions` holds one of each antipodal pair, 1,536 unit vectors (x, y, z); the arrays `cfsc`, `area`,
    `direction_resolution_angstrom` and `relative_signal` follow it. `sphericity` is 3DFSC's; `efficiency` is
    cryoEF's E_od and, like SCF*, knows only the views. `fso` is the share of directions with a
    conical FSC of at least 0.143 and `fso_span_angstrom` where it falls to 0.9 and to 0.1.
    """

    cfar: float
    cfar_unweighted: float
    cfar_null: float | None
    cfar_ratio: float | None
    sphericity: float
    cfsc: Float[Tensor, "d shells"]
    cfsc_mean: Float[Tensor, " shells"]
    cfsc_min: Float[Tensor, " shells"]
    cfsc_max: Float[Tensor, " shells"]
    cfsc_sd: Float[Tensor, " shells"]
    global_fsc: Float[Tensor, " shells"]
    fso: Float[Tensor, " shells"]
    fso_span_angstrom: tuple[float | None, float | None]
    directions: Float[Tensor, "d 3"]
    area: Float[Tensor, " d"]
    direction_resolution_angstrom: Float[Tensor, " d"]
    relative_signal: Float[Tensor, " d"]
    worst_direction: tuple[float, float, float]
    best_direction: tuple[float, float, float]
    worst_resolution_angstrom: float
    best_resolution_angstrom: float
    sampling: Sampling | None
    efficiency: ViewEfficiency | None
    views: Float[Tensor, "n 3"] | None
    is_masked: bool
    n_symmetry: int
    box_px: int
    pixel_size_angstrom: float

    @property
    def view_efficiency(self) -> float | None:
        """E_od of the views, None where no poses were given."""
        return None if self.efficiency is None else self.efficiency.efficiency

    @property
    def scf_star(self) -> float | None:
        """SCF* of the views, None where no poses were given."""
        return None if self.sampling is None else self.sampling.scf_star

    def summary(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary: the numbers, and the curves as lists (NaN for undefined)."""
        scalars = [
            "cfar",
            "cfar_unweighted",
            "cfar_null",
            "cfar_ratio",
            "scf_star",
            "sphericity",
            "view_efficiency",
            "fso_span_angstrom",
            "worst_direction",
            "best_direction",
            "worst_resolution_angstrom",
            "best_resolution_angstrom",
            "is_masked",
            "n_symmetry",
            "box_px",
            "pixel_size_angstrom",
        ]
        curves = ["cfsc_mean", "cfsc_min", "cfsc_max", "cfsc_sd", "global_fsc", "fso"]
        document: dict[str, Any] = {name: getattr(self, name) for name in scalars}
        document |= {name: getattr(self, name).tolist() for name in curves}
        document["scf"] = None if self.sampling is None else self.sampling.scf
        document["unsampled_fraction"] = None if self.sampling is None else self.sampling.unsampled_fraction
        document["n_views"] = None if self.sampling is None else self.sampling.n_views
        document["relative_signal_min"] = float(self.relative_signal.min())
        document["relative_signal_max"] = float(self.relative_signal.max())
        document["cone_half_angle_deg"] = CONE_HALF_ANGLE_DEG
        document["n_directions"] = 2 * int(self.directions.shape[0])
        document["threshold"] = GOLD_STANDARD_THRESHOLD
        return document


def orientation_diagnostics(
    half1: Float[Tensor, "n n n"],
    half2: Float[Tensor, "n n n"],
    mask: Float[Tensor, "n n n"] | None,
    pixel_size_angstrom: float,
    *,
    generator: torch.Generator,
    symmetry_matrices: Float[Tensor, "g 3 3"] | None = None,
    rotations: Float[Tensor, "v 3 3"] | None = None,
    n_null: int = 20,
) -> OrientationDiagnostics:
    """Measure how evenly the directions of a half-map pair are resolved.

    Parameters
    ----------
    half1, half2
        Independent half-maps, unfiltered.
    mask
        Soft mask in [0, 1] put on both, best the refinement's tight mask; None leaves the maps as they are.
    pixel_size_angstrom
        Pixel size.
    generator
        Draws the null maps and the views for SCF.
    symmetry_matrices
        Point group the maps have: sums are averaged over each direction's images, and views are repeated.
    rotations
        Poses of the particles (RELION convention), for SCF*.
    n_null
        Isotropic half-map pairs behind `cfar_null`; 0 leaves it out (each costs about one evaluation).
    """
    _require_inputs(half1, half2, mask)
    size = int(half1.shape[0])
    box_angstrom = size * pixel_size_angstrom
    m1, m2 = (half1, half2) if mask is None else (half1 * mask, half2 * mask)
    a, b = torch.fft.rfftn(m1.float()), torch.fft.rfftn(m2.float())
    cfsc = conical_fsc(a, b, symmetry_matrices)
    end = crossing_shells(cfsc)
    area = weighted_area(cfsc, end, power=2)
    cfar = area_ratio(area)
    global_fsc = fourier_shell_correlation(m1, m2)
    null = None
    if n_null > 0:
        power = shell_sum(a.abs().square() + b.abs().square(), size)
        null = isotropic_cfar(global_fsc, power, mask, size, n_null=n_null, generator=generator)
    worst, best = int(area.argmin()), int(area.argmax())
    resolution = box_angstrom / end.clamp_min(1).float()
    directions = half_directions()
    fso = _fraction_of_directions(cfsc)
    views = None if rotations is None else view_directions(rotations)
    return OrientationDiagnostics(
        cfar=cfar,
        cfar_unweighted=area_ratio(weighted_area(cfsc, end, power=0)),
        cfar_null=null,
        cfar_ratio=None if not null else cfar / null,
        sphericity=sphericity(cfsc, size, pixel_size_angstrom),
        cfsc=cfsc,
        **_spread(cfsc),
        global_fsc=global_fsc,
        fso=fso,
        fso_span_angstrom=(_falls_to(fso, 0.9, box_angstrom), _falls_to(fso, 0.1, box_angstrom)),
        directions=directions,
        area=area,
        direction_resolution_angstrom=resolution,
        relative_signal=relative_signal(a, b, symmetry_matrices),
        worst_direction=_triple(directions[worst]),
        best_direction=_triple(directions[best]),
        worst_resolution_angstrom=float(resolution[worst]),
        best_resolution_angstrom=float(resolution[best]),
        sampling=None
        if views is None
        else sampling_factor(views, generator=generator, group=symmetry_matrices),
        efficiency=None if views is None else view_efficiency(views, group=symmetry_matrices),
        views=views,
        is_masked=mask is not None,
        n_symmetry=1 if symmetry_matrices is None else int(symmetry_matrices.shape[0]),
        box_px=size,
        pixel_size_angstrom=pixel_size_angstrom,
    )


def conical_fsc(
    a: Complex[Tensor, "n n nr"],
    b: Complex[Tensor, "n n nr"],
    group: Float[Tensor, "g 3 3"] | None = None,
    *,
    region: Region = CONE,
) -> Float[Tensor, "d shells"]:
    """Return the FSC around each of `half_directions()` from half spectra; NaN where a cone is too empty."""
    return directional_sums(a, b, region, group=group).correlation(MINIMUM_MEMBERS)


def crossing_shells(
    cfsc: Float[Tensor, "d shells"], threshold: float = GOLD_STANDARD_THRESHOLD
) -> Int[Tensor, " d"]:
    """Return the first of two consecutive defined shells at or below the threshold, else the last shell.

    A single shell is not enough: a cone holds only some 0.38 s² coefficient pairs, and one chance dip near the
    origin would set cFAR to zero. Nor are two: where a molecule's transform has a node, two or three shells of
    a direction carry no signal and those beyond do (β-galactosidase at 15 Å along one axis: 0.78, 0.01,
    -0.19, 0.65, 0.72). The rule is therefore applied to the running median of five shells, which passes over
    nodes and leaves the crossing of a falling curve where it is. Undefined shells (NaN) are passed over.
    """
    cfsc = _running_median(cfsc)
    n_directions, n_shells = cfsc.shape
    end = torch.full((n_directions,), n_shells - 1, dtype=torch.int64)
    candidate = torch.full((n_directions,), -1, dtype=torch.int64)
    is_open = torch.ones(n_directions, dtype=torch.bool)
    for shell in range(1, n_shells):
        value = cfsc[:, shell]
        is_defined = ~torch.isnan(value)
        is_below = is_defined & (value <= threshold)
        is_crossing = is_open & is_below & (candidate >= 0)
        end = torch.where(is_crossing, candidate, end)
        is_open &= ~is_crossing
        fresh = torch.where(is_below, shell, -1)
        candidate = torch.where(is_defined, fresh, candidate)
    return end


def _running_median(curves: Float[Tensor, "d shells"], width: int = 5) -> Float[Tensor, "d shells"]:
    """Return the median over `width` shells around each, of those that are defined; NaN stays NaN."""
    reach = width // 2
    padded = torch.nn.functional.pad(curves, (reach, reach), value=math.nan)
    medians: Tensor = padded.unfold(1, width, 1).nanquantile(0.5, dim=2)
    return torch.where(torch.isnan(curves), curves, medians)


def weighted_area(
    cfsc: Float[Tensor, "d shells"], end: Int[Tensor, " d"], *, power: int
) -> Float[Tensor, " d"]:
    """Return Σ s^power cFSC(s) over defined shells 1 … end − 1 of every direction."""
    shells = torch.arange(cfsc.shape[1], dtype=torch.float32)
    is_counted = (shells[None] >= 1) & (shells[None] < end[:, None])
    return (torch.nan_to_num(cfsc) * shells**power * is_counted).sum(dim=1)


def area_ratio(area: Float[Tensor, " d"]) -> float:
    """Return min / max in [0, 1]; 0 if no direction carries signal."""
    largest = float(area.max())
    return max(float(area.min()), 0.0) / largest if largest > 0 else 0.0


def isotropic_cfar(
    global_fsc: Float[Tensor, " shells"],
    radial_power: Float[Tensor, " shells"],
    mask: Float[Tensor, "n n n"] | None,
    size_px: int,
    *,
    n_null: int,
    generator: torch.Generator,
) -> float:
    """Return the median cFAR of isotropic Gaussian half-map pairs with the given FSC, power spectrum and mask.

    Symmetry does not enter: a symmetric map's cones hold no more independent coefficients than these.
    """
    amplitude = radial_power.clamp_min(0).sqrt().float()
    counts = shell_sum(torch.ones(size_px, size_px, size_px // 2 + 1), size_px).clamp_min(1).sqrt()
    amplitude = amplitude / counts.float()
    fsc = global_fsc.clamp(0.0, 1.0)
    index = shell_index(size_px).clamp_max(size_px // 2)
    shape = (size_px, size_px, size_px)
    common, own = (amplitude * fsc.sqrt())[index], (amplitude * (1.0 - fsc).sqrt())[index]

    def draw() -> Tensor:
        spectrum: Tensor = torch.fft.rfftn(torch.randn(shape, generator=generator))
        return spectrum

    def seen_through_mask(spectrum: Tensor) -> Tensor:
        if mask is None:
            return spectrum
        masked: Tensor = torch.fft.rfftn(torch.fft.irfftn(spectrum, s=shape) * mask.cpu())
        return masked

    values = []
    for _ in range(n_null):
        signal = draw() * common
        cfsc = conical_fsc(seen_through_mask(signal + draw() * own), seen_through_mask(signal + draw() * own))
        values.append(area_ratio(weighted_area(cfsc, crossing_shells(cfsc), power=2)))
    return float(torch.tensor(values).median())


def relative_signal(
    a: Complex[Tensor, "n n nr"], b: Complex[Tensor, "n n nr"], group: Float[Tensor, "g 3 3"] | None = None
) -> Float[Tensor, " d"]:
    """Return the k²-weighted FSC area of the slab each view measures (± 20°), over the mean of all views.

    Values below 1 mark views whose absence hurts the map (icestream's definition).
    """
    slab = conical_fsc(a, b, group, region=Slab(CONE_HALF_ANGLE_DEG))
    area = weighted_area(slab, crossing_shells(slab), power=2)
    return area / area.mean().clamp_min(1e-12)


def _spread(cfsc: Float[Tensor, "d shells"]) -> dict[str, Tensor]:
    """Return mean, minimum, maximum and standard deviation over the directions that are defined."""
    is_defined = ~torch.isnan(cfsc)
    n = is_defined.sum(dim=0)
    filled = torch.nan_to_num(cfsc)
    nan = torch.full((cfsc.shape[1],), torch.nan)
    mean = torch.where(n > 0, filled.sum(dim=0) / n.clamp_min(1), nan)
    variance = torch.where(is_defined, (filled - mean.nan_to_num()) ** 2, 0.0).sum(dim=0) / n.clamp_min(1)
    low = torch.where(is_defined, cfsc, torch.inf).amin(dim=0)
    high = torch.where(is_defined, cfsc, -torch.inf).amax(dim=0)
    return {
        "cfsc_mean": mean,
        "cfsc_min": torch.where(n > 0, low, nan),
        "cfsc_max": torch.where(n > 0, high, nan),
        "cfsc_sd": torch.where(n > 0, variance.sqrt(), nan),
    }


def _fraction_of_directions(cfsc: Float[Tensor, "d shells"]) -> Float[Tensor, " shells"]:
    """Return the share of the defined directions at or above 0.143, NaN where none is defined."""
    n = (~torch.isnan(cfsc)).sum(dim=0)
    share = (cfsc >= GOLD_STANDARD_THRESHOLD).sum(dim=0) / n.clamp_min(1)
    return torch.where(n > 0, share, torch.nan)


def _falls_to(fso: Float[Tensor, " shells"], level: float, box_angstrom: float) -> float | None:
    """Return the resolution at which FSO first falls to `level` (linear between shells); None if it never does."""
    values = [float(v) for v in fso]
    for shell in range(2, len(values)):
        above, below = values[shell - 1], values[shell]
        if below <= level < above:
            return box_angstrom / (shell - 1 + (above - level) / (above - below))
    return None


def _triple(vector: Float[Tensor, "3"]) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in vector)
    return x, y, z


def _require_inputs(half1: Tensor, half2: Tensor, mask: Tensor | None) -> None:
    if half1.ndim != 3 or len(set(half1.shape)) != 1:
        raise ValueError(f"half1: shape {tuple(half1.shape)}, must be a cube")
    for name, other in (("half2", half2), ("mask", mask)):
        if other is not None and other.shape != half1.shape:
            raise ValueError(
                f"{name}: shape {tuple(other.shape)}, must be that of half1 {tuple(half1.shape)}"
            )
