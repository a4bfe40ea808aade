"""What was written for earlier versions of Lightning: epoch ends with outputs, step ends, names that are no more."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.older_names import ARGUMENTS, MODULES, NAMES, TRAINER, VALUES
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Net, fit, loader, trainer


class Ends(Net):
    """A `Net` with the older hooks at the end of epochs; keeps what they get, and the order of all."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.outputs: dict[str, list[Any]] = {"training": [], "validation": [], "test": []}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "idx": batch_idx, "scaled": self.loss(batch) * 2}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"loss": self.loss(batch), "idx": (dataloader_idx, batch_idx)}

    test_step = validation_step

    def training_epoch_end(self, outputs: Any) -> None:
        self.take("training", outputs)

    def validation_epoch_end(self, outputs: Any) -> None:
        self.take("validation", outputs)

    def test_epoch_end(self, outputs: Any) -> None:
        self.take("test", outputs)

    def on_train_epoch_end(self) -> None:
        self.calls.append("M.on_train_epoch_end")

    def on_validation_epoch_end(self) -> None:
        self.calls.append("M.on_validation_epoch_end")

    def take(self, stage: str, outputs: Any) -> None:
        self.calls.append(f"{stage}_epoch_end")
        self.outputs[stage].append(outputs)
        self.log(f"{stage}_logged", float(len(outputs)))


class Order(engine.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.calls.append("C.on_train_epoch_end")

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.calls.append("C.on_validation_epoch_end")


def test_epoch_ends_get_what_the_steps_returned_before_other_hooks_run() -> None:
    model = Ends()
    run = fit(model, val=loader(), callbacks=Order(), max_epochs=2)
    epoch = ["validation_epoch_end", "C.on_validation_epoch_end", "M.on_validation_epoch_end"]
    epoch += ["training_epoch_end", "C.on_train_epoch_end", "M.on_train_epoch_end"]
    assert model.calls == epoch * 2
    for outputs in model.outputs["training"]:
        assert [output["idx"] for output in outputs] == [0, 1, 2, 3]
        assert all(not output["loss"].requires_grad and not output["scaled"].requires_grad for output in outputs)
        assert all(torch.equal(output["scaled"], 2 * output["loss"]) for output in outputs)
    assert [[output["idx"] for output in outputs] for outputs in model.outputs["validation"]] == [
        [(0, 0), (0, 1), (0, 2), (0, 3)]
    ] * 2
    assert run.callback_metrics["training_logged"] == 4 and run.callback_metrics["validation_logged"] == 4


def test_several_loaders_give_a_list_of_lists() -> None:
    model = Ends()
    trainer().validate(model, [loader(), loader(4)], verbose=False)
    trainer().test(model, [loader(2), loader(), loader(4)], verbose=False)
    validated, tested = (
        [[o["idx"] for o in part] for part in model.outputs[stage][0]] for stage in ("validation", "test")
    )
    assert validated == [[(0, 0), (0, 1), (0, 2), (0, 3)], [(1, 0), (1, 1)]]
    assert tested == [[(0, 0)], [(1, 0), (1, 1), (1, 2), (1, 3)], [(2, 0), (2, 1)]]


def test_a_loss_alone_becomes_a_dict_and_none_is_left_out() -> None:
    class Model(Ends):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return [self(batch[0]), None, {}, 0][batch_idx]

    model = Model()
    fit(model, val=loader())
    assert [list(output) for output in model.outputs["training"][0]] == [["loss"]] * 3
    assert model.outputs["validation"][0][0].shape == (2, 1) and model.outputs["validation"][0][1:] == [{}, 0]
    fit(model, val=[loader(), loader(2)])
    assert [len(part) for part in model.outputs["validation"][1]] == [3, 1]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_losses_are_not_divided_by_the_accumulation(accumulate: int) -> None:
    class Model(Ends):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * 0 + batch_idx + 1

    model = Model()
    fit(model, accumulate_grad_batches=accumulate)
    losses = torch.stack([output["loss"] for output in model.outputs["training"][0]])
    torch.testing.assert_close(losses, torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_manual_optimization_has_them_too() -> None:
    class Model(Ends):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss, "idx": batch_idx} if batch_idx else None

    model = Model()
    fit(model)
    assert [output["idx"] for output in model.outputs["training"][0]] == [1, 2, 3]
    assert not model.outputs["training"][0][0]["loss"].requires_grad


def test_the_sanity_check_calls_the_validation_epoch_end_and_leaves_no_outputs() -> None:
    model = Ends()
    fit(model, val=loader(), num_sanity_val_steps=2)
    assert [len(outputs) for outputs in model.outputs["validation"]] == [2, 4]
    assert model.calls[:2] == ["validation_epoch_end", "M.on_validation_epoch_end"]


def test_outputs_are_collected_only_for_hooks_that_are_written() -> None:
    class Model(Net):
        def validation_epoch_end(self, outputs: Any) -> None: ...

    def collecting(run: engine.Trainer) -> list[str]:
        hooks = {name: [bound for bound in bounds] for name, bounds in run.overrides.items()}
        return [name for name, bounds in hooks.items() if bounds]

    assert collecting(fit(Net(), val=loader())) == []
    run = fit(Model(), val=loader())
    assert sorted(collecting(run)) == [
        f"on_validation_{moment}" for moment in ("batch_end", "epoch_end", "epoch_start")
    ]
    run.validate(Net(), loader(), verbose=False)
    assert collecting(run) == []


def test_a_run_that_goes_on_within_an_epoch_says_that_outputs_are_missing(tmp_path: Path) -> None:
    class Saving(engine.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    fit(Ends(), callbacks=Saving())
    model, run = Ends(), trainer(max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, loader(), ckpt_path=tmp_path / "a.ckpt")
    lines = [str(w.message) for w in caught if "training_epoch_end" in str(w.message)]
    assert len(lines) == 1 and "\n" not in lines[0] and "since the run was resumed" in lines[0]
    assert [[output["idx"] for output in outputs] for outputs in model.outputs["training"]] == [[2, 3], [0, 1, 2, 3]]


def test_checkpoints_and_weights_are_the_same_with_and_without_older_hooks(tmp_path: Path) -> None:
    class Plain(Ends):
        training_epoch_end = validation_epoch_end = test_epoch_end = None  # type: ignore[assignment]

    engine.seed_everything(3)
    with_hooks = Ends()
    engine.seed_everything(3)
    without = Plain()
    fit(with_hooks, val=loader(), max_epochs=2)
    fit(without, val=loader(), max_epochs=2)
    assert torch.equal(with_hooks.net.weight, without.net.weight)  # type: ignore[arg-type]
    assert without.outputs["training"] == []


@pytest.mark.parametrize("automatic", [True, False])
def test_a_step_end_may_change_what_a_step_returned(automatic: bool) -> None:
    class Model(Ends):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"prediction": self(batch[0]), "target": batch[1]}

        def training_step_end(self, outputs: Any) -> Any:
            loss = torch.nn.functional.mse_loss(outputs["prediction"], outputs["target"])
            self.log("train_loss", loss)
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return {"loss": loss}

        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            return self.loss(batch)

        def validation_step_end(self, loss: Any) -> Any:
            self.log("val_loss", loss)
            return {"val_loss": loss}

        def test_step_end(self, output: Any) -> None:
            self.log("test_loss", output["loss"])

    model = Model()
    model.automatic_optimization = automatic
    before = model.net.weight.clone()
    run = fit(model, val=loader())
    assert not torch.equal(before, model.net.weight)  # type: ignore[arg-type]
    assert list(model.outputs["training"][0][0]) == ["loss"] and list(model.outputs["validation"][0][0]) == ["val_loss"]
    assert {"train_loss", "val_loss"} <= set(run.callback_metrics)
    (result,) = run.test(model, loader(), verbose=False)
    # Nothing returned: what the step returned stands.
    assert "test_loss" in result and model.outputs["test"][0][0]["idx"] == (0, 0)


def test_steps_without_batch_idx_keep_their_step_ends() -> None:
    class Model(Net):
        ends = 0

        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return self.loss(batch)

        def training_step_end(self, outputs: Any) -> None:
            self.ends += 1

        def validation_step(self, batch: Any) -> Any:  # type: ignore[override]
            return self.loss(batch)

        def validation_step_end(self, outputs: Any) -> None:
            self.ends += 1

    model = Model()
    fit(model, val=loader())
    assert model.ends == 8


# Dicts that were logged once.


class ReturnsLog(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "log": {"train_loss": loss}}


class ReturnsBar(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(("train", batch_idx))
        output = {"loss": self.loss(batch)}
        output["progress_bar"] = {"loss": output["loss"]}  # type: ignore[assignment]
        return output


class ReturnsAtEnd(Net):
    def training_epoch_end(self, outputs: Any) -> Any:
        return {"loss": 1.0, "log": {}, "progress_bar": {}}


class ReturnsInValidation(Net):
    def validation_epoch_end(self, outputs: Any) -> Any:
        results = {}
        results["val_loss"] = 1.0
        return results


class ReturnsInStep(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"log": {"val_loss": self.loss(batch)}}


RETURNS = [
    (ReturnsInStep, "validation_step returns a dict of 'log'; ", "and return nothing"),
    (ReturnsLog, "training_step returns a dict of 'loss', 'log'; ", "and return the loss"),
    (ReturnsBar, "training_step returns a dict of 'loss', 'progress_bar'; ", "and return the loss"),
    (ReturnsAtEnd, "training_epoch_end returns a dict of 'loss', 'log', 'progress_bar'; ", "and return nothing"),
    (ReturnsInValidation, "validation_epoch_end returns a dict of 'val_loss'; ", "and return nothing"),
]


@pytest.mark.parametrize(("kind", "what", "instead"), RETURNS)
def test_dicts_that_were_logged_are_refused_before_a_weight_changes(kind: Any, what: str, instead: str) -> None:
    model = kind()
    before = model.net.weight.clone()
    with pytest.raises(engine.MisconfigurationException) as caught:
        fit(model, val=loader(), num_sanity_val_steps=1)
    message = str(caught.value)
    assert message.startswith(what) and message.endswith(instead) and "self.log(name, value)" in message
    assert "\n" not in message and torch.equal(before, model.net.weight)


def test_other_dicts_and_values_are_none_of_this() -> None:
    class Model(Ends):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "log": 3.0, "progress": {"a": 1}}

        def validation_epoch_end(self, outputs: Any) -> Any:
            return 3.0

    fit(Model(), val=loader())


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
        assert str(caught.value) == f"Trainer.{name} is of older versions; {TRAINER[name]}"
        assert not hasattr(owner, name)


@pytest.mark.parametrize("module", ["engine", "engine.callbacks", "engine.loggers", "engine.utilities", "engine.core"])
def test_a_name_that_is_no_more_is_refused_with_todays(module: str) -> None:
    for name, advice in NAMES.items():
        message = re.escape(f"{module}.{name} is of older versions; {advice}")
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


# What methods took.


class ByHand(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch), self.optimizers())


class Frequencies(Net):
    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters()]
        return [{"optimizer": optimizer, "frequency": 1 + n} for n, optimizer in enumerate(optimizers)]


class Several(Net):
    def configure_optimizers(self) -> Any:
        return tuple(torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ByHand, "manual_backward takes no optimizer any more; write manual_backward(loss)"),
        (
            Frequencies,
            "returned a dict of ['frequency', 'optimizer']; set self.automatic_optimization = False in __init__",
        ),
        (Several, "returned 2 optimizers; set self.automatic_optimization = False in __init__"),
    ],
)
def test_several_optimizers_of_older_versions_are_refused_with_todays(kind: Any, message: str) -> None:
    model = kind()
    before = model.net.weight.clone()
    with pytest.raises(engine.MisconfigurationException, match=re.escape(message)):
        fit(model)
    assert torch.equal(before, model.net.weight)
