"""Fused and foreach optimizers: where they are taken, that they do the same, and that runs go on with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine.precision import Precision
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from utils.optimizers import build_optimizer

FORMS = ("fused", "foreach")


def made_of(parameter: Tensor) -> nn.Module:
    net = nn.Module()
    net.weights = nn.Parameter(parameter)
    return net


def form(net: nn.Module, name: str = "AdamW", **arguments: Any) -> list[Any]:
    """Of an optimizer, whether it is fused, and foreach."""
    groups = build_optimizer(net, name, 0.01, 0.0, arguments).param_groups
    return [groups[0].get(name) for name in FORMS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_is_fused(name: str, dtype: torch.dtype) -> None:
    assert form(nn.Linear(3, 2, dtype=dtype), name) == [True, None]
    assert form(nn.Conv2d(3, 2, 3, dtype=dtype).to(memory_format=torch.channels_last), name) == [True, None]
    assert form(nn.Linear(3, 2, dtype=dtype), name, amsgrad=True, maximize=True, capturable=False) == [True, None]


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "NAdam", "RMSprop", "Adadelta", "Rprop", "LBFGS"])
def test_others_are_left_to_torch(name: str) -> None:
    net = nn.Linear(3, 2)
    expected = getattr(torch.optim, name)(net.parameters()).param_groups[0]
    assert form(net, name) == [expected.get(form) for form in FORMS]


@pytest.mark.parametrize("given", [{"fused": False}, {"fused": None}, {"fused": True}, {"foreach": True}], ids=str)
def test_arguments_win(given: dict[str, Any]) -> None:
    assert form(nn.Linear(3, 2), "AdamW", **given) == [given.get(name) for name in FORMS]
    assert form(nn.Linear(3, 2), "SGD", **given)[:1] == [given.get("fused")]


@pytest.mark.parametrize(
    "parameter",
    [torch.randn(3, 2, dtype=torch.complex64), torch.randn(6, 4)[:, :2], torch.randn(3, 1).expand(3, 2)],
    ids=["complex", "with gaps", "expanded"],
)
def test_parameters_that_no_kernel_can_take_are_left_to_torch(parameter: Tensor) -> None:
    assert form(made_of(parameter)) == [None, None]


def test_only_what_is_trained_counts() -> None:
    net = nn.ModuleDict({"one": nn.Linear(2, 2, dtype=torch.complex64), "two": nn.Linear(2, 2)})
    assert form(net) == [None, None]
    net.number = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    net["one"].requires_grad_(False)
    assert form(net) == [True, None]


def trained(optimizer: Optimizer, net: nn.Module, steps: int, begin: int = 0) -> Tensor:
    """The weights after steps of which the n-th has the n-th random gradients."""
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def net(channels_last: bool = False) -> nn.Module:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 4))
    return made.to(memory_format=torch.channels_last) if channels_last else made


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_fused_step_is_that_of_torchs_loop(name: str, arguments: dict[str, Any], channels_last: bool) -> None:
    ended = []
    for choice in ({}, {"fused": False}):
        made = net(channels_last)
        ended.append(trained(build_optimizer(made, name, 0.01, 0.1, {**arguments, **choice}), made, 30))
    assert torch.allclose(*ended, atol=1e-5) and not torch.equal(ended[0], trained_not_at_all())


def trained_not_at_all() -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net().parameters()])


@pytest.mark.parametrize("before", [(None, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("after", [(None, False), (False, True)], ids=str)
def test_a_run_goes_on_in_its_own_form(before: tuple[Any, bool], after: tuple[Any, bool]) -> None:
    """Saved and resumed with or without a fused kernel, and with or without channels_last."""
    (fused, channels_last), whole = before, net()
    expected = trained(build_optimizer(whole, "AdamW", 0.01, 0.1), whole, 20)
    first = net(channels_last)
    saved = build_optimizer(first, "AdamW", 0.01, 0.1, {} if fused is None else {"fused": fused})
    trained(saved, first, 10)
    fused, channels_last = after
    second = net(channels_last)
    resumed = build_optimizer(second, "AdamW", 0.01, 0.1, {} if fused is None else {"fused": fused})
    own = copy.deepcopy(resumed.param_groups)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved.state_dict())
    groups = zip(resumed.param_groups, own, strict=True)
    assert all(group[name] == mine[name] for group, mine in groups for name in FORMS)
    assert torch.allclose(trained(resumed, second, 10, begin=10), expected, atol=1e-5)


def test_a_run_in_the_same_form_goes_on_to_the_same_bits() -> None:
    whole, first, second = net(), net(), net()
    expected = trained(build_optimizer(whole, "AdamW", 0.01, 0.1), whole, 20)
    saved, resumed = build_optimizer(first, "AdamW", 0.01, 0.1), build_optimizer(second, "AdamW", 0.01, 0.1)
    trained(saved, first, 10)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert torch.equal(trained(resumed, second, 10, begin=10), expected)


def test_a_state_of_other_groups_is_still_refused() -> None:
    one, two = build_optimizer(net(), "AdamW", 0.01, 0.1), build_optimizer(net(), "AdamW", 0.01, 0.0)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "fused": True}), ("Adam", {"fused": False})],
    ids=str,
)
def test_fp16_clips_true_gradients_and_leaves_overflows_out(name: str, arguments: dict[str, Any]) -> None:
    """Against the same steps without a scale, of which those that overflow are left out."""
    made, plain = net(), net()
    optimizer = build_optimizer(made, name, 0.01, 0.1, arguments)
    expected = build_optimizer(plain, name, 0.01, 0.1, {**arguments, "fused": False})
    precision = Precision("16-mixed", torch.device("cpu"))
    assert precision.scaler is not None
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        scale = float(precision.scaler.scale(torch.ones(())))
        for mine, theirs in zip(made.parameters(), plain.parameters(), strict=True):
            theirs.grad = torch.randn(theirs.shape, generator=generator)
            mine.grad = theirs.grad * scale
        if overflow := step in (0, 5):
            next(made.parameters()).grad[0, 0, 0, 0] = torch.inf
        precision.unscale(optimizer)
        for module in (made, plain):
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        precision.step(optimizer)
        if not overflow:
            expected.step()
    pairs = zip(made.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in pairs)


def test_lightning_clips_the_gradients_of_a_fused_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="fused"):
        plugin.clip_gradients(build_optimizer(net(), "AdamW", 0.01, 0.1), 1.0)
    # As where another file stands for the engine.
    monkeypatch.setattr("utils.acceleration.engine", ModuleType("engine"))
    optimizer = build_optimizer(made := net(), "AdamW", 0.01, 0.1)
    assert optimizer.defaults["fused"] is True
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    plugin.clip_gradients(optimizer, 1.0)
    assert float(torch.cat([p.grad.flatten() for p in made.parameters()]).norm()) == pytest.approx(1.0, abs=1e-3)


@pytest.fixture
def processes() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parameters_that_are_spread_over_processes_are_handled_together(processes: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    ended = []
    for arguments in ({}, {"foreach": False}):
        torch.manual_seed(1)
        made = fully_shard(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), mesh=mesh)
        optimizer = build_optimizer(made, "AdamW", 0.01, 0.1, arguments)
        assert [optimizer.defaults[name] for name in FORMS] == [None, not arguments]
        for _ in range(5):
            made(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
        ended.append(torch.cat([parameter.full_tensor().detach().flatten() for parameter in made.parameters()]))
    assert torch.equal(*ended)


def test_parameters_of_which_only_some_are_spread_are_left_to_torch(processes: None) -> None:
    made = nn.Sequential(fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,))), nn.Linear(2, 2))
    assert form(made) == [None, None]


FEW = ("--max_epochs", "1", "--limit_train_batches", "2", "--model.width", "4")
FEW += ("--enable_progress_bar", "false", "--enable_model_summary", "false")
LAST = "logs/standard_net/{}/checkpoints/last.ckpt"


def fused_in(run_name: str) -> list[Any]:
    """The form of each parameter group in a checkpoint."""
    groups = torch.load(LAST.format(run_name), weights_only=True)["optimizer_states"][0]["param_groups"]
    return [group["fused"] for group in groups]


def test_a_run_is_fused_and_says_nothing_of_it(run: Callable) -> None:
    done = run(*FEW, "--run_name", "one")
    assert done.code == 0 and "fused" not in done.out + done.err
    assert run(*FEW, "--run_name", "two", "--optimizer_args.fused", "false").code == 0
    assert (fused_in("one"), fused_in("two")) == ([True] * 2, [False] * 2)


def test_a_run_from_before_goes_on_fused(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr("utils.optimizers.faster_form", lambda *_: {})
        assert run(*FEW).code == 0
    assert fused_in("version_0") == [None] * 2
    on = run(*FEW, "--ckpt_path", LAST.format("version_0"), "--max_epochs", "2")
    assert on.code == 0, on.err
    assert fused_in("version_0") == [True] * 2
