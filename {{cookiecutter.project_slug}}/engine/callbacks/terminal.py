"""What the terminal shows of models and results: ModelSummary, and the table of results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from engine.callback import Callback
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class ModelSummary(Callback):
    """Prints a table of the submodules that have parameters, with their numbers.

    Args:
        max_depth: Levels of nesting to show; -1 for all, 0 for no table at all.
        header_style: How rich draws the heads of columns.
    """

    def __init__(self, max_depth: int = 1, header_style: str = "bold") -> None:
        if type(max_depth) is not int or max_depth < -1:
            raise MisconfigurationException(f"max_depth={max_depth!r}; give a whole number from -1")
        self.max_depth, self.header_style = max_depth, header_style

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Print the table."""
        if not trainer.is_global_zero or not self.max_depth:
            return
        # Imported where they are needed, here and in other files: what only asks for `--help` need not wait for rich.
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "type", box=None, header_style=self.header_style, pad_edge=False)
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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

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


def _parts(module: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if name and (depth == -1 or name.count(".") < depth) and _count(part):
            yield name, part


def _count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
