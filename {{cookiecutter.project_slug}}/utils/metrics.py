"""What is measured on validation and test sets: metrics of torchmetrics by name, and your own."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torchmetrics
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from engine import MisconfigurationException
from utils.registry import classes, construct, pick, snake_case

# Short names: a class of torchmetrics or of this file, and its arguments.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "acc": ("Accuracy", {"average": "micro"}),
    "f1": ("F1Score", {"average": "macro"}),
    "auroc": ("AUROC", {}),
    "mae": ("MeanAbsoluteError", {}),
    "rmse": ("MeanSquaredError", {"squared": False}),
    "r2": ("R2Score", {}),
    "perplexity": ("Perplexity", {}),
}
DEFAULT_METRICS = {
    "multiclass": ["acc", "f1"],
    "binary": ["acc", "f1", "auroc"],
    "multilabel": ["acc", "f1"],
    "regression": ["mae", "rmse", "r2"],
    "sequence": ["acc", "perplexity"],
}
# In a sequence, targets of this value count for nothing, as in torch's CrossEntropyLoss.
IGNORED = -100


# YOUR OWN: a metric that torchmetrics does not have is a class like this one, and at once a name for --metrics.
class WorstClassAccuracy(Metric):
    """Share of right answers in the class that fares worst; classes that did not occur are left out.

    Args:
        num_classes: Number of classes; filled in, as in every metric that takes it.
    """

    # The tasks that have such a metric (all, if this is left out), and what torchmetrics asks every metric: whether
    # more is better, and whether a batch can be counted without looking at the earlier ones.
    tasks = ("multiclass", "sequence")
    higher_is_better = True
    full_state_update = False
    right: Tensor
    seen: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # States are counted up batch by batch, summed over processes, and set back to the default after an epoch.
        self.add_state("right", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch: scores of shape (batch, num_classes), labels of shape (batch,), negative ones left out."""
        counts = (labels >= 0).long()
        labels = labels.clamp(min=0)
        self.seen = self.seen.index_add(0, labels, counts)
        self.right = self.right.index_add(0, labels, counts * (scores.argmax(dim=1) == labels))

    def compute(self) -> Tensor:
        """The accuracy, from 0 to 1: a tensor of shape ()."""
        return (self.right / self.seen).masked_fill(self.seen == 0, 1.0).min()


class R2Score(torchmetrics.R2Score):
    """Share of the variance that is explained; nan, where torchmetrics raises an error, for less than two samples."""

    tasks = ("regression",)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch: outputs and targets of shape (batch,) or (batch, targets)."""
        # Squares of large numbers are subtracted from each other. MPS has no float64.
        wide = torch.float32 if outputs.device.type == "mps" else torch.float64
        super().update(outputs.to(wide), targets.to(wide))

    def compute(self) -> Tensor:
        """The score, 1 at best: a tensor of shape ()."""
        return super().compute() if self.total >= 2 else torch.full_like(self.residual.mean(), torch.nan)


class Perplexity(Metric):
    """The exponential of the mean cross-entropy of tokens.

    Takes scores of shape (tokens, num_classes), as `align` gives them, where that of torchmetrics wants sequences.

    Args:
        ignore_index: Targets of this value do not count.
    """

    tasks = ("sequence",)
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int = IGNORED) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Count a batch: scores of shape (tokens, num_classes), targets of shape (tokens,)."""
        self.total += F.cross_entropy(scores.float(), targets, ignore_index=self.ignore_index, reduction="sum")
        self.count += (targets != self.ignore_index).sum()

    def compute(self) -> Tensor:
        """The perplexity, from 1: a tensor of shape ()."""
        return (self.total / self.count).exp()


class ProbabilityMetrics(MetricCollection):
    """Metrics of scores and of targets 0.0 and 1.0, which torchmetrics wants as probabilities and integers.

    It would turn scores into probabilities itself, but only batches that have a score outside of 0 to 1.
    """

    def update(self, outputs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Count a batch: outputs and targets of one shape, as `align` gives them."""
        super().update(outputs.float().sigmoid(), targets.round().long())


def build_metrics(
    task: str,
    names: list[str] | None = None,
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
    num_outputs: int | None = None,
) -> MetricCollection:
    """The metrics of a task, to be updated with outputs and targets as `utils.losses.align` gives them.

    Args:
        task: A key of `DEFAULT_METRICS`.
        names: Keys of `SHORT`, and names of classes of torchmetrics and this file. Default: the task's usual ones.
        arguments: Keyword arguments of metrics, by the names given.
        num_outputs: Number of classes, labels or tokens.

    Returns:
        The metrics by short name, or by the class name in snake_case.

    Raises:
        MisconfigurationException: A name is no metric of the task, arguments do not fit, or a metric does not yield
            one number.
    """
    names = DEFAULT_METRICS[task] if names is None else names
    arguments = arguments or {}
    if unknown := [name for name, own in arguments.items() if name not in names or not isinstance(own or {}, Mapping)]:
        raise MisconfigurationException(
            f"--metric_args has {unknown[0]!r}; give {{metric: {{argument: value}}}} for these: {', '.join(names)}"
        )
    if task in ("multiclass", "multilabel", "sequence") and (num_outputs is None or num_outputs < 2):
        raise MisconfigurationException(
            f"the metrics of task {task} need at least 2 classes, not {num_outputs}; give --model.num_classes, the "
            "dataset's class an attribute num_classes, or another --task"
        )
    metrics: dict[str, Metric | MetricCollection] = {}
    for name in names:
        key = name if name in SHORT else snake_case(name)
        if key in metrics:
            raise MisconfigurationException(f"--metrics {' '.join(names)}: {key} comes twice; name each metric once")
        metrics[key] = _build(task, name, arguments.get(name) or {}, num_outputs)
    collection = ProbabilityMetrics if task in ("binary", "multilabel") else MetricCollection
    # Without groups: torchmetrics makes them of metrics whose first batch happens to be equal.
    return collection(metrics, compute_groups=False)


def usual_mode(monitor: str) -> Literal["min", "max"]:
    """Whether less ("min") or more ("max") of a logged value is better, by its name: a loss, or a metric.

    Raises:
        MisconfigurationException: The name tells nothing.
    """
    name = monitor.split("/")[0].removesuffix("_epoch").removesuffix("_step").partition("_")[2] or monitor
    if name.endswith("loss"):
        return "min"
    known = {cls: found for task in DEFAULT_METRICS for cls, found in _known(task).items()}
    name = SHORT[name][0] if name in SHORT else name
    for cls, found in known.items():
        bare = cls.removeprefix("Binary").removeprefix("Multiclass").removeprefix("Multilabel")
        if name in (cls, snake_case(cls), bare, snake_case(bare)) and found.higher_is_better is not None:
            return "max" if found.higher_is_better else "min"
    raise MisconfigurationException(
        f"--monitor {monitor}: it does not tell what is better; give --monitor_mode min or max"
    )


def _build(task: str, name: str, arguments: Mapping[str, Any], num_outputs: int | None) -> Metric:
    known = _known(task)
    shorts = {short: known[cls] for short, (cls, _) in SHORT.items() if cls in known}
    cls = pick(name, {**shorts, **known}, f"--task {task} --metrics")
    arguments = {**SHORT.get(name, ("", {}))[1], **arguments}
    metric = construct(cls, {**_fill(cls, task, num_outputs), **arguments}, f"--metrics {name}")
    if problem := _try(cls, arguments, task, num_outputs):
        raise MisconfigurationException(f"--metrics {name} gives {problem}, not one number")
    return metric


def _known(task: str) -> dict[str, type[Metric]]:
    """The metrics that can take outputs and targets of a task, by the names of their classes."""
    own = classes(sys.modules[__name__], Metric)
    own = {name: cls for name, cls in own.items() if task in getattr(cls, "tasks", DEFAULT_METRICS)}
    if task == "regression":
        return {**classes(torchmetrics.regression, Metric), **own}
    others = tuple({"Binary", "Multiclass", "Multilabel"} - {_kind(task).capitalize()})
    found = classes(torchmetrics.classification, Metric)
    return {**{name: cls for name, cls in found.items() if not name.startswith(others)}, **own}


def _kind(task: str) -> str:
    """What torchmetrics calls the task: each token of a sequence is a sample of its own."""
    return "multiclass" if task == "sequence" else task


def _fill(cls: type[Metric], task: str, num_outputs: int | None) -> dict[str, Any]:
    """What the task tells, of the arguments that the class takes."""
    told: dict[str, Any] = {"task": _kind(task), "num_classes": num_outputs, "num_labels": num_outputs}
    if task == "sequence":
        told["ignore_index"] = IGNORED
    accepted = inspect.signature(cls).parameters
    return {key: value for key, value in told.items() if key in accepted}


def _try(cls: type[Metric], arguments: Mapping[str, Any], task: str, num_outputs: int | None) -> str | None:
    """What a metric gives for a small batch, if that is not one number; None, too, if it cannot be tried."""
    few = min(num_outputs or 1, 3)
    targets = torch.arange(4) % few if _kind(task) == "multiclass" else torch.arange(4.0) % 2
    outputs = F.one_hot(targets, few).float() if _kind(task) == "multiclass" else targets
    if task == "multilabel" or task == "regression" and few > 1:
        outputs, targets = (values[:, None].repeat(1, few) for values in (outputs, targets))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = cls(**{**_fill(cls, task, few), **arguments})
            # Nothing to wait for other processes for.
            metric.distributed_available_fn = lambda: False
            metric.update(outputs, targets if task == "regression" else targets.long())
            value = metric.compute()
    except Exception:
        return None
    if isinstance(value, Tensor):
        return None if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
