"""Callbacks that come with the engine."""

from __future__ import annotations

from collections.abc import Sequence

from engine.callback import Callback
from engine.callbacks.early_stopping import EarlyStopping
from engine.callbacks.learning_rate_monitor import LearningRateMonitor
from engine.callbacks.model_checkpoint import ModelCheckpoint, find_checkpoint
from engine.callbacks.terminal import ModelSummary, RichProgressBar, print_results
from engine.callbacks.weight_averaging import EMAWeightAveraging
from engine.exceptions import MisconfigurationException

__all__ = [
    "EMAWeightAveraging",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "RichProgressBar",
    "find_checkpoint",
    "print_results",
    "with_defaults",
]


def with_defaults(
    callbacks: Callback | Sequence[Callback] | None, checkpointing: bool, progress_bar: bool, model_summary: bool
) -> list[Callback]:
    """The given callbacks and, where they are enabled and not among them, the standard ones.

    Raises:
        MisconfigurationException: Checkpointing is off, and a ModelCheckpoint was given.
    """
    chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
    if not checkpointing and any(isinstance(c, ModelCheckpoint) for c in chosen):
        raise MisconfigurationException("enable_checkpointing=False, but callbacks has a ModelCheckpoint; drop one")
    defaults = [
        (progress_bar, RichProgressBar),
        (model_summary, ModelSummary),
        (checkpointing, ModelCheckpoint),
    ]
    chosen += [kind() for wanted, kind in defaults if wanted and not any(isinstance(c, kind) for c in chosen)]
    return chosen
