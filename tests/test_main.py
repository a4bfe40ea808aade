"""The commands of a project, as its users type them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

QUICK = ("--max_epochs", "2", "--limit_train_batches", "5", "--log_every_n_steps", "1")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_the_default_run_learns_the_digits_and_leaves_its_folder(run: Callable, tmp_path: Path) -> None:
    outcome = run()
    assert outcome.code == 0
    assert outcome.metrics["test_acc"] >= 0.97
    folder = tmp_path / "logs" / "standard_net" / "version_0"
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert names >= {"config", "environment", "metrics", "checkpoints", "events"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"] == str(torch.__version__)
    for expected in ("test_acc", "logs/standard_net/version_0", "tensorboard --logdir logs", "best.ckpt"):
        assert expected in outcome.out
    assert outcome.out.count("\nepoch ") == 15


def test_every_command_works_from_the_newest_run(run: Callable) -> None:
    trained = run(*QUICK, "--model.width", "8")
    tested = run("test", "--ckpt_path", "best")
    assert tested.metrics["test_acc"] == trained.metrics["test_acc"]
    validated = run("validate", "--ckpt_path", "logs/standard_net/version_0/checkpoints/last.ckpt")
    assert validated.metrics["val_loss"] == trained.metrics["val_loss"]
    assert run("predict", "--ckpt_path", "best").code == 0
    predicted = rows(Path("logs/standard_net/version_0/predictions.csv"))
    assert len(predicted) == 269
    for row in predicted:
        probabilities = [float(row[f"probability_{number}"]) for number in range(10)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert probabilities[int(row["class"])] == max(probabilities)


def test_best_and_last_mean_the_newest_run_of_those_asked_for(run: Callable) -> None:
    run(*QUICK, "--experiment", "first", "--model.width", "4")
    run(*QUICK, "--experiment", "second", "--model.width", "8")
    assert "second/version_0" in run("test", "--ckpt_path", "best").out
    assert "first/version_0" in run("test", "--ckpt_path", "best", "--experiment", "first").out
    run(*QUICK, "--experiment", "second", "--run_name", "named")
    assert "second/version_0" in run("test", "--ckpt_path", "last", "--run_name", "version_0").out


def test_an_interrupted_run_goes_on_to_the_same_bits(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine
    import main

    class Interrupt(engine.Callback):
        def on_train_epoch_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    arguments = ("--max_epochs", "4", "--log_every_n_steps", "5", "--patience", "50")
    whole = run(*arguments, "--run_name", "whole")
    with monkeypatch.context() as patch:
        original = main.callbacks
        patch.setattr(main, "callbacks", lambda *a: [*original(*a), Interrupt()])
        interrupted = run(*arguments, "--run_name", "parts")
    assert interrupted.code == 130
    assert "--ckpt_path last" in interrupted.err
    resumed = run("--ckpt_path", "last")
    assert resumed.metrics == whole.metrics
    folder = Path("logs/standard_net")
    assert {path.name for path in folder.iterdir()} == {"whole", "parts"}
    for name in ("best", "last"):
        expected = weights(folder / "whole" / "checkpoints" / f"{name}.ckpt")
        actual = weights(folder / "parts" / "checkpoints" / f"{name}.ckpt")
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert rows(folder / "parts" / "metrics.csv") == rows(folder / "whole" / "metrics.csv")


def test_a_finished_run_that_is_resumed_trains_no_more(run: Callable) -> None:
    first = run(*QUICK)
    again = run("--ckpt_path", "last")
    assert "epoch " not in again.out
    assert again.metrics["test_loss"] == first.metrics["test_loss"]


def test_the_seed_decides(run: Callable) -> None:
    results = [run(*QUICK, "--seed", seed).metrics["train_loss"] for seed in ("1", "1", "2")]
    assert results[0] == results[1] != results[2]


def test_patience_ends_a_run_early(run: Callable) -> None:
    outcome = run("--max_epochs", "9", "--lr", "1e-9", "--patience", "1", "--limit_train_batches", "1")
    assert outcome.code == 0
    assert 1 < outcome.out.count("\nepoch ") < 9
    assert "EarlyStopping: val_loss" in outcome.out


def test_fast_dev_run_leaves_nothing_behind(run: Callable, tmp_path: Path) -> None:
    outcome = run("--fast_dev_run", "true")
    assert outcome.code == 0 and outcome.metrics["test_loss"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_learns(run: Callable, precision: str) -> None:
    outcome = run("--precision", precision, "--max_epochs", "3", "--gradient_clip_val", "1.0", "--model.width", "16")
    assert outcome.metrics["test_acc"] > 0.8


def test_help_lists_flags_with_their_meaning_in_groups(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run("--help")
    assert outcome.code == 0
    for group in ("run:", "training:", "model:", "net StandardNet:", "data:", "dataset StandardData:"):
        assert f"\n{group}\n" in outcome.out
    text = " ".join(outcome.out.split())
    assert "--model.width N Channels of the first stage; the second has twice as many. [32]" in text
    assert max(map(len, outcome.out.splitlines())) <= 80
    for hidden in ("--callbacks", "--logger ", "--data.split"):
        assert hidden not in outcome.out


WRONG = {
    "unknown net": (
        ["--model_name", "standart_net"],
        "standart_net.*did you mean standard_net.*there are: mlp, standard_net",
    ),
    "unknown dataset": (
        ["--dataset", "mnist"],
        "no dataset of that name; .*there are: csv_data, folder_data, standard_data, torchvision_data",
    ),
    "a path as a name": (["--model_name", "../main"], "no net of that name"),
    "a module as a name": (["--dataset", "os"], "no dataset of that name"),
    "a flag of another command": (
        ["--input", "pictures"],
        "main.py fit --input: that flag is for predict; leave it out",
    ),
    "unknown command": (["tset"], "tset: the commands are fit, .*, export; did you mean test"),
    "unknown flag": (["--max_epoch", "3"], "--max_epoch: .*did you mean --max_epochs"),
    "abbreviated flag": (["--max_ep", "3"], "--max_ep: there is no such argument"),
    "flag of another group": (["--model", "my_net"], "--model: .*did you mean --model_name"),
    "a stray word": (["fit", "now"], "now: there is no such argument"),
    "wrong type": (["--lr", "fast"], "--lr fast: give a number"),
    "wrong type of a net": (["--model.width", "wide"], "--model.width wide: give a whole number"),
    "wrong choice": (["--precision", "8-true"], "--precision 8-true: give 32-true, 16-mixed, bf16-mixed"),
    "no value": (["--lr"], "--lr: expected one argument"),
    "out of range": (["--batch_size", "0"], "batch_size=0"),
    "negative rate": (["--lr", "-1"], "--lr -1"),
    "share over one": (["--limit_train_batches", "1.5"], "limit_train_batches=1.5"),
    "seed out of range": (["--seed", "-1"], "seed=-1 is out of range"),
    "patience of none": (["--patience", "0"], "--patience 0; give a whole number from 1"),
    "saving at no step": (["--save_every_n_steps", "0"], "--save_every_n_steps 0; give a whole number from 1"),
    "an average of old weights only": (["--ema_decay", "1"], "--ema_decay 1.0; give a number from 0 to below 1"),
    "a monitor never logged": (
        [*QUICK, "--monitor", "val_accuracy"],
        "'val_accuracy', which was never logged.*val_acc",
    ),
    "missing config": (["--config", "none.yaml"], "config none.yaml cannot be read: No such file"),
    "config that is no mapping": (["--config", "list.yaml"], "config list.yaml holds no arguments"),
    "config that is no YAML": (["--config", "broken.yaml"], "config broken.yaml cannot be read"),
    "unknown key in a config": (["--config", "key.yaml"], "learning_rate: there is no such argument"),
    "a section that is no mapping": (
        ["--config", "section.yaml"],
        "section.yaml: model is 3; give its arguments by name",
    ),
    "missing checkpoint in a config": (["--config", "ckpt.yaml"], "checkpoint none.ckpt does not exist"),
    "a run name that leads elsewhere": (["--run_name", "../x"], "--run_name '../x': give the name of a folder"),
    "no experiment name": (["--experiment", ""], "--experiment '': give the name of a folder"),
    "patience without validation": (
        ["--patience", "2", "--limit_val_batches", "0"],
        "--patience and --lr_schedule plateau need validation",
    ),
    "a net that torch refuses": (["--model.width", "-3"], "net standard_net: RuntimeError: .*standard_net.py"),
    "code in a config": (["--config", "code.yaml"], "config code.yaml cannot be read"),
    "missing checkpoint": (["test", "--ckpt_path", "none.ckpt"], "checkpoint none.ckpt does not exist"),
    "no run yet": (["test", "--ckpt_path", "best"], "--ckpt_path best: no run has one"),
    "no checkpoint given": (["test"], "test needs --ckpt_path"),
    "log folder beneath a file": (["--log_dir", "list.yaml/logs"], "the folder .* cannot be made"),
    "more GPUs than there are": (["--devices", "999", "--accelerator", "gpu"], "but this machine has .* GPU"),
    "more machines": (
        ["--devices", "4", "--num_nodes", "2"],
        "num_nodes=2, but 1 machine takes part; run on each .*torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend",
    ),
    "no number of restarts": (["--max_restarts", "-1"], "--max_restarts -1; give a whole number from 0"),
    "no such accelerator": (["--accelerator", "tpu"], "--accelerator tpu: give auto, cpu, gpu, cuda"),
    "no set of that name": (["--dataset", "torchvision_data", "--data.name", "Digits"], "name=Digits is no"),
    "a set not there": (["--dataset", "torchvision_data"], "MNIST is not in datasets/.*--data.download true"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gives_one_clear_line_and_code_2(name: str, run: Callable, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- lr\n")
    (tmp_path / "broken.yaml").write_text("lr: {\n")
    (tmp_path / "section.yaml").write_text("model: 3\n")
    (tmp_path / "ckpt.yaml").write_text("ckpt_path: none.ckpt\n")
    (tmp_path / "key.yaml").write_text("learning_rate: 3\n")
    (tmp_path / "code.yaml").write_text("lr: !!python/object/apply:os.system ['touch hacked']\n")
    words, message = WRONG[name]
    outcome = run(*words)
    assert outcome.code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", outcome.err), outcome.err
    assert not (tmp_path / "hacked").exists()
    assert name == "a monitor never logged" or not list(tmp_path.glob("logs/*/*")), "a refused run leaves no folder"


def test_a_damaged_or_foreign_checkpoint_is_refused_with_one_line(run: Callable, tmp_path: Path) -> None:
    run(*QUICK)
    good = Path("logs/standard_net/version_0/checkpoints/best.ckpt").read_bytes()
    middle = len(good) // 2
    cases = {
        "flipped": (good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "is damaged"),
        "short": (good[:middle], "is damaged"),
        "text": (b"hello", "is damaged"),
        "empty": (b"", "is damaged"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        outcome = run("test", "--ckpt_path", f"{name}.ckpt")
        assert outcome.code == 2
        assert re.fullmatch(rf"error: checkpoint {name}.ckpt {message}.*\n", outcome.err), outcome.err


def test_a_checkpoint_cannot_run_code(run: Callable, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path("hacked"),)

    torch.save({"format": 1, "state_dict": Hostile()}, "hostile.ckpt")
    outcome = run("test", "--ckpt_path", "hostile.ckpt")
    assert outcome.code == 2 and "could run code" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "hacked").exists()


def test_a_checkpoint_of_another_net_names_what_differs(run: Callable) -> None:
    run(*QUICK)
    outcome = run("test", "--ckpt_path", "best", "--model.width", "16")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "net.features.0.weight [32, 1, 3, 3] in the file, [16, 1, 3, 3] in the model" in outcome.err


def test_a_run_name_is_taken_once(run: Callable) -> None:
    run(*QUICK, "--run_name", "mine")
    outcome = run(*QUICK, "--run_name", "mine")
    assert outcome.code == 2 and "has a run of that name" in outcome.err


def test_a_refused_resume_leaves_the_run_as_it_was(run: Callable) -> None:
    run(*QUICK)
    config = Path("logs/standard_net/version_0/config.yaml").read_text()
    assert run("--ckpt_path", "last", "--model.width", "16", "--max_epochs", "3").code == 2
    assert Path("logs/standard_net/version_0/config.yaml").read_text() == config
    assert run("test", "--ckpt_path", "best").code == 0


def test_a_config_can_name_the_checkpoint_and_where_it_lies(run: Callable, tmp_path: Path) -> None:
    trained = run(*QUICK, "--log_dir", "elsewhere")
    (tmp_path / "test.yaml").write_text("ckpt_path: best\nlog_dir: elsewhere\n")
    assert run("test", "--config", "test.yaml").metrics["test_loss"] == trained.metrics["test_loss"]


@pytest.mark.parametrize("flag", ["--max_epochs", "--max_steps", "--limit_train_batches"])
def test_training_for_nothing_is_possible(flag: str, run: Callable) -> None:
    assert run(flag, "0").code == 0


def test_without_validation_the_newest_checkpoint_is_the_best(run: Callable) -> None:
    outcome = run(*QUICK, "--limit_val_batches", "0")
    assert outcome.code == 0 and outcome.metrics["test_loss"] > 0
    assert "val_loss" not in outcome.out


def test_a_wrong_monitor_does_not_lose_the_epoch(run: Callable) -> None:
    assert run(*QUICK, "--monitor", "val_accuracy").code == 2
    assert run("--ckpt_path", "last", "--monitor", "val_loss").code == 0


def test_the_monitor_knows_what_is_better(run: Callable) -> None:
    outcome = run("--max_epochs", "4", "--monitor", "val_acc", "--model.width", "8")
    with open("logs/standard_net/version_0/metrics.csv", newline="") as file:
        accuracies = [float(row["val_acc"]) for row in csv.DictReader(file) if row.get("val_acc")]
    # The check before training is not logged.
    assert len(accuracies) == 4 and outcome.metrics["val_acc"] == pytest.approx(max(accuracies))
    unknown = run(*QUICK, "--monitor", "val_dice")
    assert unknown.code == 2 and "--monitor val_dice: it does not tell what is better" in unknown.err


def test_what_main_returns_belongs_to_the_best_checkpoint(run: Callable) -> None:
    words = ("--max_epochs", "6", "--lr", "0.1", "--lr_schedule", "constant", "--limit_train_batches", "4")
    trained = run(*words, "--model.width", "8")
    validated = run("validate", "--ckpt_path", "best")
    assert {name: trained.metrics[name] for name in ("val_loss", "val_acc", "val_f1")} == {
        name: validated.metrics[name] for name in ("val_loss", "val_acc", "val_f1")
    }


def test_predictions_name_their_samples_where_the_data_has_names(run: Callable, tmp_path: Path) -> None:
    lines = [f"{number},{number % 5},{('low', 'high')[number % 2]}" for number in range(60)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,class", *lines]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "table.csv", "--model_name", "mlp")
    assert run(*words, *QUICK).code == 0
    assert run("predict", "--ckpt_path", "best").code == 0
    predicted = rows(Path("logs/mlp/version_0/predictions.csv"))
    assert set(predicted[0]) == {"index", "name", "class", "probability_low", "probability_high"}
    assert all(row["name"].startswith("row ") and row["class"] in ("low", "high") for row in predicted)
