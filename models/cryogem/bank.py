"""What a training needs of a session, in one file: volumes, CTFs, counts, ice maps and real micrographs.

A bank is made once, when a training starts; training, generation and evaluation read nothing else, so that a live
session may go on, and a resumed training sees the same data. It is a safetensors file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from models.cryogem.contrast import SessionContrast
from models.cryogem.greys import GreyStatistics
from models.cryogem.specimen import CountDistribution
from models.optics.ctf_fit import Microscope
from models.weights import load_checkpoint, save_checkpoint

_FORMAT = "icestream-cryogem-bank-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class BankFacts:
    """Everything of a bank that is not an array.

    `pixel_size_angstrom` is that of the working frames, `micrograph_pixel_size_angstrom` of the session's
    micrographs. `spacing_px` is the least Chebyshev distance of two particles in working pixels. The last
    `n_held_out` micrographs are for evaluation alone. `skipped` counts, by reason, what was left out; `sources` are the
    maps, `request` is what was asked for. `contrast` is that of the training micrographs at their picks, None in
    banks of earlier versions and where picks are few.
    """

    pixel_size_angstrom: float
    micrograph_pixel_size_angstrom: float
    diameter_angstrom: float
    symmetry: str
    microscope: Microscope
    counts: CountDistribution
    spacing_px: float
    greys: GreyStatistics
    names: tuple[str, ...]
    n_held_out: int
    skipped: Mapping[str, int]
    sources: tuple[str, ...]
    request: str = ""
    contrast: SessionContrast | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBank:
    """The arrays: volumes in volts, CTF rows (u, v in Å, angle, phase shift in degrees), ice maps, micrographs."""

    facts: BankFacts
    volumes: Float[Tensor, "c d d d"]
    ctfs: Float[Tensor, "n 4"]
    ice_maps: Float[Tensor, "m s s"]
    micrographs: UInt8[Tensor, "n h w"]

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Shape of a working frame."""
        return int(self.micrographs.shape[1]), int(self.micrographs.shape[2])

    @property
    def training_micrographs(self) -> UInt8[Tensor, "n h w"]:
        """The micrographs that the discriminator sees."""
        return self.micrographs[: len(self.micrographs) - self.facts.n_held_out]

    @property
    def held_out_micrographs(self) -> UInt8[Tensor, "n h w"]:
        """The micrographs that no training sees."""
        return self.micrographs[len(self.micrographs) - self.facts.n_held_out :]


def save_bank(path: Path, bank: SessionBank) -> str:
    """Write a bank atomically and return its SHA-256."""
    tensors = {
        "volumes": bank.volumes,
        "ctfs": bank.ctfs,
        "ice_maps": bank.ice_maps,
        "micrographs": bank.micrographs,
    }
    return save_checkpoint(path, tensors, {"format": _FORMAT, "facts": asdict(bank.facts)})


def load_bank(path: Path) -> SessionBank:
    """Read a bank; raise ValueError for anything else."""
    loaded = load_checkpoint(path)
    if loaded.metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {loaded.metadata.get('format')!r}, must be {_FORMAT!r}")
    return SessionBank(
        facts=_facts_from(loaded.metadata["facts"]),
        volumes=loaded.tensors["volumes"],
        ctfs=loaded.tensors["ctfs"],
        ice_maps=loaded.tensors["ice_maps"],
        micrographs=loaded.tensors["micrographs"],
    )


def _facts_from(values: Mapping[str, Any]) -> BankFacts:
    contrast = values.get("contrast")
    if contrast is not None:
        contrast = SessionContrast(profile=tuple(contrast["profile"]), long_waves=contrast["long_waves"])
    return BankFacts(
        **{
            **values,
            "microscope": Microscope(**values["microscope"]),
            "counts": CountDistribution(**values["counts"]),
            "greys": GreyStatistics(**values["greys"]),
            "names": tuple(values["names"]),
            "sources": tuple(values["sources"]),
            "contrast": contrast,
        }
    )
