"""Checkpoints: one dictionary of primitives and tensors, in one file that is whole or not there.

Schema (`format` 1). Keys shared with Lightning keep its spelling.

    format                      int: version of this schema
    epoch                       int: epoch in which it was saved, from 0
    global_step                 int: completed optimizer steps
    state_dict                  {name: Tensor}: weights and buffers of the module
    hyper_parameters            {name: value}: arguments of the module
    datamodule_hyper_parameters {name: value}: arguments of the data module
    env                         {torch, python, world_size}: what it was saved with

and, unless only weights were asked for:

    optimizer_states            [dict]: one state_dict() per optimizer
    lr_schedulers               [dict]: one state_dict() per scheduler
    precision                   dict: state of the loss scale under fp16
    callbacks                   {state_key: dict}
    datamodule                  dict: what the data module's state_dict() gave
    state                       {seed, epoch, batches_done, global_step}: where training goes on
    rng                         [dict]: state of all random number generators, one per process

Hooks may add keys of their own. Since there is nothing but plain data inside, reading needs no trust
(`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.seed import capture_rng

if TYPE_CHECKING:
    from engine.trainer import Trainer

FORMAT = 1
RESUMABLE = {"optimizer_states": list, "lr_schedulers": list, "precision": dict, "callbacks": dict}
RESUMABLE |= {"datamodule": dict, "state": dict, "rng": list}
Checkpoint = dict[str, Any]


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


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint so that `path` holds the old file or the new one, never a part of it.

    A temporary file in the same folder is written, flushed to disk and renamed over `path`.

    Raises:
        OSError: The disk is full, or the folder cannot be written; the old file stands.
        MisconfigurationException: The dictionary holds objects that could not be read back safely.
    """
    weights = {"state_dict": checkpoint["state_dict"]} if "state_dict" in checkpoint else {}
    checkpoint = {key: plain(value, key) for key, value in checkpoint.items() if key not in weights} | weights
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        _commit(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def link(source: Path, path: Path) -> None:
    """Make `path` the same file as `source`, at once and without copying its bytes where the disk allows."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        # Some file systems have no hard links.
        shutil.copyfile(source, temporary)
    _commit(temporary, path)


def _commit(temporary: Path, path: Path) -> None:
    """Rename a complete file, and flush the folder so that the rename survives a power cut."""
    os.replace(temporary, path)
    if os.name != "nt":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, after checking every byte against the file's checksums.

    Raises:
        MisconfigurationException: The file is missing, damaged, unsafe, or no checkpoint of this engine.
    """
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.ckpt"))
        found = f"there are: {', '.join(there)}" if there else f"there are no *.ckpt files in {path.parent}"
        raise MisconfigurationException(f"checkpoint {path} does not exist; {found}")
    damaged = f"checkpoint {path} is damaged ({{}}); use another one, for example an older file in {path.parent}"
    try:
        _check_records(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise MisconfigurationException(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"checkpoint {path} holds Python objects, which could run code when loaded, and was refused; "
            "save primitives and tensors only"
        ) from error
    except Exception as error:
        # Damage shows in many ways: BadZipFile, EOFError (without a text), zlib.error, RuntimeError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MisconfigurationException(damaged.format(reason)) from error
    parts: Checkpoint = dict(checkpoint) if isinstance(checkpoint, dict) else {}
    foreign = any(not isinstance(parts.get(key), dict) for key in ("state_dict", "hyper_parameters"))
    if parts.get("format") != FORMAT or foreign:
        raise MisconfigurationException(f"{path} is not a checkpoint of this engine (format {FORMAT})")
    return parts


def _check_records(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        # No checksum covers these two, torch writes zeros, and one set bit makes it return garbage for a tensor.
        altered = next((info.filename for info in archive.infolist() if info.external_attr or info.compress_type), None)
        bad_record = altered or archive.testzip()
    if bad_record is not None:
        raise zipfile.BadZipFile(f"record {bad_record} fails its checksum")


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load a state dict, naming what does not fit.

    Raises:
        MisconfigurationException: Names or shapes differ.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} {list(weights[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in weights and isinstance(own[name], Tensor) and weights[name].shape != own[name].shape
    ]
    faults = {"missing in the file": missing, "unknown to the model": unexpected, "other shapes": shapes}
    text = "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)
    if text:
        raise MisconfigurationException(f"checkpoint {path} is of another model than this one: {text}")
    module.load_state_dict(dict(weights))


def capture(t: Trainer, weights_only: bool) -> Checkpoint:
    """Everything a trainer has to save, as in the schema; every process must call this."""
    module, datamodule, state = t.module, t.datamodule, t.state
    captured: Checkpoint = {
        "format": FORMAT,
        "epoch": state.epoch,
        "global_step": state.global_step,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "datamodule_hyper_parameters": dict(datamodule.hparams) if datamodule is not None else {},
        "env": {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "world_size": distributed.world_size(),
        },
    }
    if not weights_only:
        captured |= {
            "optimizer_states": [optimizer.state_dict() for optimizer in t.optimizers],
            "lr_schedulers": [config.scheduler.state_dict() for config in t.lr_scheduler_configs],
            "precision": t.precision_plugin.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in t.callbacks},
            "datamodule": datamodule.state_dict() if datamodule is not None else {},
            "state": {
                "seed": state.seed,
                "epoch": state.epoch + state.epoch_over,
                "batches_done": 0 if state.epoch_over else state.batches_done,
                "global_step": state.global_step,
            },
            "rng": distributed.all_gather(capture_rng()),
        }
        for callback in t.callbacks:
            callback.on_save_checkpoint(t, module, captured)
    module.on_save_checkpoint(captured)
    return captured


def restore_weights(t: Trainer, path: Path | None) -> Checkpoint | None:
    """Load the weights of the trainer's module, and what data module and callbacks keep when fitting.

    Args:
        t: The trainer.
        path: A file; None does nothing.

    Returns:
        The whole checkpoint.

    Raises:
        MisconfigurationException: There is no such file, or it does not fit.
    """
    if path is None:
        return None
    loaded = load(path)
    if t.stage == "fit":
        _check_resumable(path, loaded)
    t.module.on_load_checkpoint(loaded)
    load_weights(t.module, loaded["state_dict"], path)
    if t.stage == "fit":
        if t.datamodule is not None:
            t.datamodule.load_state_dict(loaded["datamodule"])
        for callback in t.callbacks:
            callback.on_load_checkpoint(t, t.module, loaded)
            if callback.state_key in loaded["callbacks"]:
                callback.load_state_dict(loaded["callbacks"][callback.state_key])
    return loaded


def restore_training(t: Trainer, loaded: Checkpoint) -> None:
    """Put optimizers, schedulers, the loss scale and the position back."""
    pairs: list[tuple[str, list[Any]]] = [
        ("optimizer_states", t.optimizers),
        ("lr_schedulers", [c.scheduler for c in t.lr_scheduler_configs]),
    ]
    for key, targets in pairs:
        if len(loaded[key]) != len(targets):
            raise MisconfigurationException(
                f"the checkpoint has {len(loaded[key])} {key}, this run has {len(targets)}; resume with the same "
                "configure_optimizers"
            )
        for target, saved in zip(targets, loaded[key], strict=True):
            try:
                target.load_state_dict(saved)
            except (KeyError, ValueError) as error:
                raise MisconfigurationException(
                    f"the saved state of {key} does not fit {type(target).__name__} ({error}); resume with the same "
                    "configure_optimizers"
                ) from error
    t.precision_plugin.load_state_dict(loaded["precision"])
    t.state = type(t.state)(**loaded["state"])
    for logger in t.loggers:
        if hasattr(logger, "resume_at"):
            logger.resume_at(t.state.global_step)


def _check_resumable(path: Path, loaded: Checkpoint) -> None:
    missing = [key for key in RESUMABLE if not isinstance(loaded.get(key), RESUMABLE[key])]
    if missing:
        raise MisconfigurationException(
            f"checkpoint {path} holds weights only; it can be tested, not resumed (no {', '.join(missing)})"
        )
    done = loaded["state"]["batches_done"]
    if done:
        raise MisconfigurationException(
            f"checkpoint {path} was saved within epoch {loaded['epoch']}, after {done} batches; "
            "training can be resumed at the end of an epoch only"
        )


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
