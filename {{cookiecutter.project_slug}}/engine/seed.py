"""Random seeds, and the state of every random number generator as plain data."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from engine.exceptions import MisconfigurationException

# Lightning's variable, so that seeds reach child processes and code written for it.
SEED_VARIABLE = "PL_GLOBAL_SEED"
MAX_SEED = 2**32 - 1


def seed_everything(seed: int = 42, workers: bool = True) -> int:
    """Seed Python, NumPy and torch (all devices), and with them the order of training samples.

    Args:
        seed: 0 to 4294967295.
        workers: Lightning's argument. Workers of loaders are seeded in any case, so that False is refused.

    Returns:
        The seed.

    Raises:
        MisconfigurationException: The seed is out of range, or `workers` is False.
    """
    if not workers:
        raise MisconfigurationException("workers=False: the workers of loaders are always seeded; leave it out")
    if not 0 <= seed <= MAX_SEED:
        raise MisconfigurationException(f"seed={seed} is out of range; give a whole number from 0 to {MAX_SEED}")
    os.environ[SEED_VARIABLE] = str(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def global_seed() -> int:
    """The seed given to `seed_everything`, else the one torch drew when it started."""
    return int(os.environ.get(SEED_VARIABLE, torch.initial_seed() & MAX_SEED))


def make_deterministic(deterministic: bool | str | None, benchmark: bool | None) -> None:
    """Choose deterministic kernels, and whether cuDNN tries several; None leaves torch as it is.

    Raises:
        MisconfigurationException: `deterministic` is neither True, False nor "warn".
    """
    if deterministic not in (None, True, False, "warn"):
        raise MisconfigurationException(f"deterministic={deterministic!r}; give true, false or warn")
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        # What cuBLAS needs for it: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark


def mix(*numbers: int) -> int:
    """Mix whole numbers into one well-spread 63-bit seed (splitmix64, Steele et al. 2014).

    Unlike `hash` it is the same in every process and every version of Python.
    """
    mask = 2**64 - 1
    state = 0
    for number in numbers:
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def seed_cpu(number: int) -> None:
    """Seed the global generators of torch on the CPU, Python and NumPy with 63 bits, cheaply."""
    # Not torch.manual_seed: it would seed the GPUs too, which draw for the model.
    torch.default_generator.manual_seed(number)
    random.seed(number)
    # NumPy takes 32 bits: others than torch takes, whose algorithm is the same.
    np.random.seed(number >> 31)


def capture_rng(gpu: bool = True) -> dict[str, Any]:
    """The state of the generators of Python, NumPy, torch and this process's GPU, as primitives and tensors."""
    # Tensors, since a checkpoint takes each of the 625 numbers by itself otherwise.
    python, numpy = random.getstate(), cast(Any, np.random.get_state())
    return {
        "python": (python[0], torch.from_numpy(np.array(python[1])), python[2]),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if gpu and torch.cuda.is_available() else None,
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `capture_rng` returned; a state of a device that is not here is left out."""
    # Older checkpoints have plain numbers in the place of tensors.
    version, words, reserve = state["python"]
    random.setstate((version, tuple(words.tolist() if isinstance(words, torch.Tensor) else words), reserve))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def isolated_rng(gpu: bool = True) -> Iterator[None]:
    """Leave every generator as it was found, whatever the block draws; asking for the GPU's waits for it."""
    state = capture_rng(gpu)
    try:
        yield
    finally:
        restore_rng(state)


_spare_generators: list[np.random.MT19937] = []


class OwnRandomness:
    """Random numbers of its own for a block of code; made for the hot path, where `isolated_rng` would be too slow.

    Within the block the global generators of torch (on the CPU), Python and NumPy are others, and afterwards they are
    what they were before it.

    Args:
        keep: The numbers go on from one block to the next; otherwise there is one block, which seeds them first.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        # A new one takes longer than a batch.
        self._numpy = _spare_generators.pop() if _spare_generators else np.random.MT19937(0)
        self._inner: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> None:
        numpy = np.random.get_bit_generator()  # type: ignore[attr-defined]
        self._outer = random.getstate(), torch.default_generator.get_state(), numpy, _second_normal(numpy)
        # NumPy's state takes a hundred times as long to read and write as another generator to take its place.
        np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]
        if self._inner is not None:
            random.setstate(self._inner[0])
            torch.default_generator.set_state(self._inner[1])

    def __exit__(self, *error: object) -> None:
        if self._keep:
            self._inner = random.getstate(), torch.default_generator.get_state()
        else:
            _spare_generators.append(self._numpy)
        python, of_torch, numpy, whole = self._outer
        random.setstate(python)
        torch.default_generator.set_state(of_torch)
        np.random.set_bit_generator(numpy)  # type: ignore[attr-defined]
        if whole is not None:
            np.random.set_state(whole)


# Raw states of NumPy's generators when they last had no normal number in reserve, by identity: one block may be within
# another, which has put its generator in the place of the global one.
_no_reserve: dict[int, bytes] = {}


def _second_normal(generator: Any) -> Any:
    """NumPy's whole state if it keeps the second of a pair of normal numbers, which goes when generators change."""
    raw = b""
    if type(generator) is np.random.MT19937:
        # 624 words and a position. As long as nobody draws, nothing can have been put in reserve.
        raw = ctypes.string_at(generator.ctypes.state_address, 625 * 4)
        if raw == _no_reserve.get(id(generator)):
            return None
    state: Any = np.random.get_state()
    if state[3]:
        return state
    _no_reserve[id(generator)] = raw
    return None
