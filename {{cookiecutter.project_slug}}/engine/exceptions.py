"""The error that stands for wrong input rather than for a bug, and how errors are explained."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

# Parts of the paths of files that are not the user's own code.
LIBRARIES = ("site-packages", "dist-packages", str(Path(__file__).parent))
E = TypeVar("E", bound=BaseException)


class MisconfigurationException(Exception):
    """Raised for input that cannot work, before anything is lost.

    The message is one line: what was given, what is allowed, what to do. `main.py` prints it without a
    traceback and exits with code 2.
    """


class DamagedCheckpoint(MisconfigurationException):
    """A file that is no good, whoever reads it, and whenever."""


def explained(error: E, note: str | None = None) -> E:
    """Mark an error as one that its text, and a note (PEP 678), explain: `main.py` prints these, and no traceback."""
    if note is not None and note not in getattr(error, "__notes__", []):
        error.add_note(note)
    error.explained = True  # type: ignore[attr-defined]
    return error
