"""Faults of numbers, memory, data and callbacks: what the error says, that everything is torn down, what is left."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import torch
from engine import checkpoint
from engine.callbacks import ModelCheckpoint
from injection import Apart, at, notes, time_limit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from toy import Memory, Net, Steps, dataset, loader, trainer, weights


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    with time_limit():
        yield


def fault(action: Callable[[], Any], kind: type[BaseException] = RuntimeError) -> BaseException:
    try:
        action()
    except kind as error:
        # Let go of the frames, which keep loaders and their workers alive.
        chain: BaseException | None = error
        while chain is not None:
            chain.__traceback__, chain = None, chain.__cause__ or chain.__context__
        return error
    raise AssertionError(f"no {kind.__name__}")


class Boom(Exception):
    pass


def boom(run: engine.Trainer) -> None:
    raise Boom("first")


# NaN and infinity


class Spoilt(Net):
    """Its loss is a given number at one batch (counted from 0 over all epochs)."""

    def __init__(self, value: float = float("nan"), when: int = 5) -> None:
        super().__init__()
        self.value, self.when = value, when

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.count("train") == self.when:
            loss = loss * self.value
        self.seen.append(("train", batch_idx))
        self.log("train_loss", loss)
        self.log("fine", 1.0)
        return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_loss_that_is_no_number_names_step_batch_epoch_and_values(value: float) -> None:
    error = fault(lambda: trainer(max_epochs=3, log_every_n_steps=1).fit(Spoilt(value), loader()), FloatingPointError)
    assert str(error).startswith(f"the loss is {value} at step 5 (batch 1 of epoch 1)")
    assert "train_loss_step" in str(error) or "train_loss" in str(error)
    assert "fine" not in str(error)
    assert all(word in notes(error) for word in ("lr", "gradient_clip_val", "detect_nonfinite warn"))


@pytest.mark.parametrize(("every", "last_step"), [(1, 6), (3, 6), (7, 7), (1000, 8)])
def test_it_is_found_at_the_next_log_step_or_the_end_of_the_epoch(every: int, last_step: int) -> None:
    run = trainer(max_epochs=3, log_every_n_steps=every)
    error = fault(lambda: run.fit(Spoilt(), loader()), FloatingPointError)
    assert "at step 5 (batch 1 of epoch 1)" in str(error) and run.global_step == last_step


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_spoilt_state_is_ever_saved_and_resuming_from_the_newest_is_exact(
    accumulate: int, asynchronous: bool
) -> None:
    def fit(folder: str, when: int, ckpt_path: str | None = None) -> Tensor:
        engine.seed_everything(4 if ckpt_path is None else 9)
        model = Spoilt(when=when)
        saver = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, save_last=True)
        options = {"max_epochs": 3, "log_every_n_steps": 1000, "accumulate_grad_batches": accumulate}
        run = trainer(callbacks=saver, enable_checkpointing=True, async_save=asynchronous, **options)
        run.fit(model, loader(16, shuffle=True), ckpt_path=ckpt_path)
        return weights(model)

    whole = fit("whole", 99)
    fault(lambda: fit("c", 10), FloatingPointError)
    files = {file: checkpoint.load(file) for file in Path("c").glob("*.ckpt")}
    assert max(loaded["global_step"] for loaded in files.values()) == 10 // accumulate
    for loaded in files.values():
        assert all(value.isfinite().all() for value in loaded["state_dict"].values())
    assert fit("c", 99, "auto").equal(whole)


@pytest.mark.parametrize("every", [1, 1000])
def test_weights_spoilt_by_a_gradient_under_a_finite_loss_are_not_saved_either(every: int) -> None:
    class Root(Net):
        """The slope of a root at zero is infinite, and times zero it is NaN; the loss itself is a number."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.seen.append(("train", batch_idx))
            return loss + (self.net(batch[0]) * 0).pow(2).sum().sqrt() if self.count("train") == 6 else loss

    saver = ModelCheckpoint("c", save_top_k=0, every_n_train_steps=1, save_last=True)
    run = trainer(callbacks=saver, enable_checkpointing=True, max_epochs=3, log_every_n_steps=every)
    fault(lambda: run.fit(Root(), loader()), FloatingPointError)
    for file in Path("c").glob("*.ckpt"):
        assert all(value.isfinite().all() for value in checkpoint.load(file)["state_dict"].values()), file


def test_warn_goes_on_and_off_says_nothing() -> None:
    with pytest.warns(UserWarning, match=r"the loss is nan at step 5 \(batch 1 of epoch 1\).*train_loss"):
        run = trainer(max_epochs=3, detect_nonfinite="warn", log_every_n_steps=1)
        run.fit(Spoilt(), loader())
    assert run.global_step == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(max_epochs=3, detect_nonfinite="off", log_every_n_steps=1)
        run.fit(Spoilt(), loader())
    assert run.global_step == 12


def test_another_choice_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="detect_nonfinite='ignore'; give raise, warn or off"):
        trainer(detect_nonfinite="ignore")


def test_a_large_but_finite_loss_and_a_nan_in_other_values_are_no_fault() -> None:
    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        module.log("other", float("nan"))
        loss: Tensor = module.loss(batch) * 1e-30 + 3e38
        return loss

    run = trainer(log_every_n_steps=1)
    run.fit(Steps(step), loader())
    assert run.global_step == 4


# Memory


def test_out_of_memory_on_the_device_names_batch_size_and_what_to_try() -> None:
    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    error = fault(lambda: trainer().fit(Steps(step), loader(batch_size=4)), torch.OutOfMemoryError)
    assert "out of memory at batch_size 4; try a smaller batch_size" in notes(error)
    assert all(word in notes(error) for word in ("accumulate_grad_batches", "bf16-mixed", "smaller net"))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_out_of_memory_in_evaluation_is_explained_too(stage: str) -> None:
    class Large(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.empty(2**60)

    error = fault(lambda: getattr(trainer(), stage)(Large(), loader(batch_size=4)))
    assert "out of memory at batch_size 4" in notes(error)


def test_before_the_first_batch_no_batch_size_is_made_up() -> None:
    class Large(Net):
        def configure_model(self) -> None:
            torch.empty(2**60)

    error = fault(lambda: trainer().fit(Large(), loader()))
    assert "out of memory" in notes(error) and "None" not in notes(error)


@pytest.mark.parametrize("what", ["torch", "numpy", "python"])
def test_memory_of_this_machine_that_runs_out_is_explained(what: str) -> None:
    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**26, resource.RLIM_INFINITY))
        size = 2**28
        {"torch": lambda: torch.ones(size), "numpy": lambda: np.ones(size), "python": lambda: bytearray(size)}[what]()
        raise AssertionError("there was enough")

    def work() -> None:
        try:
            trainer().fit(Steps(step), loader(batch_size=4))
        except Exception as error:
            print(type(error).__name__, "|", notes(error), flush=True)

    child = Apart(work)
    assert child.end() == 0, child.err
    assert "out of memory at batch_size 4" in child.out


# Workers


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def kill_one(run: engine.Trainer) -> None:
    os.kill(max(workers()), signal.SIGKILL)


class Slow(Dataset[Any]):
    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return dataset(200)[index]


@pytest.mark.parametrize("persistent", [False, True], ids=["", "persistent"])
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_a_worker_that_is_killed_ends_the_run_with_advice_and_the_last_checkpoint_stands(
    stage: str, persistent: bool
) -> None:
    def work() -> None:
        slow = DataLoader(Slow(), 2, num_workers=2, persistent_workers=persistent)
        train, val = (slow, None) if stage == "train" else (loader(), slow)
        saver = ModelCheckpoint("c", save_top_k=0, save_last=True, every_n_train_steps=2)
        # Of validation, when training of the epoch is over, and the file of that is there.
        kills = at(f"on_{stage}_batch_end", 5, kill_one)
        run = trainer(callbacks=[kills, saver], enable_checkpointing=True, logger=(logger := Memory()))
        try:
            run.fit(Net(), train, val)
        except (RuntimeError, EOFError, ConnectionError) as error:
            print(logger.status, error, notes(error), sep="|", flush=True)
            # torch reports dead workers from a signal handler: it must be done with that.
            for _ in range(20):
                time.sleep(0.02)
            print("quiet", flush=True)

    child = Apart(work)
    assert child.end(20) == 0, child.err
    # What torch says depends on where the kill finds it.
    assert child.out.startswith("['failed']|")
    assert "a process that reads data was killed" in child.out and "num_workers" in child.out
    assert "quiet" in child.out
    assert checkpoint.load(Path("c/last.ckpt"))["global_step"] >= 4


@pytest.mark.parametrize("stage", ["train", "validation"])
def test_no_worker_outlives_fit_even_while_its_error_is_kept(stage: str) -> None:
    slow = DataLoader(Slow(), 2, num_workers=2)
    train, val = (slow, None) if stage == "train" else (loader(), slow)
    with pytest.raises(Boom) as caught:
        trainer(callbacks=at(f"on_{stage}_batch_end", 2, boom)).fit(Net(), train, val)
    left = workers()
    caught.value.__traceback__ = None
    assert not left


# Samples


class Corrupt(Dataset[Any]):
    """Cannot read the sample with index 7."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise ValueError("broken picture\nsecond line")
        return dataset(12)[index]


class ByBatch(Corrupt):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Ragged(Dataset[Any]):
    """Sample 7 has another shape."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        x, y = dataset(12)[index]
        return (x[:2] if index == 7 else x), y


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "plain": (Corrupt, "sample 7 of Corrupt cannot be read: ValueError: broken picture"),
    "subset": (lambda: Subset(Corrupt(), [0, 7, 3, 5]), "sample 7 of Corrupt cannot be read: ValueError"),
    "subset of subset": (lambda: Subset(Subset(Corrupt(), range(5, 12)), [0, 1, 2, 4]), "sample 7 of Corrupt"),
    "by batch": (ByBatch, "sample 7 of ByBatch cannot be read: ValueError: broken picture"),
    "ragged": (Ragged, "of Ragged cannot be made a batch"),
}


@pytest.mark.parametrize("stage", ["train", "validation"])
@pytest.mark.parametrize("count", [0, 2], ids=["no workers", "2 workers"])
@pytest.mark.parametrize("kind", BAD)
def test_a_sample_that_cannot_be_read_is_named_by_its_index(kind: str, count: int, stage: str) -> None:
    make, text = BAD[kind]
    bad = DataLoader(make(), 4, num_workers=count, shuffle=stage == "train")
    train, val = (bad, None) if stage == "train" else (loader(), bad)
    error = fault(lambda: trainer().fit(Net(), train, val))
    assert text in str(error)
    assert kind != "ragged" or "7" in str(error).split(" of ")[0]
    assert kind == "ragged" or "test_faults.py, line" in str(error), "where it happened"
    assert error.explained  # type: ignore[attr-defined]  # so that main.py prints a line
    assert not workers()


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_in_a_stream_keeps_its_type(count: int) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield dataset()[0]
            raise ZeroDivisionError("in the stream")

    error = fault(lambda: trainer().fit(Net(), DataLoader(Stream(), 1, num_workers=count)), ZeroDivisionError)
    assert "in the stream" in str(error)
