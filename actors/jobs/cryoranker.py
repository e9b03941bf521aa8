"""Training a ranker as a Ray job: `ray job submit --working-dir . -- python -m actors.jobs.cryoranker CONFIG.yaml`.

The training runs in one Ray task, so that it is placed where the CPUs (or the GPU) asked for are; the driver prints
nothing but the result, as one JSON document. Started without Ray around it, it starts one on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from models.cryoranker.train import TrainConfig, read_train_config, train_ranker


def train(config: TrainConfig, folder: str) -> dict[str, Any]:
    """Train and return the JSON document of `icestream train`; runs in a Ray task."""
    result = train_ranker(config, Path(folder))
    return {
        "checkpoint": str(result.checkpoint),
        "sha256": result.sha256,
        "metrics": {**asdict(result.validation), "seconds": result.seconds},
        "node": ray.get_runtime_context().get_node_id(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the training on Ray and print its result."""
    parser = argparse.ArgumentParser(prog="python -m actors.jobs.cryoranker")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, default=Path("training"), help="a folder that all nodes share")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--num-cpus", type=float, default=1.0)
    given = parser.parse_args(arguments)
    config = read_train_config(given.config)
    if given.seed is not None:
        config = replace(config, seed=given.seed)
    has_started = not ray.is_initialized()
    if has_started:
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
            )
    try:
        remote = ray.remote(num_cpus=given.num_cpus, max_retries=1)(train)
        document = ray.get(remote.remote(config, str(given.out.absolute())))
    finally:
        if has_started:
            ray.shutdown()
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
