"""self.log: how many values become one, and torchmetrics objects."""

from __future__ import annotations

from typing import Any, NamedTuple

import engine
import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MeanMetric, MetricCollection, SumMetric
from toy import Memory, Net, Steps, dataset, fit, loader, trainer

Logged = list[tuple[float, int]]


class Values(Net):
    """Logs in batch i the i-th of the given (value, size of the batch), as numbers or tensors."""

    def __init__(self, values: Logged, tensors: bool, **options: Any) -> None:
        super().__init__()
        self.values, self.tensors, self.options = values, tensors, options

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        value = self.values[batch_idx][0]
        self.log("x", torch.tensor(value) if self.tensors else value, **self.options)


def logged(values: Logged, tensors: bool, **options: Any) -> float:
    indices = iter(range(99))
    batches = [[next(indices) for _ in range(size)] for _, size in values]
    model = Values(values, tensors, **options)
    [result] = trainer().validate(model, DataLoader(dataset(99), batch_sampler=batches), verbose=False)
    assert float(model.trainer.callback_metrics["x"]) == pytest.approx(result["x"], nan_ok=True)
    return result["x"]


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3.4),
        ({"reduce_fx": "mean"}, 3.4),
        ({"reduce_fx": torch.mean}, 3.4),
        ({"batch_size": 1}, 2.5),
        ({"reduce_fx": "sum"}, 5.0),
        ({"reduce_fx": sum}, 5.0),
        ({"reduce_fx": torch.sum}, 5.0),
        ({"reduce_fx": "min"}, 1.0),
        ({"reduce_fx": min}, 1.0),
        ({"reduce_fx": "max"}, 4.0),
        ({"reduce_fx": torch.max}, 4.0),
    ],
)
def test_values_4_and_1_of_4_and_1_samples_become(options: dict[str, Any], expected: float, tensors: bool) -> None:
    assert logged([(4.0, 4), (1.0, 1)], tensors, **options) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "min", "max"])
def test_numbers_and_tensors_under_one_name_mix(reduce_fx: str) -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> None:
        value = [1.0, torch.tensor(2.0), 3, torch.tensor([4.0])][batch_idx]
        model.log("x", value, reduce_fx=reduce_fx)

    [result] = trainer().validate(Steps(validation=step), loader(), verbose=False)
    assert result["x"] == {"mean": 2.5, "sum": 10.0, "min": 1.0, "max": 4.0}[reduce_fx]


def test_a_mean_over_many_values_keeps_its_digits() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> None:
        model.log("x", torch.tensor(1e4 if batch_idx == 0 else 1e-4), batch_size=1)

    [result] = trainer().validate(Steps(validation=step), loader(512, 1), verbose=False)
    assert result["x"] == pytest.approx((1e4 + 511 * 1e-4) / 512, rel=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_arrive_as_they_are(value: float) -> None:
    assert repr(logged([(value, 1)], True)) == repr(value)


class Pair(NamedTuple):
    ids: str
    data: dict[str, Any]


BATCHES = {
    "tensor": torch.zeros(3, 2),
    "dict": {"name": "a", "x": torch.zeros(3)},
    "nested": Pair("id", {"x": [torch.zeros(3, 1)]}),
    "number": torch.zeros(()),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_the_size_of_a_batch_is_the_first_dimension_of_its_first_tensor(kind: str) -> None:
    class Weights(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("x", float(batch_idx))

    weight = {"number": 1, "text": 1}.get(kind, 3)
    [result] = trainer().validate(Weights(), [[BATCHES[kind], torch.zeros(1)]], verbose=False)
    assert result["x"] == pytest.approx(1 / (weight + 1))


class Metrics(Net):
    """Logs a torchmetrics object in both stages, and counts its computations."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.train_mean, self.val_sum = Counted(), SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_mean(batch[1].mean(), len(batch[0]))
        self.log("mean", self.train_mean, **self.options)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.val_sum.update(batch[1])
        self.log("sum", self.val_sum)


class Counted(MeanMetric):
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0


def test_a_metric_object_gives_the_value_of_the_epoch_and_is_reset() -> None:
    logger, model = Memory(), Metrics(on_step=False, on_epoch=True)
    run = fit(model, loader(7), loader(5), max_epochs=3, logger=logger, num_sanity_val_steps=1)
    mean, total = float(dataset(7)[:][1].mean()), float(dataset(5)[:][1].sum())
    assert [value for _, value in logger.of("mean")] == pytest.approx([mean] * 3)
    assert [value for _, value in logger.of("sum")] == pytest.approx([total] * 3)
    assert float(run.callback_metrics["sum"]) == pytest.approx(total)
    assert model.train_mean.update_count == model.val_sum.update_count == 0


def test_a_metric_object_is_computed_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    class Once(SumMetric):
        def compute(self) -> Any:
            computed.append(1)
            return super().compute()

    model = Metrics(on_step=False, on_epoch=True)
    model.val_sum = Once()
    fit(model, loader(), loader(), max_epochs=3)
    assert len(computed) == 3


def test_a_metric_object_logs_steps_by_its_forward_value() -> None:
    logger = Memory()
    fit(Metrics(on_step=True, on_epoch=True), logger=logger, log_every_n_steps=1)
    steps = [float(y.mean()) for _, y in loader()]
    assert [value for _, value in logger.of("mean_step")] == pytest.approx(steps)
    assert [value for _, value in logger.of("mean_epoch")] == pytest.approx([sum(steps) / 4])


def test_a_metric_collection_is_logged_by_log_dict() -> None:
    class Many(Net):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = MetricCollection({"mean": MeanMetric(), "max": MaxMetric()}, prefix="val_")

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.metrics.update(batch[1])
            self.log_dict(self.metrics)

    [result] = trainer().validate(Many(), loader(6), verbose=False)
    targets = dataset(6)[:][1]
    assert result == {"val_mean": pytest.approx(float(targets.mean())), "val_max": pytest.approx(float(targets.max()))}


def test_a_metric_object_of_several_numbers_is_refused() -> None:
    class Vector(SumMetric):
        def compute(self) -> Any:
            return torch.ones(3)

    model = Metrics(on_step=False, on_epoch=True)
    model.val_sum = Vector()
    with pytest.raises(engine.MisconfigurationException, match=r"'sum'.*gives \(3,\), not one number"):
        trainer().validate(model, loader(), verbose=False)


def test_metric_objects_start_anew_after_a_run_that_failed() -> None:
    class Fails(Metrics):
        broken = True

        def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
            if self.broken:
                raise ZeroDivisionError

    model, run = Fails(), trainer()
    with pytest.raises(ZeroDivisionError):
        run.validate(model, loader(), verbose=False)
    model.broken = False
    [result] = run.validate(model, loader(), verbose=False)
    assert result["sum"] == pytest.approx(float(dataset()[:][1].sum()))
