"""Writing checkpoints at once, or in a thread while training goes on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, plain_checkpoint, save


class CheckpointWriter:
    """Writes checkpoints one after the other, at once or, if asked to, in a thread while training goes on.

    The thread writes from copies on the host, whose memory is used again for the next checkpoint. An error there is
    kept in `error`, which every step looks at, and raised by `check`.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self._buffers: dict[tuple[Any, ...], list[Tensor]] = {}

    def write(
        self,
        checkpoint: Checkpoint,
        path: Path,
        keep: tuple[Path, Path] | None,
        committed: Callable[[], None],
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ) -> None:
        """Write a file as `save` does, unless `check` raises, then call `committed`."""
        self.wait()
        if not self.asynchronous:
            check(checkpoint)
            save(checkpoint, path, keep)
            committed()
            return
        staged = self._staged(plain_checkpoint(checkpoint))
        on_gpu = any(device.type == "cuda" for *_, device in self._buffers)
        ready = torch.cuda.current_stream().record_event() if on_gpu else None

        def work() -> None:
            try:
                if ready is not None:
                    ready.synchronize()
                check(staged)
                save(staged, path, keep)
                committed()
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread since the last call."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Wait until the last file is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _staged(self, checkpoint: Checkpoint) -> Checkpoint:
        """A copy on the host; what is one tensor stays one."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        free, self._buffers = self._buffers, {}

        def copy(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copy_tensor(value)
            if isinstance(value, dict):
                copied = type(value)({key: copy(item) for key, item in value.items()})
                if isinstance(value, OrderedDict):
                    # A state dict carries the versions of its modules as an attribute.
                    vars(copied).update(vars(value))
                return copied
            return type(value)(copy(item) for item in value) if isinstance(value, list | tuple) else value

        def copy_tensor(value: Tensor) -> Tensor:
            if value.layout is not torch.strided:
                return value.detach().clone()
            same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            # An empty tensor has no address of its own.
            if same not in copies or not value.numel():
                kind = (value.dtype, value.shape, value.device)
                buffer = free[kind].pop() if free.get(kind) else None
                if buffer is None:
                    buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers.setdefault(kind, []).append(buffer)
                copies[same] = buffer.copy_(value, non_blocking=value.is_cuda)
            return copies[same]

        with torch.no_grad():
            return {key: copy(value) for key, value in checkpoint.items()}
