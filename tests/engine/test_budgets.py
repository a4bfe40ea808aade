"""What a training step costs, counted rather than timed: frames, Python calls, kernels, memory, readings of tensors."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import LearningRateMonitor
from engine.optimization import step_unrecorded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from toy import Net, Steps, loader, trainer

ENGINE = str(Path(engine.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
# All default callbacks and the default logger.
DEFAULT = {
    **{"enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True},
    **{"logger": True, "log_every_n_steps": 1_000_000},
}


def test_at_most_6_frames_of_the_engine_lead_to_training_step() -> None:
    stacks = []

    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        frame, names = sys._getframe(), []
        while frame is not None:
            names += [frame.f_code.co_name] if frame.f_code.co_filename.startswith(ENGINE) else []
            frame = frame.f_back  # type: ignore[assignment]
        stacks.append(names[::-1])
        return model.loss(batch)

    trainer(**DEFAULT).fit(Steps(step), loader())
    assert stacks[0][0] == "fit"
    assert all(len(stack) <= 6 for stack in stacks), stacks[0]
    print(f"\nframes from fit to training_step: {len(stacks[0])} ({' > '.join(stacks[0])})")


def per_step(run: Callable[[int], Any]) -> float:
    """Python calls of a step: those from the 40th forward pass of a run to the 80th.

    Within one run, since two differ in what is found in a cache while they set up, such as a regular expression.
    """
    count, passes = 0, list[int]()

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        if event == "call":
            count += 1
            if frame.f_code is Net.forward.__code__:
                passes.append(count)

    run(2)
    gc.collect()
    gc.disable()  # A collection would call finalizers of earlier tests.
    sys.setprofile(profile)
    try:
        run(80)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert len(passes) == 80
    return (passes[79] - passes[39]) / 40


class Plain(Net):
    """The step that the bare loop does, without logging."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)


class Logging(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, prog_bar=True)
        return loss


def bare(steps: int) -> None:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for x, y in loader(steps * 2):
        x, y = x.to("cpu"), y.to("cpu")
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_trainer(model: type[Net], **options: Any) -> Callable[[int], Any]:
    def run(steps: int) -> None:
        trainer(**{**DEFAULT, **options}).fit(model(), loader(steps * 2))

    return run


@pytest.mark.parametrize("model", [Plain, Logging])
def test_a_step_and_its_batch_make_no_more_python_calls_than_in_a_bare_loop(model: type[Net]) -> None:
    """The engine takes a batch of a TensorDataset at once, which makes up for what it does in a step."""
    own, trained = per_step(bare), per_step(with_trainer(model))
    print(f"\nPython calls per step: bare loop {own:.1f}, {model.__name__} {trained:.1f}, more: {trained - own:.1f}")
    assert trained <= own


@pytest.mark.parametrize(("values", "most"), [(0, 12), (1, 14), (10, 32)])
def test_what_is_logged_costs_a_few_calls_each(values: int, most: int) -> None:
    """Beside a loop that reads batches from a list: nothing of torch that the engine spares makes up for its own."""

    class Logs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            for name in range(values):
                self.log(str(name), loss)
            return loss

    def run(steps: int, by_hand: bool) -> None:
        ready: Any = DataLoader([batch for batch in loader(8)] * (steps // 4 + 1), batch_size=None)  # type: ignore[arg-type]
        if not by_hand:
            trainer(**{**DEFAULT, "max_steps": steps, "max_epochs": -1}).fit(Logs(), ready)
            return
        model = Plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _, (x, y) in zip(range(steps), ready.dataset, strict=False):
            loss = torch.nn.functional.mse_loss(model(x), y)
            # As the engine does, so that what torch tells its profiler of both makes up for nothing.
            for parameter in model.parameters():
                parameter.grad = None
            loss.backward()
            step_unrecorded(optimizer)

    more = per_step(lambda steps: run(steps, by_hand=False)) - per_step(lambda steps: run(steps, by_hand=True))
    print(f"\nPython calls a step more than by hand, on batches in memory, {values} values logged: {more:.1f}")
    assert more <= most


def test_callbacks_that_override_nothing_cost_nothing() -> None:
    class Idle(engine.Callback):
        pass

    none = per_step(with_trainer(Plain))
    assert per_step(with_trainer(Plain, callbacks=[Idle() for _ in range(20)])) == pytest.approx(none, abs=0.5)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors do not lie in the CPU's memory, as far as the engine can tell, so that to read one would be to wait."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)


# What a batch is taken from a TensorDataset with, at once.
READING = {"aten.index.Tensor": 2, "aten.lift_fresh.default": 1}
DETACH = "aten.detach.default"


class Kernels(TorchDispatchMode):
    """Counts operations that reach a device's kernels: each may allocate a tensor, and takes a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kernels_per_step(run: Callable[[int], Any]) -> Counter[str]:
    """Operations of one step, by name."""
    counted = []
    for steps in (40, 80):
        with Kernels() as kernels:
            run(steps)
        counted.append(kernels.seen)
    return Counter({name: (count - counted[0][name]) / 40 for name, count in counted[1].items()})


@pytest.mark.usefixtures("elsewhere")
def test_a_step_runs_the_kernels_of_the_bare_loop_and_a_copy_of_what_is_logged() -> None:
    own, trained = kernels_per_step(bare), kernels_per_step(with_trainer(Plain))
    # A view of the loss, which neither computes nor allocates; and reading a batch, which takes fewer than the loop's.
    assert {n: c - own[n] for n, c in trained.items() if c > own[n]} == pytest.approx({**READING, DETACH: 1}, abs=0.1)
    logged = kernels_per_step(with_trainer(Logging))
    more = {n: c - trained[n] for n, c in logged.items() if c != trained[n]}
    assert more == pytest.approx({DETACH: 1, "aten.clone.default": 1}, abs=0.1)


def test_on_the_cpu_what_is_logged_is_read_rather_than_copied() -> None:
    trained = kernels_per_step(with_trainer(Plain, detect_nonfinite="off"))
    logged = kernels_per_step(with_trainer(Logging, detect_nonfinite="off"))
    assert {n: c - trained[n] for n, c in logged.items() if c != trained[n]} == {
        "aten._local_scalar_dense.default": pytest.approx(1, abs=0.1)
    }


def test_steps_leave_nothing_behind_in_memory() -> None:
    held = []

    class Look(engine.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step in (300, 1300):
                gc.collect()
                held.append(sys.getallocatedblocks())

    options = {**DEFAULT, "log_every_n_steps": 50, "max_epochs": 6}
    trainer(**options, callbacks=Look()).fit(Logging(), loader(512))
    # One object for each step would make a thousand.
    assert len(held) == 2 and held[1] - held[0] < 500, held


READS = ["item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"]


class Reads(Counter[str]):
    """Readings of tensors that the engine itself made, by file and line, while `on`."""

    on = True

    def note(self) -> None:
        frame = sys._getframe(2)
        while frame.f_code.co_filename.startswith(TORCH):
            assert frame.f_back is not None
            frame = frame.f_back
        if self.on and frame.f_code.co_filename.startswith(ENGINE):
            self[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1


@contextmanager
def detector() -> Iterator[Reads]:
    """Count every conversion of a tensor to Python numbers whose nearest caller outside torch is the engine."""
    reads = Reads()

    def watched(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(self: Any, *args: Any, **kwargs: Any) -> Any:
            reads.note()
            return original(self, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patched:
        for name in READS:
            patched.setattr(torch.Tensor, name, watched(name))
        yield reads


class Busy(Net):
    """Logs all kinds of values in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.mean.update(loss.detach())
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("number", 1.0, prog_bar=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


class Between(engine.Callback):
    """Lets the detector count from the first batch to the last but one; the epoch's end may read."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        reads.on = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.reads.on = batch_idx < trainer.num_training_batches - 1


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_between_log_steps_no_tensor_becomes_a_number(options: dict[str, Any]) -> None:
    with detector() as reads:
        run = trainer(**{**DEFAULT, **options, "callbacks": [Between(reads), LearningRateMonitor()]})
        run.fit(Busy(), loader(40))
    assert not reads


@pytest.mark.usefixtures("elsewhere")
def test_a_log_step_fetches_values_and_losses_at_once_and_the_detector_sees_it() -> None:
    with detector() as reads:
        run = trainer(**{**DEFAULT, "callbacks": Between(reads), "log_every_n_steps": 5, "logger": False})
        run.fit(Busy(), loader(40))
    # 20 batches, of which the last is not watched: log steps after 5, 10 and 15.
    # One copy brings what was logged, one the losses since, to see that they are finite.
    assert sorted(reads.values()) == [3, 3]


@pytest.mark.parametrize(
    "read", [float, int, bool, [0, 0].__getitem__, *map(methodcaller, ["item", "tolist", "numpy"])]
)
def test_the_detector_sees_every_way_to_read(read: Any) -> None:
    with detector() as reads:
        # Compiled as if it stood in the engine.
        scope: dict[str, Any] = {"read": read, "value": torch.tensor(1)}
        exec(compile("read(value)", f"{ENGINE}/deliberate.py", "exec"), scope)
    assert reads == {"deliberate.py:1": 1}
