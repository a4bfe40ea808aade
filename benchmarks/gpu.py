"""Samples per second on one GPU: under the Trainer, and in a loop written by hand that does the same.

Both train the same net on the same batches, which wait in pinned memory, and take turns within one run. Printed are
medians, and the most memory that each has held when it ran alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

import engine
from ddp import BLOCK, GOAL, Batch, Training, Turns
from model.standard_net import StandardNet

FORMATS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SHAPE = (3, 64, 64)


def make(width: int, compiled: bool) -> nn.Module:
    """The net that a generated project starts with, on larger images."""
    torch.manual_seed(0)
    net = StandardNet(10, SHAPE, width)
    if compiled:
        net.compile()
    return net


def hand_written(net: nn.Module, dtype: torch.dtype | None) -> Callable[[Batch], None]:
    """A step of the plainest loop."""
    net.cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)

    def step(batch: Batch) -> None:
        images, labels = (part.cuda(non_blocking=True) for part in batch)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def trainer(precision: str) -> engine.Trainer:
    """One epoch on the GPU, quietly."""
    return engine.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    )


def most_memory(work: Callable[[], object]) -> float:
    """MB that were held at most meanwhile."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def race(precision: str, compiled: bool, batches: list[Batch], arguments: argparse.Namespace) -> list[str]:
    """A row of the table."""

    def by_hand() -> Callable[[Batch], None]:
        return hand_written(make(arguments.width, compiled), FORMATS[precision])

    def by_trainer(data: object) -> None:
        trainer(precision).fit(Training(make(arguments.width, compiled), logs=False), data)

    def alone() -> None:
        step = by_hand()
        for batch in batches:
            step(batch)

    held = [most_memory(lambda: by_trainer(iter_of(batches))), most_memory(alone)]
    turns = Turns(by_hand(), batches, arguments.blocks, torch.cuda.synchronize)
    by_trainer(turns)
    samples = BLOCK * arguments.batch_size
    ours, theirs = (statistics.median(samples / s for s in column) for column in zip(*turns.seconds, strict=True))
    low, ratio, high = statistics.quantiles([mine / hand for mine, hand in turns.seconds], n=4)
    figures = [f"{ours:,.0f}/s", f"{theirs:,.0f}/s", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", f"<= {GOAL}"]
    return [precision, "yes" if compiled else "no", *figures, *(f"{megabytes:,.0f} MB" for megabytes in held)]


def iter_of(batches: list[Batch]) -> Turns:
    """The batches once over, for the Trainer alone."""
    return Turns(lambda batch: None, batches, 0)


def main() -> None:
    """Race in each number format, compiled and not, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch_size": 256, "width": 64, "blocks": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: skipped")
        return
    warnings.simplefilter("ignore")
    size = arguments.batch_size
    batches = [(torch.randn(size, *SHAPE).pin_memory(), torch.randint(10, (size,)).pin_memory()) for _ in range(BLOCK)]
    table = Table(title=f"StandardNet, width {arguments.width}, batches of {size}", title_justify="left")
    for heading in ("precision", "compiled", "Trainer", "by hand", "ratio", "half of the blocks", "goal", "memory"):
        table.add_column(heading, justify="left" if heading in ("precision", "compiled") else "right")
    table.add_column("by hand", justify="right")
    for precision in FORMATS:
        for compiled in (False, True):
            table.add_row(*race(precision, compiled, batches, arguments))
    Console(width=130).print(table)
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    print(f"torch {torch.__version__}, {device}, medians of blocks of {BLOCK} steps")


if __name__ == "__main__":
    main()
