"""Tests that pick up every net in model/ and every dataset in data/: your own are checked without a new line here."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from data import DInterface
from engine import MisconfigurationException
from main import main
from model import MInterface
from utils.registry import build, load_class, names

# What a net or dataset must be given to be tested, by name; {folder} is an empty folder for its files.
ARGUMENTS: dict[str, dict[str, Any]] = {"torchvision_data": {"name": "MNIST", "root": "{folder}"}}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a tiny set in MNIST's own file format, so that torchvision reads it without a download."""
    folder = tmp_path_factory.mktemp("datasets")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        header = struct.pack(">4i", 2051, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.numpy().tobytes())
    return folder


def arguments(name: str, folder: Path) -> dict[str, Any]:
    return {key: str(value).format(folder=folder) for key, value in ARGUMENTS.get(name, {}).items()}


@pytest.mark.parametrize("name", names("data"))
def test_dataset_gives_samples_of_the_shape_and_classes_it_states(name: str, folder: Path) -> None:
    for split in ("train", "val", "test", "predict"):
        dataset = build("data", name, {"split": split, **arguments(name, folder)})
        inputs, targets = default_collate([dataset[index] for index in range(min(8, len(dataset)))])
        assert tuple(inputs.shape[1:]) == tuple(getattr(dataset, "sample_shape", inputs.shape[1:]))
        assert torch.isfinite(inputs).all()
        if hasattr(dataset, "num_classes"):
            assert 0 <= int(targets.min()) and int(targets.max()) < dataset.num_classes


@pytest.mark.parametrize("name", names("data"))
def test_training_runs_on_every_dataset(name: str, folder: Path) -> None:
    flags = [f"--data.{key}={value}" for key, value in arguments(name, folder).items()]
    results = main(["--dataset", name, *flags, "--fast_dev_run", "true", "--batch_size", "4"])
    assert results["test_loss"] > 0


@pytest.mark.parametrize("name", names("model"))
def test_every_parameter_of_a_net_gets_a_gradient(name: str) -> None:
    data = DInterface(batch_size=8)
    data.setup("fit")
    net = build_net(name, data)
    images, labels = next(iter(data.train_dataloader()))
    scores = net(images)
    assert scores.shape == (8, data.num_classes)
    torch.nn.functional.cross_entropy(scores, labels).backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", names("model"))
def test_every_net_trains(name: str, folder: Path) -> None:
    flags = [f"--model.{key}={value}" for key, value in arguments(name, folder).items()]
    assert main(["--model_name", name, *flags, "--fast_dev_run", "true"])["test_loss"] > 0


def build_net(name: str, data: DInterface) -> torch.nn.Module:
    model = MInterface(model_name=name, model=ARGUMENTS.get(name))
    model.hparams["model"] |= {"num_classes": data.num_classes, "sample_shape": data.sample_shape}
    model.configure_model()
    assert model.net is not None
    return model.net


@pytest.mark.parametrize("folder_name", ["model", "data"])
@pytest.mark.parametrize("name", ["../main", "os", "__init__", "model_interface", "torch.nn", "", "no_such"])
def test_only_files_of_the_folder_have_names(folder_name: Any, name: str) -> None:
    with pytest.raises(MisconfigurationException, match="there are: "):
        load_class(folder_name, name)
