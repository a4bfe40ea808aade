"""What a net made of a set: counts of right and wrong, and the samples that it got most wrong.

Everything is counted batch by batch, so that a set of any size takes little memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from utils.processes import share_of_samples

# Mistakes that are kept, values of a regression that are drawn, classes that are counted one against the other, and
# numbers of one sample that are told.
WORST, MOST_VALUES, MOST_CLASSES, MOST_TOLD = 16, 20_000, 1000, 100


@dataclass(order=True)
class Mistake:
    """A sample that the net got wrong; of two, the one with the larger loss is the greater.

    Attributes:
        loss: How wrong; infinite where it is no number.
        index: Number of the sample in its set.
        true: Its class; numbers of its labels; or values of a regression. None where a sample has many.
        said: What the net made of it, in the same form.
        share: Probability of the class that the net said.
        picture: The sample, of shape (1 or 3, height, width), if it is a picture.
        name: Of the sample.
    """

    loss: float
    index: int
    true: Any = field(compare=False)
    said: Any = field(compare=False)
    share: float = field(compare=False)
    picture: np.ndarray | None = field(compare=False)
    name: str = field(default="", compare=False)


class Results:
    """What a net made of one set.

    Args:
        task: What was learned.
        num_outputs: Number of classes or labels, if it is known.
        size: Number of samples in the set, if it is known: some samplers repeat samples to share them out evenly.

    Attributes:
        seen: Number of samples.
        counts: Of shape (classes, classes), true by predicted; for multilabel (labels, 2, 2); None if there are no
            classes, or more than MOST_CLASSES.
        values: Of a regression: targets and predictions of at most MOST_VALUES samples, each of shape (targets,).
        worst: Mistakes, the worst first once `merge` was called.
    """

    def __init__(self, task: str, num_outputs: int | None, size: int | None = None) -> None:
        self.task, self.size, self.seen = task, size, 0
        classes = 2 if task == "binary" else num_outputs or MOST_CLASSES + 1
        shape = (classes, 2, 2) if task == "multilabel" else (classes, classes)
        fits = task != "regression" and classes <= MOST_CLASSES
        self.counts: Tensor | None = torch.zeros(shape, dtype=torch.int64) if fits else None
        self.values: list[tuple[list[float], list[float]]] = []
        self.worst: list[Mistake] = []

    def add(self, inputs: Any, outputs: Tensor, targets: Tensor, samples: int, scale: Any) -> None:
        """Count a batch.

        Args:
            inputs: Of the net; only tensors of pictures are kept.
            outputs: Of the net, as `align` gives them.
            targets: As `align` gives them.
            samples: How many samples these are of: a sequence, or a picture with a class for each pixel, has many.
            scale: The module's TargetScale, whose units values of a regression have.
        """
        rank, world = share_of_samples()
        indices = range(self.seen * world + rank, (self.seen + samples) * world + rank, world)
        mine = samples if self.size is None else len([index for index in indices if index < self.size])
        self.seen += mine
        if not mine or len(outputs) % samples:
            return
        rows = len(outputs) // samples * mine
        losses, predictions, targets = _judge(self.task, outputs[:rows].detach().float(), targets[:rows], scale)
        if self.counts is not None:
            self.counts = self.counts.to(targets.device)
            self.counts += _count(self.task, predictions, targets, self.counts)
        if self.task == "regression":
            # Of images, say, any value is like any other.
            columns = targets.shape[1] if targets.ndim == 2 else 1
            both = [values.reshape(-1, columns)[: MOST_VALUES - len(self.values)] for values in (targets, predictions)]
            self.values += zip(*(values.tolist() for values in both), strict=True)
        self._keep(inputs, losses.reshape(mine, -1).mean(dim=1), predictions, targets, indices)

    def _keep(self, inputs: Any, losses: Tensor, predictions: Tensor, targets: Tensor, indices: range) -> None:
        """Keep the worst samples of a batch."""
        single = len(targets) == len(losses) and targets.ndim <= 2
        top = losses.nan_to_num(nan=torch.inf).topk(min(WORST, len(losses)))
        for loss, row in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            full = len(self.worst) == WORST
            if loss <= 0 or full and loss <= self.worst[0].loss:
                break
            true, said, share = _tell(self.task, targets[row], predictions[row]) if single else (None, None, 0.0)
            picture = _picture(inputs[row]) if isinstance(inputs, Tensor) else None
            mistake = Mistake(loss, indices[row], true, said, share, picture)
            (heapq.heapreplace if full else heapq.heappush)(self.worst, mistake)

    def merge(self, names: Sequence[Any] | None) -> None:
        """Add up what all processes have counted, in each of them.

        Args:
            names: Of the samples, if they have any.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            own = (self.seen, self.counts if self.counts is None else self.counts.cpu(), self.values, self.worst)
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (share_of_samples()[0], own))
            # Processes that share a net by tensor parallelism judge the same samples.
            self._add_up(list(dict(parts).values()))
        self.worst = sorted(self.worst, reverse=True)[:WORST]
        for mistake in self.worst:
            mistake.name = f"no. {mistake.index}" if names is None else str(names[mistake.index])

    def _add_up(self, parts: list[Any]) -> None:
        self.seen = sum(part[0] for part in parts)
        self.counts = None if self.counts is None else torch.stack([part[1].cpu() for part in parts]).sum(dim=0)
        self.values = [pair for part in parts for pair in part[2]][:MOST_VALUES]
        self.worst = sorted((mistake for part in parts for mistake in part[3]), reverse=True)[:WORST]

    @classmethod
    def of_folds(cls, folds: Sequence[Results]) -> Results:
        """What the nets of all folds made of their validation samples, added up."""
        counts = folds[0].counts
        added = cls(folds[0].task, None if counts is None else len(counts))
        told = [[replace(m, name=f"fold {number}, {m.name}") for m in fold.worst] for number, fold in enumerate(folds)]
        parts = [(fold.seen, fold.counts, fold.values, worst) for fold, worst in zip(folds, told, strict=True)]
        added._add_up(parts)
        return added


def per_class(counts: Any) -> list[dict[str, float]]:
    """Precision, recall, F1 (from 0 to 1, nan where nothing was predicted or there is nothing) and samples by class.

    Args:
        counts: Of shape (classes, classes), true by predicted, or (labels, 2, 2).
    """
    counts = np.asarray(counts, dtype=float)
    several = counts.ndim == 3
    right = counts[:, 1, 1] if several else counts.diagonal()
    predicted = counts[:, :, 1].sum(axis=1) if several else counts.sum(axis=0)
    there = counts[:, 1].sum(axis=1) if several else counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        columns = {"precision": right / predicted, "recall": right / there, "F1": 2 * right / (predicted + there)}
    columns["samples"] = there
    return [{name: float(column[row]) for name, column in columns.items()} for row in range(len(counts))]


def _judge(task: str, outputs: Tensor, targets: Tensor, scale: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each sample or position (0 where it is right), predictions, and targets.

    Classes have predictions of shape (N, classes) and targets of shape (N,), where -1 does not count.
    """
    if task == "regression":
        far = (outputs - scale(targets)).abs()
        return far if far.ndim == 1 else far.flatten(1).mean(dim=1), scale.restore(outputs), targets
    if task == "multilabel":
        predictions = outputs.sigmoid()
        wrong = ((predictions > 0.5) != (targets > 0.5)).any(dim=1)
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1)
        return losses.where(wrong, 0), predictions, targets.long()
    if task == "binary":
        outputs, targets = torch.stack([-outputs / 2, outputs / 2], dim=1), targets.long()
    # A class for each pixel: those come last.
    targets = targets.argmax(dim=1).flatten() if targets.is_floating_point() else targets.flatten()
    outputs = outputs.movedim(1, -1).flatten(0, -2)
    counted = (targets >= 0) & (targets < outputs.shape[1])
    losses = F.cross_entropy(outputs, targets.where(counted, 0), reduction="none")
    wrong = (outputs.argmax(dim=1) != targets) & counted
    return losses.where(wrong, 0), outputs.softmax(dim=1), targets.where(counted, -1)


def _count(task: str, predictions: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    if task == "multilabel":
        pairs = targets * 2 + (predictions > 0.5).long()
        return torch.stack([(pairs == number).sum(dim=0) for number in range(4)], dim=1).reshape(counts.shape)
    there = targets >= 0
    pairs = targets[there] * len(counts) + predictions.argmax(dim=1)[there]
    return pairs.bincount(minlength=counts.numel()).reshape(counts.shape)


def _tell(task: str, target: Tensor, prediction: Tensor) -> tuple[Any, Any, float]:
    """Target and prediction of one sample, and the probability of the class that was predicted."""
    if task == "regression":
        true, said = (values.flatten()[:MOST_TOLD].tolist() for values in (target, prediction))
        return true, said, 0.0
    if task == "multilabel":
        true, said = (torch.nonzero(values > 0.5).flatten()[:MOST_TOLD].tolist() for values in (target, prediction))
        return true, said, 0.0
    best = int(prediction.argmax())
    return int(target), best, float(prediction[best])


def _picture(sample: Tensor) -> np.ndarray | None:
    return sample.detach().float().cpu().numpy() if sample.ndim == 3 and sample.shape[0] in (1, 3) else None
