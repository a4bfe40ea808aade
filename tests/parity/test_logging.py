"""What `self.log` leads to: names, x-axes and values at loggers, and what callbacks can monitor at every moment."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import deviations
import parts
import pytest
import torch
import torchmetrics
from harness import Side, same
from recording import STEPS

MOMENTS = [
    *("on_train_batch_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end"),
    *("on_train_end", "on_fit_end", "on_test_epoch_end", "on_test_end"),
]


def watcher(side: Side, *names: str, moments: list[str] = MOMENTS) -> Callable[[Any], type]:
    """A class of callbacks, given `pl`, that keeps the trainer's metrics `names` at several moments."""

    def method(moment: str) -> Any:
        def watch(self: Any, trainer: Any, *args: Any) -> None:
            if trainer.sanity_checking:
                return
            values = {f"{n}.{k}": float(v) for n in names for k, v in getattr(trainer, n).items()}
            side.observe(f"{len(side.observed)} {moment}", values)

        return watch

    return lambda pl: type("Watcher", (pl.Callback,), {moment: method(moment) for moment in moments})


def logging_net(log: Callable[..., None], hook: str = "training_step") -> Any:
    """A net that calls `log(self, loss or None, batch_idx)` in one hook."""

    def cls(pl: Any) -> type:
        base = parts.several(pl) if hook in ("several_validation", "several_test") else parts.net(pl)
        name = {"several_validation": "validation_step", "several_test": "test_step"}.get(hook, hook)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if name in STEPS:
                loss = self.loss(args[0])
                log(self, loss, *args[1:])
                return loss
            log(self, None, *args)
            return getattr(super(made, self), name)(*args, **kwargs)

        method.__signature__ = inspect.signature(getattr(base, name))  # type: ignore[attr-defined]
        made = type("Logging", (base,), {name: method})
        return made

    return cls


def fit(
    side: Side, cls: Any, val: tuple[int, ...] = (3,), watched: Any = ("callback_metrics",), **options: Any
) -> None:
    trainer = side.trainer(callbacks=[side.callback(watcher(side, *watched))], **options)
    given = parts.loaders(val) if len(val) > 1 else parts.loader(val[0], first=50)
    trainer.fit(side.module(cls), parts.loader(5), given)


STEP: dict[str, Callable[..., None]] = {
    "default": lambda self, loss, i: self.log("a", loss),
    "epoch": lambda self, loss, i: self.log("a", loss, on_step=False, on_epoch=True),
    "both": lambda self, loss, i: self.log("a", loss, on_step=True, on_epoch=True, prog_bar=True),
    "no_logger": lambda self, loss, i: self.log("a", loss, on_epoch=True, logger=False),
    "number": lambda self, loss, i: self.log("a", 1.5 * i, on_epoch=True),
    "whole": lambda self, loss, i: self.log("a", i, on_epoch=True),
    "boolean_tensor": lambda self, loss, i: self.log("a", torch.tensor(i > 1), on_epoch=True),
    "sum": lambda self, loss, i: self.log("a", loss, on_epoch=True, reduce_fx="sum"),
    "min": lambda self, loss, i: self.log("a", loss, on_epoch=True, reduce_fx=torch.min),
    "max": lambda self, loss, i: self.log("a", loss, on_epoch=True, reduce_fx=max),
    "batch_size": lambda self, loss, i: self.log("a", loss, on_epoch=True, batch_size=i + 1),
    "dict": lambda self, loss, i: self.log_dict({"a": loss, "b/c": 2.0 * i}, on_epoch=True),
    "twice": lambda self, loss, i: [self.log("a", loss, on_epoch=True), self.log("a", loss * 3, on_epoch=True)],
    "sometimes": lambda self, loss, i: self.log("a", loss, on_epoch=True) if i % 2 else None,
    "only_first": lambda self, loss, i: self.log("a", loss, on_epoch=True) if i == 0 else None,
    "only_first_epoch": lambda self, loss, i: self.log("a", loss) if self.current_epoch == 0 else None,
    "own_step": lambda self, loss, i: self.log_dict({"a": loss, "step": 10.0 * i}),
    "not_finite": lambda self, loss, i: self.log("a", float("nan"), on_epoch=True),
    "vector_of_one": lambda self, loss, i: self.log("a", loss.reshape(1)),
    "direct_to_logger": lambda self, loss, i: self.logger.log_metrics({"direct": float(i)}, step=self.global_step),
    "nothing": lambda self, loss, i: None,
}


@pytest.mark.parametrize("name", STEP)
def test_in_training_steps(name: str) -> None:
    same(lambda side: fit(side, logging_net(STEP[name])))


@pytest.mark.parametrize("every", [2, 50])
@pytest.mark.parametrize("name", ["both", "default", "sometimes"])
def test_every_n_steps(name: str, every: int) -> None:
    program = lambda side: fit(side, logging_net(STEP[name]), log_every_n_steps=every)  # noqa: E731
    same(program, *[deviations.NUMBERS_ON_LOG_STEPS] * (every == 50))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2, "limit_train_batches": 4}, {"val_check_interval": 2}]
)
def test_steps_and_accumulation_and_validation(every: int, options: dict[str, Any]) -> None:
    same(lambda side: fit(side, logging_net(STEP["both"]), log_every_n_steps=every, **options))


EVALUATION: dict[str, Callable[..., None]] = {
    "default": lambda self, loss, i, d=0: self.log("v", loss),
    "both": lambda self, loss, i, d=0: self.log("v", loss, on_step=True, on_epoch=True, prog_bar=True),
    "step_only": lambda self, loss, i, d=0: self.log("v", loss, on_step=True, on_epoch=False),
    "sum": lambda self, loss, i, d=0: self.log("v", loss, reduce_fx="sum"),
    "no_logger": lambda self, loss, i, d=0: self.log("v", loss, logger=False),
    "batch_size": lambda self, loss, i, d=0: self.log("v", loss, batch_size=i + 1),
    "dict": lambda self, loss, i, d=0: self.log_dict({"v": loss, "w": 1.0}),
    "first_loader": lambda self, loss, i, d=0: self.log("v", loss) if d == 0 else None,
    "without_index": lambda self, loss, i, d=0: self.log(f"v{d}", loss, add_dataloader_idx=False),
}


@pytest.mark.parametrize("lengths", [(3,), (2, 3)])
@pytest.mark.parametrize("name", EVALUATION)
def test_in_validation_steps(name: str, lengths: tuple[int, ...]) -> None:
    hook = "validation_step" if len(lengths) == 1 else "several_validation"
    same(lambda side: fit(side, logging_net(EVALUATION[name], hook), val=lengths))


@pytest.mark.parametrize("lengths", [(3,), (2, 3)])
@pytest.mark.parametrize("name", EVALUATION)
def test_results_of_test(name: str, lengths: tuple[int, ...]) -> None:
    def program(side: Side) -> None:
        trainer = side.trainer(callbacks=[side.callback(watcher(side, "callback_metrics"))])
        given = parts.loaders(lengths) if len(lengths) > 1 else parts.loader(3)
        hook = "test_step" if len(lengths) == 1 else "several_test"
        side.observe("test", trainer.test(side.module(logging_net(EVALUATION[name], hook)), given, verbose=False))

    same(program)


EPOCH_HOOKS = [
    *("on_train_start", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"),
]
BATCH_HOOKS = [
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end"),
]
FORBIDDEN = [
    *("setup", "on_fit_start", "on_train_end", "on_validation_end", "on_fit_end", "configure_optimizers"),
    *("on_validation_model_eval", "prepare_data", "teardown"),
]


@pytest.mark.parametrize("hook", [*EPOCH_HOOKS, *BATCH_HOOKS])
def test_in_other_hooks(hook: str) -> None:
    same(lambda side: fit(side, logging_net(lambda self, *_: self.log("h", 1.0 + self.global_step), hook)))


@pytest.mark.parametrize("hook", FORBIDDEN)
def test_where_it_is_forbidden(hook: str) -> None:
    program = lambda side: fit(side, logging_net(lambda self, *_: self.log("h", 1.0), hook))  # noqa: E731
    same(program, *[deviations.TEARDOWN_AFTER_ERROR] * (hook != "teardown"), refused=True)


WRONG: dict[str, Callable[..., None]] = {
    "neither": lambda self, *_: self.log("a", 1.0, on_step=False, on_epoch=False),
    "vector": lambda self, *_: self.log("a", torch.ones(2)),
    "text": lambda self, *_: self.log("a", "text"),
    "nested": lambda self, *_: self.log("a", {"b": {"c": 1.0}}),
    "unknown_reduction": lambda self, *_: self.log("a", 1.0, reduce_fx="median"),
    "other_options": lambda self, *_: [self.log("a", 1.0, on_epoch=True), self.log("a", 1.0, on_epoch=False)],
    "suffix_by_hand": lambda self, *_: self.log("a/dataloader_idx_0", 1.0),
    "no_name": lambda self, *_: self.log(1, 1.0),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    expected = [deviations.REFUSED] * (name in ("vector", "text", "nested"))
    program = lambda side: fit(side, logging_net(WRONG[name]))  # noqa: E731
    same(program, deviations.TEARDOWN_AFTER_ERROR, *expected, refused=True)


def with_metrics(pl: Any) -> type:
    class WithMetrics(parts.net(pl)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error = torchmetrics.MeanAbsoluteError()
            self.several = torchmetrics.MetricCollection(
                {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
            )
            self.valid = self.several.clone(prefix="val_")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            predicted = self(batch[0])
            self.error(predicted, batch[1])
            self.log("error", self.error, on_step=True, on_epoch=True, prog_bar=True)
            self.several.update(predicted.detach(), batch[1])
            self.log_dict(self.several, on_step=False, on_epoch=True)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.valid.update(self(batch[0]), batch[1])
            self.log_dict(self.valid)

    return WithMetrics


def test_torchmetrics() -> None:
    same(lambda side: fit(side, with_metrics))


def hand_made(pl: Any) -> type:
    class HandMade(with_metrics(pl)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.error.update(self(batch[0]), batch[1])
            return self.loss(batch)

        def on_train_epoch_end(self) -> None:
            self.log("error", self.error.compute())
            self.error.reset()

    return HandMade


def test_torchmetrics_computed_by_hand() -> None:
    same(lambda side: fit(side, hand_made))


def callback_that_logs(side: Side) -> Callable[[Any], type]:
    def cls(pl: Any) -> type:
        class Logs(watcher(side, "callback_metrics")(pl)):  # type: ignore[misc]
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                self.log("from_callback", float(batch_idx), on_epoch=True)
                pl_module.log("from_module", 2.0)

            def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                self.log_dict({"at_end": 3.0})

        return Logs

    return cls


def test_callbacks_that_log() -> None:
    def program(side: Side) -> None:
        trainer = side.trainer(callbacks=[side.callback(callback_that_logs(side))])
        trainer.fit(side.module(), parts.loader(3), parts.loader(2))

    same(program)


def test_progress_bar_and_logged_metrics_after_every_evaluation() -> None:
    def program(side: Side) -> None:
        watching = watcher(
            side, "progress_bar_metrics", "logged_metrics", moments=["on_validation_end", "on_train_end"]
        )
        trainer = side.trainer(callbacks=[side.callback(watching)])
        trainer.fit(side.module(), parts.loader(3), parts.loader(2))

    same(program)


def hyperparameters(pl: Any) -> type:
    class Hyperparameters(parts.net(pl)):  # type: ignore[misc]
        def __init__(self, lr: float = 0.1, name: str = "n") -> None:
            super().__init__(lr)
            self.save_hyperparameters()

    return Hyperparameters


def test_hyperparameters() -> None:
    def program(side: Side) -> None:
        module = side.module(hyperparameters, lr=0.2)
        side.observe("hparams", dict(module.hparams))
        side.trainer().fit(module, parts.loader(2))

    same(program)
