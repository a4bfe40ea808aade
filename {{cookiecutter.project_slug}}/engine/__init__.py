"""A bundled Trainer on plain PyTorch, with the hook names and meaning of Lightning 2.

    import engine

    trainer = engine.Trainer(max_epochs=10)
    trainer.fit(model, datamodule=data)

Where to read on: `trainer.py` (arguments and entry points), `loops.py` (what happens in a step).
"""

from __future__ import annotations

from engine import callbacks, loggers, profilers, strategies, utilities
from engine.callback import Callback
from engine.datamodule import DataModule
from engine.exceptions import MisconfigurationException
from engine.last_words import watch_processes
from engine.module import Module
from engine.older import find_older_names
from engine.samples import sample_uniform
from engine.seed import seed_everything
from engine.trainer import Trainer
from engine.version import __version__ as __version__

LightningModule = Module
LightningDataModule = DataModule
find_older_names(Trainer)
watch_processes()

__all__ = [
    "Callback",
    "DataModule",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "Module",
    "Trainer",
    "callbacks",
    "loggers",
    "profilers",
    "sample_uniform",
    "seed_everything",
    "strategies",
    "utilities",
]
