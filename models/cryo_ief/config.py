"""The sizes and heads of a Cryo-IEF Vision Transformer, as plain values.

`mean` and `std` belong to the model as much as its weights do: they are those of the grey levels / 255 that it
was trained on (see `models/cryo_ief/preprocess.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, Literal

RELEASED_MEAN = 0.53786290141223
"""Mean of grey level / 255 that the released CryoRanker v1, v1.5 and Cryo-IEF v1 (ViT-B) expect."""
RELEASED_STD = 0.11803331075935841
VIT_S_MEAN = 0.549995056189533
"""The same for the released ViT-S (Cryo-IEF v1.5)."""
VIT_S_STD = 0.11784453744259035

ResizeMode = Literal["hartley", "bicubic"]


class Head(Enum):
    """What sits on the CLS token."""

    NONE = "none"
    """An encoder alone (Cryo-IEF): the feature is the CLS token after the final LayerNorm."""
    SOFTMAX2 = "v1"
    """CryoRanker v1: two logits after the final LayerNorm, score = softmax[1]."""
    SIGMOID1 = "v1.5"
    """CryoRanker v1.5: no final LayerNorm; LayerNorm and one logit in the head, score = sigmoid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    """Everything that is needed to build the network and to prepare its input."""

    input_size_px: int = 224
    patch_size_px: int = 14
    width: int = 768
    depth: int = 12
    n_heads: int = 12
    mlp_ratio: float = 4.0
    head: Head = Head.SIGMOID1
    mean: float = RELEASED_MEAN
    std: float = RELEASED_STD
    resize_mode: ResizeMode = "hartley"
    stem_channels: tuple[int, ...] = ()
    """Channels of the convolutions of stride 2 in place of the patch embedding (`stem.py`); none in the released networks."""

    def __post_init__(self) -> None:
        if self.input_size_px % self.patch_size_px:
            msg = (
                f"input_size_px: {self.input_size_px}, must be a multiple of the patch ({self.patch_size_px})"
            )
            raise ValueError(msg)
        if self.width % self.n_heads or self.width % 4:
            msg = f"width: {self.width}, must be a multiple of 4 and of the number of heads ({self.n_heads})"
            raise ValueError(msg)
        if self.stem_channels and 2 ** len(self.stem_channels) != self.patch_size_px:
            msg = (
                f"stem_channels: {list(self.stem_channels)}, must be one per halving of the patch"
                f" ({self.patch_size_px} px)"
            )
            raise ValueError(msg)

    @property
    def architecture(self) -> str:
        """A name such as `vit-w768-d12-h12-p14-224-v1.5`, which goes into exported files; a stem's channels follow the patch."""
        stem = "".join(f"{'s' if i == 0 else '.'}{c}" for i, c in enumerate(self.stem_channels))
        size = f"w{self.width}-d{self.depth}-h{self.n_heads}-p{self.patch_size_px}{stem}-{self.input_size_px}"
        return f"vit-{size}-{self.head.value}"

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary, the inverse of `from_dict`."""
        return {**asdict(self), "head": self.head.value, "stem_channels": list(self.stem_channels)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VitConfig:
        """Build from a plain dictionary; unknown keys raise."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            msg = f"model: unknown keys {sorted(unknown)}, known are {sorted(cls.__dataclass_fields__)}"
            raise ValueError(msg)
        head = Head(values.get("head", Head.SIGMOID1.value))
        return cls(**{**values, "head": head, "stem_channels": tuple(values.get("stem_channels", ()))})


SIZES: dict[str, VitConfig] = {
    "nano": VitConfig(input_size_px=64, patch_size_px=8, width=96, depth=4, n_heads=3),
    "micro": VitConfig(input_size_px=64, patch_size_px=8, width=128, depth=6, n_heads=4),
    "tiny": VitConfig(width=192, depth=12, n_heads=3),
    "small": VitConfig(width=384, depth=12, n_heads=12, mean=VIT_S_MEAN, std=VIT_S_STD),
    "base": VitConfig(),
    "large": VitConfig(width=1024, depth=24, n_heads=16),
}
"""`tiny` to `large` are upstream's Ti, S, B and L at 224 px; `nano` and `micro` are icestream's, for CPUs."""


def vit_config(size: str, **changes: Any) -> VitConfig:  # noqa: ANN401 - the fields of VitConfig
    """Return the configuration called `size` with some fields changed."""
    if size not in SIZES:
        msg = f"size: {size!r}, must be one of {sorted(SIZES)}"
        raise ValueError(msg)
    channels = tuple(changes.pop("stem_channels", ()))
    return replace(SIZES[size], **changes, stem_channels=channels)
