"""What every contender does: the nets, the batches, the optimizer, and the files beside the training."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

PROJECT = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"
Batch = tuple[Tensor, Tensor]
BATCH_SIZE = 64
# The default of Lightning and of this Trainer.
LOG_EVERY = 50


class Task(NamedTuple):
    """Something to train step by step.

    Attributes:
        net: Makes the net.
        optimizer: Makes the optimizer of some parameters.
        about: What to say of it.
    """

    net: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    about: str


def tiny() -> nn.Module:
    """A net whose step is nearly all overhead: the worst case."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def standard() -> nn.Module:
    """The net that a generated project starts with; without dropout, since libraries draw random numbers elsewhere."""
    # Not as `model.standard_net`: the package brings the engine, which a loop by hand and the peers do without.
    file = PROJECT / "model" / "standard_net.py"
    return runpy.run_path(str(file))["StandardNet"](10, (1, 8, 8), dropout=0.0)  # type: ignore[no-any-return]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that does least."""
    return torch.optim.SGD(parameters, lr=1e-2)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a generated project starts with."""
    return torch.optim.AdamW(parameters, lr=1e-3)


TASKS = {
    "tiny": Task(tiny, sgd, "2 linear layers, 4 parameter tensors, SGD"),
    "standard_net": Task(standard, adamw, "the net that a generated project starts with, AdamW"),
}


@dataclass
class Work:
    """What a contender is handed.

    Attributes:
        net: What to train.
        optimizer: Makes its optimizer.
        batches: Sized; batches in memory, to be read once. An epoch is one pass.
        realistic: Show a bar with the loss, log the loss for TensorBoard every `LOG_EVERY` steps, and save a
            checkpoint every `save_every` steps; otherwise do nothing beside the training.
        save_every: Steps between checkpoints.
        folder: For files.
        variant: Which way of a library, where it has several.
    """

    net: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    batches: Any
    realistic: bool
    save_every: int
    folder: Path
    variant: str = ""


class Blocks:
    """Batches in memory, read once, in blocks.

    Args:
        batches: One block.
        blocks: How many.
        border: Called before every `size` batches, and after the last. One more batch follows, so that even those who
            never ask for what comes after the end get there.
        size: Batches between two calls of `border`.

    Attributes:
        loader: Gives them one by one: without workers, and without making batches of samples.
    """

    def __init__(self, batches: list[Batch], blocks: int, border: Callable[[], None], size: int) -> None:
        self.border, self.size, self.steps = border, size, 0
        self.loader = in_memory([*batches * blocks, batches[0]])

    def watch(self, net: nn.Module) -> None:
        """Stop at a border within the net, as the first thing in a step: so whole rounds of a loop lie between."""
        forward = net.forward

        def watched(images: Tensor) -> Any:
            if self.steps % self.size == 0:
                self.border()
            self.steps += 1
            return forward(images)

        net.forward = watched


def in_memory(batches: Sequence[Any], **options: Any) -> DataLoader[Any]:
    """A loader as users have it, of batches that are ready."""
    return DataLoader(batches, batch_size=None, **options)  # type: ignore[arg-type]


def digits(steps: int, size: int = BATCH_SIZE) -> list[Batch]:
    """Batches of real digits, the same in every process."""
    with np.load(PROJECT / "data" / "digits.npz") as file:
        images, labels = torch.from_numpy(file["images"]).float().div(16).unsqueeze(1), torch.from_numpy(file["labels"])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(images), (steps, size), generator=generator)
    return [(images[indices], labels[indices].long()) for indices in chosen]


def make_work(
    task: Task, batches: Any, folder: Path, realistic: bool = False, save_every: int = 500, variant: str = ""
) -> Work:
    """A net with the same weights in every process, and what to do with it."""
    torch.manual_seed(0)
    return Work(task.net(), task.optimizer, batches, realistic, save_every, folder, variant)
