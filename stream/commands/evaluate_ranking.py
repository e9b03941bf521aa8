"""`icestream evaluate ranking`: does the better half by score refine better? Subsets of equal size, one engine, one start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor

    from stream.sinks.relion_star import ParticleStar

_ALIGNMENT_ANGSTROM = 10.0
"""Low-pass of alignment and correlation with the reference: finer than the start map's 30 Å, coarser than the maps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetFigures:
    """What one subset refined to; all figures inside the same mask, the reference's."""

    subset: str
    particles: int
    median_score: float
    half_map_fsc_mean: float
    """Mean of the half-maps' FSC over all shells up to Nyquist."""
    half_map_resolution_angstrom: float | None
    reference_fsc_mean: float
    """Mean of the map's FSC with the reference over all shells up to Nyquist."""
    reference_resolution_angstrom: float | None
    """Where that FSC falls below 0.5."""
    reference_correlation: float
    """Pearson's at 10 Å."""


def register(app: typer.Typer) -> None:
    """Add the command to `icestream evaluate`."""
    app.command("ranking")(evaluate_ranking)


def evaluate_ranking(
    particles: Annotated[Path, typer.Argument(help="Particles with CTF: .star.")],
    reference: Annotated[
        Path, typer.Option("--reference", help="The structure: PDB or mmCIF; start (at 30 Å) and yardstick.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the subsets and their runs.")],
    model: Annotated[Path | None, typer.Option(help="Ranker (.onnx); default: the one that ships.")] = None,
    symmetry: Annotated[str, typer.Option(help="Point group.")] = "C1",
    n_particles: Annotated[
        int | None, typer.Option("--particles-per-subset", min=50, help="Default: half of them.")
    ] = None,
    n_random: Annotated[int, typer.Option("--random", min=1, help="Random subsets.")] = 2,
    effort: Annotated[str, typer.Option(help="quick, normal or thorough.")] = "normal",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random subsets, the half sets and the engine.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Refine the best, the worst and random particles by score alike, and compare the maps with a known structure.

    All subsets have the same number of particles, half sets drawn alike, and start from the reference's 30 Å shape. With
    several random subsets their mean and spread say how much of a difference is chance.

    Example: icestream evaluate ranking particles.star --reference 8bk7.cif.gz --symmetry D2 --out ranking
    """
    from stream.commands.score import score_particles
    from stream.sinks.relion_star import SCORE_COLUMN, read_particles_star, write_particles_star

    if effort not in ("quick", "normal", "thorough"):
        raise ConfigurationError("--effort", "effort is quick, normal or thorough", effort)
    out.mkdir(parents=True, exist_ok=True)
    scored = out / "scored.star"
    document = score_particles(particles, scored, model=model, root=particles.absolute().parent)
    star = read_particles_star(scored)
    scores = star.particles[SCORE_COLUMN].to_numpy(float)
    size = len(scores) // 2 if n_particles is None else n_particles
    yardstick = _Yardstick.of(reference, star)
    start = out / "start.mrc"
    yardstick.write(start)
    found = []
    for name, rows in subsets(scores, size, n_random, seed):
        folder = out / name
        folder.mkdir(exist_ok=True)
        table = star.particles.iloc[rows].assign(rlnRandomSubset=_halves(len(rows), seed))
        write_particles_star(folder / "particles.star", table, star.optics)
        with console.status(f"refining {name}"):
            maps = _refine(folder, particles.absolute().parent, start, symmetry, effort, threads, seed)
        found.append(yardstick.measure(name, maps, scores[rows]))
    spread = random_spread(found)
    result = {
        "model": document["model"],
        "particles": len(scores),
        "particles_per_subset": size,
        "subsets": [asdict(figures) for figures in found],
        "random": spread,
    }
    if as_json:
        print_json(result)
    else:
        _print_table(found)
        console.print(*(_sentence(measure, of) for measure, of in spread.items()), sep="\n")


def subsets(
    scores: NDArray[np.floating], size: int, n_random: int, seed: int
) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield the rows of the best, the worst and `n_random` random subsets of scored particles, in file order."""
    import numpy as np

    scored = np.flatnonzero(np.isfinite(scores))
    if size > len(scored):
        raise ConfigurationError(
            "--particles-per-subset", f"there are as many scored particles ({len(scored)})", size
        )
    order = scored[np.argsort(-scores[scored], kind="stable")]
    rng = np.random.default_rng(seed)
    yield "best", np.sort(order[:size])
    for index in range(n_random):
        yield f"random{index + 1}", np.sort(rng.choice(scored, size, replace=False))
    yield "worst", np.sort(order[-size:])


def random_spread(found: list[SubsetFigures]) -> dict[str, dict[str, float | int | None]]:
    """Return per measure the random subsets' mean and sample standard deviation, and how the best subset stands to them.

    `best_in_deviations` is the best one's distance from the mean in these deviations. A single random subset has no
    deviation: None. Random subsets of one data set overlap, so the deviation is somewhat less than between independent draws.
    """
    import numpy as np

    best = next(figures for figures in found if figures.subset == "best")
    drawn = [figures for figures in found if figures.subset.startswith("random")]
    spread: dict[str, dict[str, float | int | None]] = {}
    for measure in ("half_map_fsc_mean", "reference_fsc_mean", "reference_correlation"):
        values = np.array([getattr(figures, measure) for figures in drawn], float)
        above = float(getattr(best, measure)) - float(values.mean())
        deviation = float(values.std(ddof=1)) if len(values) > 1 else None
        spread[measure] = {
            "mean": float(values.mean()),
            "standard_deviation": deviation,
            "best_above_mean": above,
            "best_in_deviations": above / deviation if deviation else None,
            "beaten_by_best": int((values < getattr(best, measure)).sum()),
            "subsets": len(values),
        }
    return spread


def _sentence(measure: str, of: dict[str, float | int | None]) -> str:
    deviation = of["standard_deviation"]
    spread = "" if deviation is None else f" ± {deviation:.3f}"
    return (
        f"{measure}: random {of['mean']:.3f}{spread}, best {of['best_above_mean']:+.3f},"
        f" better than {of['beaten_by_best']} of {of['subsets']}"
    )


def _halves(n: int, seed: int) -> NDArray[np.int64]:
    """Return half sets 1 and 2, equal in size, drawn at random."""
    import numpy as np

    return np.random.default_rng((seed, 0x5E)).permutation(np.arange(n) % 2) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maps:
    full: Path
    halves: tuple[Path, Path]


def _refine(
    folder: Path, root: Path, start: Path, symmetry: str, effort: str, threads: int, seed: int
) -> _Maps:
    from actors.engines.base import EngineInput, EngineSettings
    from actors.engines.session_run import make_engine

    settings = EngineSettings(
        symmetry=symmetry,
        n_threads=threads,
        seed=seed,
        effort=effort,  # type: ignore[arg-type]
    )
    source = EngineInput(particles_star=folder / "particles.star", root=root)
    output = make_engine("embedded").refine(source, start, settings, folder)
    return _Maps(full=output.map, halves=(output.half1, output.half2))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Yardstick:
    """The reference's density on the images' grid, and the mask around it."""

    density: Tensor
    mask: Tensor
    pixel_size_angstrom: float

    @staticmethod
    def of(reference: Path, star: ParticleStar) -> _Yardstick:
        from models.reconstruction.masks import mask_from_map
        from models.simulation.structure import density_from_atoms, read_structure

        optics: pd.DataFrame = star.optics
        pixel_size, box = float(optics["rlnImagePixelSize"].iloc[0]), int(optics["rlnImageSize"].iloc[0])
        try:
            atoms = read_structure(reference)
        except (ValueError, OSError) as error:
            raise InputError(reference, "the reference is a PDB or mmCIF file", error) from error
        density = density_from_atoms(atoms, box, pixel_size)
        return _Yardstick(
            density=density, mask=mask_from_map(density, pixel_size), pixel_size_angstrom=pixel_size
        )

    def write(self, path: Path) -> None:
        from models.reconstruction.volume_io import write_volume

        write_volume(path, self.density, self.pixel_size_angstrom)

    def measure(self, name: str, maps: _Maps, scores: NDArray[np.floating]) -> SubsetFigures:
        """Put the map onto the reference, the half-maps with it, and compare inside the reference's mask."""
        import numpy as np
        import torch

        from models.reconstruction.alignment import (
            align_volumes,
            apply_alignment,
            map_correlation,
            truth_resolution,
        )
        from models.reconstruction.fsc import fourier_shell_correlation, resolution_at
        from models.reconstruction.volume_io import read_volume

        pixel_size, box = self.pixel_size_angstrom, int(self.density.shape[0])
        volume, _ = read_volume(maps.full)
        alignment = align_volumes(
            volume,
            self.density,
            pixel_size,
            generator=torch.Generator().manual_seed(0),
            lowpass_angstrom=_ALIGNMENT_ANGSTROM,
            try_mirror=False,
        )
        placed = apply_alignment(volume, alignment)
        half1, half2 = (apply_alignment(read_volume(path)[0], alignment) * self.mask for path in maps.halves)
        between = fourier_shell_correlation(half1, half2)
        resolution, with_reference = truth_resolution(placed, self.density, pixel_size, self.mask)
        return SubsetFigures(
            subset=name,
            particles=len(scores),
            median_score=float(np.median(scores)),
            half_map_fsc_mean=float(between[1:].mean()),
            half_map_resolution_angstrom=resolution_at(between, 0.143, pixel_size, box),
            reference_fsc_mean=float(with_reference[1:].mean()),
            reference_resolution_angstrom=resolution,
            reference_correlation=map_correlation(
                placed, self.density, self.mask, pixel_size, _ALIGNMENT_ANGSTROM
            ),
        )


def _print_table(found: list[SubsetFigures]) -> None:
    from rich.table import Table

    table = Table("subset", "n", "median score", "half-map FSC", "Å", "FSC to reference", "Å", "r (10 Å)")
    for figures in found:
        table.add_row(
            figures.subset,
            str(figures.particles),
            f"{figures.median_score:.2f}",
            f"{figures.half_map_fsc_mean:.3f}",
            _angstrom(figures.half_map_resolution_angstrom),
            f"{figures.reference_fsc_mean:.3f}",
            _angstrom(figures.reference_resolution_angstrom),
            f"{figures.reference_correlation:.3f}",
        )
    console.print(table)


def _angstrom(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
