"""Memory in pages of 2 MiB for this program and what it starts, where Linux gives them to programs that ask.

Weights and images are read over and over by matrix products, which miss the processor's page table with pages of 4 KiB:
with large ones ViT-B runs 3-4 % faster in float32 and the initial model 3-6 % (`ops/benchmarks/vit_b.md`). glibc asks
for them when its tunable says so, and reads the tunable when a program starts; so the program starts itself again once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tunables_for(mode: str, tunables: str) -> str | None:
    """Return what `VARIABLE` must hold; None where nothing needs to be changed.

    `mode` is what the kernel says of transparent huge pages ("always [madvise] never": the one in brackets is in force),
    `tunables` what the variable holds; a user's own choice stands.
    """
    if "[madvise]" not in mode or TUNABLE in tunables:
        return None
    return ":".join(filter(None, (tunables, f"{TUNABLE}=1")))


def ask_for_huge_pages() -> None:
    """Start this program again with the tunable set, where that helps; to be called before anything else is done."""
    try:
        mode = _MODE.read_text()
    except OSError:  # not Linux, or a kernel without them
        return
    tunables = tunables_for(mode, os.environ.get(VARIABLE, ""))
    if tunables is not None:
        os.environ[VARIABLE] = tunables
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command line, no shell
