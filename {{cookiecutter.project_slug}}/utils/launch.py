"""`python main.py --devices 2`: main.py starts itself again in several processes of this machine.

torch's own elastic agent does the work, as under torchrun. What is added to it: exit codes are those of the processes,
signals reach all of them and leave them the time to save, and only what another start may mend is started again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

# Passed on, where the system knows them and this process does not ignore them (as it does SIGHUP under nohup).
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1")
# Seconds to finish the step and save. Whoever is in a hurry, a scheduler or a second Ctrl-C, ends it earlier.
GRACE, HURRY = 3600, 30
# Codes of wrong input and of being asked to end, as shells count and as Python does: another start mends nothing.
FINAL = {2, 130, 143, -signal.SIGINT, -signal.SIGTERM}


class Agent(LocalElasticAgent):
    """Starts the processes, watches them, and starts all again after one has failed."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            # Others fail after the first, which is named first.
            rank, failure = next(iter(result.failures.items()))
            most, left = worker_group.spec.max_restarts, self._remaining_restarts
            if failure.exitcode in FINAL:
                self._remaining_restarts = 0
            else:
                tell(rank, failure.exitcode, most, left)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = HURRY) -> None:
        while True:
            try:
                return super()._shutdown(death_sig, timeout)
            except SignalException as another:
                death_sig, timeout = another.sigval, HURRY


def tell(rank: int, code: int, most: int, left: int) -> None:
    """Say what the processes cannot: how one was killed, and whether all start again."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = " (mostly because memory ran out)" if code == -getattr(signal, "SIGKILL", 9) else ""
    if left:
        print(f"process {rank} {how}{hint}; all start again, restart {most - left + 1} of {most}", file=sys.stderr)
    elif most or code < 0:
        after = f", after {most} restart{'s' * (most > 1)}" if most else ""
        print(
            f"error: process {rank} {how}{hint}{after}; where a checkpoint was saved, --ckpt_path auto goes on",
            file=sys.stderr,
        )


def launch(processes: int, max_restarts: int, script: str, words: Sequence[str]) -> dict[str, float]:
    """Run a script in several processes at once, and wait for them.

    Args:
        processes: How many.
        max_restarts: How often all start again after one has failed.
        script: Path of main.py.
        words: Of its command line.

    Returns:
        Nothing: the metrics are with the processes.

    Raises:
        SystemExit: They did not all end well; with the code of the first that did not.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    heeded = [name for name in SIGNALS if hasattr(signal, name)]
    heeded = [name for name in heeded if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(heeded)
    # A free port, and a name that no other launch has: as torchrun --standalone.
    where = {"backend": "c10d", "endpoint": "localhost:0", "run_id": uuid.uuid4().hex, "local_addr": "localhost"}
    handler = get_rendezvous_handler(RendezvousParameters(**where, min_nodes=1, max_nodes=1))
    spec = WorkerSpec(
        role="main",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-u", script, *words),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr="localhost",
    )
    # The processes have printed what there is to say.
    logging.disable(logging.CRITICAL)
    before = {name: signal.getsignal(getattr(signal, name)) for name in heeded}
    try:
        result = Agent(spec, DefaultLogsSpecs(log_dir=os.devnull), shutdown_timeout=GRACE).run()
    except SignalException as stop:
        raise SystemExit(130 if stop.sigval == signal.SIGINT else 143) from None
    finally:
        handler.shutdown()
        logging.disable(logging.NOTSET)
        # The agent leaves its own behind, which a notebook would keep.
        for name, own in before.items():
            signal.signal(getattr(signal, name), own or signal.SIG_DFL)
    if result.is_failed():
        code = next(iter(result.failures.values())).exitcode
        raise SystemExit(128 - code if code < 0 else code)
    return {}
