"""Identity of a particle: (exposure id, pick index), mapped to a stable 64-bit uid."""

from __future__ import annotations

import hashlib

from stream.records.values import ExposureId


def derive_particle_uid(exposure_id: ExposureId, pick_index: int) -> int:
    """Return the particle's uid, an unsigned 64-bit integer that every export keeps.

    The uid never is zero, because CryoSPARC treats uid 0 as "none".
    """
    text = f"{exposure_id}/{pick_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def derive_exposure_id(relative_path: str, micrograph_name: str | None = None) -> ExposureId:
    """Return the exposure's id: 16 hex digits of the path below the watched folder (and the micrograph).

    It does not depend on time of arrival, so live and offline runs of a folder agree on every id.
    """
    text = relative_path if micrograph_name is None else f"{relative_path}\n{micrograph_name}"
    return ExposureId(hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
