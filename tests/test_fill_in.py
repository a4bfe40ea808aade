"""The story of a new user: copy a file, write a class, name it on the command line. Nothing else is edited."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

NET = '''"""A net of one's own."""

from torch import nn


class MyNet(nn.Module):
    """One hidden layer.

    Args:
        width: Features of the hidden layer.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images):
        return self.layers(images)
'''

DATA = '''"""Data of one's own."""

import torch
from torch.utils.data import Dataset


class MyData(Dataset):
    """Points, told apart by the sign of their sum.

    Args:
        size: Number of points in a split.
    """

    num_classes = 2
    sample_shape = (3, 4, 4)

    def __init__(self, split, size: int = 256):
        generator = torch.Generator().manual_seed(["train", "val", "test", "predict"].index(split))
        self.points = torch.randn(size, 3, 4, 4, generator=generator)
        self.labels = (self.points.sum((1, 2, 3)) > 0).long()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index], self.labels[index]
'''

SHORT = ("--max_epochs", "3", "--lr", "0.01")


def test_a_net_of_ones_own(project: Path, run_in_project: Callable) -> None:
    (project / "model" / "my_net.py").write_text(NET)
    text = " ".join(run_in_project("--model_name", "my_net", "--help").out.split())
    assert "net MyNet: --model.width N Features of the hidden layer. [64]" in text
    trained = run_in_project("--model_name", "my_net", "--model.width", "128", *SHORT, "--max_epochs", "5")
    assert trained.metrics["test_acc"] > 0.8
    saved = yaml.safe_load((project / "logs/my_net/version_0/config.yaml").read_text())
    assert saved["model"] == {"width": 128}
    assert run_in_project("test", "--ckpt_path", "best").metrics["test_acc"] == trained.metrics["test_acc"]
    other = run_in_project("test", "--ckpt_path", "best", "--model_name", "standard_net")
    assert other.code == 2
    assert "missing in the file: net.features.0.weight" in other.err
    assert "unknown to the model: net.layers.1.weight" in other.err


def test_a_dataset_of_ones_own(project: Path, run_in_project: Callable) -> None:
    (project / "data" / "my_data.py").write_text(DATA)
    trained = run_in_project("--dataset", "my_data", "--data.size", "512", *SHORT)
    assert trained.metrics["test_acc"] > 0.7
    assert run_in_project("predict", "--ckpt_path", "best").code == 0
    assert len((project / "logs/standard_net/version_0/predictions.csv").read_text().splitlines()) == 513


def test_a_copy_of_the_standard_files_works_under_its_new_name(project: Path, run_in_project: Callable) -> None:
    for folder, old, new in (("model", "StandardNet", "MyNet"), ("data", "StandardData", "MyData")):
        source = (project / folder / f"standard_{new[2:].lower()}.py").read_text()
        (project / folder / f"my_{new[2:].lower()}.py").write_text(source.replace(old, new))
    outcome = run_in_project("--model_name", "my_net", "--dataset", "my_data", "--fast_dev_run", "true")
    assert outcome.code == 0


@pytest.mark.parametrize("class_name", ["MyNet", "MYNET", "MyNET"])
def test_upper_and_lower_case_of_the_class_are_free(class_name: str, project: Path, run_in_project: Callable) -> None:
    (project / "model" / "my_net.py").write_text(NET.replace("MyNet", class_name))
    assert run_in_project("--model_name", "my_net", "--fast_dev_run", "true").code == 0


BROKEN = {
    "no class": (NET.replace("MyNet", "OtherNet"), "model/my_net.py has no class MyNet"),
    "missing package": ("import no_such_package\n" + NET, "cannot be imported: ModuleNotFoundError: .*no_such_package"),
    "syntax error": (NET + "def (:\n", r"cannot be imported: SyntaxError: .*\(my_net.py, line 19\)"),
    "error while importing": ("1 / 0\n" + NET, r"ZeroDivisionError: division by zero \(my_net.py:1\)"),
    "no module of torch": (NET.replace("(nn.Module)", ""), "class MyNet is no torch Module"),
    "leaves Python": ("raise SystemExit(3)\n" + NET, "cannot be imported: SystemExit: 3"),
    "constructor fails": (NET.replace("super()", "1 / 0; super()"), r"ZeroDivisionError: .* \(my_net.py:\d+\)"),
    "an argument that no flag can give": (NET.replace("width: int = 64", "width"), "MyNet needs width, which no flag"),
    "constructor refuses": (NET.replace("super()", "raise ValueError('too big'); super()"), "net my_net: too big"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_says_what_is_wrong_in_one_line(name: str, project: Path, run_in_project: Callable) -> None:
    text, message = BROKEN[name]
    (project / "model" / "my_net.py").write_text(text)
    outcome = run_in_project("--model_name", "my_net")
    assert outcome.code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", outcome.err), outcome.err


def test_a_required_argument_is_asked_for(project: Path, run_in_project: Callable) -> None:
    (project / "model" / "my_net.py").write_text(NET.replace("width: int = 64", "width: int"))
    outcome = run_in_project("--model_name", "my_net")
    assert outcome.code == 2 and "model.width" in outcome.err and outcome.err.count("\n") == 1
    assert run_in_project("--model_name", "my_net", "--model.width", "8", "--fast_dev_run", "true").code == 0


def test_arguments_that_are_classes_or_functions_get_no_flag(project: Path, run_in_project: Callable) -> None:
    text = NET.replace("width: int = 64", "width: int = 64, act: type = nn.ReLU, fn: 'nn.Module | None' = None")
    (project / "model" / "my_net.py").write_text(text)
    assert "--model.act" not in run_in_project("--model_name", "my_net", "--help").out
    refused = run_in_project("--model_name", "my_net", "--model.act", "os.system")
    assert refused.code == 2 and "there is no such argument" in refused.err
    assert run_in_project("--model_name", "my_net", "--fast_dev_run", "true").code == 0


def test_budgets_of_the_files_users_read(project: Path) -> None:
    limits = {"main.py": 120, "data/data_interface.py": 200, "model/model_interface.py": 200}
    for name, limit in limits.items():
        assert len((project / name).read_text().splitlines()) <= limit


def test_a_dataset_that_does_not_tell_its_classes_asks_for_them(project: Path, run_in_project: Callable) -> None:
    (project / "data" / "my_data.py").write_text(
        DATA.replace("num_classes = 2", "").replace("sample_shape =", "shape =")
    )
    outcome = run_in_project("--dataset", "my_data")
    assert outcome.code == 2 and "give its class an attribute of that name, or --model.num_classes" in outcome.err
    flags = ("--model.num_classes", "2", "--model.sample_shape", "[3, 4, 4]", "--fast_dev_run", "true")
    assert run_in_project("--dataset", "my_data", *flags).code == 0


def test_annotations_that_only_type_checkers_import_do_no_harm(project: Path, run_in_project: Callable) -> None:
    header = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
    header += "if TYPE_CHECKING:\n    from collections.abc import Sequence\n"
    text = header + NET.replace("width: int = 64", "width: int = 64, more: Sequence[int] = ()")
    (project / "model" / "my_net.py").write_text(text)
    assert run_in_project("--model_name", "my_net", "--model.width", "8", "--fast_dev_run", "true").code == 0
