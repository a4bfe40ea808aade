"""Callback: code that runs at named moments of a run, apart from the model.

Override what you need. A hook that nobody overrides costs nothing: the trainer looks once, at the start, which
callbacks override which hooks (`override_table`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec

from engine.hooks import is_overridden

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from engine.module import Module
    from engine.trainer import Trainer


class Callback:
    """Base of all callbacks. `trainer` runs the loop, `pl_module` is the model (Lightning's name for it).

    Attributes:
        monitoring: Run `on_train_batch_end` and `on_train_epoch_end` after the module's own, and after what was logged
            there is known.
    """

    monitoring: ClassVar[bool] = False

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; unique among the callbacks of a run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What to save, as primitives and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    # A stage begins or is over: "fit", "validate", "test" or "predict". After an error or Ctrl-C, too: first
    # on_exception, then teardown.
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None: ...
    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None: ...
    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None: ...

    # A checkpoint is about to be written (add primitives and tensors to it), or was read: the weights are restored, the
    # state of this callback comes next.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None: ...

    # Model and optimizers are ready, later all is over. In between, a few validation batches are run to find mistakes.
    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None: ...

    # The first epoch starts, the last is over; every epoch starts, and is over with its validation. A run that goes on
    # within an epoch does not start that epoch again.
    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None: ...

    # A training batch lies on the device, and is done: outputs["loss"] is detached and divided by the accumulation.
    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None: ...
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None: ...

    # Within it: gradients are about to be cleared; the loss is about to be differentiated (divided by the accumulation,
    # scaled under fp16); gradients are there (still scaled); they are unscaled, and not yet clipped.
    def on_before_zero_grad(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None: ...
    def on_after_backward(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None: ...

    # Validation, within fit or on its own: on_validation_epoch_end is the last moment to log, on_validation_end knows
    # the metrics. The outputs of a batch are what validation_step returned.
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...

    # Testing, at the same moments.
    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_test_epoch_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_test_epoch_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...

    # Prediction, at the same moments; the outputs are still on the device.
    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None: ...
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...


P = ParamSpec("P")
# A hook as it stands in the class, so that its arguments are checked where it is called by name.
Hook = Callable[Concatenate[Any, "Trainer", "Module", P], None]
Table = dict[str, tuple[Callable[..., None], ...]]


def override_table(callbacks: Sequence[Callback]) -> Table:
    """For each hook of `Callback`, the bound methods of the callbacks that override it, in list order."""
    hooks = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    return {name: tuple(getattr(c, name) for c in callbacks if is_overridden(c, name, Callback)) for name in hooks}
