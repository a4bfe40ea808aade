"""How a run ends early, and steps that are skipped: should_stop, -1, None, exceptions, Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deviations
import parts
import pytest
from harness import Side
from harness import same as parity

Same = Callable[..., None]


def acting(hook: str, action: Callable[..., Any], when: Callable[[Any], bool] = lambda trainer: True) -> Any:
    """A class of callbacks, given `pl`, that runs `action(trainer, module)` in a hook, when `when(trainer)` holds."""

    def cls(pl: Any) -> type:
        def method(self: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if when(trainer):
                action(trainer, pl_module)

        return type("Acting", (pl.Callback,), {hook: method})

    return cls


def fit_with(side: Side, callback: Any, **options: Any) -> Any:
    trainer = side.trainer(callbacks=[side.callback(callback)], **{"max_epochs": 3, **options})
    trainer.fit(side.module(), datamodule=side.datamodule())
    return trainer


def stop(trainer: Any, module: Any) -> None:
    trainer.should_stop = True


STOPS: dict[str, tuple[str, int]] = {
    "fit_start": ("on_fit_start", 0),
    "train_start": ("on_train_start", 0),
    "epoch_start": ("on_train_epoch_start", 4),
    "batch_start": ("on_train_batch_start", 5),
    "batch_end": ("on_train_batch_end", 6),
    "last_batch_end": ("on_train_batch_end", 4),
    "before_zero_grad": ("on_before_zero_grad", 5),
    "validation_start": ("on_validation_start", 4),
    "validation_end": ("on_validation_end", 4),
    "epoch_end": ("on_train_epoch_end", 4),
}


@pytest.mark.parametrize("name", STOPS)
def test_should_stop_set_in_a_hook(same: Same, name: str) -> None:
    hook, step = STOPS[name]
    callback = acting(hook, stop, lambda trainer: trainer.global_step >= step and not trainer.sanity_checking)
    same(lambda side: fit_with(side, callback))


@pytest.mark.parametrize(
    "options",
    [
        {"min_epochs": 2},
        {"min_steps": 6},
        {"min_steps": 9, "min_epochs": 1},
        {"min_epochs": 2, "min_steps": 5},
        {"min_steps": 6, "accumulate_grad_batches": 2, "max_epochs": 5},
    ],
    ids=str,
)
def test_stop_is_delayed_by_minima(same: Same, options: dict[str, Any]) -> None:
    callback = acting("on_train_batch_end", stop, lambda trainer: trainer.global_step >= 2)
    same(lambda side: fit_with(side, callback, **options))


@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"check_val_every_n_epoch": 2}], ids=str)
def test_stop_and_the_interval_of_validation(same: Same, options: dict[str, Any]) -> None:
    callback = acting("on_train_batch_end", stop, lambda trainer: trainer.global_step >= 3)
    same(lambda side: fit_with(side, callback, **options))


def test_stop_within_a_window_of_accumulation(same: Same) -> None:
    callback = acting("on_train_batch_end", stop, lambda trainer: trainer.global_step >= 1)
    same(lambda side: fit_with(side, callback, accumulate_grad_batches=2))


def skipping(pl: Any) -> type:
    class Skipping(parts.net(pl)):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == self.trainer.current_epoch + 1 else None

    return Skipping


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 1, "val_check_interval": 2}], ids=str)
def test_minus_one_skips_the_rest_of_the_epoch(same: Same, options: dict[str, Any]) -> None:
    def program(side: Side) -> None:
        side.trainer(max_epochs=3, **options).fit(side.module(skipping), datamodule=side.datamodule())

    same(program)


def returning(value: Callable[[Any, int], Any]) -> Any:
    """A net whose training step returns `value(loss, batch_idx)`."""

    def cls(pl: Any) -> type:
        class Returning(parts.net(pl)):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return value(self.loss(batch), batch_idx)

        return Returning

    return cls


RETURNS: dict[str, Callable[[Any, int], Any]] = {
    "none": lambda loss, batch_idx: None if batch_idx % 2 else loss,
    "always_none": lambda loss, batch_idx: None,
    "dict": lambda loss, batch_idx: {"loss": loss, "n": batch_idx, "extra": loss * 2},
    "dict_loss_last": lambda loss, batch_idx: {"text": "a", "nested": {"a": loss}, "loss": loss},
    "dict_without_loss": lambda loss, batch_idx: {"n": 1},
    "number": lambda loss, batch_idx: 1.0,
    "no_gradient": lambda loss, batch_idx: loss.detach(),
    "one_element": lambda loss, batch_idx: loss.reshape(1),
}


@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_training_step_returns(same: Same, name: str, accumulate: int) -> None:
    def program(side: Side) -> None:
        trainer = side.trainer(accumulate_grad_batches=accumulate)
        trainer.fit(side.module(returning(RETURNS[name])), parts.loader(4), parts.loader(1))

    expected = {
        "dict_without_loss": [deviations.TEARDOWN_AFTER_ERROR],
        "number": [deviations.TEARDOWN_AFTER_ERROR],
        "no_gradient": [deviations.TEARDOWN_AFTER_ERROR, deviations.LOSS_IS_CHECKED, deviations.REFUSED],
    }
    same(program, *expected.get(name, []), refused=name in expected)


EXCEPTIONS = [
    *("setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start"),
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_end"),
    *("on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"),
]


def fail(trainer: Any, module: Any) -> None:
    raise RuntimeError("on purpose")


def press(trainer: Any, module: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("hook", EXCEPTIONS)
def test_exceptions(hook: str) -> None:
    after = deviations.TEARDOWN_GOES_ON if hook == "teardown" else deviations.TEARDOWN_AFTER_ERROR
    parity(lambda side: fit_with(side, acting(hook, fail), max_epochs=1), after, refused=True)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_exceptions_in_evaluation(stage: str) -> None:
    name = {"validate": "validation"}.get(stage, stage)

    def program(side: Side) -> None:
        trainer = side.trainer(callbacks=[side.callback(acting(f"on_{name}_batch_start", fail))])
        getattr(trainer, stage)(side.module(), datamodule=side.datamodule())

    parity(program, deviations.TEARDOWN_AFTER_ERROR)


def test_exceptions_in_a_step(same: Same) -> None:
    def broken(loss: Any, batch_idx: int) -> Any:
        raise ValueError("in the step")

    def program(side: Side) -> None:
        side.trainer().fit(side.module(returning(broken)), datamodule=side.datamodule())

    same(program, deviations.TEARDOWN_AFTER_ERROR)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_start", "on_train_epoch_end"])
def test_keyboard_interrupt(same: Same, hook: str) -> None:
    program = lambda side: fit_with(side, acting(hook, press), num_sanity_val_steps=0)  # noqa: E731
    same(program, deviations.TEARDOWN_AFTER_ERROR, deviations.KEYBOARD_INTERRUPT)
