"""Hooks that models and data modules override: what runs when, apart from the steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class ModelHooks(nn.Module):
    """Hooks of a model, by the moment at which they run. `Callback` says of each what has happened by then."""

    # Whether the engine computes gradients and steps the optimizer; otherwise `training_step` does.
    automatic_optimization: bool = True

    # A stage begins or is over: "fit", "validate", "test" or "predict". teardown is called after an error, too.
    def setup(self, stage: str) -> None: ...
    def teardown(self, stage: str) -> None: ...

    # Training: the whole of it, its epochs, its batches. Returning -1 skips the rest of the epoch.
    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None: ...
    def on_train_batch_end(self, outputs: dict[str, Any], batch: Any, batch_idx: int) -> None: ...

    # Within a training batch, in this order; on_before_optimizer_step sees gradients unscaled and not yet clipped.
    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...

    # Validation, within fit or on its own.
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    # Testing and prediction, at the same moments.
    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    # A checkpoint is about to be written (add plain data to it), or was read (weights are not yet loaded).
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    # These do what their names say. Without a model_train of yours, every submodule gets the mode that it had.
    def on_validation_model_zero_grad(self) -> None:
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        self.eval()

    def on_validation_model_train(self) -> None:
        self.train()

    on_test_model_eval = on_predict_model_eval = on_validation_model_eval
    on_test_model_train = on_predict_model_train = on_validation_model_train

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a learning-rate scheduler; `metric` is what a plateau scheduler watches, else None."""
        scheduler.step(*(() if metric is None else (metric,)))


class DataHooks:
    """Loaders and batch transfer. A data module's override goes before the model's."""

    # Whether every machine prepares data, or only the first.
    prepare_data_per_node: bool = True

    def prepare_data(self) -> None:
        """Download and the like: on one process (of each machine), before `setup`; keep no state here."""

    def train_dataloader(self) -> Any:
        """The loader to train on."""

    def val_dataloader(self) -> Any:
        """The loader to validate on, or several in a list or by name."""

    def test_dataloader(self) -> Any:
        """The loader to test on, or several in a list or by name."""

    def predict_dataloader(self) -> Any:
        """The loader to predict, or several in a list or by name."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the CPU."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; by default all tensors in it, however nested."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the device."""
        return batch


def is_overridden(thing: object, name: str, base: type) -> bool:
    """Whether `thing`, an instance of `base`, brings its own `name`, by class or by attribute."""
    return name in vars(thing) or getattr(type(thing), name, None) is not getattr(base, name, None)


def move_to_device(batch: Any, device: torch.device) -> Any:
    """The same structure with every tensor on `device`; other objects that have `.to` are moved by it."""
    if type(batch) in (list, tuple):
        for part in batch:
            if type(part) is not Tensor or part.device != device:
                break
        else:
            # Nothing to do, as is usual on the CPU. Whoever changes the list changes no other's.
            return type(batch)(batch)
    # Towards the CPU a copy that is not waited for would hold garbage.
    on_gpu = device.type == "cuda"
    return convert(batch, lambda value: value.to(device, non_blocking=on_gpu), other=lambda value: value.to(device))


def convert(batch: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any] | None = None) -> Any:
    """The same structure with every tensor, and if asked to every other object that has `.to`, converted."""
    if isinstance(batch, Tensor):
        return tensor(batch)
    if other is not None and hasattr(batch, "to"):
        moved = other(batch)
        # Some move themselves, and return nothing.
        return batch if moved is None else moved
    if isinstance(batch, Mapping):
        converted = {key: convert(value, tensor, other) for key, value in batch.items()}
        if isinstance(batch, defaultdict):
            return defaultdict(batch.default_factory, converted)
        return converted if type(batch) is dict else type(batch)(converted)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*[convert(value, tensor, other) for value in batch])
    if isinstance(batch, list | tuple):
        return type(batch)([convert(value, tensor, other) for value in batch])
    if is_dataclass(batch) and not isinstance(batch, type):
        # Not made anew: what was done when it was made is not done twice.
        made = copy(batch)
        for field in fields(batch):
            object.__setattr__(made, field.name, convert(getattr(batch, field.name), tensor, other))
        return made
    return batch


def find_batch_size(batch: Any) -> int | None:
    """First dimension of the first tensor in `batch`, however nested; None where there is no tensor."""
    # The usual batch at once: this is asked with every value that is logged.
    batch = batch[0] if type(batch) in (list, tuple) and batch and isinstance(batch[0], Tensor) else batch
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif is_dataclass(batch):
        batch = [getattr(batch, field.name) for field in fields(batch)]
    elif not isinstance(batch, list | tuple):
        return None
    return next((size for size in map(find_batch_size, batch) if size is not None), None)
