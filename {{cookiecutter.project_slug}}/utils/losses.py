"""Losses of torch.nn by name, and the shapes in which each task hands outputs and targets to losses and metrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine import MisconfigurationException
from utils.registry import from_library, pick, snake_case

DEFAULT_LOSS = {
    "multiclass": "CrossEntropyLoss",
    "binary": "BCEWithLogitsLoss",
    "multilabel": "BCEWithLogitsLoss",
    "regression": "MSELoss",
    "sequence": "CrossEntropyLoss",
}
# What outputs and targets of a task look like; B samples, C classes, T values, L positions.
SHAPES = {
    "multiclass": "outputs (B, C) and targets (B,), or (B, C) for soft labels",
    "binary": "outputs (B,) or (B, 1) and targets (B,) or (B, 1)",
    "multilabel": "outputs (B, C) and targets (B, C)",
    "regression": "outputs and targets (B,), or both (B, T)",
    "sequence": "outputs (B, L, C) and targets (B, L)",
}
# Losses that a net's scores do not suit, and the one to use instead.
UNSUITED = {"NLLLoss": "CrossEntropyLoss", "KLDivLoss": "CrossEntropyLoss", "BCELoss": "BCEWithLogitsLoss"}
# Losses that compare number by number: torch would stretch targets of another shape to fit, and train nonsense.
ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
# Arguments that torch wants as tensors.
TENSORS = ("weight", "pos_weight")


class WeightedLosses(nn.Module):
    """The weighted sum of losses.

    Args:
        losses: Modules that take outputs and targets and return one number, by name.
        weights: What each is multiplied with; one of weight 0 is computed for the log alone.

    Attributes:
        terms: Value of each loss, without its weight and gradient, of the batch seen last; empty with a single loss
            of weight 1, which is the sum itself.
    """

    def __init__(self, losses: dict[str, nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.weights = weights
        self.terms: dict[str, Tensor] = {}

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs and targets, as `align` gives them, to the loss: a tensor of shape ().

        Raises:
            MisconfigurationException: A loss cannot take them.
        """
        values = {name: _evaluate(loss, outputs, targets) for name, loss in self.losses.items()}
        if self.weights == [1.0]:
            return next(iter(values.values()))
        self.terms = {name: value.detach() for name, value in values.items()}
        weighted = [weight * value for weight, value in zip(self.weights, values.values(), strict=True) if weight]
        return sum(weighted[1:], start=weighted[0])


def build_losses(
    task: str,
    names: list[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    weights: list[float] | None = None,
) -> WeightedLosses:
    """Losses of torch.nn.

    Args:
        task: A key of `DEFAULT_LOSS`.
        names: Names of classes. Default: the task's usual loss.
        arguments: Keyword arguments of the loss; with several losses a mapping from the name of each to its own.
            Lists for `weight` and `pos_weight` become tensors.
        weights: A weight for each loss. Default: 1.

    Raises:
        MisconfigurationException: A name is no loss of outputs and targets, or arguments or weights do not fit.
    """
    names = [pick(task, DEFAULT_LOSS, "--task")] if names is None else names
    if not names or len(set(names)) < len(names):
        raise MisconfigurationException(f"--loss {' '.join(names) or '(none)'}: name at least one loss, each once")
    own = {names[0]: arguments or {}} if len(names) == 1 else arguments or {}
    if unknown := [name for name in own if name not in names]:
        raise MisconfigurationException(
            f"--loss_args has {unknown[0]!r}; with several losses give {{loss: {{argument: value}}}} for these: "
            f"{', '.join(names)}"
        )
    losses = {snake_case(name): _build(name, own.get(name) or {}) for name in names}
    weights = [1.0] * len(names) if weights is None else weights
    fine = len(weights) == len(names) and all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not fine or not any(weights):
        raise MisconfigurationException(
            f"--loss_weights {weights}: give {len(names)} finite numbers from 0, one for each loss "
            f"({', '.join(names)}), not all of them 0"
        )
    return WeightedLosses(losses, weights)


def _build(name: str, arguments: Any) -> nn.Module:
    if isinstance(arguments, Mapping):
        arguments = {key: _to_tensor(name, value) if key in TENSORS else value for key, value in arguments.items()}
    if name in UNSUITED:
        raise MisconfigurationException(
            f"--loss {name}: it takes probabilities or their logarithms, and the nets here give scores; give "
            f"{UNSUITED[name]}, or override MInterface.configure_loss"
        )
    loss = from_library(nn, nn.modules.loss._Loss, name, arguments, "--loss")
    for buffer in [name for name in TENSORS if getattr(loss, name, None) is not None]:
        # They are arguments: a checkpoint neither brings its own nor misses them.
        loss.register_buffer(buffer, getattr(loss, buffer), persistent=False)
    if loss.reduction not in ("mean", "sum"):
        raise MisconfigurationException(
            f"--loss {name}: reduction={loss.reduction!r} is no single number; give mean or sum"
        )
    inputs = [p.name for p in inspect.signature(loss.forward).parameters.values() if p.default is p.empty]
    if len(inputs) != 2 or any(True for _ in loss.parameters()):
        raise MisconfigurationException(
            f"--loss {name}: it needs more than outputs and targets ({', '.join(inputs)}, or weights of its own); "
            "use it in MInterface.configure_loss"
        )
    return loss


def _to_tensor(name: str, value: Any) -> Tensor | None:
    try:
        return None if value is None else torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationException(f"--loss {name}: weights {value!r}; give a list of numbers") from error


def _evaluate(loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    if isinstance(loss, ELEMENTWISE) and outputs.shape != targets.shape:
        raise MisconfigurationException(
            f"{type(loss).__name__} of {_describe(outputs, targets)}: they need one shape; is --task right?"
        )
    try:
        value: Tensor = loss(outputs, targets)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise MisconfigurationException(
            f"{type(loss).__name__} of {_describe(outputs, targets)}: {' '.join(str(error).split())}"
        ) from error
    return value


def align(task: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Bring outputs and targets into the form that the losses and metrics of a task take.

    - multiclass: as they are, with integers as int64;
    - binary: both of shape (B,), targets as floats;
    - multilabel: both of shape (B, C), targets as floats;
    - regression: both of shape (B,) or (B, T), or of any one shape, such as that of images; targets as floats;
    - sequence: (B, L, C) and (B, L) to (B * L, C) and (B * L,).

    Raises:
        MisconfigurationException: The shapes do not belong to the task.
    """
    given = outputs, targets
    if task in ("binary", "regression"):
        outputs, targets = (x.squeeze(1) if x.ndim == 2 and x.shape[1] == 1 else x for x in given)
    if task == "multiclass":
        fits = outputs.ndim >= 2 and targets.shape in (outputs.shape, outputs.shape[:1] + outputs.shape[2:])
    elif task == "sequence":
        fits = outputs.ndim == 3 and targets.shape == outputs.shape[:2]
    else:
        fits = outputs.shape == targets.shape and outputs.ndim in {"binary": (1,), "multilabel": (2,)}.get(
            task, range(1, 10)
        )
    if not fits:
        raise MisconfigurationException(f"task {task} takes {SHAPES[task]}; the net and data gave {_describe(*given)}")
    if task == "sequence":
        outputs, targets = outputs.flatten(0, 1), targets.flatten()
    if task not in ("multiclass", "sequence"):
        # Halves would round the targets of a regression.
        targets = targets.to(torch.float64 if outputs.dtype == torch.float64 else torch.float32)
    elif not targets.is_floating_point():
        targets = targets.long()
    return outputs, targets


def activate(task: str, outputs: Tensor) -> Tensor:
    """Outputs as predictions.

    - multiclass: probabilities of the classes, of shape (B, C);
    - binary: probability of the class 1, of shape (B,);
    - multilabel: probability of each label, of shape (B, C);
    - regression: the values, as they are;
    - sequence: probabilities of the token that comes next after the last position, of shape (B, C).
    """
    if task == "multiclass":
        return outputs.softmax(dim=1)
    if task == "sequence":
        return outputs[:, -1].softmax(dim=-1)
    if task == "binary" and outputs.ndim == 2:
        outputs = outputs.squeeze(1)
    return outputs if task == "regression" else outputs.sigmoid()


def _describe(outputs: Tensor, targets: Tensor) -> str:
    return (
        f"outputs {tuple(outputs.shape)} of {_dtype(outputs)} and targets {tuple(targets.shape)} of {_dtype(targets)}"
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
