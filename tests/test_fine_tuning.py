"""Fine-tuning: from weights of an earlier run, with parts frozen, on a folder of one's own pictures."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from utils.fine_tuning import freeze, load_pretrained

DIGITS = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}/data/digits.npz"
QUIET = ("--enable_progress_bar", "false")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Digits 0 to 4 of the training split as PNG files, a folder for each."""
    with np.load(DIGITS) as digits:
        images, labels = digits["images"], digits["labels"]
    names = ["zero", "one", "two", "three", "four"]
    for number in np.flatnonzero(labels < 5)[:400]:
        file = tmp_path / "pictures" / names[labels[number]] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = (images[number].astype("float32") * (255 / 16)).astype("uint8")
        Image.fromarray(image).convert("RGB").save(file)
    return tmp_path / "pictures"


def test_a_net_is_fine_tuned_on_ones_own_pictures_from_one_command(
    run: Callable, pictures: Path, tmp_path: Path
) -> None:
    # Learned first: all ten digits, in grey.
    assert run("--max_epochs", "6", *QUIET).metrics["test_acc"] > 0.9
    pretrained = "logs/standard_net/version_0/checkpoints/best.ckpt"
    outcome = run(
        *("--dataset", "folder_data", "--data.root", str(pictures), "--data.size", "8", "--data.grayscale", "true"),
        *("--pretrained", pretrained, "--freeze", "all_but", "classify", "--max_epochs", "10", "--lr", "0.02"),
    )
    assert outcome.code == 0, outcome.err
    assert outcome.metrics["test_acc"] > 0.85
    assert " of them frozen" in outcome.out
    assert f"pretrained: 24 of the net's 26 weights come from {pretrained}; new are classify.3.weight" in outcome.out
    old = torch.load(pretrained, weights_only=True)["state_dict"]
    new = torch.load("logs/standard_net/version_1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    # Frozen parts, running means of norms included, are as they were; the head has five classes and is new.
    assert all(torch.equal(old[name], new[name]) for name in old if "features" in name)
    assert new["net.classify.3.weight"].shape == (5, 64)
    # Once trained, the run stands alone.
    Path(pretrained).unlink()
    assert run("test", "--ckpt_path", "best").metrics["test_acc"] == outcome.metrics["test_acc"]
    assert run("--ckpt_path", "last", "--max_epochs", "11").code == 0
    assert run("predict", "--ckpt_path", "best").code == 0
    with open("logs/standard_net/version_1/predictions.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert {"probability_zero", "probability_four", "class"} <= set(first) and first["class"] in (
        "zero",
        "four",
        "one",
        "two",
        "three",
    )


@pytest.mark.long
def test_a_net_of_torchvision_learns_ones_own_pictures(run: Callable, pictures: Path) -> None:
    words = ("--dataset", "folder_data", "--data.root", str(pictures), "--data.size", "32", "--max_epochs", "6")
    outcome = run(*words, "--model_name", "torchvision_net", "--model.name", "resnet18", "--batch_size", "32", *QUIET)
    assert outcome.code == 0, outcome.err
    assert outcome.metrics["test_acc"] > 0.8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))


def test_weights_that_fit_are_copied_and_the_others_are_named(tmp_path: Path) -> None:
    source = {
        **{name: torch.full_like(value, 7) for name, value in net().state_dict().items()},
        "2.1.bias": torch.ones(5),
    }
    torch.save(source, tmp_path / "w.pth")
    target = net()
    assert load_pretrained(target, str(tmp_path / "w.pth")) == ["2.1.bias"]
    assert bool((target[0].weight == 7).all()) and not bool((target[2][1].bias == 7).any())


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        (["0"], ["1", "2.0", "2.1"]),
        (["2.0", "1"], ["0", "2.1"]),
        (["all_but", "2.1"], ["2.1"]),
        (["all_but", "2", "0"], ["0", "2.0", "2.1"]),
    ],
)
def test_what_is_named_is_frozen(parts: list[str], trained: list[str]) -> None:
    model = net()
    frozen = freeze(model, parts)
    names = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == set(trained)
    assert all(not parameter.requires_grad for part in frozen for parameter in part.parameters())
    assert (model[1] in frozen) == ("1" not in trained)


def test_a_frozen_net_without_a_part_to_train_is_refused_and_leaves_no_doubt(run: Callable) -> None:
    outcome = run("--freeze", "all_but", "head")
    assert outcome.code == 2
    assert outcome.err == "error: --freeze head: the net has no part of that name; it has features, classify\n"


def test_weights_of_another_net_are_refused(run: Callable, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    outcome = run("--pretrained", "other.pth")
    assert outcome.code == 2 and "belongs to another net" in outcome.err


def test_weights_that_could_run_code_are_refused(run: Callable, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "hacked",)

    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pth")
    outcome = run("--pretrained", "hostile.pth")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert not (tmp_path / "hacked").exists()


def test_other_classes_than_those_that_were_learned_are_refused(run: Callable, pictures: Path) -> None:
    words = ("--dataset", "folder_data", "--data.root", str(pictures), "--data.size", "8")
    assert run(*words, "--max_epochs", "1", "--limit_train_batches", "2", *QUIET).code == 0
    (pictures / "zero").rename(pictures / "null")
    outcome = run("test", "--ckpt_path", "best")
    assert outcome.code == 2
    assert "learned the classes four, one, three, two, zero; the data has four, null, one" in outcome.err
