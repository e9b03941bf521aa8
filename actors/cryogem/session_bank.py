"""A session's folder (the OUT of `icestream run`) as CryoGEM's bank.

Reads micrographs/, ctf/, picks/, runs/ID/ and session.yaml; writes nothing. The session may be running: files are replaced
whole, and one that is not there yet is skipped and counted. Every scale is taken from headers, and scales that contradict
each other are refused before anything is rendered.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from actors.cryogem.config import SourceConfig
from models.cryogem.bank import BankFacts, SessionBank
from models.cryogem.contrast import measure_contrast
from models.cryogem.greys import GreyStatistics, PreparedMicrograph, prepare_micrograph, working_shape
from models.cryogem.ice_weights import estimate_ice_weights
from models.cryogem.specimen import fit_counts, measure_spacing, spacing_from_collapse
from models.fourier.point_groups import normalise_symmetry
from models.optics.ctf_fit import Microscope
from models.simulation.session import potential_from_map
from models.simulation.structure import read_density_map
from stream.records.errors import ConfigurationError, InputError
from stream.sinks.relion_star import read_picks_star
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)

_SAME_PIXEL = 1e-3
_DIAMETER_RATIO = (0.4, 2.0)
"""A map's particle against the session's diameter: maps lose their outermost density, masks add some."""
_DEFAULT_COLLAPSE = 0.5
_LEAST_MICROGRAPHS = 2


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One exposure with its CTF and picks; the micrograph is not read yet."""

    name: str
    ctf: tuple[float, float, float, float]
    picks_yx_px: NDArray[np.float64]
    shape_yx: tuple[int, int]
    pixel_size_angstrom: float


@dataclass(frozen=True, slots=True)
class _SessionFacts:
    microscope: Microscope
    diameter_angstrom: float
    symmetry: str


def read_session_bank(
    source: SourceConfig, *, on_progress: Callable[[int, int], None] | None = None
) -> SessionBank:
    """Build the bank of a session; raise an error that names the file and the rule where something is missing."""
    layout = OutputLayout(source.session)
    session = _read_session(layout.session)
    maps = source.maps or (find_newest_map(layout),)
    skipped: Counter[str] = Counter()
    chosen = _choose(layout, source, skipped)
    pixel, shape = chosen[0].pixel_size_angstrom, chosen[0].shape_yx
    working = working_shape(shape, source.short_side_px)
    working_pixel = pixel * min(shape) / min(working)
    diameter = source.diameter_angstrom or session.diameter_angstrom
    volumes, map_diameter = _read_maps(
        maps, working_pixel, diameter, layout.micrograph(chosen[0].name), pixel
    )
    used, prepared, ice_maps = _read_micrographs(
        layout, chosen, source, working_pixel, skipped, on_progress or (lambda _done, _total: None)
    )
    scale = working_pixel / pixel
    spacing = None
    if source.collapse_ratio is None:
        spacing = measure_spacing([c.picks_yx_px / scale for c in used])
    if spacing is None:
        ratio = _DEFAULT_COLLAPSE if source.collapse_ratio is None else source.collapse_ratio
        spacing = spacing_from_collapse(int(volumes.shape[-1]), ratio)
    held_out = max(1, min(len(used) - 1, round(source.held_out_fraction * len(used))))
    greys = [p.statistics for p in prepared]
    n_training = len(used) - held_out
    contrast = measure_contrast(
        [p.levels.float() for p in prepared[:n_training]],
        [c.picks_yx_px / scale for c in used[:n_training]],
        map_diameter / working_pixel,
    )
    facts = BankFacts(
        pixel_size_angstrom=working_pixel,
        micrograph_pixel_size_angstrom=pixel,
        diameter_angstrom=map_diameter,
        symmetry=_find_symmetry(source, maps[0], session),
        microscope=session.microscope,
        counts=fit_counts([len(c.picks_yx_px) for c in used]),
        spacing_px=spacing,
        greys=GreyStatistics(
            mean=float(np.median([g.mean for g in greys])),
            sd=float(np.median([g.sd for g in greys])),
            skewness=float(np.median([g.skewness for g in greys])),
        ),
        names=tuple(c.name for c in used),
        n_held_out=held_out,
        skipped=dict(skipped),
        sources=tuple(str(m) for m in maps),
        request=source.describe(),
        contrast=contrast,
    )
    log.info("bank_built micrographs=%d skipped=%s", len(used), dict(skipped))
    return SessionBank(
        facts=facts,
        volumes=volumes,
        ctfs=torch.tensor([c.ctf for c in used], dtype=torch.float64),
        ice_maps=torch.stack(ice_maps),
        micrographs=torch.stack([p.levels for p in prepared]),
    )


def find_newest_map(layout: OutputLayout) -> Path:
    """Return the map of the newest run."""
    found = sorted((layout.root / "runs").glob("*/map.mrc"), key=lambda p: (p.stat().st_mtime_ns, str(p)))
    if not found:
        raise InputError(
            layout.root / "runs", "a session for CryoGEM has a run's map, or source.maps names one", "none"
        )
    return found[-1]


def _read_session(path: Path) -> _SessionFacts:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        microscope = document["microscope"]
        return _SessionFacts(
            microscope=Microscope(
                voltage_kv=float(microscope["voltage_kv"]),
                cs_mm=float(microscope["cs_mm"]),
                amplitude_contrast=float(microscope.get("amplitude_contrast", 0.1)),
            ),
            diameter_angstrom=float(document.get("particle", {}).get("diameter_angstrom", 150.0)),
            symmetry=str(document.get("engine", {}).get("symmetry", "C1")),
        )
    except OSError as error:
        raise InputError(path.parent, f"a session folder has a session.yaml: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(path, f"session.yaml has microscope.voltage_kv and cs_mm ({error!r})") from error


def _find_symmetry(source: SourceConfig, first_map: Path, session: _SessionFacts) -> str:
    """Return the symmetry asked for, or that of the run whose map it is, or the session's."""
    summary = first_map.with_name("summary.json")
    name = source.symmetry
    if name is None and summary.is_file():
        try:
            name = json.loads(summary.read_text()).get("symmetry")
        except (OSError, ValueError) as error:
            raise InputError(summary, f"a run's summary is JSON ({error})") from error
    try:
        return normalise_symmetry(name or session.symmetry)
    except ValueError as error:
        raise ConfigurationError("source.symmetry", str(error)) from error


def _choose(layout: OutputLayout, source: SourceConfig, skipped: Counter[str]) -> list[_Candidate]:
    """Return the newest good exposures, oldest first, all of one shape and pixel size."""
    folder = layout.root / "micrographs"
    paths = sorted(folder.glob("*.mrc"), key=lambda p: (-p.stat().st_mtime_ns, p.name))
    if not paths:
        raise InputError(folder, "a session for CryoGEM has micrographs", "none")
    found: list[_Candidate] = []
    for path in paths:
        if len(found) == source.n_micrographs:
            break
        reason, candidate = _judge(layout, path, source)
        if candidate is None:
            skipped[reason] += 1
            continue
        found.append(candidate)
    if not found:
        raise InputError(folder, "some micrographs have a CTF, picks and a pixel size", dict(skipped))
    kind = Counter((c.shape_yx, round(c.pixel_size_angstrom, 4)) for c in found).most_common(1)[0][0]
    same = [c for c in found if (c.shape_yx, round(c.pixel_size_angstrom, 4)) == kind]
    if len(same) < len(found):
        skipped["another shape or pixel size"] += len(found) - len(same)
    return same[::-1]


def _judge(layout: OutputLayout, path: Path, source: SourceConfig) -> tuple[str, _Candidate | None]:
    """Return an exposure, or why it is left out; contradicting pixel sizes are an error of the session."""
    ctf_path, picks_path = layout.ctf_values(path.stem), layout.picks(path.stem)
    if not ctf_path.is_file():
        return "no CTF", None
    try:
        ctf: dict[str, Any] = json.loads(ctf_path.read_text())
    except ValueError:
        return "unreadable CTF", None
    values = [
        ctf.get(k)
        for k in ("defocus_u_angstrom", "defocus_v_angstrom", "astigmatism_angle_deg", "phase_shift_deg")
    ]
    if not ctf.get("ctf_is_reliable") or any(v is None for v in values):
        return "unreliable CTF", None
    limit = source.max_ctf_fit_angstrom
    if limit is not None and float(ctf.get("ctf_fit_angstrom") or np.inf) > limit:
        return "CTF rings end too early", None
    if not picks_path.is_file():
        return "no picks", None
    picks, _ = read_picks_star(picks_path)
    if not len(picks):
        return "no picks", None
    try:
        shape, pixel = _read_header(path)
    except (ValueError, OSError):
        return "unreadable micrograph", None
    if pixel is None:
        return "no pixel size in the header", None
    stated = ctf.get("pixel_size_angstrom")
    if stated is not None and abs(float(stated) - pixel) > _SAME_PIXEL * pixel:
        raise InputError(
            path,
            f"its header's pixel size is that of {ctf_path.name}",
            f"{pixel:.4f} Å and {float(stated):.4f} Å",
        )
    u, v, angle, phase = (float(value) for value in values if value is not None)
    return "", _Candidate(path.stem, (u, v, angle, phase), picks, shape, pixel)


def _read_header(path: Path) -> tuple[tuple[int, int], float | None]:
    with mrcfile.open(path, header_only=True, permissive=True) as handle:
        header = handle.header
        pixel = float(header.cella.x) / max(int(header.mx), 1)
        return (int(header.ny), int(header.nx)), pixel if 0.0 < pixel < 500.0 else None


def _read_maps(
    maps: tuple[Path, ...],
    working_pixel: float,
    diameter_angstrom: float,
    micrograph: Path,
    micrograph_pixel: float,
) -> tuple[Tensor, float]:
    """Return the maps as potentials at the working pixel size in one box, and the greatest diameter in Å."""
    read = []
    for path in maps:
        try:
            volume, pixel = read_density_map(path)
            mask = path.with_name("mask.mrc")
            if mask.is_file() and mask != path:
                weights, mask_pixel = read_density_map(mask)
                if weights.shape != volume.shape or abs(mask_pixel - pixel) > _SAME_PIXEL * pixel:
                    found = f"{tuple(volume.shape)} at {pixel:.3f} Å and {tuple(weights.shape)} at {mask_pixel:.3f} Å"
                    raise InputError(
                        path, f"a map and its mask {mask.name} have one shape and pixel size", found
                    )
                volume = volume * weights
            potential, found_diameter = potential_from_map(volume, pixel, working_pixel)
        except ValueError as error:
            raise InputError(path, f"a map is a cube with a particle and a pixel size ({error})") from error
        low, high = (ratio * diameter_angstrom for ratio in _DIAMETER_RATIO)
        if not low <= found_diameter <= high:
            raise InputError(
                path,
                f"map and micrograph have one scale: the particle is {low:.0f} to {high:.0f} Å across by the session",
                f"{found_diameter:.0f} Å in the map at {pixel:.3f} Å/px; {micrograph.name} has {micrograph_pixel:.3f} Å/px",
            )
        read.append((potential, found_diameter))
    box = max(int(potential.shape[0]) for potential, _ in read)
    return torch.stack([_in_box(potential, box) for potential, _ in read]), max(d for _, d in read)


def _in_box(volume: Tensor, box: int) -> Tensor:
    size = int(volume.shape[0])
    low = box // 2 - size // 2
    high = box - size - low
    return torch.nn.functional.pad(volume, (low, high, low, high, low, high))


def _read_micrographs(
    layout: OutputLayout,
    chosen: list[_Candidate],
    source: SourceConfig,
    working_pixel: float,
    skipped: Counter[str],
    on_progress: Callable[[int, int], None],
) -> tuple[list[_Candidate], list[PreparedMicrograph], list[Tensor]]:
    used, prepared, ice_maps = [], [], []
    for index, candidate in enumerate(chosen):
        path = layout.micrograph(candidate.name)
        try:
            with mrcfile.open(path, permissive=True) as handle:
                image = torch.from_numpy(np.array(handle.data, dtype=np.float32))
            ready = prepare_micrograph(image, source.short_side_px)
        except (ValueError, OSError) as error:
            log.warning("micrograph_skipped path=%s reason=%s", path, error)
            skipped["not a finite, varied image"] += 1
            continue
        used.append(candidate)
        prepared.append(ready)
        ice_maps.append(estimate_ice_weights(ready.levels.float(), working_pixel))
        on_progress(index + 1, len(chosen))
    if len(used) < _LEAST_MICROGRAPHS:
        rule = f"CryoGEM learns from at least {_LEAST_MICROGRAPHS} micrographs (one is held out)"
        raise InputError(layout.root / "micrographs", rule, f"{len(used)} usable, skipped {dict(skipped)}")
    return used, prepared, ice_maps
