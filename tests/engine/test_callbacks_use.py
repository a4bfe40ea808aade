"""Callbacks in use: what they leave alone, and what they show."""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import engine
import pytest
import torch
import torchmetrics
from engine.callbacks import (
    BasePredictionWriter,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from engine.callbacks.early_stopping import EarlyStoppingReason
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from toy import Memory, Net, Steps, dataset, fit, loader, same_bits, stream, trainer


class Everything(Net):
    """Has all that training changes: buffers, running statistics, dropout, a metric object, a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.error = torchmetrics.MeanAbsoluteError()
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        self.error(self(batch[0]), batch[1])
        self.log("error", self.error, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Later(LearningRateFinder):
    """Searches at the start of epochs, as fine-tuning does."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None: ...

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.lr_find(trainer, pl_module)


LOADERS: dict[str, Callable[[], Any]] = {
    "map": lambda: loader(16, shuffle=True),
    "stream": lambda: stream(16),
    "sampler": lambda: DataLoader(dataset(16), batch_size=2, sampler=type("Own", (RandomSampler,), {})(dataset(16))),
    "stateful": lambda: StatefulDataLoader(dataset(16), batch_size=2, shuffle=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_search_for_a_learning_rate_leaves_no_trace(kind: str, accumulate: int) -> None:
    def run(*callbacks: Any) -> Any:
        engine.seed_everything(3)
        model, logger = Everything(), Memory()
        options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "log_every_n_steps": 3}
        own = trainer(callbacks=[*callbacks], logger=logger, num_sanity_val_steps=1, **options)
        own.fit(model, LOADERS[kind](), loader(4))
        metrics = {name: float(value) for name, value in own.callback_metrics.items()}
        drawn = torch.rand(1).item(), random.random()
        state = dict(model.state_dict()), model.steps, own.optimizers[0].state_dict()["state"]
        return state, logger.rows, metrics, drawn, own.global_step, own.current_epoch

    without = run()
    for cls in (LearningRateFinder, Later):
        finder = cls(num_training_steps=11, update_attr=False, early_stop_threshold=None)
        assert same_bits(run(finder), without)
        assert finder.optimal_lr is not None and len(finder.optimal_lr.results["loss"]) == 11


def test_training_goes_on_with_the_rate_that_was_found() -> None:
    model = Net(lr=1e-7)
    finder = LearningRateFinder(min_lr=1e-4, num_training_steps=30, early_stop_threshold=None)
    fit(model, loader(64), callbacks=finder, max_steps=1)
    assert finder.optimal_lr is not None
    rate = finder.optimal_lr.suggestion()
    assert rate is not None and 1e-4 < rate < 1
    assert model.lr == model.hparams.lr == rate == model.trainer.optimizers[0].param_groups[0]["lr"]


def test_a_run_that_goes_on_keeps_the_rate_that_it_has() -> None:
    saver = ModelCheckpoint("c", save_last=True)
    finder = LearningRateFinder(min_lr=1e-4, num_training_steps=30, early_stop_threshold=None)
    first = fit(Net(), loader(64), callbacks=[finder, saver], enable_checkpointing=True)
    again = LearningRateFinder()
    run = trainer(callbacks=again, max_epochs=2)
    run.fit(Net(), loader(64), ckpt_path="c/last.ckpt")
    assert again.optimal_lr is None
    assert run.optimizers[0].param_groups[0]["lr"] == first.optimizers[0].param_groups[0]["lr"] != 0.1


def test_too_few_steps_suggest_nothing() -> None:
    model, finder = Net(), LearningRateFinder(num_training_steps=5)
    with pytest.warns(UserWarning, match="5 steps are too few to suggest a learning rate"):
        fit(model, callbacks=finder)
    assert model.lr == 0.1


def test_a_search_is_drawn_where_matplotlib_is(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None, update_attr=False)
    fit(Net(), loader(64), callbacks=finder)
    assert finder.optimal_lr is not None
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(engine.MisconfigurationException, match="plot needs matplotlib; run: pip install matplotlib"):
        finder.optimal_lr.plot()
    drawn: list[tuple[Any, ...]] = []
    figure = SimpleNamespace(
        plot=lambda *args, **options: drawn.append((*args, options)), set=lambda **options: drawn.append((options,))
    )
    figure.figure, shown = figure, []
    modules = {"subplots": lambda: (figure, figure), "show": lambda: shown.append(True)}
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(pyplot=SimpleNamespace(**modules)))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", SimpleNamespace(**modules))
    assert finder.optimal_lr.plot(suggest=True, show=True) is figure and shown
    results = finder.optimal_lr.results
    assert drawn[0] == (results["lr"], results["loss"], {}) and drawn[1][0]["xscale"] == "log"
    assert drawn[2][0] == [finder.optimal_lr.suggestion()]


def test_a_failing_search_leaves_the_weights_alone() -> None:
    def fail(model: Net, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise ValueError("broken")
        return model.loss(batch)

    model = Steps(fail)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="broken"):
        fit(model, callbacks=LearningRateFinder(update_attr=False))
    assert same_bits(dict(model.state_dict()), before)


def test_averaging_that_never_began_leaves_the_weights_alone() -> None:
    plain, averaged = Net(), Net()
    averaged.load_state_dict(plain.state_dict())
    fit(plain, max_epochs=2)
    fit(averaged, max_epochs=2, callbacks=StochasticWeightAveraging(0.05, 9))
    assert same_bits(dict(averaged.state_dict()), dict(plain.state_dict()))


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = Everything()
    frozen = model.net[1].eval()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    fit(model, max_epochs=2, callbacks=StochasticWeightAveraging(0.05, 1))
    assert same_bits(
        {n: v for n, v in frozen.state_dict().items() if "running" in n},
        {n: v for n, v in before.items() if "running" in n},
    )


def test_an_accumulation_that_was_scheduled_goes_on_within_an_epoch_and_ends_with_the_run() -> None:
    scheduler = GradientAccumulationScheduler({1: 2})
    run = fit(Net(), callbacks=scheduler, max_epochs=2)
    assert run.accumulate_grad_batches == 1 and run.global_step == 6
    assert [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(3)] == [1, 2, 2]


def test_early_stopping_tells_why(capsys: pytest.CaptureFixture[str]) -> None:
    stopping = EarlyStopping("train_loss", patience=1, min_delta=100.0, verbose=True)
    fit(Net(), callbacks=stopping, max_epochs=5)
    assert stopping.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    out = capsys.readouterr().out
    assert re.search(r"EarlyStopping: train_loss=\S+ is the best so far\n", out)
    assert re.search(r"EarlyStopping: train_loss has not been better than \S+ for 1 checks\n", out)


def test_a_name_that_is_never_logged_may_be_let_pass() -> None:
    run = fit(Net(), None, loader(2), callbacks=EarlyStopping("nothing", strict=False), max_epochs=3)
    assert run.current_epoch == 3
    with pytest.warns(UserWarning, match="EarlyStopping watches 'nothing', which was never logged; logged are: train"):
        fit(Net(), None, loader(2), callbacks=EarlyStopping("nothing", strict=False, verbose=True))


def test_a_timer_measures_every_stage_and_stops_at_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    timer = Timer(timedelta(microseconds=1))
    run = trainer(callbacks=timer, max_epochs=3)
    run.fit(Net(), loader(), loader(2))
    run.test(Net(), loader(2), verbose=False)
    assert run.global_step == 1 and "Timer: 0:00:00 have passed; training stops" in capsys.readouterr().out
    assert all(timer.end_time(stage) >= timer.start_time(stage) for stage in ("train", "validate", "test"))  # type: ignore[operator]
    assert timer.start_time("predict") is None and Timer().time_remaining() is None
    with pytest.raises(engine.MisconfigurationException, match="stage='fit'; give one of train, sanity_check, val"):
        timer.time_elapsed("fit")


def test_a_bar_of_ones_own_takes_the_place_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    class Bar(ProgressBar):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if self.is_enabled:
                self.print(f"{args[2] + 1} of {self.total_train_batches}", self.get_metrics(trainer, pl_module))

    bar = Bar()
    run = fit(Net(), callbacks=bar, enable_progress_bar=True, max_epochs=None, max_steps=3)
    assert run.progress_bar_callback is bar and run.callbacks == [bar] and bar.trainer is run
    assert capsys.readouterr().out == "1 of 2 {}\n2 of 1 {}\n3 of 0 {}\n"
    bar.disable()
    fit(Net(), callbacks=bar, enable_progress_bar=True)
    assert capsys.readouterr().out == ""


def test_values_to_show_are_the_bars_own_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    class Bar(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {**super().get_metrics(trainer, pl_module), "version": "a7", "half": 0.5}

    fit(Net(), callbacks=Bar(refresh_rate=2), enable_progress_bar=True)
    assert re.fullmatch(r"epoch 1/1   version a7   half 0\.5000   \d+\.\d s\n", capsys.readouterr().out)
    fit(Net(), callbacks=TQDMProgressBar(refresh_rate=0), enable_progress_bar=True)
    assert capsys.readouterr().out == ""


def test_a_bar_moves_every_so_many_batches_and_may_be_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    shown: list[int] = []

    class Bar(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            shown.append(trainer.global_step)
            return {}

    bar = Bar(refresh_rate=3, leave=True)
    bar._interval = 0.0
    monkeypatch.setattr("engine.callbacks.progress.SHARE", math.inf)
    fit(Net(), loader(16), callbacks=bar, enable_progress_bar=True)
    assert shown == [3, 6, 8]
    # What is left is drawn once more, with the end of a line.
    assert re.search(r"epoch 1/1.*6/8.*\n", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out))
    fit(Net(), callbacks=RichProgressBar(console_kwargs={"quiet": True}), enable_progress_bar=True)
    assert "epoch" not in capsys.readouterr().out


def test_a_summary_of_depth_0_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert RichModelSummary is ModelSummary
    fit(Net(), callbacks=ModelSummary(max_depth=0))
    assert capsys.readouterr().out == ""


def test_a_trial_run_needs_no_logger_and_searches_nothing() -> None:
    with pytest.warns(UserWarning, match="LearningRateFinder does nothing in a fast_dev_run"):
        fit(Net(), callbacks=[LearningRateMonitor(), LearningRateFinder()], fast_dev_run=True)


def test_indices_of_a_sampler_of_ones_own_are_not_known() -> None:
    calls: list[Any] = []

    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            calls.append(args[1])

        def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
            calls.append(batch_indices)

    own = DataLoader(dataset(4), batch_size=2, sampler=type("Own", (RandomSampler,), {})(dataset(4)))
    trainer(callbacks=Writer("batch_and_epoch")).predict(Net(), own)
    assert calls == [None, None, [[]]]
