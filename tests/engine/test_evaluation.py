"""Validation, test and prediction: several loaders, modes, gradients, the sanity check."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric
from toy import Memory, Net, Steps, fit, loader, same_bits, trainer, weights


def test_several_loaders_are_numbered_in_steps_hooks_and_names() -> None:
    seen = []

    class Look(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
            seen.append((dataloader_idx, batch_idx))
            self.log("value", float(dataloader_idx + 1))

    class Note(engine.Callback):
        def on_validation_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            seen.append((dataloader_idx, batch_idx))

    results = trainer(callbacks=Note()).validate(Look(), [loader(2), loader(4)], verbose=False)
    assert seen == [(0, 0)] * 2 + [(1, 0)] * 2 + [(1, 1)] * 2
    assert results == [{"value/dataloader_idx_0": 1.0}, {"value/dataloader_idx_1": 2.0}]


def test_values_logged_at_the_end_are_in_the_result_of_every_loader() -> None:
    class Ends(Net):
        def on_validation_epoch_end(self) -> None:
            self.log("end", 5.0)

    results = trainer().validate(Ends(), [loader(2), loader(2)], verbose=False)
    assert [sorted(result) for result in results] == [
        ["end", "val_loss/dataloader_idx_0"],
        ["end", "val_loss/dataloader_idx_1"],
    ]


@pytest.mark.parametrize("on_step", [False, True])
def test_without_the_loaders_number_values_of_all_loaders_are_one(on_step: bool) -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> None:
        options = {"on_step": on_step, "on_epoch": True, "add_dataloader_idx": False}
        model.log("rows", float(len(batch[0])), **options)

    logger = Memory()
    results = trainer(logger=logger).validate(Steps(validation=step), [loader(4, 4), loader(1, 1)], verbose=False)
    name = "rows_epoch" if on_step else "rows"
    # It belongs to the loader in which it was logged first.
    assert results == [{name: pytest.approx(3.4)}, {}]
    assert logger.of("rows_step") == ([(0, 4.0), (0, 1.0)] if on_step else [])


def test_a_single_loader_in_a_list_is_a_single_loader() -> None:
    assert [*trainer().validate(Net(), [loader()], verbose=False)[0]] == ["val_loss"]


def test_loader_hooks_of_data_module_go_before_the_models_and_given_loaders_before_both() -> None:
    class Model(Net):
        def test_dataloader(self) -> Any:
            return loader(8)

        def predict_dataloader(self) -> Any:
            return loader(8)

    class Data(engine.DataModule):
        def test_dataloader(self) -> Any:
            return loader(4)

    model, run = Model(), trainer()
    run.test(model, datamodule=Data(), verbose=False)
    assert model.count("test") == 2
    assert len(run.predict(model, datamodule=Data()) or []) == 4
    run.test(model, loader(6), verbose=False)
    assert model.count("test") == 2 + 3
    with pytest.raises(engine.MisconfigurationException, match="test loaders and a data module were given; give one"):
        run.test(model, loader(6), datamodule=Data())


def test_a_data_module_may_stand_where_loaders_do() -> None:
    class Data(engine.DataModule):
        def train_dataloader(self) -> Any:
            return loader()

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    model, run = Net(), trainer()
    run.fit(model, Data())
    run.test(model, Data(), verbose=False)
    assert (model.count("train"), model.count("val"), model.count("test")) == (4, 4, 4)
    assert len(run.predict(model, Data()) or []) == 4


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_restores_every_mode_and_tracks_no_gradients(stage: str) -> None:
    states = []

    class Look(Net):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            states.append((self.training, self.net.training, y.requires_grad))
            return y

    model = Look()
    model.net.eval()
    getattr(trainer(), stage)(model, loader(2))
    assert states == [(False, False, False)]
    assert model.training and not model.net.training


@pytest.mark.parametrize("wanted", [True, False])
def test_inference_mode_is_used_outside_fit_only(wanted: bool) -> None:
    modes = []
    model = Steps(validation=lambda *_: modes.append(torch.is_inference_mode_enabled()))
    run = trainer(inference_mode=wanted)
    run.validate(model, loader(2), verbose=False)
    run.fit(model, loader(2), loader(2))
    assert modes == [wanted, False]


def test_a_model_can_train_after_it_was_validated() -> None:
    model, run = Net(), trainer()
    run.validate(model, loader(), verbose=False)
    before = weights(model)
    run.fit(model, loader(), loader())
    assert not weights(model).equal(before)


def test_predictions_come_per_batch_and_per_loader_on_the_cpu() -> None:
    model, run = Net(), trainer()
    one = run.predict(model, loader(3))
    assert one is not None and [len(batch) for batch in one] == [2, 1]
    two = run.predict(model, [loader(2), loader(4)])
    assert two is not None and [len(batches) for batches in two] == [1, 2]
    assert torch.cat(one).equal(model(torch.cat([x for x, _ in loader(3)])))
    assert run.predict(model, loader(3), return_predictions=False) is None


def test_prediction_is_forward_by_default() -> None:
    class Plain(Net):
        predict_step = engine.Module.predict_step

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0]

    model = Plain()
    [out] = trainer().predict(model, loader(2)) or []
    assert out.equal(model(next(iter(loader(2)))[0]))


@pytest.mark.parametrize(("steps", "sizes", "expected"), [(2, [8, 2], 3), (-1, [8, 2], 5), (9, [8], 4), (0, [8], 0)])
def test_the_sanity_check_runs_so_many_batches_of_each_loader(steps: int, sizes: list[int], expected: int) -> None:
    model = Net()
    fit(model, None, [loader(size) for size in sizes], num_sanity_val_steps=steps, max_epochs=0)
    assert model.count("val") == expected


def random_state() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:]]


def test_the_sanity_check_leaves_generators_metrics_and_loggers_untouched() -> None:
    notes: dict[str, Any] = {}

    class Drawing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def on_fit_start(self) -> None:
            notes["before"] = random_state()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            torch.rand(3), random.random(), np.random.rand(2)
            self.mean.update(1.0)
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            self.log("val_loss", 1.0)

        def on_train_start(self) -> None:
            notes["after"] = random_state()
            notes["metrics"] = dict(self.trainer.callback_metrics) | self.trainer.logged_metrics
            notes["bar"] = dict(self.trainer.progress_bar_metrics)
            notes["updates"] = self.mean.update_count
            notes["rows"] = list(logger.rows)

    logger, model = Memory(), Drawing()

    class Forward(Drawing):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.mean(torch.rand(()))
            self.log("mean", self.mean, on_step=True, on_epoch=True, prog_bar=True)

    model = Forward()
    fit(model, None, loader(), num_sanity_val_steps=2, max_epochs=1, logger=logger)
    assert same_bits(notes["before"], notes["after"])
    assert (notes["metrics"], notes["bar"], notes["updates"], notes["rows"]) == ({}, {}, 0, [])


def test_validation_within_fit_clears_gradients_and_sees_the_newest_training_values() -> None:
    seen = []

    class Look(Net):
        def on_validation_start(self) -> None:
            seen.append(next(self.parameters()).grad)

    class Watch(engine.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(sorted(trainer.callback_metrics))

    fit(Look(), None, loader(2), callbacks=Watch())
    assert seen == [None, ["train_loss", "val_loss"]]


@pytest.mark.parametrize("profiler", [None, "simple"])
def test_a_step_may_be_decorated_and_take_the_batch_alone(profiler: str | None) -> None:
    class Model(Net):
        @torch.no_grad()
        def validation_step(self, batch: Any) -> None:  # type: ignore[override]
            self.seen.append(("val", len(batch)))

    model = Model()
    fit(model, val=loader(), profiler=profiler)
    assert model.count("val") == 4


def test_what_a_hook_does_to_logged_values_is_not_in_the_state_before_the_validation(tmp_path: Path) -> None:
    class Model(Net):
        def on_validation_epoch_end(self) -> None:
            if self.current_epoch == 0:
                self.log("first", 1.0)
                return
            values = self.trainer.callback_metrics
            values["first"] += 100
            self.trainer.save_checkpoint(tmp_path / "within.ckpt")

    fit(Model(), val=loader(), max_epochs=2)
    [meters] = torch.load(tmp_path / "within.ckpt", weights_only=True)["meters"]
    assert meters["callback_values"]["first"] == 1
