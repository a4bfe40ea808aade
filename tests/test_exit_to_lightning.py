"""A generated project trains under Lightning, once the file in docs/coming-from-lightning.md stands for its engine."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
QUIET = ("--enable_progress_bar", "false", "--enable_model_summary", "false", "--log_every_n_steps", "1")
FIT = ("--max_epochs", "3", *QUIET)
FEW = ("--max_epochs", "1", "--limit_train_batches", "2", "--model.width", "4", "--report", "false", *QUIET)
SETS = ("--val_datasets", "standard_data", "dim", "--test_datasets", "standard_data", "dim")

# One fresh process for these, because every start imports torch and Lightning.
COMMANDS: dict[str, tuple[str, ...]] = {
    "go on with a run that was not tested": (*FIT, "--ckpt_path", "auto"),
    "go on with a finished run": (*FIT, "--ckpt_path", "auto"),
    "test": ("test", "--ckpt_path", "best"),
    "validate": ("validate", "--ckpt_path", "last"),
    "predict": ("predict", "--ckpt_path", "best"),
    "predict an array": ("predict", "--ckpt_path", "best", "--input", "digits.npy", "--output", "array.csv"),
    "report": ("report", "--ckpt_path", "best"),
    "export": ("export", "--ckpt_path", "best", "--output", "exported"),
    "find_lr": ("--find_lr", *QUIET),
    "find_batch_size": ("--find_batch_size", *QUIET),
    "test ours": ("test", "--ckpt_path", "logs/standard_net/ours/checkpoints/best.ckpt"),
    "train on": ("--ckpt_path", "last", "--max_epochs", "4"),
    "auto without a run": (*FEW, "--ckpt_path", "auto", "--run_name", "job"),
    "few": (*FEW, "--run_name", "few"),
    "repeat": ("--config", "logs/standard_net/few/config.yaml", "--run_name", "repeated"),
    "patience": (*FEW, "--max_epochs", "9", "--lr", "1e-9", "--patience", "1", "--run_name", "patient"),
    "folds": (*FEW, "--num_folds", "2", "--fold", "all", "--run_name", "folds"),
    "sets": (*FEW, *SETS, "--monitor", "val_acc/dataloader_idx_1", "--run_name", "sets"),
    "predict sets": ("predict", "--ckpt_path", "best", "--run_name", "sets"),
    "averages": (*FEW, "--max_epochs", "2", "--ema_decay", "0.5", "--run_name", "averages"),
    "test averages": ("test", "--ckpt_path", "best", "--run_name", "averages"),
    "schedule": (*FEW, "--max_epochs", "2", "--lr_schedule", "step", "--lr_schedule_args.step_size", "1"),
    "plateau": (*FEW, "--lr_schedule", "plateau", "--warmup_steps", "1"),
    "training": (*FEW, "--accumulate_grad_batches", "2", "--gradient_clip_val", "1", "--precision", "bf16-mixed"),
    "batches": (*FEW, "--mixup", "0.2", "--label_smoothing", "0.1", "--balanced_sampling", "true"),
    "LBFGS": (*FEW, "--optimizer", "LBFGS", "--weight_decay", "0", "--lr", "0.5", "--devices", "1"),
    "steps": (*FEW, "--limit_train_batches", "3", "--save_every_n_steps", "2", "--run_name", "steps"),
    "blind": (*FEW, "--limit_val_batches", "0", "--run_name", "blind"),
    "pretrained": (*FEW, "--pretrained", "logs/standard_net/few/checkpoints/last.ckpt", "--freeze", "features"),
    "compiled": (*FEW, "--compile", "true", "--run_name", "compiled"),
    "test compiled": ("test", "--ckpt_path", "logs/standard_net/compiled/checkpoints/best.ckpt", "--compile", "false"),
    "dev run": ("--fast_dev_run", "true", "--log_dir", "nowhere", *QUIET),
    "help": ("--help",),
}
WRONG = {
    "type": (("--lr", "fast"), "--lr fast: give a number"),
    "flag": (("--max_epoch", "3"), "--max_epoch: there is no such argument; did you mean --max_epochs"),
    "flag of our engine": (("--detect_nonfinite", "warn"), "--detect_nonfinite: there is no such argument"),
    "command": (("tset",), "the commands are fit, validate, test, report, predict, export; did you mean test"),
    "restarts": (("--max_restarts", "1"), "--max_restarts needs the bundled engine"),
    "net": (("--model_name", "standart_net"), "did you mean standard_net"),
    "choice": (("--precision", "8-true"), "--precision 8-true: give "),
    "checkpoint": (("test", "--ckpt_path", "none.ckpt"), "checkpoint none.ckpt does not exist"),
    "patience": (("--patience", "0"), "--patience 0"),
    "range": (("--limit_train_batches", "1.5", *QUIET), "limit_train_batches"),
    "epochs": (("--max_epochs", "-3", *QUIET), "max_epochs"),
    "monitor": ((*FEW, "--monitor", "val_mae"), "could not find the monitored key .*val_acc"),
    "schedule": ((*FEW, "--warmup_steps", "9"), "--warmup_steps 9: give a number from 0 that is less than"),
}
SESSION = """
import contextlib, io, json, sys, traceback
import engine, main, torch

# Traced as always, but for a backend that needs no compiler of C++.
compiles = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compiles(self, backend="aot_eager")
assert engine.Trainer.__module__.startswith("pytorch_lightning")
outcomes = {}
for name, words in json.loads(sys.argv[1]).items():
    out, err, code, metrics = io.StringIO(), io.StringIO(), 0, {}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            metrics = main.main(words)
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    outcomes[name] = [code, metrics, out.getvalue(), err.getvalue()]
print(json.dumps(outcomes))
"""
DIM = '''"""Every second digit, with noise."""
import torch
from data.standard_data import StandardData


class Dim(StandardData):
    """Every second digit, with noise."""

    def __init__(self, split) -> None:
        super().__init__(split)
        self.images, self.targets = self.images[::2], self.targets[::2]

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + 0.5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(index)), label
'''


class Outcome(NamedTuple):
    """What a command left behind: its exit code or traceback, metrics, and both output streams."""

    code: int | str
    metrics: dict[str, float]
    out: str
    err: str


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def last(table: list[dict[str, str]], name: str) -> float:
    return [float(row[name]) for row in table if row.get(name)][-1]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def run_main(project: Path, *words: str) -> str:
    """What `python main.py` prints in a fresh process."""
    done = subprocess.run([sys.executable, "main.py", *words], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundled(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated project with its own engine, after a run called ours."""
    project = generate(tmp_path_factory.mktemp("bundled"), project_name="Way out")
    run_main(project, *FEW, "--limit_train_batches", "9", "--run_name", "ours")
    return project


@pytest.fixture(scope="module")
def project(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same project with Lightning for an engine; nothing else is changed, and one dataset added."""
    project = tmp_path_factory.mktemp("exit") / "project"
    shutil.copytree(bundled, project)
    text = (ROOT / "docs" / "coming-from-lightning.md").read_text(encoding="utf-8")
    (shim,) = re.findall(r'```python\n(""".*?)```', text, re.DOTALL)
    assert len(shim.splitlines()) <= 12
    shutil.rmtree(project / "engine")
    (project / "engine").mkdir()
    (project / "engine" / "__init__.py").write_text(shim, encoding="utf-8")
    (project / "data" / "dim.py").write_text(DIM, encoding="utf-8")
    with np.load(project / "data" / "digits.npz") as digits:
        test = digits["images"][digits["split"] == 2]
    np.save(project / "digits.npy", (test / 16).astype(np.float32)[:, None])
    return project


@pytest.fixture(scope="module")
def trained(project: Path) -> dict[str, Any]:
    """What `python main.py` logged, wrote and printed."""
    out = run_main(project, *FIT)
    folder = project / "logs" / "standard_net" / "version_0"
    found = {"out": out, "config": (folder / "config.yaml").read_text(), "rows": rows(folder / "metrics.csv")}
    found["files"] = {path.name.split(".")[0] for path in folder.iterdir()}
    found["checkpoints"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    # As if it had been killed before the test.
    environment = json.loads((folder / "environment.json").read_text())
    assert environment.pop("finished") is True
    (folder / "environment.json").write_text(json.dumps(environment))
    return found


@pytest.fixture(scope="module")
def outcomes(project: Path, trained: dict[str, Any]) -> dict[str, Outcome]:
    """What the commands did."""
    words = json.dumps(COMMANDS | {f"wrong {name}": given for name, (given, _) in WRONG.items()})
    done = subprocess.run([sys.executable, "-c", SESSION, words], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: Outcome(*outcome) for name, outcome in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def logs(project: Path, outcomes: dict[str, Outcome]) -> Path:
    """The folder of all runs, after them."""
    return project / "logs" / "standard_net"


def test_a_project_trains_to_its_score_and_leaves_its_folder(trained: dict[str, Any]) -> None:
    assert last(trained["rows"], "test_acc") >= 0.95
    assert last(trained["rows"], "val_acc") >= 0.95
    assert trained["files"] >= {"config", "environment", "metrics", "events", "checkpoints", "report"}
    assert trained["checkpoints"] == ["best.ckpt", "last.ckpt"]
    for expected in ("logs/standard_net/version_0/checkpoints/best.ckpt", "tensorboard --logdir logs"):
        assert expected in trained["out"]


@pytest.mark.long
def test_two_processes_are_started(project: Path, trained: dict[str, Any]) -> None:
    # Elsewhere: "best" means the newest run's.
    words = (*FEW, "--devices", "2", "--accelerator", "cpu", "--log_dir", "others", "--run_name", "two")
    words = (*words, "--report", "true")
    command = [sys.executable, "main.py", *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and "Starting with 2 processes" in done.stderr, done.stderr
    assert done.stdout.count("others/standard_net/two/checkpoints/best.ckpt") == 1
    # Lightning repeats a sample to share 269 out evenly; it counts once.
    page = (project / "others/standard_net/two/report/report.html").read_text(encoding="utf-8")
    assert re.search(r"of 269 are wrong", page)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_works(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name].code == 0, outcomes[name].err


def test_validate_test_and_predict_give_what_fit_gave(
    trained: dict[str, Any], outcomes: dict[str, Outcome], logs: Path, project: Path
) -> None:
    tested = outcomes["test"].metrics["test_acc"]
    assert tested == pytest.approx(last(trained["rows"], "test_acc"))
    assert outcomes["validate"].metrics["val_loss"] == pytest.approx(last(trained["rows"], "val_loss"))
    predicted = rows(logs / "version_0" / "predictions.csv")
    assert len(predicted) == 269
    with np.load(project / "data" / "digits.npz") as digits:
        labels = digits["labels"][digits["split"] == 2]
    right = [int(row["class"]) == label for row, label in zip(predicted, labels, strict=True)]
    assert sum(right) / 269 == pytest.approx(tested)
    # The same images as an array of one's own; the report, of the run that went on, says how many were wrong then.
    assert [row["class"] for row in rows(project / "array.csv")] == [row["class"] for row in predicted]
    page = (logs / "version_0" / "report" / "report.html").read_text(encoding="utf-8")
    wrong = 269 - round(269 * last(rows(logs / "version_0" / "metrics.csv"), "test_acc"))
    assert f"{wrong} of 269 are wrong" in page and page.count("<img") == 9
    assert sorted(path.name for path in (project / "exported").iterdir()) == ["model.onnx", "model.pt2"]


def test_auto_goes_on_and_leaves_finished_runs_alone(
    trained: dict[str, Any], outcomes: dict[str, Outcome], logs: Path
) -> None:
    first, again = outcomes["go on with a run that was not tested"], outcomes["go on with a finished run"]
    assert "going on with logs/standard_net/version_0" in first.out
    assert first.metrics["test_acc"] == pytest.approx(last(trained["rows"], "test_acc"))
    assert again.out == "logs/standard_net/version_0 is finished; nothing to do\n"
    assert "going on" not in outcomes["auto without a run"].out and (logs / "job" / "metrics.csv").is_file()


def test_last_trains_on_in_the_same_folder(outcomes: dict[str, Outcome], logs: Path) -> None:
    table = rows(logs / "version_0" / "metrics.csv")
    assert {row["epoch"] for row in table if row["train_loss_epoch"]} == {"3"}
    assert sorted(path.name for path in (logs / "version_0" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    saved = torch.load(logs / "version_0" / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["epoch"] == 3 and saved["global_step"] == 80
    assert last(table, "test_acc") >= 0.95


def test_a_saved_config_repeats_a_run_bit_for_bit(outcomes: dict[str, Outcome], logs: Path) -> None:
    assert outcomes["repeat"].metrics == outcomes["few"].metrics
    first, again = (weights(logs / name / "checkpoints" / "last.ckpt") for name in ("few", "repeated"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert "results may differ" not in outcomes["repeat"].err


def test_each_trainer_judges_what_the_other_has_trained(
    bundled: Path, outcomes: dict[str, Outcome], logs: Path
) -> None:
    table, judged = rows(bundled / "logs" / "standard_net" / "ours" / "metrics.csv"), outcomes["test ours"].metrics
    assert all(judged[name] == pytest.approx(last(table, name), rel=1e-4) for name in ("test_acc", "test_loss"))
    assert "there is no detect_nonfinite, async_save any more" in outcomes["test ours"].err
    shutil.copytree(logs / "version_0", bundled / "logs" / "standard_net" / "theirs")
    printed = run_main(bundled, "test", "--ckpt_path", "logs/standard_net/theirs/checkpoints/best.ckpt")
    for name in ("test_acc", "test_loss"):
        assert re.search(rf"{name} +{last(rows(logs / 'version_0' / 'metrics.csv'), name):.4f}", printed), printed


def test_patience_ends_a_run(logs: Path) -> None:
    assert 2 <= len([row for row in rows(logs / "patient" / "metrics.csv") if row["val_loss"]]) < 9


def test_folds_are_summarized(outcomes: dict[str, Outcome], logs: Path) -> None:
    table = {row["fold"]: row for row in rows(logs / "folds" / "folds.csv")}
    assert list(table) == ["0", "1", "mean", "std"]
    mean = (float(table["0"]["val_loss"]) + float(table["1"]["val_loss"])) / 2
    assert float(table["mean"]["val_loss"]) == pytest.approx(mean)
    assert outcomes["folds"].metrics["val_loss"] == pytest.approx(mean)


def test_several_sets_have_lightnings_names(outcomes: dict[str, Outcome], logs: Path) -> None:
    metrics = outcomes["sets"].metrics
    assert {"val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1", "test_f1/dataloader_idx_1"} <= metrics.keys()
    assert "val_acc" not in metrics
    assert metrics["val_loss/dataloader_idx_0"] != metrics["val_loss/dataloader_idx_1"]
    predicted = rows(logs / "sets" / "predictions.csv")
    assert [row["dataset"] for row in predicted] == ["standard_data"] * 269 + ["dim"] * 135


def test_the_averages_of_the_weights_are_tested(outcomes: dict[str, Outcome], logs: Path) -> None:
    assert outcomes["test averages"].metrics["test_loss"] == outcomes["averages"].metrics["test_loss"]
    saved = torch.load(logs / "averages" / "checkpoints" / "last.ckpt", weights_only=True)
    newest = saved["current_model_state"]
    assert any(not torch.equal(newest[name], value) for name, value in saved["state_dict"].items())


def test_a_compiled_run_has_the_weights_of_any_other(outcomes: dict[str, Outcome], logs: Path) -> None:
    plain, compiled = (weights(logs / name / "checkpoints" / "last.ckpt") for name in ("few", "compiled"))
    assert [*plain] == [*compiled]
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-4) for name in plain)
    expected = pytest.approx(outcomes["compiled"].metrics["test_loss"], abs=1e-4)
    assert outcomes["test compiled"].metrics["test_loss"] == expected


def test_runs_keep_the_names_of_their_checkpoints(logs: Path) -> None:
    assert sorted(path.name for path in (logs / "steps" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert sorted(path.name for path in (logs / "blind" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_schedules_know_the_steps_of_an_epoch(logs: Path) -> None:
    (run,) = [path.parent for path in logs.glob("*/config.yaml") if "lr_schedule: step\n" in path.read_text()]
    rates = [float(row["lr-AdamW/pg1"]) for row in rows(run / "metrics.csv") if row["lr-AdamW/pg1"]]
    assert rates == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4])


def test_a_dev_run_leaves_nothing_and_help_has_lightnings_flags(project: Path, outcomes: dict[str, Outcome]) -> None:
    assert not (project / "nowhere").exists()
    for flag in ("--max_epochs", "--val_check_interval", "--model.width", "--data.augment", "--lr"):
        assert f" {flag} " in outcomes["help"].out
    assert "--callbacks" not in outcomes["help"].out and "--plugins" not in outcomes["help"].out


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gives_code_2_and_one_line(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[f"wrong {name}"]
    assert outcome.code == 2
    line = next(line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert re.search(WRONG[name][1], line), line


def test_refused_runs_leave_no_folder(logs: Path) -> None:
    begun = [path.parent for path in logs.glob("*/environment.json")]
    assert sorted(logs.iterdir()) == sorted(
        [*begun, logs / "folds", logs / "find_lr.png", logs / "find_batch_size.png"]
    )
