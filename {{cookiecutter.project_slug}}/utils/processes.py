"""How many processes a command runs in, and what these agree on before the engine brings them together."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

import engine


def processes_to_start(arguments: Any) -> int:
    """How many processes this one has to start and watch; 0 where it does the work itself.

    Raises:
        MisconfigurationException: The machine has fewer GPUs, or a launcher was told another number of restarts.
    """
    devices, restarts = arguments.devices, arguments.max_restarts
    if restarts < 0:
        raise engine.MisconfigurationException(f"--max_restarts {restarts}; give a whole number from 0")
    if restarts and not hasattr(engine, "trainer"):
        raise engine.MisconfigurationException("--max_restarts needs the bundled engine; leave it out under Lightning")
    if restarts and arguments.fold == "all":
        raise engine.MisconfigurationException("--fold all begins anew each time; give --max_restarts to single folds")
    if "RANK" in os.environ:
        _check_launcher(restarts)
        return 0
    wanted = number_of(devices)
    # What makes no sense, and several machines: the Trainer says what to do.
    if wanted < 1 or arguments.num_nodes != 1 or (wanted == 1 and not restarts):
        return 0
    there = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    on_gpus = arguments.accelerator not in ("auto", "cpu") or (there and arguments.accelerator == "auto")
    if on_gpus and (wanted > max(there, 1) or max(_listed(devices), default=0) >= there > 0):
        raise engine.MisconfigurationException(
            f"--devices {devices}, but this machine has {there or 'no'} GPU{'s' * (there > 1)}; give "
            f"{'those that there are' if there else 'fewer'}, or --accelerator cpu"
        )
    return wanted


def launch(processes: int, max_restarts: int, script: str, words: Sequence[str]) -> dict[str, float]:
    """Run main.py in several processes and wait for them: `utils.launch.launch`."""
    # Late: it imports for a third of a second what most commands do without.
    from utils.launch import launch

    return launch(processes, max_restarts, script, words)


def _check_launcher(restarts: int) -> None:
    """Refuse a number of restarts that the launcher of this process does not know of."""
    told = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts and str(restarts) != told:
        raise engine.MisconfigurationException(
            f"--max_restarts {restarts}, but the launcher of this process has {told}; give the number to it: "
            f"torchrun --max-restarts {restarts} ... -- main.py ..."
        )


def number_of(devices: Any) -> int:
    """How many processes `--devices` asks for on a machine; 0 where it makes no sense."""
    if listed := _listed(devices):
        return len(listed)
    if devices == "auto":
        return 1
    number = int(devices) if str(devices).lstrip("-").isdigit() else 0
    return (torch.cuda.device_count() or 1) if number == -1 else max(number, 0)


def _listed(devices: Any) -> list[int]:
    """The GPUs that are listed, as in [0, 1] or "0,1"; empty if none are."""
    parts = devices.split(",") if isinstance(devices, str) and "," in devices else devices
    return [int(part) for part in parts if str(part).strip().isdigit()] if isinstance(parts, list) else []


def fitting_here(saved: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The arguments of a saved run, without its number of processes where this start has another.

    Under a launcher there is a number already, and `predict` and `export` run in one process.
    """
    alone = command in ("predict", "export")
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    left_out = {"num_nodes"} if saved.get("num_nodes") != world // local else set()
    if (alone or "RANK" in os.environ) and number_of(saved.get("devices", "auto")) != local:
        left_out |= {"devices"}
    if alone:
        left_out |= {"strategy"}
    return {name: value for name, value in saved.items() if name not in left_out}


def is_first() -> bool:
    """Whether this is the process that talks and writes."""
    return os.environ.get("RANK", "0") == "0"


def share_of_samples() -> tuple[int, int]:
    """Which samples of a set this process judges: those from which number on, and every how manieth."""
    if hasattr(engine, "trainer"):
        return engine.distributed.data_rank(), engine.distributed.data_world_size()
    # Lightning goes by the name of engine.
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def ask_first(topic: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of the process of rank 0, by the store at which the processes of a run meet.

    Args:
        topic: Name of the question, which is asked once.
        ask: Called by the first process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return dict(ask())
    # Under Lightning, which goes by the name of engine, there is only torch's own.
    store = engine.rendezvous.meet() if hasattr(engine, "rendezvous") else next(rendezvous("env://"))[0]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        store.set(topic, json.dumps(ask()))
    answer = dict(json.loads(store.get(topic)))
    store.add(f"{topic}, read", 1)
    # The store may end with the first process: it waits until all have read.
    while rank == 0 and store.add(f"{topic}, read", 0) < world:
        time.sleep(0.01)
    return answer


def launch_id() -> str | None:
    """What tells the launcher of this process from others, if it starts processes again; None otherwise."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{platform.node()} {os.getppid()}" if name == "none" else name


def is_restart() -> bool:
    """Whether the launcher has started this run before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
