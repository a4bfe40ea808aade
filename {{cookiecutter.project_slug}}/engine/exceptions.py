"""The one error of this project that stands for wrong input rather than for a bug."""

from __future__ import annotations


class MisconfigurationException(Exception):
    """Raised for input that cannot work, before anything is lost.

    The message is one line: what was given, what is allowed, what to do. `main.py` prints it without a
    traceback and exits with code 2.
    """
