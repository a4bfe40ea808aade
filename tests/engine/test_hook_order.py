"""Which hook runs when: whole traces of fit, validate, test and predict."""

from __future__ import annotations

from typing import Any

import engine
import pytest
from engine.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from toy import Memory, Net, dataset, loader, trainer

LOADERS = [f"{kind}_dataloader" for kind in ("train", "val", "test", "predict")]
TRANSFER = ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]
STEPS = ["training_step", "validation_step", "test_step", "predict_step"]
MODULE = [name for name in dir(engine.Module) if name.startswith("on_")] + [
    *("prepare_data", "setup", "teardown", "configure_model", "configure_callbacks", "configure_optimizers"),
    *("backward", "optimizer_zero_grad", "configure_gradient_clipping", *STEPS, *LOADERS),
    "transfer_batch_to_device",
]
DATA = ["prepare_data", "setup", "teardown", "state_dict", "on_exception", *LOADERS, *TRANSFER]
CALLBACK = [name for name in dir(engine.Callback) if name.startswith("on_")] + ["setup", "teardown", "state_dict"]


def traced(base: type, label: str, names: list[str], trace: list[str]) -> Any:
    """A subclass of `base` that notes `label.name` whenever one of the methods begins."""

    def method(name: str) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            trace.append(f"{label}.{name}")
            return getattr(base, name)(self, *args, **kwargs)

        return run

    return type(base.__name__, (base,), {name: method(name) for name in names})


class Data(engine.DataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(dataset(4), batch_size=2)

    def val_dataloader(self) -> Any:
        return DataLoader(dataset(2), batch_size=2)

    test_dataloader = predict_dataloader = val_dataloader


def both(name: str) -> list[str]:
    return [f"C.{name}", f"M.{name}"]


def evaluation(stage: str) -> list[str]:
    """One batch; the data module's transfer hooks win over the module's."""
    step = [f"M.{stage}_step"]
    return [
        *(f"M.on_{stage}_model_eval", *both(f"on_{stage}_start"), *both(f"on_{stage}_epoch_start")),
        *(f"D.{name}" for name in TRANSFER),
        *(*both(f"on_{stage}_batch_start"), *step, *both(f"on_{stage}_batch_end")),
        *(*both(f"on_{stage}_epoch_end"), *both(f"on_{stage}_end")),
    ]


SETUP = ["M.configure_callbacks", "D.prepare_data", "M.prepare_data", "D.setup", "C.setup", "M.setup"]
SETUP += ["M.configure_model"]
TEARDOWN = ["D.teardown", "C.teardown", "M.teardown", "L.finalize"]
TRAIN_BATCH = [
    *(f"D.{name}" for name in TRANSFER),
    *both("on_train_batch_start"),
    "M.training_step",
    *both("on_before_zero_grad"),
    "M.optimizer_zero_grad",
    *both("on_before_backward"),
    "M.backward",
    *both("on_after_backward"),
    *both("on_before_optimizer_step"),
    "M.configure_gradient_clipping",
    *both("on_train_batch_end"),
]
FIT = [
    *(*SETUP, "M.configure_optimizers", *both("on_fit_start")),
    # Lightning asks for the loader just after on_sanity_check_start; here only the loader says whether to check.
    *("D.val_dataloader", "C.on_sanity_check_start", *evaluation("validation"), "C.on_sanity_check_end"),
    *("D.train_dataloader", *both("on_train_start"), *both("on_train_epoch_start"), *TRAIN_BATCH, *TRAIN_BATCH),
    # Unlike Lightning: what validation may change is as before it in a checkpoint that is saved meanwhile.
    *("C.state_dict", "D.state_dict", "M.on_validation_model_zero_grad", *evaluation("validation")),
    *(*both("on_train_epoch_end"), "K.on_train_epoch_end"),
    *("C.state_dict", "D.state_dict", "C.on_save_checkpoint", "M.on_save_checkpoint"),
    *(*both("on_train_end"), *both("on_fit_end"), *TEARDOWN),
]


@pytest.fixture
def trace() -> list[str]:
    return []


@pytest.fixture
def parts(trace: list[str]) -> dict[str, Any]:
    """Module, data module, callback, checkpoint and logger that all note what is called in `trace`."""
    return {
        "module": traced(Net, "M", MODULE, trace)(),
        "data": traced(Data, "D", DATA, trace)(),
        "callbacks": [
            traced(ModelCheckpoint, "K", ["on_train_epoch_end"], trace)(),
            traced(engine.Callback, "C", CALLBACK, trace)(),
        ],
        "logger": traced(Memory, "L", ["finalize"], trace)(),
    }


def run(parts: dict[str, Any], stage: str) -> None:
    part = trainer(
        callbacks=parts["callbacks"], logger=parts["logger"], num_sanity_val_steps=1, enable_checkpointing=True
    )
    getattr(part, stage)(parts["module"], datamodule=parts["data"])


def test_fit_runs_all_hooks_in_the_order_of_lightning(parts: dict[str, Any], trace: list[str]) -> None:
    run(parts, "fit")
    assert trace == FIT


@pytest.mark.parametrize(("stage", "name"), [("validate", "validation"), ("test", "test")])
def test_evaluation_runs_its_hooks_and_none_of_fit(
    parts: dict[str, Any], trace: list[str], stage: str, name: str
) -> None:
    run(parts, stage)
    request = ["D.val_dataloader" if stage == "validate" else "D.test_dataloader"]
    assert trace == [*SETUP, *request, *evaluation(name), *TEARDOWN]


def test_predict_runs_its_hooks_and_none_of_fit(parts: dict[str, Any], trace: list[str]) -> None:
    run(parts, "predict")
    assert trace == [*SETUP, "D.predict_dataloader", *evaluation("predict"), *TEARDOWN]


def test_checkpoint_hooks_run_in_order_on_resume(parts: dict[str, Any], trace: list[str]) -> None:
    run(parts, "fit")
    path = parts["callbacks"][0].best_model_path
    trace.clear()
    resumed = trainer(callbacks=parts["callbacks"][1:], max_epochs=2)
    resumed.fit(parts["module"], datamodule=parts["data"], ckpt_path=path)
    loading = [name for name in trace if "load_checkpoint" in name or name.endswith(("model", "optimizers"))]
    assert loading == [
        *("M.configure_model", "M.on_load_checkpoint", "C.on_load_checkpoint", "M.configure_optimizers"),
    ]


def test_stages_are_given_to_setup_and_teardown() -> None:
    stages = []

    class Note(engine.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            stages.append(("setup", stage))

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            stages.append(("teardown", stage))

    part = trainer(callbacks=Note())
    part.fit(Net(), loader(), loader())
    part.validate(dataloaders=loader(), verbose=False)
    part.test(dataloaders=loader(), verbose=False)
    part.predict(dataloaders=loader())
    names = ["fit", "validate", "test", "predict"]
    assert stages == [(moment, name) for name in names for moment in ("setup", "teardown")]


def test_module_hooks_get_the_transfer_of_the_module_where_the_data_module_has_none() -> None:
    class Doubling(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [2 * part for part in batch]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.first = batch[0]

    model = Doubling()
    trainer(limit_train_batches=1).fit(model, datamodule=Data())
    assert model.first.equal(2 * dataset(2)[:][0])
