"""Samples per second on one GPU: under the Trainer, and in a loop written by hand that does the same.

ResNet-50 and a small transformer, in TF32, bfloat16 and float16, compiled and not, the ResNet also with channels_last.
Both train the same net on the same batches, which wait in pinned memory, and take turns within one run. Printed are
medians, the most memory that each has held when it ran alone, and how often it waited for the GPU in a step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

import engine
from alternating import Alternation
from ddp import GOAL
from model.standard_net import StandardNet
from tables import Goal, Table, ratio_cells, record
from utils.acceleration import accelerate
from work import Batch, in_memory

FORMATS = {"TF32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
DTYPES = {"TF32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the steps in which waiting is counted: how many go before, and how many there are. Values are fetched every 50.
BEFORE, WATCHED = 10, 20


class Block(nn.Module):
    """A layer of the transformer: attention to earlier positions, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features, of shape (batch, positions, width)."""
        split = self.attend(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heard = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.project(heard.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norms[1](x))


class Transformer(nn.Module):
    """Predicts the next token at each position."""

    def __init__(self, tokens: int, positions: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Parameter(torch.zeros(positions, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of shape (batch, positions) to logits of shape (batch, positions, tokens)."""
        logits: Tensor = self.classify(self.norm(self.blocks(self.tokens(tokens) + self.positions)))
        return logits


class Task(NamedTuple):
    """What is trained.

    Attributes:
        name: For the table.
        make: Makes the net.
        batch: Makes a batch of so many samples.
        size: Samples in a batch.
        images: Whether it can be channels_last.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    size: int
    images: bool


class Setting(NamedTuple):
    """A row of the tables."""

    numbers: str
    compiled: bool
    channels_last: bool

    def __str__(self) -> str:
        switches = {"compiled": self.compiled, "channels_last": self.channels_last}
        return ", ".join([self.numbers, *(name for name, on in switches.items() if on)])


def tasks(quick: bool) -> dict[str, Task]:
    """The two, or tiny ones in their place."""
    side, classes, tokens, positions = (16, 10, 50, 16) if quick else (224, 1000, 8192, 256)

    def resnet() -> nn.Module:
        return StandardNet(classes, (3, side, side), 4) if quick else resnet50()

    def transformer() -> nn.Module:
        return Transformer(tokens, positions, 16, 2, 2) if quick else Transformer(tokens, positions, 256, 8, 6)

    def images(size: int) -> Batch:
        return torch.randn(size, 3, side, side), torch.randint(classes, (size,))

    def text(size: int) -> Batch:
        words = torch.randint(tokens, (size, positions + 1))
        return words[:, :-1].contiguous(), words[:, 1:].contiguous()

    names = ("StandardNet", "a tiny transformer") if quick else ("ResNet-50", "a small transformer")
    sizes = (2, 2) if quick else (64, 64)
    return {
        "resnet": Task(names[0], resnet, images, sizes[0], images=True),
        "transformer": Task(names[1], transformer, text, sizes[1], images=False),
    }


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of images, and of each position in a text."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """As a project has it."""
    return torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)


class Training(engine.Module):
    """The task, as one writes it for the Trainer."""

    def __init__(self, net: nn.Module, tick: Callable[[], None], logs: bool) -> None:
        super().__init__()
        self.net, self.tick, self.logs = net, tick, logs

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the other have its turn; not within the step, which runs under autocast."""
        self.tick()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets = batch
        loss = loss_of(self.net(inputs), targets)
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same as by hand."""
        return optimizer_of(self.net)


class Race:
    """The Trainer and a loop written by hand, on one task with one setting.

    Args:
        task: What is trained.
        setting: How.
        device: Where.
        batches: A block of batches.
        backend: What compiles.
    """

    def __init__(self, task: Task, setting: Setting, device: torch.device, batches: list[Batch], backend: str) -> None:
        self.task, self.setting, self.device, self.batches, self.backend = task, setting, device, batches, backend

    def by_hand(self) -> Callable[[Batch], None]:
        """A step of the plainest loop."""
        device, dtype = self.device, DTYPES[self.setting.numbers]
        torch.manual_seed(0)
        net = self.task.make().to(device)
        layout = torch.channels_last if self.setting.channels_last else torch.preserve_format
        net.to(memory_format=layout)
        if self.setting.compiled:
            net.compile(backend=self.backend)
        optimizer = optimizer_of(net)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

        def step(batch: Batch) -> None:
            inputs, targets = (part.to(device, non_blocking=True) for part in batch)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = loss_of(net(inputs.to(memory_format=layout)), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return step

    def by_trainer(self, batches: list[Batch], tick: Callable[[], None], logs: bool = False) -> None:
        """An epoch under the Trainer, quietly."""
        torch.manual_seed(0)
        net = self.task.make()
        accelerate(net, self.setting.channels_last, compiled=False)
        if self.setting.compiled:
            net.compile(backend=self.backend)
        trainer = engine.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision=FORMATS[self.setting.numbers],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
        )
        trainer.fit(Training(net, tick, logs), in_memory(batches))

    def clock(self) -> float:
        """Seconds, once the device has done all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def alone(self, ours: bool) -> tuple[float, float]:
        """Host syncs in a step, and MB that were held at most: under the Trainer, or by hand."""
        watch = Watch()
        few = [*itertools.islice(itertools.cycle(self.batches), watch.STEPS)]
        fresh()
        torch.cuda.reset_peak_memory_stats()
        if ours:
            self.by_trainer(few, watch.tick, logs=True)
        else:
            step = self.by_hand()
            for batch in in_memory(few):
                watch.tick()
                step(batch)
        torch.cuda.synchronize()
        return watch.syncs / WATCHED, torch.cuda.max_memory_allocated() / 1e6

    def add_to(self, pace: Table, waits: Table, blocks: int) -> None:
        """Race, and add a line to each table; what only a GPU has to the second."""
        if self.device.type == "cuda":
            (mine, held), (by_hand, held_by_hand) = self.alone(True), self.alone(False)
            cells = {"waits/step": f"{mine:g}", "by hand": f"{by_hand:g}"}
            cells |= {"memory": f"{held:,.0f} MB", "memory by hand": f"{held_by_hand:,.0f} MB"}
            waits.add(str(self.setting), cells, mine, Goal(0))
        fresh()
        step, loader = self.by_hand(), in_memory(self.batches)

        def block() -> None:
            for batch in loader:
                step(batch)

        turns = Alternation(block, len(self.batches), self.clock)
        self.by_trainer(self.batches * (blocks + 2), turns.tick)
        # The first block warms up, and the last has no border behind it.
        laps = turns.laps[1:]
        samples = sum(len(targets) for _, targets in self.batches)
        ours, theirs = (statistics.median(samples / s for s in column) for column in zip(*laps, strict=True))
        ratios = [mine / hand for mine, hand in laps]
        cells = {"Trainer": f"{ours:,.0f}/s", "by hand": f"{theirs:,.0f}/s", **ratio_cells(ratios)}
        pace.add(str(self.setting), cells, round(statistics.median(ratios), 3), Goal(GOAL))


class Watch:
    """Counts the operations that wait for the GPU, in a few steps of one of the two alone.

    Attributes:
        syncs: How many there were, in `WATCHED` steps that fetch no value.
    """

    # One more step: the end of an epoch fetches values.
    STEPS = BEFORE + WATCHED + 1

    def __init__(self) -> None:
        self.steps, self.syncs = 0, 0
        self._told = warnings.catch_warnings(record=True)

    def tick(self) -> None:
        """To be called first in each step."""
        if self.steps == BEFORE:
            self._lines = self._told.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif self.steps == BEFORE + WATCHED:
            torch.cuda.set_sync_debug_mode("default")
            self.syncs = sum("synchronizing CUDA operation" in str(line.message) for line in self._lines or ())
            self._told.__exit__(None, None, None)
        self.steps += 1


def fresh() -> None:
    """Forget what an earlier run has compiled, and let go of its memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def settings(task: Task) -> list[Setting]:
    """The rows of a task."""
    return [
        Setting(numbers, compiled, channels_last)
        for numbers in FORMATS
        for channels_last in ((False, True) if task.images else (False,))
        for compiled in (False, True)
    ]


def measure(task: Task, device: torch.device, arguments: argparse.Namespace) -> list[Table]:
    """Race with each setting."""
    steps, blocks, backend = (2, 2, "eager") if arguments.quick else (20, arguments.blocks, "inductor")
    size = arguments.batch_size or task.size
    batches = [task.batch(size) for _ in range(steps)]
    if device.type == "cuda":
        batches = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches]
    parameters = sum(parameter.numel() for parameter in task.make().parameters())
    title = f"{task.name}, {parameters:,} parameters, batches of {size}"
    where = f"Medians of {blocks} blocks of {steps} steps on {machine()}."
    pace = Table(title, "setting", f"Samples a second; ratios of times. {where}", "gpu/pace")
    note = f"How often the host waits for the GPU in a step, of {WATCHED}, and the most memory; each alone."
    waits = Table(f"waiting and memory: {task.name}", "setting", note, "gpu/waits")
    for setting in settings(task):
        Race(task, setting, device, batches, backend).add_to(pace, waits, blocks)
    return [pace, waits] if waits.rows else [pace]


def machine() -> str:
    """The GPU, or that there is none."""
    if not torch.cuda.is_available():
        return f"{platform.machine()} CPU"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def main() -> None:
    """Race on every task, and say on what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]; cpu shows only that it runs")
    parser.add_argument("--quick", action="store_true", help="tiny nets and few steps, traced where others compile")
    parser.add_argument("--tasks", nargs="+", choices=[*tasks(True)], default=[*tasks(True)], help="[all]")
    parser.add_argument("--blocks", type=int, default=15, help="how often each has its turn [15]")
    parser.add_argument("--batch_size", type=int, help="[64]")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: skipped")
        return
    warnings.simplefilter("ignore")
    # For both of them: float32 is TF32, and cuDNN takes the fastest kernels.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    results = [table for name in arguments.tasks for table in measure(tasks(arguments.quick)[name], device, arguments)]
    if arguments.device == "cuda":
        record("gpu", results)
    else:
        for table in results:
            table.show()


if __name__ == "__main__":
    main()
