"""Modules that optimise by themselves: a GAN, accumulation by hand, several optimizers, two processes, exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from test_resume import assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from toy import Memory, Net, fit, loader, trainer, weights


def real(size: int = 512) -> TensorDataset:
    """Points on an ellipse around (2, -1)."""
    angle = torch.linspace(0, 6.283, size)
    return TensorDataset(torch.stack([2 + angle.cos(), -1 + 0.3 * angle.sin()], dim=1))


class GAN(engine.Module):
    """As in tutorials: two optimizers, toggled, and two schedulers, each stepped by hand."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(width, 1))
        self.realness = MeanMetric()

    def forward(self, z: Tensor) -> Tensor:
        points: Tensor = self.generator(z)
        return points

    def training_step(self, batch: Any, batch_idx: int) -> None:
        [points] = batch
        for_generator, for_discriminator = self.optimizers()
        z = torch.randn(len(points), 4, device=self.device)
        yes, no = torch.ones(len(points), 1), torch.zeros(len(points), 1)

        with self.toggled_optimizer(for_generator):
            loss = F.binary_cross_entropy_with_logits(self.discriminator(self(z)), yes)
            self.log("g_loss", loss, prog_bar=True)
            for_generator.zero_grad()
            self.manual_backward(loss)
            for_generator.step()

        self.toggle_optimizer(for_discriminator)
        of_real, of_fake = self.discriminator(points), self.discriminator(self(z).detach())
        loss = F.binary_cross_entropy_with_logits(of_real, yes) + F.binary_cross_entropy_with_logits(of_fake, no)
        self.realness(of_real.detach().sigmoid().mean())
        self.log("realness", self.realness, on_step=False, on_epoch=True)
        self.log("d_loss", loss, on_step=True, on_epoch=True)
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

        every_step, _ = self.lr_schedulers()
        every_step.step()

    def on_train_epoch_end(self) -> None:
        _, every_epoch = self.lr_schedulers()
        every_epoch.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        [points] = batch
        fake = self(torch.randn(512, 4))
        self.log("distance", torch.cdist(fake, points).min(dim=1).values.mean())
        self.log("center", (fake.mean(0) - points.mean(0)).norm())

    def configure_optimizers(self) -> Any:
        first = Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        second = Adam(self.discriminator.parameters(), lr=0.01, betas=(0.5, 0.9))
        return [first, second], [ExponentialLR(first, 0.995), CosineAnnealingLR(second, 40)]


def points_loader(size: int = 512, batch_size: int = 64) -> DataLoader[Any]:
    return DataLoader(real(size), batch_size, shuffle=True)


# fp16 is known to skip steps at the beginning.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_a_gan_learns_where_the_points_are(precision: Any) -> None:
    engine.seed_everything(0)
    model, logger = GAN(), Memory()
    run = trainer(max_epochs=25, precision=precision, logger=logger, log_every_n_steps=8)
    data = DataLoader(real(), 512)
    [before] = run.validate(model, data, verbose=False)
    run.fit(model, points_loader(), data)
    after = {name: float(value) for name, value in run.callback_metrics.items()}
    assert before["distance"] > 1 and before["center"] > 1.5
    assert after["distance"] < 0.25 and after["center"] < 0.6
    assert 0.3 < after["realness"] < 0.8
    assert run.global_step == 2 * 25 * 8
    assert [step for step, _ in logger.of("g_loss")] == [*range(7, 200, 8)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
    assert rates == pytest.approx([0.01 * 0.995**200, 0.005 * (1 + math.cos(math.pi * 25 / 40))])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gan_goes_on_from_any_step_with_the_same_bits(precision: Any) -> None:
    def train(ckpt_path: Any = None) -> dict[str, Any]:
        engine.seed_everything(3 if ckpt_path is None else 99)
        saver = ModelCheckpoint("c", "{step}", every_n_train_steps=2, save_top_k=-1)
        run = trainer(max_epochs=3, precision=precision, callbacks=saver, enable_checkpointing=True)
        run.fit(GAN(8), points_loader(40, 16), points_loader(8, 8), ckpt_path=ckpt_path)
        run.save_checkpoint("end.ckpt")
        return torch.load("end.ckpt", weights_only=True)

    whole = train()
    # Both optimizers' steps count: 3 batches in each of 3 epochs.
    files = sorted(Path("c").glob("*.ckpt"), key=lambda file: int(file.stem.partition("=")[2]))
    assert [file.stem for file in files] == [f"step={n}" for n in range(2, 19, 2)]
    for file in files:
        assert_same(whole, train(file))


class Manual(Net):
    """A `Net` whose training step is a function of (module, batch, batch_idx)."""

    automatic_optimization = False
    step: Callable[..., Any]
    make: Callable[[Any], Any] | None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make(self) if self.make else super().configure_optimizers()


def manual(step: Callable[..., Any], make: Callable[[Any], Any] | None = None, kind: type[Manual] = Manual) -> Manual:
    """A `Manual` that steps, and makes its optimizers, as told."""
    model = kind()
    model.step, model.make = step, make
    return model


def plainly(model: Any, batch: Any, batch_idx: int) -> None:
    optimizer = model.optimizers()
    optimizer.zero_grad()
    model.manual_backward(model.loss(batch))
    optimizer.step()


def by_closure(model: Any, batch: Any, batch_idx: int) -> None:
    optimizer = model.optimizers()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model.loss(batch)
        model.manual_backward(loss)
        return loss

    optimizer.step(closure)


def in_windows(model: Any, batch: Any, batch_idx: int) -> Tensor:
    """The gradients of three batches, across the ends of epochs; the last ones of the run are lost."""
    optimizer, window = model.optimizers(), 3
    loss: Tensor = model.loss(batch)
    model.manual_backward(loss / window)
    if model.trainer.state.total_batches % window == window - 1:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def by_hand(batches: list[Any], window: int = 1) -> Tensor:
    engine.seed_everything(1)
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    for number, batch in enumerate(batches, 1):
        (model.loss(batch) / window).backward()
        if number % window == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize(("step", "window", "steps"), [(plainly, 1, 10), (by_closure, 1, 10), (in_windows, 3, 3)])
def test_a_manual_step_equals_a_loop_by_hand(step: Any, window: int, steps: int) -> None:
    model = manual(step)
    run = fit(model, loader(10), max_epochs=2)
    assert weights(model).equal(by_hand(list(loader(10)) * 2, window))
    assert run.global_step == steps


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("step", [plainly, by_closure, in_windows])
def test_going_on_within_a_window_of_ones_own_changes_no_bit(step: Any, precision: Any) -> None:
    class Save(engine.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(f"each/{trainer.state.total_batches}.ckpt")

    def train(ckpt_path: Any = None) -> Tensor:
        engine.seed_everything(3 if ckpt_path is None else 99)
        model = manual(step, lambda module: Adam(module.parameters(), lr=0.1))
        fit_options = {"max_epochs": 2, "callbacks": Save(), "precision": precision}
        trainer(**fit_options).fit(model, loader(10, shuffle=True), ckpt_path=ckpt_path)
        return weights(model)

    whole = train()
    for number in range(1, 10):
        assert train(f"each/{number}.ckpt").equal(whole), number


def test_lbfgs_steps_by_a_closure_as_without_a_trainer() -> None:
    make = lambda module: torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=4)  # noqa: E731
    model = manual(by_closure, make)
    run = fit(model, loader(8, 8), max_epochs=3)
    engine.seed_everything(1)
    bare = Net()
    optimizer = make(bare)
    [batch] = list(loader(8, 8))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bare.loss(batch)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert weights(model).equal(weights(bare)) and run.global_step == 3


def test_a_step_returns_what_its_closure_does_and_runs_the_hooks_after_it() -> None:
    notes: list[str] = []

    class Look(engine.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            notes.append("before_backward")

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            notes.append("after_backward")

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            notes.append(f"before_step {type(optimizer).__name__} {pl_module.net.weight.grad is not None}")

    def step(model: Any, batch: Any, batch_idx: int) -> None:
        optimizer = model.optimizers()

        def closure() -> Tensor:
            notes.append("closure")
            loss: Tensor = model.loss(batch)
            model.manual_backward(loss)
            return loss

        notes.append(f"returned {float(optimizer.step(closure)):.3f}")
        notes.append(f"grad {torch.is_grad_enabled()}")

    model = manual(step)
    expected = float(model.loss(next(iter(loader()))).detach())
    fit(model, limit_train_batches=1, callbacks=Look())
    assert notes == [
        *("closure", "before_backward", "after_backward", "before_step SGD True"),
        *(f"returned {expected:.3f}", "grad True"),
    ]


def test_toggling_leaves_gradients_to_one_optimizer_and_puts_back_what_was_frozen() -> None:
    class Parts(engine.Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b, self.shared = (nn.Linear(3, 3) for _ in range(3))
            self.a.bias.requires_grad = False

        def wanted(self) -> list[bool]:
            return [p.requires_grad for p in self.parameters()]

        def configure_optimizers(self) -> Any:
            groups = [[*self.a.parameters(), *self.shared.parameters()], [*self.b.parameters()]]
            return [SGD(group, lr=0.1) for group in groups]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            before = self.wanted()
            with self.toggled_optimizer(first):
                states.append(self.wanted())
            states.append(self.wanted())
            with second.toggle_model():
                states.append(self.wanted())
            self.toggle_optimizer(first)
            self.toggle_optimizer(second)
            states.append(self.wanted())
            self.untoggle_optimizer(second)
            states.append(self.wanted())
            with pytest.raises(ZeroDivisionError), self.toggled_optimizer(second):
                1 / 0  # noqa: B018
            assert self.wanted() == before

    states: list[list[bool]] = []
    fit(Parts(), limit_train_batches=1)
    only_first, only_second = [True, False, False, False, True, True], [False, False, True, True, False, False]
    usual = [True, False, True, True, True, True]
    assert states == [only_first, usual, only_second, only_second, usual]


def test_a_discriminator_may_step_more_often_and_max_steps_counts_every_step() -> None:
    class Wasserstein(GAN):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            generator, critic = self.optimizers()
            for _ in range(3):
                critic.zero_grad()
                self.manual_backward(self.discriminator(self(torch.randn(8, 4)).detach()).mean())
                critic.step()
            generator.zero_grad()
            self.manual_backward(-self.discriminator(self(torch.randn(8, 4))).mean())
            generator.step()

    run = fit(Wasserstein(8), points_loader(64, 8), max_steps=10, max_epochs=-1)
    assert run.global_step == 12 and run.state.total_batches == 3


def test_optimizers_are_given_one_by_one_or_in_a_list_and_without_the_engine_if_asked() -> None:
    one, two = manual(plainly), GAN(8)
    fit(one)
    fit(two, points_loader(8, 8))
    assert isinstance(one.optimizers(use_pl_optimizer=False), SGD) and one.lr_schedulers() is None
    assert [type(o) for o in two.optimizers(use_pl_optimizer=False)] == [Adam, Adam]
    assert [type(o.optimizer) for o in two.optimizers()] == [Adam, Adam]
    assert [type(s) for s in two.lr_schedulers()] == [ExponentialLR, CosineAnnealingLR]
    assert two.optimizers()[0].param_groups is two.trainer.optimizers[0].param_groups


def test_a_scheduler_may_be_made_for_what_optimizers_returns() -> None:
    class Late(Manual):
        def on_train_start(self) -> None:
            assert isinstance(self.optimizers(), SGD)
            self.scheduler = ExponentialLR(self.optimizers(), 0.5)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.scheduler.step()

    model = manual(plainly, kind=Late)
    run = fit(model)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 16)
    assert not weights(model).equal(by_hand(list(loader()))) and run.global_step == 4


def test_a_plateau_is_stepped_by_hand_with_a_logged_value() -> None:
    class Plateau(Manual):
        def on_validation_epoch_end(self) -> None:
            self.lr_schedulers().step(self.trainer.callback_metrics.get("val_loss", torch.tensor(1.0)) * 0 + 1)

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [ReduceLROnPlateau(optimizer, factor=0.1, patience=0)]

    run = fit(manual(plainly, kind=Plateau), None, loader(4), max_epochs=3)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


VALUES: dict[str, Any] = {
    "nothing": (lambda loss: None, {}),
    "the loss": (lambda loss: loss, {"loss"}),
    "a dict without one": (lambda loss: {"text": "x"}, {"text"}),
    "a dict with a number": (lambda loss: {"loss": float(loss.detach())}, {"loss"}),
    "a dict with many": (lambda loss: {"loss": loss.expand(3)}, {"loss"}),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_manual_step_may_return_anything_in_a_dict(kind: str) -> None:
    make, keys = VALUES[kind]
    ends: list[Any] = []

    class Look(Manual):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ends.append(outputs)

    def step(model: Any, batch: Any, batch_idx: int) -> Any:
        plainly(model, batch, batch_idx)
        return make(model.loss(batch))

    model = manual(step, kind=Look)
    fit(model)
    assert weights(model).equal(by_hand(list(loader())))
    assert [set(out) for out in ends] == [set(keys)] * 4
    assert not any(isinstance(v, Tensor) and v.requires_grad for out in ends for v in out.values())


def test_a_nan_in_a_manual_loss_ends_the_run() -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        fit(manual(lambda model, batch, batch_idx: model.loss(batch) * float("nan")))


def test_gradients_are_clipped_by_hand() -> None:
    norms: list[float] = []

    def step(model: Any, batch: Any, batch_idx: int) -> None:
        optimizer = model.optimizers()
        optimizer.zero_grad()
        model.manual_backward(model.loss(batch))
        model.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()

    fit(manual(step))
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
