"""Identity of a file, and what an operating-system error about it means.

A file that cannot be opened because of what it is (no permission, a folder, a symlink loop, gone) is an
`InputError`; trouble of the machine (I/O error, stale handle, too many open files, no memory) is a
`ResourceError`, because the same file may be fine a minute later.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from stream.records.errors import IcestreamError, InputError, ResourceError
from stream.records.values import FileIdentity

FINGERPRINT_BLOCK_BYTES = 64 * 1024

_MACHINE_ERRORS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT}
)
_RULES = {
    errno.ENOENT: "the file is there when it is read (it vanished)",
    errno.ENOTDIR: "the file is there when it is read (it vanished)",
    errno.EACCES: "the file is readable by this user (permission)",
    errno.EPERM: "the file is readable by this user (permission)",
    errno.EISDIR: "an input is a regular file, not a folder",
    errno.ELOOP: "an input is a regular file, not a loop of symbolic links",
}


def translate_os_error(path: str | Path, error: OSError) -> IcestreamError:
    """Return the `InputError` or `ResourceError` that says what `error` means for the file."""
    value = error.strerror or repr(error)
    code = error.errno
    if code in _MACHINE_ERRORS:
        return ResourceError(path, "the file system answers when the file is read", value)
    rule = "an input can be opened and read" if code is None else _RULES.get(code)
    return InputError(path, rule or "an input can be opened and read", value)


def fingerprint_file(path: str | Path) -> str:
    """Return the blake2b hex digest (32 digits) of the first and last 64 KiB and the size of the file."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(path).open("rb") as stream:
            digest.update(stream.read(FINGERPRINT_BLOCK_BYTES))
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(FINGERPRINT_BLOCK_BYTES, size - FINGERPRINT_BLOCK_BYTES))
            digest.update(stream.read(FINGERPRINT_BLOCK_BYTES))
    except OSError as error:
        raise translate_os_error(path, error) from error
    digest.update(str(size).encode())
    return digest.hexdigest()


def identify_file(path: str | Path) -> FileIdentity:
    """Return the file's identity; its path is made absolute, symbolic links in it are kept."""
    absolute = Path(path).absolute()
    try:
        status = absolute.stat()
    except OSError as error:
        raise translate_os_error(path, error) from error
    return FileIdentity(
        path=str(absolute),
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        fingerprint=fingerprint_file(absolute),
    )
