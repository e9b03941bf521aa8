"""Training Topaz as an external program on labelled micrographs (`topaz preprocess`, `topaz train`).

All particles are labelled, so the loss is PN: of the others, `--method GE-binomial` (the default) takes unlabelled pixels for
possible particles, and releases up to 0.3.20 give its prior seven times too large (pixels of a label are counted in three
dimensions). The network starts from the weights that Topaz ships, as in the paper. Models that come out are pickles, read by Topaz
alone and from the folder that they were just written to.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.cryogem.picker import LabelledMicrograph
from stream.records.errors import ConfigurationError, ResourceError
from stream.sinks.mrc_images import write_micrograph

_DIAMETER_PX = 24.0
"""As `actors.topaz` bins: its networks see 71 px."""
_LABEL_RADIUS_PX = 3
_BALANCE = 0.25
"""Share of particles in a batch. With Topaz's 0.0625 a batch of 64 has none at all one time in sixty, and its loss is NaN for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopazTraining:
    """The paper trains 20 epochs of 1,000 × 256 crops; the default is what a core does in minutes."""

    seed: int = 0
    epochs: int = 4
    epoch_size: int = 50
    batch_size: int = 64
    timeout_s: float = 1800.0


def train_topaz(
    executable: Path, micrographs: Sequence[LabelledMicrograph], folder: Path, settings: TopazTraining
) -> Path:
    """Train on labelled micrographs of one scale and return the model file, which lies in `folder`."""
    diameter_px = micrographs[0].diameter_angstrom / micrographs[0].pixel_size_angstrom
    scale = max(1, round(diameter_px / _DIAMETER_PX))
    raw, binned = folder / "raw", folder / "binned"
    raw.mkdir()
    binned.mkdir()
    paths, lines, n_particles, n_pixels = [], ["image_name\tx_coord\ty_coord"], 0, 0
    for index, micrograph in enumerate(micrographs):
        path = raw / f"training_{index:04d}.mrc"
        write_micrograph(path, micrograph.image.numpy(), micrograph.pixel_size_angstrom)
        paths.append(str(path))
        shape = [int(n) // scale for n in micrograph.image.shape]
        n_pixels += shape[0] * shape[1]
        for y, x in (micrograph.centres_yx_px / scale).tolist():
            if 0 <= y < shape[0] and 0 <= x < shape[1]:
                lines.append(f"{path.stem}\t{math.floor(x)}\t{math.floor(y)}")
                n_particles += 1
    targets = folder / "targets.txt"
    targets.write_text("\n".join(lines) + "\n")
    _call(executable, ["preprocess", "--scale", str(scale), "--destdir", str(binned), *paths], settings)
    # a disc of radius 3 has 29 pixels
    share = 29 * n_particles / n_pixels
    command = ["train", "--train-images", str(binned), "--train-targets", str(targets)]
    command += ["--method", "PN", "--pi", f"{share:.6f}", "--radius", str(_LABEL_RADIUS_PX)]
    command += ["--num-epochs", str(settings.epochs), "--epoch-size", str(settings.epoch_size)]
    command += ["--minibatch-size", str(settings.batch_size), "--minibatch-balance", f"{_BALANCE:g}"]
    command += ["--device", "-1", "--num-workers", "0"]
    command += ["--save-prefix", str(folder / "model"), "--output", str(folder / "log.txt")]
    _call(executable, command, settings)
    model = folder / f"model_epoch{settings.epochs}.sav"
    if not model.is_file():
        raise ResourceError(model, "topaz train writes a model after each epoch", "no such file")
    return model


def _call(executable: Path, arguments: list[str], settings: TopazTraining) -> None:
    try:
        done = subprocess.run(
            [str(executable), *arguments],
            capture_output=True,
            text=True,
            timeout=settings.timeout_s,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigurationError("--topaz", "topaz is installed and may be run", executable) from error
    except subprocess.TimeoutExpired as error:
        rule = f"topaz {arguments[0]} ends within {settings.timeout_s:g} s"
        raise ResourceError(executable, rule, "still running") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        raise ResourceError(executable, f"topaz {arguments[0]} ends well", f"exit {done.returncode}: {last}")
