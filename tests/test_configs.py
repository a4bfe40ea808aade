"""Configs compose, repeat a run to the last bit, and warn where the surroundings are no longer the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

QUICK = ("--max_epochs", "2", "--limit_train_batches", "4", "--log_every_n_steps", "1", "--model.width", "4")
RUN = Path("logs/standard_net/version_0")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_saved_config_repeats_the_run_bit_for_bit_and_is_silent(run: Callable) -> None:
    first = run(*QUICK, "--run_name", "version_0", "--mixup", "0.3", "--seed", "7")
    again = run("--config", str(RUN / "config.yaml"))
    assert again.code == 0 and again.metrics == first.metrics
    assert again.err == ""
    old, new = weights(RUN), weights(RUN.with_name("version_1"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert (RUN / "config.yaml").read_text() == (RUN.with_name("version_1") / "config.yaml").read_text()


def test_the_config_holds_every_argument_and_the_environment_says_where(run: Callable) -> None:
    run(*QUICK)
    saved = yaml.safe_load((RUN / "config.yaml").read_text())
    assert {"lr", "batch_size", "seed", "max_epochs", "model", "data", "optimizer", "val_fraction"} <= set(saved)
    assert not {"ckpt_path", "config", "run_name", "repeats"} & set(saved)
    environment = json.loads((RUN / "environment.json").read_text())
    assert environment["versions"]["torch"] == str(torch.__version__)
    assert environment["data"]["train/standard_data"].startswith("1259 samples, ")
    assert {"main.py", "model/standard_net.py", "engine/loops.py"} <= set(environment["code"])


@pytest.mark.parametrize("kind", ["versions", "data", "code"])
def test_what_differs_is_named(kind: str, run: Callable) -> None:
    run(*QUICK)
    file = RUN / "environment.json"
    environment = json.loads(file.read_text())
    name = next(iter(environment[kind]))
    environment[kind][name] = "another"
    file.write_text(json.dumps(environment))
    outcome = run("--config", str(RUN / "config.yaml"))
    assert outcome.code == 0
    assert outcome.err.startswith(f"warning: {kind} not as in {RUN}: {name}") and outcome.err.count("\n") == 1


def test_changed_code_and_changed_data_are_noticed(project: Path, run_in_project: Callable) -> None:
    run_in_project(*QUICK)
    net = project / "model/standard_net.py"
    net.write_text(net.read_text() + "# a change\n")
    data = project / "data/standard_data.py"
    data.write_text(data.read_text().replace(".div(16)", ".div(17)"))
    sys.modules.pop("data.standard_data")
    outcome = run_in_project("--config", str(project / RUN / "config.yaml"))
    assert outcome.code == 0
    assert "code not as in" in outcome.err and "data/standard_data.py, model/standard_net.py" in outcome.err
    assert "data not as in" in outcome.err and "train/standard_data" in outcome.err


def test_configs_compose_from_left_to_right_and_flags_win(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 5e-1\nbatch_size: 16\nmax_epochs: 1\nmodel:\n  width: 4\n  dropout: 0.0\n")
    (tmp_path / "b.yaml").write_text("batch_size: 32\nmodel:\n  width: 6\nloss: [CrossEntropyLoss]\n")
    outcome = run("--config", "a.yaml", "--lr", "0.01", "--config", "b.yaml", "--limit_train_batches", "2")
    assert outcome.code == 0
    saved = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())
    assert (saved["lr"], saved["batch_size"], saved["model"]["width"], saved["model"]["dropout"]) == (0.01, 32, 6, 0.0)
    assert saved["loss"] == ["CrossEntropyLoss"]


def test_a_config_can_name_nets_and_several_datasets(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "eval_datasets: [standard_data]\nmodel_name: torchvision_net\nfast_dev_run: true\n"
    )
    assert run("--config", "a.yaml").code == 0
    (tmp_path / "a.yaml").write_text("config: b.yaml\n")
    outcome = run("--config", "a.yaml")
    assert outcome.code == 2 and "names a config" in outcome.err


def test_other_data_at_test_time_keeps_what_was_saved_of_the_same(run: Callable, tmp_path: Path) -> None:
    trained = run(*QUICK, "--data.augment", "false")
    tested = run("test", "--ckpt_path", "best", "--test_datasets", "standard_data")
    assert tested.metrics["test_loss"] == trained.metrics["test_loss"]


@pytest.mark.parametrize("words", [("--lr", "0.5"), ("--seed", "9"), ("--optimizer", "SGD"), ("--weight_decay", "0.5")])
def test_a_resumed_run_refuses_what_it_would_not_heed(words: tuple[str, str], run: Callable) -> None:
    run(*QUICK)
    outcome = run("--ckpt_path", "last", "--max_epochs", "3", *words)
    assert outcome.code == 2
    assert f"{words[0]} {words[1]}: a run goes on with its own" in outcome.err and outcome.err.count("\n") == 1
