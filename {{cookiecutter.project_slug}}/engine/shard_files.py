"""The files of a folder of parts, in the format of torch.distributed.checkpoint: the one module that imports it."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

# All that the description of a folder may be made of.
PLAIN = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|StorageMeta|TensorStorageMetadata"
    r"|ChunkStorageMetadata|TensorProperties|_MEM_FORMAT_ENCODING)|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|torch\.(Size|serialization\._get_layout|[a-z]+\d+\w*)|pathlib\.\w*Path"
)


def save_parts(spread: dict[str, DTensor], folder: Path) -> None:
    """Write this process' parts of tensors; all processes must call this.

    Raises:
        OSError: A process could not write its parts; raised in all of them.
    """
    try:
        save(dict(spread), checkpoint_id=folder)
    except CheckpointException as error:
        raise _of_one_process(error) from error


def load_parts(into: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, whole or spread, with what the folder has of them.

    Raises:
        OSError, UnpicklingError: The folder is damaged.
    """
    try:
        with warnings.catch_warnings():
            # Without a process group it says that there is none.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(into), storage_reader=_PlainReader(folder), no_dist=True)
    except CheckpointException as error:
        raise _of_one_process(error) from error


def _of_one_process(error: CheckpointException) -> OSError:
    """The error of one process, with which torch lists those of all, and their tracebacks."""
    first: BaseException = next((failure[0] for failure in error.failures.values()), error)
    return first if isinstance(first, OSError) else OSError(f"{type(first).__name__}: {first}")


class _PlainReader(FileSystemReader):
    """Reads the description of a folder without running code that might be in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What torch's own does by a plain `pickle.load`."""
        content = Path(self.path, ".metadata").read_bytes()
        metadata: Metadata = _PlainUnpickler(io.BytesIO(content)).load()
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not PLAIN.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)
