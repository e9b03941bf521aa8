"""Training shared by several processes: who this one is, and sums over all of them that gradients pass through.

The processes are torch's default process group (Ray Train or torchrun makes it); without one there is one worker.
Every worker holds an equal share of each batch, rows in rank order, so that any number of workers computes the
same losses and the same batch statistics as one, up to the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Which of the processes that train together is this one, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of_process_group(cls, device: torch.device) -> Workers:
        """Return this process's place in torch's default process group."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, n_rows: int) -> slice:
        """Return this worker's rows of a batch of `n_rows`; raise where they do not divide evenly."""
        if n_rows % self.size:
            msg = f"batch_size: {n_rows}, must be a multiple of the {self.size} workers"
            raise ValueError(msg)
        n = n_rows // self.size
        return slice(self.rank * n, (self.rank + 1) * n)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` on this worker's device, its gradients averaged over the workers in `backward`."""
        model.to(self.device)
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every parameter the mean of the workers' gradients; one that a worker has none of counts as 0 there.

        For steps that `wrap` cannot follow, such as two networks that take turns in one loss.
        """
        if self.size == 1:
            return
        own = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
            parameter.grad = part.view_as(parameter).clone(memory_format=torch.preserve_format)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over workers, on every worker."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total]

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()


def n_workers() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    """Sum over workers; the gradient of a sum that every worker uses is the sum of the workers' gradients."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:  # noqa: ANN401 - autograd's context has no type
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_workers(value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Return the sum of every worker's tensor, on every worker; differentiable."""
    return value if n_workers() == 1 else cast("Tensor", _Sum.apply(value))  # type: ignore[no-untyped-call]


def gather_rows(rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "n ..."]:
    """Return the rows of all workers in rank order; differentiable."""
    size = n_workers()
    if size == 1:
        return rows
    n, rank = len(rows), dist.get_rank()
    before = rows.new_zeros((rank * n, *rows.shape[1:]))
    after = rows.new_zeros(((size - rank - 1) * n, *rows.shape[1:]))
    return sum_over_workers(torch.cat((before, rows, after)))


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm of rows `(n, c)` whose statistics in training are those of all workers' rows."""

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise every channel; running statistics in evaluation."""
        if not self.training or n_workers() == 1:
            return super().forward(rows)
        count = len(rows) * n_workers()
        mean = sum_over_workers(rows.sum(0)) / count
        centred = rows - mean
        variance = sum_over_workers(centred.square().sum(0)) / count
        self._follow(mean.detach(), variance.detach() * (count / (count - 1)))
        normalised = centred * torch.rsqrt(variance + self.eps)
        return normalised * self.weight + self.bias if self.affine else normalised

    def _follow(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        rate = 0.1 if self.momentum is None else self.momentum
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
            self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), rate)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
