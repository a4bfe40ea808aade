"""StochasticWeightAveraging: train on at a constant rate, and keep the average of what the epochs came to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR, get_swa_avg_fn

from engine.callback import Callback
from engine.callbacks.weight_averaging import AverageFn
from engine.evaluation import to_device
from engine.exceptions import MisconfigurationException
from engine.metrics import Scope
from engine.optim import LRSchedulerConfig

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class StochasticWeightAveraging(Callback):
    """Averages the parameters at the start of each of the last epochs (Izmailov et al. 2018).

    From then on the learning rate goes to `swa_lrs` and stays there, in place of the module's own scheduler. After the
    last epoch the module has the average; where it has batch norms, their statistics are taken anew in one more pass
    over the train loader, without gradients.

    Args:
        swa_lrs: The learning rate, or one for each parameter group.
        swa_epoch_start: The epoch to begin with, from 1, or a share of `max_epochs`.
        annealing_epochs: How many epochs it takes to get to `swa_lrs`.
        annealing_strategy: "cos" or "linear".
        avg_fn: Makes the new average of (average, newest, number averaged so far); default: all count alike.
        device: Where the average is kept; None for where the module is.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AverageFn | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        if not rates or not all(isinstance(rate, float) and rate > 0 for rate in rates):
            raise MisconfigurationException(f"swa_lrs={swa_lrs!r}; give a number such as 0.01, or one for each group")
        start, epochs, strategy = swa_epoch_start, annealing_epochs, annealing_strategy
        if not (0 <= start <= 1 if type(start) is float else type(start) is int and start > 0):
            raise MisconfigurationException(
                f"swa_epoch_start={start!r}; give an epoch from 1, or a share from 0.0 to 1.0"
            )
        if strategy not in ("cos", "linear") or type(epochs) is not int or epochs < 0:
            given = f"annealing_epochs={epochs!r}, annealing_strategy={strategy!r}"
            raise MisconfigurationException(f"{given}; give a whole number from 0, and cos or linear")
        if avg_fn is not None and not callable(avg_fn):
            raise MisconfigurationException(f"avg_fn={avg_fn!r}; give a function of (average, newest, number)")
        self._rates, self._epoch_start, self._device = swa_lrs, swa_epoch_start, device
        self._annealing = {"anneal_epochs": annealing_epochs, "anneal_strategy": annealing_strategy}
        self._avg_fn: AverageFn = avg_fn or get_swa_avg_fn()  # type: ignore[no-untyped-call]
        self._average: dict[str, Tensor] = {}
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The average, and how far it has come."""
        number, epoch = int(self.n_averaged), self._latest_update_epoch
        return {"n_averaged": number, "latest_update_epoch": epoch, "average_model_state": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.n_averaged = torch.tensor(int(state_dict["n_averaged"]))
        self._latest_update_epoch = int(state_dict["latest_update_epoch"])
        self._average = {str(name): value.clone() for name, value in state_dict["average_model_state"].items()}

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Find the first epoch to average; take the scheduler's place in a run that goes on."""
        if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) > 1:
            have = f"{len(trainer.optimizers)} optimizers and {len(trainer.lr_scheduler_configs)} schedulers"
            raise MisconfigurationException(f"StochasticWeightAveraging needs one of each at most; there are {have}")
        if not pl_module.automatic_optimization:
            raise MisconfigurationException("StochasticWeightAveraging needs automatic optimization; leave it out")
        start = self._epoch_start
        if isinstance(start, float):
            if trainer.max_epochs == -1:
                raise MisconfigurationException(f"swa_epoch_start={start} of max_epochs=-1; give a number of epochs")
            start = int(trainer.max_epochs * start)
        self._first = max(start - 1, 0)
        if self.n_averaged:
            self._take_over(trainer)
            self._average = self._average_of(pl_module, self._average)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Average the parameters, if it is time."""
        epoch = trainer.current_epoch
        if epoch < self._first or epoch <= self._latest_update_epoch:
            return
        if not self.n_averaged:
            self._take_over(trainer)
            self._average = self._average_of(pl_module, dict(pl_module.named_parameters()))
        else:
            for name, parameter in pl_module.named_parameters():
                average = self._average[name]
                average.copy_(self._avg_fn(average, parameter.detach().to(average.device), self.n_averaged))
        self.n_averaged, self._latest_update_epoch = self.n_averaged + 1, epoch

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Give the module the average, once all epochs are over."""
        if not self.n_averaged or trainer.current_epoch < trainer.max_epochs:
            return
        for name, parameter in pl_module.named_parameters():
            parameter.data.copy_(self._average[name])
        if trainer.max_epochs != -1:
            update_batch_norms(trainer)
        self._finished = True

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Also when a run was resumed that had trained to its end."""
        if not self._finished:
            self.on_train_end(trainer, pl_module)

    def _forget(self) -> None:
        self.n_averaged, self._latest_update_epoch, self._finished = torch.tensor(0), -1, False
        self._average = {}

    def _take_over(self, trainer: Trainer) -> None:
        scheduler = SWALR(trainer.optimizers[0], self._rates, **self._annealing)  # type: ignore[arg-type]
        trainer.lr_scheduler_configs[:] = [LRSchedulerConfig(scheduler)]

    def _average_of(self, module: Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self._device or module.device
        return {name: values[name].detach().to(device, copy=True) for name, _ in module.named_parameters()}


def update_batch_norms(t: Trainer) -> None:
    """Take the statistics of batch norms anew, in one pass of training steps without gradients, hooks and logs."""
    norms = {part: part.momentum for part in t.module.modules() if isinstance(part, _BatchNorm) and part.training}
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        # All batches count alike.
        norm.momentum = None
    with torch.no_grad(), t.precision_plugin.context:
        for batch_idx, batch, _ in t.loaders.train().epoch(t.state.seed, t.state.epoch):
            batch = to_device(t, batch, 0)
            t.metrics.begin_batch(Scope.TRAIN_BATCH, batch)
            t.strategy.training_step(*((batch, batch_idx) if t.takes_batch_idx["training_step"] else (batch,)))
    t.metrics.scope = None
    t.metrics.reset("train")
    for norm, momentum in norms.items():
        norm.momentum = momentum
