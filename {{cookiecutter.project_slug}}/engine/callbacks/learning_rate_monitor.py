"""LearningRateMonitor: the learning rate of every parameter group, in the logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

from engine.callback import Callback
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs learning rates as `lr-AdamW`, or `lr-AdamW/pg1` and so on where there are several groups.

    A second optimizer or scheduler of the same kind is `lr-AdamW-1`. A scheduler's `name` takes the place of
    `lr-AdamW`, a group's that of `pg1`.

    Args:
        logging_interval: "step": with every logged step; "epoch": at the start of every epoch; None: as often as the
            scheduler steps, without one both.
        log_momentum: Log `lr-AdamW-momentum` too, the first of the betas where there are any, 0 where there is none.
        log_weight_decay: Log `lr-AdamW-weight_decay` too.

    Attributes:
        lrs: All rates that were logged, by name.
        last_momentum_values: The newest momentum, by name.
        last_weight_decay_values: The newest weight decay, by name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(f"logging_interval={logging_interval!r}; give step, epoch or None")
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float] = {}
        self.last_weight_decay_values: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Find the names."""
        if not trainer.loggers and not trainer.fast_dev_run:
            raise MisconfigurationException("LearningRateMonitor has nowhere to log to; give the Trainer a logger")
        self.lrs = {name: [] for _, name, _ in _named_groups(trainer)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        """Log the rates that the coming optimizer step uses."""
        every = trainer.log_every_n_steps
        due = trainer.should_stop or (every and (trainer.state.batches_that_stepped + 1) % every == 0)
        if due and batch_idx % trainer.accumulate_grad_batches == 0:
            self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Log the rates that the coming epoch starts with."""
        self._log(trainer, "epoch")

    def _log(self, trainer: Trainer, now: str) -> None:
        if self.logging_interval not in (None, now):
            return
        stats: dict[str, float] = {}
        for interval, name, group in _named_groups(trainer):
            if self.logging_interval is None and interval not in (None, now):
                continue
            stats[name] = float(group["lr"])
            self.lrs.setdefault(name, []).append(stats[name])
            if self.log_momentum:
                momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                stats[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = float(momentum)
            if self.log_weight_decay:
                decay = f"{name}-weight_decay"
                stats[decay] = self.last_weight_decay_values[decay] = float(group.get("weight_decay", 0))
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in stats.items()})
        trainer.log_metrics(stats, trainer.state.batches_that_stepped, with_epoch=False)


def _named_groups(trainer: Trainer) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
    """Each parameter group with its name and how often its scheduler steps: first those that have one."""
    entries: list[Any] = [(c.scheduler.optimizer, c.name, c.interval) for c in trainer.lr_scheduler_configs]
    scheduled = [id(optimizer) for optimizer, *_ in entries]
    entries += [(optimizer, None, None) for optimizer in trainer.optimizers if id(optimizer) not in scheduled]
    seen: Counter[type] = Counter()
    for optimizer, given, interval in entries:
        kind, groups = type(optimizer), optimizer.param_groups
        seen[kind] += given is None
        name = (given or f"lr-{kind.__name__}") + (f"-{seen[kind] - 1}" if seen[kind] > 1 else "")
        tags = [group.get("name", f"pg{number}" * (len(groups) > 1)) for number, group in enumerate(groups, start=1)]
        if len(set(tags)) < len(tags):
            raise MisconfigurationException(f"{name}: parameter groups have the same name: {tags}; give each its own")
        for tag, group in zip(tags, groups, strict=True):
            yield interval, f"{name}/{tag}" if tag else name, group
