"""How many batches run: limit_*_batches, fast_dev_run, loaders without length, arguments out of range."""

from __future__ import annotations

from typing import Any

import engine
import pytest
from engine.callbacks import EarlyStopping, ModelCheckpoint
from toy import Memory, Net, fit, loader, stream, trainer


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, 0), (1, 1), (3, 3), (99, 8), (1.0, 8), (0.5, 4), (0.3, 2), (0.0, 0), (0.99, 7)]
)
def test_limits_are_a_number_or_a_share_of_batches(limit: float, expected: int) -> None:
    for stage in ("train", "val", "test", "predict"):
        model, run = Net(), trainer(**{f"limit_{stage}_batches": limit})
        ran = 0
        if stage == "predict":
            ran = len(run.predict(model, loader(16)) or [])
        elif stage == "test":
            run.test(model, loader(16), verbose=False)
            ran = model.count("test")
        else:
            run.fit(model, loader(16), loader(16))
            ran = model.count(stage)
        assert ran == expected


@pytest.mark.parametrize("limit", [-1, 1.5, -0.5, True, "all", float("nan")])
@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_a_senseless_limit_is_refused_with_its_name(stage: str, limit: Any) -> None:
    with pytest.raises(engine.MisconfigurationException, match=f"limit_{stage}_batches={limit!r} makes no sense"):
        trainer(**{f"limit_{stage}_batches": limit})


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="limit_train_batches=0.1 of 4 batches is none"):
        fit(Net(), limit_train_batches=0.1)


def test_a_share_of_an_unknown_length_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="loader without length; give a whole number"):
        fit(Net(), stream(), limit_train_batches=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("max_epochs", -2),
            ("max_epochs", 1.5),
            ("max_epochs", True),
            ("max_steps", -2),
            ("min_epochs", -1),
            ("min_steps", -1),
        ),
        *(("fast_dev_run", -1), ("check_val_every_n_epoch", 0), ("num_sanity_val_steps", -2)),
        *(
            ("log_every_n_steps", -1),
            ("accumulate_grad_batches", 0),
            ("gradient_clip_val", -1.0),
            ("gradient_clip_val", "a"),
            ("fast_dev_run", "a"),
        ),
        *(("gradient_clip_val", float("nan")), ("gradient_clip_algorithm", "size"), ("precision", "8")),
        *(("accelerator", "tpu"), ("strategy", "horovod"), ("devices", 0), ("devices", "two")),
    ],
)
def test_a_senseless_argument_is_refused_by_name_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(engine.MisconfigurationException) as caught:
        trainer(**{name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_argument_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(engine.MisconfigurationException, match="no argument max_epoch=3: did you mean max_epochs?"):
        trainer(max_epoch=3)


@pytest.mark.parametrize(("given", "count"), [(True, 1), (1, 1), (3, 3)])
def test_fast_dev_run_tries_everything_and_leaves_nothing(given: Any, count: int, tmp_path: Any) -> None:
    callbacks = [ModelCheckpoint(monitor="nowhere"), EarlyStopping("nowhere")]
    options = {"logger": Memory(), "num_sanity_val_steps": 2, "max_epochs": 9, "check_val_every_n_epoch": 5}
    run = trainer(fast_dev_run=given, callbacks=callbacks, enable_checkpointing=True, **options)
    model = Net()
    run.fit(model, loader(16), loader(16))
    run.test(model, loader(16), verbose=False)
    assert [model.count(stage) for stage in ("train", "val", "test")] == [count] * 3
    assert run.current_epoch == 1 and [type(logger) for logger in run.loggers] == [engine.loggers.DummyLogger]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("validate", [True, False])
def test_a_loader_without_length_ends_its_epoch_at_its_last_batch(validate: bool) -> None:
    model = Net()
    run = fit(model, stream(7), stream(5) if validate else None, max_epochs=2)
    assert run.num_training_batches == float("inf")
    assert [n for s, n in model.seen if s == "train"] == [0, 1, 2, 3] * 2
    assert [n for s, n in model.seen if s == "val"] == ([0, 1, 2] * 2 if validate else [])
    assert (run.current_epoch, run.global_step) == (2, 8)


@pytest.mark.parametrize("limit", [2, 4, 9])
def test_a_limit_on_a_loader_without_length_keeps_the_end_of_the_epoch(limit: int) -> None:
    model = Net()
    fit(model, stream(8), loader(), limit_train_batches=limit, max_epochs=2)
    assert model.count("train") == 2 * min(limit, 4)
    assert model.count("val") == 2 * 4


def test_a_limited_stream_is_not_read_beyond_its_limit() -> None:
    read = []

    def endless() -> Any:
        for batch in iter(lambda: next(iter(loader())), None):
            read.append(1)
            yield batch

    fit(Net(), endless(), limit_train_batches=3)
    assert len(read) == 3


def test_any_iterable_of_batches_is_a_loader() -> None:
    model = Net()
    fit(model, Batches(), Batches(), max_epochs=2)
    assert model.count("train") == model.count("val") == 8


class Batches:
    """Neither a DataLoader nor of known length."""

    def __iter__(self) -> Any:
        return iter(loader())


@pytest.mark.parametrize("hooked", ["train", "val", "test", "predict"])
def test_zero_batches_run_no_loop_hooks(hooked: str) -> None:
    notes: list[str] = []

    class Note(engine.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            notes.append("train")

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            notes.append("val")

        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            notes.append("test")

        def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
            notes.append("predict")

    run = trainer(callbacks=Note(), num_sanity_val_steps=2, **{f"limit_{hooked}_batches": 0})
    model = Net()
    run.fit(model, loader(), loader())
    assert (run.test(model, loader(), verbose=False) == []) == (hooked == "test")
    assert (run.predict(model, loader()) is None) == (hooked == "predict")
    expected = {"train": ["val"], "val": ["train"]}.get(hooked, ["val", "train", "val"])
    assert notes == [*expected, *(stage for stage in ("test", "predict") if stage != hooked)]


def test_an_empty_training_set_is_refused_and_an_empty_validation_set_left_out() -> None:
    with pytest.raises(engine.MisconfigurationException, match="training set is empty"):
        fit(Net(), loader(0))
    model = Net()
    fit(model, loader(), loader(0), num_sanity_val_steps=2)
    assert (model.count("train"), model.count("val")) == (4, 0)
