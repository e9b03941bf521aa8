"""A session's input and outputs in buffers on its own device, kept from call to call.

On a GPU a plain `run` allocates and copies anew each time. Here images go up once, the network's input may be made on the device
(`preprocess_torch.py`), and scores and features alone come back. On the CPU it gives the same numbers and no speed;
that is how it is tested. Not measured on a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_MAX_SIZES = 2
"""Batch sizes whose buffers are kept: the full batch and the rest at a stack's end."""


@dataclass(frozen=True, slots=True)
class _Buffers:
    binding: Any
    particles: Any
    score: Any
    feature: Any


class DeviceBinding:
    """Runs a ranker's session on buffers of `device` (`cuda` or `cpu`), for any batch size.

    Parameters
    ----------
    session
        An ONNX Runtime session with input `particles` and outputs `score`, `feature`.
    input_size_px, feature_dim
        Sides of the input and length of a feature.
    """

    def __init__(self, session: Any, device: str, *, input_size_px: int, feature_dim: int) -> None:  # noqa: ANN401 - onnxruntime has no types
        self.device = device
        self._session = session
        self._input_size_px = input_size_px
        self._feature_dim = feature_dim
        self._by_size: OrderedDict[int, _Buffers] = OrderedDict()

    def run(self, particles: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scores `(b,)` and features `(b, d)` of preprocessed particles `(b, 1, s, s)` in host memory."""
        buffers = self._buffers_for(len(particles))
        buffers.particles.update_inplace(np.ascontiguousarray(particles, np.float32))
        buffers.binding.bind_ortvalue_input("particles", buffers.particles)
        return self._run(buffers)

    def run_tensor(self, particles: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scores and features of preprocessed particles that lie on the device already; they are not copied."""
        import torch

        ready = particles.to(torch.float32).contiguous()
        if ready.device.type != self.device:
            msg = f"particles: on {ready.device.type}, must be on {self.device}"
            raise ValueError(msg)
        if ready.is_cuda:  # the session computes in a stream of its own
            torch.cuda.current_stream(ready.device).synchronize()
        buffers = self._buffers_for(len(ready))
        number = ready.device.index or 0
        buffers.binding.bind_input(
            "particles", self.device, number, np.float32, tuple(ready.shape), ready.data_ptr()
        )
        return self._run(buffers)

    def _run(self, buffers: _Buffers) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        try:
            self._session.run_with_iobinding(buffers.binding)
        except Exception:
            self._by_size.clear()  # memory may be what was lacking: a smaller batch finds it free
            raise
        # On the CPU `numpy()` is a view of the buffer, which the next run fills.
        return np.array(buffers.score.numpy()), np.array(buffers.feature.numpy())

    def _buffers_for(self, n: int) -> _Buffers:
        if n in self._by_size:
            self._by_size.move_to_end(n)
            return self._by_size[n]
        while len(self._by_size) >= _MAX_SIZES:
            self._by_size.popitem(last=False)
        from onnxruntime import OrtValue

        size = self._input_size_px

        def allocate(*shape: int) -> Any:  # noqa: ANN401 - onnxruntime has no types
            return OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self.device, 0)

        binding = self._session.io_binding()
        buffers = _Buffers(binding, allocate(n, 1, size, size), allocate(n), allocate(n, self._feature_dim))
        binding.bind_ortvalue_output("score", buffers.score)
        binding.bind_ortvalue_output("feature", buffers.feature)
        self._by_size[n] = buffers
        return buffers
