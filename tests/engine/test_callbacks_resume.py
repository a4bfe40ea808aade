"""A run that goes on from any of its files ends with the same bits, and with callbacks in the same state."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch import nn
from toy import Memory, Net, fit, loader, same_bits, trainer


@pytest.fixture(autouse=True)
def without_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nobody pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Normed(Net):
    """With batch norm, dropout, a scheduler, and scores that get better and worse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))

    def on_validation_epoch_end(self) -> None:
        self.log("score", abs(5.0 - self.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


class AtEpochs(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx == 2 or epoch_idx is not None


def outcome(callback: Any, folder: str, ckpt_path: Path | None, **options: Any) -> Any:
    """Train four epochs of four batches, saving after each step and each validation; what there is in the end."""
    savers = [
        ModelCheckpoint(folder, "step-{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "val-{step}", "score", save_top_k=2, save_on_train_epoch_end=False, save_last=True),
    ]
    engine.seed_everything(3)
    model, logger = Normed(), Memory()
    options = {"max_epochs": 4, "log_every_n_steps": 1, "val_check_interval": 0.5, **options}
    run = trainer(callbacks=[callback, *savers], enable_checkpointing=True, logger=logger, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader(8, shuffle=True), loader(4), ckpt_path=ckpt_path)
    ranking = {Path(path).name: float(score) for path, score in savers[1].best_k_models.items()}
    state = (dict(model.state_dict()), run.global_step, callback.state_dict(), ranking, torch.rand(1))
    return state, logger.rows


CALLBACKS: dict[str, Callable[[], Any]] = {
    "swa": lambda: StochasticWeightAveraging(0.05, 2, annealing_epochs=2),
    "swa_linear": lambda: StochasticWeightAveraging([0.05], 0.75, annealing_strategy="linear", device=None),
    "ema": lambda: EMAWeightAveraging(decay=0.7, update_every_n_steps=3),
    "mean": lambda: AtEpochs(use_buffers=False),
    "stopping": lambda: EarlyStopping("score", patience=3),
    "accumulation": lambda: GradientAccumulationScheduler({1: 2, 2: 3}),
    "rates": LearningRateMonitor,
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_file_leads_to_the_same_end(name: str, tmp_path: Path) -> None:
    whole, rows = outcome(CALLBACKS[name](), "whole", None)
    # Those of validations are two of the best, and the last.
    found = sorted(Path("whole").glob("*.ckpt"))
    assert len(found) >= 8
    for file in found[:: 2 if name == "swa" else 4]:
        folder = file.stem
        shutil.copytree("whole", folder)
        resumed, rest = outcome(CALLBACKS[name](), folder, Path(folder, file.name))
        assert same_bits(resumed, whole), file
        assert rest == rows[len(rows) - len(rest) :]
        shutil.rmtree(folder)


def test_checkpoints_of_validations_go_on_behind_them() -> None:
    """Also those in which other callbacks have just decided to stop."""
    saver = ModelCheckpoint("c", "{step}", save_top_k=-1)
    stopping = EarlyStopping("score", patience=2)
    options = {"val_check_interval": 2, "max_epochs": 3, "enable_checkpointing": True}
    model = Normed()
    run = fit(model, None, loader(2), callbacks=[stopping, saver], **options)
    assert run.global_step == 8 and len(list(Path("c").glob("*.ckpt"))) == 4
    again, more = Normed(), EarlyStopping("score", patience=2)
    resumed = trainer(callbacks=[more, ModelCheckpoint("d")], **options)
    resumed.fit(again, loader(), loader(2), ckpt_path="c/step=6.ckpt")
    assert same_bits(dict(again.state_dict()), dict(model.state_dict()))
    assert more.state_dict() == stopping.state_dict() and again.count("val") == 1


def test_more_patience_lets_a_stopped_run_go_on() -> None:
    saver = ModelCheckpoint("c", save_last=True)
    options = {"val_check_interval": 2, "max_epochs": 9, "enable_checkpointing": True}
    fit(Normed(), None, loader(2), callbacks=[EarlyStopping("score", patience=2), saver], **options)
    run = trainer(callbacks=[EarlyStopping("score", patience=4), ModelCheckpoint("d")], **options)
    run.fit(Normed(), loader(), loader(2), ckpt_path="c/last.ckpt")
    assert run.global_step == 12


@pytest.mark.parametrize(
    "make", [lambda: StochasticWeightAveraging(0.05, 1), lambda: EMAWeightAveraging(decay=0.5)], ids=["swa", "ema"]
)
def test_a_run_that_was_killed_at_its_end_gives_the_average_all_the_same(make: Callable[[], Any]) -> None:
    class Killed(engine.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            raise SystemExit(9)

    options = {"max_epochs": 2, "enable_checkpointing": True}
    whole, killed, resumed = Normed(), Normed(), Normed()
    engine.seed_everything(3)
    fit(whole, callbacks=[make(), ModelCheckpoint("a")], **options)
    engine.seed_everything(3)
    with pytest.raises(SystemExit):
        fit(killed, callbacks=[Killed(), make(), ModelCheckpoint("b", "last-one")], **options)
    engine.seed_everything(3)
    again = trainer(callbacks=[make(), ModelCheckpoint("c")], **options)
    again.fit(resumed, loader(), ckpt_path="b/last-one.ckpt")
    assert same_bits(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert not same_bits(dict(killed.state_dict()), dict(whole.state_dict()))


def test_the_time_of_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 100.0

    def step(*args: Any) -> None:
        nonlocal seconds
        seconds += 2.0

    def run(ckpt_path: str | None, **options: Any) -> Timer:
        timer = Timer({"seconds": 13})
        clock = engine.callbacks.LambdaCallback(on_train_batch_start=step)
        saver = ModelCheckpoint("c", save_last=True)
        own = trainer(callbacks=[clock, timer, saver], enable_checkpointing=True, max_epochs=9, **options)
        with monkeypatch.context() as patched:
            patched.setattr("time.monotonic", lambda: seconds)
            own.fit(Net(), loader(), ckpt_path=ckpt_path)
        assert timer.time_elapsed() == 2.0 * own.global_step
        return timer

    run(None, max_steps=4)
    assert run("c/last.ckpt").time_remaining() == -1.0
    # Its time is up: not a step more.
    with pytest.warns(UserWarning, match="had stopped by itself"):
        assert run("c/last.ckpt").time_elapsed() == 14.0


def test_a_run_that_a_timer_has_stopped_goes_on_where_there_is_more_time() -> None:
    def run(seconds: int, ckpt_path: str | None = None) -> engine.Trainer:
        run = trainer(max_epochs=6, callbacks=Timer({"seconds": seconds}, interval="epoch"))
        run.fit(Net(), loader(), ckpt_path=ckpt_path)
        return run

    stopped = trainer(max_epochs=6, callbacks=Timer({"microseconds": 1}, interval="epoch"))
    stopped.fit(Net(), loader())
    stopped.save_checkpoint("timer.ckpt")
    assert (stopped.current_epoch, run(1000, "timer.ckpt").current_epoch) == (1, 6)


def test_a_timer_measures_a_second_run_anew() -> None:
    timer = Timer({"seconds": 1000})
    run = trainer(max_epochs=1, callbacks=timer)
    run.fit(Net(), loader())
    run.max_epochs = 2
    run.fit(Net(), loader())
    assert 0 <= timer.time_elapsed() < 100


def test_states_of_callbacks_that_a_run_lacks_are_told() -> None:
    fit(Net(), callbacks=Timer({"seconds": 1000})).save_checkpoint("with.ckpt")
    with pytest.warns(UserWarning, match="states of callbacks that this run lacks: Timer"):
        trainer(max_epochs=2).fit(Net(), loader(), ckpt_path="with.ckpt")
