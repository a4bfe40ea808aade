"""Make one file of a checkpoint that lies in parts: `python -m engine.consolidate best.ckpt whole.ckpt`."""

from __future__ import annotations

import sys
from pathlib import Path

from engine import checkpoint
from engine.exceptions import MisconfigurationException


def consolidate(source: Path, target: Path) -> None:
    """Write a checkpoint as a single file, with everything in it; it needs as much memory as it is large.

    Raises:
        MisconfigurationException: `source` is no good, or `target` is there already.
    """
    if target.exists():
        raise MisconfigurationException(f"{target} is there already; give another name")
    checkpoint.save(checkpoint.load(source), target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m engine.consolidate CHECKPOINT NEW_FILE")
    try:
        consolidate(Path(sys.argv[1]), Path(sys.argv[2]))
    except (MisconfigurationException, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
