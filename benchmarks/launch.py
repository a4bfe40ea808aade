"""Starts one process, and tells what it has cost: run by `start.py`, as `python -S launch.py ...`.

A process of its own, since the most memory that a child ever held includes, on Linux, what its parent held when it
started it; and this one, without torch, holds little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Start the rest of the command line, with its output in a file; print what it has cost as JSON."""
    said, *command = sys.argv[1:]
    with open(said, "wb") as file:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
    # Kilobytes, but for macOS.
    held = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    cost = {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, "megabytes": held}
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), **cost}))


if __name__ == "__main__":
    main()
