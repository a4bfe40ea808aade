"""What is said when a run of several processes fails: the cause before what follows from it, and everything once."""

from __future__ import annotations

import re
import signal
import sys
import time
import traceback
import zlib
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.rendezvous import LAST_SECONDS, meet, number

# What gloo, NCCL and torch's store say where another process of the run has gone.
GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket closed|pair closure|remote process exited"
    r"|communicator (was|is) aborted|failed to (recv|send)|timed out waiting|wait timeout|collective operation timeout",
    re.IGNORECASE,
)
_usual_hook = sys.excepthook
# Set once the process that has failed first is about to exit.
FAILED = "failed"


def watch_processes() -> None:
    """Have an error that ends this process, one of several, told once, and before what follows from it elsewhere."""
    # What the environment should have is told when a Trainer is made.
    with suppress(MisconfigurationException):
        if distributed.world_size() > 1:
            sys.excepthook = _last_words


def report(error: BaseException) -> None:
    """With several processes, print the traceback of a bug; what one line tells is told where that is printed."""
    one_line = isinstance(error, MisconfigurationException) or hasattr(error, "explained") or lost_others(error)
    if distributed.world_size() > 1 and isinstance(error, Exception) and not one_line:
        _print_traceback(error)


def lost_others(error: BaseException) -> str | None:
    """What an error says of another process of the run that has gone, if that is all it says."""
    text = str(error)
    by_torch = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    found = GONE.search(text) if by_torch and distributed.world_size() > 1 else None
    return found and found[0].lower()


def _print_traceback(error: BaseException) -> None:
    text = "".join(traceback.format_exception(error)).rstrip()
    say_once(text, f"[rank{distributed.rank()}]: ")
    error.reported = True  # type: ignore[attr-defined]


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of `sys.excepthook`."""
    if lost := lost_others(error):
        told = "it has said why" if wait_for_failed() else "it was killed, or waits for something else"
        say_once(f"error: another process of this run has gone ({lost}); {told}")
        return
    if not isinstance(error, Exception):
        _usual_hook(kind, error, trace)
    elif not hasattr(error, "reported"):
        _print_traceback(error)
    mark_failed()


def say_once(text: str, prefix: str = "") -> None:
    """Print the last words of a run to stderr, unless another of its processes has said the same.

    Args:
        text: What to say.
        prefix: What every line of it begins with.
    """
    key, store = f"said-{zlib.crc32(text.encode())}", None
    # Without a store it is said anyway.
    with suppress(RuntimeError, MisconfigurationException, TimeoutError):
        if number("WORLD_SIZE", 1) > 1:
            store = meet(LAST_SECONDS)
            if store.add(key, 1) > 1:
                # Whoever exits first has the others killed.
                store.wait([f"{key}-done"], timedelta(seconds=LAST_SECONDS))
                return
    print("\n".join(f"{prefix}{line}" for line in text.splitlines()), file=sys.stderr, flush=True)
    with suppress(RuntimeError):
        if store is not None:
            store.set(f"{key}-done", "1")


def outlive_the_first() -> None:
    """Let a process of several that leaves by itself do so: torchrun ends the others as soon as one has ended."""
    if distributed.world_size() > 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def mark_failed() -> None:
    """Tell the other processes of the run that this one has failed, has said why, and is about to exit."""
    with suppress(RuntimeError, MisconfigurationException, TimeoutError):
        meet(LAST_SECONDS).set(FAILED, "1")


def wait_for_failed() -> bool:
    """Wait for `mark_failed` of another process; whether it came."""
    try:
        meet(LAST_SECONDS).wait([FAILED], timedelta(seconds=LAST_SECONDS))
        # It has to be the first to exit: launchers name that one.
        time.sleep(1)
        return True
    except (RuntimeError, MisconfigurationException, TimeoutError):
        return False
