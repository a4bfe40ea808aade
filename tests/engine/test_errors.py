"""A run that fails, and modules that would fail silently."""

from __future__ import annotations

from typing import Any

import engine
import pytest
import torch
from toy import Memory, Net, loader, trainer


class Boom(Exception):
    pass


def failing(base: type, hook: str, error: type[BaseException] = Boom) -> Any:
    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise error(hook)

    return type(base.__name__, (base,), {hook: fail})()


class Data(engine.DataModule):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def on_exception(self, exception: BaseException) -> None:
        self.notes.append(f"D.on_exception {type(exception).__name__}")

    def teardown(self, stage: str) -> None:
        self.notes.append(f"D.teardown {stage}")


class Watch(engine.Callback):
    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.notes.append(f"C.on_exception {type(exception).__name__}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.notes.append(f"C.teardown {stage}")


class Model(Net):
    notes: list[str]

    def teardown(self, stage: str) -> None:
        self.notes.append(f"M.teardown {stage}")


def attempt(model: Any, data: Data, error: type[BaseException]) -> Memory:
    logger = Memory()
    model.notes = data.notes
    run = trainer(callbacks=Watch(data.notes), logger=logger, num_sanity_val_steps=1)
    with pytest.raises(error):
        run.fit(model, datamodule=data)
    return logger


HOOKS = [
    *("setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start"),
    *("on_train_batch_start", "training_step", "on_before_zero_grad", "backward", "on_before_optimizer_step"),
    *("on_train_batch_end", "validation_step", "on_validation_epoch_end", "on_train_epoch_end", "on_train_end"),
    *("on_fit_end",),
]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_in_a_hook_is_reported_torn_down_after_and_raised_unchanged(hook: str) -> None:
    data = Data()
    logger = attempt(failing(Model, hook), data, Boom)
    assert data.notes == [
        *("C.on_exception Boom", "D.on_exception Boom"),
        *("D.teardown fit", "C.teardown fit", "M.teardown fit"),
    ]
    assert logger.status == ["failed"]


@pytest.mark.parametrize("hook", ["prepare_data", "setup", "train_dataloader", "val_dataloader"])
def test_an_error_in_the_data_module_is_treated_alike(hook: str) -> None:
    data = failing(Data, hook)
    attempt(Model(), data, Boom)
    assert data.notes[0] == "C.on_exception Boom"
    assert data.notes[-1] == "M.teardown fit"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_and_exit_tear_down_and_reach_the_caller(error: type[BaseException]) -> None:
    data = Data()
    attempt(failing(Model, "training_step", error), data, error)
    assert data.notes[0] == f"C.on_exception {error.__name__}"
    assert data.notes[-1] == "M.teardown fit"


def test_a_trainer_works_again_after_an_error_in_the_sanity_check() -> None:
    class Once(Net):
        fails = True

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if self.fails:
                raise Boom
            super().validation_step(batch, batch_idx)

    model, logger = Once(), Memory()
    run = trainer(num_sanity_val_steps=1, logger=logger)
    with pytest.raises(Boom):
        run.fit(model, loader(), loader())
    model.fails = False
    run.validate(model, loader(), verbose=False)
    assert model.count("val") == 4
    assert logger.of("val_loss")


def test_names_are_clean_again_after_an_error_in_a_second_loader() -> None:
    class Second(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if dataloader_idx:
                raise Boom

    run = trainer()
    with pytest.raises(Boom):
        run.validate(Second(), [loader(), loader()], verbose=False)
    run.fit(Net(), loader())
    assert set(run.callback_metrics) == {"train_loss"}


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_missing_step_is_named(stage: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match="has no .*_step; write one"):
        getattr(trainer(), stage)(engine.Module() if stage != "fit" else NoStep(), loader())


class NoStep(engine.Module):
    def configure_optimizers(self) -> Any:
        return Net().configure_optimizers()


def test_missing_parts_are_named() -> None:
    class NoOptimizer(Net):
        configure_optimizers = engine.Module.configure_optimizers

    with pytest.raises(engine.MisconfigurationException, match="NoOptimizer has no configure_optimizers"):
        trainer().fit(NoOptimizer(), loader())
    with pytest.raises(engine.MisconfigurationException, match="0 train loaders"):
        trainer().fit(Net())
    with pytest.raises(engine.MisconfigurationException, match="2 train loaders"):
        trainer().fit(Net(), [loader(), loader()])
    with pytest.raises(engine.MisconfigurationException, match="no model was given"):
        trainer().validate(dataloaders=loader())
    with pytest.raises(engine.MisconfigurationException, match="not attached to a Trainer"):
        _ = Net().trainer


def test_callbacks_that_would_overwrite_each_others_state_are_refused() -> None:
    class Counting(engine.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    with pytest.raises(engine.MisconfigurationException, match="override state_key"):
        trainer(callbacks=[Counting(), Counting()])


def test_a_dict_of_train_loaders_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="the train loaders were given as a dict; give one"):
        trainer().fit(Net(), {"a": loader()})


def test_modes_come_back_after_an_error_in_validation() -> None:
    model = failing(Net, "on_validation_batch_start")
    model.net.eval()
    with pytest.raises(Boom):
        trainer().validate(model, loader())
    assert model.training and not model.net.training


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_without_loaders_is_refused(stage: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match=f"nothing to {stage} on"):
        getattr(trainer(), stage)(Net())


def test_a_train_loader_without_batches_is_refused_unless_asked_for() -> None:
    empty = loader(2, batch_size=8, drop_last=True)
    with pytest.raises(engine.MisconfigurationException, match="no batch; is batch_size too large for drop_last"):
        trainer().fit(Net(), empty)
    trainer(limit_train_batches=0).fit(Net(), loader())


def test_a_model_that_is_no_module_of_the_engine_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="the model is a Linear"):
        trainer().fit(torch.nn.Linear(1, 1), loader())  # type: ignore[arg-type]
