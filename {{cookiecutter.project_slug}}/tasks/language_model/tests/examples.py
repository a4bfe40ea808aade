"""What the tests hand to a net or a dataset that needs more than its name: a line of flags, and tiny files."""

from __future__ import annotations

from pathlib import Path

# Flags by name, such as "my_data": ["--data.file", "{folder}/mine.txt"]; {folder} holds the files made below.
FLAGS: dict[str, list[str]] = {}


def write_files(folder: Path) -> None:
    """None so far."""
