"""Optimizers and schedulers in every form, LBFGS, own optimizer steps, and manual optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deviations
import parts
import pytest
import torch
from harness import Side
from harness import same as parity
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

Same = Callable[..., None]


def configured(configure: Callable[[Any], Any]) -> Any:
    """A net whose `configure_optimizers` returns `configure(parameters)`."""

    def cls(pl: Any) -> type:
        class Configured(parts.net(pl)):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                return configure(list(self.parameters()))

        return Configured

    return cls


def fit(side: Side, cls: Any, train: int = 4, **options: Any) -> None:
    trainer = side.trainer(**{"max_epochs": 3, "num_sanity_val_steps": 0, **options})
    trainer.fit(side.module(cls), parts.loader(train), parts.loader(2, first=50))


def entry(scheduler: Any, **options: Any) -> Callable[[Any], Any]:
    """A function for `configured`: SGD with `scheduler(optimizer)`."""

    def configure(parameters: Any) -> Any:
        optimizer = SGD(parameters, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), **options}}

    return configure


def with_scheduler(form: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """A function for `configured`: `form(optimizer, scheduler)`."""

    def configure(parameters: Any) -> Any:
        optimizer = SGD(parameters, lr=0.1)
        return form(optimizer, StepLR(optimizer, 1, gamma=0.5))

    return configure


FORMS: dict[str, Callable[[Any], Any]] = {
    "adam": lambda parameters: Adam(parameters, lr=0.01),
    "list": lambda parameters: [SGD(parameters, lr=0.1)],
    "tuple": lambda parameters: (SGD(parameters, lr=0.1),),
    "dict": lambda parameters: {"optimizer": SGD(parameters, lr=0.1)},
    "list_of_dict": lambda parameters: [{"optimizer": SGD(parameters, lr=0.1)}],
    "groups": lambda parameters: SGD([{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:]}], lr=0.1),
    "none": lambda parameters: None,
    "lists": with_scheduler(lambda o, s: ([o], [s])),
    "lists_of_dicts": with_scheduler(lambda o, s: ([o], [{"scheduler": s, "interval": "step"}])),
    "list_and_scheduler": with_scheduler(lambda o, s: ([o], s)),
    "dict_and_scheduler": with_scheduler(lambda o, s: {"optimizer": o, "lr_scheduler": s}),
    "list_of_dict_and_scheduler": with_scheduler(lambda o, s: [{"optimizer": o, "lr_scheduler": s}]),
    "two_schedulers": with_scheduler(lambda o, s: ([o], [s, {"scheduler": LinearLR(o), "interval": "step"}])),
    "epoch_every_2": entry(lambda o: StepLR(o, 1, gamma=0.5), frequency=2),
    "step": entry(lambda o: StepLR(o, 1, gamma=0.5), interval="step"),
    "step_every_2": entry(lambda o: StepLR(o, 1, gamma=0.5), interval="step", frequency=2),
    "one_cycle": entry(lambda o: OneCycleLR(o, 0.2, total_steps=12), interval="step"),
    "named": entry(lambda o: StepLR(o, 1), name="mine", strict=False),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_configure_optimizers_returns(same: Same, name: str, accumulate: int) -> None:
    # Every 2 steps, of batches there and of optimizer steps here.
    expected = [deviations.FREQUENCY_IN_STEPS] * (name == "step_every_2" and accumulate == 2)
    same(lambda side: fit(side, configured(FORMS[name]), accumulate_grad_batches=accumulate), *expected)


PLATEAUS: dict[str, dict[str, Any]] = {
    "epoch": {"monitor": "val_loss"},
    "train_metric": {"monitor": "train_loss_epoch"},
    "every_2": {"monitor": "val_loss", "frequency": 2},
    "step": {"monitor": "train_loss_step", "interval": "step"},
    "step_every_2": {"monitor": "train_loss", "interval": "step", "frequency": 2},
    "missing": {"monitor": "nothing"},
    "missing_not_strict": {"monitor": "nothing", "strict": False},
    "no_monitor": {},
}


def plateau(optimizer: Any) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)


@pytest.mark.parametrize("name", PLATEAUS)
def test_plateaus(same: Same, name: str) -> None:
    expected = {
        "missing": [deviations.LOGGED_BEFORE_ERROR, deviations.TEARDOWN_AFTER_ERROR],
        "no_monitor": [deviations.TEARDOWN_AFTER_ERROR],
    }
    same(lambda side: fit(side, configured(entry(plateau, **PLATEAUS[name]))), *expected.get(name, []))


def test_values_are_logged_before_a_plateau_scheduler_steps() -> None:
    configure = configured(entry(plateau, monitor="val_loss"))
    parity(lambda side: fit(side, configure), deviations.LOGGED_BEFORE_PLATEAU, closures=True)


def test_a_bare_plateau_with_a_monitor_beside_it(same: Same) -> None:
    def configure(parameters: Any) -> Any:
        optimizer = SGD(parameters, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": plateau(optimizer), "monitor": "val_loss"}

    same(lambda side: fit(side, configured(configure)))


def test_a_plateau_steps_before_the_checkpoint(same: Same) -> None:
    def program(side: Side) -> None:
        checkpoint = side.callback(lambda pl: pl.callbacks.ModelCheckpoint, "K", dirpath="files")
        fit(side, configured(entry(plateau, monitor="val_loss")), callbacks=[checkpoint], enable_checkpointing=True)

    same(program, deviations.PLATEAU_BEFORE_CHECKPOINT, deviations.MONITORING_LAST)


def lbfgs(parameters: Any) -> Any:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_lbfgs(same: Same, options: dict[str, Any]) -> None:
    same(lambda side: fit(side, configured(lbfgs), **options))


def own_step(pl: Any) -> type:
    class OwnStep(parts.net(pl)):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (self.trainer.global_step + 1)
            optimizer.step(closure=optimizer_closure)

    return OwnStep


def skipped_step(pl: Any) -> type:
    class SkippedStep(parts.net(pl)):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    return SkippedStep


def own_scheduler_step(pl: Any) -> type:
    class OwnSchedulerStep(configured(FORMS["step"])(pl)):  # type: ignore[misc]
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()
            scheduler.step()

    return OwnSchedulerStep


def own_gradients(pl: Any) -> type:
    class OwnGradients(parts.net(pl)):  # type: ignore[misc]
        def backward(self, loss: Any) -> None:
            (2 * loss).backward()

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
        ) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="value")

    return OwnGradients


@pytest.mark.parametrize("cls", [own_step, skipped_step, own_scheduler_step, own_gradients], ids=lambda f: f.__name__)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_overridden_parts_of_a_step(same: Same, cls: Any, accumulate: int) -> None:
    same(lambda side: fit(side, cls, accumulate_grad_batches=accumulate))


def manual(pl: Any) -> type:
    class Manual(parts.net(pl)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [StepLR(optimizer, 1)]

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step()

    return Manual


def manual_every_other(pl: Any) -> type:
    class EveryOther(manual(pl)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            loss = self.loss(batch) / 2
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()
            return {"loss": loss, "n": 1}

    return EveryOther


def manual_with_closure(pl: Any) -> type:
    class WithClosure(manual(pl)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    return WithClosure


def gan(pl: Any) -> type:
    class GAN(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = torch.nn.Linear(3, 1), torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.toggle_optimizer(first)
            loss = -self.critic(self.generator(batch[0])).mean()
            self.log("g_loss", loss, prog_bar=True)
            self.log("toggled", float(self.critic.weight.requires_grad))
            self.manual_backward(loss)
            first.step()
            first.zero_grad()
            self.untoggle_optimizer(first)
            with self.toggled_optimizer(second):
                fake = self.critic(self.generator(batch[0]).detach())
                loss = (self.critic(batch[1]) - 1).square().mean() + fake.square().mean()
                self.log("d_loss", loss)
                self.manual_backward(loss)
                second.step()
                second.zero_grad()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.critic(self.generator(batch[0])).mean())

        def configure_optimizers(self) -> Any:
            first, second = SGD(self.generator.parameters(), lr=0.1), Adam(self.critic.parameters(), lr=0.01)
            return [first, second], [StepLR(second, 1)]

    return GAN


MANUAL = [manual, manual_every_other, manual_with_closure, gan]


@pytest.mark.parametrize("cls", MANUAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"log_every_n_steps": 2}, {"max_steps": 8, "max_epochs": -1}, {"max_steps": 24}], ids=str
)
def test_manual_optimisation(same: Same, cls: Any, options: dict[str, Any]) -> None:
    same(lambda side: fit(side, cls, **options))


def test_a_gan_whose_max_steps_ends_between_its_optimizers(same: Same) -> None:
    program = lambda side: fit(side, gan, max_steps=5, max_epochs=-1, limit_val_batches=0)  # noqa: E731
    same(program, deviations.WITHIN_EPOCH)


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {  # class, arguments of the Trainer
    "clipping_of_manual": (manual, {"gradient_clip_val": 0.1}),
    "accumulation_of_manual": (manual, {"accumulate_grad_batches": 2}),
    "two_optimizers": (configured(lambda ps: [SGD(ps[:1], lr=0.1), SGD(ps[1:], lr=0.1)]), {}),
    "no_optimizer": (configured(lambda ps: 1), {}),
    "unknown_interval": (configured(entry(lambda o: StepLR(o, 1), interval="day")), {}),
    "scheduler_of_another": (configured(entry(lambda o: StepLR(SGD([torch.nn.Parameter()], lr=1.0), 1))), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use_is_refused_at_the_same_point(same: Same, name: str) -> None:
    cls, options = REFUSED[name]

    # The first of these is refused by Lightning before setup, so that there is nothing to tear down.
    expected = [deviations.REFUSED] * (name == "two_optimizers")
    expected += [deviations.REFUSED_AT_ONCE if "manual" in name else deviations.TEARDOWN_AFTER_ERROR]
    same(lambda side: fit(side, cls, **options), *expected, refused=True)
