"""`icestream evaluate features`: k-NN scores of a model's features on simulated particles of known structure, pose and quality."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream.commands.common import AsJson, console, print_json
from stream.commands.evaluate_models import UNTRAINED, EncodingModel, load_encoding_model, load_untrained
from stream.records.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from models.cryoranker.dataset import LabelledParticles
    from models.cryoranker.judge_features import JudgedFeatures
    from models.cryoranker.pose_sets import PosedParticles

N_STRUCTURES = 12
"""As many as the paper's simulated data sets."""
DEFAULT_SNR = 0.1
_HELD_OUT_SEED = 500_000
"""First phantom for judging; training configurations start at 1000 and never come here."""
_STRUCTURE_SUFFIXES = (".pdb", ".cif", ".pdb.gz", ".cif.gz")


class Embedding(StrEnum):
    """How features are laid out in the plane."""

    UMAP = "umap"
    TSNE = "tsne"
    PCA = "pca"


def register(app: typer.Typer) -> None:
    """Add the command to `icestream evaluate`."""
    app.command("features")(evaluate_features)


def evaluate_features(
    model: Annotated[Path, typer.Argument(help="Checkpoint (Cryo-IEF or CryoRanker), or a ranker in ONNX.")],
    data: Annotated[
        Path, typer.Option("--data", help="Folder where simulated data are kept and found again.")
    ] = Path("~/.cache/icestream/features"),
    models: Annotated[
        Path | None,
        typer.Option(
            "--models", help="Folder of PDB or mmCIF files to simulate first; phantoms make up twelve."
        ),
    ] = None,
    snr: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001,
            max=10.0,
            help="Variance of signal over noise, per pixel of a 64 px box; repeat for several. Default: 0.1.",
        ),
    ] = None,
    particles: Annotated[
        Path | None,
        typer.Option(help="Judge on this labelled set (STAR or .cs) instead of simulated ones."),
    ] = None,
    label_column: Annotated[
        str, typer.Option(help="With --particles: column of labels in [0, 1].")
    ] = "icestreamLabel",
    class_column: Annotated[
        str | None, typer.Option(help="With --particles: column that names structures or other classes.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="With --particles: folder to which the stacks' paths are relative.")
    ] = None,
    images_per_class: Annotated[
        int, typer.Option(min=2, help="Images per structure and pose class; there are 12 x 12 of these.")
    ] = 20,
    fields: Annotated[
        int, typer.Option(min=1, help="Fields per structure from which labelled picks are cut.")
    ] = 4,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours that vote; the paper takes 1.")] = 1,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Judge another model too: a file, or 'untrained' for the network that training started from."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the features in the plane (.png).")] = None,
    html: Annotated[Path | None, typer.Option(help="The same, interactive, in one file (.html).")] = None,
    embedding: Annotated[
        Embedding | None, typer.Option(help="Default: umap where umap-learn is installed, else tsne.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge features as the Cryo-IEF paper does: nearest neighbours on structure, pose and quality classes.

    Twelve structures are simulated: projections in twelve classes of view direction (the nearer half of each), and picks
    labelled from 0 to 1. AUC, AP and correlations are those of the ranking head, or of a linear probe fitted on the other
    half of the structures.

    With --particles a labelled set of yours is judged instead: quality always, structure with --class-column, pose where
    the file has angles.

    Example: icestream evaluate features training/cryo_ief.safetensors --snr 0.005 --snr 0.1 --compare untrained --html
    features.html
    """
    for path, suffix in ((plot, ".png"), (html, ".html")):
        if path is not None and path.suffix != suffix:
            raise ConfigurationError("--plot, --html", f"the file ends in {suffix}", path)
    judged = load_encoding_model(model)
    other = None
    if compare is not None:
        other = load_untrained(model) if compare == UNTRAINED else load_encoding_model(Path(compare))
    if particles is not None:
        simulated = {"--snr": snr, "--models": models, "--plot": plot, "--html": html}
        if given := [name for name, value in simulated.items() if value is not None]:
            raise ConfigurationError("--particles", f"without {', '.join(given)}", particles)
        documents = [_judge_given(judged, other, particles, label_column, class_column, root, k)]
    else:
        if class_column is not None or root is not None:
            raise ConfigurationError("--class-column, --root", "with --particles", class_column or root)
        if other is not None and (other.input_size_px, other.resize_mode) != (
            judged.input_size_px,
            judged.resize_mode,
        ):
            raise ConfigurationError(
                "--compare", f"a model with the same input ({judged.input_size_px} px)", other.input_size_px
            )
        names = find_structures(models)
        documents = []
        for level in snr or [DEFAULT_SNR]:
            posed, labelled = simulate_sets(
                judged,
                names,
                data.expanduser(),
                snr=level,
                images_per_class=images_per_class,
                fields=fields,
            )
            found = _judge(judged, posed, labelled, names, k)
            documents.append(
                _document(judged.name, found)
                | {
                    "snr": level,
                    "k": k,
                    "structures": [Path(name).name for name in names],
                    "n_images": {"structure_and_pose": len(posed), "quality": len(labelled)},
                    "guessing": _guessing(labelled),
                }
            )
            if other is not None:
                documents[-1]["compared"] = _document(other.name, _judge(other, posed, labelled, names, k))
            if level == (snr or [DEFAULT_SNR])[0] and (plot is not None or html is not None):
                documents[0]["embedding"] = _draw(found, posed, labelled, names, plot, html, embedding)
    document = documents[0] | ({"by_snr": documents} if len(documents) > 1 else {})
    if as_json:
        print_json(document)
    else:
        _print_table(documents)


def _judge_given(
    judged: EncodingModel,
    other: EncodingModel | None,
    particles: Path,
    label_column: str,
    class_column: str | None,
    root: Path | None,
    k: int,
) -> dict[str, Any]:
    from stream.commands.evaluate_labelled import judge_labelled_set, read_labelled_set

    given = read_labelled_set(particles, label_column=label_column, class_column=class_column, root=root)
    document = judge_labelled_set(judged, given, k=k)
    if other is not None:
        document["compared"] = judge_labelled_set(other, given, k=k)
    return document


def find_structures(folder: Path | None) -> tuple[str, ...]:
    """Return twelve structures: the folder's atomic models in name order, then held-out phantoms."""
    from models.cryoranker.dataset import phantom_names

    files: list[str] = []
    if folder is not None:
        if not folder.is_dir():
            raise InputError(folder, "a folder of PDB or mmCIF files")
        files = [str(p) for p in sorted(folder.iterdir()) if p.name.lower().endswith(_STRUCTURE_SUFFIXES)]
        if not files:
            raise InputError(folder, f"holds at least one file of {', '.join(_STRUCTURE_SUFFIXES)}")
    files = files[:N_STRUCTURES]
    n_phantoms = N_STRUCTURES - len(files)
    return (*files, *phantom_names(range(_HELD_OUT_SEED, _HELD_OUT_SEED + n_phantoms)))


def simulate_sets(
    model: EncodingModel,
    names: tuple[str, ...],
    folder: Path,
    *,
    snr: float,
    images_per_class: int,
    fields: int,
) -> tuple[PosedParticles, LabelledParticles]:
    """Return posed particles and labelled picks of the structures, simulated now or found in the folder."""
    from models.cryoranker.dataset import SimulatedSet, simulate_set_cached
    from models.cryoranker.pose_sets import PoseSet, simulate_pose_set

    with console.status("simulating") as status:

        def report(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done} of {total} structures simulated")

        posed = simulate_pose_set(
            PoseSet(
                structures=names,
                images_per_class=images_per_class,
                snr=snr,
                input_size_px=model.input_size_px,
                resize_mode=model.resize_mode,
            ),
            folder,
            on_progress=lambda done, total: report("views", done, total),
        )
        labelled = simulate_set_cached(
            SimulatedSet(
                structures=names,
                seed=77,
                fields_per_structure=fields,
                input_size_px=model.input_size_px,
                resize_mode=model.resize_mode,
                snr=snr,
                box_size_px=64,
            ),
            folder,
            on_progress=lambda done, total: report("picks", done, total),
        )
    return posed, labelled


def _judge(
    model: EncodingModel, posed: PosedParticles, labelled: LabelledParticles, names: tuple[str, ...], k: int
) -> JudgedFeatures:
    from models.cryoranker.judge_features import judge_features

    labels = tuple(Path(name).name for name in names)
    try:
        with console.status(f"judging {model.name}"):
            return judge_features(model.encode, posed, labelled, labels, k=k)
    except ValueError as error:
        raise ConfigurationError(
            "evaluate features", "data that the figures can be taken of", error
        ) from error


def _document(name: str, found: JudgedFeatures) -> dict[str, Any]:
    quality = found.quality
    ranked = quality.probe if quality.head is None else quality.head
    return {
        "model": name,
        "knn": {
            "structure": quality.knn_structure,
            "pose": quality.knn_pose,
            "quality": quality.knn_quality,
            "pose_by_structure": quality.knn_pose_by_structure,
        },
        "auc": ranked.auc,
        "ap": ranked.ap,
        "spearman": ranked.spearman,
        "pearson": ranked.pearson,
        "ranked_by": "probe" if quality.head is None else "head",
        "probe": asdict(quality.probe),
    }


def _guessing(labelled: LabelledParticles) -> dict[str, float]:
    from models.cryo_ief.neighbours import quality_classes
    from models.cryoranker.judge_features import majority_fraction
    from models.cryoranker.pose_sets import N_POSE_CLASSES

    return {
        "structure": 1.0 / N_STRUCTURES,
        "pose": 1.0 / N_POSE_CLASSES,
        "quality": majority_fraction(quality_classes(labelled.labels)),
    }


def _draw(
    found: JudgedFeatures,
    posed: PosedParticles,
    labelled: LabelledParticles,
    names: tuple[str, ...],
    plot: Path | None,
    html: Path | None,
    embedding: Embedding | None,
) -> str:
    from models.cryo_ief.neighbours import quality_classes
    from stream.commands.feature_maps import FeatureMap, choose_embedding, embed, write_html, write_png

    method = choose_embedding(None if embedding is None else embedding.value)
    labels = [Path(name).name for name in names]
    poses = [f"view class {number + 1:02d}" for number in range(int(posed.pose_class.max()) + 1)]
    with console.status(f"laying {len(posed) + len(labelled)} features out by {method}"):
        maps = [
            FeatureMap(
                title="Particles of known structure and view",
                points=embed(found.posed, method),
                classes={
                    "structure": [labels[i] for i in posed.structure],
                    "pose": [poses[i] for i in posed.pose_class],
                },
            ),
            FeatureMap(
                title="Picks of known quality",
                points=embed(found.labelled, method),
                classes={
                    "quality": [("low", "medium", "high")[i] for i in quality_classes(labelled.labels)],
                    "structure": [labels[i] for i in labelled.structure],
                },
            ),
        ]
    if plot is not None:
        write_png(plot, maps, method)
    if html is not None:
        write_html(html, maps, method)
    return method


def _print_table(documents: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("SNR", "model", "structure", "pose", "quality", "AUC", "AP", "Spearman", "Pearson")

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    for document in documents:
        snr = f"{document['snr']:g}" if "snr" in document else ""
        for row in (document, document.get("compared")):
            if row is not None:
                knn = (row["knn"][name] for name in ("structure", "pose", "quality"))
                figures = (*knn, row["auc"], row["ap"], row["spearman"], row["pearson"])
                table.add_row(snr, f"{row['model']} (AUC by {row['ranked_by']})", *map(text, figures))
        guess = document["guessing"]
        chances = (text(guess.get(name)) for name in ("structure", "pose", "quality"))
        table.add_row(snr, "guessing", *chances, "0.500")
    console.print(table)
