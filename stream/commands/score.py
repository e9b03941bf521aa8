"""`icestream score`: scores and features of particles that somebody extracted."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from actors.ranker import ImageScores
    from models.cryoranker.providers import ProviderChoice
    from models.cryoranker.serve import OnnxRanker
    from stream.ingest.particle_table import ParticleTable
    from stream.store.feature_cache import FeatureCache

OUTPUT_SUFFIXES = (".star", ".csv", ".npz")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "score",
        help="Score particles with a ranker: 1 looks like a particle, 0 like junk.\n\n"
        "The suffix of --out decides what is written: .star (the particles with a column icestreamScore), .csv (uid, "
        "score, image) or .npz (uid, score, feature). Particles that have no signal (constant, NaN) get no score.\n\n"
        "Example: icestream score particles.star --out scored.star",
    )(score)


def score(
    particles: Annotated[Path, typer.Argument(help="Particles: .star, .cs or .mrcs.")],
    out: Annotated[Path, typer.Option("--out", help="Result: .star, .csv or .npz.")],
    model: Annotated[Path | None, typer.Option(help="Ranker (.onnx); default: the one that ships.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder to which the stacks' paths are relative.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Feature cache to use and to fill; default: none is kept.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per inference.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one inference.")] = 1,
    provider: Annotated[
        str, typer.Option(help="What runs the model: auto, tensorrt, cuda, openvino, openvino-bf16 or cpu.")
    ] = "auto",
    outlier_sigmas: Annotated[
        float | None,
        typer.Option(
            help="Replace NaN, hot and dead pixels farther than this many sigmas from the median (10 and more make sense); "
            "default: off, as the released models were trained.",
        ),
    ] = None,
    expected_sha256: Annotated[str | None, typer.Option(help="Refuse a model with another hash.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score particles."""
    if out.suffix not in OUTPUT_SUFFIXES:
        raise ConfigurationError("--out", f"the result ends in {', '.join(OUTPUT_SUFFIXES)}", out)
    if out.absolute() == particles.absolute():
        raise ConfigurationError("--out", "the result does not replace its input", out)
    document = score_particles(
        particles,
        out,
        model=model,
        root=root,
        cache=cache,
        batch_size=batch_size,
        n_threads=threads,
        provider=provider,
        outlier_sigmas=outlier_sigmas,
        expected_sha256=expected_sha256,
    )
    if as_json:
        print_json(document)
    else:
        typer.echo(
            f"{document['scored']} of {document['particles']} particles scored "
            f"({document['particles_per_s']:.0f}/s on {document['provider']}, {document['cache_hits']} known before): {out}"
        )


def score_particles(
    particles: Path,
    out: Path,
    *,
    model: Path | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 64,
    n_threads: int = 1,
    provider: str = "auto",
    outlier_sigmas: float | None = None,
    expected_sha256: str | None = None,
) -> dict[str, Any]:
    """Score the particles of a file, write the result and return the command's JSON document.

    `scored` and `excluded` add up to `particles`. A stack that cannot be read is an `InputError` and nothing is written.
    """
    from actors.ranker import BatchingRanker
    from stream.ingest.particle_sets import read_particle_table
    from stream.store.feature_cache import FeatureCache

    scorer = load_scorer(
        model,
        n_threads=n_threads,
        batch_size=batch_size,
        provider=provider,
        outlier_sigmas=outlier_sigmas,
        expected_sha256=expected_sha256,
    )
    table = read_particle_table(particles, root=root, require_ctf=False)
    uids = find_uids(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = cache or Path(tempfile.mkdtemp(prefix=".tmp-features-", dir=out.parent))
    started = time.monotonic()
    try:
        with console.status(f"scoring {len(table)} particles"), FeatureCache(kept) as features:
            ranker = BatchingRanker(
                scorer, features, batch_size=batch_size, mends_pixels=outlier_sigmas is not None
            )
            found = ranker.score_images(
                uids, table.stack_paths, table.stack_indices, contrast_signs=table.contrast_sign
            )
            seconds = time.monotonic() - started
            ranker.close()
            _write(out, particles, table, uids, found, features, scorer)
    finally:
        if cache is None:
            shutil.rmtree(kept, ignore_errors=True)
    n_scored = len(table) - found.n_excluded
    return {
        "particles": len(table),
        "scored": n_scored,
        "excluded": found.n_excluded,
        "cache_hits": found.n_cache_hits,
        "model": scorer.model_hash,
        "model_path": scorer.path,
        "provider": scorer.provider,
        "outlier_sigmas": outlier_sigmas,
        "batch_sizes": sorted(set(found.batch_sizes)),
        "particles_per_s": n_scored / seconds,
        "seconds": found.seconds,
        "out": out,
    }


def load_scorer(
    model: Path | None,
    *,
    n_threads: int,
    batch_size: int,
    provider: str = "auto",
    outlier_sigmas: float | None = None,
    expected_sha256: str | None = None,
) -> OnnxRanker:
    """Load a ranker, the one that ships by default; what is wrong with it is a configuration error."""
    from models.cryoranker.providers import PROVIDER_CHOICES
    from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker

    if provider not in PROVIDER_CHOICES:
        raise ConfigurationError("--provider", f"one of {', '.join(PROVIDER_CHOICES)}", provider)
    if outlier_sigmas is not None and not outlier_sigmas > 0.0:
        raise ConfigurationError("--outlier-sigmas", "above 0", outlier_sigmas)
    try:
        return OnnxRanker(
            model or DEFAULT_MODEL,
            n_threads=n_threads,
            batch_size=batch_size,
            provider=cast("ProviderChoice", provider),
            outlier_sigmas=outlier_sigmas,
            expected_sha256=expected_sha256,
        )
    except ValueError as error:
        rule = "the model is a ranker in ONNX, with the hash that was expected"
        raise ConfigurationError(model or DEFAULT_MODEL, rule, error) from error


def find_uids(table: ParticleTable) -> NDArray[np.uint64]:
    """Return the particles' own uids, or uids that follow from (absolute path of the stack, index)."""
    import numpy as np

    from stream.records.particles import derive_exposure_id, derive_particle_uid

    uids = table.uids
    if uids is None:
        stacks = {path: derive_exposure_id(str(path)) for path in set(table.stack_paths.tolist())}
        addresses = zip(table.stack_paths.tolist(), table.stack_indices.tolist(), strict=True)
        uids = np.array([derive_particle_uid(stacks[path], index) for path, index in addresses], np.uint64)
    if len(np.unique(uids)) != len(uids):
        raise InputError(table.source, "every particle has a uid of its own", f"{len(uids)} rows")
    return uids


def _write(
    out: Path,
    source: Path,
    table: ParticleTable,
    uids: NDArray[np.uint64],
    found: ImageScores,
    features: FeatureCache,
    scorer: OnnxRanker,
) -> None:
    import numpy as np
    import pandas as pd

    from stream.sinks.relion_star import join_image_names
    from stream.store.files import replacing

    if out.suffix == ".star":
        _write_star(out, source, table, uids, found.scores)
        return
    names = join_image_names(table.stack_indices, table.stack_paths)
    with replacing(out) as temporary, temporary.open("wb") as stream:
        if out.suffix == ".csv":
            rows = pd.DataFrame({"uid": uids, "score": found.scores, "image": names})
            stream.write(rows.to_csv(index=False, na_rep="nan", float_format="%.6f").encode())
        else:
            _, values = features.features(scorer.model_hash, uids)
            np.savez(
                stream,
                uid=uids,
                score=found.scores,
                feature=values,
                image=np.array(names),
                model=scorer.model_hash,
                provider=scorer.provider,
            )


def _write_star(
    out: Path, source: Path, table: ParticleTable, uids: NDArray[np.uint64], scores: NDArray[np.float32]
) -> None:
    """Write the input STAR with the columns added; other inputs become a STAR with absolute stack paths."""
    from stream.sinks.relion_star import (
        SCORE_COLUMN,
        UID_COLUMN,
        read_particles_star,
        write_particles_star,
    )

    try:
        star = read_particles_star(source) if source.suffix == ".star" else None
    except InputError:  # RELION before 3.1 has no optics block: it is rebuilt from what was read
        star = None
    particles, optics = (star.particles, star.optics) if star else _build_star(table)
    added = {UID_COLUMN: uids, SCORE_COLUMN: scores.astype(float)}
    write_particles_star(out, particles.assign(**added), optics)


def _build_star(table: ParticleTable) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return RELION's particles and optics blocks of a table; columns that nobody knows are left out."""
    import numpy as np
    import pandas as pd

    from stream.sinks.relion_star import join_image_names

    numbers = {
        "rlnCoordinateX": table.coordinate_x_px,
        "rlnCoordinateY": table.coordinate_y_px,
        "rlnDefocusU": table.defocus_u_angstrom,
        "rlnDefocusV": table.defocus_v_angstrom,
        "rlnDefocusAngle": table.astigmatism_angle_deg,
        "rlnPhaseShift": table.phase_shift_deg,
    }
    particles = pd.DataFrame(
        {
            "rlnImageName": join_image_names(table.stack_indices, table.stack_paths),
            "rlnOpticsGroup": table.optics_groups,
        }
    )
    if all(name is not None for name in table.micrograph_names):
        particles["rlnMicrographName"] = table.micrograph_names
    for column, values in numbers.items():
        if np.isfinite(values).all():
            particles[column] = values
    if table.half_sets is not None:
        particles["rlnRandomSubset"] = table.half_sets.astype(np.int64)
    groups, first = np.unique(table.optics_groups, return_index=True)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": groups,
            "rlnOpticsGroupName": [f"opticsGroup{group}" for group in groups],
            "rlnVoltage": table.voltage_kv[first],
            "rlnSphericalAberration": table.cs_mm[first],
            "rlnAmplitudeContrast": table.amplitude_contrast[first],
            "rlnImagePixelSize": table.pixel_size_angstrom[first],
            "rlnImageSize": table.box_size_px,
            "rlnImageDimensionality": 2,
        }
    )
    return particles, optics.dropna(axis="columns")
