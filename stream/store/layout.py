"""The output folder: where each file lies. The names are a contract (README, "The output folder")."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stream.records.values import ClusteringId, RunId


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """Paths below one output folder; `name` is the exposure's unique name."""

    root: Path

    @property
    def session(self) -> Path:
        """The configuration as used."""
        return self.root / "session.yaml"

    @property
    def journal(self) -> Path:
        """Every event: the only truth."""
        return self.root / "journal.sqlite"

    @property
    def lock(self) -> Path:
        """Held by the one service that writes here."""
        return self.root / ".icestream.lock"

    @property
    def inbox(self) -> Path:
        """Where requests of people wait for the service."""
        return self.root / "inbox"

    @property
    def features(self) -> Path:
        """The feature cache."""
        return self.root / "features"

    @property
    def exports(self) -> Path:
        """STAR and .cs exports."""
        return self.root / "export"

    @property
    def report(self) -> Path:
        """The session report, where no other place is given for it."""
        return self.root / "report.html"

    @property
    def stage_folders(self) -> tuple[Path, ...]:
        """Where stages write the files of single exposures."""
        one = (self.micrograph, self.unweighted, self.motion, self.ctf_values, self.picks, self.particles)
        return tuple(path("x").parent for path in one)

    def micrograph(self, name: str) -> Path:
        """The aligned, dose-weighted micrograph."""
        return self.root / "micrographs" / f"{name}.mrc"

    def unweighted(self, name: str) -> Path:
        """The aligned micrograph without dose weights, where it was asked for."""
        return self.root / "micrographs" / "unweighted" / f"{name}.mrc"

    def thumbnail(self, name: str) -> Path:
        """The micrograph's picture with its picks."""
        return self.root / "micrographs" / f"{name}.png"

    def motion(self, name: str) -> Path:
        """RELION trajectories."""
        return self.root / "motion" / f"{name}.star"

    def ctf_picture(self, name: str) -> Path:
        """Spectrum with its fit."""
        return self.root / "ctf" / f"{name}.png"

    def ctf_values(self, name: str) -> Path:
        """The fit as JSON."""
        return self.root / "ctf" / f"{name}.json"

    def picks(self, name: str) -> Path:
        """Coordinates in pixels of the micrograph."""
        return self.root / "picks" / f"{name}.star"

    def particles(self, name: str) -> Path:
        """The extracted stack."""
        return self.root / "particles" / f"{name}.mrcs"

    def particles_table(self, name: str) -> Path:
        """One row per image of the stack: uid, coordinates, CTF."""
        return self.root / "particles" / f"{name}.star"

    def run(self, run_id: RunId) -> Path:
        """The folder of one engine run."""
        return self.root / "runs" / run_id

    def training(self, decision_id: str) -> Path:
        """The folder of the CryoGEM training that a decision asked for."""
        return self.root / "trainings" / f"cryogem-{decision_id}"

    def clustering(self, clustering_id: ClusteringId) -> Path:
        """The folder of one clustering of particles."""
        return self.root / "clusters" / clustering_id

    def cluster_labels(self, clustering_id: ClusteringId) -> Path:
        """Which cluster each particle is in."""
        return self.clustering(clustering_id) / "labels.npz"

    def relative(self, path: Path) -> str:
        """Return `path` relative to the output folder, with forward slashes."""
        return path.relative_to(self.root).as_posix()
