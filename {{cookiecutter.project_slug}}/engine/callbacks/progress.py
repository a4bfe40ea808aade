"""Progress bars: RichProgressBar, and the base for those of one's own."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

from engine.callback import Callback
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from rich.progress import Progress

    from engine.module import Module
    from engine.trainer import Trainer

# Of the time of a run, what drawing its bar may take.
SHARE = 0.005


class ProgressBar(Callback):
    """Base of progress bars; the trainer brings none of its own if it is given one."""

    # What an epoch has logged is shown, so it has to come late.
    monitoring: ClassVar[bool] = True
    _trainer: Trainer | None = None
    is_enabled = True

    @property
    def trainer(self) -> Trainer:
        """The trainer whose progress is shown."""
        if self._trainer is None:
            raise MisconfigurationException(f"{type(self).__name__} is not attached to a Trainer yet")
        return self._trainer

    @property
    def total_train_batches(self) -> int | float:
        """Batches of a training epoch, or until `max_steps` where nothing else ends the run; inf if unknown."""
        trainer = self.trainer
        left = trainer.max_steps - trainer.global_step if trainer.max_epochs == -1 and trainer.max_steps > 0 else None
        return trainer.num_training_batches if left is None else min(trainer.num_training_batches, left)

    def disable(self) -> None:
        """Show nothing from now on."""
        self.is_enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self.is_enabled = True

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Show something in one process only."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print beside the bar."""
        print(*args, **kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: Module) -> dict[str, Any]:
        """The values to show, by name; override it to show others."""
        return dict(trainer.progress_bar_metrics)


class RichProgressBar(ProgressBar):
    """A bar while batches run, and one line for every finished epoch.

    The bar reads counters of the host and the values of the last flush, never the device. It is drawn between batches,
    not in a thread beside them, and so seldom that drawing takes about half a percent of the time. Where the output is
    no terminal, the bar is left out; an epoch that takes long still prints a line now and then.

    Args:
        refresh_rate: Times a second that the bar is drawn, at most; 0 for never, and no lines.
        leave: Leave finished bars in the terminal.
        theme: Lightning's argument; the colours are those of the terminal, so that others are refused.
        console_kwargs: Arguments of rich's Console.
        line_every: Seconds between lines within an epoch where the output is no terminal.
    """

    def __init__(
        self,
        refresh_rate: float = 5.0,
        leave: bool = False,
        theme: Any = None,
        console_kwargs: dict[str, Any] | None = None,
        line_every: float = 30.0,
    ) -> None:
        if theme is not None:
            raise MisconfigurationException("theme: colours cannot be changed; leave it out")
        if not isinstance(refresh_rate, int | float) or refresh_rate < 0:
            raise MisconfigurationException(f"refresh_rate={refresh_rate!r}; give a number from 0")
        from rich.console import Console

        self._console = Console(**(console_kwargs or {}))
        self._refresh_rate, self._leave, self.is_enabled = refresh_rate, leave, refresh_rate > 0
        self._interval = 1 / (refresh_rate or 1) if self._console.is_terminal else line_every
        self._progress: Progress | None = None
        self._epoch_started, self._next_update, self._done = 0.0, 0.0, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of an epoch."""
        self._epoch_started = time.monotonic()
        self._begin(_epoch_label(trainer), trainer.num_training_batches)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of an epoch that goes on where an earlier process was stopped."""
        if trainer.state.batches_done:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, if it is time."""
        self._done = batch_idx + 1
        if time.monotonic() >= self._next_update:
            self._update(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Print the line of the epoch."""
        self._end()
        if self.is_enabled:
            metrics = self.get_metrics(trainer, pl_module)
            shown = {n.removesuffix("_epoch"): v for n, v in metrics.items() if not n.endswith("_step")}
            values = _values(dict(sorted(shown.items(), key=lambda item: not item[0].startswith("train"))), "   ")
            line = f"{_epoch_label(trainer)}   {values}   [dim]{time.monotonic() - self._epoch_started:.1f} s[/]"
            self._console.print(line, highlight=False, soft_wrap=True)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of an evaluation on its own; within fit the epoch's bar stays."""
        if trainer.stage != "fit":
            kind = "validation" if trainer.stage == "validate" else trainer.stage
            self._begin(trainer.stage, sum(trainer.evaluation_loaders(kind).counts))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Move the bar; within fit only its clock goes on."""
        self._done += trainer.stage != "fit"
        if self._progress is not None and time.monotonic() >= self._next_update:
            self._draw(self._progress)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Take the bar away."""
        if trainer.stage != "fit":
            self._end()

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Leave the terminal clean."""
        self._end()

    def _begin(self, label: str, total: int | float) -> None:
        self._done, self._next_update = 0, time.monotonic() + self._interval
        if not self.is_enabled or not self._console.is_terminal:
            return
        from rich import progress

        done = (progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=30))
        columns = (*done, progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
        values = progress.TextColumn("{task.fields[values]}")
        how: dict[str, Any] = {"console": self._console, "transient": not self._leave, "auto_refresh": False}
        self._progress = progress.Progress(*columns, values, **how)
        self._progress.add_task(label, total=None if total == float("inf") else total, values="")
        self._progress.start()

    def _update(self, trainer: Trainer, module: Module) -> None:
        self._next_update = time.monotonic() + self._interval
        values = _values(self.get_metrics(trainer, module), "  ")
        if self._progress is not None:
            self._draw(self._progress, values=values)
        elif self.is_enabled:
            line = f"{_epoch_label(trainer)}   batch {self._done}/{trainer.num_training_batches}   {values}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _draw(self, progress: Progress, **what: Any) -> None:
        begin = time.monotonic()
        progress.update(progress.task_ids[0], completed=self._done, **what, refresh=True)
        self._next_update = begin + max(self._interval, (time.monotonic() - begin) / SHARE)

    def _end(self) -> None:
        if self._progress is not None:
            # This draws it for the last time.
            self._progress.update(self._progress.task_ids[0], completed=self._done)
            self._progress.stop()
            self._progress = None


class TQDMProgressBar(RichProgressBar):
    """The bar of `RichProgressBar`, under the name and with the arguments of Lightning's other one.

    Args:
        refresh_rate: Move the bar after every so many batches; 0 for no bar.
        process_position: Lightning's argument; rich finds its place by itself, so that others than 0 are refused.
        leave: Leave finished bars in the terminal.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        if process_position:
            raise MisconfigurationException(
                f"process_position={process_position}: the bar finds its place; leave it out"
            )
        if type(refresh_rate) is not int or refresh_rate < 0:
            raise MisconfigurationException(f"refresh_rate={refresh_rate!r}; give a whole number from 0")
        super().__init__(5.0 if refresh_rate else 0, leave)
        self._batches = refresh_rate or sys.maxsize

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if own := [name for name in vars(cls) if name.startswith("init_") and name.endswith("_tqdm")]:
            raise MisconfigurationException(f"{cls.__name__}.{own[0]} would never be called: the bar is drawn by rich")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, if it is time."""
        if (batch_idx + 1) % self._batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _epoch_label(trainer: Trainer) -> str:
    of = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
    return f"[bold]epoch {str(trainer.current_epoch + 1).rjust(len(of) - 1)}{of}[/]"


def _values(metrics: dict[str, Any], between: str) -> str:
    from rich.markup import escape

    numbers = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in metrics.items()}
    return between.join(f"{escape(name)} {escape(number)}" for name, number in numbers.items())
