"""What the report costs: seconds of CPU time of the default run with it, beside those without it.

Both runs are repeated in turns, each in a process of its own, and the medians compared.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import Goal, Table, record

MAIN = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}" / "main.py"
GOAL = 3.0


def seconds(report: str) -> float:
    """CPU seconds of a default run, threads and all."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(MAIN), "--report", report, "--enable_progress_bar", "false"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run both in turns, and print what the report costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    pairs = [(seconds("false"), seconds("true")) for _ in range(repeats)]
    without, with_report = (statistics.median(column) for column in zip(*pairs, strict=True))
    spread = [both - alone for alone, both in pairs]
    table = Table("what the report costs", "default run", f"CPU time, medians of {repeats} runs in turns.", "report")
    table.add("without a report", {"CPU": f"{without:.2f} s"})
    table.add("with a report", {"CPU": f"{with_report:.2f} s"})
    cost = f"{with_report - without:.2f} s ({min(spread):.2f} to {max(spread):.2f})"
    table.add("the report", {"CPU": cost}, round(with_report - without, 2), Goal(GOAL))
    record("report", [table])


if __name__ == "__main__":
    main()
