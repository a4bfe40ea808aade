"""Callbacks: list order, which hooks are called at all, what the model brings along."""

from __future__ import annotations

from typing import Any

import engine
import pytest
from engine.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary, RichProgressBar
from toy import Net, fit, loader, trainer


class Note(engine.Callback):
    """Notes its name in a shared list."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.notes.append(self.name)


def test_callbacks_run_in_list_order() -> None:
    notes: list[str] = []
    fit(Net(), callbacks=[Note(name, notes) for name in "bac"])
    assert notes == ["b", "a", "c"]


def test_checkpoints_come_last_and_the_standard_ones_after_the_given() -> None:
    notes: list[str] = []
    first, stop, note = ModelCheckpoint(filename="a"), EarlyStopping("train_loss"), Note("n", notes)
    second = ModelCheckpoint(filename="b")
    options = {"enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True}
    run = trainer(callbacks=[first, stop, second, note], **options)
    assert run.callbacks[:2] == [stop, note]
    assert {type(c) for c in run.callbacks[2:4]} == {RichProgressBar, ModelSummary}
    assert run.callbacks[4:] == [first, second]
    assert run.checkpoint_callback is first


def test_standard_callbacks_are_not_doubled() -> None:
    bar, summary, saver = RichProgressBar(), ModelSummary(), ModelCheckpoint()
    options = {"enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True}
    run = trainer(callbacks=[bar, summary, saver], **options)
    assert run.callbacks == [bar, summary, saver]


def test_a_checkpoint_callback_without_checkpointing_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="enable_checkpointing=False"):
        trainer(callbacks=ModelCheckpoint(), enable_checkpointing=False)


def test_the_models_own_callbacks_replace_those_of_the_same_type() -> None:
    notes: list[str] = []
    own = Note("own", notes)

    class Model(Net):
        def configure_callbacks(self) -> Any:
            return own

    run = fit(Model(), callbacks=[Note("given", notes), EarlyStopping("train_loss")])
    assert notes == ["own"]
    assert [type(c) for c in run.callbacks] == [EarlyStopping, Note]


def test_a_hook_given_as_an_attribute_of_one_callback_is_called() -> None:
    calls: list[int] = []
    callback = engine.Callback()
    callback.on_train_batch_end = lambda trainer, module, outputs, batch, idx: calls.append(idx)  # type: ignore
    fit(Net(), callbacks=callback)
    assert calls == [0, 1, 2, 3]


def test_hooks_that_nobody_overrides_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the empty hook of the base class was called")

    class Idle(engine.Callback):
        pass

    run = trainer(callbacks=Idle())
    empty = [n for n in vars(engine.Callback) if n.startswith("on_") and n not in ("on_save_checkpoint",)]
    for name in empty:
        # The code of the base class's method is what must not run; the method itself stays what it is.
        monkeypatch.setattr(getattr(engine.Callback, name), "__code__", never.__code__)
    run.fit(Net(), loader(), loader())


def test_monitoring_callbacks_see_the_epoch_values_that_the_module_logs_last() -> None:
    seen: dict[str, bool] = {}

    class Late(Net):
        def on_train_epoch_end(self) -> None:
            self.log("late", 3.0)

    class Look(engine.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen[type(self).__name__] = "late" in trainer.callback_metrics

    class Monitor(Look):
        monitoring = True

    fit(Late(), callbacks=[Monitor(), Look()])
    assert seen == {"Look": False, "Monitor": True}
