"""Callbacks that come with the engine."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from engine.callback import Callback
from engine.callbacks.checkpoint import Checkpoint, OnExceptionCheckpoint
from engine.callbacks.checkpoint_search import find_checkpoint
from engine.callbacks.early_stopping import EarlyStopping
from engine.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from engine.callbacks.learning_rate_finder import LearningRateFinder
from engine.callbacks.learning_rate_monitor import LearningRateMonitor
from engine.callbacks.model_checkpoint import ModelCheckpoint
from engine.callbacks.prediction_writer import BasePredictionWriter
from engine.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
from engine.callbacks.stochastic_weight_avg import StochasticWeightAveraging
from engine.callbacks.terminal import ModelSummary, print_results
from engine.callbacks.timer import Timer
from engine.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from engine.exceptions import MisconfigurationException

RichModelSummary = ModelSummary

__all__ = ["BasePredictionWriter", "Callback", "Checkpoint", "EMAWeightAveraging", "EarlyStopping"]
__all__ += ["GradientAccumulationScheduler", "LambdaCallback", "LearningRateFinder", "LearningRateMonitor"]
__all__ += ["ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary"]
__all__ += ["RichProgressBar", "StochasticWeightAveraging", "TQDMProgressBar", "Timer", "WeightAveraging"]
__all__ += ["find_checkpoint", "print_results", "with_defaults"]


class LambdaCallback(Callback):
    """Calls functions as hooks: `LambdaCallback(on_train_end=lambda trainer, pl_module: ...)`.

    Args:
        **hooks: Functions by the name of the hook, with its arguments but `self`; None for none.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        known = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
        for name, function in hooks.items():
            if name not in known:
                nearest = " or ".join(difflib.get_close_matches(name, known, 1)) or f"one of {', '.join(known)}"
                raise MisconfigurationException(f"LambdaCallback({name}=...): there is no such hook; give {nearest}")
            if function is not None:
                setattr(self, name, function)


def with_defaults(
    callbacks: Callback | Sequence[Callback] | None, checkpointing: bool, progress_bar: bool, model_summary: bool
) -> list[Callback]:
    """The given callbacks and, where they are enabled and not among them, the standard ones.

    Raises:
        MisconfigurationException: Something is off that was given, or there are two progress bars.
    """
    chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
    for enabled, name, kind in (
        (checkpointing, "enable_checkpointing", Checkpoint),
        (progress_bar, "enable_progress_bar", ProgressBar),
    ):
        given = [type(callback).__name__ for callback in chosen if isinstance(callback, kind)]
        if given and not enabled:
            raise MisconfigurationException(f"{name}=False, but callbacks has a {given[0]}; drop one")
        if kind is ProgressBar and len(given) > 1:
            raise MisconfigurationException(
                f"callbacks has {len(given)} progress bars, {' and '.join(given)}; give one"
            )
    defaults: list[tuple[bool, type[Callback], type[Callback]]] = [
        (progress_bar, ProgressBar, RichProgressBar),
        (model_summary, ModelSummary, ModelSummary),
        (checkpointing, Checkpoint, ModelCheckpoint),
    ]
    chosen += [make() for wanted, kind, make in defaults if wanted and not any(isinstance(c, kind) for c in chosen)]
    return chosen
