"""The names users type: whatever Lightning has, ours has too with the same default, or a table here says why not."""

from __future__ import annotations

import inspect
from typing import Any

import engine
import pytest
import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback
from torch import nn

CLUSTER = "for clusters, strategies and launchers that a bundled engine does not carry"
INTERNAL = "Lightning's own machinery, which user code does not call"
OTHER_TOOL = "belongs to a tool outside the engine"

# Name in Lightning: why it is not here.
NO_TRAINER_ARGUMENT = {
    "plugins": CLUSTER,
    "model_registry": OTHER_TOOL,
}
# Name: (Lightning's default, ours), with the reason.
OTHER_DEFAULT: dict[str, tuple[Any, Any, str]] = {}
NO_TRAINER_ATTRIBUTE = {
    "accelerator": INTERNAL,
    "configure_optimizers": INTERNAL,
    "device_ids": CLUSTER,
    "distributed_sampler_kwargs": INTERNAL,
    "early_stopping_callbacks": "early_stopping_callback is the first; the rest are in callbacks",
    "init_module": "build large parts in configure_model",
    "model": INTERNAL,
    "scaler": INTERNAL,
    "received_sigterm": "signals end the run at the next step, with a checkpoint",
}
NO_MODULE_ATTRIBUTE = {
    "fabric": OTHER_TOOL,
    "device_mesh": CLUSTER,
    "configure_sharded_model": "old name of configure_model",
    "to_torchscript": "torch.export and to_onnx are torch's own ways",
    "to_tensorrt": OTHER_TOOL,
    "CHECKPOINT_HYPER_PARAMS_KEY": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_NAME": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_TYPE": INTERNAL,
    "allow_zero_length_dataloader_with_multiple_devices": "an empty loader is refused with its reason",
    "prepare_data_per_node": CLUSTER,
    "on_gpu": "self.device.type says it",
}
NO_DATAMODULE_ATTRIBUTE = {
    "name": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_KEY": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_NAME": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_TYPE": INTERNAL,
    "allow_zero_length_dataloader_with_multiple_devices": "an empty loader is refused with its reason",
    "prepare_data_per_node": CLUSTER,
}
NO_LOG_ARGUMENT = {"enable_graph": "logged values are always detached, so that no graph is kept alive"}
CALLBACKS = [
    *("ModelCheckpoint", "EarlyStopping", "LearningRateMonitor", "ModelSummary", "Timer", "LambdaCallback"),
    *("GradientAccumulationScheduler", "StochasticWeightAveraging", "LearningRateFinder", "BasePredictionWriter"),
    *("EMAWeightAveraging", "WeightAveraging", "RichProgressBar", "TQDMProgressBar", "DeviceStatsMonitor"),
]
NO_CALLBACK = {
    "DeviceStatsMonitor": OTHER_TOOL,
}
NO_CALLBACK_ARGUMENT: dict[tuple[str, str], str] = {}
LOGGERS = ["TensorBoardLogger", "CSVLogger"]


def public(cls: type, *bases: type) -> list[str]:
    """Public names of a class that none of `bases` has."""
    return [name for name in dir(cls) if name[0] != "_" and not any(hasattr(base, name) for base in bases)]


def parameters(function: Any) -> dict[str, Any]:
    """Names and defaults of a function's parameters, but for the first."""
    found = list(inspect.signature(function).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default for p in found if p.kind in named}


def check_names(ours: Any, theirs: list[str], table: dict[str, str]) -> None:
    """Every name of theirs is ours, or in the table; the table has no name that is ours, or none of theirs."""
    missing = [name for name in theirs if not hasattr(ours, name) and name not in table]
    assert not missing, f"neither here nor in the table: {missing}"
    assert not (stale := [name for name in table if hasattr(ours, name) or name not in theirs]), f"delete {stale}"


def test_arguments_of_the_trainer() -> None:
    ours, theirs = parameters(engine.Trainer.__init__), parameters(lightning.Trainer.__init__)
    missing = [name for name in theirs if name not in ours and name not in NO_TRAINER_ARGUMENT]
    assert not missing, f"neither here nor in the table: {missing}"
    assert not [name for name in NO_TRAINER_ARGUMENT if name in ours or name not in theirs]
    different = {
        name: (theirs[name], ours[name])
        for name in theirs
        if name in ours and (ours[name] != theirs[name] or type(ours[name]) is not type(theirs[name]))
    }
    assert different == {name: (a, b) for name, (a, b, _) in OTHER_DEFAULT.items()}


def test_entry_points_take_the_same_arguments() -> None:
    for name in ("fit", "validate", "test", "predict", "save_checkpoint"):
        ours = parameters(getattr(engine.Trainer, name))
        theirs = parameters(getattr(lightning.Trainer, name))
        missing = {"weights_only", "storage_options"} & theirs.keys() - ours.keys()
        kept = [argument for argument in theirs if argument not in missing]
        # In the same order too, since they are given by position.
        assert list(ours)[: len(kept)] == kept, name
        assert {argument: theirs[argument] for argument in kept} == {argument: ours[argument] for argument in kept}, name


def test_attributes_of_the_trainer() -> None:
    instance = engine.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    check_names_of_instance(instance, engine.Trainer, public(lightning.Trainer), NO_TRAINER_ATTRIBUTE)


def check_names_of_instance(instance: Any, cls: type, theirs: list[str], table: dict[str, str]) -> None:
    known = {*dir(cls), *vars(instance), *inspect.get_annotations(cls)}
    missing = [name for name in theirs if name not in known and name not in table]
    assert not missing, f"neither here nor in the table: {missing}"
    assert not (stale := [name for name in table if name in known or name not in theirs]), f"delete {stale}"


def test_attributes_of_the_module() -> None:
    check_names(engine.LightningModule, public(lightning.LightningModule, nn.Module), NO_MODULE_ATTRIBUTE)


def test_attributes_of_the_data_module() -> None:
    check_names(engine.LightningDataModule, public(lightning.LightningDataModule), NO_DATAMODULE_ATTRIBUTE)


def test_hooks_of_callbacks_and_their_parameters() -> None:
    for name in public(lightning.Callback):
        assert hasattr(engine.Callback, name), name
        if callable(getattr(lightning.Callback, name)):
            assert [*parameters(getattr(engine.Callback, name))] == [*parameters(getattr(lightning.Callback, name))], name


# Free arguments in Lightning, so that users choose them.
FREE = ("training_step", "validation_step", "test_step", "predict_step", "forward")


@pytest.mark.parametrize("pair", ["LightningModule", "LightningDataModule"])
def test_parameters_of_methods(pair: str) -> None:
    ours, theirs = getattr(engine, pair), getattr(lightning, pair)
    for name in public(theirs, nn.Module):
        method = inspect.getattr_static(theirs, name)
        if name in FREE or not inspect.isfunction(method) or not hasattr(ours, name):
            continue
        skipped = NO_LOG_ARGUMENT if name in ("log", "log_dict") else {}
        wanted = {key: value for key, value in parameters(method).items() if key not in skipped}
        given = parameters(getattr(ours, name))
        assert wanted.items() <= given.items(), f"{name}: {wanted} there, {given} here"


def test_arguments_of_log() -> None:
    ours, theirs = parameters(engine.LightningModule.log), parameters(lightning.LightningModule.log)
    assert not [name for name in NO_LOG_ARGUMENT if name in ours or name not in theirs]
    assert {name: default for name, default in theirs.items() if name not in NO_LOG_ARGUMENT} == ours


@pytest.mark.parametrize("name", CALLBACKS)
def test_arguments_of_callbacks(name: str) -> None:
    if name in NO_CALLBACK:
        assert not hasattr(engine.callbacks, name)
        return
    check_constructor(getattr(engine.callbacks, name), getattr(lightning.callbacks, name))


def test_every_callback_of_lightning_is_considered() -> None:
    names = [n for n, c in vars(lightning.callbacks).items() if isinstance(c, type) and issubclass(c, Callback)]
    known = {*CALLBACKS, *NO_CALLBACK, *(n for n in names if hasattr(engine.callbacks, n))}
    assert not [name for name in names if name not in known]


@pytest.mark.parametrize("name", LOGGERS)
def test_arguments_of_loggers(name: str) -> None:
    check_constructor(getattr(engine.loggers, name), getattr(lightning.loggers, name))


def check_constructor(ours: type, theirs: type) -> None:
    """Every argument is there with the same default, or in the table."""
    wanted, given = parameters(theirs.__init__), parameters(ours.__init__)
    missing = {name: default for name, default in wanted.items() if (ours.__name__, name) not in NO_CALLBACK_ARGUMENT}
    assert missing.items() <= given.items(), f"{missing} there, {given} here"
