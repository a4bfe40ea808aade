"""The benchmark for GPUs: what of it runs on a CPU, on which it also says that it is of no use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.long

ROWS = {"StandardNet": 12, "a tiny transformer": 6}


@pytest.fixture
def gpu(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    with warnings.catch_warnings():
        yield load("benchmarks/gpu.py")
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    gpu.main()
    assert capsys.readouterr().out == "no GPU: skipped\n"


def test_every_setting_of_both_tasks_is_raced(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--quick"])
    gpu.main()
    shown = capsys.readouterr().out.split("medians of 2 blocks of 2 steps")
    out = "".join(shown)
    assert all(name in out for name in ROWS)
    names = [line.strip().split("  ")[0] for line in out.splitlines() if "≤ 1.03" in line]
    assert len(names) == sum(ROWS.values()) and len({*names[:12]}) == 12 and len({*names[12:]}) == 6
    assert all(line.split()[-1] in "✓✗" for line in out.splitlines() if "≤ 1.03" in line)
    # No waits and no memory, which only a GPU has.
    assert "waits/step" not in out
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("numbers", ["TF32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_both_train_to_the_same_weights(gpu: ModuleType, name: str, numbers: str, monkeypatch: Any) -> None:
    """So that what takes turns does the same work."""
    task, made = gpu.tasks(True)[name], []
    torch.manual_seed(5)
    batches = [task.batch(4) for _ in range(3)]

    def make() -> torch.nn.Module:
        made.append(task.make())
        if name == "resnet":
            for part in made[-1].modules():
                # It would draw other numbers.
                part.p = 0.0
        return made[-1]

    setting = gpu.Setting(numbers, compiled=False, channels_last=name == "resnet")
    race = gpu.Race(task._replace(make=make), setting, torch.device("cpu"), batches, "eager")
    step = race.by_hand()
    for batch in batches:
        step(batch)
    race.by_trainer(torch.utils.data.DataLoader(batches, batch_size=None))
    torch.manual_seed(0)
    mine, theirs, untrained = map(flat, (made[1], made[0], task.make()))
    assert torch.allclose(mine, theirs, atol=1e-5), (mine - theirs).abs().max()
    assert not torch.allclose(mine, untrained, atol=1e-5)


def flat(net: torch.nn.Module) -> torch.Tensor:
    """All weights of a net."""
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_waits_are_counted_after_the_first_steps(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torch says of a wait, twice a step, where a GPU would be."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    task = gpu.tasks(True)["transformer"]
    few = gpu.Few([task.batch(2)])
    race = gpu.Race(task, gpu.Setting("TF32", False, False), torch.device("cpu"), [], "eager")

    def waits(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for _ in range(2 if modes[-1:] == ["warn"] else 0):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return outputs.mean()

    monkeypatch.setattr(gpu, "loss_of", waits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        race.by_trainer(few, logs=True)
    assert modes == ["warn", "default"] and few.syncs == 2 * gpu.WATCHED
