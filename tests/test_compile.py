"""`--compile true`: the same checkpoints, few compilations, and one line where there is no compiler.

Most tests compile for a backend that runs what torch.compile has traced without a compiler of C++: what is traced, how
often, and what a checkpoint holds is the same. One run uses the real one.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

QUIET = ("--enable_progress_bar", "false", "--enable_model_summary", "false")
FEW = ("--max_epochs", "2", "--model.width", "4", "--batch_size", "400", *QUIET)
COMPILED = (*FEW, "--compile", "true")
LAST = "logs/standard_net/{}/checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile without a compiler, and forget what was compiled before."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend="aot_eager"))
    forget()
    yield
    forget()


def forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    """How many times something was compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def weights(run_name: str) -> dict[str, torch.Tensor]:
    return torch.load(LAST.format(run_name), weights_only=True)["state_dict"]


def close(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether weights have the same names, in the same order, and about the same values."""
    return [*first] == [*second] and all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_a_compiled_run_has_the_checkpoints_of_any_other(run: Callable) -> None:
    plain = run(*FEW, "--run_name", "plain")
    assert graphs() == 0
    compiled = run(*COMPILED, "--run_name", "compiled")
    assert compiled.code == 0, compiled.err
    assert graphs() > 0
    assert close(weights("plain"), weights("compiled"))
    assert compiled.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], abs=1e-4)
    # Each of them judges, and goes on with, what the other has trained.
    for other, flag in (("compiled", "false"), ("plain", "true")):
        path, expected = LAST.format(other), {"compiled": compiled, "plain": plain}[other]
        best = path.replace("last", "best")
        for command, name in (("test", "test_loss"), ("validate", "val_loss")):
            forget()
            judged = run(command, "--ckpt_path", best, "--compile", flag)
            assert judged.metrics[name] == pytest.approx(expected.metrics[name], abs=1e-4), judged.err
            assert (graphs() > 0) == (flag == "true")
        assert run("predict", "--ckpt_path", best, "--compile", flag).code == 0
        on = run("--ckpt_path", path, "--compile", flag, "--max_epochs", "3")
        assert on.code == 0, on.err
    assert close(weights("plain"), weights("compiled"))


def test_a_compiled_run_goes_on_to_the_same_bits(run: Callable) -> None:
    words = (*COMPILED, "--lr_schedule", "constant")
    assert run(*words, "--run_name", "whole").code == 0
    assert run(*words, "--run_name", "parts", "--max_epochs", "1").code == 0
    assert run("--ckpt_path", LAST.format("parts"), "--max_epochs", "2").code == 0
    whole, parts = weights("whole"), weights("parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.long
def test_averages_pretrained_weights_and_frozen_parts_are_compiled_with(run: Callable) -> None:
    first = run(*COMPILED, "--ema_decay", "0.5", "--run_name", "averages")
    assert first.code == 0, first.err
    plain = run(*FEW, "--ema_decay", "0.5", "--run_name", "plain")
    assert first.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], abs=1e-4)
    assert close(weights("plain"), weights("averages"))
    start = ("--pretrained", LAST.format("averages"), "--freeze", "features")
    tuned = run(*COMPILED, *start, "--run_name", "tuned")
    assert tuned.code == 0 and "pretrained: 26 of the net's 26 weights" in tuned.out, tuned.err
    before, after = weights("averages"), weights("tuned")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "features" in name}


@pytest.mark.long
def test_smaller_batches_and_evaluation_compile_a_few_times_however_long_a_run(run: Callable) -> None:
    # 1,437 samples: sets of three sizes, none of them a multiple of a batch.
    words = ("--compile", "true", "--model.width", "4", "--batch_size", "100", *QUIET)
    assert run(*words, "--max_epochs", "1").code == 0
    once = graphs()
    # Training and evaluation, each for the first size of a batch and then for any.
    assert 1 < once <= 6
    forget()
    assert run(*words, "--max_epochs", "4").code == 0
    assert graphs() == once
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_model_is_copied_and_pickled(run: Callable) -> None:
    from model import MInterface

    model = MInterface(compile=True, model={"num_classes": 10, "sample_shape": (1, 8, 8), "width": 4})
    model.configure_model()
    model.eval()
    images = torch.randn(5, 1, 8, 8)
    expected = model(images)
    assert graphs() == 1
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(again(images), expected, atol=1e-6)
        assert again.state_dict().keys() == model.state_dict().keys()


def test_whoever_compiles_in_a_module_of_his_own_needs_nothing_else() -> None:
    import engine

    class Own(engine.Module):
        def configure_model(self) -> None:
            torch.manual_seed(3)
            self.net = nn.Linear(3, 1)
            if self.compiles:
                self.net.compile()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ended = []
    for Own.compiles in (False, True):  # noqa: B020
        model = Own()
        options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = engine.Trainer(max_epochs=1, logger=False, accelerator="cpu", **options)
        data = torch.utils.data.TensorDataset(torch.arange(30.0).reshape(10, 3) / 30)
        trainer.fit(model, torch.utils.data.DataLoader(data, 4))
        ended.append(model.state_dict())
    assert graphs() > 0 and close(*ended)


def in_a_process_of_its_own(folder: Path, path: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python main.py` with a PATH, and nothing compiled before."""
    main = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}" / "main.py"
    environment = {**os.environ, "PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    environment.pop("CXX", None)
    command = [sys.executable, str(main), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=590)


@pytest.mark.long
def test_without_a_compiler_one_line_says_so_before_training(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    done = in_a_process_of_its_own(tmp_path, str(tmp_path / "nothing"), *COMPILED)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"--compile true: torch cannot compile the net here \(.*compiler.*\); repair that, or leave", line)
    assert "Traceback" not in done.stderr and not [*tmp_path.glob("logs/*/*")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.long
def test_the_real_compiler_trains_to_the_same_weights(run: Callable, tmp_path: Path) -> None:
    few = (*FEW, "--limit_train_batches", "2", "--limit_val_batches", "1", "--limit_test_batches", "1")
    # Compiled dropout draws other numbers.
    few += ("--max_epochs", "1", "--model.dropout", "0", "--optimizer", "SGD", "--lr", "0.05")
    done = in_a_process_of_its_own(tmp_path, os.environ["PATH"], *few, "--compile", "true", "--run_name", "compiled")
    assert done.returncode == 0, done.stderr
    assert run(*few, "--run_name", "plain").code == 0
    assert close(weights("plain"), weights("compiled"))
