"""The command asks for large pages once, where Linux gives them on request."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stream.huge_pages import TUNABLE, VARIABLE, tunables_for

ON_REQUEST = "always [madvise] never"


@pytest.mark.parametrize(
    ("mode", "tunables", "expected"),
    [
        (ON_REQUEST, "", f"{TUNABLE}=1"),
        (ON_REQUEST, "glibc.malloc.check=1", f"glibc.malloc.check=1:{TUNABLE}=1"),
        (ON_REQUEST, f"{TUNABLE}=0", None),
        ("[always] madvise never", "", None),
        ("always madvise [never]", "", None),
    ],
)
def test_it_asks_where_that_helps_and_leaves_a_users_choice(mode, tunables, expected):
    assert tunables_for(mode, tunables) == expected


def test_the_program_starts_again_once_with_its_own_arguments():
    code = "import os, sys; from stream.huge_pages import *; ask_for_huge_pages(); print(os.environ.get(VARIABLE), sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    printed = subprocess.run(
        [sys.executable, "-c", code, "two words", "-x"],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    ).stdout
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    is_asked = mode.is_file() and "[madvise]" in mode.read_text()
    assert printed.strip() == f"{TUNABLE + '=1' if is_asked else None} ['two words', '-x']"
