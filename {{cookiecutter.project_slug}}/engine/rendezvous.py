"""How the processes of a run find each other.

torchrun sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, and serves the store that they meet at. Where
something else sets them, the first process serves it.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from threading import Thread

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from engine.exceptions import MisconfigurationException, explained

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long processes wait for each other to start: they may read their code from a slow disk.
JOIN_SECONDS = 300.0
# How long one that ends waits for others.
LAST_SECONDS = 5.0

_met: Store | Exception | None = None


def number(name: str, default: int) -> int:
    """A whole number from the environment.

    Raises:
        MisconfigurationException: It is something else.
    """
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise MisconfigurationException(
            f"{name}={value!r} in the environment is no whole number; start with torchrun, which sets it, or unset it"
        )
    return int(value)


def check_environment() -> None:
    """Refuse variables of a launcher that are incomplete, or do not fit each other.

    Raises:
        MisconfigurationException: They are.
    """
    if "RANK" not in os.environ and number("WORLD_SIZE", 1) == 1:
        return
    given, missing = ([n for n in VARIABLES if bool(os.environ.get(n)) is there] for there in (True, False))
    if missing:
        raise MisconfigurationException(
            f"the environment has {', '.join(given)}, but no {', '.join(missing)}; start with torchrun, which sets all "
            f"of them, or unset {', '.join(given)} to run one process"
        )
    rank, world, port = (number(name, 0) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world:
        raise MisconfigurationException(f"RANK={rank}, but WORLD_SIZE={world}; ranks go from 0 to WORLD_SIZE - 1")
    if not 0 < port < 2**16:
        raise MisconfigurationException(f"MASTER_PORT={port}; export one from 1024 to 65535")


def meet(seconds: float | None = None) -> Store:
    """The store of the run, the same at every call.

    Args:
        seconds: How long to wait for it; default: `JOIN_SECONDS`.

    Raises:
        MisconfigurationException: Another program uses its port.
        TimeoutError: Nobody serves it, or does not answer.
    """
    global _met
    if _met is None:
        try:
            _met = _store(JOIN_SECONDS if seconds is None else seconds)
            atexit.register(_part, _met)
        except (MisconfigurationException, TimeoutError) as error:
            # So that nobody waits again.
            _met = error
    if isinstance(_met, Exception):
        raise _met
    return _met


def _part(store: Store) -> None:
    """Keep the store for the others, which may still ask for something, until they end, too."""
    with suppress(RuntimeError):
        store.add("parted", 1)
        end = time.monotonic() + LAST_SECONDS
        while _serves() and store.add("parted", 0) < number("WORLD_SIZE", 1) and time.monotonic() < end:
            time.sleep(0.02)


def _serves() -> bool:
    return number("RANK", 0) == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _store(seconds: float) -> Store:
    check_environment()
    address, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 0)
    end = time.monotonic() + seconds
    if not _serves():
        # torch's client would fill the terminal while it waits.
        _wait_for_server(address, port, end)
    found: list[Store | Exception] = []

    def ask() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=timedelta(seconds=seconds)))[0])
        except Exception as error:
            found.append(error)

    # In a thread, since torch waits for ever for the answer of a program that never answers.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    # Whoever serves is told by torch itself when time is over, a little later.
    thread.join(max(end - time.monotonic(), 0) + (10 if _serves() else 1))
    store = found[0] if found else TimeoutError("no answer")
    if isinstance(store, Store):
        # torchrun's store outlives processes that are started again, and has the addresses of the dead. Launchers of
        # several machines count restarts each for themselves: there `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` makes a new
        # store for each.
        alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        return PrefixStore(f"engine-{attempt}", store)
    reason = str(store).splitlines()[0]
    if "EADDRINUSE" in reason or "in use" in reason:
        raise MisconfigurationException(
            f"port {port} is in use by another program; export another MASTER_PORT on all machines of the run"
        ) from None
    if "waiting for clients" in reason:
        raise explained(TimeoutError(f"not all processes of the run have started: {reason}")) from None
    raise explained(
        TimeoutError(
            f"the processes of the run do not meet at {address}:{port}, where another program may listen ({reason}); "
            "see MASTER_ADDR, and export another MASTER_PORT"
        )
    ) from None


def _wait_for_server(address: str, port: int, end: float) -> None:
    while True:
        try:
            socket.create_connection((address, port), timeout=max(end - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise explained(
                    TimeoutError(
                        f"nobody answers at {address}:{port} ({error.strerror or error}); see whether the first one "
                        "of these processes has started there, and MASTER_ADDR and MASTER_PORT"
                    )
                ) from None
        time.sleep(0.1)


def wait_for_all(store: Store, seconds: float | None = None) -> None:
    """Wait until every process of the run has come this far.

    Raises:
        TimeoutError: Some have not; the message has their ranks.
    """
    seconds = JOIN_SECONDS if seconds is None else seconds
    keys = {f"joined-{rank}": rank for rank in range(number("WORLD_SIZE", 1))}
    store.set(f"joined-{number('RANK', 0)}", "1")
    try:
        store.wait([*keys], timedelta(seconds=seconds))
    except RuntimeError:
        missing = [str(rank) for key, rank in keys.items() if not store.check([key])]
        raise explained(
            TimeoutError(
                f"{len(missing)} of {len(keys)} processes have not started within {seconds:g} s: "
                f"rank {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}; see what they say"
            )
        ) from None
