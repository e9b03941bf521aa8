"""The inbox: where what a person asks for waits for the service.

A request is one JSON file, written under a temporary name and renamed. The service takes requests in order of
their names, which begin with the time: it commits the event that one asks for and only then moves the file to
`done/`. Killed between the two it finds the file again; the event in the journal carries the request's id, so
the file is moved and nothing happens twice. A request that cannot be taken goes to `refused/` with its reason
beside it. The id is made of the file's name, inode, time and content: the same file is the same request, the
same words written again are another.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stream.records.errors import IcestreamError, InputError
from stream.records.wishes import Wish
from stream.store.files import replacing

MAX_REQUEST_BYTES = 65_536


class LimitsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="limits"):
    """Accept exposures by these limits from now on; keys are those of `QualityLimits`, absent = not applied."""

    limits: dict[str, float | int | None]
    reason: str = ""


class OverruleRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="overrule"):
    """Accept or reject one exposure, by its name, whatever the limits say; None takes that back."""

    name: str
    is_accepted: bool | None
    reason: str = ""


class WishRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="wish"):
    """Decide about runs, about the exposures of some time, or take an earlier decision back."""

    wish: Wish
    reason: str = ""


Request = LimitsRequest | OverruleRequest | WishRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A file in the inbox: its id, and the request or what is wrong with the file."""

    request_id: str
    path: Path
    request: Request | None
    fault: str = ""


class Inbox:
    """The folder of requests of one output folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._decoder = msgspec.json.Decoder(Request)
        self._stuck: set[Path] = set()

    def post(self, request: Request) -> str:
        """Leave a request for the service and return its file's name."""
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
        with replacing(self._folder / name) as temporary:
            temporary.write_bytes(msgspec.json.encode(request))
        return name

    def read(self) -> list[Letter]:
        """Return what waits, in order; a file that could not be moved away is not offered again."""
        try:
            paths = sorted(self._folder.iterdir())
        except OSError:
            # No folder yet, or one that cannot be read now: looked at again in a moment.
            return []
        paths = [p for p in paths if p.suffix == ".json" and p.name[0] != "." and p not in self._stuck]
        return [letter for path in paths if (letter := self._open(path))]

    def accept(self, letter: Letter) -> None:
        """Move a request whose event is in the journal to `done/`."""
        self._move(letter.path, "done")

    def refuse(self, letter: Letter, reason: str) -> None:
        """Move a request to `refused/`, its reason beside it as text."""
        self._move(letter.path, "refused", reason)

    def find_outcome(self, name: str) -> str | None:
        """Return "" for a request that was taken, why it was refused, or None while it waits."""
        if (self._folder / "done" / name).exists():
            return ""
        refused = self._folder / "refused" / name
        if not refused.exists():
            return None
        return refused.with_suffix(".txt").read_text(encoding="utf-8").strip()

    def _open(self, path: Path) -> Letter | None:
        try:
            status = path.stat()
            content = path.read_bytes()[: MAX_REQUEST_BYTES + 1]
        except FileNotFoundError:
            return None
        except OSError as error:
            return Letter(request_id="", path=path, request=None, fault=f"{path}: {error.strerror}")
        identity = f"{path.name}\n{status.st_ino}\n{status.st_mtime_ns}\n".encode()
        request_id = hashlib.blake2b(identity + content, digest_size=8).hexdigest()
        try:
            request = self._parse(path, content)
        except InputError as error:
            return Letter(request_id=request_id, path=path, request=None, fault=str(error))
        return Letter(request_id=request_id, path=path, request=request)

    def _parse(self, path: Path, content: bytes) -> Request:
        if len(content) > MAX_REQUEST_BYTES:
            raise InputError(
                path, f"a request is at most {MAX_REQUEST_BYTES} bytes", f"{len(content)} or more"
            )
        try:
            request: Request = self._decoder.decode(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, IcestreamError) as error:
            raise InputError(path, f"a request is JSON of a kind that this version knows: {error}") from error
        return request

    def _move(self, path: Path, folder: str, reason: str | None = None) -> None:
        target = self._folder / folder / path.name
        try:
            target.parent.mkdir(exist_ok=True)
            if reason is not None:
                with replacing(target.with_suffix(".txt")) as temporary:
                    temporary.write_text(reason + "\n", encoding="utf-8")
            path.replace(target)
        except OSError:
            # A folder that we may not write must not stop a session: the event is committed, its id known.
            self._stuck.add(path)
