"""WeightAveraging: judge and keep an average of the weights rather than the newest ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from engine.callback import Callback
from engine.checkpoint import load_weights
from engine.exceptions import MisconfigurationException
from engine.fsdp import as_local

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer

# (average, newest, number of states averaged so far): the new average, or, of several tensors, changed in place.
AverageFn = Callable[[Tensor, Tensor, Tensor], Tensor]
MultiAverageFn = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None]


class WeightAveraging(Callback):
    """Keeps an average of weights and buffers, by default of those after every optimizer step, all alike.

    Validation within fit sees the average, checkpoints hold it as their weights (and the newest ones beside it), and
    after training the module has it. Override `should_update` to choose the moments.

    Args:
        device: Where the average is kept; default: where the module is.
        use_buffers: Average buffers, too; otherwise the newest are kept, as whole numbers always are.
        avg_fn: Makes the new average of (average, newest, number averaged so far).
        multi_avg_fn: The same for lists of tensors, in place.
    """

    # Asked for the weights of checkpoints that hold nothing else.
    averages_weights: ClassVar[bool] = True

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        avg_fn: AverageFn | None = None,
        multi_avg_fn: MultiAverageFn | None = None,
    ) -> None:
        if isinstance(device, float):
            raise MisconfigurationException(f"device={device}; give a device such as 'cpu' first, or decay={device}")
        if avg_fn is not None and multi_avg_fn is not None:
            raise MisconfigurationException("avg_fn and multi_avg_fn: give one of them")
        self._device, self._use_buffers, self._avg_fn = device, use_buffers, avg_fn
        self._multi_avg_fn = multi_avg_fn or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self._average: dict[str, Tensor] = {}
        self._forget()

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to average the weights after an optimizer step or an epoch, of which the number, from 0, is given."""
        return step_idx is not None

    def state_dict(self) -> dict[str, Any]:
        """How many states were averaged, and when last; the average itself is the checkpoint's weights."""
        latest = {"latest_update_step": self._latest_update_step, "latest_update_epoch": self._latest_update_epoch}
        return {**latest, "n_averaged": int(self._n_averaged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._latest_update_step = int(state_dict["latest_update_step"])
        self._latest_update_epoch = int(state_dict["latest_update_epoch"])
        self._n_averaged = torch.tensor(int(state_dict["n_averaged"]))

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self._forget()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Take the average from the checkpoint, and give the module the weights that training had come to."""
        if trainer.stage == "fit" and "current_model_state" in checkpoint:
            self._average = self._copy(pl_module)
            load_weights(pl_module, checkpoint.pop("current_model_state"), "to resume from")

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Begin with the weights as they are, if there is no average yet."""
        self._average = self._average or self._copy(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, *args: Any, **kwargs: Any) -> None:
        """Average the weights, if they have changed."""
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Average the weights, if epochs are what counts."""
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._latest_update_epoch = epoch

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

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The module keeps the average."""
        for name, value in _tensors(pl_module).items():
            value.data.copy_(self._average[name])

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Also when a finished run was resumed and trained no more."""
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Leave no swapped weights behind, should validation have failed."""
        self.on_validation_end(trainer, pl_module)

    def _forget(self) -> None:
        self._average = {}
        self._swapped = False
        self._latest_update_step, self._latest_update_epoch, self._n_averaged = 0, -1, torch.tensor(0)

    def _update(self, module: Module) -> None:
        newest, parameters = _tensors(module), dict(module.named_parameters())
        averages: list[Tensor] = []
        states: list[Tensor] = []
        for name, value in newest.items():
            average, floating = self._average[name], value.is_floating_point() or value.is_complex()
            if not self._n_averaged or not floating or not (self._use_buffers or name in parameters):
                average.copy_(value.detach())
            elif self._avg_fn is not None:
                average.copy_(self._avg_fn(average, value.detach().to(average.device), self._n_averaged))
            else:
                # Of those that are spread over processes this one's part, so that all are plain.
                averages.append(as_local(average))
                states.append(as_local(value.detach()).to(average.device))
        if averages:
            self._multi_avg_fn(averages, states, self._n_averaged)
        self._n_averaged += 1

    def _swap(self, module: Module) -> None:
        for name, value in _tensors(module).items():
            kept = value.detach().clone()
            value.data.copy_(self._average[name])
            self._average[name].copy_(kept)
        self._swapped = not self._swapped

    def _copy(self, module: nn.Module) -> dict[str, Tensor]:
        return {n: v.detach().to(self._device or v.device, copy=True) for n, v in _tensors(module).items()}


class EMAWeightAveraging(WeightAveraging):
    """Keeps an exponential moving average of weights and buffers (Polyak & Juditsky 1992).

    It begins with the weights after the first step, and then moves to decay * average + (1 - decay) * weights.

    Args:
        device: Where the average is kept; default: where the module is.
        use_buffers: Average buffers, too.
        decay: Share of the average that stays in each step, from 0 to below 1.
        update_every_n_steps: Move after the first optimizer step, and every so many from there; 0 for none of them.
        update_starting_at_step: Number of the first step to move after, from 0.
        update_starting_at_epoch: Move at the end of epochs, too, from this one on.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        moves = update_every_n_steps >= 1 or (update_every_n_steps == 0 and update_starting_at_epoch is not None)
        if not 0 <= decay < 1 or not moves:
            given = f"decay={decay}, update_every_n_steps={update_every_n_steps}"
            raise MisconfigurationException(f"{given}; give a decay from 0 to below 1, and a number of steps from 1")
        super().__init__(device, use_buffers, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
        self.decay, self.update_every_n_steps = decay, update_every_n_steps
        self.update_starting_at_step, self.update_starting_at_epoch = update_starting_at_step, update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to average the weights after an optimizer step or an epoch, of which the number, from 0, is given."""
        every, first = self.update_every_n_steps, self.update_starting_at_epoch
        if step_idx is not None:
            return bool(every) and step_idx >= (self.update_starting_at_step or 0) and step_idx % every == 0
        return epoch_idx is not None and first is not None and epoch_idx >= first


def _first_names(module: nn.Module) -> dict[str, str]:
    """For every name of a tensor in the state dict the first name that this tensor has: layers may share weights."""
    first: dict[int, str] = {}
    tensors = [(n, v) for n, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)]
    return {name: first.setdefault(id(value), name) for name, value in tensors}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Each tensor of the state dict once, by its first name."""
    state = module.state_dict(keep_vars=True)
    return {name: state[name] for name in dict.fromkeys(_first_names(module).values())}
