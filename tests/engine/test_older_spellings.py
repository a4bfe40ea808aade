"""Epoch ends with outputs, step ends, and what hooks of older Lightning versions returned and took."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
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
