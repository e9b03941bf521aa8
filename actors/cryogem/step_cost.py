"""What one training step costs on this machine, under the paper's settings and cheaper ones.

Every setting is timed in a process of its own, so that its peak memory is its own: `python -m actors.cryogem.step_cost parity`
prints CPU seconds, elapsed seconds and memory of a step after one to warm up, as JSON. Images are noise; their content costs nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace

import torch

from models.cryogem.networks import NetworkSettings
from models.cryogem.pairs import TrainingPair
from models.cryogem.physics import PhysicsSettings
from models.cryogem.settings import CryogemSettings, TrainingSettings
from models.cryogem.trainer import CryogemTrainer

_PARITY = TrainingSettings(device="cpu")
_BENCH = NetworkSettings(
    depth=6, generator_filters=16, discriminator_filters=16, nce_levels=(1, 2, 3, 4), head_width=64
)
_CROP = replace(_PARITY, crop_px=512)
SETTINGS: dict[str, tuple[NetworkSettings, TrainingSettings]] = {
    "parity": (NetworkSettings(), _PARITY),
    "crop_512": (NetworkSettings(depth=9), _CROP),
    "crop_512_bf16": (NetworkSettings(depth=9), replace(_CROP, precision="bf16")),
    "crop_512_channels_last": (NetworkSettings(depth=9), replace(_CROP, is_channels_last=True)),
    "bench_256": (_BENCH, replace(_PARITY, crop_px=256, n_queries=128)),
    "bench_256_bf16": (_BENCH, replace(_PARITY, crop_px=256, n_queries=128, precision="bf16")),
    "bench_128": (_BENCH, replace(_PARITY, crop_px=128, n_queries=128)),
    "crop_512_quarter": (NetworkSettings(depth=9, generator_filters=16, discriminator_filters=32), _CROP),
}
"""Names of settings; what can be learnt is changed by the crop and by the number of filters and levels alone."""


def measure_step(
    networks: NetworkSettings, training: TrainingSettings, *, warm_up: int = 1
) -> dict[str, float]:
    """Return `cpu_s`, `wall_s` of one step and `peak_gb` of the process so far."""
    trainer = CryogemTrainer(CryogemSettings(physics=PhysicsSettings(), networks=networks, training=training))
    generator = torch.Generator().manual_seed(0)
    side = training.crop_px
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    images = [torch.rand(1, 1, side, side, generator=generator) * 2.0 - 1.0 for _ in range(3)]
    pair = TrainingPair(physics=images[0], source=images[1], mask=mask, real=images[2])
    for step in range(warm_up):
        trainer.step(pair, trainer.draw_places(mask, step))
    started, cpu = time.perf_counter(), time.process_time()
    trainer.step(pair, trainer.draw_places(mask, warm_up))
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - started,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main(arguments: list[str] | None = None) -> None:
    """Print one measurement."""
    parser = argparse.ArgumentParser(prog="python -m actors.cryogem.step_cost")
    parser.add_argument("setting", choices=sorted(SETTINGS))
    parser.add_argument("--warm-up", type=int, default=1)
    given = parser.parse_args(arguments)
    networks, training = SETTINGS[given.setting]
    found = measure_step(networks, training, warm_up=given.warm_up)
    print(json.dumps({"setting": given.setting, **found}))  # noqa: T201 - the command's document


if __name__ == "__main__":
    main()
