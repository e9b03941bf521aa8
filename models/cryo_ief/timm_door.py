"""The one door to timm.

timm imports torchvision, whose wheel does not load beside a CPU build of torch of the same version: its import
ends in one known error about the operator `torchvision::nms`. On that error alone two operator schemas are
declared, which is all that the import needs; nothing that icestream calls ever runs them. Serving a model does
not come here (ONNX Runtime is enough); building, training and exporting one does.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_KNOWN_ERROR = "operator torchvision::nms does not exist"
_kept_alive: list[torch.library.Library] = []


def load_timm() -> ModuleType:
    """Return the module `timm`, with torchvision's missing operators declared where that is needed."""
    try:
        import timm
    except RuntimeError as error:
        if _KNOWN_ERROR not in str(error):
            raise
        _declare_missing_operators()
        import timm
    except ModuleNotFoundError as error:
        msg = f"timm: needed to build or train a model ({error.name} is missing), install icestream[train]"
        raise ValueError(msg) from error
    module: ModuleType = timm
    return module


def _declare_missing_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)  # the schemas vanish with the library
    for name in [name for name in sys.modules if name.split(".")[0] in {"torchvision", "timm"}]:
        del sys.modules[name]
