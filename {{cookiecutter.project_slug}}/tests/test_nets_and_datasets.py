"""Tests that pick up every net in model/ and every dataset in data/: your own are checked without a new line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

import engine
from data import DInterface
from main import main
from model import MInterface
from tests.examples import FLAGS, write_files
from utils.arguments import constructor_arguments, parse
from utils.losses import align
from utils.registry import load_class, names
from utils.samples import per_sample

NETS, SETS = names("model"), names("data")
QUICK = ["--batch_size", "8", "--max_epochs", "1", "--limit_train_batches", "3", "--log_every_n_steps", "1"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that flags name."""
    folder = tmp_path_factory.mktemp("datasets")
    write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave their folders in an empty one."""
    monkeypatch.chdir(tmp_path)


def words_for(flag: str, name: str, folder: Path) -> list[str]:
    """The words of the command line that choose a net or a dataset, and what else it needs."""
    return [flag, name, *(word.format(folder=folder) for word in FLAGS.get(name, []))]


def built(words: list[str]) -> tuple[MInterface, DInterface]:
    """Model and data, after one batch of each kind."""
    _, arguments = parse([*words, "--batch_size", "8", "--enable_progress_bar", "false"], (DInterface, MInterface))
    data = DInterface(**constructor_arguments(DInterface, arguments))
    model = MInterface(**constructor_arguments(MInterface, arguments))
    engine.Trainer(fast_dev_run=True, accelerator="cpu", enable_model_summary=False).fit(model, datamodule=data)
    return model, data


def loss_of(model: MInterface, batch: Any) -> torch.Tensor:
    outputs, targets = align(model.hparams["task"], model(batch[0]), batch[1])
    return model.loss(outputs, model.scale(targets))


@pytest.mark.parametrize("name", SETS)
def test_a_dataset_gives_samples_of_the_shape_and_classes_it_states(name: str, folder: Path) -> None:
    _, data = built(words_for("--dataset", name, folder))
    for sets in data.sets.values():
        dataset = sets[name]
        inputs, targets = default_collate([dataset[index] for index in range(min(8, len(dataset)))])
        if (shape := data.tell("sample_shape")) is not None:
            assert tuple(inputs.shape[1:]) == tuple(shape)
        assert torch.isfinite(inputs).all() and torch.isfinite(targets).all()
        if (num_classes := data.tell("num_classes")) is not None:
            assert 0 <= int(targets.min()) and int(targets.max()) < num_classes
        if (told := per_sample(dataset, "targets")) is not None:
            assert len(told) == len(dataset) and told[0] == targets[0]


@pytest.mark.parametrize("name", SETS)
def test_any_number_of_workers_gives_the_same_samples(name: str, folder: Path) -> None:
    words = [*words_for("--dataset", name, folder), *QUICK]
    assert main([*words, "--num_workers", "0"]) == main([*words, "--num_workers", "2"])


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_of_a_net_gets_a_gradient(name: str, folder: Path) -> None:
    model, data = built(words_for("--model_name", name, folder))
    model.zero_grad()
    loss_of(model.train(), next(iter(data.train_dataloader()))).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", NETS)
def test_a_net_can_learn_one_batch_by_heart(name: str, folder: Path) -> None:
    model, data = built(words_for("--model_name", name, folder))
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    losses = []
    for _ in range(60):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("name", NETS)
def test_a_checkpoint_gives_the_net_back(name: str, folder: Path) -> None:
    trained = main([*words_for("--model_name", name, folder), *QUICK])
    again = main(["validate", "--ckpt_path", "last"])
    assert again["val_loss"] == trained["val_loss"]


@pytest.mark.parametrize("folder_name", ["model", "data"])
@pytest.mark.parametrize("name", ["../main", "os", "__init__", "model_interface", "torch.nn", "", "no_such"])
def test_only_files_of_the_folder_have_names(folder_name: Any, name: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match="there are: "):
        load_class(folder_name, name)
