"""Closures: LBFGS and other optimizers that run a batch as often as they like, and optimizer steps of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from test_resume import assert_same
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from toy import Memory, Net, fit, loader, same_bits, trainer, weights


def curve(size: int = 64) -> TensorDataset:
    """Points on a sine curve."""
    x = torch.linspace(-2, 2, size).unsqueeze(1)
    return TensorDataset(x, (2 * x).sin())


class Fit(engine.Module):
    """A small net on a curve, by LBFGS on all points at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {"line_search_fn": "strong_wolfe", **options}
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        self.calls = 0

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = LBFGS(self.parameters(), **self.options)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)]


def test_lbfgs_fits_a_curve_in_a_few_steps() -> None:
    engine.seed_everything(0)
    model, logger = Fit(), Memory()
    run = trainer(max_epochs=10, logger=logger, log_every_n_steps=1)
    data = DataLoader(curve(), 64)
    [before] = run.validate(model, data, verbose=False)
    run.fit(model, data, data)
    assert before["val_loss"] > 0.3
    assert float(run.callback_metrics["val_loss"]) < 1e-4
    assert run.global_step == 10 and model.calls > 50
    # What a step logs is of its last call; the epoch's mean is over all of them.
    assert len(logger.of("train_loss_step")) == 10


def test_lbfgs_takes_the_steps_that_it_takes_without_a_trainer() -> None:
    def parts() -> tuple[Fit, Any]:
        engine.seed_everything(2)
        return (model := Fit(max_iter=5)), model.configure_optimizers()[0][0]

    bare, optimizer = parts()
    for batch in [*DataLoader(curve(), 32)] * 3:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = bare.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    model, _ = parts()
    run = fit(model, DataLoader(curve(), 32), max_epochs=3)
    assert weights(model).equal(weights(bare))
    state, expected = (o.state_dict()["state"][0] for o in (run.optimizers[0], optimizer))
    assert state["func_evals"] == expected["func_evals"] == model.calls
    assert same_bits(state["old_dirs"], expected["old_dirs"])


@pytest.mark.parametrize("search", ["strong_wolfe", None])
def test_lbfgs_goes_on_with_the_same_bits(search: str | None) -> None:
    def train(ckpt_path: Any = None) -> dict[str, Any]:
        engine.seed_everything(3 if ckpt_path is None else 99)
        saver = ModelCheckpoint("c", "{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(max_epochs=3, callbacks=saver, enable_checkpointing=True)
        model = Fit(max_iter=4, lr=0.5, line_search_fn=search)
        run.fit(model, DataLoader(curve(), 32, shuffle=True), DataLoader(curve(), 64), ckpt_path=ckpt_path)
        run.save_checkpoint("end.ckpt")
        return torch.load("end.ckpt", weights_only=True)

    whole = train()
    for step in range(1, 6):
        assert_same(whole, train(f"c/step={step}.ckpt"))


def test_every_call_of_a_closure_is_clipped_and_runs_the_hooks() -> None:
    norms: list[float] = []

    class Look(engine.Callback):
        calls = 0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.calls += 1

    class Note(Fit):
        def configure_gradient_clipping(self, optimizer: Any, *given: Any, **named: Any) -> None:
            super().configure_gradient_clipping(optimizer, *given, **named)
            norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))

    model, look = Note(max_iter=3), Look()
    fit(model, DataLoader(curve(), 64), max_epochs=2, gradient_clip_val=0.01, callbacks=look)
    assert len(norms) == look.calls == model.calls > 2
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


class SAM(Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021): two gradients a step, so that it needs a closure."""

    def __init__(self, params: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        loss = closure()
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p, _ in found])
        shifts = [group["rho"] * p.grad / (norm + 1e-12) for p, group in found]
        for (p, _), shift in zip(found, shifts, strict=True):
            p.add_(shift)
        closure()
        for (p, group), shift in zip(found, shifts, strict=True):
            p.sub_(shift).sub_(group["lr"] * p.grad)
        return loss


class Sharp(Net):
    def configure_optimizers(self) -> Any:
        return SAM(self.parameters(), lr=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_optimizer_that_needs_a_closure_is_given_one(precision: Any) -> None:
    model = Sharp()
    [before] = trainer().validate(model, loader(64, 16), verbose=False)
    run = fit(model, loader(64, 16), loader(64, 16), max_epochs=5, precision=precision)
    assert model.count("train") == 2 * run.global_step == 2 * 5 * 4
    assert float(run.callback_metrics["val_loss"]) < before["val_loss"]
    if precision == "32-true":
        engine.seed_everything(1)
        bare = Sharp()
        optimizer = bare.configure_optimizers()
        for batch in [*loader(64, 16)] * 5:

            def closure(batch: Any = batch) -> Tensor:
                with torch.enable_grad():
                    optimizer.zero_grad()
                    loss = bare.loss(batch)
                    loss.backward()
                return loss

            optimizer.step(closure)
        assert weights(model).equal(weights(bare))


@pytest.mark.parametrize("make", [lambda ps: LBFGS(ps), lambda ps: SAM(ps, 0.1)], ids=["LBFGS", "SAM"])
def test_scaled_gradients_and_several_gradients_a_step_are_refused_together(make: Any) -> None:
    class Scaled(Net):
        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    with pytest.raises(engine.MisconfigurationException, match="cannot scale gradients; use precision bf16-mixed"):
        fit(Scaled(), precision="16-mixed")


# Steps of one's own


class WarmUp(Net):
    """The learning rate grows over the first steps, as in Lightning's guide."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 3:
            for group in optimizer.param_groups:
                group["lr"] = (self.trainer.global_step + 1) / 4 * self.lr


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_warm_up_in_optimizer_step_goes_on_with_the_same_bits(precision: Any) -> None:
    def train(ckpt_path: Any = None) -> dict[str, Any]:
        engine.seed_everything(3 if ckpt_path is None else 99)
        saver = ModelCheckpoint("c", "{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(max_epochs=2, callbacks=saver, enable_checkpointing=True, precision=precision)
        run.fit(WarmUp(), loader(8, shuffle=True), loader(2), ckpt_path=ckpt_path)
        run.save_checkpoint("end.ckpt")
        return torch.load("end.ckpt", weights_only=True)

    whole = train()
    assert whole["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.075)
    for step in (1, 2, 5):
        assert_same(whole, train(f"c/step={step}.ckpt"))


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_an_optimizer_step_that_only_passes_on_changes_nothing(window: int, precision: Any) -> None:
    class Own(Net):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    ends = []
    for kind in (Net, Own):
        engine.seed_everything(1)
        model = kind()
        options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": window, "precision": precision}
        run = fit(model, loader(14), max_epochs=2, **options)
        ends.append((weights(model).tolist(), run.global_step))
    assert ends[0] == ends[1]


def test_every_other_update_may_be_left_out_as_long_as_the_closure_runs() -> None:
    class Every2(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    model = Every2()
    run = fit(model)
    bare = Net()
    bare.load_state_dict(Every2().state_dict())
    engine.seed_everything(1)
    bare = Net()
    optimizer = SGD(bare.parameters(), lr=0.1)
    for batch in [*loader()][1::2]:
        optimizer.zero_grad()
        bare.loss(batch).backward()
        optimizer.step()
    assert weights(model).equal(weights(bare)) and model.count("train") == 4 and run.global_step == 4


def test_a_closure_returns_the_loss_and_a_step_without_one_leaves_the_batch_out() -> None:
    seen: list[Any] = []

    class Look(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            seen.append(optimizer_closure())

    fit(Look())
    assert [value is None for value in seen] == [False, True, False, False]
    assert all(isinstance(value, Tensor) and value.numel() == 1 for value in seen if value is not None)


STEPS: dict[str, Any] = {
    "nothing": lambda optimizer, closure: None,
    "without the closure": lambda optimizer, closure: optimizer.optimizer.step(),
}


@pytest.mark.parametrize("kind", STEPS)
def test_an_optimizer_step_that_never_runs_its_closure_is_refused(kind: str) -> None:
    class Forgets(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            STEPS[kind](optimizer, optimizer_closure)

    with pytest.raises(engine.MisconfigurationException, match=r"call optimizer.step\(closure=optimizer_closure\)"):
        fit(Forgets())


def test_what_is_no_function_is_no_closure() -> None:
    class Wrong(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(optimizer_closure())

    with pytest.raises(engine.MisconfigurationException, match="give a function that computes the gradients"):
        fit(Wrong())


def test_a_checkpoint_of_lbfgs_holds_its_history() -> None:
    run = fit(Fit(max_iter=4), DataLoader(curve(), 32), max_epochs=2)
    run.save_checkpoint("a.ckpt")
    [state] = torch.load("a.ckpt", weights_only=True)["optimizer_states"]
    assert state["state"][0]["n_iter"] == 16 and len(state["state"][0]["old_dirs"]) > 1
    assert Path("a.ckpt").stat().st_size < 100_000
