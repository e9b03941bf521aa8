"""Benchmark of CryoGEM: distances to held-out micrographs of CryoGEM, its ablations and noise by formula, over seeds.

`--folder` keeps everything and the same command goes on in it, also in the middle of a training: `cryogem.yaml` says whose session and
which sizes (written for a virtual session at first, whose noise the physics does not contain; edit it for a real one), a folder
per arm and seed has the training, `results-SEED.json` its distances, `table.md` and `panel.png` what came out. A seed is a
training's seed and three draws of specimens, whose distances are averaged.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.commands.common import console
from stream.records.errors import ConfigurationError
from stream.store.files import replacing
from stream.store.layout import OutputLayout

if TYPE_CHECKING:
    from actors.cryogem.config import TrainConfig

CONFIG_FILE, TABLE_FILE, PANEL_FILE = "cryogem.yaml", "table.md", "panel.png"
N_MICROGRAPHS = 40
N_DRAWS = 3
ARMS = ("cryogem", "no-guidance", "cut")
"""CryoGEM; the same without masks (`nce_form: unguided`); that without ice and CTF too, which is CUT as it comes."""
_MEASURES = ("frechet_x1000", "spectrum", "patches")


class _TimeUpError(Exception):
    """The CPU time of this call is spent; the folder has all that was done."""


def run_cryogem_benchmark(
    folder: Path, *, n_seeds: int = 3, part: str | None = None, limit_s: float | None = None
) -> list[dict[str, Any]]:
    """Train what is not trained yet, judge it, and return a figure per set; stop after `limit_s` CPU seconds of training."""
    arms = _parse_part(part)
    config = _read_config(folder)
    deadline = None if limit_s is None else time.process_time() + limit_s
    seeds: list[int] = []
    cpu_s: dict[str, list[float]] = {arm: [] for arm in arms}
    try:
        for seed in range(n_seeds):
            for arm in arms:
                cpu_s[arm].append(_train(folder, config, arm, seed, deadline))
            seeds.append(seed)
            _judge(folder, arms, seed)
    except _TimeUpError:
        console.print("the CPU time of this call is spent: the same command goes on", highlight=False)
    if not seeds:
        rule = "a seed's trainings are done before there is a figure; the same command goes on"
        raise ConfigurationError("--limit-s", rule, limit_s)
    figures = summarise([_read_results(folder, seed) for seed in seeds], cpu_s)
    lines = table(figures)
    with replacing(folder / TABLE_FILE) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return figures


def variant(config: TrainConfig, arm: str, seed: int) -> TrainConfig:
    """Return the configuration of an arm's training."""
    training, physics = replace(config.training, seed=seed), config.physics
    if arm != "cryogem":
        training = replace(training, nce_form="unguided")
    if arm == "cut":
        physics = replace(physics, imaging="projection")
    return replace(config, training=training, physics=physics)


def summarise(results: list[dict[str, Any]], cpu_s: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Return a figure per set: means over seeds of the means over draws, their standard deviation, CPU per training."""
    found: list[dict[str, Any]] = []
    for name in results[0]["sets"]:
        means = {m: [result["sets"][name][m] for result in results] for m in (*_MEASURES, "content")}
        values = means["frechet_x1000"]
        spent = cpu_s.get(name, [])[: len(results)]
        found.append({
            "name": f"cryogem, {name}",
            "value": statistics.fmean(values),
            "unit": f"Fréchet x1000, mean of {len(values)} seeds",
            "baseline": ARMS[0],
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "spectrum": statistics.fmean(means["spectrum"]),
            "patches": statistics.fmean(means["patches"]),
            "content": None if None in means["content"] else statistics.fmean(means["content"]),
            "cpu_minutes": statistics.fmean(spent) / 60.0 if spent else None,
            "features": results[0]["features"],
        })  # fmt: skip
    own = next((f["value"] for f in found if f["name"] == f"cryogem, {ARMS[0]}"), None)
    for figure in found:
        figure["ratio"] = float("nan") if own is None else figure["value"] / own
    return found


def table(figures: list[dict[str, Any]]) -> list[str]:
    """Return the figures as a table in Markdown."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        "| set | Fréchet × 1000 | spectrum | patches | content | CPU minutes |",
        "|---|---|---|---|---|---|",
    ]
    for f in figures:
        spread = "" if f["sd"] is None else f" ± {f['sd']:.1f}"
        lines.append(
            f"| {f['name'].removeprefix('cryogem, ')} | {f['value']:.1f}{spread} | {number(f['spectrum'], 3)} "
            f"| {number(f['patches'], 3)} | {number(f['content'], 3)} | {number(f['cpu_minutes'], 1)} |"
        )
    return lines


def _parse_part(part: str | None) -> tuple[str, ...]:
    arms = ARMS if part is None else tuple(part.split(","))
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or arms[0] != ARMS[0]:
        raise ConfigurationError("--part", f"{ARMS[0]} and then of {', '.join(ARMS[1:])}", part)
    return arms


def _read_config(folder: Path) -> TrainConfig:
    """Return the folder's configuration; the first time, write it and the virtual session that it names."""
    import models.cryogem
    from actors.cryogem.config import read_train_config
    from actors.cryogem.virtual_session import VirtualSessionSettings, write_virtual_session

    path = folder / CONFIG_FILE
    if not path.is_file():
        shutil.copyfile(Path(models.cryogem.__file__).with_name("bench.yaml"), path)
    config = read_train_config(path)
    session = folder.absolute() / "session"
    # a session's session.yaml is written last
    if config.source.session == session and not OutputLayout(session).session.is_file():
        console.print(f"simulating {N_MICROGRAPHS} micrographs", highlight=False)
        write_virtual_session(session, VirtualSessionSettings(n_micrographs=N_MICROGRAPHS))
    return config


def _train(folder: Path, config: TrainConfig, arm: str, seed: int, deadline: float | None) -> float:
    """Train an arm, or go on; return the CPU seconds that it took in all."""
    from actors.jobs.cryogem import BANK_FILE, CryogemJob
    from actors.jobs.launch import run_training

    out, bank = folder / f"{arm}-{seed}", folder / BANK_FILE
    done = out / "result.json"
    if done.is_file():
        return float(json.loads(done.read_text())["metrics"]["cpu_s"])
    out.mkdir(parents=True, exist_ok=True)
    if bank.is_file() and not (out / BANK_FILE).is_file():
        with replacing(out / BANK_FILE) as temporary:
            shutil.copyfile(bank, temporary)
    console.print(f"training {out.name}", highlight=False)

    def look_at_the_clock(_point: dict[str, float]) -> None:
        if deadline is not None and time.process_time() > deadline:
            raise _TimeUpError

    document = run_training(CryogemJob(config=variant(config, arm, seed)), out, on_progress=look_at_the_clock)
    if not bank.is_file():
        with replacing(bank) as temporary:
            shutil.copyfile(out / BANK_FILE, temporary)
    with replacing(done) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    return float(document["metrics"]["cpu_s"])


def _judge(folder: Path, arms: tuple[str, ...], seed: int) -> None:
    """Measure a seed's trainings unless it was done with these very generators and features."""
    from actors.cryogem.evaluation import evaluate_trainings
    from models.cryogem.evaluation import MIN_PATCHES
    from models.cryoranker.serve import DEFAULT_MODEL
    from models.weights import sha256_of_file

    trainings = [folder / f"{arm}-{seed}" for arm in arms]
    key: dict[str, Any] = {
        "generators": [sha256_of_file(t / "generator.safetensors") for t in trainings],
        "features": sha256_of_file(DEFAULT_MODEL),
        "min_patches": MIN_PATCHES,
    }
    path = folder / f"results-{seed}.json"
    if path.is_file() and json.loads(path.read_text())["key"] == key:
        return
    console.print(f"judging seed {seed}", highlight=False)
    draws = [
        evaluate_trainings(
            trainings,
            seed=N_DRAWS * seed + draw,
            panel=folder / PANEL_FILE if seed == draw == 0 else None,
        )
        for draw in range(N_DRAWS)
    ]
    sets: dict[str, dict[str, float | None]] = {}
    for name in draws[0].distances:
        of_draws = [asdict(draw.distances[name]) for draw in draws]
        first, comma, rest = name.partition(",")
        arm = first.removesuffix(f"-{seed}") if first.removesuffix(f"-{seed}") in arms else first
        arm += comma + rest
        contents = [draw.content[name] for draw in draws if name in draw.content]
        sets[arm] = {m: statistics.fmean(d[m] for d in of_draws) for m in _MEASURES}
        sets[arm]["content"] = statistics.fmean(contents) if contents else None
    document = {
        "key": key,
        "features": f"ranker {key['features'][:12]}",
        "n_micrographs": draws[0].n_micrographs,
        "n_patches": draws[0].n_patches,
        "sets": sets,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


def _read_results(folder: Path, seed: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / f"results-{seed}.json").read_text())
    return document
