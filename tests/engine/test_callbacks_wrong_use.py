"""Callbacks in wrong use: one line says what was given, what is allowed, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import (
    BasePredictionWriter,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from toy import Memory, Net, fit, loader, trainer


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().step()


class Twins(Net):
    """Two groups of the same name, two schedulers."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": [parameter], "name": "same"} for parameter in self.parameters()]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1) for _ in range(2)]


class Nameless(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hparams.clear()
        del self.lr

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: Timer("1:00"), "duration='1:00'; give days:hours:minutes:seconds"),
    (lambda: Timer(interval="batch"), "interval='batch'; give step or epoch"),  # type: ignore[arg-type]
    (lambda: GradientAccumulationScheduler({}), "scheduling={}; give epochs from 0, and batches from 1"),
    (lambda: GradientAccumulationScheduler({-1: 2}), "scheduling={-1: 2}; give epochs from 0"),
    (lambda: GradientAccumulationScheduler({1: 0}), "scheduling={1: 0}; give epochs from 0"),
    (
        lambda: LambdaCallback(on_train_ends=print),
        "LambdaCallback(on_train_ends=...): there is no such hook; give on_tr",
    ),
    (lambda: LambdaCallback(state_dict=print), "LambdaCallback(state_dict=...): there is no such hook; give one of"),
    (lambda: BasePredictionWriter("step"), "write_interval='step'; give batch, epoch or"),  # type: ignore[arg-type]
    (lambda: LearningRateMonitor("batch"), "logging_interval='batch'; give step, epoch or None"),  # type: ignore[arg-type]
    (lambda: LearningRateFinder(mode="cubic"), "mode='cubic'; give exponential or linear"),  # type: ignore[arg-type]
    (lambda: LearningRateFinder(min_lr=1.0), "min_lr=1.0, max_lr=1, num_training_steps=100; give 0 < min_lr < max_lr"),
    (lambda: LearningRateFinder(num_training_steps=0), "num_training_steps=0; give 0 < min_lr"),
    (lambda: StochasticWeightAveraging(0), "swa_lrs=0; give a number such as 0.01"),
    (lambda: StochasticWeightAveraging([0.1, -1.0]), "swa_lrs=[0.1, -1.0]; give a number such as 0.01"),
    (lambda: StochasticWeightAveraging(0.1, 0), "swa_epoch_start=0; give an epoch from 1, or a share"),
    (lambda: StochasticWeightAveraging(0.1, 1.5), "swa_epoch_start=1.5; give an epoch from 1, or a share"),
    (
        lambda: StochasticWeightAveraging(0.1, annealing_epochs=-1),
        "annealing_epochs=-1, annealing_strategy='cos'; give",
    ),
    (lambda: StochasticWeightAveraging(0.1, annealing_strategy="up"), "annealing_strategy='up'; give"),  # type: ignore[arg-type]
    (lambda: StochasticWeightAveraging(0.1, avg_fn=1), "avg_fn=1; give a function"),  # type: ignore[arg-type]
    (lambda: WeightAveraging(avg_fn=print, multi_avg_fn=print), "avg_fn and multi_avg_fn: give one of them"),  # type: ignore[arg-type]
    (lambda: EMAWeightAveraging(update_every_n_steps=0), "update_every_n_steps=0; give a decay from 0"),
    (lambda: ModelSummary(max_depth=-2), "max_depth=-2; give a whole number from -1"),
    (lambda: RichProgressBar(theme="dark"), "theme: colours cannot be changed"),
    (lambda: RichProgressBar(refresh_rate=-1), "refresh_rate=-1; give a number from 0"),
    (lambda: TQDMProgressBar(process_position=1), "process_position=1: the bar finds its place; leave it out"),
    (lambda: TQDMProgressBar(refresh_rate=-1), "refresh_rate=-1; give a whole number from 0"),
    (lambda: type("Bar", (TQDMProgressBar,), {"init_train_tqdm": print}), "Bar.init_train_tqdm would never be called"),
    (lambda: ProgressBar().trainer, "ProgressBar is not attached to a Trainer yet"),
    (lambda: trainer(callbacks=RichProgressBar()), "enable_progress_bar=False, but callbacks has a RichProgressBar"),
    (
        lambda: trainer(callbacks=[RichProgressBar(), TQDMProgressBar()], enable_progress_bar=True),
        "callbacks has 2 progress bars, RichProgressBar and TQDMProgressBar; give one",
    ),
    (
        lambda: fit(Net(), callbacks=LearningRateMonitor()),
        "LearningRateMonitor has nowhere to log to; give the Trainer",
    ),
    (
        lambda: fit(Twins(), callbacks=LearningRateMonitor(), logger=Memory()),
        "lr-SGD: parameter groups have the same name",
    ),
    (
        lambda: fit(Net(), callbacks=GradientAccumulationScheduler({1: 2}), accumulate_grad_batches=2),
        "accumulate_grad_batches=2 and GradientAccumulationScheduler: give one of them",
    ),
    (
        lambda: fit(Manual(), callbacks=GradientAccumulationScheduler({1: 2})),
        "GradientAccumulationScheduler needs automatic optimization",
    ),
    (
        lambda: fit(Net(), callbacks=StochasticWeightAveraging(0.1), max_epochs=-1, max_steps=1),
        "swa_epoch_start=0.8 of max_epochs=-1; give a number of epochs",
    ),
    (
        lambda: fit(Manual(), callbacks=StochasticWeightAveraging(0.1)),
        "StochasticWeightAveraging needs automatic optimization",
    ),
    (
        lambda: fit(Twins(), callbacks=StochasticWeightAveraging(0.1)),
        "StochasticWeightAveraging needs one of each at most; there are 1 optimizers and 2 schedulers",
    ),
    (
        lambda: fit(Nameless(), callbacks=LearningRateFinder()),
        "neither Nameless nor its hparams have lr or learning_rate",
    ),
    (lambda: fit(Net(), callbacks=LearningRateFinder(attr_name="rate")), "neither Net nor its hparams have rate"),
    (lambda: fit(Manual(), callbacks=LearningRateFinder()), "LearningRateFinder needs automatic optimization with one"),
    (
        lambda: trainer(callbacks=BasePredictionWriter()).predict(Net(), loader(2)),
        "BasePredictionWriter has no write_on_batch_end; write one",
    ),
    (
        lambda: trainer(callbacks=BasePredictionWriter("epoch")).predict(Net(), loader(2)),
        "BasePredictionWriter has no write_on_epoch_end; write one",
    ),
    (lambda: ModelCheckpoint(mode="best"), "mode='best'; give 'min'"),  # type: ignore[arg-type]
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("use", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_wrong_use_says_what_to_do(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(engine.MisconfigurationException) as caught:
        use()
    assert message in str(caught.value) and "\n" not in str(caught.value)
