"""Several evaluation sets by name: labels, what they have in common, and where both arrive."""

from __future__ import annotations

import re
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import EarlyStopping
from torch import nn
from torchmetrics import MeanMetric, SumMetric
from toy import Memory, Net, Steps, dataset, fit, loader, stream, trainer

SIZES = {"day": 6, "night": 2}


def sets(**sizes: int) -> dict[str, Any]:
    """Loaders by name; "day" and "night" of 6 and 2 samples unless told otherwise."""
    return {name: loader(size) for name, size in (sizes or SIZES).items()}


class Sets(Net):
    """Logs 1.0 for samples of the first set, 2.0 for those of the second, ..."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_acc", float(dataloader_idx + 1), **self.options)

    test_step = validation_step


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_values_bear_the_sets_name_and_their_mean_by_samples_the_plain_one(stage: str) -> None:
    logger, run = Memory(), trainer()
    run.loggers = [logger]
    results = getattr(run, stage)(Sets(), sets(), verbose=False)
    assert results == [{"val_acc/day": 1.0, "val_acc": 1.25}, {"val_acc/night": 2.0, "val_acc": 1.25}]
    every = {"val_acc/day": 1.0, "val_acc/night": 2.0, "val_acc": 1.25}
    assert {name: float(value) for name, value in run.callback_metrics.items()} == every
    assert run.logged_metrics == every
    assert logger.rows == [(0, {**every, "epoch": 0})]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.25),
        ({"reduce_fx": "sum"}, 3 * 1.0 + 2.0),
        ({"reduce_fx": "min"}, 1.0),
        ({"reduce_fx": "max"}, 2.0),
        # The weights of the batches are those of the value within a set, not those of the sets.
        ({"batch_size": 1}, 1.25),
    ],
    ids=str,
)
def test_what_sets_have_in_common_follows_the_reduction(options: dict[str, Any], expected: float) -> None:
    results = trainer().validate(Sets(**options), sets(), verbose=False)
    assert [result["val_acc"] for result in results] == [expected] * 2


def test_a_value_logged_for_some_sets_only_is_their_mean() -> None:
    class Some(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if dataloader_idx:
                self.log("v", float(dataloader_idx))

    results = trainer().validate(Some(), sets(a=8, b=6, c=2), verbose=False)
    assert results == [{"v": 1.25}, {"v/b": 1.0, "v": 1.25}, {"v/c": 2.0, "v": 1.25}]


def test_the_mean_of_a_metric_object_is_that_of_all_samples() -> None:
    class Clones(Net):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.ModuleList([MeanMetric(), MeanMetric()])
            self.sums = nn.ModuleList([SumMetric(), SumMetric()])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            for metrics in (self.means, self.sums):
                metrics[dataloader_idx].update(batch[1])
            self.log("mean", self.means[dataloader_idx])
            self.log("sum", self.sums[dataloader_idx], reduce_fx="sum")

    [day, night] = trainer().validate(Clones(), sets(day=5, night=3), verbose=False)
    first, second = dataset(5)[:][1], dataset(3)[:][1]
    assert day["mean/day"] == pytest.approx(float(first.mean()))
    assert night["mean"] == day["mean"] == pytest.approx(float(torch.cat([first, second]).mean()))
    assert day["sum"] == pytest.approx(float(first.sum() + second.sum()))


def test_a_metric_object_that_sets_share_is_refused() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.mean.update(batch[1])
            self.log("mean", self.mean, **self.options)

    model, run = Shared(), trainer()
    model.options = {}
    with pytest.raises(engine.MisconfigurationException, match=r"give each a clone\(\)"):
        run.validate(model, sets(), verbose=False)
    # One value of all sets may come of one object.
    model.options = {"add_dataloader_idx": False}
    [result, _] = run.validate(model, sets(day=5, night=3), verbose=False)
    assert result == {"mean": pytest.approx(float(torch.cat([dataset(5)[:][1], dataset(3)[:][1]]).mean()))}


def test_values_of_steps_and_epochs_have_their_suffix_before_the_name() -> None:
    logger = Memory()
    model = Sets(on_step=True, on_epoch=True, prog_bar=True)
    run = fit(model, None, sets(), logger=logger)
    assert logger.of("val_acc_step/day") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert logger.of("val_acc_step/night") == [(0, 2.0)]
    epoch = {"val_acc_epoch/day": 1.0, "val_acc_epoch/night": 2.0, "val_acc_epoch": 1.25}
    assert logger.rows[-1] == (3, {**epoch, "epoch": 0})
    assert {**epoch, "val_acc/day": 1.0, "val_acc/night": 2.0, "val_acc": 1.25}.items() <= {
        name: float(value) for name, value in run.callback_metrics.items()
    }.items()
    assert run.progress_bar_metrics == {"val_acc_epoch": 1.25}


def test_the_line_of_an_epoch_shows_the_plain_name_only(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Sets(prog_bar=True), None, sets(), enable_progress_bar=True)
    out = capsys.readouterr().out
    assert "val_acc 1.2500" in out and "/day" not in out


def test_a_monitor_follows_the_mean_in_every_epoch_and_the_sanity_check_leaves_nothing() -> None:
    seen = []

    class Worse(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", float(self.current_epoch + dataloader_idx))

        def on_train_start(self) -> None:
            seen.append(dict(self.trainer.callback_metrics))

    class Watch(engine.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(sorted(trainer.metrics.fresh - {"train_loss"}) if not trainer.sanity_checking else [])

    callbacks = [EarlyStopping("val_loss", patience=2), Watch()]
    run = fit(Worse(), None, sets(), callbacks=callbacks, max_epochs=9, num_sanity_val_steps=1)
    assert run.current_epoch == 3
    assert seen == [[], {}] + [["val_loss", "val_loss/day", "val_loss/night"]] * 3


def test_weights_are_the_samples_that_ran_not_those_there_are() -> None:
    results = trainer(limit_val_batches=1).validate(Sets(), {"a": loader(8, 4), "b": stream(8, 1)}, verbose=False)
    assert results[0]["val_acc"] == pytest.approx((4 * 1.0 + 1 * 2.0) / 5)


def test_a_single_named_set_is_a_single_loader() -> None:
    class Single(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.log("val_acc", 1.0)

    run = trainer()
    assert run.validate(Single(), sets(day=6), verbose=False) == [{"val_acc": 1.0}]
    assert run.evaluation_loaders("validation").names == []


def test_a_list_has_no_names_and_no_mean() -> None:
    run = trainer()
    results = run.validate(Sets(), [loader(6), loader(2)], verbose=False)
    assert results == [{"val_acc/dataloader_idx_0": 1.0}, {"val_acc/dataloader_idx_1": 2.0}]
    assert run.evaluation_loaders("validation").names == []


def test_hooks_may_return_names_which_the_trainer_knows() -> None:
    class Data(engine.DataModule):
        def val_dataloader(self) -> Any:
            return sets()

        test_dataloader = predict_dataloader = val_dataloader

    run = trainer()
    for stage in ("validate", "test"):
        assert [*getattr(run, stage)(Sets(), datamodule=Data(), verbose=False)[0]] == ["val_acc/day", "val_acc"]
    assert run.evaluation_loaders("test").names == ["day", "night"]
    outputs = run.predict(Net(), datamodule=Data())
    assert outputs is not None and [len(batches) for batches in outputs] == [3, 1]


def test_a_value_under_the_plain_name_stays() -> None:
    class Own(Sets):
        def on_validation_epoch_end(self) -> None:
            self.log("val_acc", 7.0)

    assert trainer().validate(Own(), sets(), verbose=False)[0] == {"val_acc/day": 1.0, "val_acc": 7.0}


def test_without_the_sets_name_values_of_all_sets_are_one() -> None:
    results = trainer().validate(Sets(add_dataloader_idx=False), sets(), verbose=False)
    assert results == [{"val_acc": 1.25}] * 2


@pytest.mark.parametrize("name", ["", " ", "a/b", 3, None])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_what_cannot_be_a_name_is_refused(stage: str, name: Any) -> None:
    with pytest.raises(engine.MisconfigurationException, match=f"has the name {re.escape(repr(name))}; give a text"):
        getattr(trainer(), stage)(Net(), {"day": loader(), name: loader()})


def test_results_have_a_column_for_each_set_and_one_for_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    class Ends(Sets):
        def on_test_epoch_end(self) -> None:
            self.log("end", 7.0)

    trainer().test(Ends(), sets())
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["test", "day", "night", "mean"]
    assert sorted(lines[1:]) == [["end", "7.0000"], ["val_acc", "1.0000", "2.0000", "1.2500"]]


def test_the_names_of_an_earlier_run_are_forgotten() -> None:
    run = trainer()
    run.validate(Sets(), sets(), verbose=False)
    assert run.validate(Steps(validation=lambda m, *_: m.log("v", 1.0)), loader(), verbose=False) == [{"v": 1.0}]
