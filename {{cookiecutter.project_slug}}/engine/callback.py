"""Callback: code that runs at named moments of a run, apart from the model.

Override what you need. A hook that nobody overrides costs nothing: the trainer looks once, at the start, which
callbacks override which hooks (`override_table`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec

from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from engine.module import Module
    from engine.trainer import Trainer


class Callback:
    """Base of all callbacks. `trainer` runs the loop, `pl_module` is the model (Lightning's name for it).

    Attributes:
        monitoring: Run `on_train_epoch_end` after the module's own and after the epoch's metrics are known.
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

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """A stage begins: "fit", "validate", "test" or "predict"."""

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """A stage is over, also after an error."""

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """The run ends with an error or with Ctrl-C."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; add to it what you like (primitives and tensors)."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint was read, the weights are restored; the state of this callback comes next."""

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Model and optimizers are ready."""

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Training is over."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        """A few validation batches are about to run, to find mistakes before the first epoch."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The sanity check is over; its metrics are gone."""

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The first epoch is about to start."""

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The last epoch is over."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """An epoch starts."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """An epoch is over, its validation included."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        """A training batch lies on the device."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """A training batch is done; `outputs["loss"]` is detached and divided by the accumulation."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """Gradients are about to be cleared."""

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None:
        """The loss is about to be differentiated (divided by the accumulation, scaled under fp16)."""

    def on_after_backward(self, trainer: Trainer, pl_module: Module) -> None:
        """Gradients are there (still scaled under fp16)."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """Gradients are unscaled and not yet clipped."""

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Validation starts."""

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Validation is over, its metrics are known."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The validation sets are about to be read."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The validation sets are read; the last moment to log."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch lies on the device."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch is done; `outputs` is what `validation_step` returned."""

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Testing starts."""

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Testing is over, its metrics are known."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The test sets are about to be read."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The test sets are read; the last moment to log."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test batch lies on the device."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test batch is done; `outputs` is what `test_step` returned."""

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Prediction starts."""

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Prediction is over."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The sets to predict are about to be read."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The sets to predict are read."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A batch to predict lies on the device."""

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A batch is predicted; `outputs` is what `predict_step` returned, still on the device."""


P = ParamSpec("P")
# A hook as it stands in the class, so that its arguments are checked where it is called by name.
Hook = Callable[Concatenate[Any, "Trainer", "Module", P], None]
Table = dict[str, tuple[Callable[..., None], ...]]


def override_table(callbacks: Sequence[Callback]) -> Table:
    """For each hook of `Callback`, the bound methods of the callbacks that override it, in list order."""
    hooks = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    return {name: tuple(getattr(c, name) for c in callbacks if is_overridden(c, name, Callback)) for name in hooks}


def is_overridden(thing: object, name: str, base: type) -> bool:
    """Whether `thing`, an instance of `base`, brings its own `name`, by class or by attribute."""
    return name in vars(thing) or getattr(type(thing), name, None) is not getattr(base, name, None)


def check_hook_names(thing: object, base: type, unsupported: Mapping[str, str] = {}) -> None:  # noqa: B006  # read only
    """Refuse methods that look like hooks and would never be called.

    Args:
        thing: A module, data module or callback.
        base: The class that defines the real hooks.
        unsupported: Names that do something in Lightning and nothing here, with the hook to use instead.

    Raises:
        MisconfigurationException: Such a method exists; the message names the nearest real hook.
    """
    known = set(dir(base))
    for cls in type(thing).__mro__:
        if cls is base:
            break
        for name, value in vars(cls).items():
            if name in known or not callable(value) or not (name.startswith("on_") or name in unsupported):
                continue
            nearest = [unsupported[name]] if name in unsupported else difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "rename it, or move its work into a real hook"
            raise MisconfigurationException(
                f"{cls.__name__}.{name} would never be called: {base.__name__} has no hook of that name; {hint}"
            )
