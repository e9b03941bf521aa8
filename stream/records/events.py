"""Events: everything that happened, in the order in which it was committed.

Every event carries its time (`at`, seconds since the epoch). State is derived from events and from nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass

from stream.records.training import TrainingState
from stream.records.values import (
    CampaignId,
    CampaignRequest,
    ClusteringId,
    ClusteringRequest,
    ClusteringResult,
    Exposure,
    ExposureId,
    FailureKind,
    FileIdentity,
    GainOrientation,
    PreprocessResult,
    QualityLimits,
    RankResult,
    RunId,
    RunRequest,
    RunResult,
    Stage,
)
from stream.records.wishes import Wish

BY_CONFIGURATION = "configuration"
"""`request_id` of limits that came from the session's configuration and not from a person's request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    """The service started (again) on this output folder; whatever was in work is issued anew."""

    at: float
    settings_digest: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposureFound:
    """A file settled, opened and was valid."""

    at: float
    exposure: Exposure


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRejected:
    """A file was found but is not a valid input; it waits in quarantine until it changes."""

    at: float
    exposure_id: ExposureId
    name: str
    file: FileIdentity
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GainOriented:
    """The eight orientations of the gain reference were tried on the first movies.

    `orientation` is None when none stood out; `contrast` is what the best one leads the second by, in standard
    errors, and `note` says it in words.
    """

    at: float
    orientation: GainOrientation | None
    contrast: float
    n_movies: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLimitsChanged:
    """Somebody set the limits that exposures are accepted by; every exposure is judged again.

    `request_id` names the request that asked for it, so that none takes effect twice; "" when none did. `undoes`
    names the decision that this event takes back, "" for a decision of its own.
    """

    at: float
    limits: QualityLimits
    reason: str
    request_id: str = ""
    undoes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposureOverruled:
    """Somebody accepted or rejected an exposure whatever the limits say; None takes that back.

    `request_id` names the request that asked for it, so that none takes effect twice; "" when none did. `undoes`
    names the decision that this event takes back, "" for a decision of its own.
    """

    at: float
    exposure_id: ExposureId
    is_accepted: bool | None
    reason: str
    request_id: str = ""
    undoes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDecided:
    """Somebody decided about the runs, or about the exposures of some time (`stream.records.wishes`).

    `request_id` names the request that asked for it, so that none takes effect twice; "" when none did.
    """

    at: float
    wish: Wish
    reason: str
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposurePreprocessed:
    """Preprocessing ended well."""

    at: float
    result: PreprocessResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposureRanked:
    """Every particle of the exposure has a score and a feature in the cache."""

    at: float
    result: RankResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFailed:
    """A stage failed for one exposure."""

    at: float
    exposure_id: ExposureId
    stage: Stage
    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignStarted:
    """A row of runs was decided on the exposures that are in use now; they stay its exposures."""

    at: float
    request: CampaignRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignEnded:
    """A campaign has nothing left to do, or (not `is_complete`) is given up.

    `accepted` is the run whose map is the accepted one from now on; None leaves it as it was.
    """

    at: float
    campaign_id: CampaignId
    is_complete: bool
    accepted: RunId | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """An engine run was decided; it is committed before the engine hears of it."""

    at: float
    request: RunRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringStarted:
    """A clustering of a campaign's particles was decided."""

    at: float
    request: ClusteringRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticlesClustered:
    """A clustering ended well."""

    at: float
    result: ClusteringResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringFailed:
    """A clustering failed."""

    at: float
    clustering_id: ClusteringId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """An engine run ended with a result."""

    at: float
    result: RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """An engine run failed."""

    at: float
    run_id: RunId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCancelled:
    """An engine run was stopped because its result was no longer wanted."""

    at: float
    run_id: RunId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingChanged:
    """A training of CryoGEM on this session was offered, started, got on, ended or stopped; `words` say how.

    `decision_id` names the decision that asked for it, "" for the offer.
    """

    at: float
    state: TrainingState
    words: str
    decision_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpaceChanged:
    """Free space fell below the reserve, or came back above it."""

    at: float
    is_low: bool
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputEnded:
    """No more input will come: the last run may use everything."""

    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequested:
    """The operator asked the service to stop: finish what is in work, start nothing new."""

    at: float


Event = (
    SessionOpened
    | ExposureFound
    | FileRejected
    | GainOriented
    | QualityLimitsChanged
    | ExposureOverruled
    | SessionDecided
    | ExposurePreprocessed
    | ExposureRanked
    | StageFailed
    | CampaignStarted
    | CampaignEnded
    | RunStarted
    | RunEnded
    | RunFailed
    | RunCancelled
    | ClusteringStarted
    | ParticlesClustered
    | ClusteringFailed
    | TrainingChanged
    | DiskSpaceChanged
    | InputEnded
    | DrainRequested
)
