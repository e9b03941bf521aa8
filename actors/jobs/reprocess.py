"""Reprocess a folder as a Ray job: the same stages as live, on the cluster that runs the job.

`ray job submit --working-dir . -- python -m actors.jobs.reprocess --movies DIR --out DIR …` takes the
options of `icestream reprocess`. Paths are those of a file system that every node sees.
"""

from __future__ import annotations

import sys

from stream.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["reprocess", "--ray-address", "auto"]
    main()
