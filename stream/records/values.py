"""Frozen values that travel between the stages.

Units are in the names: Å, degrees, kV, mm, seconds; RELION's conventions throughout. Paths are absolute for
inputs and relative to the output folder for everything that icestream wrote itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NewType

from stream.records.figures import RunFigures

ExposureId = NewType("ExposureId", str)
RunId = NewType("RunId", str)
CampaignId = NewType("CampaignId", str)
ClusteringId = NewType("ClusteringId", str)
HalfSet = Literal[1, 2]


class InputKind(Enum):
    """What an input file holds."""

    MOVIE = "movie"
    MICROGRAPH = "micrograph"
    PARTICLES = "particles"


class Stage(Enum):
    """One step of an exposure's way."""

    PREPROCESS = "preprocess"
    RANK = "rank"


class FailureKind(Enum):
    """Who owns a failure: the input (quarantine) or the machine (try again)."""

    INPUT = "input"
    RESOURCE = "resource"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """Identity of a file on disk: never its name alone.

    `fingerprint` is a blake2b hex digest of the first and last 64 KiB and the size, taken at first read.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Optics:
    """The microscope's constants for one optics group; amplitude contrast is a fraction."""

    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquisitionMetadata:
    """What the microscope's own files (EPU XML, SerialEM mdoc) and the header say; None = not said."""

    pixel_size_angstrom: float | None = None
    dose_e_per_angstrom2: float | None = None
    voltage_kv: float | None = None
    beam_shift_group: str | None = None
    acquired_at: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """One shot at one position: the identity of all that follows.

    `name` is unique in the session and names every output file. `shape_yx` and `n_frames` are of the file
    (`n_frames` is 1 for a micrograph; for particles, the number of images and their box). `micrograph_name`
    is set when the exposure is one micrograph's share of a particle file.
    """

    exposure_id: ExposureId
    name: str
    kind: InputKind
    file: FileIdentity
    n_frames: int
    shape_yx: tuple[int, int]
    metadata: AcquisitionMetadata
    micrograph_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CtfFit:
    """A CTF fit: underfocus positive, u ≥ v, angle from x to u.

    `is_reliable` is False when no rings were found; the numbers then mean nothing. Standard deviations come
    from the curvature of the fit's likelihood; `confidence` lies in [0, 1]. `thickness_angstrom` is that of the
    ice where a node of the rings shows it, `defocus_gradient_angstrom_per_um` the slope of the defocus across
    the field; None = not determined.
    """

    defocus_u_angstrom: float
    defocus_v_angstrom: float
    astigmatism_angle_deg: float
    phase_shift_deg: float
    fit_resolution_angstrom: float
    score: float
    is_reliable: bool
    defocus_sd_angstrom: float | None = None
    astigmatism_sd_angstrom: float | None = None
    confidence: float | None = None
    thickness_angstrom: float | None = None
    defocus_gradient_angstrom_per_um: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionSummary:
    """Path length of the whole-frame trajectory: in all, over the first 4 e/Å², and over the rest.

    The local figures are of the motion that is left after the whole-frame shifts: its rms over the field and
    the frames, and the longest path of a patch; None = not estimated.
    """

    total_motion_angstrom: float
    early_motion_angstrom: float
    late_motion_angstrom: float
    rms_local_motion_angstrom: float | None = None
    max_patch_motion_angstrom: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GainOrientation:
    """How a gain reference is turned to fit the movies: turned counter-clockwise first, then flipped."""

    flip_x: bool = False
    flip_y: bool = False
    rotate_deg: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLimits:
    """What an exposure must keep to be used; a limit of None is not applied.

    A figure that could not be determined breaks the limit on it only for the CTF (no rings is a failure).
    """

    max_ctf_fit_angstrom: float | None = None
    max_astigmatism_angstrom: float | None = None
    min_defocus_angstrom: float | None = None
    max_defocus_angstrom: float | None = None
    max_total_motion_angstrom: float | None = None
    max_early_motion_angstrom: float | None = None
    max_ice_ratio: float | None = None
    max_crystalline_ice: float | None = None
    max_masked_fraction: float | None = None
    min_picks: int | None = None
    max_picks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessResult:
    """What preprocessing made of one exposure; paths are relative to the output folder, None = not made.

    `crystalline_ice` is the excess of sharp ice reflections in robust standard deviations, `masked_fraction`
    the part of the field that is carbon, contamination or ice, `gain_residual` the part
    of the gain reference's fine detail that is left in the mean of the corrected frames (0 when it fits). `picker` names what picked:
    "blob", "template:RUN" or "topaz".
    """

    exposure_id: ExposureId
    micrograph: str | None
    thumbnail: str | None
    particles: str | None
    n_picks: int
    n_particles: int
    n_excluded_particles: int
    box_size_px: int
    pixel_size_angstrom: float
    motion: MotionSummary | None
    ctf: CtfFit | None
    ice_ratio: float | None
    seconds: dict[str, float]
    crystalline_ice: float | None = None
    masked_fraction: float | None = None
    gain_residual: float | None = None
    picker: str = "blob"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """What the ranker made of one exposure's particles.

    `score_histogram` has 100 equal bins over [0, 1]; `n_scored + n_excluded` is the number given.
    `batch_sizes` are those of the batches that began with this exposure's images. `provider` is what ran the model
    (None in journals from before it was kept).
    """

    exposure_id: ExposureId
    model_hash: str
    n_scored: int
    n_excluded: int
    n_cache_hits: int
    score_histogram: tuple[int, ...]
    seconds: dict[str, float]
    batch_sizes: tuple[int, ...] = ()
    provider: str | None = None


class CampaignTrigger(Enum):
    """Why a campaign is due."""

    RUNG = "rung"
    LOSS = "loss"
    RESCORED = "rescored"
    SETTINGS = "settings"
    USER = "user"
    END = "end"


class CampaignPlan(Enum):
    """What a campaign does: one run on everything, or the paper's whole search."""

    LIGHT = "light"
    FULL = "full"


class SweepPolicy(Enum):
    """How the number of particles is searched: the paper's nested parts, or upstream's later bounds and turns."""

    PAPER = "paper"
    BOUNDS = "bounds"


class RunPurpose(Enum):
    """What a run is for, within its campaign."""

    UPDATE = "update"  # everything, continued from the accepted map and its poses
    REBUILD = "rebuild"  # everything, from nothing, to be compared with the update
    INITIAL = "initial"  # the best ranked, from nothing
    SURVEY = "survey"  # a search run continued with its particles in clusters, to foretell their unions
    UNION = "union"  # clusters that the sums of another run foretell to be isotropic together
    CLUSTER = "cluster"  # one cluster of like views, from nothing
    TEMPLATE = "template"  # everything, refined from the chosen cluster's map
    SWEEP = "sweep"  # the best ranked, refined from the campaign's initial model


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleSubset:
    """Which of the members' particles a run uses: of those above the threshold (and in the clusters) the best `top`.

    Ranks go over all members; equal scores are ranked by uid, so that the order of arrival does not matter.
    `clusters` are labels of `clustering`; empty = all, their sums kept by cluster.
    """

    score_threshold: float
    top: int | None = None
    clustering: ClusteringId | None = None
    clusters: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignRequest:
    """A row of engine runs on one set of exposures, with every number that its runs are derived from.

    `n_particles` is k, the number above `score_threshold`. `start_map` and `warm_start` are those of the run that
    continues the accepted map (None = no such run). `search_sizes` are the sizes of the runs from nothing (empty =
    none); `n_parts` counts the nested parts of the sweep, `turns` and `count_range` are the numbers of runs and
    the least and greatest count of a search by turns (empty and None with nested parts). `repeats` names a campaign
    that did these runs already: none is started, and its choice is taken.
    """

    campaign_id: CampaignId
    trigger: CampaignTrigger
    plan: CampaignPlan
    sweep: SweepPolicy
    n_particles: int
    score_threshold: float
    model_hash: str
    symmetry: str
    mask_diameter_angstrom: float | None
    start_map: RunId | None
    warm_start: RunId | None
    search_sizes: tuple[int, ...]
    n_parts: int
    turns: tuple[int, ...]
    count_range: tuple[int, int] | None
    repeats: CampaignId | None
    reason: str


class ClusterSource(Enum):
    """What particles of like views are found by: k-means++ on the ranker's features, or class averages of the images."""

    FEATURES = "features"
    CLASSES = "classes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringRequest:
    """A division of a campaign's particles into clusters of like views."""

    clustering_id: ClusteringId
    campaign_id: CampaignId
    model_hash: str
    subset: ParticleSubset
    n_clusters: int
    reason: str
    source: ClusterSource = ClusterSource.FEATURES


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringResult:
    """Particles per cluster, in the order of the labels; `folder` (relative) holds labels.npz.

    Particles without a feature (or whose image cannot be used) are in no cluster.
    """

    clustering_id: ClusteringId
    sizes: tuple[int, ...]
    n_without_features: int
    folder: str
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """An engine run that the controller asks for; complete, so that a replay asks no settings.

    `n_particles` is what the subset was expected to hold when the run was decided. `start_map` names the run
    whose map is the reference, `warm_start` the run whose poses and sums are continued, too; None = from nothing.
    `compare_with` names the run whose map the result is correlated with.
    """

    run_id: RunId
    campaign_id: CampaignId
    purpose: RunPurpose
    subset: ParticleSubset
    n_particles: int
    model_hash: str
    symmetry: str
    mask_diameter_angstrom: float | None
    start_map: RunId | None
    warm_start: RunId | None
    compare_with: RunId | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnionForecast:
    """What the sums of a run foretell of the best union of its clusters, without another refinement."""

    clustering: ClusteringId
    clusters: tuple[int, ...]
    n_particles: int
    resolution_angstrom: float | None
    cfar: float | None
    cfar_null: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What an engine run gave, the same record for every engine; None = could not be determined.

    `resolution_angstrom` is where the corrected half-map FSC crosses 0.143. `folder` is relative to the
    output folder and holds map.mrc half1.mrc half2.mrc mask.mrc fsc.star poses.star orientation.json.
    `nyquist_angstrom` is the finest resolution that the working box can show. `correlation` is that with the map
    of the run that was to be compared with, after alignment.
    """

    run_id: RunId
    engine: str
    n_particles: int
    symmetry: str
    resolution_angstrom: float | None
    cfar: float | None
    cfar_null: float | None
    scf_star: float | None
    note: str
    folder: str
    seconds: dict[str, float]
    nyquist_angstrom: float | None = None
    correlation: float | None = None
    union: UnionForecast | None = None
    figures: RunFigures | None = None
