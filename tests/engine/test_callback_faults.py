"""Callbacks that raise: everything is still torn down, the first error is the one that is told, files stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import engine
import pytest
from engine import checkpoint
from engine.callbacks import ModelCheckpoint
from injection import Acts, at, notes
from torch import Tensor
from toy import Memory, Net, loader, trainer, weights

HOOKS = ["setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start"]
HOOKS += ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
HOOKS += ["on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_epoch_start"]
HOOKS += ["on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"]
HOOKS += ["on_train_epoch_end", "on_train_end", "on_fit_end", "on_save_checkpoint"]


class Boom(Exception):
    pass


def boom(run: engine.Trainer) -> None:
    raise Boom("first")


def fault(action: Callable[[], Any], kind: type[BaseException]) -> BaseException:
    with pytest.raises(kind) as caught:
        action()
    return caught.value


class Watch(engine.Callback):
    """Notes what is called at the end, and may raise there."""

    def __init__(self, seen: list[str], name: str, raises: str = "") -> None:
        self.seen, self.name, self.raises = seen, name, raises

    @property
    def state_key(self) -> str:
        return self.name

    def _note(self, hook: str) -> None:
        self.seen.append(f"{self.name}.{hook}")
        if hook == self.raises:
            raise ZeroDivisionError(f"{hook} of {self.name}")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._note("on_exception")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._note("teardown")


class Data(engine.DataModule):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return loader()

    def on_exception(self, exception: BaseException) -> None:
        self.watch._note("on_exception")

    def teardown(self, stage: str) -> None:
        self.watch._note("teardown")


class Model(Net):
    watch: Watch

    def teardown(self, stage: str) -> None:
        self.watch._note("teardown")


def fit(
    folder: str,
    acts: Acts,
    seen: list[str],
    raises: dict[str, str] | None = None,
    ckpt_path: str | None = None,
    logger: Any = False,
) -> Tensor:
    """Train with watched parts A and B (callbacks), D (data) and M (model); returns the weights at the end."""
    engine.seed_everything(6 if ckpt_path is None else 9)
    parts = {name: Watch(seen, name, (raises or {}).get(name, "")) for name in "ABDM"}
    saver = ModelCheckpoint(folder, save_top_k=0, save_last=True)
    callbacks = [parts["A"], acts, parts["B"], saver]
    model = Model()
    model.watch = parts["M"]
    run = trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=3, num_sanity_val_steps=1, logger=logger)
    run.fit(model, datamodule=Data(parts["D"]), ckpt_path=ckpt_path)
    return weights(model)


@cache
def whole() -> Tensor:
    """The weights of a run without any fault; its folder is one of a test's, and goes with it."""
    return fit("whole", at("on_train_start", 0, boom), [])


ENDING = ["A.on_exception", "B.on_exception", "D.on_exception", "D.teardown", "A.teardown", "B.teardown", "M.teardown"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_callback_that_raises_is_torn_down_after_and_the_last_checkpoint_stands(hook: str) -> None:
    expected = whole()
    seen: list[str] = []
    logger = Memory()
    late = {"setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_end", "on_fit_end"}
    # Most hooks in the second epoch; some there are only once.
    calls = {"on_train_batch_start": 6, "on_train_batch_end": 6, "on_before_zero_grad": 6, "on_before_backward": 6}
    calls |= {"on_after_backward": 6, "on_before_optimizer_step": 6}
    calls |= {"on_validation_batch_start": 6, "on_validation_batch_end": 6}
    acts = at(hook, 1 if hook in late else calls.get(hook, 2), boom)
    if hook == "on_sanity_check_start":
        type(acts).act = lambda self, trainer: boom(trainer)  # type: ignore[method-assign]
    error = fault(lambda: fit("c", acts, seen, logger=logger), Boom)
    assert str(error) == "first" and not notes(error)
    assert seen == ENDING
    assert logger.status == ["failed"]
    files = [*Path("c").glob("*")]
    assert all(checkpoint.load(file) for file in files)
    if hook in ("setup", "on_fit_start", "on_sanity_check_start", "on_train_start"):
        assert not files
        return
    assert checkpoint.load(Path("c/last.ckpt"))["state"]["epoch"] == (3 if hook in late else 1)
    assert fit("c", at("on_train_start", 0, boom), [], ckpt_path="c/last.ckpt").equal(expected)


ENDINGS = [(part, hook) for part in "ABD" for hook in ("on_exception", "teardown")] + [("M", "teardown")]


@pytest.mark.parametrize(("part", "hook"), ENDINGS)
def test_an_error_at_the_end_hides_neither_the_first_one_nor_the_rest_of_the_end(part: str, hook: str) -> None:
    seen: list[str] = []
    logger = Memory()
    acts = at("on_train_batch_end", 6, boom)
    error = fault(lambda: fit("c", acts, seen, {part: hook}, logger=logger), Boom)
    assert f"then the tear-down failed, too: ZeroDivisionError: {hook} of {part}" in notes(error)
    assert seen == ENDING and logger.status == ["failed"]


@pytest.mark.parametrize("part", ["A", "B", "D", "M"])
def test_a_teardown_that_raises_after_a_good_run_is_the_error(part: str) -> None:
    seen: list[str] = []
    logger = Memory()
    error = fault(
        lambda: fit("c", at("on_train_start", 0, boom), seen, {part: "teardown"}, logger=logger), ZeroDivisionError
    )
    assert str(error) == f"teardown of {part}"
    # The others are told of it afterwards, since on_exception was not called before.
    assert seen == sorted(ENDING, key=lambda name: "teardown" not in name)
    assert logger.status == ["failed"]
    assert checkpoint.load(Path("c/last.ckpt"))["state"]["epoch"] == 3


def test_every_error_at_the_end_is_told() -> None:
    raises = {"A": "on_exception", "B": "teardown", "D": "teardown", "M": "teardown"}
    error = fault(lambda: fit("c", at("on_train_batch_end", 6, boom), [], raises), Boom)
    assert notes(error).count("then the tear-down failed, too") == 4


def test_a_logger_that_cannot_be_closed_does_not_keep_the_next_from_it() -> None:
    class Broken(Memory):
        def finalize(self, status: str) -> None:
            raise OSError(28, "No space left on device")

    second = Memory()
    error = fault(lambda: trainer(logger=[Broken(), second]).fit(Net(), loader()), OSError)
    assert "No space left" in str(error)
    assert second.status
