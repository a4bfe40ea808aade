"""Callbacks run on this engine and on Lightning: same rates, averages, files, stops and calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import QUIET, fitted, memory, net, on_both, state_of
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from toy import loader, same_bits


def groups(module: Any) -> Any:
    optimizer = Adam([{"params": [module.net.weight]}, {"params": [module.net.bias], "name": "b"}], lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}}


def named(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "name": "mine"}]


def by_epoch(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.1)
    return [optimizer], [StepLR(optimizer, 1, 0.9)]


@pytest.mark.parametrize("interval", [None, "step", "epoch"])
@pytest.mark.parametrize("optimizers", [groups, named, lambda module: SGD(module.parameters(), lr=0.1)])
def test_learning_rates_are_logged_alike(optimizers: Callable[[Any], Any], interval: Any, tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        logger, monitor = memory(pl), pl.callbacks.LearningRateMonitor(interval, True, True)
        module = net(pl)(optimizers=optimizers)
        trainer = fitted(pl, module, monitor, logger=logger, log_every_n_steps=2)
        rates = {name: float(value) for name, value in trainer.callback_metrics.items() if "loss" not in name}
        rows = [(step, row) for step, row in logger.rows if not any("loss" in name for name in row)]
        return rows, rates, monitor.lrs, monitor.last_momentum_values, monitor.last_weight_decay_values

    ours, theirs = on_both(program, tmp_path)
    assert ours == theirs and ours[0] and ours[1]


def test_several_optimizers_have_rates_of_their_own(tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        class Manual(net(pl)):  # type: ignore[misc]
            automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

        logger, monitor = memory(pl), pl.callbacks.LearningRateMonitor()
        module = Manual(optimizers=lambda m: [SGD([m.net.weight], lr=0.1), SGD([m.net.bias], lr=0.2)])
        trainer = fitted(pl, module, monitor, logger=logger, log_every_n_steps=1)
        return [row for row in logger.rows if "epoch" not in row[1]], monitor.lrs, trainer.global_step

    ours, theirs = on_both(program, tmp_path)
    assert ours == theirs and list(ours[1]) == ["lr-SGD", "lr-SGD-1"]


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def plain() -> nn.Module:
    return nn.Linear(3, 1)


class Watch:
    """Makes a callback that notes the learning rate of batches, and the weights that validation sees."""

    def __init__(self, pl: Any) -> None:
        self.rates: list[float] = []
        self.judged: list[Any] = []
        watch = self

        class Watcher(pl.Callback):  # type: ignore[misc]
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                watch.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

            def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                watch.judged.append(state_of(pl_module))

        self.callback = Watcher()


@pytest.mark.parametrize("layers", [plain, normed])
@pytest.mark.parametrize("optimizers", [by_epoch, lambda module: SGD(module.parameters(), lr=0.1)])
@pytest.mark.parametrize(
    "options",
    [
        {"swa_lrs": 0.05, "swa_epoch_start": 0.4},
        {
            "swa_lrs": [0.05],
            "swa_epoch_start": 2,
            "annealing_epochs": 2,
            "annealing_strategy": "linear",
            "device": None,
        },
        {"swa_lrs": 0.05, "swa_epoch_start": 0.0, "avg_fn": lambda average, newest, number: (average + newest) / 2},
    ],
)
def test_stochastic_weight_averaging_ends_with_the_same_bits(
    options: dict[str, Any], optimizers: Callable[[Any], Any], layers: Callable[[], nn.Module], tmp_path: Path
) -> None:
    def program(pl: Any) -> Any:
        watch, module = Watch(pl), net(pl)(layers, optimizers)
        fitted(pl, module, [pl.callbacks.StochasticWeightAveraging(**options), watch.callback], max_epochs=5)
        # Lightning takes the statistics of batch norms in a sixth epoch.
        return state_of(module), watch.rates[:20], watch.judged[:5]

    ours, theirs = on_both(program, tmp_path)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("layers", [plain, normed])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("EMAWeightAveraging", {"decay": 0.7}),
        ("EMAWeightAveraging", {"decay": 0.7, "update_every_n_steps": 3, "use_buffers": False}),
        ("EMAWeightAveraging", {"decay": 0.7, "update_starting_at_step": 5, "device": "cpu"}),
        ("EMAWeightAveraging", {"decay": 0.7, "update_every_n_steps": 0, "update_starting_at_epoch": 1}),
        ("EMAWeightAveraging", {"decay": 0.7, "update_every_n_steps": 2, "update_starting_at_epoch": 1}),
        ("WeightAveraging", {}),
        ("WeightAveraging", {"avg_fn": lambda average, newest, n: average + (newest - average) / (n + 2)}),
        ("WeightAveraging", {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), "use_buffers": False}),
    ],
)
def test_averages_of_weights_are_those_of_lightning(
    kind: str, options: dict[str, Any], layers: Callable[[], nn.Module], tmp_path: Path
) -> None:
    def program(pl: Any) -> Any:
        watch, module = Watch(pl), net(pl)(layers)
        fitted(pl, module, [getattr(pl.callbacks, kind)(**options), watch.callback], max_epochs=3)
        return [*watch.judged, state_of(module)]

    ours, theirs = on_both(program, tmp_path)
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        # Lightning averages whole numbers, too, and cuts off their fractions.
        floating = [name for name in mine if mine[name].is_floating_point()]
        torch.testing.assert_close([mine[n] for n in floating], [other[n] for n in floating], rtol=1e-6, atol=1e-7)


def test_should_update_decides_when_to_average(tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        asked: list[tuple[int | None, int | None]] = []

        class Chosen(pl.callbacks.WeightAveraging):  # type: ignore[misc]
            def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
                asked.append((step_idx, epoch_idx))
                return step_idx in (2, 5) or epoch_idx == 1

        module = net(pl)()
        fitted(pl, module, Chosen(), max_epochs=3, accumulate_grad_batches=2)
        return asked, state_of(module)

    ours, theirs = on_both(program, tmp_path)
    assert ours[0] == theirs[0]
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_training_steps": 15, "max_lr": 0.5, "early_stop_threshold": None},
        {"mode": "linear", "num_training_steps": 30, "min_lr": 1e-3, "early_stop_threshold": 8.0},
        {"max_lr": 1e4, "early_stop_threshold": 20.0},
        {"update_attr": False},
        {"attr_name": "lr", "num_training_steps": 20, "early_stop_threshold": None},
    ],
    ids=str,
)
def test_the_learning_rate_finder_finds_what_lightning_finds(options: dict[str, Any], tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        finder, module, logger = pl.callbacks.LearningRateFinder(**options), net(pl)(), memory(pl)
        trainer = fitted(pl, module, finder, 64, max_epochs=4, logger=logger, log_every_n_steps=7)
        found = finder.optimal_lr
        rows = [(step, sorted(row)) for step, row in logger.rows]
        return found.results, found.suggestion(), module.lr, state_of(module), rows, trainer.global_step

    ours, theirs = on_both(program, tmp_path)
    assert ours[0] == theirs[0] and len(ours[0]["lr"]) > 3
    assert same_bits(ours[1:], theirs[1:])


@pytest.mark.parametrize("scheduling", [{1: 2}, {0: 2, 2: 4}, {0: 1}])
def test_accumulation_follows_its_schedule(scheduling: dict[int, int], tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        scheduler, module = pl.callbacks.GradientAccumulationScheduler(dict(scheduling)), net(pl)()
        trainer = fitted(pl, module, scheduler, max_epochs=4)
        return trainer.global_step, state_of(module), scheduler.going_to_accumulate_grad_batches()

    ours, theirs = on_both(program, tmp_path)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_predictions_are_handed_over_alike(interval: str, loaders: int, tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        calls: list[Any] = []

        class Writer(pl.callbacks.BasePredictionWriter):  # type: ignore[misc]
            def write_on_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                prediction, indices, batch, batch_idx, dataloader_idx = args
                calls.append(("batch", prediction.tolist(), indices, len(batch), batch_idx, dataloader_idx))

            def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
                flat = predictions if loaders == 1 else [p for batches in predictions for p in batches]
                calls.append(("epoch", [p.tolist() for p in flat], batch_indices))

        trainer = pl.Trainer(**QUIET, callbacks=Writer(interval))
        given = [loader(5), loader(4)][:loaders]
        returned = trainer.predict(net(pl)(), given[0] if loaders == 1 else given, return_predictions=False)
        return calls, returned

    ours, theirs = on_both(program, tmp_path)
    assert ours == theirs
    assert {kind for kind, *_ in ours[0]} == set(interval.split("_and_"))


def test_functions_are_called_as_hooks(tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        calls: list[str] = []
        hooks = ["setup", "on_fit_start", "on_train_batch_end", "on_validation_epoch_end", "on_train_end", "teardown"]
        functions = {name: lambda *args, name=name, **kwargs: calls.append(name) for name in hooks}
        fitted(pl, net(pl)(), pl.callbacks.LambdaCallback(**functions, on_fit_end=None))
        return calls

    ours, theirs = on_both(program, tmp_path)
    assert ours == theirs and len(set(ours)) == 6


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_timer_stops_where_lightnings_does(interval: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(pl: Any) -> Any:
        timer = pl.callbacks.Timer({"seconds": 10}, interval=interval, verbose=False)
        seconds = 0.0

        def step(*args: Any) -> None:
            nonlocal seconds
            seconds += 1.5

        with monkeypatch.context() as patched:
            patched.setattr("time.monotonic", lambda: seconds)
            clock = pl.callbacks.LambdaCallback(on_train_batch_start=step)
            trainer = fitted(pl, net(pl)(), [clock, timer], max_epochs=9)
            times = [timer.time_elapsed(), timer.time_remaining(), timer.start_time(), timer.end_time("validate")]
        return trainer.global_step, trainer.current_epoch, times, timer.state_dict()["time_elapsed"]["train"]

    ours, theirs = on_both(program, tmp_path)
    assert ours == theirs
    assert ours[0] == (7 if interval == "step" else 8)


VALIDATING: list[dict[str, Any]] = [
    {},
    {"val_check_interval": 0.5},
    {"val_check_interval": 3},
    {"val_check_interval": 3, "check_val_every_n_epoch": None},
    {"check_val_every_n_epoch": 2},
    {"val_check_interval": 2, "check_val_every_n_epoch": 2},
]


@pytest.mark.parametrize("validating", VALIDATING, ids=str)
@pytest.mark.parametrize("options", [{}, {"check_on_train_epoch_end": False}, {"patience": 0}], ids=str)
def test_training_stops_when_lightnings_does(
    options: dict[str, Any], validating: dict[str, Any], tmp_path: Path
) -> None:
    def program(pl: Any) -> Any:
        stopping = pl.callbacks.EarlyStopping("score", **{"patience": 2, **options})
        module = net(pl)(scores=[3.0, 2.0, 2.5, 1.0, *[1.5] * 30])
        trainer = fitted(pl, module, stopping, max_epochs=14, **validating)
        reason = stopping.stopping_reason
        return trainer.global_step, stopping.wait_count, stopping.stopped_epoch, stopping.best_score, reason.value

    ours, theirs = on_both(program, tmp_path)
    assert same_bits(ours, theirs) and ours[-1] == 3
