"""Hooks as people write them: misspelt, of older versions, or with wrong arguments. All of these end before a batch."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import engine
import pytest
import pytorch_lightning as lightning
import torch
from engine.older_names import HOOKS
from toy import Net, fit, loader, trainer


class Data(engine.DataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


KINDS = {engine.Module: Net, engine.DataModule: Data, engine.Callback: engine.Callback}
EVERY_KIND = pytest.mark.parametrize("base", KINDS, ids=lambda base: base.__name__)


def build(base: type, **members: Any) -> Any:
    return type("Mine", (base,), members)()


def run(thing: Any) -> None:
    """What a program does with a module, a data module or a callback."""
    model = thing if isinstance(thing, engine.Module) else Net()
    data = thing if isinstance(thing, engine.DataModule) else Data()
    callbacks = thing if isinstance(thing, engine.Callback) else None
    try:
        trainer(callbacks=callbacks).fit(model, datamodule=data)
    except engine.MisconfigurationException:
        assert model.seen == [], "too late"
        raise


def refusal(thing: Any) -> str:
    """The one line that refuses it."""
    with pytest.raises(engine.MisconfigurationException) as caught:
        run(thing)
    message = str(caught.value)
    assert "\n" not in message and "{" not in message
    return message


def function(*arguments: str, result: Any = None) -> Callable[..., Any]:
    """A method with these arguments, such as "batch" or "idx=0"."""
    made: dict[str, Any] = {"result": result}
    exec(f"def method({', '.join(['self', *arguments])}): return result", made)
    return made["method"]


# Names.


@EVERY_KIND
def test_hooks_of_older_versions_and_misspelt_ones_are_refused_with_todays(base: type) -> None:
    for name in HOOKS:
        if not hasattr(base, name):
            message = refusal(build(KINDS[base], **{name: function()}))
            assert f"Mine.{name} would never be called: {base.__name__} has no hook of that name; " in message
            assert message.endswith(HOOKS[name])


def test_the_advice_names_hooks_and_methods_that_exist() -> None:
    known = {name for base in KINDS for name in dir(base)} | {"trainer", "optimizers", "Trainer", "Callback"}
    for name, advice in HOOKS.items():
        written = re.match(r"(?:write|did you mean) (\w+)", advice)
        if written and written[1] != "it":
            assert written[1] in known, (name, advice)


MISSPELT = [
    (Net, "on_train_epoch_ends", "on_train_epoch_end"),
    (Net, "on_validation_epoch_stop", "on_validation_epoch_"),
    (Net, "on_val_epoch_end", "on_validation_epoch_end"),
    (Net, "configure_optimizer", "configure_optimizers"),
    (Net, "configure_optimisers", "configure_optimizers"),
    (Net, "val_step", "validation_step"),
    (Net, "train_step", "training_step"),
    (Net, "forward_step", "training_step"),
    (Net, "validation_steps", "validation_step"),
    (Net, "validation_epochs_end", "validation_epoch_end"),
    (Net, "trainig_step", "training_step"),
    (Net, "train_dataloaders", "train_dataloader"),
    (Data, "on_exceptions", "on_exception"),
    (Data, "prepare_datas", "prepare_data"),
    (Data, "val_dataloaders", "val_dataloader"),
    (engine.Callback, "on_train_epoch_ends", "on_train_epoch_end"),
    (engine.Callback, "on_train_batch_finish", "on_train_batch_"),
]


@pytest.mark.parametrize(("base", "name", "nearest"), MISSPELT)
def test_a_misspelt_hook_is_refused_with_the_nearest_name(base: Any, name: str, nearest: str) -> None:
    assert nearest in refusal(build(base, **{name: function()})).split("did you mean ")[1]


def test_what_is_like_no_hook_is_told_and_left() -> None:
    with pytest.warns(UserWarning, match="on_zzz would never be called: Module has no hook of that name"):
        trainer().fit(build(Net, on_zzz=function()), loader())


def test_a_method_of_a_class_that_knows_nothing_of_the_engine_is_told_and_left() -> None:
    class Mixin:
        def on_train_epoch_ends(self) -> None: ...

    class Model(Mixin, Net): ...

    with pytest.warns(UserWarning, match="Mixin.on_train_epoch_ends would never be .*did you mean on_train"):
        trainer().fit(Model(), loader())


def test_one_method_may_be_several_hooks() -> None:
    class Alias(Net):
        def eval_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

        validation_step = test_step = eval_step

    trainer().fit(Alias(), loader(), loader())


def test_a_decorator_may_give_a_hook_more_than_it_is_given() -> None:
    def with_scale(step: Any) -> Any:
        @functools.wraps(step)
        def run(self: Any, *args: Any) -> Any:
            return step(self, *args, scale=2.0)

        return run

    class Scaled(Net):
        @with_scale
        def training_step(self, batch: Any, batch_idx: int, scale: float) -> Any:
            return self.loss(batch) * scale

    trainer().fit(Scaled(), loader())


class Calls(Net):
    """Calls methods of its own in every way."""

    def train_step(self, batch: Any) -> Any:
        return self.loss(batch)

    def val_step(self, batch: Any) -> Any:
        return self.loss(batch)

    def eval_step(self) -> None: ...

    def on_images(self) -> int:
        return 3

    def on_name(self) -> int:
        return 4

    @property
    def drawn(self) -> int:
        return self.on_images() + getattr(self, "on_name")()  # noqa: B009

    @staticmethod
    def draw(model: Any) -> None:
        model.eval_step()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.train_step(batch)

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        (lambda: self.val_step(batch))()


def test_methods_that_the_class_itself_calls_may_have_any_name() -> None:
    model = Calls()
    fit(model, val=loader())
    assert model.drawn == 7


def test_a_method_that_calls_only_its_own_parent_is_refused() -> None:
    class Base(Net):
        def on_epoch_end(self) -> None: ...

    class Model(Base):
        def on_epoch_end(self) -> None:
            super().on_epoch_end()

    assert "Model.on_epoch_end would never be called" in refusal(Model())


def test_private_and_numbered_methods_and_other_members_are_the_users_own() -> None:
    class Model(Net):
        on_something = 3

        def _training_step(self) -> None: ...

        def training_step_2(self) -> None: ...

        def validation_loss(self) -> None: ...

        def prepare_images(self) -> None: ...

    fit(Model())


def test_something_else_among_the_callbacks_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="callbacks has a .*EarlyStopping.*engine.Callback"):
        trainer(callbacks=[engine.callbacks.EarlyStopping])
    with pytest.raises(engine.MisconfigurationException, match="callbacks has a 3"):
        trainer(callbacks=[3])


# Signatures. Every hook of today, with what Lightning calls it with.
PLAIN = ["setup", "teardown", "prepare_data", "backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"]
PLAIN += ["configure_optimizers", "configure_callbacks", "configure_model", "configure_gradient_clipping"]
PLAIN += ["training_step", "validation_step", "test_step", "predict_step", "transfer_batch_to_device"]
PLAIN += [f"{kind}_dataloader" for kind in ("train", "val", "test", "predict")]


def hooks_of(base: type) -> list[str]:
    own = [name for name in dir(base) if name.startswith("on_") or name in PLAIN]
    own += ["state_dict", "load_state_dict"] if base is not engine.Module else []
    return [name for name in own if inspect.isfunction(getattr(base, name))]


STEPS = {f"{stage}_step": ["batch", "batch_idx", "dataloader_idx"] for stage in ("validation", "test", "predict")}
STEPS["training_step"] = ["batch", "batch_idx"]


def arguments_of(base: type, name: str) -> list[str]:
    if base is engine.Module and name in STEPS:
        return STEPS[name]
    _, *given = inspect.signature(getattr(base, name)).parameters.values()
    return [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]


def check(base: type, name: str, *arguments: str) -> None:
    """Whether a hook with these arguments is taken; it is not run, since a batch would be."""
    from engine.hook_checks import check_hooks

    check_hooks(build(KINDS[base], **{name: function(*arguments)}))


def test_there_are_many_hooks() -> None:
    assert [len(hooks_of(base)) for base in KINDS] >= [60, 10, 45]


@EVERY_KIND
def test_a_hook_takes_what_it_is_called_with_under_any_names(base: type) -> None:
    for name in hooks_of(base):
        arguments = arguments_of(base, name)
        check(base, name, *arguments)
        check(base, name, *[f"{argument}_" for argument in arguments])
        check(base, name, *[f"{argument}=None" for argument in arguments])
        check(base, name, *arguments, "more=1")
        check(base, name, *arguments, "**kwargs")
        check(base, name, "*args", "**kwargs")
        for refused in ([*arguments, "more"], [*arguments, "*", "more"]):
            with pytest.raises(engine.MisconfigurationException) as caught:
                check(base, name, *refused)
            taken = ", ".join(r for r in refused if r != "*")
            assert f"Mine.{name} takes ({taken}); write def {name}(" in str(caught.value)


@EVERY_KIND
def test_a_hook_that_takes_less_is_refused_but_where_lightning_allows_it(base: type) -> None:
    for name in hooks_of(base):
        arguments = arguments_of(base, name)
        if "dataloader_idx" in arguments and name.endswith(("batch_start", "batch_end")):
            arguments.pop()
            check(base, name, *arguments)
        if base is engine.Module and name in STEPS:
            arguments = ["batch"]
            check(base, name, *arguments)
        if arguments:
            with pytest.raises(
                engine.MisconfigurationException, match=rf"Mine\.{name} takes \(.*\); write def {name}\("
            ):
                check(base, name, *arguments[:-1])


@EVERY_KIND
def test_arguments_in_another_order_are_refused(base: type) -> None:
    for name in hooks_of(base):
        arguments = arguments_of(base, name)
        if len(arguments) > 1:
            expected = rf"write def {name}\(self, {', '.join(arguments)}\)"
            with pytest.raises(engine.MisconfigurationException, match=expected):
                check(base, name, *arguments[::-1])


LIGHTNINGS = {
    engine.Module: lightning.LightningModule,
    engine.DataModule: lightning.LightningDataModule,
    engine.Callback: lightning.Callback,
}


@EVERY_KIND
def test_every_hook_as_lightning_defines_it_is_taken(base: type) -> None:
    from engine.hook_checks import check_hooks

    theirs = LIGHTNINGS[base]
    members = {name: getattr(theirs, name) for name in hooks_of(base) if hasattr(theirs, name)}
    assert len(members) >= len(hooks_of(base)) - 1
    check_hooks(build(KINDS[base], **members))


def test_hooks_that_are_attributes_are_looked_at_too() -> None:
    model = Net()
    model.on_train_start = lambda wrong: None  # type: ignore[assignment, misc]
    assert "Net.on_train_start takes (wrong); write def on_train_start(self)" in refusal(model)
    model = Net()
    called: list[int] = []
    model.on_train_start = lambda: called.append(1)  # type: ignore[method-assign]
    run(model)
    assert called == [1]


def test_a_step_that_is_none_is_no_step() -> None:
    fit(build(Net, test_step=None))


IDX = "write def {}(self, {}); instead of optimizer_idx, set self.automatic_optimization = False"
OLDER = [
    (Net, "training_step", ["batch", "batch_idx", "optimizer_idx"], IDX.format("training_step", "batch, batch_idx")),
    (Net, "training_step", ["batch", "batch_idx", "optimizer_idx=None"], "instead of optimizer_idx, set"),
    (Net, "training_step", ["batch", "batch_idx", "hiddens"], "for each part of a sequence"),
    (Net, "training_step", ["dataloader_iter"], "write def training_step(self, batch, batch_idx)"),
    (Net, "on_train_epoch_end", ["outputs"], "keep outputs in a list of your own"),
    (Net, "on_train_epoch_end", ["outputs=None"], "keep outputs in a list of your own"),
    (Net, "on_validation_epoch_end", ["outputs"], "write def on_validation_epoch_end(self)"),
    (Net, "on_predict_epoch_end", ["results"], "keep outputs in a list of your own"),
    (
        Net,
        "on_train_batch_start",
        ["batch", "batch_idx", "dataloader_idx"],
        "on_train_batch_start(self, batch, batch_idx)",
    ),
    (Net, "on_train_batch_start", ["batch", "batch_idx", "unused"], "on_train_batch_start(self, batch, batch_idx)"),
    (Net, "on_train_batch_end", ["batch", "batch_idx", "dataloader_idx"], "(self, outputs, batch, batch_idx)"),
    (
        Net,
        "on_validation_batch_end",
        ["batch", "batch_idx", "dataloader_idx"],
        "(self, outputs, batch, batch_idx, data",
    ),
    (Net, "on_before_optimizer_step", ["optimizer", "optimizer_idx"], "on_before_optimizer_step(self, optimizer)"),
    (
        Net,
        "optimizer_zero_grad",
        ["epoch", "batch_idx", "optimizer", "optimizer_idx"],
        "(self, epoch, batch_idx, optimizer)",
    ),
    (
        Net,
        "optimizer_step",
        ["epoch", "batch_idx", "optimizer", "optimizer_idx", "optimizer_closure"],
        "instead of optim",
    ),
    (
        Net,
        "optimizer_step",
        ["current_epoch", "batch_nb", "optimizer", "optimizer_i", "second_order_closure=None"],
        "epoch, b",
    ),
    (Net, "lr_scheduler_step", ["scheduler", "optimizer_idx", "metric"], "lr_scheduler_step(self, scheduler, metric)"),
    (Net, "backward", ["trainer", "loss", "optimizer", "optimizer_idx"], "write def backward(self, loss)"),
    (
        Net,
        "configure_gradient_clipping",
        ["optimizer", "optimizer_idx", "val", "algorithm"],
        "(self, optimizer, gradient",
    ),
    (
        Net,
        "transfer_batch_to_device",
        ["batch", "device"],
        "transfer_batch_to_device(self, batch, device, dataloader_idx)",
    ),
    (Net, "setup", [], "write def setup(self, stage)"),
    (Net, "validation_epoch_end", [], "write def validation_epoch_end(self, outputs)"),
    (Net, "training_step_end", [], "write def training_step_end(self, outputs)"),
    (Data, "setup", [], "write def setup(self, stage)"),
    (Data, "transfer_batch_to_device", ["batch", "device"], "(self, batch, device, dataloader_idx)"),
    (engine.Callback, "setup", ["trainer", "pl_module"], "write def setup(self, trainer, pl_module, stage)"),
    (engine.Callback, "on_load_checkpoint", ["checkpoint"], "on_load_checkpoint(self, trainer, pl_module, checkpoint)"),
    (
        engine.Callback,
        "on_load_checkpoint",
        ["trainer", "pl_module", "callback_state"],
        "write load_state_dict(self, state",
    ),
    (engine.Callback, "on_save_checkpoint", ["trainer", "pl_module"], "(self, trainer, pl_module, checkpoint)"),
    (
        engine.Callback,
        "on_train_epoch_end",
        ["trainer", "pl_module", "outputs"],
        "write def on_train_epoch_end(self, trainer",
    ),
    (
        engine.Callback,
        "on_before_optimizer_step",
        ["trainer", "pl_module", "optimizer", "opt_idx"],
        "instead of opt_idx",
    ),
    (
        engine.Callback,
        "on_train_batch_end",
        ["trainer", "pl_module", "batch", "batch_idx", "dataloader_idx"],
        "outputs, b",
    ),
    (
        engine.Callback,
        "on_train_batch_end",
        ["trainer", "pl_module", "outputs", "batch", "batch_idx", "unused"],
        "write def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx)",
    ),
]


@pytest.mark.parametrize(("base", "name", "arguments", "advice"), OLDER)
def test_a_signature_of_an_older_version_is_refused_with_todays(
    base: Any, name: str, arguments: list[str], advice: str
) -> None:
    message = refusal(build(base, **{name: function(*arguments)}))
    assert f"Mine.{name} takes ({', '.join(a.partition('=')[0] for a in arguments)}); " in message
    assert advice in message


@pytest.mark.parametrize("argument", ["unused=0", "dataloader_idx=0"])
def test_an_argument_that_is_no_more_does_no_harm_where_it_has_a_default(argument: str) -> None:
    run(build(Net, on_train_batch_end=function("outputs", "batch", "batch_idx", argument)))
    run(build(engine.Callback, on_train_batch_start=function("trainer", "pl_module", "batch", "batch_idx", argument)))


def test_names_of_older_arguments_may_stand_for_others() -> None:
    run(build(Net, on_train_batch_end=function("results", "batch", "batch_idx")))
    run(build(Net, validation_epoch_end=function("results")))
    run(build(engine.Callback, load_state_dict=function("callback_state")))


def test_the_class_that_wrote_the_hook_is_named() -> None:
    class Base(Net):
        def on_train_epoch_end(self, outputs: Any) -> None: ...  # type: ignore[override]

    class Model(Base): ...

    assert "Base.on_train_epoch_end takes (outputs)" in refusal(Model())


def test_truncated_backpropagation_is_refused() -> None:
    assert "Mine.truncated_bptt_steps: set self.automatic_optimization" in refusal(build(Net, truncated_bptt_steps=2))
    fit(build(Net, truncated_bptt_steps=0))


# What hooks return.


class SavesState(engine.Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> Any:
        return {"count": 3}


class SavesNothing(engine.Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if checkpoint:
            return
        return super().on_save_checkpoint(trainer, pl_module, checkpoint)


def test_a_callback_whose_on_save_checkpoint_returns_a_state_is_refused() -> None:
    assert "SavesState.on_save_checkpoint returns a state; write state_dict(self)" in refusal(SavesState())
    run(SavesNothing())


# The number of loaders, once it is known.


def evaluating(stage: str, several: bool, **members: Any) -> Net:
    model = build(Net, **members)
    run = getattr(trainer(), {"validation": "validate"}.get(stage, stage))
    run(model, [loader(), loader()] if several else loader())
    return model


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_steps_take_a_dataloader_idx_where_there_are_several_loaders(stage: str) -> None:
    step = f"{stage}_step"
    for arguments in (["batch"], ["batch", "batch_idx"], ["batch", "batch_idx", "dataloader_idx=0"], ["*args"]):
        evaluating(stage, False, **{step: function(*arguments)})
    for arguments in (["batch", "batch_idx", "dataloader_idx"], ["batch", "i", "which"], ["*args"]):
        evaluating(stage, True, **{step: function(*arguments)})
    with pytest.raises(engine.MisconfigurationException) as caught:
        evaluating(stage, False, **{step: function("batch", "batch_idx", "dataloader_idx")})
    assert str(caught.value) == (
        f"Mine.{step} takes (batch, batch_idx, dataloader_idx), but there is one loader; write dataloader_idx=0 as its "
        "last argument"
    )
    for arguments in (["batch"], ["batch", "batch_idx"]):
        with pytest.raises(
            engine.MisconfigurationException, match="but there are several loaders; write dataloader_idx=0"
        ):
            evaluating(stage, True, **{step: function(*arguments)})


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
@pytest.mark.parametrize("moment", ["start", "end"])
def test_batch_hooks_take_it_likewise(stage: str, moment: str) -> None:
    hook, given = f"on_{stage}_batch_{moment}", ["batch", "batch_idx"]
    given = ["outputs", *given] if moment == "end" else given
    evaluating(stage, False, **{hook: function(*given)})
    evaluating(stage, True, **{hook: function(*given, "dataloader_idx")})
    with pytest.raises(engine.MisconfigurationException, match="there is one loader"):
        evaluating(stage, False, **{hook: function(*given, "dataloader_idx")})
    with pytest.raises(engine.MisconfigurationException, match="there are several loaders"):
        evaluating(stage, True, **{hook: function(*given)})


def test_hooks_of_callbacks_take_it_likewise() -> None:
    given = ("trainer", "pl_module", "outputs", "batch", "batch_idx")
    short, long = (
        build(engine.Callback, on_validation_batch_end=function(*given, *more)) for more in ((), ("dataloader_idx",))
    )
    trainer(callbacks=short).validate(Net(), loader())
    trainer(callbacks=long).validate(Net(), [loader(), loader()])
    with pytest.raises(
        engine.MisconfigurationException, match="Mine.on_validation_batch_end .* there are several loaders"
    ):
        trainer(callbacks=short).validate(Net(), [loader(), loader()])
    with pytest.raises(engine.MisconfigurationException, match="Mine.on_validation_batch_end .* there is one loader"):
        trainer(callbacks=long).validate(Net(), loader())


@pytest.mark.parametrize("sanity", [0, 2])
def test_fit_looks_before_it_trains(sanity: int) -> None:
    model = build(Net, validation_step=function("batch", "batch_idx"))
    with pytest.raises(engine.MisconfigurationException, match="there are several loaders"):
        fit(model, val=[loader(), loader()], num_sanity_val_steps=sanity)
    assert model.seen == []
