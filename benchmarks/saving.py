"""What saving a checkpoint every 50 steps costs a run: not at all, at once, and in the background.

The three ways train the same net on the same batches, in turn, several times. Printed are medians: how long the loop
stands still for a checkpoint, and which share of the wall time that is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

import engine
from engine.callbacks import ModelCheckpoint
from tables import Goal, Table, record

EVERY = 50
WAYS: dict[str, dict[str, Any] | None] = {
    "not at all": None,
    "at once": {"async_save": False},
    "in the background": {"async_save": True},
}


class Net(engine.Module):
    """Layers of equal width, trained by AdamW: its checkpoint is three times its weights."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Reconstruct the input."""
        loss: Tensor = nn.functional.mse_loss(self.net(batch[0]), batch[0])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, which keeps two numbers for each weight."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Timed(ModelCheckpoint):
    """A ModelCheckpoint that adds up the seconds for which the loop stands still for it."""

    seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save, against the clock."""
        begin = time.perf_counter()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seconds += time.perf_counter() - begin


def race(options: dict[str, Any] | None, folder: Path, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Train once.

    Returns:
        Seconds of the run until everything is on the disk, seconds of standing still for each checkpoint, and its size
        in MB.
    """
    engine.seed_everything(0)
    saver = Timed(folder, save_top_k=0, save_last=True, every_n_train_steps=EVERY)
    data = TensorDataset(torch.randn(arguments.batch_size * arguments.steps, arguments.width))
    trainer = engine.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[] if options is None else [saver],
        enable_checkpointing=options is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        **(options or {}),
    )
    begin = time.perf_counter()
    trainer.fit(Net(arguments.width, arguments.depth), DataLoader(data, arguments.batch_size))
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in folder.glob("last.ckpt")) / 1e6
    return seconds, saver.seconds / (arguments.steps // EVERY), size


def main() -> None:
    """Race the three ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "steps": 300,
        "batch_size": 64,
        "width": 1024,
        "depth": 8,
        "repeats": 3,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    results: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, options in WAYS.items():
            with tempfile.TemporaryDirectory(dir=".") as folder:
                results[way].append(race(options, Path(folder), arguments))
    medians = {way: [statistics.median(column) for column in zip(*runs, strict=True)] for way, runs in results.items()}
    size, stall = medians["at once"][2], medians["at once"][1]
    saves = arguments.steps // EVERY
    note = f"{arguments.threads} thread(s), medians of {arguments.repeats} runs."
    title = f"a checkpoint of {size:.0f} MB every {EVERY} of {arguments.steps} steps"
    table = Table(title, "saving", note, "saving")
    for way, (seconds, still, _) in medians.items():
        cells = {"run": f"{seconds:.1f} s"}
        if WAYS[way] is not None:
            cells |= {
                "each save stops it for": f"{still * 1000:.1f} ms",
                "share of the run": f"{still * saves / seconds:.2%}",
            }
            cells["of saving at once"] = f"{still / stall:.1%}"
        table.add(way, cells, round(still / stall, 3), Goal(0.1) if way == "in the background" else None)
    record("saving", [table])


if __name__ == "__main__":
    main()
