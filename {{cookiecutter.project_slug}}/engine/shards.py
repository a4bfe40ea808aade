"""Checkpoints of sharded parameters: the file that they are known by, and beside it a folder with their parts.

`best.ckpt` is a checkpoint like any other, but for tensors that are spread over processes: those lie in
`shards/<name>/`, to which every process writes what it has (see `shard_files.py`). The file names its folder, and the
size and checksum of everything in it. It is written last: before, there is no checkpoint, and a folder that no file
names is removed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed
from engine.exceptions import DamagedCheckpoint, explained
from engine.kinds import is_spread
from engine.untrusted import check_pickle

# Where parts lie, and what a checkpoint has of them: the folder's name, and what is in it.
FOLDER = "shards"
NAME = re.compile(rb"shards/step=\d+-[0-9a-f]{8}")
Checkpoint = dict[str, Any]
# Where a tensor is to be put: by the keys that lead to it, and one of its size and type.
Place = Callable[[tuple[Any, ...], Tensor], Tensor]


def write(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write the tensors of a checkpoint that are spread over processes; all of them must call this.

    Args:
        checkpoint: What is to be saved, of primitives, tensors and containers of them.
        folder: Where its file will lie, or a folder above that.

    Returns:
        The rest, which is what its file holds; the same object if nothing in it is spread.

    Raises:
        OSError: A process could not write its part; raised in all of them. Nothing refers to what others have written.
    """
    spread = {keys: value for keys, value in _tensors(checkpoint) if is_spread(value)}
    if not spread:
        return checkpoint
    from engine.shard_files import save_parts

    name = distributed.broadcast(f"{FOLDER}/step={checkpoint['global_step']}-{uuid.uuid4().hex[:8]}")
    target, first = folder / name, distributed.is_rank_zero()
    reason, own = None, {}
    try:
        save_parts({repr(keys): value for keys, value in spread.items()}, target)
        written = [*target.glob(f"__{distributed.rank()}_*"), *([target / ".metadata"] if first else [])]
        own = {file.name: checksum(file) for file in written}
    except OSError as error:
        reason = _reason(error)
    told = distributed.all_gather((own, reason))
    files = {name: about for parts, _ in told for name, about in parts.items()}
    reasons = [reason for _, reason in told if reason is not None]
    if not reasons:
        reasons = distributed.broadcast(_settle(target, files) if first else [])
    if reasons:
        if first:
            shutil.rmtree(target, ignore_errors=True)
        note = f"the parts of a checkpoint could not be written to {target}; those written before it stand"
        raise explained(OSError(reasons[0]), note)
    empty = {keys: torch.empty(value.shape, dtype=value.dtype, device="meta") for keys, value in spread.items()}
    return {**_replaced(checkpoint, empty), FOLDER: {"folder": name, "files": files}}


def flush_folder(folder: Path) -> None:
    """Have the names of files in a folder survive a power cut."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems do not flush folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def _settle(target: Path, files: dict[str, list[int]]) -> list[str]:
    """Flush the folder that all have written to; returns what is wrong with it."""
    missing = [name for name in files if not (target / name).is_file()]
    if missing:
        return [f"{target} lacks {missing[0]}: give all machines a folder that they share"]
    flush_folder(target)
    flush_folder(target.parent)
    return []


def read(checkpoint: Checkpoint, path: Path, place: Place | None = None, whole: bool = True) -> Checkpoint:
    """Fill in the tensors that lie beside a checkpoint's file.

    Args:
        checkpoint: What the file holds; one without parts is returned as it is.
        path: The file.
        place: Where to put each tensor; default: all of it, on the CPU.
        whole: Check all parts against their checksums, rather than this process' share of them.

    Raises:
        DamagedCheckpoint: Parts are missing or damaged.
    """
    if FOLDER not in checkpoint:
        return checkpoint
    from engine.shard_files import load_parts

    with _blaming(path):
        about = checkpoint[FOLDER]
        if not NAME.fullmatch(about["folder"].encode()):
            raise ValueError(f"its parts are said to be in {about['folder']}")
        # A file whose name has a metric's, as in val/loss=0.1.ckpt, lies deeper than its parts.
        above = [folder / about["folder"] for folder in path.resolve().parents[:4]]
        folder = next((folder for folder in above if folder.is_dir()), above[0])
        _verify(folder, about["files"], whole)
        stated = [(keys, value) for keys, value in _tensors(checkpoint) if value.is_meta]
        size = sum(value.numel() * value.element_size() for _, value in stated)
        if size > sum(length for length, _ in about["files"].values()):
            raise ValueError("its tensors are larger than its parts")
        filled = {keys: torch.empty_like(v, device="cpu") if place is None else place(keys, v) for keys, v in stated}
        load_parts({repr(keys): value for keys, value in filled.items()}, folder)
    rest = {key: value for key, value in checkpoint.items() if key != FOLDER}
    return dict(_replaced(rest, filled))


def like(module: nn.Module) -> Place:
    """Put tensors where the module has those of the same name, or else one of the same size."""
    own = {name: value for name, value in module.state_dict().items() if is_spread(value)}
    by_size = {tuple(value.shape): value for value in reversed(own.values())}

    def place(keys: tuple[Any, ...], stated: Tensor) -> Tensor:
        same = own.get(keys[-1]) if keys else None
        model = same if same is not None and same.shape == stated.shape else by_size.get(tuple(stated.shape))
        if model is None:
            return torch.empty_like(stated, device="cpu")
        return torch.empty_like(model, dtype=stated.dtype)

    return place


def tidy(folder: Path, only: str | None = None) -> None:
    """Remove parts in a folder that no checkpoint in it names any more; all of them, or only one."""
    parts = [part for part in (folder / FOLDER).glob("step=*") if part.is_dir()]
    parts = [part for part in parts if only in (None, f"{FOLDER}/{part.name}")]
    if not parts:
        return
    files = [file for file in folder.rglob("*") if file.is_file() and folder / FOLDER not in file.parents]
    try:
        needed = {named_in(file) for file in files}
    except (OSError, zipfile.BadZipFile, zlib.error):
        # Nobody knows what a damaged file names.
        return
    for part in parts:
        if f"{FOLDER}/{part.name}" not in needed:
            shutil.rmtree(part, ignore_errors=True)


def named_in(file: Path) -> str | None:
    """The folder of parts that a checkpoint names, if it is one and has some; without reading its tensors.

    Raises:
        OSError, BadZipFile, zlib.error: It cannot be read, or is damaged.
    """
    if not file.is_file() or not (zipfile.is_zipfile(file) or file.suffix == ".ckpt"):
        return None
    with zipfile.ZipFile(file) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    found = NAME.search(content)
    return None if found is None else found[0].decode()


def _verify(folder: Path, files: dict[str, list[int]], whole: bool) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:3]) or 'its parts'}; copy that folder, too")
    share = slice(None) if whole else slice(distributed.local_rank(), None, distributed.local_world_size())
    for name in sorted(files)[share]:
        if checksum(folder / name) != list(files[name]):
            raise ValueError(f"{folder / name} fails its checksum")
    check_pickle((folder / ".metadata").read_bytes())


def checksum(file: Path) -> list[int]:
    """Size of a file in bytes, and its CRC-32."""
    size, checksum = 0, 0
    with open(file, "rb") as stream:
        while block := stream.read(2**22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Around reading parts: whatever goes wrong there is their fault."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"the parts of checkpoint {path} are damaged ({_reason(error)})") from error


def _tensors(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in nested dicts and lists, with the keys that lead to it, always in the same order."""
    if isinstance(value, Tensor):
        yield keys, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, (*keys, key))


def _replaced(value: Any, tensors: dict[tuple[Any, ...], Tensor], keys: tuple[Any, ...] = ()) -> Any:
    """A copy with other tensors in some places."""
    if keys in tensors:
        return tensors[keys]
    if isinstance(value, dict):
        return type(value)({key: _replaced(item, tensors, (*keys, key)) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, tensors, (*keys, number)) for number, item in enumerate(value))
    return value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
