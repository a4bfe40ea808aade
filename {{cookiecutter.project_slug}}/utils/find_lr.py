"""A learning rate by a range test (Smith 2017): train a little, and raise the rate at each step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import engine
from utils import figures
from utils.exits import quiet
from utils.run_state import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
# Fewer steps tell nothing.
FEWEST = 20
# Deviation, in steps, of the Gaussian that losses are smoothed with. It looks both ways, and so does not lag behind.
SMOOTHING = 3.0


class RisingRate(engine.Callback):
    """Raises the learning rate from step to step, notes the losses, and ends the run.

    The engine's LearningRateFinder gives all parameters one rate; here parts of the net keep theirs relative to it
    (`--lr_scales`).

    Args:
        lr: What `--lr` is.

    Attributes:
        rates: What `--lr` would have been, of each step.
        losses: Mean loss of the batches of each step, before it.
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._scales: list[float] = []
        self._window: list[float] = []

    def on_train_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
        """Note what share of the rate each part of the net has; a schedule may have changed it already."""
        self._scales = [group.get("initial_lr", group["lr"]) / self.lr for group in _groups(trainer)]

    def on_train_batch_start(self, trainer: engine.Trainer, pl_module: engine.Module, *args: Any) -> None:
        """Set the rate, whatever the schedule says."""
        done = len(self.losses)
        rate = LOWEST * (HIGHEST / LOWEST) ** (done / (STEPS - 1))
        self.rates[done:] = [rate]
        for group, scale in zip(_groups(trainer), self._scales, strict=True):
            group["lr"] = rate * scale

    def on_train_batch_end(
        self, trainer: engine.Trainer, pl_module: engine.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss; a step of accumulated gradients has that of several batches."""
        # A step that gives no loss ends the search.
        self._window.append(float(outputs["loss"]) if outputs and "loss" in outputs else math.nan)
        if trainer.global_step > len(self.losses) or math.isnan(self._window[-1]):
            # The engine has divided each by how many there usually are.
            self.losses.append(sum(self._window) / len(self._window) * trainer.accumulate_grad_batches)
            self._window = []
        last = self.losses[-1] if self.losses else 0.0
        trainer.should_stop = len(self.losses) >= STEPS or not math.isfinite(last)


def _groups(trainer: engine.Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def find_lr(model: Any, data: Any, lr: float, settings: dict[str, Any], picture: Path) -> dict[str, float]:
    """Find a learning rate, print it, and draw how it was found.

    Args:
        model: The MInterface.
        data: The DInterface.
        lr: What `--lr` is.
        settings: Arguments of a Trainer that does nothing but train.
        picture: The file to draw into.

    Returns:
        lr.

    Raises:
        MisconfigurationException: No rate made the loss fall.
        OSError: The picture cannot be written.
    """
    rising = RisingRate(lr)
    with quiet():
        engine.Trainer(**settings, callbacks=[rising]).fit(model, datamodule=data)
    finite = np.isfinite(rising.losses)
    rates, losses = np.array(rising.rates[: len(finite)])[finite], np.array(rising.losses)[finite]
    if len(losses) < FEWEST:
        raise engine.MisconfigurationException(
            f"--find_lr: after {len(losses)} steps, at a rate of {rising.rates[-1]:.0e}, the loss is no number; look "
            "at data and loss, or give --precision 32-true"
        )
    smooth = smoothed(losses)
    found = suggest(rates, losses, smooth)
    with figures.style(), quiet():
        write_whole(picture, figures.png(draw(rates, losses, smooth, found, lr)))
    if found is None:
        raise engine.MisconfigurationException(
            f"--find_lr: the loss fell at no rate from {LOWEST:g} to {HIGHEST:g} by more than it varies (see {picture})"
        )
    print(f"learning rate  {found:g}: python main.py --lr {found:g} ...  (picture: {picture})")
    return {"lr": found}


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Losses with each one averaged with its neighbours; where they diverge, they do not reach far back."""
    start = float(np.median(losses[:10]))
    fall = max(start - float(np.percentile(losses, 5)), float(np.std(losses[:10])))
    losses, steps = np.minimum(losses, start + 3 * fall), np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / SMOOTHING) ** 2)
    mean: np.ndarray = (weights @ losses) / weights.sum(axis=1)
    return mean


def suggest(rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray) -> float | None:
    """The rate to train with, to two digits; None if the loss did not fall.

    It lies between the two that fastai's `lr_find` suggests as "steep" and "minimum", in the geometric mean: where the
    loss falls fastest over the logarithm of the rate, and a tenth of where it is lowest. Over the rate itself, as
    Lightning has it, the slope is steepest among the smallest rates, which differ by almost nothing.

    Args:
        rates: Of each step, rising.
        losses: Of each step.
        smooth: The same, smoothed.
    """
    lowest = int(smooth.argmin())
    noise = float(np.std(losses[: lowest + 1] - smooth[: lowest + 1]))
    # Of a hundred curves of nothing but noise, one falls by so much.
    if lowest < 2 or smooth[0] - smooth[lowest] <= 2 * noise:
        return None
    steepest = int(np.gradient(smooth, np.log(rates))[: lowest + 1].argmin())
    return float(f"{math.sqrt(rates[steepest] * rates[lowest] / 10):.1e}")


def draw(rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray, found: float | None, lr: float) -> Figure:
    """The loss over rates, with the suggestion and the run's own rate marked."""
    drawn = figures.figure(6.4, 4.0)
    ax = drawn.subplots()
    ax.set_xscale("log")
    ax.plot(rates, losses, ".", color=figures.SKY, markersize=4, label="loss of a step")
    ax.plot(rates, smooth, color=figures.BLUE, linewidth=2, label="smoothed")
    if LOWEST <= lr <= HIGHEST:
        ax.axvline(lr, color=figures.GREY, linestyle="--", linewidth=1.3, label=f"now: --lr {lr:g}")
    if found is not None:
        loss = float(np.interp(math.log(found), np.log(rates), smooth))
        ax.axvline(found, color=figures.ORANGE, linewidth=1.3)
        ax.plot(
            [found], [loss], "D-", color=figures.ORANGE, markersize=8, zorder=3, label=f"suggestion: --lr {found:g}"
        )
    # Where it diverges, the loss would squash all that matters. Above that there is room for the legend.
    low, high = np.percentile([*losses[: int(smooth.argmin()) + 1], smooth[0]], [2, 98])
    low = min(float(low), float(smooth.min()))
    room = max(high - low, 1e-12)
    ax.set_ylim(low - 0.15 * room, high + 0.6 * room)
    ax.set_xlim(LOWEST, HIGHEST)
    ax.set(title="Loss at rising learning rates", xlabel="Learning rate", ylabel="Training loss")
    ax.legend(loc="upper left", fontsize=9, frameon=True, edgecolor="none", framealpha=1)
    return drawn
