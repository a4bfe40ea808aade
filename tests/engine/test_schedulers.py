"""Learning-rate schedulers: what configure_optimizers may return, and when they step."""

from __future__ import annotations

from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from toy import Net, fit, loader, weights


class Scheduled(Net):
    """Trains with what `make(optimizer)` returns, and notes the rate in use in every batch."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.hparams.clear()
        self.make = make
        self.rates: list[float] = []
        self.after: list[float] = []

    def configure_optimizers(self) -> Any:
        return self.make(SGD(self.parameters(), lr=1.0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx) * 1e-3

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def halving(optimizer: Any) -> StepLR:
    return StepLR(optimizer, step_size=1, gamma=0.5)


FORMS = {
    "pair": lambda o: ([o], [halving(o)]),
    "pair with a dict": lambda o: ([o], [{"scheduler": halving(o), "interval": "epoch"}]),
    "single scheduler": lambda o: ([o], halving(o)),
    "single dict": lambda o: ([o], {"scheduler": halving(o)}),
    "tuple": lambda o: (o, halving(o)),
    "dict": lambda o: {"optimizer": o, "lr_scheduler": halving(o)},
    "dict with a dict": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": halving(o), "name": "x"}},
    "list of dicts": lambda o: [{"optimizer": o, "lr_scheduler": halving(o)}],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_scheduler_steps_once_an_epoch_by_default(form: str) -> None:
    model = Scheduled(FORMS[form])
    fit(model, loader(4), max_epochs=3)
    assert model.rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "make", [lambda o: o, lambda o: [o], lambda o: (o,), lambda o: ([o], []), lambda o: {"optimizer": o}]
)
def test_an_optimizer_may_come_without_schedulers(make: Any) -> None:
    model = Scheduled(make)
    run = fit(model, loader(4))
    assert model.lr_schedulers() is None and run.lr_scheduler_configs == []
    assert model.rates == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"interval": "step"}, [1, 0.5, 0.25, 0.125, 1 / 16, 1 / 32]),
        ({"interval": "step", "frequency": 2}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"interval": "step", "frequency": 4}, [1, 1, 1, 1, 0.5, 0.5]),
        ({"interval": "epoch", "frequency": 2}, [1, 1, 1, 1, 0.5, 0.5]),
    ],
)
def test_interval_and_frequency(options: dict[str, Any], rates: list[float]) -> None:
    model = Scheduled(lambda o: ([o], [{"scheduler": halving(o), **options}]))
    fit(model, loader(4), max_epochs=3)
    assert model.rates == rates


def test_step_intervals_count_optimizer_steps() -> None:
    model = Scheduled(lambda o: ([o], [{"scheduler": halving(o), "interval": "step", "frequency": 2}]))
    fit(model, loader(16), accumulate_grad_batches=2)
    assert model.rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedulers_have_stepped_in_on_train_batch_end_and_in_validation(interval: str) -> None:
    seen = []
    model = Scheduled(lambda o: ([o], [{"scheduler": halving(o), "interval": interval}]))
    model.on_validation_start = lambda: seen.append(model.trainer.optimizers[0].param_groups[0]["lr"])
    fit(model, loader(4), loader(2))
    assert model.after == ([0.5, 0.25] if interval == "step" else [1.0, 0.5])
    assert seen == model.after[-1:]


def test_several_schedulers_of_one_optimizer_all_step() -> None:
    def make(o: Any) -> Any:
        first, second = LambdaLR(o, lambda n: 1.0), halving(o)
        return [o], [{"scheduler": first, "interval": "step"}, second]

    model = Scheduled(make)
    fit(model, loader(4), max_epochs=2)
    first, second = model.lr_schedulers()
    assert (first.last_epoch, second.last_epoch) == (4, 2)


def test_one_cycle_runs_over_the_estimated_steps() -> None:
    def make(o: Any) -> Any:
        total = model.trainer.estimated_stepping_batches
        return [o], [{"scheduler": OneCycleLR(o, max_lr=1.0, total_steps=int(total)), "interval": "step"}]

    model = Scheduled(make)
    fit(model, loader(12), max_epochs=2, accumulate_grad_batches=2)
    assert max(model.rates) == pytest.approx(1.0, rel=0.1)
    assert model.rates[-1] < 1e-3


def plateau(o: Any, **options: Any) -> Any:
    scheduler = ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=0.0)
    return {"optimizer": o, "lr_scheduler": {"scheduler": scheduler, "monitor": "v", **options}}


class Rising(Scheduled):
    """Its validation and training values never improve."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("v", 1.0 + self.current_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("t", 1.0 + self.global_step)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("late", 1.0 + self.current_epoch)


@pytest.mark.parametrize("name", ["v", "late"])
def test_plateau_steps_at_the_end_of_the_epoch_before_checkpoints_are_saved(name: str) -> None:
    saved = []

    class Saver(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            state = torch.load(self.best_model_path, weights_only=True)
            saved.append(
                (state["optimizer_states"][0]["param_groups"][0]["lr"], state["lr_schedulers"][0]["last_epoch"])
            )

    model = Rising(lambda o: plateau(o, monitor=name))
    fit(model, loader(4), loader(2), max_epochs=3, callbacks=Saver(), enable_checkpointing=True)
    assert saved == [(1.0, 1), (pytest.approx(0.1), 2), (pytest.approx(0.01), 3)]
    assert model.rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1])


def test_plateau_takes_the_monitor_beside_a_bare_scheduler() -> None:
    def make(o: Any) -> Any:
        return {"optimizer": o, "lr_scheduler": plateau(o)["lr_scheduler"]["scheduler"], "monitor": "v"}

    model = Rising(make)
    fit(model, loader(4), loader(2), max_epochs=3)
    assert model.rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1])


def test_plateau_follows_values_of_single_steps() -> None:
    model = Rising(lambda o: plateau(o, monitor="t", interval="step"))
    fit(model, loader(8))
    assert model.rates == pytest.approx([1, 1, 0.1, 0.01])


def test_plateau_frequency_counts_epochs() -> None:
    model = Rising(lambda o: plateau(o, frequency=2))
    fit(model, loader(2), loader(2), max_epochs=6)
    assert model.rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1])


def test_plateau_without_its_value_fails_by_name_or_waits() -> None:
    with pytest.raises(engine.MisconfigurationException, match="watches 'nowhere'.*logged are: late, t, train_loss, v"):
        fit(Rising(lambda o: plateau(o, monitor="nowhere")), loader(4), loader(2))
    model = Rising(lambda o: plateau(o, monitor="nowhere", strict=False))
    fit(model, loader(4), loader(2), max_epochs=3)
    assert set(model.rates) == {1.0}


def other() -> Any:
    return SGD(Net().parameters(), lr=1.0)


ERRORS = {
    "an empty list": (lambda o: [], "returned nothing; return an optimizer"),
    "text": (lambda o: "adam", "returned str"),
    "two optimizers": (lambda o: [o, o], "returned 2 optimizers; set self.automatic_optimization"),
    "two lists": (lambda o: ([o, o], [halving(o)]), "returned 2 optimizers"),
    "a dict without one": (lambda o: {"lr_scheduler": halving(o)}, r"a dict of \['lr_scheduler'\]"),
    "an unknown key": (lambda o: {"optimizer": o, "scheduler": halving(o)}, r"a dict of \['optimizer', 'scheduler'\]"),
    "an unknown scheduler key": (lambda o: ([o], [{"scheduler": halving(o), "every": 1}]), "keys are"),
    "a scheduler dict without one": (lambda o: ([o], [{"interval": "step"}]), "'scheduler' is required"),
    "no scheduler": (lambda o: ([o], ["cosine"]), "str is no scheduler"),
    "an interval": (lambda o: ([o], [{"scheduler": halving(o), "interval": "batch"}]), "interval 'batch'; give"),
    "a frequency": (lambda o: ([o], [{"scheduler": halving(o), "frequency": 0}]), "frequency 0; give a whole number"),
    "a plateau without monitor": (lambda o: ([o], [ReduceLROnPlateau(o)]), "ReduceLROnPlateau needs a value"),
    "another optimizer's": (lambda o: ([o], [halving(other())]), "configure_optimizers did not return"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_senseless_return_value_is_refused(kind: str) -> None:
    make, message = ERRORS[kind]
    with pytest.raises(engine.MisconfigurationException, match=message) as caught:
        fit(Scheduled(make))
    assert "\n" not in str(caught.value)


def test_plateau_takes_the_newest_value_also_where_no_validation_came() -> None:
    model = Rising(lambda o: plateau(o, strict=False))
    fit(model, loader(2), loader(2), max_epochs=6, check_val_every_n_epoch=2)
    # Validated after epochs 1, 3 and 5; what is worse than before, or the same again, counts.
    assert model.rates == pytest.approx([1, 1, 1, 0.1, 0.01, 0.001])


def test_no_optimizer_at_all_changes_nothing_and_says_so() -> None:
    model = Scheduled(lambda o: None)
    before = weights(model)
    with pytest.warns(UserWarning, match="configure_optimizers returned None"):
        run = fit(model)
    assert torch.equal(weights(model), before)
    assert run.global_step == 4
