"""Every kind of task trains through main.py, improves, and is tested and predicted from its checkpoint."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TINY = ("--max_epochs", "8", "--enable_progress_bar", "false", "--enable_model_summary", "false")

DIGITS = """import torch
from data.standard_data import StandardData


class {name}(StandardData):
    task = "{task}"

    def __init__(self, split):
        super().__init__(split)
        digit = self.targets
        self.targets = {targets}
"""

TEXT = '''import torch
from torch.utils.data import Dataset

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


class Text(Dataset):
    """Pieces of a text; what follows each letter is to be told."""

    task = "sequence"
    letters = sorted(set(TEXT))
    num_classes = len(letters)

    def __init__(self, split):
        codes = torch.tensor([self.letters.index(letter) for letter in TEXT])
        start = {"train": 0, "val": 1200, "test": 1500, "predict": 1500}[split]
        self.codes = codes[start : start + (1200 if split == "train" else 300)]

    def __len__(self):
        return len(self.codes) - 16

    def __getitem__(self, index):
        piece = self.codes[index : index + 17]
        return piece[:-1], piece[1:]
'''

RECURRENT = '''from torch import nn


class Recurrent(nn.Module):
    """Reads letters one after the other."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(num_classes, width), nn.GRU(width, width, batch_first=True)
        self.tell = nn.Linear(width, num_classes)

    def forward(self, codes):
        return self.tell(self.read(self.embed(codes))[0])
'''


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def losses(project: Path, net: str) -> list[float]:
    """Validation loss of every epoch."""
    table = rows(project / "logs" / net / "version_0/metrics.csv")
    return [float(row["val_loss"]) for row in table if row.get("val_loss")]


@pytest.fixture
def tasks(project: Path) -> Path:
    for name, task, targets in (
        ("odd", "binary", "digit % 2"),
        ("bits", "multilabel", "torch.stack([(digit >> bit) % 2 for bit in range(4)], dim=1)"),
        ("size", "regression", "digit / 9.0"),
    ):
        text = DIGITS.format(name=name.capitalize(), task=task, targets=targets)
        extra = "    num_targets = 4\n" if name == "bits" else ""
        (project / "data" / f"{name}.py").write_text(text.replace(f'"{task}"\n', f'"{task}"\n{extra}'))
    (project / "data/text.py").write_text(TEXT)
    (project / "model/recurrent.py").write_text(RECURRENT)
    return project


EXPECTED = {
    "odd": ("standard_net", ["probability"], {"test_acc": 0.9, "test_f1": 0.9, "test_auroc": 0.95}),
    "bits": ("standard_net", [f"probability_{bit}" for bit in range(4)], {"test_acc": 0.85, "test_f1": 0.8}),
    "size": ("standard_net", ["value"], {"test_r2": 0.5}),
    "text": ("recurrent", ["class"], {"test_acc": 0.8}),
}


@pytest.mark.parametrize("dataset", EXPECTED)
def test_a_task_trains_and_improves(dataset: str, tasks: Path, run_in_project: Callable) -> None:
    net, columns, least = EXPECTED[dataset]
    outcome = run_in_project("--dataset", dataset, "--model_name", net, *TINY)
    assert outcome.code == 0, outcome.err
    course = losses(tasks, net)
    assert len(course) == 8 and course[-1] < 0.6 * course[0], course
    for name, value in least.items():
        assert outcome.metrics[name] >= value, outcome.metrics
    tested = run_in_project("test", "--ckpt_path", "best")
    assert tested.metrics["test_loss"] == outcome.metrics["test_loss"]
    assert run_in_project("predict", "--ckpt_path", "best").code == 0
    predictions = rows(tasks / "logs" / net / "version_0/predictions.csv")
    assert set(columns) <= set(predictions[0])
    assert len(predictions) == (284 if dataset == "text" else 269)


def test_a_table_trains_and_improves(run: Callable, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 3, generator=generator)
    values = (10 * inputs[:, 0] - 5 * inputs[:, 1] + 100).tolist()
    lines = [",".join(f"{x:.4f}" for x in [*row, value]) for row, value in zip(inputs.tolist(), values, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c,price", *lines]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "table.csv", "--model_name", "mlp", "--lr", "0.02")
    outcome = run(*words, *TINY, "--max_epochs", "30", "--loss", "SmoothL1Loss")
    assert outcome.code == 0, outcome.err
    course = losses(tmp_path, "mlp")
    assert course[-1] < 0.1 * course[0]
    assert outcome.metrics["test_mae"] < 40


def test_several_losses_are_weighted_and_each_is_logged(run: Callable, tmp_path: Path) -> None:
    words = ("--loss", "CrossEntropyLoss", "MultiMarginLoss", "--loss_weights", "1", "0.5", *TINY, "--max_epochs", "3")
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    found = outcome.metrics
    for stage in ("train", "val", "test"):
        parts = found[f"{stage}_cross_entropy_loss"] + 0.5 * found[f"{stage}_multi_margin_loss"]
        assert found[f"{stage}_loss"] == pytest.approx(parts, rel=1e-4)
    assert rows(tmp_path / "logs/standard_net/version_0/metrics.csv")[0].keys() >= {"train_multi_margin_loss_step"}


SETTINGS = {
    "smoothing": ["--label_smoothing", "0.1"],
    "mixup": ["--mixup", "0.2"],
    "cutmix": ["--cutmix", "1.0"],
    "mixup and cutmix, smoothed": ["--mixup", "0.2", "--cutmix", "1.0", "--label_smoothing", "0.05"],
    "sgd, onecycle": [
        *("--optimizer", "SGD", "--optimizer_args.momentum", "0.9", "--lr", "0.1"),
        *("--lr_schedule", "onecycle", "--lr_schedule_args.pct_start", "0.2"),
    ],
    "steps after a warmup": ["--lr_schedule", "step", "--lr_schedule_args.step_size", "3", "--warmup_steps", "20"],
    "multistep": ["--lr_schedule", "multistep", "--lr_schedule_args", "{milestones: [4, 6], gamma: 0.3}"],
    "exponential": ["--lr_schedule", "exponential", "--lr_schedule_args.gamma", "0.8"],
    "plateau": ["--lr_schedule", "plateau", "--lr_schedule_args", "{patience: 0, factor: 0.3}", "--warmup_steps", "5"],
    "constant": ["--lr_schedule", "constant"],
    "loss with arguments": ["--loss", "CrossEntropyLoss", "--loss_args", "{reduction: sum}", "--lr", "0.001"],
    "scaled parts": ["--lr_scales", "{features: 0.5, classify: 2}", "--weight_decay", "0.1"],
}


SLOW = ("multistep", "exponential", "plateau", "constant", "loss with arguments", "scaled parts")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in SLOW else ()) for n in SETTINGS])
def test_a_setting_trains_the_digits(name: str, run: Callable) -> None:
    outcome = run(*SETTINGS[name], *TINY)
    assert outcome.code == 0, outcome.err
    assert outcome.metrics["test_acc"] > 0.9


def test_metrics_by_name_and_of_ones_own(run: Callable) -> None:
    words = ("--metrics", "acc", "AUROC", "WorstClassAccuracy", "--metric_args", "{AUROC: {average: weighted}}")
    outcome = run(*words, *TINY, "--max_epochs", "3")
    assert outcome.code == 0, outcome.err
    found = outcome.metrics
    assert 0 <= found["test_worst_class_accuracy"] <= found["test_acc"] <= 1 and found["test_auroc"] > 0.9
    assert "test_f1" not in found


def test_label_smoothing_and_mixing_leave_validation_alone(run: Callable) -> None:
    words = ("--max_epochs", "1", "--lr", "1e-12", "--limit_train_batches", "1")
    plain = run(*words).metrics["val_loss"]
    assert run(*words, "--label_smoothing", "0.5", "--mixup", "1").metrics["val_loss"] == pytest.approx(plain, rel=1e-3)


WRONG = {
    "unknown loss": (["--loss", "CrossEntropy"], "--loss CrossEntropy.*CrossEntropyLoss"),
    "a layer as a loss": (["--loss", "Linear"], "--loss Linear"),
    "unknown argument of a loss": (["--loss_args.smoothing", "0.1"], "smoothing.*label_smoothing"),
    "weights without losses": (["--loss_weights", "1", "2"], "loss_weights"),
    "unknown optimizer": (["--optimizer", "Adamw"], "--optimizer Adamw.*AdamW"),
    "unknown argument of an optimizer": (["--optimizer_args.momentun", "0.9", "--optimizer", "SGD"], "momentun"),
    "an optimizer without decay": (["--optimizer", "Rprop"], "--weight_decay 0"),
    "LBFGS with decay": (["--optimizer", "LBFGS"], "--optimizer LBFGS .* --weight_decay 0"),
    "unknown argument of a schedule": (["--lr_schedule_args.step", "3", "--lr_schedule", "step"], "step"),
    "a schedule without what it needs": (["--lr_schedule", "multistep"], "milestones"),
    "warmup of more than all": (["--warmup_steps", "100000"], "warmup_steps"),
    "warmup below 0": (["--warmup_steps", "-1"], "warmup_steps"),
    "cosine without an end": (["--max_epochs", "-1"], "--lr_schedule constant"),
    "a rate that is no number": (["--lr", ".nan"], "lr"),
    "infinite decay": (["--weight_decay", ".inf"], "weight_decay"),
    "a part that is not there": (["--lr_scales", "{feature: 0.1}"], "feature.*features"),
    "unknown metric": (["--metrics", "accurracy"], "--metrics accurracy"),
    "a metric of many numbers": (["--metrics", "ConfusionMatrix"], "ConfusionMatrix.*not one number"),
    "a metric of another task": (["--metrics", "R2Score"], "R2Score"),
    "mixup out of range": (["--mixup", "-1"], "mixup=-1"),
    "smoothing of everything": (["--label_smoothing", "1"], "label_smoothing=1"),
    "smoothing of a regression": (["--task", "regression", "--label_smoothing", "0.1"], "label_smoothing=0.1 needs"),
    "an unknown task": (["--task", "ranking"], "--task ranking: give multiclass, binary"),
    "the wrong task": (["--task", "sequence"], "task sequence"),
    "a part to freeze that is not there": (["--freeze", "body"], "--freeze body.*features, classify"),
    "nothing to train": (["--freeze", "features", "classify"], "nothing is left to train"),
    "weights that are not there": (["--pretrained", "none.ckpt"], "--pretrained none.ckpt: there is no such file"),
    "weights of another kind": (["--pretrained", "text.ckpt"], "text.ckpt cannot be read as weights"),
    "a name with dots": (["--loss", "modules.CrossEntropyLoss"], "modules.CrossEntropyLoss"),
    "a private name": (["--optimizer", "_functional"], "_functional"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_trained_gives_one_line(name: str, run: Callable, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("hello")
    words, message = WRONG[name]
    outcome = run(*words, "--max_epochs", "1") if "--max_epochs" not in words else run(*words)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err


def test_prices_are_learned_as_well_as_shares(run: Callable, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(500, 2, generator=generator)
    prices = (2e5 * inputs[:, 0] + 1e5 * inputs[:, 1] + 2e5).tolist()
    lines = [
        f"{100 * a:.2f},{2000 + 20 * b:.0f},{price:.0f}" for (a, b), price in zip(inputs.tolist(), prices, strict=True)
    ]
    (tmp_path / "houses.csv").write_text("\n".join(["size,year,price", *lines]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "houses.csv", "--model_name", "mlp", "--monitor", "val_mae")
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.metrics["test_r2"] > 0.8 and outcome.metrics["test_mae"] < 40_000
    # Loss in deviations, metrics and predictions in the units of the table.
    assert outcome.metrics["test_loss"] < 1
    assert run("test", "--ckpt_path", "best").metrics["test_mae"] == outcome.metrics["test_mae"]
    assert run("predict", "--ckpt_path", "best").code == 0
    values = [float(row["value"]) for row in rows(tmp_path / "logs/mlp/version_0/predictions.csv")]
    assert 1e5 < min(values) < max(values) < 6e5


@pytest.mark.parametrize(
    ("loss", "message"), [("NLLLoss", "give CrossEntropyLoss"), ("MSELoss", "they need one shape")]
)
def test_a_loss_that_would_train_nonsense_is_refused(loss: str, message: str, run: Callable) -> None:
    outcome = run("--loss", loss, "--batch_size", "10")
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("targets", "count"), [("digit[:, None] / 9.0", 1), ("torch.stack([digit / 9.0, digit + 2000.0], 1)", 2)]
)
def test_targets_in_columns_are_scaled_and_come_back(
    targets: str, count: int, project: Path, run_in_project: Callable
) -> None:
    text = DIGITS.format(name="Columns", task="regression", targets=targets)
    (project / "data/columns.py").write_text(
        text.replace('"regression"\n', f'"regression"\n    num_targets = {count}\n')
    )
    words = ("--dataset", "columns", "--max_epochs", "2", "--precision", "bf16-mixed", "--metrics", "mae")
    trained = run_in_project(*words)
    assert trained.code == 0, trained.err
    assert run_in_project("test", "--ckpt_path", "best").metrics["test_mae"] == trained.metrics["test_mae"]
    assert trained.metrics["test_mae"] < 3
    from model import MInterface

    MInterface.load_from_checkpoint("logs/standard_net/version_0/checkpoints/best.ckpt")
