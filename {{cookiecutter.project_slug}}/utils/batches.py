"""What happens to a batch of (inputs, targets) before the net sees it: checks, label smoothing, mixup and cutmix."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import MisconfigurationException
from utils.registry import describe
from utils.samples import describe_inputs, per_sample

# Beta distributions of smaller parameters give no numbers.
LEAST = 1e-6


class explain:  # noqa: N801
    """A context in which errors that torch raises for wrong shapes and values become one line.

    Args:
        what: What is done in it, such as "the net".
        **values: What it is done with; of tensors the line tells the shapes.
    """

    def __init__(self, what: str, **values: Any) -> None:
        self.what, self.values = what, values

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        of_the_device = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
        if any(base.__name__ == "BackendCompilerFailed" for base in type(error).__mro__):
            reason = str(error).splitlines()[0]
            line = f"--compile true: torch cannot compile {self.what} here ({reason}); repair that, or leave it out"
            raise MisconfigurationException(line) from error
        # One of several processes may have failed for itself, or since another has gone: a traceback says more.
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if isinstance(error, RuntimeError | ValueError | IndexError) and not (of_the_device or several):
            given = ", ".join(f"{name} {shape_of(value)}" for name, value in self.values.items())
            raise MisconfigurationException(f"{self.what} fails on {given}: {describe(error, 'model')}") from error


class SoftLabels:
    """Turns labels into probabilities, for training: label smoothing, mixup, cutmix.

    Sources: Szegedy et al. 2016 (label smoothing), Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix). Where mixup and
    cutmix are both on, each batch gets one of them at random.

    Args:
        task: Only multiclass has such labels.
        num_classes: Number of classes.
        smoothing: Share of a label that is spread over all classes, from 0 to below 1.
        mixup: Parameter of the beta distribution, from 0 (off).
        cutmix: The same for cutmix.

    Raises:
        MisconfigurationException: A value is out of range, or the task has no classes.
    """

    def __init__(self, task: str, num_classes: int | None, smoothing: float, mixup: float, cutmix: float) -> None:
        limits = {"label_smoothing": (smoothing, 1.0), "mixup": (mixup, 1e6), "cutmix": (cutmix, 1e6)}
        for name, (value, limit) in limits.items():
            if not 0 <= value < limit or 0 < value < LEAST:
                raise MisconfigurationException(
                    f"{name}={value}; give a number from {LEAST:g} to below {limit:g}, or 0 (off)"
                )
            if value and (task != "multiclass" or num_classes is None):
                raise MisconfigurationException(
                    f"{name}={value} needs the task multiclass and a dataset that tells its num_classes; here: {task}"
                )
        self.num_classes, self.smoothing = num_classes, smoothing
        self.mix = None
        if mixup or cutmix:
            from torchvision.transforms import v2

            chosen = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
            self.mix = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind, alpha in chosen if alpha])

    def __call__(self, inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
        """Inputs, and targets of shape (batch, num_classes) where anything is on; (batch,) otherwise."""
        targets = targets if targets.is_floating_point() else targets.long()
        if self.mix is not None:
            if not isinstance(inputs, Tensor) or inputs.ndim != 4:
                raise MisconfigurationException(f"mixup and cutmix need images, not inputs {shape_of(inputs)}")
            inputs, targets = self.mix(inputs, targets)
        if self.smoothing and self.num_classes is not None:
            hard = targets if targets.ndim == 2 else F.one_hot(targets, self.num_classes).float()
            targets = hard * (1 - self.smoothing) + self.smoothing / self.num_classes
        return inputs, targets


class TargetScale(nn.Module):
    """Brings targets of a regression to mean 0 and deviation 1, and what the net gives back to their units.

    So a net and a learning rate serve prices as well as shares. Mean and deviation come from the training samples and
    are kept in checkpoints; a dataset that does not tell its `targets` is left as it is.

    Args:
        task: All others than regression are left as they are.
        data: The DInterface, if there is one.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, task: str, data: Any) -> None:
        super().__init__()
        self.active = task == "regression"
        if not self.active:
            return
        sets = getattr(data, "sets", {}).get("train", {})
        columns = getattr(data, "tell", lambda attribute: None)("num_targets") or 1
        unknown = [[0.0] * columns] if columns > 1 else [0.0]
        targets = next((told for dataset in sets.values() if (told := per_sample(dataset, "targets"))), unknown)
        values = torch.as_tensor(targets, dtype=torch.float64)
        values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        deviation = values.std(dim=0, correction=0)
        self.register_buffer("mean", values.mean(dim=0).float())
        # Targets that are all the same have nothing to be scaled by.
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, 1.0).float())

    def forward(self, targets: Tensor) -> Tensor:
        """Targets in their units, of shape (batch,) or (batch, targets), as the loss compares them."""
        # In float32 at least: autocast's halves would round prices.
        return (targets.float() - self.mean) / self.deviation if self.active else targets

    def take_shape(self, weights: dict[str, Tensor]) -> None:
        """Make room for what a checkpoint holds, also where there is no training data to tell the shape."""
        for name in ("mean", "deviation"):
            if f"scale.{name}" in weights and self.active:
                self.register_buffer(name, torch.zeros_like(weights[f"scale.{name}"], device=self.mean.device))

    def restore(self, outputs: Tensor) -> Tensor:
        """What the net gives in the units of the targets."""
        return outputs.float() * self.deviation + self.mean if self.active else outputs


def describe_data(data: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """What checkpoints say of the data: `class_names`, and `inputs` (see `describe_inputs`).

    Args:
        data: The DInterface, if there is one.
        saved: Hyper-parameters; they count where the data does not tell.
    """
    sets = [dataset for named in getattr(data, "sets", {}).values() for dataset in named.values()]
    names = (data.tell("class_names") if sets else None) or saved.get("class_names")
    return {"class_names": names, "inputs": describe_inputs(sets[0]) if sets else saved.get("inputs")}


def take_description(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """Complete what is known of the data by what a checkpoint says.

    Raises:
        MisconfigurationException: Both have names of classes, and these differ: the same numbers would mean something
            else.
    """
    learned, here = saved.get("class_names"), now.get("class_names")
    if learned and here and list(learned) != list(here) and saved.get("task") != "regression":
        raise MisconfigurationException(
            f"the checkpoint learned the classes {', '.join(learned[:20])}; the data has {', '.join(here[:20])}"
        )
    for name in ("class_names", "inputs"):
        now[name] = now.get(name) or saved.get(name)


def pair(batch: Any) -> tuple[Any, Tensor]:
    """A batch as inputs and targets.

    Raises:
        MisconfigurationException: It is something else.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise MisconfigurationException(
        f"a batch is {shape_of(batch)}, not (inputs, targets): let the dataset give pairs, or override the steps of "
        "model/model_interface.py"
    )


def check_labels(batch: Any, num_classes: int | None, ignored: int = -100) -> None:
    """Refuse classes out of range, while they are on the CPU: a GPU would fail later, and not say which.

    Args:
        batch: Inputs and targets; anything else is left to the steps.
        num_classes: Number of classes, if it is known.
        ignored: A label that does not count.

    Raises:
        MisconfigurationException: A label is below 0, or num_classes or above.
    """
    targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
    if num_classes is None or not isinstance(targets, Tensor) or not targets.numel():
        return
    if targets.device.type != "cpu" or targets.is_floating_point():
        return
    least, most = (int(value) for value in torch.aminmax(targets))
    if least < 0 or most >= num_classes:
        least, most = (int(v) for v in torch.aminmax(torch.where(targets == ignored, 0, targets)))
    if least < 0 or most >= num_classes:
        raise MisconfigurationException(
            f"a batch has class {least if least < 0 else most}, but there are {num_classes} classes, from 0 to "
            f"{num_classes - 1}: check the dataset's targets and num_classes"
        )


def shape_of(value: Any) -> str:
    """A value in a few words: shapes of tensors, types of the rest."""
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
