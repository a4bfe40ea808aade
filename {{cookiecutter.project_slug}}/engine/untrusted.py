"""Reading files that anybody may have made: no code of theirs runs, no bit of them is wrong, no bomb goes off.

torch's own `weights_only=True` keeps code from being run. It trusts the bytes that it reads, though, and a few of them
can stand for objects that fill any memory, or take for ever to look at.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Bounds of what may lie within each other, and of objects: by the size of the file, and in any case.
DEEPEST, LARGEST, SMALLEST = 50, 5_000_000, 100_000
# Bytes that values may take in memory for each byte of their file, since views repeat what is stored once.
EXPANSION, ALWAYS_ALLOWED = 64, 2**28


class LeftOut:
    """Stands for a Python object of a file, of which nothing is taken."""

    def __new__(cls, *args: Any, **kwargs: Any) -> LeftOut:
        """Make one, whatever the object would have been made from."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


class _Dict:
    """Stands for a class of dicts; the unpickler puts items into plain ones only."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        """Make a plain one."""
        return {}


def read_plain(path: Path, map_location: Any = "cpu", stand_in: bool = False) -> Any:
    """What `torch.save` wrote: primitives, containers and tensors.

    Args:
        path: The file.
        map_location: Where to put tensors, as in `torch.load`.
        stand_in: Put a `LeftOut` in the place of every other object, rather than refuse the file.

    Raises:
        pickle.UnpicklingError: The file holds other objects.
        OverflowError: It stands for more than its size allows.
        Exception: It is damaged, in one of many ways: BadZipFile, EOFError, zlib.error, RuntimeError, ...
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise zipfile.BadZipFile("it is no zip file")
    check_records(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if stand_in else []
    allowed = [(_Dict if n.endswith(".AttributeDict") else type(n, (LeftOut,), {}), n) for n in names]
    with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        content = torch.load(path, map_location=map_location, weights_only=True)
    _check_content(content, path.stat().st_size)
    return content


def check_records(path: Path) -> None:
    """Check every byte of a file of `torch.save` against its checksums, and its pickle for bombs."""
    if not zipfile.is_zipfile(path):
        # torch's older format: pickles one after the other, then the bytes of tensors.
        with open(path, "rb") as file:
            for _ in range(4):
                check_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        names = [info.filename.lower() for info in archive.infolist()]
        if len(set(names)) < len(names):
            raise zipfile.BadZipFile("a record is there twice")
        # No checksum covers these two, torch writes zeros, and one set bit makes it return garbage for a tensor.
        altered = next((info.filename for info in archive.infolist() if info.external_attr or info.compress_type), None)
        bad_record = altered or archive.testzip()
        if bad_record is not None:
            raise zipfile.BadZipFile(f"record {bad_record} fails its checksum")
        for name in archive.namelist():
            if name.lower().endswith("data.pkl"):
                check_pickle(archive.read(name))


def check_pickle(content: bytes | BinaryIO) -> None:
    """Refuse what would be endless while it is read: tuples that share their items, when hashed, and bytes by number.

    Follows how many values each object on the pickle machine's stack stands for.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(content):
        name, before = opcode.name, [item.name for item in opcode.stack_before]
        if name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise pickle.UnpicklingError("bytearray")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET", "DUP"):
            stack.append(stack[-1] if name == "DUP" else memo[argument])
        else:
            taken = before
            size = 0
            if "mark" in before:
                start = marks.pop()
                size, taken = sum(stack[start:]), before[: before.index("mark")]
                del stack[start:]
            size += sum(stack.pop() for _ in taken)
            if name.startswith("TUPLE") and size > SMALLEST:
                raise OverflowError("endless tuple")
            stack += [size + 1] * len(opcode.stack_after)


def _check_content(content: Any, file_size: int) -> None:
    todo: list[tuple[Any, int]] = [(content, 0)]
    seen, memory = 1, 0
    in_parts = isinstance(content, dict) and "shards" in content
    most, allowed = min(LARGEST, max(SMALLEST, 4 * file_size)), max(ALWAYS_ALLOWED, EXPANSION * file_size)
    while todo:
        value, depth = todo.pop()
        if isinstance(value, Tensor):
            # One without data stands for parts that lie elsewhere, whose sizes tell whether that is true.
            memory += 0 if value.is_meta and in_parts else value.numel() * value.element_size()
        elif isinstance(value, str | bytes | bytearray):
            memory += len(value)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        seen += len(parts)
        if depth > DEEPEST or seen > most or memory > allowed:
            raise OverflowError(f"more than {file_size} bytes allow")
        todo += [(part, depth + 1) for part in parts]
