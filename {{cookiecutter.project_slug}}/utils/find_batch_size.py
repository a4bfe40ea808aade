"""A batch size by measuring: sizes double until that pays no more, or memory runs out."""

from __future__ import annotations

import gc
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import engine
from utils import figures
from utils.exits import quiet
from utils.run_state import write_whole
from utils.samples import leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST = 8
# What a size is run for: some batches and seconds to warm up, and some to measure.
WARMUP_BATCHES, WARMUP_SECONDS = 2, 0.3
BATCHES, SECONDS, MOST_SECONDS = 3, 1.0, 10.0
# An epoch of fewer steps learns little, however fast they are.
STEPS_OF_AN_EPOCH = 8
# Doubling pays if it brings so much; after so many times without, it is over.
GAIN, PATIENCE = 1.05, 2
# The smallest size that is so near to the fastest is the answer: small batches learn more in an epoch.
NEAR = 0.9


class Measured(NamedTuple):
    """What was measured of a batch size."""

    size: int
    # Samples a second.
    speed: float
    # Bytes at the peak: of the GPU's memory, or of this process; None where that cannot be told.
    memory: int | None


class Stopwatch(engine.Callback):
    """Measures how fast a run trains, and ends it."""

    def __init__(self) -> None:
        self.samples = self.batches = 0
        self.device = torch.device("cpu")
        self.first = self.begin = self.end = 0.0

    def on_train_batch_end(
        self, trainer: engine.Trainer, pl_module: engine.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure when the first batches are over, which open files and compile."""
        now, self.device = time.perf_counter(), pl_module.device
        self.batches += 1
        if not self.begin:
            self.first = self.first or now
            if self.batches >= WARMUP_BATCHES and now - self.first >= WARMUP_SECONDS:
                self.begin, self.batches = _when_done(self.device), 0
            return
        self.samples += next(len(part) for part in leaves(batch) if isinstance(part, torch.Tensor) and part.ndim)
        passed = now - self.begin
        if self.batches >= BATCHES and passed >= SECONDS or passed >= MOST_SECONDS:
            self.end = _when_done(self.device)
            trainer.should_stop = True


def _when_done(device: torch.device) -> float:
    """The time at which a device has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def find_batch_size(model: Any, data: Any, settings: dict[str, Any], picture: Path) -> dict[str, float]:
    """Find a fast batch size, print it, and draw what was measured.

    Args:
        model: The MInterface.
        data: The DInterface.
        settings: Arguments of a Trainer that does nothing but train.
        picture: The file to draw into.

    Returns:
        batch_size.

    Raises:
        MisconfigurationException: There are too few samples, or not even the smallest size fits into memory.
        OSError: The picture cannot be written.
    """
    found = _measure_all(model, data, settings)
    best = max(one.speed for one in found)
    chosen = next(one for one in found if one.speed >= NEAR * best)
    with figures.style(), quiet():
        write_whole(picture, figures.png(draw(found, chosen)))
    memory = "" if chosen.memory is None else f", {chosen.memory / 2**30:.2g} GiB"
    print(
        f"batch size  {chosen.size}: its learning rate is found by python main.py --batch_size {chosen.size} --find_lr "
        f"...  ({_digits(chosen.speed)} samples/s{memory}; picture: {picture})"
    )
    return {"batch_size": chosen.size}


def _measure_all(model: Any, data: Any, settings: dict[str, Any]) -> list[Measured]:
    """What was measured, by size."""
    found: list[Measured] = []
    size, workers = SMALLEST, data.num_workers
    while True:
        # As a run of this size would: whether processes read for it depends on the size.
        data.hparams["batch_size"], data.num_workers = size, workers
        try:
            found.append(_measure(model, data, settings, size))
        except Exception as error:
            if not _out_of_memory(error):
                raise
            if not found:
                raise engine.MisconfigurationException(
                    f"--find_batch_size: not even {size} samples fit into memory; give a smaller net or smaller samples"
                ) from error
            return found
        samples = len(data.sets["train"][data.train_name])
        if samples < 2 * SMALLEST:
            raise engine.MisconfigurationException(
                f"--find_batch_size: {samples} samples to train on are too few to compare sizes; have {2 * SMALLEST}"
            )
        speeds = [one.speed for one in found]
        slower = len(speeds) > PATIENCE and max(speeds[-PATIENCE:]) < GAIN * max(speeds[:-PATIENCE])
        if samples < STEPS_OF_AN_EPOCH * 2 * size or slower or _too_large_next(found):
            return found
        size *= 2


def _measure(model: Any, data: Any, settings: dict[str, Any], size: int) -> Measured:
    watch = Stopwatch()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with quiet():
        engine.Trainer(**settings, callbacks=[watch]).fit(model, datamodule=data)
    return Measured(size, watch.samples / (watch.end - watch.begin), _peak_memory(watch.device))


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that memory ran out; then what can be freed is freed."""
    while error is not None:
        # MPS and the CPU say so in the text only.
        told = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in told or "can't alloc" in told:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return True
        error = error.__cause__
    return False


def _too_large_next(found: list[Measured]) -> bool:
    """Whether twice the size would take more than half of the memory that is left.

    A GPU says when its memory runs out; a process that asks for too much of the machine's is killed.
    """
    available = _available_memory()
    if available is None or len(found) < 2 or found[-1].memory is None or found[-2].memory is None:
        return False
    # From size to size the growth doubles.
    return 2 * (found[-1].memory - found[-2].memory) > available / 2


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _available_memory() -> int | None:
    """Bytes that this machine, or this container, has left; None where it does not tell."""
    left = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        left.append(int(limit) - int(used))
    return min(left, default=None)


def draw(found: list[Measured], chosen: Measured) -> Figure:
    """Samples a second over batch sizes and, below, memory; the choice is marked."""
    with_memory = all(one.memory is not None for one in found)
    drawn = figures.figure(6.4, 5.2 if with_memory else 3.6)
    axes = drawn.subplots(1 + with_memory, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + with_memory])[:, 0]
    sizes, best = [one.size for one in found], max(one.speed for one in found)
    axes[0].plot(sizes, [one.speed for one in found], "o-", color=figures.BLUE, linewidth=2)
    axes[0].axhline(NEAR * best, color=figures.GREY, linestyle="--", linewidth=1, label=f"{NEAR:.0%} of the fastest")
    told = f"{chosen.size}: {_digits(chosen.speed)} samples/s"
    axes[0].plot(
        [chosen.size], [chosen.speed], "D", color=figures.ORANGE, markersize=10, zorder=3, linestyle="", label=told
    )
    axes[0].set(title="Speed of training by batch size", ylabel="Samples per second", ylim=(0, 1.1 * best))
    axes[0].yaxis.set_major_formatter(lambda value, _: _digits(value))
    axes[0].legend(loc="lower right", fontsize=9)
    if with_memory:
        memory = [(one.memory or 0) / 2**30 for one in found]
        axes[1].plot(sizes, memory, "o-", color=figures.GREEN, linewidth=2)
        axes[1].plot(
            [chosen.size], [memory[found.index(chosen)]], "D", color=figures.ORANGE, markersize=10, clip_on=False
        )
        axes[1].set(ylabel="Peak memory (GiB)", ylim=(0, 1.15 * max(memory)))
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(sizes, list(map(str, sizes)), fontsize=10 if len(sizes) < 10 else 8)
    axes[-1].set_xlabel("Batch size")
    return drawn


def _digits(speed: float) -> str:
    """Small numbers with three digits, large ones as whole numbers."""
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
