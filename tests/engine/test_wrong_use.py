"""Wrong use ends in one line that says what was given and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import EarlyStopping, ModelCheckpoint
from engine.loggers import CSVLogger
from injection import two_processes
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader
from toy import Net, Steps, dataset, fit, loader, stream, trainer


def net(**hooks: Any) -> Net:
    """A `Net` with methods of its own."""
    model: Net = type("Model", (Net,), hooks)()
    return model


def logs_in(hook: str) -> Net:
    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        self.log("x", 1.0)

    return net(**{hook: log})


def returning(value: Callable[[Any], Any]) -> Net:
    """Its optimizers are `value(self)`."""
    return net(configure_optimizers=value)


def manual(step: Callable[[Any, Any], Any]) -> Net:
    """Optimises by itself: `step(self, batch)`."""
    return net(automatic_optimization=False, training_step=lambda self, batch, batch_idx: step(self, batch))


def two(model: Any) -> Any:
    return [SGD(model.net.parameters(), lr=0.1), Adam(model.net.parameters())]


def plateau(model: Any) -> Any:
    optimizer = SGD(model.parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer)}


class Frozen(Net):
    """Every parameter is frozen, as after loading a model to be fine-tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


# What is done, and words of the line that must come.
PROGRAMS: dict[str, tuple[Callable[[], Any], str]] = {
    # Logging
    "log in setup": (lambda: fit(logs_in("setup")), r"self.log\('x', ...\) is not possible in this hook; log in steps"),
    "log in on_fit_start": (lambda: fit(logs_in("on_fit_start")), "not possible in this hook; log in steps"),
    "log in on_train_end": (lambda: fit(logs_in("on_train_end")), "not possible in this hook; log in steps"),
    "log in configure_optimizers": (
        lambda: fit(logs_in("configure_optimizers")),
        "not possible in this hook; log in steps",
    ),
    "log in on_validation_end": (lambda: fit(logs_in("on_validation_end"), None, loader()), "not possible in"),
    "log in predict_step": (
        lambda: trainer().predict(logs_in("predict_step"), loader()),
        "not possible in this hook; log in steps",
    ),
    "log steps at an epoch's end": (
        lambda: fit(net(on_train_epoch_end=lambda self: self.log("x", 1.0, on_step=True))),
        "on_step=True.*only on_epoch works here",
    ),
    "log text": (lambda: fit(Steps(lambda m, b, i: m.log("x", "one"))), "was given a str; log a number"),
    "log many numbers": (lambda: fit(Steps(lambda m, b, i: m.log("x", b[0]))), r"of shape \(2, 3\); log its mean"),
    # Optimizers
    "two optimizers": (
        lambda: fit(returning(two)),
        "returned 2 optimizers; set self.automatic_optimization = False in __init__ and step them in training_step",
    ),
    "a plateau without a monitor": (lambda: fit(returning(plateau)), 'needs a value: {"scheduler": ..., "monitor":'),
    "a plateau that watches nothing": (
        lambda: fit(returning(lambda self: {**plateau(self), "monitor": "val_los"}), None, loader()),
        "watches 'val_los', which was not logged; logged are: .*val_loss",
    ),
    "no optimizer": (lambda: fit(returning(lambda self: "adam")), "returned str; return an optimizer"),
    "a scheduler alone": (
        lambda: fit(returning(lambda self: StepLR(SGD(self.parameters(), lr=0.1), 1))),
        "returned StepLR; return an optimizer",
    ),
    "a misspelt key": (
        lambda: fit(returning(lambda self: {"optimiser": SGD(self.parameters(), lr=0.1)})),
        r"a dict of \['optimiser'\]; return an optimizer",
    ),
    "no configure_optimizers": (
        lambda: fit(net(configure_optimizers=engine.Module.configure_optimizers)),
        "Model has no configure_optimizers; write one to call fit",
    ),
    # The loss
    "a loss without gradient": (
        lambda: fit(Steps(lambda m, b, i: m.loss(b).detach())),
        "returned a loss without gradient; return one number with a gradient",
    ),
    "a frozen model": (lambda: fit(Frozen()), "a loss without gradient"),
    "a loss of a number": (
        lambda: fit(Steps(lambda m, b, i: float(m.loss(b).detach()))),
        "training_step returned float",
    ),
    "a loss of many numbers": (lambda: fit(Steps(lambda m, b, i: m(b[0]))), r"a loss of shape \(2, 1\)"),
    "a dict without the loss": (lambda: fit(Steps(lambda m, b, i: {"l": m.loss(b)})), "a dict with 'loss'"),
    # Manual optimisation
    "manual_backward with automatic optimization": (
        lambda: fit(Steps(lambda m, b, i: m.manual_backward(m.loss(b)))),
        "manual_backward: set self.automatic_optimization = False in __init__, or return the loss instead",
    ),
    "clipping with manual optimization": (
        lambda: fit(manual(lambda m, b: None), gradient_clip_val=1.0),
        "gradient_clip_val=1.0 with automatic_optimization=False; call self.clip_gradients",
    ),
    "accumulation with manual optimization": (
        lambda: fit(manual(lambda m, b: None), accumulate_grad_batches=2),
        "accumulate_grad_batches=2 with automatic_optimization=False; call optimizer.step",
    ),
    "a manual step that returns text": (lambda: fit(manual(lambda m, b: "loss")), "training_step returned str; return"),
    "a step without a function": (lambda: fit(manual(lambda m, b: m.optimizers().step(m.loss(b)))), "give a function"),
    # Data and steps
    "no loader": (lambda: trainer().fit(Net()), "0 train loaders were given; give one, to fit or as its hook"),
    "no training_step": (
        lambda: fit(net(training_step=engine.Module.training_step)),
        "Model has no training_step; write one",
    ),
    "no validation_step": (
        lambda: fit(net(validation_step=engine.Module.validation_step), None, loader()),
        "val_dataloaders were given, but the model has no validation_step",
    ),
    "no test_step": (
        lambda: trainer().test(net(test_step=engine.Module.test_step), loader()),
        "Model has no test_step; write one",
    ),
    "nothing to test on": (lambda: trainer().test(Net()), "nothing to test on; give dataloaders, or write their hook"),
    "no module": (lambda: fit(nn.Linear(3, 1)), "the model is a Linear; give a subclass of engine.Module"),
    "no model": (lambda: trainer().validate(dataloaders=loader()), "no model was given"),
    "drop_last leaves nothing": (lambda: fit(Net(), loader(2, 4, drop_last=True)), "is batch_size too large for drop_"),
    # Files
    "no such checkpoint": (lambda: trainer().fit(Net(), loader(), ckpt_path="gone.ckpt"), "gone.ckpt does not exist"),
    "best without a ModelCheckpoint": (lambda: trainer().test(Net(), loader(), ckpt_path="best"), "no ModelCheckpoint"),
    # Callbacks
    "EarlyStopping on what is not logged": (
        lambda: fit(Net(), None, loader(), callbacks=EarlyStopping("val_acc")),
        "watches 'val_acc', which was never logged; logged are: train_loss, val_loss",
    ),
    "ModelCheckpoint on what is not logged": (
        lambda: fit(
            Net(), None, loader(), callbacks=ModelCheckpoint("c", monitor="val_acc"), enable_checkpointing=True
        ),
        "watches 'val_acc', which was never logged; logged are: train_loss, val_loss",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_use_ends_in_one_line(name: str) -> None:
    program, words = PROGRAMS[name]
    with pytest.raises(engine.MisconfigurationException, match=words) as caught:
        program()
    assert "\n" not in str(caught.value)


# Arguments of the Trainer, alone and together.
ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a limit above a whole": (
        {"limit_train_batches": 1.5},
        "limit_train_batches=1.5 makes no sense; give a number of batches, or a share from 0.0 to 1.0",
    ),
    "a negative limit": ({"limit_val_batches": -1}, "limit_val_batches=-1 makes no sense"),
    "overfit above a whole": ({"overfit_batches": 1.5}, "overfit_batches=1.5 makes no sense"),
    "an interval above a whole": ({"val_check_interval": 1.5}, "val_check_interval=1.5; give a number of training"),
    "an interval of nothing": ({"val_check_interval": 0}, "val_check_interval=0 makes no sense"),
    "a share across epochs": (
        {"val_check_interval": 0.5, "check_val_every_n_epoch": None},
        "check_val_every_n_epoch=None counts batches across epochs: val_check_interval=0.5 has to be a whole number",
    ),
    "checkpoints off and on": (
        {"enable_checkpointing": False, "callbacks": ModelCheckpoint("c")},
        "enable_checkpointing=False, but callbacks has a ModelCheckpoint; drop one",
    ),
    "barebones and a logger": ({"barebones": True, "logger": True}, "barebones=True .*logger asks for it; leave out"),
    "barebones and checkpoints": (
        {"barebones": True, "logger": None, "enable_checkpointing": True},
        "barebones=True .*enable_checkpointing asks for it",
    ),
    "barebones and a bar": (
        {"barebones": True, "logger": None, "enable_progress_bar": True},
        "barebones=True .*enable_progress_bar asks for it",
    ),
    "barebones and anomalies": (
        {"barebones": True, "logger": None, "detect_anomaly": True},
        "barebones=True .*detect_anomaly asks for it",
    ),
    "barebones and a profiler": (
        {"barebones": True, "logger": None, "profiler": "simple"},
        "barebones=True .*profiler asks for it",
    ),
    "an unknown precision": ({"precision": "8"}, "precision='8' is not supported; give one of 32-true, 16-mixed"),
    "an unknown strategy": ({"strategy": "mpi"}, "strategy='mpi' is not supported; give one of auto, ddp"),
    "no such device": ({"accelerator": "tpu"}, "accelerator='tpu' is not supported; available: auto, "),
    "more devices than processes": ({"devices": 3}, "run: torchrun --nproc-per-node 3 -- main.py"),
    "more machines than there are": ({"num_nodes": 2}, "num_nodes=2, but 1 machine takes part; run on each of them"),
    "clipping of a senseless size": ({"gradient_clip_val": "big"}, "gradient_clip_val='big'; give a number from 0"),
    "clipping of an unknown kind": ({"gradient_clip_algorithm": "max"}, "gradient_clip_algorithm='max'; give norm or"),
    "accumulation of nothing": ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 makes no sense"),
    "accumulation by epoch": (
        {"accumulate_grad_batches": {0: 2}},
        r"write callbacks=\[GradientAccumulationScheduler\(",
    ),
    "a time in words": ({"max_time": "1 hour"}, "max_time='1 hour'; give days:hours:minutes:seconds"),
    "an unknown profiler": ({"profiler": "fast"}, "profiler='fast'; give simple, pytorch, or a Profiler"),
    "an unknown logger": ({"logger": "wandb"}, "logger='wandb' has no log_metrics, .*; give an object of a subclass"),
    "what is no callback": (
        {"callbacks": [print]},
        "callbacks has a .*print.*; give objects of subclasses of engine.Callback",
    ),
    "loaders never": ({"reload_dataloaders_every_n_epochs": -1}, "reload_dataloaders_every_n_epochs=-1 makes no sense"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_senseless_and_contradictory_arguments_end_in_one_line(name: str) -> None:
    options, words = ARGUMENTS[name]
    quiet = {} if options.get("barebones") else {"logger": False}
    with pytest.raises(engine.MisconfigurationException, match=words) as caught:
        engine.Trainer(**{"accelerator": "cpu", **quiet, **options})
    assert "\n" not in str(caught.value)


DATA: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a share of an unknown length": (stream, {"limit_train_batches": 0.5}, "of a loader without length; give a whole"),
    "a share of nothing": (loader, {"limit_train_batches": 0.1}, "limit_train_batches=0.1 of 4 batches is none"),
    "an interval of an unknown length": (stream, {"val_check_interval": 0.5}, "give a number of batches or a time"),
    "an interval beyond the epoch": (
        loader,
        {"val_check_interval": 5},
        "val_check_interval=5, but an epoch has 4 batches; give fewer, or check_val_every_n_epoch=None",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_arguments_that_do_not_fit_the_data_end_in_one_line(name: str) -> None:
    make, options, words = DATA[name]
    with pytest.raises(engine.MisconfigurationException, match=words) as caught:
        fit(Net(), make(), loader(), **options)
    assert "\n" not in str(caught.value)


# Several processes


def errors_of_two(work: Callable[[int], Any]) -> list[str]:
    """What two processes that know each other say when they end in an error."""
    children = two_processes(work)
    assert [child.end() for child in children] == [1, 1]
    return [child.err for child in children]


def test_no_loss_on_several_processes_is_refused_with_what_to_return() -> None:
    step = lambda model, batch, batch_idx: None if batch_idx == 1 else model.loss(batch)  # noqa: E731
    for error in errors_of_two(lambda rank: fit(Steps(step), DataLoader(dataset(), 2))):
        line = "training_step returned None, but other processes wait for its gradients; return a loss of 0 * outputs"
        assert f"MisconfigurationException: {line}" in error


def test_no_loss_in_one_of_several_processes_ends_them_all() -> None:
    def work(rank: int) -> None:
        fit(Steps(lambda model, batch, batch_idx: None if rank else model.loss(batch)), DataLoader(dataset(), 2))

    _, second = errors_of_two(work)
    assert "training_step returned None, but other processes wait" in second


def test_different_numbers_of_devices_are_told_with_the_command() -> None:
    for error in errors_of_two(lambda rank: trainer(devices=3)):
        assert "devices=3, but 2 processes were started on this machine; run: torchrun --nproc-per-node 3" in error


# What must not pass in silence


def test_a_module_that_leaves_out_super_init_is_told_so() -> None:
    class Forgets(engine.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(3, 1)

    with pytest.raises(AttributeError, match=r"__init__\(\) call"):
        Forgets()


def test_a_manual_module_that_never_steps_counts_no_step() -> None:
    assert fit(manual(lambda m, b: None)).global_step == 0


def test_what_was_written_before_an_error_is_whole() -> None:
    saver = ModelCheckpoint("c", "{step}", every_n_train_steps=1, save_top_k=-1)
    step = lambda model, batch, batch_idx: "loss" if batch_idx == 2 else model.loss(batch)  # noqa: E731
    with pytest.raises(engine.MisconfigurationException, match="training_step returned str"):
        fit(Steps(step), callbacks=saver, enable_checkpointing=True, logger=CSVLogger(".", "run", "v"))
    assert sorted(file.name for file in Path("c").iterdir()) == ["previous.ckpt", "step=1.ckpt", "step=2.ckpt"]
    assert fit(Net(), max_epochs=2).global_step == 8
