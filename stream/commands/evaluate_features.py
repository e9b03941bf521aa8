"""`icestream evaluate features`: k-NN scores of a model's features on simulated particles of known structure, pose and quality."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.cryo_ief.config import ResizeMode
    from models.cryoranker.dataset import LabelledParticles
    from models.cryoranker.judge_features import Encoder, JudgedFeatures
    from models.cryoranker.pose_sets import PosedParticles

N_STRUCTURES = 12
"""As many as the paper's simulated data sets."""
UNTRAINED = "untrained"
_HELD_OUT_SEED = 500_000
"""First phantom for judging; training configurations start at 1000 and never come here."""
_STRUCTURE_SUFFIXES = (".pdb", ".cif", ".pdb.gz", ".cif.gz")


class Embedding(StrEnum):
    """How features are laid out in the plane."""

    UMAP = "umap"
    TSNE = "tsne"
    PCA = "pca"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingModel:
    """A model that gives features, and what its input has to be."""

    name: str
    encode: Encoder
    input_size_px: int
    resize_mode: ResizeMode


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
        float,
        typer.Option(min=0.001, max=10.0, help="Variance of signal over noise, per pixel of a 64 px box."),
    ] = 0.1,
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

    Example: icestream evaluate features training/cryo_ief.safetensors --compare untrained --html features.html
    """
    for path, suffix in ((plot, ".png"), (html, ".html")):
        if path is not None and path.suffix != suffix:
            raise ConfigurationError("--plot, --html", f"the file ends in {suffix}", path)
    judged = load_encoding_model(model)
    names = find_structures(models)
    posed, labelled = simulate_sets(
        judged, names, data.expanduser(), snr=snr, images_per_class=images_per_class, fields=fields
    )
    found = _judge(judged, posed, labelled, names, k)
    document = _document(judged.name, found) | {
        "snr": snr,
        "k": k,
        "structures": [Path(name).name for name in names],
        "n_images": {"structure_and_pose": len(posed), "quality": len(labelled)},
        "guessing": _guessing(labelled),
    }
    if compare is not None:
        other = load_untrained(model) if compare == UNTRAINED else load_encoding_model(Path(compare))
        if (other.input_size_px, other.resize_mode) != (judged.input_size_px, judged.resize_mode):
            raise ConfigurationError(
                "--compare", f"a model with the same input ({judged.input_size_px} px)", other.input_size_px
            )
        document["compared"] = _document(other.name, _judge(other, posed, labelled, names, k))
    if plot is not None or html is not None:
        document["embedding"] = _draw(found, posed, labelled, names, plot, html, embedding)
    if as_json:
        print_json(document)
    else:
        _print_table(document)


def load_encoding_model(path: Path) -> EncodingModel:
    """Load a checkpoint or an exported ranker."""
    from models.cryo_ief.encode import Encoded, encode_grey
    from models.cryo_ief.layouts import load_model
    from models.cryo_ief.preprocess import normalise_grey_levels
    from models.weights import load_checkpoint

    if not path.is_file():
        raise InputError(path, "a checkpoint or ONNX file that exists")
    if path.suffix == ".onnx":
        from models.cryoranker.serve import OnnxRanker

        try:
            ranker = OnnxRanker(path)
        except ValueError as error:
            raise InputError(
                path, "a ranker in ONNX (an encoder is judged from its checkpoint)", error
            ) from error

        def encode(grey: NDArray[np.uint8]) -> Encoded:
            import numpy as np

            parts = [
                ranker.score_prepared(
                    normalise_grey_levels(grey[i : i + 64], ranker.info.mean, ranker.info.std)
                )
                for i in range(0, len(grey), 64)
            ]
            return Encoded(
                features=np.concatenate([part[1].astype(np.float32) for part in parts]),
                scores=np.concatenate([part[0] for part in parts]),
            )

        return EncodingModel(
            name=str(path),
            encode=encode,
            input_size_px=ranker.info.input_size_px,
            resize_mode=ranker.info.resize_mode,
        )
    try:
        loaded = load_checkpoint(path)
        network = load_model(loaded.tensors, loaded.metadata.get("model")).model
    except ValueError as error:
        raise InputError(path, "a checkpoint of a known layout", error) from error
    return EncodingModel(
        name=str(path),
        encode=lambda grey: encode_grey(network, grey),
        input_size_px=network.config.input_size_px,
        resize_mode=network.config.resize_mode,
    )


def load_untrained(path: Path) -> EncodingModel:
    """Return the network with the weights that it had before training, which follow from the checkpoint's metadata."""
    from dataclasses import replace

    from models.cryo_ief.config import Head, VitConfig
    from models.cryo_ief.encode import encode_grey
    from models.cryo_ief.pretrain import PretrainConfig, initial_encoder
    from models.cryo_ief.settings import parse_settings
    from models.cryoranker.train import TrainConfig, initial_model
    from models.weights import load_checkpoint

    try:
        metadata = load_checkpoint(path).metadata
        if not {"model", "training"} <= set(metadata):
            rule = "'untrained' needs a checkpoint that icestream train wrote"
            raise InputError(path, rule, "no training in its metadata")
        config = VitConfig.from_dict(metadata["model"])
        if config.head is Head.NONE:
            network = initial_encoder(parse_settings(PretrainConfig, metadata["training"]), config)
        else:
            training = parse_settings(TrainConfig, metadata["training"])
            network = initial_model(replace(training, initial_checkpoint=None), config)
    except ValueError as error:
        raise InputError(path, "a checkpoint that says how it was trained", error) from error
    return EncodingModel(
        name=UNTRAINED,
        encode=lambda grey: encode_grey(network, grey),
        input_size_px=config.input_size_px,
        resize_mode=config.resize_mode,
    )


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
    poses = [f"view class {number + 1}" for number in range(int(posed.pose_class.max()) + 1)]
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


def _print_table(document: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("model", "structure", "pose", "quality", "AUC", "AP", "Spearman", "Pearson")
    for row in (document, document.get("compared")):
        if row is not None:
            knn = row["knn"]
            figures = (knn["structure"], knn["pose"], knn["quality"], row["auc"], row["ap"])
            correlations = (row["spearman"], row["pearson"])
            table.add_row(
                f"{row['model']} (AUC by {row['ranked_by']})",
                *(f"{v:.3f}" for v in (*figures, *correlations)),
            )
    guess = document["guessing"]
    table.add_row("guessing", *(f"{guess[name]:.3f}" for name in ("structure", "pose", "quality")), "0.500")
    console.print(table)
