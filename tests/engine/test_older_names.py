"""Arguments, attributes, names and modules of older Lightning versions: found where they are now, or refused."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import engine
import pytest
from engine.older_names import ARGUMENTS, MODULES, NAMES, TRAINER, VALUES
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Net, fit, trainer

# Arguments.
TAKERS = {
    "Trainer": engine.Trainer,
    "fit": engine.Trainer.fit,
    "validate": engine.Trainer.validate,
    "test": engine.Trainer.test,
    "predict": engine.Trainer.predict,
    "ModelCheckpoint": engine.callbacks.ModelCheckpoint,
    "DataModule": engine.DataModule,
}


def call(taker: str, **arguments: Any) -> Any:
    if taker in ("Trainer", "DataModule"):
        return getattr(engine, taker)(**arguments)
    if taker == "ModelCheckpoint":
        return engine.callbacks.ModelCheckpoint(**arguments)
    return getattr(trainer(), taker)(Net(), **arguments)


def refusal(taker: str, **arguments: Any) -> str:
    with pytest.raises(engine.MisconfigurationException) as caught:
        call(taker, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def parameters_of(taker: str) -> list[str]:
    return [p.name for p in inspect.signature(TAKERS[taker]).parameters.values() if p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize("taker", ARGUMENTS)
def test_an_argument_of_older_versions_is_refused_with_todays(taker: str) -> None:
    for name in ARGUMENTS[taker]:
        assert name not in parameters_of(taker)
        message = refusal(taker, **{name: 7})
        assert message.startswith(f"{taker} has no argument {name}=7: ") and "{" not in message.replace("{epoch}", "")


def test_what_the_advice_names_exists() -> None:
    run = fit(Net())
    texts = [text for names in ARGUMENTS.values() for text in names.values()] + list(VALUES.values())
    for text in texts + list(TRAINER.values()) + list(NAMES.values()):
        for name in re.findall(r"callbacks=\[(\w+)", text):
            assert hasattr(engine.callbacks, name), text
        for name in re.findall(r"\btrainer\.(\w+)", text):
            assert hasattr(run, name), text
        for name in re.findall(r"Trainer\((\w+)=", text):
            assert name in parameters_of("Trainer"), text
    for taker, names in ARGUMENTS.items():
        for text in names.values():
            for name in re.findall(r"write (\w+)=", text):
                assert name in parameters_of(taker), text
    for name, text in NAMES.items():
        if written := re.fullmatch(r"write (\w+)", text):
            places = (engine, engine.callbacks, engine.loggers)
            assert any(hasattr(place, written[1]) for place in places), (name, text)


def test_all_wrong_arguments_are_told_at_once() -> None:
    message = refusal("Trainer", gpus=2, progress_bar_refresh_rate=20, max_epoch=3, zzz=None, max_epochs=1)
    assert message == (
        'Trainer has no argument gpus=2: write accelerator="gpu", devices=2; '
        "and no progress_bar_refresh_rate=20: write enable_progress_bar=False for none, or "
        "callbacks=[TQDMProgressBar(refresh_rate=20)]; "
        "and no max_epoch=3: did you mean max_epochs?; and no zzz=None: leave it out"
    )


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*ARGUMENTS["Trainer"], "max_epoch", "callback", "acelerator", "zzz"]),
        st.one_of(st.none(), st.integers(), st.text(), st.just(Net), st.lists(st.text(), max_size=3)),
        min_size=1,
    )
)
def test_any_older_arguments_give_one_line(arguments: dict[str, Any]) -> None:
    message = refusal("Trainer", **arguments)
    assert all(f"{name}=" in message for name in arguments)
    assert len(message) < 400 * len(arguments)


@pytest.mark.parametrize("taker", ["fit", "validate", "test", "predict", "ModelCheckpoint", "DataModule"])
def test_misspelt_arguments_are_refused_too(taker: str) -> None:
    nearest = {"ModelCheckpoint": ("monitors", "monitor"), "DataModule": ("zzz", "leave it out")}
    wrong, right = nearest.get(taker, ("data_module", "datamodule"))
    assert right in refusal(taker, **{wrong: 1})


VALUES_REFUSED = [
    ("accelerator", "ddp", 'write accelerator="auto", strategy="ddp", and start the program with torchrun'),
    ("accelerator", "dp", 'strategy="ddp"'),
    ("accelerator", "ddp_spawn", 'strategy="ddp"'),
    ("accelerator", "horovod", 'strategy="ddp"'),
    ("strategy", "dp", 'write strategy="ddp"'),
    ("strategy", "ddp2", 'write strategy="ddp"'),
    ("strategy", "ddp_spawn", 'write strategy="ddp"'),
    ("strategy", "horovod", 'write strategy="ddp"'),
    ("profiler", True, 'write profiler="simple"'),
    ("max_steps", None, "write max_steps=-1"),
    ("accumulate_grad_batches", {0: 4, 5: 2}, "write callbacks=[GradientAccumulationScheduler({0: 4, 5: 2})]"),
    ("accelerator", "tpu", "available: auto, cpu"),
    ("strategy", "bagua", "ddp"),
    ("precision", "16-bit", "16-mixed"),
]


@pytest.mark.parametrize(("name", "value", "advice"), VALUES_REFUSED)
def test_a_value_of_older_versions_is_refused_with_todays(name: str, value: Any, advice: str) -> None:
    message = refusal("Trainer", **{name: value})
    assert f"{name}={value!r}" in message and advice in message


def test_values_of_older_versions_that_still_mean_something_are_taken() -> None:
    taken = {"logger": None, "callbacks": None, "precision": 32, "max_time": {"minutes": 3}, "profiler": None}
    run = engine.Trainer(accelerator="cpu", devices="1", val_check_interval=0.5, limit_train_batches=0.5, **taken)
    assert run.precision == "32-true" and run.callbacks


# Attributes and names in modules.


def test_an_attribute_of_the_trainer_that_is_no_more_is_refused_with_todays() -> None:
    for owner, name in ((owner, name) for owner in (engine.Trainer, trainer()) for name in TRAINER):
        with pytest.raises(engine.MisconfigurationException) as caught:
            getattr(owner, name)
        assert str(caught.value) == f"Trainer.{name} is not here; {TRAINER[name]}"
        assert not hasattr(owner, name)


@pytest.mark.parametrize("module", ["engine", "engine.callbacks", "engine.loggers", "engine.utilities", "engine.core"])
def test_a_name_that_is_no_more_is_refused_with_todays(module: str) -> None:
    for name, advice in NAMES.items():
        message = re.escape(f"{module}.{name} is not here; {advice}")
        with pytest.raises(engine.MisconfigurationException, match=message):
            getattr(importlib.import_module(module), name)
        with pytest.raises(engine.MisconfigurationException, match=message):
            exec(f"from {module} import {name}")


FOUND = [
    ("core.lightning", "LightningModule", engine.Module),
    ("core.module", "LightningModule", engine.Module),
    ("core.datamodule", "LightningDataModule", engine.DataModule),
    ("core", "LightningModule", engine.Module),
    ("trainer.trainer", "Trainer", engine.Trainer),
    ("trainer", "Trainer", engine.Trainer),
    ("callbacks.base", "Callback", engine.Callback),
    ("callbacks", "Callback", engine.Callback),
    ("callbacks.early_stopping", "EarlyStopping", engine.callbacks.EarlyStopping),
    ("callbacks.model_checkpoint", "ModelCheckpoint", engine.callbacks.ModelCheckpoint),
    ("callbacks.lr_monitor", "LearningRateMonitor", engine.callbacks.LearningRateMonitor),
    ("callbacks.progress", "TQDMProgressBar", engine.callbacks.TQDMProgressBar),
    ("loggers", "TensorBoardLogger", engine.loggers.TensorBoardLogger),
    ("loggers.tensorboard", "TensorBoardLogger", engine.loggers.TensorBoardLogger),
    ("loggers.base", "LightningLoggerBase", engine.loggers.Logger),
    ("utilities.seed", "seed_everything", engine.seed_everything),
    ("utilities.exceptions", "MisconfigurationException", engine.MisconfigurationException),
    ("utilities.types", "STEP_OUTPUT", Any),
    ("utilities.types", "EVAL_DATALOADERS", Any),
]


@pytest.mark.parametrize(("module", "name", "found"), FOUND)
def test_what_is_elsewhere_here_is_found_where_it_was(module: str, name: str, found: Any) -> None:
    names: dict[str, Any] = {}
    exec(f"from engine.{module} import {name}", names)
    assert names[name] is found
    exec(f"import engine.{module} as there", names)
    assert getattr(names["there"], name) is found


@pytest.mark.parametrize("module", ["utilities", "utilities.rank_zero", "utilities.distributed"])
def test_rank_zero_only_is_found_where_it_was(module: str) -> None:
    names: dict[str, Any] = {}
    exec(f"from engine.{module} import rank_zero_only\n@rank_zero_only\ndef three(): return 3", names)
    assert names["three"]() == 3


def test_metrics_are_those_of_torchmetrics() -> None:
    for line in ("import engine.metrics as m; m.Accuracy()", "import engine as pl; pl.metrics.Accuracy()"):
        with pytest.raises(engine.MisconfigurationException, match="write torchmetrics.Accuracy, with task="):
            exec(line)
    for line in (
        "from engine.metrics.functional import accuracy",
        "import engine as pl; pl.metrics.functional.accuracy",
    ):
        with pytest.raises(
            engine.MisconfigurationException, match="write torchmetrics.functional.accuracy, with task="
        ):
            exec(line)


def test_names_that_never_were_are_errors_of_python() -> None:
    for module in ("engine", "engine.callbacks", "engine.metrics", "engine.core.lightning", "engine.utilities.types"):
        there = importlib.import_module(module)
        assert not hasattr(there, "nothing") and not hasattr(there, "__nothing__") and not hasattr(there, "_nothing")
        with pytest.raises(ImportError, match="cannot import name 'nothing'"):
            exec(f"from {module} import nothing")
    with pytest.raises(ModuleNotFoundError):
        exec("import engine.core.nothing")


def test_no_module_of_the_engine_is_hidden_by_one_that_was() -> None:
    root = Path(engine.__file__).parent
    for name in MODULES:
        path = root / name.replace(".", "/")
        assert not path.with_suffix(".py").exists() and not path.is_dir(), name
        assert f"engine.{name}" in sys.modules
