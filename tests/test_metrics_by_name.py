"""Metrics by name: the same values as plain formulas, over several batches; one clear line for anything else."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torchmetrics
from engine import MisconfigurationException
from sklearn import metrics as sk
from torch import Tensor
from torch.nn import functional as F
from utils import metrics as own
from utils.losses import align
from utils.metrics import DEFAULT_METRICS, SHORT, build_metrics

SHAPES: dict[str, tuple[int, ...]] = {
    "multiclass": (30, 4),
    "binary": (30, 1),
    "multilabel": (30, 4),
    "regression": (30,),
    "sequence": (30, 5, 4),
}


def samples(task: str) -> tuple[Tensor, Tensor]:
    """Outputs and targets as a net and a dataset give them."""
    torch.manual_seed(0)
    outputs = torch.randn(SHAPES[task])
    if task in ("multiclass", "sequence"):
        targets = torch.randint(4, SHAPES[task][:-1])
        if task == "sequence":
            targets[:, -1] = -100
        return outputs, targets
    return outputs, torch.randn(30) if task == "regression" else (outputs + torch.randn(SHAPES[task]) > 0).float()


def measure(task: str, names: list[str] | None = None, arguments: Any = None, num_outputs: int | None = 4) -> Any:
    """The values after three batches."""
    outputs, targets = samples(task)
    metrics = build_metrics(task, names, arguments, 1 if task in ("binary", "regression") else num_outputs)
    for start in range(0, 30, 10):
        metrics.update(*align(task, outputs[start : start + 10], targets[start : start + 10]))
    return {name: float(value) for name, value in metrics.compute().items()}


def formulas(task: str) -> dict[str, float]:
    outputs, targets = (x.numpy() for x in align(task, *samples(task)))
    if task == "multiclass":
        predicted = outputs.argmax(1)
        return {"acc": sk.accuracy_score(targets, predicted), "f1": sk.f1_score(targets, predicted, average="macro")}
    if task == "binary":
        acc, f1 = sk.accuracy_score(targets, outputs > 0), sk.f1_score(targets, outputs > 0)
        return {"acc": acc, "f1": f1, "auroc": sk.roc_auc_score(targets, outputs)}
    if task == "multilabel":
        f1 = sk.f1_score(targets, outputs > 0, average="macro")
        return {"acc": float(((outputs > 0) == targets).mean()), "f1": f1}
    if task == "regression":
        mae, rmse = sk.mean_absolute_error(targets, outputs), sk.root_mean_squared_error(targets, outputs)
        return {"mae": mae, "rmse": rmse, "r2": sk.r2_score(targets, outputs)}
    seen = targets != -100
    loss = F.cross_entropy(torch.tensor(outputs[seen]), torch.tensor(targets[seen]))
    return {"acc": float((outputs.argmax(1) == targets)[seen].mean()), "perplexity": math.exp(loss)}


@pytest.mark.parametrize("task", list(DEFAULT_METRICS))
def test_the_defaults_of_a_task_are_what_their_names_say(task: str) -> None:
    assert measure(task) == pytest.approx(formulas(task), rel=1e-5)


def test_short_names_class_names_and_own_metrics_go_together() -> None:
    names = ["acc", "auroc", "MulticlassPrecision", "JaccardIndex", "WorstClassAccuracy"]
    values = measure("multiclass", names, {"acc": {"average": "macro"}, "JaccardIndex": {"average": "micro"}})
    outputs, targets = samples("multiclass")
    confusion = torch.tensor(sk.confusion_matrix(targets, outputs.argmax(1)))
    recall = confusion.diag() / confusion.sum(dim=1)
    assert set(values) == {"acc", "auroc", "multiclass_precision", "jaccard_index", "worst_class_accuracy"}
    assert values["acc"] == pytest.approx(float(recall.mean()))
    assert values["worst_class_accuracy"] == pytest.approx(float(recall.min()))
    assert values["auroc"] == pytest.approx(sk.roc_auc_score(targets, outputs.softmax(1), multi_class="ovr"))
    right = confusion.diag().sum()
    assert values["jaccard_index"] == pytest.approx(float(right / (2 * confusion.sum() - right)))


@pytest.mark.parametrize("task", list(DEFAULT_METRICS))
def test_every_metric_that_a_task_knows_gives_one_number_or_one_clear_line(task: str) -> None:
    needed = {"FBetaScore": {"beta": 0.5}, "MinkowskiDistance": {"p": 3}}
    works = set()
    for name in own._known(task):
        try:
            build_metrics(task, [name], {name: needed.get(name, {})}, 4)
        except MisconfigurationException as error:
            assert f"--metrics {name}" in str(error) and "\n" not in str(error)
            continue
        works.add(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (value,) = measure(task, [name], {name: needed.get(name, {})}).values()
        except (ValueError, RuntimeError, TypeError, IndexError):
            continue  # what torchmetrics says of such inputs is left to the engine
        assert isinstance(value, float)
    assert len(works) > 12
    assert not works & {"ConfusionMatrix", "ROC", "StatScores", "PrecisionRecallCurve", "PrecisionAtFixedRecall"}


def test_several_values_are_averaged_in_a_regression_of_several() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(20, 3), torch.randn(20, 3)
    metrics = build_metrics("regression", num_outputs=3)
    metrics.update(outputs[:10], targets[:10])
    metrics.update(outputs[10:], targets[10:])
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == pytest.approx(
        {
            "mae": sk.mean_absolute_error(targets, outputs),
            "rmse": math.sqrt(sk.mean_squared_error(targets, outputs)),
            "r2": sk.r2_score(targets, outputs),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    ("task", "names", "arguments", "line"),
    [
        ("multiclass", ["R2Score"], None, "--metrics R2Score: there is none of that name.* there are: acc, f1"),
        ("multiclass", ["rmse"], None, "--metrics rmse: there is none"),
        ("regression", ["acc"], None, "--task regression --metrics acc: there is none .* there are: mae, rmse, r2"),
        ("binary", ["MulticlassAccuracy"], None, "did you mean BinaryAccuracy?"),
        ("multiclass", ["Metric"], None, "there is none"),
        ("multiclass", ["MetricCollection"], None, "there is none"),
        ("multiclass", ["_build"], None, "there is none"),
        ("multiclass", ["__init__"], None, "there is none"),
        ("multiclass", ["classification.Accuracy"], None, "there is none"),
        ("multiclass", ["Acuracy"], None, "did you mean Accuracy?"),
        ("multiclass", ["ConfusionMatrix"], None, r"gives a tensor of shape \(3, 3\), not one number"),
        ("multiclass", ["ROC"], None, "gives a tuple, not one number"),
        ("multiclass", ["f1"], {"f1": {"average": None}}, r"gives a tensor of shape \(3,\), not one number"),
        ("regression", ["R2Score"], {"R2Score": {"multioutput": "raw_values"}}, "not one number"),
        ("multiclass", ["acc"], {"acc": {"topk": 2}}, "--metrics acc: .*topk.*its arguments are: .*top_k"),
        ("multiclass", ["acc"], {"acc": {"top_k": 9}}, "--metrics acc: .*top_k"),
        ("multiclass", ["acc"], {"acc": {"average": "mean"}}, "--metrics acc: .*average"),
        ("multiclass", ["acc"], {"f1": {}}, "--metric_args has 'f1'.*for these: acc"),
        ("multiclass", ["acc", "acc"], None, "acc comes twice"),
        ("regression", ["MinkowskiDistance"], None, "missing .* 'p'.*its arguments are: p"),
    ],
)
def test_wrong_names_and_arguments_are_one_line(task: str, names: Any, arguments: Any, line: str) -> None:
    with pytest.raises(MisconfigurationException, match=line) as caught:
        build_metrics(task, names, arguments, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_outputs", [None, 0, 1])
@pytest.mark.parametrize("task", ["multiclass", "multilabel", "sequence"])
def test_too_few_classes_are_one_line(task: str, num_outputs: int | None) -> None:
    with pytest.raises(MisconfigurationException, match=f"task {task} need at least 2 classes, not {num_outputs}"):
        build_metrics(task, None, None, num_outputs)


@pytest.mark.parametrize("task", list(DEFAULT_METRICS))
def test_a_single_sample_is_no_error(task: str) -> None:
    outputs, targets = samples(task)
    metrics = build_metrics(task, None, None, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics.update(*align(task, outputs[:1], targets[:1]))
        values = metrics.compute()
    assert all(value.numel() == 1 for value in values.values())
    assert task != "regression" or values["r2"].isnan()


def test_scores_between_0_and_1_are_scores_still() -> None:
    metrics = build_metrics("binary")
    metrics.update(torch.tensor([0.4, 0.2, 0.9]), torch.tensor([1.0, 1.0, 1.0]))
    assert float(metrics.compute()["acc"]) == 1.0


def test_targets_that_are_neither_0_nor_1_are_found() -> None:
    with pytest.raises(RuntimeError, match="expected only the following values"):
        build_metrics("binary").update(torch.zeros(2), torch.tensor([1.0, 2.0]))


def test_classes_that_did_not_occur_and_ignored_labels_do_not_count() -> None:
    metric = own.WorstClassAccuracy(num_classes=4)
    metric.update(torch.eye(4)[[0, 1, 1, 1]], torch.tensor([0, 1, 2, -100]))
    assert float(metric.compute()) == 0.0
    metric.reset()
    metric.update(torch.eye(4)[[0, 1, 0]], torch.tensor([0, 1, -100]))
    assert float(metric.compute()) == 1.0


def test_clones_with_prefixes_are_apart() -> None:
    metrics = build_metrics("binary")
    val, test = metrics.clone(prefix="val_"), metrics.clone(prefix="test_")
    val.update(torch.randn(8), (torch.arange(8) % 2).float())
    assert set(val.compute()) == {"val_acc", "val_f1", "val_auroc"}
    assert test["test_acc"].update_count == 0


def test_perplexity_is_finite_where_the_probability_underflows() -> None:
    metric = own.Perplexity()
    metric.update(torch.tensor([[0.0, 50.0], [50.0, 0.0]]), torch.tensor([0, 0]))
    assert float(metric.compute()) == pytest.approx(math.exp(25), rel=1e-5)
    assert issubclass(own.R2Score, torchmetrics.R2Score) and set(SHORT) >= set(sum(DEFAULT_METRICS.values(), []))


def test_metrics_that_begin_alike_stay_apart() -> None:
    arguments = {"MulticlassAccuracy": {"top_k": 2}}
    metrics = build_metrics("multiclass", ["f1", "MulticlassAccuracy"], arguments, 3)
    metrics.update(torch.eye(3), torch.arange(3))
    metrics.update(torch.tensor([[0.5, 0.4, 0.1]] * 3), torch.tensor([0, 1, 2]))
    values = metrics.compute()
    assert float(values["multiclass_accuracy"]) > float(values["f1"]) + 0.05


@pytest.mark.parametrize("offset", [0.0, 2e3, 1e6])
def test_r2_does_not_depend_on_where_zero_is(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(400, generator=generator).round(decimals=1)
    outputs = targets + 0.5 * torch.randn(400, generator=generator).round(decimals=1)
    metrics = build_metrics("regression", ["r2"], None, 1)
    for part in range(0, 400, 50):
        metrics.update(offset + outputs[part : part + 50], offset + targets[part : part + 50])
    expected = 1 - ((outputs - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()
    assert float(metrics.compute()["r2"]) == pytest.approx(float(expected), abs=0.03)
