"""Whether a folder lies on a network file system, where inotify does not see what other machines write."""

from __future__ import annotations

from pathlib import Path

NETWORK_TYPES = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "davfs", "fhgfs", "fuse", "fuseblk", "glusterfs", "gpfs", "lustre",
        "mmfs", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "quobyte", "smb2", "smb3", "smbfs",
        "vboxsf", "virtiofs", "weka", "wekafs",
    }
)  # fmt: skip


def find_file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the type of the file system that holds `folder`; None where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        target = folder.resolve()
    except OSError:
        return None
    best: tuple[int, str] | None = None
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        # The kernel writes blanks in mount points as octal escapes.
        point = Path(fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        depth = len(point.parts)
        # Of two mounts on one point the later one hides the earlier.
        if target.is_relative_to(point) and (best is None or depth >= best[0]):
            best = (depth, fields[2])
    return None if best is None else best[1]


def is_network_file_system(file_system: str | None) -> bool:
    """Return whether other machines may write there unseen; every user-space (fuse) system counts."""
    return file_system is not None and (file_system in NETWORK_TYPES or file_system.startswith("fuse."))
