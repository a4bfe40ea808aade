"""Losses by name: the same numbers as torch's own, one clear line for anything else; and the shapes of each task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine import MisconfigurationException
from torch import Tensor, nn
from utils.losses import DEFAULT_LOSS, activate, align, build_losses

# The losses of torch.nn that take outputs and targets, with inputs they can take.
SCORES, LABELS = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]]), torch.tensor([0, 2])
SHARES, VALUES = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
TAKES: dict[str, tuple[Tensor, Tensor]] = {
    "BCEWithLogitsLoss": (SCORES, VALUES),
    "CrossEntropyLoss": (SCORES, LABELS),
    "HingeEmbeddingLoss": (SCORES, 2 * VALUES - 1),
    "HuberLoss": (SCORES, VALUES),
    "L1Loss": (SCORES, VALUES),
    "MSELoss": (SCORES, VALUES),
    "MultiLabelMarginLoss": (SCORES, torch.tensor([[0, -1, -1], [2, 1, -1]])),
    "MultiLabelSoftMarginLoss": (SCORES, VALUES),
    "MultiMarginLoss": (SCORES, LABELS),
    "PoissonNLLLoss": (SCORES, VALUES),
    "SmoothL1Loss": (SCORES, VALUES),
    "SoftMarginLoss": (SCORES, 2 * VALUES - 1),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", [name for name in vars(nn) if name.endswith("Loss")])
def test_every_loss_of_torch_gives_its_own_value_or_one_clear_line(name: str, reduction: str) -> None:
    if name not in TAKES:
        with pytest.raises(MisconfigurationException, match=f"--loss {name}: "):
            build_losses("multiclass", [name], {"reduction": reduction})
        return
    loss = build_losses("multiclass", [name], {"reduction": reduction})
    expected = getattr(nn, name)(reduction=reduction)(*TAKES[name])
    assert torch.equal(loss(*TAKES[name]), expected) and loss.terms == {}


@pytest.mark.parametrize(
    "name",
    ["Linear", "Module", "_Loss", "_WeightedLoss", "__init__", "", "nn.MSELoss", "modules.loss.MSELoss", "functional"],
)
def test_only_losses_have_names(name: str) -> None:
    with pytest.raises(MisconfigurationException, match="there is none of that name.*CrossEntropyLoss, ") as caught:
        build_losses("multiclass", [name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("typed", ["cross_entropy_loss", "crossentropyloss", "CrosEntropyLoss"])
def test_the_nearest_loss_is_named(typed: str) -> None:
    with pytest.raises(MisconfigurationException, match="did you mean CrossEntropyLoss?"):
        build_losses("multiclass", [typed])


def test_the_sum_is_weighted_and_the_terms_are_not() -> None:
    names = ["CrossEntropyLoss", "MultiMarginLoss"]
    own = {"CrossEntropyLoss": {"label_smoothing": 0.1, "weight": [1, 2, 3]}, "MultiMarginLoss": {"margin": 0.5}}
    loss = build_losses("multiclass", names, own, [1.0, 0.5])
    outputs = SCORES.clone().requires_grad_()
    value = loss(outputs, LABELS)
    first = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)(SCORES, LABELS)
    second = nn.MultiMarginLoss(margin=0.5)(SCORES, LABELS)
    assert torch.allclose(value, first + 0.5 * second)
    assert loss.terms == {"cross_entropy_loss": first, "multi_margin_loss": second}
    value.backward()
    assert not any(term.requires_grad for term in loss.terms.values())


def test_weights_of_classes_move_with_the_module() -> None:
    loss = build_losses("binary", None, {"pos_weight": [2.0]})
    assert loss.to(torch.float64).losses["bce_with_logits_loss"].pos_weight.dtype == torch.float64
    # They are arguments, and no part of a checkpoint.
    assert loss.state_dict() == {}


@pytest.mark.parametrize(
    ("names", "arguments", "weights", "line"),
    [
        (["MSELoss"], {"margin": 1}, None, r"unexpected keyword argument 'margin'; its arguments are: .*reduction"),
        (["MSELoss"], {"reduction": "none"}, None, "give mean or sum"),
        (["MSELoss"], {"reduce": False}, None, "give mean or sum"),
        (["KLDivLoss"], {"reduction": "batchmean"}, None, "give CrossEntropyLoss"),
        (["MSELoss"], ["reduction"], None, "--loss MSELoss: .*mapping"),
        (["CrossEntropyLoss"], {"weight": "heavy"}, None, "give a list of numbers"),
        (["SmoothL1Loss", "MSELoss"], {"beta": 1}, None, "--loss_args has 'beta'; with several losses"),
        (["SmoothL1Loss", "MSELoss"], {"SmoothL1Loss": {"x": 1}}, None, "--loss SmoothL1Loss: .*its arguments are: "),
        (["MSELoss", "MSELoss"], None, None, "each once"),
        ([], None, None, "name at least one"),
        (["MSELoss"], None, [1.0, 2.0], "give 1 finite numbers"),
        (["MSELoss", "L1Loss"], None, [0.0, 0.0], "not all of them 0"),
        (["MSELoss", "L1Loss"], None, [1.0, -1.0], "finite numbers from 0"),
        (["MSELoss", "L1Loss"], None, [1.0, float("nan")], "finite numbers from 0"),
    ],
)
def test_wrong_arguments_are_one_line(names: Any, arguments: Any, weights: Any, line: str) -> None:
    with pytest.raises(MisconfigurationException, match=line) as caught:
        build_losses("regression", names, arguments, weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "outputs", "targets", "line"),
    [
        ({"label_smoothing": 2.0}, SCORES, LABELS, "CrossEntropyLoss .*label_smoothing"),
        ({"label_smoothing": "much"}, SCORES, LABELS, "CrossEntropyLoss .*"),
        ({"weight": [1.0, 2.0]}, SCORES, LABELS, "weight tensor"),
        ({}, SCORES, LABELS + 5, r"outputs \(2, 3\) of float32 and targets \(2,\) of int64: Target .* out of bounds"),
    ],
)
def test_what_torch_refuses_only_when_it_computes_is_one_line(
    arguments: Any, outputs: Tensor, targets: Tensor, line: str
) -> None:
    with pytest.raises(MisconfigurationException, match=line) as caught:
        build_losses("multiclass", None, arguments)(outputs, targets)
    assert "\n" not in str(caught.value)


OUTPUTS_TARGETS: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]]] = {
    "multiclass": [
        ((4, 3), (4,), (4, 3), (4,)),
        ((4, 3), (4, 3), (4, 3), (4, 3)),
        ((4, 3, 8, 8), (4, 8, 8), (4, 3, 8, 8), (4, 8, 8)),
    ],
    "binary": [((4, 1), (4,), (4,), (4,)), ((4,), (4, 1), (4,), (4,)), ((1, 1), (1,), (1,), (1,))],
    "multilabel": [((4, 3), (4, 3), (4, 3), (4, 3)), ((4, 1), (4, 1), (4, 1), (4, 1))],
    "regression": [
        ((4, 1), (4,), (4,), (4,)),
        ((4,), (4, 1), (4,), (4,)),
        ((4, 2), (4, 2), (4, 2), (4, 2)),
        ((4, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8)),
    ],
    "sequence": [((4, 5, 3), (4, 5), (20, 3), (20,))],
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("task", list(OUTPUTS_TARGETS))
def test_aligned_outputs_and_targets_are_what_the_loss_takes(task: str, dtype: torch.dtype) -> None:
    for given_outputs, given_targets, outputs_shape, targets_shape in OUTPUTS_TARGETS[task]:
        labels = task == "sequence" or task == "multiclass" and given_outputs != given_targets
        if labels and dtype.is_floating_point:
            continue
        outputs = torch.randn(given_outputs, requires_grad=True)
        soft = task == "multiclass" and not labels
        targets = torch.rand(given_targets) if soft else torch.randint(2, given_targets).to(dtype)
        aligned = align(task, outputs, targets)
        assert (aligned[0].shape, aligned[1].shape) == (outputs_shape, targets_shape)
        build_losses(task)(*aligned).backward()
        assert outputs.grad is not None and outputs.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("task", ["binary", "multilabel", "regression"])
def test_losses_take_halves_and_doubles(task: str, dtype: torch.dtype) -> None:
    net = nn.Linear(2, 3 if task == "multilabel" else 1, dtype=dtype)
    targets = torch.randint(2, (4, 3) if task == "multilabel" else (4,))
    build_losses(task)(*align(task, net(torch.randn(4, 2, dtype=dtype)), targets)).backward()
    assert net.weight.grad is not None and net.weight.grad.dtype == dtype


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        ("multiclass", (4,), (4,)),
        ("multiclass", (4, 3), (4, 1)),
        ("multiclass", (4, 3), (3,)),
        ("binary", (4, 2), (4,)),
        ("binary", (4, 2), (4, 2)),
        ("binary", (4, 1), (3,)),
        ("multilabel", (4, 3), (4,)),
        ("multilabel", (4, 3), (4, 2)),
        ("regression", (4, 2), (4,)),
        ("regression", (4,), (1, 4)),
        ("sequence", (4, 3), (4,)),
        ("sequence", (4, 5, 3), (4, 6)),
    ],
)
def test_shapes_of_another_task_are_one_line(task: str, outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        align(task, torch.zeros(outputs), torch.zeros(targets))
    line = str(caught.value)
    assert task in line and str(outputs) in line and str(targets) in line and "\n" not in line


@pytest.mark.parametrize("task", list(DEFAULT_LOSS))
def test_predictions_are_probabilities_but_in_a_regression(task: str) -> None:
    shape = {"binary": (4, 1), "sequence": (4, 5, 3)}.get(task, (4, 3))
    outputs = torch.randn(shape)
    predicted = activate(task, outputs)
    assert predicted.shape == {"binary": (4,)}.get(task, (4, 3))
    if task in ("multiclass", "sequence"):
        assert torch.allclose(predicted.sum(dim=1), torch.ones(4))
        assert torch.equal(predicted.argmax(dim=1), (outputs if task == "multiclass" else outputs[:, -1]).argmax(dim=1))
    elif task == "regression":
        assert torch.equal(predicted, outputs)
    else:
        assert torch.equal(predicted, outputs.reshape(predicted.shape).sigmoid())
