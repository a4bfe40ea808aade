"""EMAWeightAveraging: judge and keep a moving average of the weights rather than the newest ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.callback import Callback
from engine.checkpoint import load_weights
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class EMAWeightAveraging(Callback):
    """Keeps an exponential moving average of weights and buffers (Polyak & Juditsky 1992).

    After each optimizer step the average becomes decay * average + (1 - decay) * weights.
    Validation within fit sees the average, checkpoints hold it as their weights (and the newest ones beside it), and
    after training the module has it.

    Args:
        decay: Share of the average that stays in each step, from 0 to below 1.
        update_every_n_steps: Move after every so many optimizer steps.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1 or update_every_n_steps < 1:
            given = f"decay={decay}, update_every_n_steps={update_every_n_steps}"
            raise MisconfigurationException(f"{given}; give a decay from 0 to below 1, and a number of steps from 1")
        self.decay, self.update_every_n_steps = decay, update_every_n_steps
        self._average: dict[str, Tensor] = {}
        self._swapped = False
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self._average = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Take the average from the checkpoint, and give the module the weights that training had come to."""
        if trainer.stage == "fit" and "current_model_state" in checkpoint:
            self._average = _copy(pl_module)
            load_weights(pl_module, checkpoint.pop("current_model_state"), "to resume from")

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Begin with the weights as they are, if there is no average yet."""
        self._average = self._average or _copy(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Count steps from here."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Move the average, if the weights have changed."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.update_every_n_steps:
            return
        newest = _tensors(pl_module)
        moving = [name for name, value in newest.items() if value.is_floating_point()]
        torch._foreach_lerp_([self._average[n] for n in moving], [newest[n].detach() for n in moving], 1 - self.decay)
        for name in newest.keys() - set(moving):
            self._average[name].copy_(newest[name])

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Give the module the average, within fit."""
        if trainer.stage == "fit" and not self._swapped:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Give it its own weights again."""
        if self._swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Keep both, the average as the weights."""
        if self._average:
            newest, names = checkpoint["state_dict"], _first_names(pl_module)
            other = {name: self._average[names[name]] if name in names else value for name, value in newest.items()}
            both = (newest, other) if self._swapped else (other, newest)
            checkpoint["state_dict"], checkpoint["current_model_state"] = both

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The module keeps the average, also when a finished run was resumed and trained no more."""
        for name, value in _tensors(pl_module).items():
            value.data.copy_(self._average[name])

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Leave no swapped weights behind, should validation have failed."""
        self.on_validation_end(trainer, pl_module)

    def _swap(self, module: Module) -> None:
        # Of the tensors' memory, not of their values: that is exact, and copies nothing.
        for name, value in _tensors(module).items():
            value.data, self._average[name] = self._average[name], value.data
        self._swapped = not self._swapped


def _first_names(module: nn.Module) -> dict[str, str]:
    """For every name of a tensor in the state dict the first name that this tensor has: layers may share weights."""
    first: dict[int, str] = {}
    tensors = [(n, v) for n, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)]
    return {name: first.setdefault(id(value), name) for name, value in tensors}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Each tensor of the state dict once, by its first name."""
    state = module.state_dict(keep_vars=True)
    return {name: state[name] for name in dict.fromkeys(_first_names(module).values())}


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _tensors(module).items()}
