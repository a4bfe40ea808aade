"""`--channels_last`, `--matmul_precision` and `--benchmark`: faster on GPUs, with the checkpoints of any other run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from engine import MisconfigurationException
from torch import Tensor, nn
from utils.acceleration import accelerate
from utils.optimizers import build_optimizer

QUIET = ("--enable_progress_bar", "false", "--enable_model_summary", "false")
FEW = ("--max_epochs", "2", "--limit_train_batches", "3", "--model.width", "4", "--model.dropout", "0", *QUIET)
CHANNELS_LAST = (*FEW, "--channels_last", "true")
LAST = "logs/standard_net/{}/checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


def checkpoint(run_name: str) -> dict[str, Any]:
    return torch.load(LAST.format(run_name), weights_only=True)


def weights(run_name: str) -> dict[str, Tensor]:
    return checkpoint(run_name)["state_dict"]


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def of_convolutions(weights: dict[str, Tensor]) -> list[Tensor]:
    """Those that show their memory format: with several channels."""
    chosen = [value for value in weights.values() if value.ndim == 4 and value.shape[1] > 1]
    assert chosen
    return chosen


class Seen(nn.Module):
    """Two convolutions, and what each is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.formats: list[bool] = []

    def forward(self, images: Tensor, others: Any = None) -> Tensor:
        between = self.first(images)
        self.formats += map(is_channels_last, (images, between))
        return self.second(between)


@pytest.mark.parametrize("sharded", [False, True])
def test_inputs_weights_and_what_lies_between_are_channels_last(sharded: bool) -> None:
    images = torch.randn(2, 3, 8, 8)
    plain, net = Seen(), Seen()
    accelerate(net, channels_last=True, compiled=False, sharded=sharded)
    assert torch.allclose(net(images, "others"), plain(images), atol=1e-6)
    assert (net.formats, plain.formats) == ([True, True], [False, False])
    assert is_channels_last(net.first.weight) is not sharded
    assert [*net.state_dict()] == [*plain.state_dict()]


def test_inputs_of_other_shapes_are_left_alone() -> None:
    net = nn.Identity()
    accelerate(net, channels_last=True, compiled=False)
    for shape in ((3,), (2, 3), (2, 3, 4), (2, 3, 4, 5, 6)):
        assert net(values := torch.zeros(shape)) is values


def test_copies_and_pickles_are_channels_last_too() -> None:
    net = nn.Sequential(Seen())
    accelerate(net, channels_last=True, compiled=False)
    images = torch.randn(2, 3, 8, 8)
    expected = net(images)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(images), expected)
        assert again[0].formats[-2:] == [True, True] and is_channels_last(again[0].first.weight)


def test_a_run_has_the_checkpoints_of_any_other(run: Callable) -> None:
    plain, other = run(*FEW, "--run_name", "plain"), run(*CHANNELS_LAST, "--run_name", "last")
    assert other.code == 0, other.err
    for name, expected in (("plain", False), ("last", True)):
        assert {is_channels_last(value) for value in of_convolutions(weights(name))} == {expected}
    assert other.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], abs=1e-4)
    # Each of them judges, and goes on with, what the other has trained.
    for name, flag in (("last", "false"), ("plain", "true")):
        expected = {"last": other, "plain": plain}[name]
        judged = run(
            "test", "--ckpt_path", LAST.format(name).replace("last.ckpt", "best.ckpt"), "--channels_last", flag
        )
        assert judged.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], abs=1e-4)
        on = run("--ckpt_path", LAST.format(name), "--channels_last", flag, "--max_epochs", "3")
        assert on.code == 0, on.err
    one, two = weights("plain"), weights("last")
    assert [*one] == [*two] and all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
    moments = [checkpoint(name)["optimizer_states"][0]["state"] for name in ("plain", "last")]
    for mine, theirs in zip(moments[0].values(), moments[1].values(), strict=True):
        assert torch.allclose(mine["exp_avg"], theirs["exp_avg"], atol=1e-3)


def test_a_run_goes_on_to_the_same_bits(run: Callable) -> None:
    words = (*CHANNELS_LAST, "--lr_schedule", "constant", "--ema_decay", "0.5")
    assert run(*words, "--run_name", "whole").code == 0
    assert run(*words, "--run_name", "parts", "--max_epochs", "1").code == 0
    assert run("--ckpt_path", LAST.format("parts"), "--max_epochs", "2").code == 0
    whole, parts = checkpoint("whole"), checkpoint("parts")
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items()), part


def test_frozen_pretrained_compiled_and_exported(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend="aot_eager"))
    assert run(*FEW, "--run_name", "plain").code == 0
    start = ("--pretrained", LAST.format("plain"), "--freeze", "features", "--compile", "true", "--report", "true")
    tuned = run(*CHANNELS_LAST, *start, "--run_name", "tuned")
    assert tuned.code == 0, tuned.err
    before, after = weights("plain"), weights("tuned")
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if "features" in n}
    path = LAST.format("tuned")
    for words in (("predict",), ("export", "--formats", "torch")):
        done = run(*words, "--ckpt_path", path, "--compile", "false")
        assert done.code == 0, done.err
    exported = torch.export.load("logs/standard_net/tuned/export/model.pt2").module()
    assert not any(map(is_channels_last, of_convolutions(dict(exported.named_parameters()))))


def test_lbfgs_says_in_one_line_that_it_takes_the_usual_format() -> None:
    net = nn.Conv2d(3, 4, 3)
    build_optimizer(net, "LBFGS", 1.0, 0.0)
    accelerate(net, channels_last=True, compiled=False)
    with pytest.raises(MisconfigurationException, match="--optimizer LBFGS .* no --channels_last") as caught:
        build_optimizer(net, "LBFGS", 1.0, 0.0)
    assert "\n" not in str(caught.value)


def test_settings_of_kernels_are_part_of_a_run(run: Callable) -> None:
    """They reach torch, stand in config.yaml, and are as they were when the run is repeated or judged."""
    seen: list[Any] = []
    words = ("--matmul_precision", "high", "--benchmark", "true")
    assert run(*FEW, *words, "--run_name", "one").code == 0
    seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark))
    with open("logs/standard_net/one/config.yaml") as file:
        config = yaml.safe_load(file)
    assert (config["matmul_precision"], config["benchmark"]) == ("high", True)
    assert run(*FEW, "--run_name", "two").code == 0
    # As torch has it, whatever a run before it in this process had.
    assert torch.get_float32_matmul_precision() == "highest"
    for again in (("--config", "logs/standard_net/one/config.yaml"), ("test", "--ckpt_path", LAST.format("one"))):
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.benchmark = False
        assert run(*again).code == 0
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark))
    assert seen == [("high", True)] * 3


def test_a_precision_that_is_none_is_one_line(run: Callable) -> None:
    done = run("--matmul_precision", "tf32")
    assert done.code == 2 and "--matmul_precision tf32: give highest, high, medium" in done.err
