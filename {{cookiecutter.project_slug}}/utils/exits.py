"""What main.py says: one line for what is wrong, and an exit code; and what it keeps to itself."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import engine

# Characters of a line of error; the longest lists all nets of torchvision.
LONGEST = 3000


def exit_with(message: str, code: int = 2) -> NoReturn:
    """Print one line of error, not too long and without control characters, and exit."""
    _say(f"error: {one_line(message)}")
    if hasattr(engine, "last_words") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # So that what others say of it is right.
        engine.last_words.mark_failed()
    raise SystemExit(code)


def one_line(message: str) -> str:
    """A message as a line for the terminal: not too long, and without control characters."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[:1000]} ... {line[-500:]}"


def _say(text: str) -> None:
    """Print the last words of a run, once for all of its processes."""
    # Lightning, too, goes by the name of engine.
    (engine.last_words.say_once if hasattr(engine, "last_words") else partial(print, file=sys.stderr))(text)


def exit_after(error: Exception | KeyboardInterrupt) -> NoReturn:
    """Exit with one line: code 2 for wrong input, 130 after Ctrl-C, 1 for a fault that the engine explains.

    A bug keeps its traceback.
    """
    if isinstance(error, engine.MisconfigurationException):
        exit_with(str(error))
    if isinstance(error, KeyboardInterrupt):
        _say("\ninterrupted; where a checkpoint was saved, --ckpt_path last goes on from there")
        raise SystemExit(130)
    if not getattr(error, "explained", False):
        raise error
    notes = getattr(error, "__notes__", [])
    exit_with("; ".join([(str(error).splitlines() or [type(error).__name__])[0], *notes]), code=1)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of libraries; errors come through."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
