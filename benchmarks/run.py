"""All benchmarks, one after the other, and what they found as one page: build/bench/results.md, and a plot.

Each part also runs by itself: `python benchmarks/step.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from figure import draw
from tables import RESULTS, recorded, settings, was_quick

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"
PICTURE = HERE.parent / "docs" / "images" / "speed.png"
BEGIN, END = "<!-- tables: written by make bench -->", "<!-- end of tables -->"
# In this order. The first ones can be quick. One that records nothing, as without a GPU, keeps what it recorded before.
QUICK = ("step", "epoch", "start", "scale")
PARTS = (*QUICK, "account", "loader", "ddp", "gpu", "saving", "report")


def page() -> str:
    """Everything that was recorded, as Markdown."""
    common, own = settings(PARTS)
    lines = [f"{common}.\n"] if common else []
    for part in PARTS:
        lines += [f"{own[part]}:\n"] if own.get(part) else []
        lines += [table.markdown() for table in recorded(part)]
    return "\n".join(lines)


def publish(text: str, page_path: Path = PAGE) -> None:
    """Put the tables between the marks of the page, and the plot beside it.

    Raises:
        SystemExit: The page has lost its marks.
    """
    old = page_path.read_text(encoding="utf-8")
    marked = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    new, count = marked.subn(lambda match: f"{match[1]}\n{text}\n{match[2]}", old)
    if count != 1:
        raise SystemExit(f"error: {page_path} has not once the lines {BEGIN} and {END}; put them where tables belong")
    page_path.write_text(new, encoding="utf-8")


def main() -> None:
    """Run the parts, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="short and without peers: shows that everything runs")
    parser.add_argument("--publish", action="store_true", help="copy tables and plot into docs/")
    arguments = parser.parse_args()
    chosen = [part for part in arguments.only or PARTS if (HERE / f"{part}.py").is_file()]
    if arguments.quick:
        chosen = [part for part in chosen if part in QUICK]
    failed = []
    for part in chosen:
        print(f"── {part}", flush=True)
        words = ["--quick"] if arguments.quick else []
        if subprocess.run([sys.executable, str(HERE / f"{part}.py"), *words]).returncode:
            failed.append(part)
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = page()
    (RESULTS / "results.md").write_text(text, encoding="utf-8")
    everything = {part: [asdict(table) for table in recorded(part)] for part in PARTS}
    common, own = settings(PARTS)
    content = {"setting": common, "settings": own, **everything}
    (RESULTS / "results.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    pictures = draw(recorded("step"), RESULTS)
    print(common, *(f"{part}: {what}" for part, what in own.items() if what), sep="\n")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, as said above; nothing was published")
    if arguments.publish:
        # A part may be renewed by itself; what the page shows of the others is what they recorded.
        if was_quick(PARTS) or not pictures:
            parts = ", ".join(was_quick(PARTS) or ["step"])
            sys.exit(f"error: a quick run is not published, nor one without the part step; run {parts} without --quick")
        publish(f"![CPU time of a step, in steps of a loop written by hand](images/{PICTURE.name})\n\n{text}")
        shutil.copy(pictures[0], PICTURE)
    print(f"tables and plot  {RESULTS}")


if __name__ == "__main__":
    main()
