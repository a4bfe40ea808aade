"""Fit: hooks, logs and weights for the arguments of the Trainer, and for the ways to give data."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deviations
import parts
import pytest
import pytorch_lightning
from harness import Side

Same = Callable[..., None]


def fit(side: Side, *, train: int = 4, val: tuple[int, ...] = (2,), **options: Any) -> Any:
    """Fit a recorded net on loaders; several validation loaders are given as a list."""
    trainer = side.trainer(**options)
    cls = parts.several if len(val) > 1 else parts.net
    given = parts.loaders(val) if len(val) > 1 else parts.loader(val[0], first=50) if val else None
    trainer.fit(side.module(cls), parts.loader(train), given)
    return trainer


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_validation": {"val": ()},
    "three_validation_loaders": {"val": (2, 1, 3)},
    "no_logger": {"logger": False},
    "accumulate_full": {"accumulate_grad_batches": 2},
    "accumulate_more_than_epoch": {"accumulate_grad_batches": 4, "train": 4},
    "accumulate_and_log_every_2": {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "train": 8},
    "clip_norm": {"gradient_clip_val": 0.1},
    "clip_norm_named": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
    "clip_value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "interval_1": {"val_check_interval": 1},
    "interval_2": {"val_check_interval": 2},
    "interval_3": {"val_check_interval": 3},
    "interval_4": {"val_check_interval": 4},
    "interval_half": {"val_check_interval": 0.5},
    "interval_third": {"val_check_interval": 0.3, "train": 8},
    "interval_tiny": {"val_check_interval": 0.01},
    "interval_over_epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": 3},
    "interval_longer_than_epoch": {"val_check_interval": 9, "check_val_every_n_epoch": None, "max_epochs": 3},
    "interval_and_every_2": {"val_check_interval": 2, "check_val_every_n_epoch": 2},
    "interval_and_accumulate": {"val_check_interval": 2, "accumulate_grad_batches": 2},
    "interval_short_time": {"val_check_interval": timedelta(microseconds=1), "train": 2},
    "interval_long_time": {"val_check_interval": "00:01:00:00"},
    "interval_time_over_epochs": {"val_check_interval": {"hours": 1}, "check_val_every_n_epoch": None},
    "every_2_epochs": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "every_3_epochs": {"check_val_every_n_epoch": 3, "max_epochs": 4},
    "sanity_0": {"num_sanity_val_steps": 0},
    "sanity_1": {"num_sanity_val_steps": 1, "val": (3,)},
    "sanity_all": {"num_sanity_val_steps": -1, "val": (3,)},
    "sanity_1_of_several": {"num_sanity_val_steps": 1, "val": (3, 2)},
    "limit_train_2": {"limit_train_batches": 2},
    "limit_train_half": {"limit_train_batches": 0.5},
    "limit_train_more_than_there_are": {"limit_train_batches": 100},
    "limit_train_0": {"limit_train_batches": 0},
    "limit_val_1": {"limit_val_batches": 1},
    "limit_val_half": {"limit_val_batches": 0.5, "val": (4, 2)},
    "limit_val_0": {"limit_val_batches": 0},
    "limit_val_0.0": {"limit_val_batches": 0.0},
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run_2": {"fast_dev_run": 2, "accumulate_grad_batches": 1},
    "overfit_1": {"overfit_batches": 1},
    "overfit_half": {"overfit_batches": 0.5},
    "max_steps_end_of_epoch": {"max_steps": 4, "max_epochs": -1},
    "max_steps_0": {"max_steps": 0},
    "max_epochs_0": {"max_epochs": 0},
    "max_time_long": {"max_time": "00:01:00:00"},
    "deterministic": {"deterministic": True},
    "detect_anomaly": {"detect_anomaly": True},
    "profiler": {"profiler": "simple"},
    "double": {"precision": "64-true"},
    "bfloat": {"precision": "bf16-true"},
    "autocast": {"precision": "bf16-mixed"},
    "precision_32": {"precision": 32},
    "barebones": {"barebones": True, "logger": None, "callbacks": None, "log_every_n_steps": None},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_the_trainer(same: Same, name: str) -> None:
    same(lambda side: fit(side, **ARGUMENTS[name]))


@pytest.mark.parametrize("options", [{"log_every_n_steps": 3, "train": 5}, {"log_every_n_steps": 50}], ids=str)
def test_numbers_are_read_on_log_steps(same: Same, options: dict[str, Any]) -> None:
    same(lambda side: fit(side, **options), deviations.NUMBERS_ON_LOG_STEPS)


def test_states_are_kept_before_a_validation(same: Same) -> None:
    same(fit, deviations.STATE_BEFORE_VALIDATION)


def test_a_partial_window_is_divided_by_its_own_length(same: Same) -> None:
    same(lambda side: fit(side, train=5, accumulate_grad_batches=3), deviations.PARTIAL_WINDOW)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 6, "max_epochs": -1},
        {"max_steps": 5, "max_epochs": None},
        {"max_steps": 3, "accumulate_grad_batches": 2, "max_epochs": -1},
    ],
    ids=str,
)
def test_max_steps_mid_epoch(same: Same, options: dict[str, Any]) -> None:
    same(lambda side: fit(side, val=(), **options), deviations.WITHIN_EPOCH)


def test_max_steps_mid_epoch_validates(same: Same) -> None:
    program = lambda side: fit(side, max_steps=2, max_epochs=-1, num_sanity_val_steps=0)  # noqa: E731
    same(program, deviations.FINAL_VALIDATION, deviations.WITHIN_EPOCH)


def test_validation_sets_by_name(same: Same) -> None:
    def program(side: Side) -> None:
        sets = dict(zip(("day", "night"), parts.loaders((2, 3)), strict=True))
        side.trainer().fit(side.module(parts.several), parts.loader(4), sets)

    same(program, deviations.NAMED_SETS)


def test_data_module(same: Same) -> None:
    same(lambda side: side.trainer().fit(side.module(), datamodule=side.datamodule()))


def test_data_module_in_place_of_loaders(same: Same) -> None:
    same(lambda side: side.trainer().fit(side.module(), side.datamodule()))


@pytest.mark.parametrize("every", [1, 2])
def test_loaders_are_requested_anew(same: Same, every: int) -> None:
    def program(side: Side) -> None:
        options = {"reload_dataloaders_every_n_epochs": every, "max_epochs": 4, "num_sanity_val_steps": 1}
        side.trainer(**options).fit(side.module(), datamodule=side.datamodule())

    same(program)


def with_loaders(pl: Any) -> type:
    class WithLoaders(parts.net(pl)):  # type: ignore[misc]
        def prepare_data(self) -> None:
            pass

        def train_dataloader(self) -> Any:
            return parts.loader(3)

        def val_dataloader(self) -> Any:
            return parts.loader(2, first=40)

        test_dataloader = predict_dataloader = val_dataloader

    return WithLoaders


def test_loaders_of_the_module(same: Same) -> None:
    def program(side: Side) -> None:
        trainer, module = side.trainer(), side.module(with_loaders)
        trainer.fit(module)
        for stage in ("validate", "test"):
            side.observe(stage, getattr(trainer, stage)(module, verbose=False))
        side.observe("predict", trainer.predict(module))

    same(program)


def test_loaders_given_to_fit_go_before_those_of_the_module(same: Same) -> None:
    same(lambda side: side.trainer().fit(side.module(with_loaders), parts.loader(2)))


def without_validation_step(pl: Any) -> type:
    class Training(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = parts.net(pl)().net

        training_step = parts.net(pl).training_step
        loss, forward = parts.net(pl).loss, parts.net(pl).forward
        configure_optimizers = parts.net(pl).configure_optimizers
        lr = 0.1

    return Training


def test_a_validation_loader_of_the_data_module_without_a_step(same: Same) -> None:
    def program(side: Side) -> None:
        module = side.module(without_validation_step)
        side.trainer().fit(module, datamodule=side.datamodule())

    same(program)


def test_a_second_fit_on_the_same_trainer(same: Same) -> None:
    def program(side: Side) -> None:
        trainer = fit(side)
        side.note("again")
        trainer.fit(side.last_module, parts.loader(4), parts.loader(2, first=50))

    same(program)


def test_a_second_fit_with_more_epochs(same: Same) -> None:
    def program(side: Side) -> None:
        trainer = fit(side, max_epochs=1)
        if side.pl is pytorch_lightning:
            trainer.fit_loop.max_epochs = 3
        else:
            trainer.max_epochs = 3
        side.note("again")
        trainer.fit(side.last_module, parts.loader(4), parts.loader(2, first=50))

    same(program)


def test_two_callbacks_and_those_of_the_module(same: Same) -> None:
    def program(side: Side) -> None:
        def own(pl: Any) -> type:
            class Own(parts.net(pl)):  # type: ignore[misc]
                def configure_callbacks(self) -> Any:
                    return side.callback(letter="Cm")

            return Own

        # Of a class of their own, so that the module's callback replaces none of them.
        first = side.callback(lambda pl: type("First", (pl.Callback,), {}), "C1")
        second = side.callback(lambda pl: type("Second", (pl.Callback,), {}), "C2")
        trainer = side.trainer(callbacks=[first, second])
        trainer.fit(side.module(own), parts.loader(2), parts.loader(1))

    same(program)
