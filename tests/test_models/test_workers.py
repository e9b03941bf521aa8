"""Processes that train together: sums and gradients are those of all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.workers import Workers

_ROOT = Path(__file__).parents[2]

_TOGETHER = """
import sys, torch
import torch.distributed as dist
from models.workers import Workers
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
workers = Workers.of_process_group(torch.device("cpu"))
given, lacking, nobody = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
given.grad = torch.full((2, 3), 1.0 + 2.0 * rank)
if rank == 0:
    lacking.grad = torch.arange(6.0).view(2, 3)
workers.average_gradients([given, lacking, nobody])
assert torch.equal(given.grad, torch.full((2, 3), 2.0))
assert torch.equal(lacking.grad, torch.arange(6.0).view(2, 3) / 2.0)
assert torch.equal(nobody.grad, torch.zeros(2, 3))
assert workers.sum([1.0, float(rank)]) == [2.0, 1.0]
"""


def test_gradients_are_averaged_over_processes_and_a_lacking_one_counts_as_zero(tmp_path: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", _TOGETHER, str(rank), str(tmp_path / "store")], cwd=_ROOT)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]


def test_alone_nothing_is_changed() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    Workers().average_gradients([parameter])
    assert parameter.grad is None
    assert Workers().sum([1.5]) == [1.5]


def test_a_batch_is_shared_evenly_or_refused() -> None:
    assert Workers(rank=1, size=2).share(6) == slice(3, 6)
    with pytest.raises(ValueError, match="multiple of the 2 workers"):
        Workers(size=2).share(5)
