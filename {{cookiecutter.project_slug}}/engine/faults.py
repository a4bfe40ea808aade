"""Faults that end a run: what to tell of them, beside the error itself.

Errors keep their type. What they mean for a run, and what to do, is attached as a note (PEP 678), which Python prints
below the traceback, and `main.py` instead of it.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine import distributed
from engine.exceptions import LIBRARIES, MisconfigurationException, explained
from engine.fsdp import as_local
from engine.hooks import find_batch_size
from engine.last_words import lost_others

if TYPE_CHECKING:
    from engine.trainer import Trainer

# Losses that are kept to be looked at together: looking at one waits for the device.
MOST_LOSSES = 1000


def watch_loss(t: Trainer, batch_idx: int, loss: Any) -> None:
    """Keep the loss of a batch, if it is one, to be looked at by `check_losses`; on the CPU one is looked at now."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and t.detect_nonfinite != "off":
        if not (loss.is_cpu and math.isfinite(loss.item())):
            kept = loss.detach() if loss.requires_grad else loss
            t.losses.append((t.state.epoch, batch_idx, t.state.global_step, kept))
            if len(t.losses) >= MOST_LOSSES:
                check_losses(t)


def check_losses(t: Trainer) -> None:
    """Look at the losses since the last call: on log steps, before a checkpoint is written, and at an epoch's end.

    Raises:
        FloatingPointError: One is NaN or infinite, and `detect_nonfinite` is "raise".
    """
    if not t.losses:
        return
    losses, t.losses = t.losses, []
    values = torch.stack([loss.reshape(()) if loss.ndim else loss for *_, loss in losses]).tolist()
    for (epoch, batch_idx, step, _), value in zip(losses, values, strict=True):
        if math.isfinite(value):
            continue
        names = t.metrics.nonfinite()
        logged = f"; logged values that are not finite either: {', '.join(names)}" if names else ""
        message = f"the loss is {value} at step {step} (batch {batch_idx} of epoch {epoch}){logged}"
        if t.detect_nonfinite == "warn":
            distributed.rank_zero_warn(message)
            return
        raise _spoilt(message)


def check_weights(t: Trainer, checkpoint: dict[str, Any]) -> None:
    """Look at the weights that are to be written: a gradient may have spoilt them under a loss that was finite.

    Raises:
        FloatingPointError: One is NaN or infinite, and `detect_nonfinite` is "raise".
    """
    # A hook may have left some out of the file; buffers may be infinite on purpose.
    saved, names = checkpoint["state_dict"], (name for name, _ in t.module.named_parameters())
    if t.detect_nonfinite == "off" or t.stage != "fit":
        return
    parts = {name: as_local(saved[name]) for name in names if name in saved}
    weights = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    largest = torch._foreach_norm([*weights.values()], math.inf) if weights else []
    sizes = torch.stack([size.float() for size in largest]).tolist() if largest else []
    bad = [name for name, size in zip(weights, sizes, strict=True) if not math.isfinite(size)]
    # With a mesh each process has looked at its parts.
    bad = bad if t.device_mesh is None else [*dict.fromkeys(n for part in distributed.all_gather(bad) for n in part)]
    if not bad:
        return
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    message = f"weights are nan or infinite after {checkpoint['global_step']} steps: {', '.join(bad[:3])}{more}"
    if t.detect_nonfinite == "raise":
        raise _spoilt(message)
    distributed.rank_zero_warn(message)


def _spoilt(message: str) -> FloatingPointError:
    return explained(
        FloatingPointError(message),
        "checkpoints hold the state before it; try a smaller lr, gradient_clip_val or precision 32-true, look at that "
        "batch, or go on regardless with detect_nonfinite warn",
    )


def explain(t: Trainer, error: BaseException) -> None:
    """Attach to an error what it means for the run, where that is known."""
    if isinstance(error, MisconfigurationException) or hasattr(error, "explained") or not isinstance(error, Exception):
        return
    if lost_others(error):
        return
    text = str(error)
    kinds = (torch.OutOfMemoryError, MemoryError)
    if isinstance(error, kinds) or re.search(r"can't allocate memory|not enough memory", text):
        size = find_batch_size(t.metrics.batch)
        explained(
            error,
            f"out of memory{'' if size is None else f' at batch_size {size}'}; try a smaller batch_size with a larger "
            "accumulate_grad_batches, precision bf16-mixed, or a smaller net",
        )
    elif re.search(r"DataLoader worker \(pid", text) or (
        isinstance(error, EOFError | ConnectionError) and _reading(error)
    ):
        explained(
            error,
            "a process that reads data was killed, mostly because memory ran out (shared memory where it says bus "
            "error); try fewer num_workers or a smaller batch_size, or num_workers 0 to see its own error",
        )
    elif t.resumed is not None and t.state.epoch <= t.resumed[1] and not _in_code_of_the_user(error):
        explained(error, f"this was in the first epoch after resuming from {t.resumed[0]}, which may not fit this run")


def _in_code_of_the_user(error: Exception) -> bool:
    """Whether an error comes from code that the engine has called, rather than from itself or a library."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = [number for number, file in enumerate(files) if str(Path(__file__).parent) in file]
    return any(not any(part in file for part in LIBRARIES) for file in files[own[0] :]) if own else True


def _reading(error: Exception) -> bool:
    """Whether an error comes from reading what a worker has sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).parts[-3:] == ("utils", "data", "dataloader.py") for frame in frames)


@contextmanager
def writing_logs(t: Trainer) -> Iterator[None]:
    """Around what loggers do on disk."""
    try:
        yield
    except OSError as error:
        explained(error, f"the logs in {t.log_dir} cannot be written; free space, or put the folder back, then resume")
        raise
