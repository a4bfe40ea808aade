"""Checkpoint files: one dictionary of primitives and tensors, in one file that is whole or not there.

Schema (`format` 4); `engine.resume` fills it. Keys shared with Lightning keep its spelling.

    format                      int: version of this schema
    epoch                       int: epoch in which it was saved, from 0
    global_step                 int: completed optimizer steps
    state_dict                  {name: Tensor}: weights and buffers of the module
    hyper_parameters            {name: value}: arguments of the module
    hparams_name                str or None: which argument they were given as, in one piece
    datamodule_hyper_parameters {name: value}: arguments of the data module; likewise datamodule_hparams_name
    pytorch-lightning_version   str: the Lightning that can load weights and hyper-parameters from it
    hparams_left_out            [name]: those that were no plain data, if any; datamodule_hparams_left_out, too
    env                         {torch, python, world_size}: what it was saved with

and, unless only weights were asked for:

    optimizer_states            [dict]: one state_dict() per optimizer
    lr_schedulers               [dict]: one state_dict() per scheduler
    precision                   dict: state of the loss scale under fp16
    callbacks                   {state_key: dict}
    datamodule                  dict: what the data module's state_dict() gave
    state                       dict: where training goes on, the fields of engine.loops.TrainState
    order                       dict: what the order of samples within an epoch depends on
    evaluation_steps            [[stage, loader, int]]: how often evaluations have logged single steps
    loggers                     [dict or None]: how far each logger had come
    meters                      [dict]: running values of self.log, one per process, as is the rest
    metrics                     [{name: {values, updates}}]: states of torchmetrics objects in the module
    gradients                   [{name: Tensor}]: within a window of accumulated gradients, those so far
    rng, loaders                [dict]: random number generators, and train loaders that keep a state

Hooks may add keys of their own. Since there is nothing but plain data inside, reading needs no trust
(`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from engine import shards
from engine.distributed import rank_zero_warn
from engine.exceptions import DamagedCheckpoint, MisconfigurationException, explained
from engine.fsdp import as_like
from engine.untrusted import read_plain

FORMAT = 4
Checkpoint = dict[str, Any]
# Behind the name of a file that is being written.
TEMPORARY = ".tmp"


def plain(value: Any, name: str) -> Any:
    """`value` as primitives, tensors and containers of them; a subclass, such as NumPy's float64, as its base.

    Raises:
        MisconfigurationException: Something in it is of another type; the message says where, beginning with `name`.
    """
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, Mapping):
        items = {plain(k, name): plain(v, f"{name}[{k!r}]") for k, v in value.items()}
        return type(value)(items) if type(value) in (OrderedDict, Counter) else items  # type: ignore[call-arg]
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(plain(item, f"{name}[{number}]") for number, item in enumerate(value))
    for scalar in (int, float, str):
        if isinstance(value, scalar):
            return scalar(value)
    raise MisconfigurationException(f"{name} is a {type(value).__name__}; save primitives and tensors only")


def plain_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in which everything but the weights, which are tensors anyway, went through `plain`."""
    weights = {"state_dict": checkpoint["state_dict"]} if "state_dict" in checkpoint else {}
    for name, value in weights.get("state_dict", {}).items():
        # The extra state of a module may be anything.
        weights["state_dict"][name] = plain(value, f"state_dict[{name!r}]")
    return {key: plain(value, key) for key, value in checkpoint.items() if key not in weights} | weights


def save(checkpoint: Checkpoint, path: Path, keep: tuple[Path, Path] | None = None) -> None:
    """Write a checkpoint so that `path` holds the old file or the new one, never a part of it.

    A temporary file in the same folder is written, flushed to disk and renamed over `path`.

    Args:
        checkpoint: What to write.
        path: Where.
        keep: A file that may be replaced, and the name under which it is kept.

    Raises:
        OSError: The disk is full, or the folder cannot be written; the old file stands.
        MisconfigurationException: The dictionary holds objects that could not be read back safely.
    """
    checkpoint = plain_checkpoint(checkpoint)
    with _replacing(path) as temporary:
        with open(temporary, "wb") as file:
            noting: Any = _NotingFile(file)
            try:
                torch.save(checkpoint, noting)
            except RuntimeError:
                # torch does not say why it cannot write.
                if noting.error is not None:
                    raise noting.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and keep[0].is_file():
            link(*keep)


class _NotingFile:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or remember the error and raise it."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def link(source: Path, path: Path) -> None:
    """Make `path` the same file as `source`, at once and without copying its bytes where the disk allows."""
    if path.exists() and source.samefile(path):
        # Renaming one name of a file to another does nothing, and leaves both.
        return
    with _replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            # Some file systems have no hard links. A copy is as old as its source.
            shutil.copy2(source, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Around writing a temporary file, which then takes the place of `path`, or is removed after an error."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    try:
        yield temporary
        _commit(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not hasattr(error, "explained"):
            explained(error, f"the checkpoint {path} could not be written; those written before it stand")
        raise


def _commit(temporary: Path, path: Path) -> None:
    """Rename a complete file, and flush the folder so that the rename survives a power cut."""
    os.replace(temporary, path)
    shards.flush_folder(path.parent)


def load(
    path: Path,
    map_location: Any = "cpu",
    foreign: bool = False,
    place: shards.Place | None = None,
    whole: bool = True,
) -> Checkpoint:
    """Read a checkpoint, after checking every byte against the file's checksums.

    Args:
        path: The file.
        map_location: Where to put tensors, as in `torch.load`.
        foreign: Take one of Lightning's, too; Python objects in it are left out.
        place: Where to put tensors that lie beside the file in parts; default: as a whole on the CPU.
        whole: Check all of these parts, rather than this process' share of them.

    Raises:
        DamagedCheckpoint: The file is damaged, unsafe, or no checkpoint of this engine.
        MisconfigurationException: It is missing, or cannot be read now.
    """
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.ckpt"))
        found = f"there are: {', '.join(there)}" if there else f"there are no *.ckpt files in {path.parent}"
        raise MisconfigurationException(f"checkpoint {path} does not exist; {found}")
    damaged = f"checkpoint {path} is damaged ({{}}); use another one, for example an older file in {path.parent}"
    try:
        try:
            checkpoint = read_plain(path, map_location)
        except pickle.UnpicklingError:
            checkpoint = read_plain(path, map_location, stand_in=True) if foreign else None
            if not _of_lightning(checkpoint):
                raise
    except MemoryError:
        raise
    except OSError as error:
        raise MisconfigurationException(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} holds Python objects, which could run code when loaded, and was refused; "
            "save primitives and tensors only"
        ) from error
    except OverflowError as error:
        raise DamagedCheckpoint(f"checkpoint {path} stands for more than its size allows; refused") from error
    except Exception as error:
        # Some of them without a text.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedCheckpoint(damaged.format(reason)) from error
    parts: Checkpoint = dict(checkpoint) if isinstance(checkpoint, dict) else {}
    incomplete = any(not isinstance(parts.get(key), dict) for key in ("state_dict", "hyper_parameters"))
    own = type(parts.get("format")) is int and parts["format"] == FORMAT and not incomplete
    if not own and not (foreign and _of_lightning(parts)):
        advice = "; it is Lightning's: take its weights by load_from_checkpoint" if _of_lightning(parts) else ""
        raise DamagedCheckpoint(f"{path} is not a checkpoint of this engine (format {FORMAT}){advice}")
    return shards.read(parts, path, place, whole)


def _of_lightning(checkpoint: Any) -> bool:
    written = isinstance(checkpoint, dict) and "pytorch-lightning_version" in checkpoint and "format" not in checkpoint
    return written and isinstance(checkpoint.get("state_dict"), dict)


def refuse_trust(weights_only: bool | None) -> None:
    """Refuse to read files as if they could be trusted.

    Raises:
        MisconfigurationException: `weights_only` is False.
    """
    if weights_only is False:
        raise MisconfigurationException(
            "weights_only=False would run code that is in a file; leave it out: files of this engine hold plain data"
        )


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str], strict: bool = True
) -> None:
    """Load a state dict, naming what does not fit; where names need not be the same, with a warning.

    Raises:
        MisconfigurationException: Names or shapes differ.
    """
    if not isinstance(weights, Mapping):
        raise MisconfigurationException(f"checkpoint {path} is damaged: its weights are a {type(weights).__name__}")
    own = module.state_dict()
    foreign = [n for n, v in weights.items() if isinstance(v, Tensor) != isinstance(own.get(n, v), Tensor)]
    if foreign or not all(isinstance(name, str) for name in weights):
        raise MisconfigurationException(
            f"checkpoint {path} is damaged: its weights are not those of a model: {foreign}"
        )
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} {list(weights[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in weights and isinstance(own[name], Tensor) and weights[name].shape != own[name].shape
    ]
    faults = {"missing in the file": missing, "unknown to the model": unexpected, "other shapes": shapes}
    text = "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)
    if text and not strict and not shapes:
        rank_zero_warn(f"of checkpoint {path}, only what fits is loaded ({text})")
    elif text:
        raise MisconfigurationException(f"checkpoint {path} is of another model than this one: {text}")
    with fitting(path, "state_dict"):
        module.load_state_dict({name: as_like(value, own.get(name)) for name, value in weights.items()}, strict=strict)


@contextlib.contextmanager
def fitting(path: str | os.PathLike[str], part: str) -> Iterator[None]:
    """Around taking over a part of a checkpoint: whatever goes wrong there is the fault of the file.

    Raises:
        MisconfigurationException: The part does not fit.
    """
    try:
        yield
    except MisconfigurationException:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise MisconfigurationException(
            f"checkpoint {path} does not fit this run: its {part} cannot be taken over ({reason})"
        ) from error


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
