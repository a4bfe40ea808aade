"""Validate, test and predict on their own, after fit, and on several loaders."""

from __future__ import annotations

from typing import Any

import deviations
import parts
import pytest
from harness import Side, same


def evaluate(side: Side, stage: str, lengths: tuple[int, ...] = (3,), **options: Any) -> Any:
    """Run one stage on recorded loaders' worth of data, and keep the result."""
    trainer = side.trainer(**options)
    cls = parts.several if len(lengths) > 1 else parts.net
    given = parts.loaders(lengths) if len(lengths) > 1 else parts.loader(lengths[0])
    verbose = {} if stage == "predict" else {"verbose": False}
    side.observe(stage, getattr(trainer, stage)(side.module(cls), given, **verbose))
    return trainer


STAGES = ["validate", "test", "predict"]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "one_loader": {},
    "two_loaders": {"lengths": (2, 3)},
    "list_of_one": {"lengths": (2,)},
    "no_inference_mode": {"inference_mode": False},
    "fast_dev_run": {"fast_dev_run": True},
    "limit_1": {"limit": 1},
    "limit_half_of_several": {"limit": 0.5, "lengths": (2, 4)},
    "limit_0": {"limit": 0},
    "double": {"precision": "64-true"},
    "no_logger": {"logger": False},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_the_trainer(stage: str, name: str) -> None:
    options = dict(ARGUMENTS[name])
    if "limit" in options:
        options[f"limit_{ {'validate': 'val'}.get(stage, stage) }_batches"] = options.pop("limit")
    same(lambda side: evaluate(side, stage, **options))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lengths", [(2,), (2, 1)])
def test_data_module(stage: str, lengths: tuple[int, ...]) -> None:
    def program(side: Side) -> None:
        trainer, datamodule = side.trainer(), side.datamodule(val=lengths)
        module = side.module(parts.several if len(lengths) > 1 else parts.net)
        side.observe(stage, getattr(trainer, stage)(module, datamodule=datamodule))

    same(program)


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_weights_without_naming_the_model(stage: str) -> None:
    def program(side: Side) -> None:
        checkpoint = side.pl.callbacks.ModelCheckpoint(dirpath="files", monitor="train_loss_epoch")
        trainer = side.trainer(callbacks=[side.callback(), checkpoint], max_epochs=3, enable_checkpointing=True)
        trainer.fit(side.module(lr=2.0), parts.loader(4), parts.loader(1))
        side.observe(stage, getattr(trainer, stage)(dataloaders=parts.loader(2)))

    same(program)


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_weights_of_a_run_without_checkpoints(stage: str) -> None:
    def program(side: Side) -> None:
        trainer = side.trainer()
        trainer.fit(side.module(), parts.loader(4), parts.loader(1))
        getattr(trainer, stage)(dataloaders=parts.loader(2))

    same(program, deviations.REFUSED_AT_ONCE, deviations.REFUSED, refused=True)


def test_all_stages_after_each_other() -> None:
    def program(side: Side) -> None:
        trainer, module, datamodule = side.trainer(max_epochs=1), side.module(), side.datamodule()
        for number, stage in enumerate(["validate", "fit", "validate", "test", "predict"]):
            side.note(stage)
            side.observe(f"{number} {stage}", getattr(trainer, stage)(module, datamodule=datamodule))

    same(program)


def test_predictions_that_are_not_kept() -> None:
    def program(side: Side) -> None:
        side.observe("predict", side.trainer().predict(side.module(), parts.loader(2), return_predictions=False))

    same(program)


def default_predict_step(pl: Any) -> type:
    class Forward(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = parts.net(pl)().net

        def forward(self, batch: Any) -> Any:
            return self.net(batch[0])

    return Forward


def test_prediction_by_forward() -> None:
    def program(side: Side) -> None:
        side.observe("predict", side.trainer().predict(side.module(default_predict_step), parts.loader(2)))

    same(program)


def only_batch(pl: Any) -> type:
    class OnlyBatch(parts.net(pl)):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            return self.loss(batch)

        def validation_step(self, batch: Any) -> Any:
            self.log("val_loss", self.loss(batch))

        def test_step(self, batch: Any) -> Any:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any) -> Any:
            return self(batch[0])

    return OnlyBatch


def test_steps_without_batch_idx() -> None:
    def program(side: Side) -> None:
        trainer, module = side.trainer(max_epochs=1), side.module(only_batch)
        trainer.fit(module, parts.loader(2), parts.loader(2))
        for stage in STAGES:
            side.observe(stage, getattr(trainer, stage)(module, parts.loader(2)))

    same(program)


def frozen(pl: Any) -> type:
    class Frozen(parts.net(pl)):  # type: ignore[misc]
        def on_train_start(self) -> None:
            self.net[0].eval()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.log("frozen", float(self.net[0].training), on_step=True)

    return Frozen


def test_a_part_in_evaluation_mode_stays_in_it() -> None:
    def program(side: Side) -> None:
        side.trainer().fit(side.module(frozen), parts.loader(2), parts.loader(1))

    same(program)


def replaced_modes(pl: Any) -> type:
    class Modes(parts.net(pl)):  # type: ignore[misc]
        def on_validation_model_eval(self) -> None:
            self.net.eval()

        def on_validation_model_train(self) -> None:
            self.log_mode = self.net.training
            self.net.train()

        def on_test_model_train(self) -> None:
            self.train()

        def on_predict_model_train(self) -> None:
            self.train()

    return Modes


def test_modes_set_by_the_module() -> None:
    def program(side: Side) -> None:
        trainer, module = side.trainer(max_epochs=1), side.module(replaced_modes)
        trainer.fit(module, parts.loader(2), parts.loader(1))
        for stage in STAGES:
            getattr(trainer, stage)(module, parts.loader(1))
            side.observe(f"mode after {stage}", [part.training for part in module.modules()])
        side.observe("mode seen", module.log_mode)

    same(program)
