"""Signals that one of several processes sees: all stop at the same step, save once, and end with the same code."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from injection import Apart, at, launched, two_processes
from torch.utils.data import DataLoader
from toy import Net, dataset, loader, same_bits, trainer

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


class Uneven(Net):
    """Has a different number of validation batches in each process, and notes what it has done."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.log("samples", float(len(batch[0])), reduce_fx="sum", sync_dist=True)


def train(name: str, act: Any = None, ckpt_path: Any = None) -> None:
    """Three epochs of 6 batches for each of two processes, and 4 and 3 batches to validate on."""
    engine.seed_everything(3 if ckpt_path is None else 99)
    saver = ModelCheckpoint(f"{name}/c", save_last=True)
    own = [act or at("setup", 0, print), saver]
    run = trainer(max_epochs=3, callbacks=own, enable_checkpointing=True, num_sanity_val_steps=2)
    try:
        run.fit(Uneven(), loader(24, shuffle=True), loader(14), ckpt_path=ckpt_path)
    finally:
        print(f"{run.global_step} steps", flush=True)
    run.save_checkpoint(f"{name}/end.ckpt")


def interrupted(sender: int, number: int, hook: str, when: int) -> list[Apart]:
    """Two processes, one of which gets a signal."""
    action = partial(signal.raise_signal, number)
    return two_processes(lambda rank: train("run", at(hook, when if rank == sender else 0, lambda run: action())))


MOMENTS = [
    ("setup", 1),
    ("on_train_batch_start", 2),
    ("on_train_batch_end", 6),
    ("on_validation_start", 1),
    ("on_validation_batch_start", 2),
    ("on_validation_batch_end", 7),
    ("on_save_checkpoint", 2),
    ("on_train_epoch_end", 2),
    ("on_train_batch_start", 18),
    ("on_validation_batch_end", 9),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is saved at the end of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    for child in two_processes(lambda rank: train("whole")):
        assert child.end() == 0, child.err
    os.chdir(before)
    return torch.load(folder / "whole/end.ckpt", weights_only=True)


@pytest.mark.parametrize("sender", [0, 1])
@pytest.mark.parametrize(("hook", "when"), MOMENTS)
def test_a_signal_to_one_process_stops_both_and_no_bit_changes(sender: int, hook: str, when: int, whole: Any) -> None:
    number, code = [(TERM, 143), (USR1, 143), (INT, 130)][(when + sender) % 3]
    children = interrupted(sender, number, hook, when)
    assert [child.end() for child in children] == [code, code], [child.err for child in children]
    out = [child.out for child in children]
    assert [text.count("stopped after") for text in out] == [1, 0]
    steps = {re.findall(r"^(\d+) steps", text, re.MULTILINE)[0] for text in out}
    assert len(steps) == 1 and f"stopped after {steps.pop()} steps" in out[0]
    for child in two_processes(lambda rank: train("run", ckpt_path="run/c/last.ckpt")):
        assert child.end() == 0, child.err
    end = torch.load("run/end.ckpt", weights_only=True)
    assert same_bits(whole["state_dict"], end["state_dict"]) and same_bits(whole["state"], end["state"])


LATE = ["on_train_end", "on_fit_end", "teardown"]


@pytest.mark.parametrize("hook", LATE)
def test_a_signal_after_the_last_step_ends_both_with_its_code(hook: str) -> None:
    children = interrupted(1, TERM, hook, 1)
    assert [child.end() for child in children] == [143, 143], [child.err for child in children]


def test_a_long_validation_is_broken_off_at_the_same_batch_of_all() -> None:
    class Slow(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            time.sleep(0.05)
            print(f"validated {batch_idx}", flush=True)
            if batch_idx == 3 and self.global_rank == 1:
                signal.raise_signal(TERM)

    def work(rank: int) -> None:
        saver = ModelCheckpoint("c", save_last=True)
        # Short steps, so that processes seldom agree, come before long ones.
        trainer(callbacks=saver, enable_checkpointing=True).fit(Slow(), loader(400), DataLoader(dataset(401), 2))

    children = two_processes(work)
    assert [child.end() for child in children] == [143, 143], [child.err for child in children]
    done = [child.out.count("validated") for child in children]
    assert done[0] == done[1] and 4 <= done[0] < 40
    assert torch.load("c/last.ckpt", weights_only=True)["global_step"] == 100


def test_a_second_ctrl_c_ends_one_process_at_once_and_the_other_soon() -> None:
    class Waits(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 and self.global_rank == 1:
                print("waiting", flush=True)
                time.sleep(50)
            return super().training_step(batch, batch_idx)

    children = two_processes(lambda rank: trainer().fit(Waits(), loader(40)))
    children[1].wait_for("waiting")
    children[1].send(INT)
    time.sleep(0.3)
    assert children[1].process.is_alive()
    children[1].send(INT)
    assert children[1].end(10) == 130
    assert children[0].end(20) == 1


@pytest.mark.parametrize("number", [TERM, INT])
def test_what_torchrun_hands_on_saves_once_and_every_process_ends_by_itself(number: int) -> None:
    def work() -> None:
        tell = at("on_train_batch_end", 3, lambda run: print(f"process {os.getpid()}", flush=True))
        saver = ModelCheckpoint("c", save_last=True, save_top_k=0)
        try:
            trainer(max_epochs=10**6, callbacks=[tell, saver], enable_checkpointing=True).fit(Net(), loader(400))
        except (SystemExit, KeyboardInterrupt) as end:
            # Longer than torchrun waits between two looks at its processes.
            time.sleep(0.5 * int(os.environ["RANK"]))
            print(f"ended by {type(end).__name__}", flush=True)
            raise

    child = launched(work, 2)
    child.wait_for("process", 2)
    child.send(number)
    child.end()
    assert child.out.count("stopped after") == 1
    assert child.out.count(f"ended by {'SystemExit' if number == TERM else 'KeyboardInterrupt'}") == 2, child.err
    assert Path("c/last.ckpt").is_file()
