"""Samples of datasets: what is known of each, whether sets share some, and a checksum of them."""

from __future__ import annotations

import os
import random
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from itertools import combinations
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from engine import MisconfigurationException

# Sets that are read within this time are compared sample by sample.
QUICK_SECONDS = 1.0
# A batch that takes longer to read is left to other processes.
SLOW_BATCH_SECONDS = 0.01
# Tensors of no more bytes, and of these types, come from workers by value.
SMALL_BYTES = 2**18
SENT_TYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
SENT_TYPES |= {torch.float16, torch.float32, torch.float64}


def per_sample(dataset: Dataset[Any], attribute: str) -> list[Any] | None:
    """An attribute with an item for every sample, such as `targets`, looked up through subsets; None if it lacks."""
    if isinstance(dataset, Subset):
        values = per_sample(dataset.dataset, attribute)
        return None if values is None else [values[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [per_sample(part, attribute) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [value for part in parts for value in part or ()]
    values = getattr(dataset, attribute, None)
    return None if values is None else values.tolist() if hasattr(values, "tolist") else list(values)


def class_per_sample(dataset: Dataset[Any]) -> list[int] | None:
    """Class of every sample; None if the dataset does not tell, or if its targets are no classes.

    Whole numbers of any kind are classes, and so are 0.0 and 1.0.
    """
    targets = per_sample(dataset, "targets")
    try:
        values = np.asarray([v.item() if hasattr(v, "item") and np.ndim(v) == 0 else v for v in targets or ()])
    except (ValueError, TypeError, RuntimeError):
        # Lists of different lengths, of a detection task, say.
        return None
    if not values.size or values.ndim != 1 or values.dtype.kind not in "biuf":
        return None
    return values.astype(int).tolist() if values.dtype.kind in "biu" or np.isin(values, (0, 1)).all() else None


def plain(dataset: Dataset[Any]) -> Dataset[Any]:
    """A shallow copy to look at samples in: it does not augment, if the dataset has the attribute `augment`."""
    return with_augment(dataset, False)


def with_augment(dataset: Dataset[Any], augment: bool | None) -> Dataset[Any]:
    """A shallow copy that augments or not; None leaves that as it is."""
    if isinstance(dataset, Subset):
        return Subset(with_augment(dataset.dataset, augment), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([with_augment(part, augment) for part in dataset.datasets])
    # A copy in any case: a file that is opened at the first sample would otherwise be shared by all workers.
    copied: Any = copy(dataset)
    if augment is not None and hasattr(dataset, "augment"):
        copied.augment = augment
    return copied


def innermost(dataset: Dataset[Any]) -> Dataset[Any]:
    """The dataset that a subset, or the first part of several, comes from."""
    if isinstance(dataset, Subset):
        return innermost(dataset.dataset)
    return innermost(dataset.datasets[0]) if isinstance(dataset, ConcatDataset) else dataset


def makes_batches(dataset: Dataset[Any]) -> bool:
    """Whether a dataset, or the one behind a subset, is read by whole batches: by `__getitems__`."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def as_batch(read: Any) -> Any:
    """What `__getitems__` gave: samples, if it is a list, which are stacked; anything else is the batch."""
    return default_collate(read) if isinstance(read, list) else read


def workers_for(dataset: Dataset[Any], batch_size: int) -> int:
    """Number of processes to read with: none where a batch is read quickly."""
    source, count = with_augment(dataset, None), min(batch_size, len(dataset))  # type: ignore[arg-type]
    read = getattr(source, "__getitems__", None) or (lambda indices: [source[index] for index in indices])
    # Of single samples, which may take long, a few tell enough.
    indices = list(range(count if makes_batches(dataset) else min(8, count)))
    try:
        with same_randomness():
            read([0])  # the first may open files
            begin = time.perf_counter()
            as_batch(read(indices))
            seconds = (time.perf_counter() - begin) / len(indices) * batch_size
    except Exception:
        return 0  # the loader says which sample cannot be read, and why
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(cpus() // processes, 8) if seconds > SLOW_BATCH_SECONDS else 0


def send_small_tensors(worker_id: int) -> None:
    """Have a worker of a DataLoader send small tensors through its queue; a `worker_init_fn`.

    What torch does with a tensor of any size is to move it into shared memory, whose file descriptor then takes a
    connection of its own to be handed over: more than to copy a few hundred kilobytes twice.
    """
    ForkingPickler.register(Tensor, _reduce)


def _reduce(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor is pickled on its way to another process."""
    # A view that negates or conjugates, as `.conj()` gives one, would arrive without doing so.
    tensor = tensor.resolve_neg().resolve_conj()
    is_plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.requires_grad
    # NumPy would store what is not contiguous in an order of its own.
    if is_plain and tensor.dtype in SENT_TYPES and tensor.is_contiguous() and tensor.nbytes <= SMALL_BYTES:
        return torch.from_numpy, (tensor.numpy(),)
    return reduce_tensor(tensor)


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_on_device(sets: Mapping[str, Mapping[str, Dataset[Any]]]) -> None:
    """Check that all sets, by split and name, can make their batches on a device.

    Raises:
        MisconfigurationException: One is read sample by sample, or holds no tensors to make them of.
    """
    for name, dataset in (pair for named in sets.values() for pair in named.items()):
        held = vars(innermost(dataset))
        if not makes_batches(dataset) or not any(isinstance(held[key], Tensor) for key in held.keys() - {"targets"}):
            raise MisconfigurationException(
                f"--on_device: {name} is read sample by sample; leave out --on_device, or give the dataset a "
                "__getitems__ that takes batches from tensors that it holds"
            )


def on_device(dataset: Dataset[Any], device: torch.device, moved: dict[Any, tuple[Tensor, Tensor]]) -> Dataset[Any]:
    """A shallow copy whose tensors, its attributes, are on a device.

    Args:
        dataset: A dataset that `check_on_device` has passed, or a subset of one.
        device: Where to.
        moved: What is there already, so that parts of one dataset share it.

    Raises:
        MisconfigurationException: The copy gives tensors elsewhere.
    """
    if isinstance(dataset, Subset):
        return Subset(on_device(dataset.dataset, device, moved), dataset.indices)
    copied: Any = copy(dataset)
    for name, value in vars(dataset).items():
        if isinstance(value, Tensor):
            key = id(value), device
            if key not in moved:
                # The original is kept beside it: its id stays taken.
                moved[key] = value, value.to(device)
            setattr(copied, name, moved[key][1])
    with same_randomness():
        given = [value.device for value in leaves(copied.__getitems__([0])) if isinstance(value, Tensor)]
    if any(where.type != device.type for where in given):
        raise MisconfigurationException(
            f"--on_device: {type(dataset).__name__}.__getitems__ gives tensors on {given[0]}, not on {device}; make "
            "them of the dataset's tensors alone"
        )
    return copied


def describe_inputs(dataset: Dataset[Any]) -> dict[str, Any] | None:
    """What a net is given: `shape` and `dtype` of one sample, and what the dataset tells in its dict `preprocessing`.

    It is saved in checkpoints, for predictions and exports where there is no dataset; None if samples are no tensors.
    """
    with same_randomness():
        sample = plain(dataset)[0]
    inputs = sample[0] if isinstance(sample, list | tuple) and sample else sample
    if not isinstance(inputs, Tensor):
        return None
    about = {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    return about | dict(getattr(innermost(dataset), "preprocessing", {}))


@contextmanager
def same_randomness() -> Iterator[None]:
    """Samples that are looked at within do not change what is drawn at random afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_sets(sets: Mapping[str, Mapping[str, Dataset[Any]]]) -> None:
    """Check that no set is empty, that labels are in range, and that training, validation and test share nothing.

    Shared names and groups of a dataset are an error; samples of equal content, compared where all can be read at
    once, a warning.

    Args:
        sets: The sets by split and name.

    Raises:
        MisconfigurationException: The first fault found.
    """
    for split, named in sets.items():
        for name, dataset in named.items():
            if not hasattr(dataset, "__len__"):
                raise MisconfigurationException(
                    f"dataset {name} has no length; give it __len__, or make its loaders in DInterface"
                )
            if not len(dataset):
                raise MisconfigurationException(
                    f"dataset {name}: split {split} is empty; check its files, or how it is split"
                )
            num_classes, classes = getattr(innermost(dataset), "num_classes", None), class_per_sample(dataset)
            if num_classes is not None and classes and not 0 <= min(classes) <= max(classes) < num_classes:
                raise MisconfigurationException(
                    f"dataset {name}: split {split} has classes from {min(classes)} to {max(classes)}, but its "
                    f"num_classes is {num_classes}: classes are numbered from 0 to {num_classes - 1}"
                )
    _check_apart(sets)


def _check_apart(sets: Mapping[str, Mapping[str, Dataset[Any]]]) -> None:
    apart = [(split, name) for split in ("train", "val", "test") for name in sets.get(split, {})]
    checksums: dict[tuple[str, str], list[int] | None] = {}
    for one, other in combinations(apart, 2):
        if one[0] == other[0]:
            continue
        a, b = (sets[split][name] for split, name in (one, other))
        told = f"split {one[0]} of {one[1]} and split {other[0]} of {other[1]} share"
        if shared := _shared(a, b, same_dataset=one[1] == other[1]):
            raise MisconfigurationException(
                f"{told} {shared}; every sample, and every group, belongs to one split only"
            )
        for key, dataset in ((one, a), (other, b)):
            if key not in checksums:
                checksums[key] = _checksums(dataset)
        # Equal samples can be right, in a table of few different rows, say.
        seen = set(checksums[one] or ())
        if (same := sum(checksum in seen for checksum in checksums[other] or ())) and os.environ.get(
            "RANK", "0"
        ) == "0":
            of = len(checksums[other] or ())
            print(f"warning: {told} samples: {same} of the {of} of the latter are equal", file=sys.stderr)


def fingerprint(dataset: Dataset[Any]) -> str:
    """Number of samples, and a checksum of all targets and of 64 samples."""
    count, source = len(dataset), plain(dataset)  # type: ignore[arg-type]
    with same_randomness():
        torch.manual_seed(0)
        checksums = [_checksum(source, index) for index in range(0, count, max(count // 64, 1))]
    return f"{count} samples, {zlib.crc32(repr((checksums, per_sample(dataset, 'targets'))).encode()):08x}"


def _shared(a: Dataset[Any], b: Dataset[Any], same_dataset: bool) -> str:
    """What shows that two sets share samples or groups; empty if nothing.

    Without names, sets of one length whose first, middle and last samples are equal are taken for the same: a dataset
    that ignores which split it was asked for.
    """
    for attribute in ("groups", "names"):
        values = per_sample(a, attribute), per_sample(b, attribute)
        if same_dataset and values[0] is not None and values[1] is not None:
            if common := set(values[0]) & set(values[1]):
                example = min(map(str, common))
                return f"{len(common)} {attribute}, {example} among them"
            if attribute == "names":
                return ""
    count = len(a)  # type: ignore[arg-type]
    if count < 2 or count != len(b) or isinstance(a, Subset) and isinstance(b, Subset):  # type: ignore[arg-type]
        return ""
    a, b = plain(a), plain(b)
    same = all(_checksum(a, index) == _checksum(b, index) for index in {0, count // 2, count - 1})
    return "all samples" if same else ""


def _checksums(dataset: Dataset[Any]) -> list[int] | None:
    """A checksum of every sample, without augmentation; None if it would take long to read them all."""
    source, count = plain(dataset), len(dataset)  # type: ignore[arg-type]
    begin = time.perf_counter()
    few = min(16, count)
    checksums = [_checksum(source, index) for index in range(few)]
    if (time.perf_counter() - begin) / few * count > QUICK_SECONDS:
        return None
    return checksums + [_checksum(source, index) for index in range(few, count)]


def _checksum(dataset: Dataset[Any], index: int) -> int:
    checksum = 0
    try:
        for value in leaves(dataset[index]):
            checksum = zlib.crc32(_content(value), checksum)
    except (ValueError, OSError) as error:
        source: Any = dataset
        while isinstance(source, Subset):
            source, index = source.dataset, source.indices[index]
        raise MisconfigurationException(f"sample {index} cannot be read: {' '.join(str(error).split())}") from error
    return checksum


def _content(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, str | bytes | int | float | None):
        return repr(value).encode()
    # What is no array is told by its type: others may show their place in memory.
    array = np.asarray(value)
    return type(value).__name__.encode() if array.dtype.kind == "O" else array.tobytes()


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dicts within each other hold."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value
