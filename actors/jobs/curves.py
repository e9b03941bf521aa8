"""A training's progress for people and monitors: TensorBoard events and a Prometheus text file.

Batch jobs run where Ray puts them, so nothing could know which port to scrape: `metrics.prom` in the training's folder is
replaced atomically at every report, in the text format that node_exporter's textfile collector reads. Written by
the first worker alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

METRICS_FILE = "metrics.prom"
TENSORBOARD_FOLDER = "tensorboard"
_DESCRIBED = {
    "step": "Steps done.",
    "epoch": "Passes over the data done.",
    "loss": "Loss, averaged as the curve has it.",
    "accuracy": "Fraction of queries whose nearest key is their own.",
    "learning_rate": "Learning rate of the last step (1).",
    "auc": "Validation AUC.",
    "images_per_s": "Images trained on per second, by all workers.",
    "seconds": "Time spent training, restarts included.",
}


class TrainingCurves:
    """Writes every reported point; a context manager.

    Parameters
    ----------
    folder
        The training's folder.
    model
        Label `model` of the Prometheus series: `cryo_ief` or `cryoranker`.
    """

    def __init__(self, folder: Path, model: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._model = model
        self._make_writer = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._registry = CollectorRegistry()
        self._gauges = {
            key: Gauge(f"icestream_training_{key}", text, ["model"], registry=self._registry)
            for key, text in _DESCRIBED.items()
        }
        self._reported_at = Gauge(
            "icestream_training_last_report_timestamp_seconds",
            "Wall clock of the last report.",
            ["model"],
            registry=self._registry,
        )

    def __enter__(self) -> TrainingCurves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def report(self, point: dict[str, float]) -> None:
        """Add one point of the curve."""
        step = int(point["step"])
        if self._writer is None:
            # What a killed run reported after its last state is reported again: TensorBoard drops the first.
            self._writer = self._make_writer(str(self._folder / TENSORBOARD_FOLDER), purge_step=step)
        for key, value in point.items():
            if key != "step":
                self._writer.add_scalar(key, value, step)
            if key in self._gauges:
                self._gauges[key].labels(self._model).set(value)
        self._writer.flush()
        self._reported_at.labels(self._model).set(time.time())
        write_to_textfile(str(self._folder / METRICS_FILE), self._registry)
