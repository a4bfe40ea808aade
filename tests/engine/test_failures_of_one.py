"""What goes wrong in one of several processes that torchrun has started: all end soon, and the cause is said first."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from injection import alive, launched
from torch.utils.data import DataLoader, Dataset
from toy import Net, dataset, loader, trainer

HERE = Path(__file__).parent
PATHS = [str(Path(engine.__file__).parents[1]), str(HERE)]
# Time to import torch in all processes, on a machine that is busy.
PATIENCE = 240
# In which all processes have to end once one has failed.
SOON = 20


def rank() -> int:
    return int(os.environ["RANK"])


class Fails(Net):
    """Fails in its second process, in one place."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.hparams.clear()
        self.fail("__init__")

    def fail(self, where: str) -> None:
        if self.what == where and rank() == 1:
            raise ZeroDivisionError(f"in {where}")

    def setup(self, stage: str) -> None:
        self.fail("setup")

    def configure_optimizers(self) -> Any:
        self.fail("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            self.fail("training_step")
            if self.what == "everywhere":
                raise ZeroDivisionError
            if self.what == "misconfigured" and rank() == 1:
                raise engine.MisconfigurationException("only this process has it")
            if self.what == "killed" and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "orphan":
            time.sleep(0.05)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.fail("validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.fail("on_train_end")

    def teardown(self, stage: str) -> None:
        if self.what == "training_step" and rank() == 1:
            # Others must not exit before, though they notice at once.
            time.sleep(1)


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if rank() == 1:
            raise ZeroDivisionError("in worker")
        return dataset(40)[index]


def train(what: str) -> None:
    saver = ModelCheckpoint("c", save_last=True, save_top_k=0)
    batches = DataLoader(Samples(), 2, num_workers=1) if what == "worker" else loader(80)
    run = trainer(max_epochs=2 if what != "orphan" else 1000, callbacks=saver, enable_checkpointing=True)
    print(f"process {os.getpid()}", flush=True)
    run.fit(Fails(what), batches, loader(8))


def end_of(what: str, processes: int = 2) -> str:
    """What a run printed that has to end soon after one process has failed, and with code 1."""
    child = launched(partial(train, what), processes)
    for number in range(processes):
        child.wait_for("process", number + 1)
    assert child.end(2 * SOON) == 1
    return child.err


def check_cause_first(err: str) -> None:
    first = next(line for line in err.splitlines() if "Traceback (most" in line)
    assert first.startswith("[rank1]: "), err
    # Those that only lost it say so in a line, if they are not ended before they can.
    assert not re.search(r"^\[rank[02-9]\]|Connection closed by peer", err, re.MULTILINE), err
    assert "ZeroDivisionError" in err and err.count("another process of this run has gone") <= 1
    # torchrun, too, names the one that has failed.
    cause = err.rpartition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", cause) and re.search(r"exitcode +: 1 ", cause), err


PLACES = ["__init__", "setup", "configure_optimizers", "training_step", "validation_step", "worker", "on_train_end"]


@pytest.mark.parametrize("where", PLACES)
def test_an_exception_of_one_process_ends_all_with_its_traceback_first(where: str) -> None:
    check_cause_first(end_of(where))


@pytest.mark.long
def test_an_exception_of_one_of_four_ends_all_with_its_traceback_first() -> None:
    check_cause_first(end_of("training_step", 4))


def test_an_exception_that_all_processes_have_is_printed_once() -> None:
    err = end_of("everywhere", 4)
    assert len(re.findall(r"^\[rank.\]: Traceback", err, re.MULTILINE)) == 1, err


def test_a_refusal_of_one_process_is_told_by_it() -> None:
    err = end_of("misconfigured")
    told = re.findall(r"^(.*): engine\S*MisconfigurationException: only this process has it$", err, re.MULTILINE)
    assert told == ["[rank1]"], err


def test_a_process_that_is_killed_ends_the_others() -> None:
    err = end_of("killed")
    assert "Signal 9 (SIGKILL)" in err and "[rank" not in err, err


def torchrun(what: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(HERE / "one_of_several.py"), what, *PATHS]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.long
def test_under_torchrun_itself_too_the_cause_comes_first() -> None:
    process = torchrun("training_step")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    check_cause_first(err)


@pytest.mark.long
def test_processes_that_have_lost_torchrun_save_and_end() -> None:
    process = torchrun("orphan")
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    saved = Path("c/last.ckpt")
    end = time.monotonic() + PATIENCE
    while not saved.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    before = torch.load(saved, weights_only=True)["global_step"]
    process.kill()
    process.wait()
    end = time.monotonic() + 2 * SOON
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    late = [pid for pid in pids if alive(pid)]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
    rest = process.stdout.read()
    assert not late, rest
    assert "torchrun has ended: stopped after" in rest and torch.load(saved, weights_only=True)["global_step"] > before
