"""Callbacks that come with the engine."""

from __future__ import annotations

from engine.callbacks.early_stopping import EarlyStopping
from engine.callbacks.learning_rate_monitor import LearningRateMonitor
from engine.callbacks.model_checkpoint import ModelCheckpoint
from engine.callbacks.terminal import ModelSummary, RichProgressBar, print_results

__all__ = [
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "RichProgressBar",
    "print_results",
]
