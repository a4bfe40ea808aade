"""What the terminal shows: RichProgressBar, ModelSummary, and the table of results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

from engine.callback import Callback

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class RichProgressBar(Callback):
    """A bar while batches run, and one line for every finished epoch.

    The bar reads counters of the host and the values of the last flush, never the device. Where the output is no
    terminal, the bar is left out; an epoch that takes long still prints a line now and then.

    Args:
        updates_per_second: Times a second that the bar is drawn.
        line_every: Seconds between lines within an epoch where the output is no terminal.
    """

    # The line of an epoch shows its metrics, so it has to come late.
    monitoring: ClassVar[bool] = True

    def __init__(self, updates_per_second: float = 5.0, line_every: float = 30.0) -> None:
        self._console = Console()
        self._interval = 1 / updates_per_second if self._console.is_terminal else line_every
        self._updates_per_second = updates_per_second
        self._progress: Progress | None = None
        self._next_update = 0.0
        self._epoch_started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of an epoch."""
        self._epoch_started = time.monotonic()
        self._next_update = self._epoch_started + self._interval
        self._start(trainer, _epoch_label(trainer), trainer.num_training_batches)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of an epoch that goes on where an earlier process was stopped."""
        if trainer.state.batches_done:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, if it is time."""
        if time.monotonic() >= self._next_update:
            self._update(trainer, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Print the line of the epoch."""
        self._stop()
        if trainer.is_global_zero:
            seconds = time.monotonic() - self._epoch_started
            line = f"{_epoch_label(trainer)}   {_epoch_values(trainer)}   [dim]{seconds:.1f} s[/]"
            self._console.print(line, highlight=False, soft_wrap=True)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of a validation on its own; within fit the epoch's bar stays."""
        if trainer.stage != "fit":
            self._start(trainer, "validate", sum(trainer.evaluation_loaders("validation").counts))

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of a test."""
        self._start(trainer, "test", sum(trainer.evaluation_loaders("test").counts))

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the bar of a prediction."""
        self._start(trainer, "predict", sum(trainer.evaluation_loaders("predict").counts))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Move the bar."""
        if trainer.stage != "fit":
            self._advance()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Move the bar."""
        self._advance()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Move the bar."""
        self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Take the bar away."""
        if trainer.stage != "fit":
            self._stop()

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Take the bar away."""
        self._stop()

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Leave the terminal clean."""
        self._stop()

    def _start(self, trainer: Trainer, label: str, total: int | float) -> None:
        if not trainer.is_global_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, refresh_per_second=self._updates_per_second
        )
        known = total if total != float("inf") else None
        self._progress.add_task(label, total=known, values="")
        self._progress.start()

    def _update(self, trainer: Trainer, done: int) -> None:
        self._next_update = time.monotonic() + self._interval
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done, values=_values(trainer))
        elif trainer.is_global_zero:
            total = trainer.num_training_batches
            line = f"{_epoch_label(trainer)}   batch {done}/{total}   {_values(trainer)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class ModelSummary(Callback):
    """Prints a table of the submodules that have parameters, with their numbers.

    Args:
        max_depth: Levels of nesting to show; -1 for all.
    """

    def __init__(self, max_depth: int = 1) -> None:
        self.max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Print the table."""
        if not trainer.is_global_zero:
            return
        table = Table("name", "type", box=None, header_style="bold", pad_edge=False)
        table.add_column("parameters", justify="right")
        for name, part in _parts(pl_module, self.max_depth):
            table.add_row(name, type(part).__name__, f"{_count(part):,}")
        console = Console()
        console.print(table)
        total, frozen = _count(pl_module), _count(pl_module) - _count(pl_module, trainable=True)
        note = f", {frozen:,} of them frozen" if frozen else ""
        line = f"[bold]{total:,}[/] parameters{note}, on {trainer.device}, {trainer.precision}\n"
        console.print(line, highlight=False)


def print_results(stage: str, results: list[dict[str, float]], names: Sequence[str] = ()) -> None:
    """Print what `validate` or `test` returned: a row for each value, a column for each loader.

    Args:
        stage: Title of the table.
        results: The values of each loader.
        names: What the sets are called, if they have names; what they have in common then has a column of its own.
    """
    tags = names or [f"dataloader_idx_{number}" for number in range(len(results))]
    headings = names or [f"loader {number}" for number in range(len(results))]
    table = Table(stage, box=None, header_style="bold", pad_edge=False)
    for heading in [*headings, "mean"] if names else headings if len(results) > 1 else ["value"]:
        table.add_column(escape(heading), justify="right", style="bold green")
    rows: dict[str, list[float | None]] = {}
    for column, (tag, result) in enumerate(zip(tags, results, strict=True)):
        for name, value in result.items():
            row = rows.setdefault(name.removesuffix(f"/{tag}"), [None] * len(table.columns[1:]))
            row[-1 if names and not name.endswith(f"/{tag}") else column] = value
    for name, values in rows.items():
        table.add_row(escape(name), *["" if value is None else f"{value:.4f}" for value in values])
    Console().print("", table)


def _epoch_label(trainer: Trainer) -> str:
    of = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
    number = str(trainer.current_epoch + 1).rjust(len(of) - 1)
    return f"[bold]epoch {number}{of}[/]"


def _epoch_values(trainer: Trainer) -> str:
    shown = {n.removesuffix("_epoch"): v for n, v in trainer.progress_bar_metrics.items() if not n.endswith("_step")}
    names = sorted(shown, key=lambda name: not name.startswith("train"))
    return "   ".join(f"{escape(name)} {shown[name]:.4f}" for name in names)


def _values(trainer: Trainer) -> str:
    return "  ".join(f"{escape(name)} {value:.4f}" for name, value in trainer.progress_bar_metrics.items())


def _parts(module: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if name and (depth == -1 or name.count(".") < depth) and _count(part):
            yield name, part


def _count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
