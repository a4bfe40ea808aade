"""The names users type: whatever Lightning has, ours has too with the same default, or a table here says why not."""

from __future__ import annotations

import inspect
from typing import Any

import engine
import pytest
import pytorch_lightning as lightning
import torch
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
# Arguments whose default is None in Lightning, which stands for the value that is the default here.
PLAIN_DEFAULT = {
    "precision": "32-true",
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "limit_predict_batches": 1.0,
    "val_check_interval": 1.0,
}
NO_TRAINER_ATTRIBUTE = {
    "accelerator": INTERNAL,
    "device_ids": CLUSTER,
    "distributed_sampler_kwargs": INTERNAL,
    "init_module": "build large parts in configure_model",
}
NO_MODULE_ATTRIBUTE = {
    "remove_ignored_hparams": INTERNAL,
    "fabric": OTHER_TOOL,
    "configure_sharded_model": "old name of configure_model",
    "to_tensorrt": OTHER_TOOL,
    "CHECKPOINT_HYPER_PARAMS_KEY": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_NAME": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_TYPE": INTERNAL,
}
NO_DATAMODULE_ATTRIBUTE = {
    "remove_ignored_hparams": INTERNAL,
    "name": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_KEY": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_NAME": INTERNAL,
    "CHECKPOINT_HYPER_PARAMS_TYPE": INTERNAL,
}
NO_LOG_ARGUMENT: dict[str, str] = {}
CALLBACKS = [
    *("Callback", "Checkpoint", "ModelCheckpoint", "OnExceptionCheckpoint", "EarlyStopping", "LearningRateMonitor"),
    *("LearningRateFinder", "ModelSummary", "RichModelSummary", "ProgressBar", "RichProgressBar", "TQDMProgressBar"),
    *("Timer", "LambdaCallback", "GradientAccumulationScheduler", "BasePredictionWriter"),
    *("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"),
]
TASK = "a way to train rather than a tool: some twenty lines with the hooks, which belong to the project"
MEASURE = "measured with torch's own functions and self.log, or with Trainer(profiler=...)"
NO_CALLBACK = {
    "BackboneFinetuning": TASK,
    "BaseFinetuning": TASK,
    "BatchSizeFinder": "an error for want of memory says which batch size to try",
    "DeviceStatsMonitor": MEASURE,
    "ModelPruning": TASK,
    "SpikeDetection": "detect_nonfinite stops at a loss that is none",
    "ThroughputMonitor": MEASURE,
}
OTHER_ARGUMENT = {
    ("RichProgressBar", "refresh_rate"): "times a second rather than batches, which may take hours or microseconds",
    ("RichProgressBar", "theme"): "None for the colours of the terminal",
}
LOGGERS = ["TensorBoardLogger", "CSVLogger"]


def public(cls: type, *bases: type) -> list[str]:
    """Public names of a class that none of `bases` has."""
    return [name for name in dir(cls) if name[0] != "_" and not any(hasattr(base, name) for base in bases)]


def parameters(function: Any) -> dict[str, Any]:
    """Names and defaults of a function's parameters, but for the first."""
    found = list(inspect.signature(function).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        p.name: str(p.default) if isinstance(p.default, torch.device) else p.default for p in found if p.kind in named
    }


def takes_any(function: Any) -> bool:
    """Whether a function takes arguments of any name, and so passes on those of another one."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


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
    assert different == {name: (None, default) for name, default in PLAIN_DEFAULT.items()}


def test_entry_points_take_the_same_arguments() -> None:
    for name in ("fit", "validate", "test", "predict", "save_checkpoint"):
        ours = parameters(getattr(engine.Trainer, name))
        theirs = parameters(getattr(lightning.Trainer, name))
        missing = {"weights_only", "storage_options"} & theirs.keys() - ours.keys()
        kept = [argument for argument in theirs if argument not in missing]
        # In the same order too, since they are given by position.
        assert list(ours)[: len(kept)] == kept, name
        assert {argument: theirs[argument] for argument in kept} == {argument: ours[argument] for argument in kept}, (
            name
        )


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
            assert [*parameters(getattr(engine.Callback, name))] == [*parameters(getattr(lightning.Callback, name))], (
                name
            )


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
        if takes_any(getattr(ours, name)):
            wanted = {key: value for key, value in wanted.items() if key in given}
        assert wanted.items() <= given.items(), f"{name}: {wanted} there, {given} here"


def test_arguments_of_log() -> None:
    ours, theirs = parameters(engine.LightningModule.log), parameters(lightning.LightningModule.log)
    assert not [name for name in NO_LOG_ARGUMENT if name in ours or name not in theirs]
    assert {name: default for name, default in theirs.items() if name not in NO_LOG_ARGUMENT} == ours


@pytest.mark.parametrize("name", CALLBACKS)
def test_arguments_of_callbacks(name: str) -> None:
    check_constructor(getattr(engine.callbacks, name), getattr(lightning.callbacks, name))


def test_every_callback_of_lightning_is_here_or_in_the_table() -> None:
    names = [n for n, c in vars(lightning.callbacks).items() if isinstance(c, type) and issubclass(c, Callback)]
    assert sorted(names) == sorted([*CALLBACKS, *NO_CALLBACK])
    assert not [name for name in NO_CALLBACK if name in vars(engine.callbacks)]


@pytest.mark.parametrize("name", LOGGERS)
def test_arguments_of_loggers(name: str) -> None:
    check_constructor(getattr(engine.loggers, name), getattr(lightning.loggers, name))


def check_constructor(ours: type, theirs: type) -> None:
    """Every argument is there with the same default, or in the table, which has no other."""
    wanted, given = parameters(theirs.__init__), parameters(ours.__init__)
    if takes_any(ours.__init__):
        wanted = {name: default for name, default in wanted.items() if name in given}
    different = [name for name, default in wanted.items() if name not in given or given[name] != default]
    assert different == [name for owner, name in OTHER_ARGUMENT if owner == ours.__name__], f"{wanted}, {given}"
