"""Steps that torch's profiler is not told of: whoever looks at a step still sees it, and weights are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import engine
import pytest
import torch
from torch.autograd.profiler import record_function
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from toy import Net, fit, loader, weights

Made = tuple[Any, Any]
STEPS = 4


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch tells its profiler of optimizers, whether one runs or not."""
    seen = list[str]()
    enter = record_function.__enter__

    def entered(self: record_function) -> record_function:
        seen.append(self.name)
        return enter(self)

    monkeypatch.setattr(record_function, "__enter__", entered)
    return seen


def trained(make: Callable[[Any], Any], during: Callable[[Any, int], None] = lambda optimizer, batch_idx: None) -> Net:
    """A net after `STEPS` steps with what `make` gives for its parameters."""

    class Model(Net):
        def configure_optimizers(self) -> Any:
            return make(self.parameters())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            during(self.trainer.optimizers[0], batch_idx)

    engine.seed_everything(1)
    model = Model()
    fit(model, loader(STEPS * 2))
    return model


def plain(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.1)


def scheduled(optimizer: SGD) -> Made:
    return [optimizer], [{"scheduler": LambdaLR(optimizer, lambda step: 0.5**step), "interval": "step"}]


class OwnStep(SGD):
    """An optimizer of somebody's own; torch wraps its step, too."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


@pytest.mark.parametrize("make", [plain, lambda parameters: scheduled(plain(parameters))], ids=["alone", "scheduled"])
@pytest.mark.filterwarnings("error:.*lr_scheduler.step")
def test_a_plain_step_is_recorded_by_nobody_and_changes_the_same_weights(make: Any, recorded: list[str]) -> None:
    model = trained(make)
    assert recorded == []
    engine.seed_everything(1)
    by_hand = Net()
    made = make(by_hand.parameters())
    optimizer, schedulers = (made, []) if isinstance(made, SGD) else (made[0][0], [made[1][0]["scheduler"]])
    for batch in loader(STEPS * 2):
        optimizer.zero_grad()
        by_hand.loss(batch).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert torch.equal(weights(model), weights(by_hand))


def test_a_scheduler_that_steps_before_the_optimizer_is_still_told_of(recorded: list[str]) -> None:
    class Model(Net):
        def configure_optimizers(self) -> Any:
            return scheduled(plain(self.parameters()))

        def on_train_start(self) -> None:
            with pytest.warns(UserWarning, match="before `optimizer.step"):
                self.lr_schedulers().step()

    fit(Model(), loader(STEPS * 2))
    assert recorded == []


@pytest.fixture
def counted() -> Iterator[list[str]]:
    """Calls of hooks of all optimizers."""
    seen = list[str]()
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    yield seen
    for handle in handles:
        handle.remove()


def test_hooks_of_all_optimizers_run(counted: list[str]) -> None:
    trained(plain)
    assert counted == ["before", "after"] * STEPS


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_runs_from_the_step_on_before_which_it_was_registered(when: str, recorded: list[str]) -> None:
    calls = list[Any]()

    def during(optimizer: SGD, batch_idx: int) -> None:
        if batch_idx == 2:
            getattr(optimizer, f"register_step_{when}_hook")(lambda *_: calls.append(1))

    trained(plain, during)
    assert len(calls) == STEPS - 2 == len(recorded)


def wrapped(optimizer: SGD, calls: list[int]) -> SGD:
    """Its step counted by a function that claims to be what it stands for."""
    step = optimizer.step

    @functools.wraps(step)
    def counting(*args: Any) -> Any:
        calls.append(1)
        return step(*args)

    optimizer.step = counting  # type: ignore[method-assign]
    return optimizer


def posing(optimizer: SGD, calls: list[int]) -> SGD:
    """A function on the instance that claims to be that of its class, as a scheduler's does."""

    @functools.wraps(SGD.step)
    def step(*args: Any) -> Any:
        calls.append(1)
        return SGD.step(optimizer, *args)

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def bound(optimizer: SGD, calls: list[int]) -> SGD:
    """A method put on the instance."""

    def step(self: SGD, closure: Any = None) -> Any:
        calls.append(1)
        return SGD.step(self, closure)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer, calls: wrapped(optimizer, calls),
        lambda optimizer, calls: bound(optimizer, calls),
        lambda optimizer, calls: posing(optimizer, calls),
        # Around what a scheduler has put there, and below it.
        lambda optimizer, calls: ((made := scheduled(optimizer)), wrapped(optimizer, calls), made)[2],
        lambda optimizer, calls: scheduled(bound(optimizer, calls)),
    ],
    ids=["wrapped", "bound", "posing", "around a scheduler", "below a scheduler"],
)
def test_a_step_that_somebody_has_replaced_is_called(make: Any) -> None:
    calls = list[int]()
    trained(lambda parameters: make(plain(parameters), calls))
    assert len(calls) == STEPS


def test_a_step_replaced_while_training_is_called_from_then_on() -> None:
    calls = list[int]()
    trained(plain, lambda optimizer, batch_idx: wrapped(optimizer, calls) if batch_idx == 2 else None)
    assert len(calls) == STEPS - 2


def test_a_step_of_a_class_of_ones_own_is_called_and_may_call_one_that_records(recorded: list[str]) -> None:
    # From now on torch's own class records.
    plain([torch.zeros(1)])
    model = trained(lambda parameters: OwnStep(parameters, lr=0.1))
    optimizer: Any = model.trainer.optimizers[0]
    assert optimizer.steps == STEPS
    assert recorded == ["Optimizer.step#OwnStep.step"] * STEPS


def test_a_step_decorated_once_more_is_called() -> None:
    calls = list[int]()
    plain([torch.zeros(1)])

    class Decorated(SGD):
        @functools.wraps(SGD.step)
        def step(self, closure: Any = None) -> Any:
            calls.append(1)
            return SGD.step(self, closure)

    # torch takes it for one that it has wrapped already.
    assert Decorated.step.hooked  # type: ignore[attr-defined]
    trained(lambda parameters: Decorated(parameters, lr=0.1))
    assert len(calls) == STEPS


class Proxy:
    """Passes for what it stands for in all that one can ask of it, as those of tracing tools do."""

    def __init__(self, wrapped: Any, calls: list[int]) -> None:
        self.wrapped, self.calls = wrapped, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else functools.partial(self, optimizer)

    def __call__(self, *args: Any) -> Any:
        self.calls.append(1)
        return self.wrapped(*args)


def test_a_proxy_of_a_step_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    plain([torch.zeros(1)])
    monkeypatch.setattr(SGD, "step", Proxy(SGD.step, calls))
    trained(plain)
    assert len(calls) == STEPS


@pytest.mark.parametrize("all_threads", [False, True])
def test_a_profiler_that_runs_sees_every_step(all_threads: bool) -> None:
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=all_threads)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=config) as profiler:
        trained(plain)
    [steps] = [event.count for event in profiler.key_averages() if event.key == "Optimizer.step#SGD.step"]
    assert steps == STEPS
