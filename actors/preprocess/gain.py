"""The gain reference of a session, read once per worker."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from actors.preprocess.settings import PreprocessSettings
from stream.ingest.gain import GainReference, check_gain, orient_gain, read_gain


@lru_cache(maxsize=2)
def _load_gain(path: Path, mtime_ns: int, *, flip_x: bool, flip_y: bool, rotate_deg: int) -> GainReference:
    """Read and turn a gain reference; kept between exposures until the file changes."""
    del mtime_ns  # part of the cache's key alone
    return orient_gain(read_gain(path), flip_x=flip_x, flip_y=flip_y, rotate_deg=rotate_deg)


def read_session_gain(
    settings: PreprocessSettings, shape_yx: tuple[int, int], item: str
) -> GainReference | None:
    """Return the session's gain reference, turned and of the movie's shape; None where there is none."""
    if settings.gain is None:
        return None
    gain = _load_gain(
        settings.gain,
        settings.gain.stat().st_mtime_ns,
        flip_x=settings.gain_flip_x,
        flip_y=settings.gain_flip_y,
        rotate_deg=settings.gain_rotate_deg,
    )
    check_gain(gain, shape_yx, item)
    return gain
