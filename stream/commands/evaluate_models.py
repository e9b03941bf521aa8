"""Models that `icestream evaluate` judges: checkpoints, exported rankers, and the network that a training started from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stream.records.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.cryo_ief.config import ResizeMode
    from models.cryo_ief.encode import Encoded
    from models.cryoranker.judge_features import Encoder

UNTRAINED = "untrained"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingModel:
    """A model that gives features, and what its input has to be."""

    name: str
    encode: Encoder
    input_size_px: int
    resize_mode: ResizeMode


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
                ranker.infer(normalise_grey_levels(grey[i : i + 64], ranker.info.mean, ranker.info.std))
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
