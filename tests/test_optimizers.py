"""Optimizers and learning-rate schedules by name, compared with torch's own step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import MisconfigurationException, Module
from engine.optim import parse_optimizers
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from utils.optimizers import SCHEDULES, build_optimizer, build_schedule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.classify = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(x))


OPTIMIZERS = [
    name for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, Optimizer)
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_trains_or_says_in_one_line_why_not(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))
    weight_decay = 0.0 if name in ("Rprop", "LBFGS") else 1e-4
    if name in ("Optimizer", "SparseAdam"):
        with pytest.raises(MisconfigurationException, match=f"--optimizer {name}: "):
            build_optimizer(net, name, 0.01, weight_decay)
        return
    optimizer = build_optimizer(net, name, 0.01, weight_decay)
    parse_optimizers(optimizer, Module())
    inputs = torch.randn(32, 4)
    losses = []

    def closure() -> torch.Tensor:
        loss = (net(inputs).squeeze(1) - inputs.sum(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        return loss

    for _ in range(20):
        losses.append(float(optimizer.step(closure).detach()))
    assert losses[-1] < losses[0]


def test_lbfgs_learns_from_two_steps(run: Callable) -> None:
    words = ("--optimizer", "LBFGS", "--weight_decay", "0", "--lr", "1", "--lr_schedule", "constant")
    words += ("--max_epochs", "1", "--limit_train_batches", "2", "--batch_size", "256", "--model.width", "16")
    # Others are at chance then, 0.10. A width of 8 would be too near to the bound for what machines round differently.
    assert run(*words).metrics["test_acc"] > 0.5


@pytest.mark.parametrize(
    "name", ["lr_scheduler", "__init__", "", "adam", "sgd.SGD", "_functional", "Linear", "swa_utils"]
)
def test_only_optimizers_have_names(name: str) -> None:
    with pytest.raises(MisconfigurationException, match="there is none of that name.*AdamW, ") as caught:
        build_optimizer(Net(), name, 0.1, 0.0)
    assert "\n" not in str(caught.value)


def test_groups_have_the_learning_rate_of_the_longest_prefix_and_no_decay_on_biases_and_norms() -> None:
    net = Net()
    net.features[0].bias.requires_grad_(False)
    scales = {"features": 0.1, "features.3": 0.5, "classify.bias": 2.0}
    optimizer = build_optimizer(net, "SGD", 1.0, 0.01, {"momentum": 0.9}, scales)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = {
        (group["lr"], group["weight_decay"]): [names[id(p)] for p in group["params"]]
        for group in optimizer.param_groups
    }
    assert groups == {
        (0.1, 0.01): ["features.0.weight"],
        (0.1, 0.0): ["features.1.weight", "features.1.bias"],
        (0.5, 0.01): ["features.3.weight"],
        (0.5, 0.0): ["features.3.bias"],
        (1.0, 0.01): ["classify.weight"],
        (2.0, 0.0): ["classify.bias"],
    }
    assert optimizer.defaults["momentum"] == 0.9


def test_without_decay_and_scales_there_is_one_group() -> None:
    (group,) = build_optimizer(Net(), "AdamW", 0.1, 0.0).param_groups
    assert len(group["params"]) == 8 and group["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"lr": math.inf}, "--lr inf"),
        ({"weight_decay": -1.0}, "--weight_decay -1.0"),
        ({"arguments": {"momentun": 0.9}}, "--optimizer SGD: .*momentun.*its arguments are: .*momentum"),
        ({"arguments": {"momentum": -1}}, "--optimizer SGD: Invalid momentum value: -1"),
        ({"arguments": {"momentum": "much"}}, "--optimizer SGD: "),
        ({"arguments": {"nesterov": True}}, "--optimizer SGD: Nesterov"),
        ({"arguments": {"lr": 1}}, "give --lr instead"),
        ({"arguments": {"weight_decay": 1}}, "give --weight_decay instead"),
        ({"arguments": {"params": []}}, "give --freeze instead"),
        ({"name": "Adam", "arguments": {"betas": [0.9, 1.5]}}, "--optimizer Adam: Invalid beta parameter"),
        ({"name": "Rprop", "weight_decay": 0.1}, "give --weight_decay 0"),
        ({"name": "LBFGS", "weight_decay": 0.1}, "give --weight_decay 0"),
        ({"name": "Muon"}, "--optimizer Muon: Muon only supports 2D"),
        ({"lr_scales": {"feat": 0.1}}, "--lr_scales feat: .* its parts are: features, classify"),
        ({"lr_scales": {"features": -1.0}}, "--lr_scales features: -1.0; give a factor above 0"),
        ({"lr_scales": {"features": math.nan}}, "give a factor above 0"),
    ],
)
def test_wrong_arguments_are_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(MisconfigurationException, match=line) as caught:
        build_optimizer(**{"net": Net(), "name": "SGD", "lr": 0.1, "weight_decay": 0.0} | given)
    assert "\n" not in str(caught.value)


def test_a_net_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="all are frozen"):
        build_optimizer(Net().requires_grad_(False), "SGD", 0.1, 0.0)


def test_the_parts_of_a_net_within_a_net_are_named() -> None:
    with pytest.raises(MisconfigurationException, match="its parts are: net.features, net.classify"):
        build_optimizer(nn.ModuleDict({"net": Net()}), "SGD", 0.1, 0.0, None, {"features": 0.1})


WARMUP, TOTAL, EPOCH = 7, 60, 12


def optimizer() -> Optimizer:
    return build_optimizer(Net(), "SGD", 0.4, 0.0, None, {"features": 0.5})


def schedule(optimizer: Optimizer, name: str, arguments: dict[str, Any] | None = None, **given: Any) -> Any:
    """The only scheduler of that name."""
    defaults: dict[str, Any] = {"warmup_steps": 0, "total_steps": TOTAL, "steps_per_epoch": EPOCH}
    (config,) = build_schedule(optimizer, name, arguments, **defaults | given)
    _, configs = parse_optimizers({"optimizer": optimizer, "lr_scheduler": config}, Module())
    assert configs[0].interval == "step"
    return config["scheduler"]


def curve(optimizer: Optimizer, scheduler: Any, steps: int, every: int = 1) -> list[list[float]]:
    """Learning rates of all groups at each step; the scheduler steps after `every` steps of the optimizer."""
    rates = []
    for step in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


# Ours, and torch's own with the same meaning; torch's rates of groups are absolute, ours are factors.
PAIRS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "cosine": ({"final": 0.0}, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL), 1),
    "step": ({"step_size": 2, "gamma": 0.3}, lambda o: lr_scheduler.StepLR(o, 2, 0.3), EPOCH),
    "multistep": ({"milestones": [3, 1]}, lambda o: lr_scheduler.MultiStepLR(o, [1, 3]), EPOCH),
    "exponential": ({"gamma": 0.7}, lambda o: lr_scheduler.ExponentialLR(o, 0.7), EPOCH),
    "onecycle": (
        {"pct_start": 0.25, "div_factor": 10.0},
        lambda o: lr_scheduler.OneCycleLR(
            o, [group["lr"] for group in o.param_groups], TOTAL + 1, pct_start=0.25, div_factor=10.0
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_a_schedule_is_that_of_torch(name: str) -> None:
    arguments, make, every = PAIRS[name]
    mine, theirs = optimizer(), optimizer()
    total = TOTAL + 1 if name == "onecycle" else TOTAL  # torch's refuses the step after the last
    ours = curve(mine, schedule(mine, name, arguments, total_steps=total), TOTAL)
    assert torch.allclose(torch.tensor(ours), torch.tensor(curve(theirs, make(theirs), TOTAL, every)), atol=1e-7)


def test_cosine_ends_at_the_final_factor() -> None:
    mine, theirs = optimizer(), optimizer()
    rates = torch.tensor(curve(mine, schedule(mine, "cosine", {"final": 0.25}), 3 * TOTAL))
    torchs = lr_scheduler.CosineAnnealingLR(theirs, TOTAL, eta_min=0.25 * 0.4)
    larger = torch.tensor([group["lr"] for group in theirs.param_groups]).argmax()
    expected = torch.tensor(curve(theirs, torchs, TOTAL))[:, larger]
    assert torch.allclose(rates[:TOTAL, larger], expected, atol=1e-7)
    assert torch.allclose(rates[TOTAL:, larger], torch.tensor(0.1)), "torch's would rise again"


@pytest.mark.parametrize("warmup", [1, WARMUP])
@pytest.mark.parametrize("name", ["constant", "cosine", "onecycle"])
def test_the_warmup_is_that_of_torch_and_the_rest_of_the_run_is_left_to_the_schedule(name: str, warmup: int) -> None:
    mine, theirs = optimizer(), optimizer()
    ours = curve(mine, schedule(mine, name, warmup_steps=warmup), TOTAL)
    rest = TOTAL - warmup
    after = {
        "constant": lambda: lr_scheduler.ConstantLR(theirs, factor=1.0),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(theirs, rest),
        "onecycle": lambda: lr_scheduler.OneCycleLR(theirs, [0.2, 0.4], rest),
    }
    if name == "onecycle":  # torch's rewrites the rates that the warmup starts from: compare what follows it
        apart = optimizer()
        scales = [group["lr"] for group in apart.param_groups]
        expected = curve(apart, lr_scheduler.OneCycleLR(apart, scales, rest), rest - 1)
        assert torch.allclose(torch.tensor(ours[warmup:-1]), torch.tensor(expected), atol=1e-7)
        assert ours[0] == pytest.approx([rate / warmup / 25 for rate in scales])
        return
    linear = lr_scheduler.LinearLR(theirs, start_factor=1 / warmup, total_iters=warmup)
    both = lr_scheduler.SequentialLR(theirs, [linear, after[name]()], milestones=[warmup])
    assert torch.allclose(torch.tensor(ours), torch.tensor(curve(theirs, both, TOTAL)), atol=1e-7)


def test_epochs_are_counted_from_the_start_of_training_through_the_warmup() -> None:
    mine = optimizer()
    rates = curve(mine, schedule(mine, "exponential", {"gamma": 0.5}, warmup_steps=WARMUP), TOTAL)
    first = [rate[0] / rates[WARMUP][0] for rate in rates]
    assert first[:WARMUP] == pytest.approx([(step * (1 - 1 / WARMUP) + 1) / WARMUP for step in range(WARMUP)])
    assert first[WARMUP:] == pytest.approx([0.5 ** (step // EPOCH) for step in range(WARMUP, TOTAL)])


@pytest.mark.parametrize(("name", "arguments"), [("cosine", None), ("onecycle", {"pct_start": 0.1})])
def test_a_longer_run_goes_on_along_the_new_layout(name: str, arguments: Any) -> None:
    short, resumed, longer = optimizer(), optimizer(), optimizer()
    first = schedule(short, name, arguments, warmup_steps=WARMUP)
    curve(short, first, 40)
    again = schedule(resumed, name, arguments, warmup_steps=WARMUP, total_steps=2 * TOTAL)
    resumed.load_state_dict(short.state_dict())
    again.load_state_dict(first.state_dict())
    rates = curve(resumed, again, 2 * TOTAL - 40)
    expected = curve(longer, schedule(longer, name, arguments, warmup_steps=WARMUP, total_steps=2 * TOTAL), 2 * TOTAL)
    # The rate of the very step it stopped at was set before the change.
    assert rates[1:] == expected[41:]
    tail = [rate[0] for rate in rates[1:]]
    assert tail == sorted(tail, reverse=True)


def test_plateau_lowers_what_does_not_improve_and_warms_up() -> None:
    mine = optimizer()
    base = [group["lr"] for group in mine.param_groups]
    arguments = {"patience": 1, "factor": 0.5}
    configs = build_schedule(mine, "plateau", arguments, 4, math.inf, math.inf, monitor="val_acc", monitor_mode="max")
    _, parsed = parse_optimizers([[mine], configs], Module())
    plateau, warmup = parsed
    assert (plateau.monitor, plateau.interval, plateau.reduce_on_plateau) == ("val_acc", "epoch", True)
    rates = curve(mine, warmup.scheduler, 6)
    assert [rate[0] / base[0] for rate in rates] == pytest.approx([0.25, 0.4375, 0.625, 0.8125, 1.0, 1.0])
    factors = []
    for value in (0.5, 0.6, 0.6, 0.6, 0.6, 0.6):
        plateau.scheduler.step(value)
        warmup.scheduler.step()
        factors.append(mine.param_groups[1]["lr"] / base[1])
    assert factors == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.5, 0.25])


def test_constant_without_warmup_is_no_scheduler() -> None:
    assert build_schedule(optimizer(), "constant", None, 0, math.inf, math.inf) == []
    assert len(build_schedule(optimizer(), "constant", None, 5, math.inf, math.inf)) == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_the_shortest_runs_have_finite_rates(name: str, steps: int) -> None:
    mine = optimizer()
    assert torch.tensor(curve(mine, schedule(mine, name, total_steps=steps), steps + 2)).isfinite().all()


@pytest.mark.parametrize("pct_start", [0.0, 1.0])
def test_onecycle_may_only_fall_or_only_rise(pct_start: float) -> None:
    mine = optimizer()
    rates = [rate[0] for rate in curve(mine, schedule(mine, "onecycle", {"pct_start": pct_start}), TOTAL)]
    assert rates == sorted(rates, reverse=pct_start == 0.0)


@pytest.mark.parametrize(
    ("name", "arguments", "given", "line"),
    [
        (
            "cosin",
            None,
            {},
            "did you mean cosine.* there are: constant, cosine, onecycle, step, multistep, exponential",
        ),
        ("__init__", None, {}, "there is none of that name"),
        (
            "cosine",
            None,
            {"total_steps": math.inf},
            "--lr_schedule cosine needs an end: give --max_epochs or --max_steps",
        ),
        ("onecycle", None, {"total_steps": math.inf}, "or --lr_schedule constant"),
        ("step", {"step_size": 1}, {"steps_per_epoch": math.inf}, "--lr_schedule step needs epochs"),
        ("cosine", None, {"warmup_steps": TOTAL}, f"--warmup_steps {TOTAL}: give .* less than the steps of the run"),
        ("constant", None, {"warmup_steps": -1}, "--warmup_steps -1"),
        ("constant", {"gamma": 1}, {}, "gamma.*its arguments are: none"),
        ("cosine", {"eta_min": 0.1}, {}, "--lr_schedule cosine: .*eta_min.*its arguments are: final"),
        ("cosine", {"final": 2}, {}, "final=2; give a factor from 0 to 1"),
        ("cosine", {"final": math.nan}, {}, "final=nan"),
        ("onecycle", {"div_factor": 0}, {}, "div_factor=0"),
        ("step", None, {}, "--lr_schedule step: .*step_size.*its arguments are: step_size, gamma"),
        ("step", {"step_size": 0}, {}, "step_size=0"),
        ("step", {"step_size": 1.5}, {}, "step_size=1.5"),
        ("step", {"step_size": "two"}, {}, "--lr_schedule step: "),
        ("step", {"step_size": 1, "gamma": -1}, {}, "gamma=-1"),
        ("multistep", {"milestones": [0]}, {}, "milestones="),
        ("multistep", {"milestones": 3}, {}, "--lr_schedule multistep: "),
        ("exponential", {"gamma": math.inf}, {}, "gamma=inf"),
        ("plateau", {"patienc": 1}, {}, "--lr_schedule plateau: .*patienc.*its arguments are: factor, patience"),
        ("plateau", {"factor": 2.0}, {}, "--lr_schedule plateau: Factor should be < 1.0"),
        ("plateau", {"mode": "max"}, {}, "--lr_schedule plateau: .*mode"),
        ("plateau", None, {"monitor_mode": "most"}, "--lr_schedule plateau: mode most is unknown"),
    ],
)
def test_wrong_schedules_are_one_line(name: str, arguments: Any, given: dict[str, Any], line: str) -> None:
    defaults: dict[str, Any] = {
        "warmup_steps": 0,
        "total_steps": TOTAL,
        "steps_per_epoch": EPOCH,
        "monitor": "val_loss",
    }
    with pytest.raises(MisconfigurationException, match=line) as caught:
        build_schedule(optimizer(), name, arguments, **defaults | given)
    assert "\n" not in str(caught.value)


def test_every_schedule_is_tested() -> None:
    assert set(SCHEDULES) == {*PAIRS, "constant", "plateau"}
