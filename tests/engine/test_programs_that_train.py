"""Programs as users write them, each trained to a score: torchmetrics, batches of any class, two views of a sample."""

from __future__ import annotations

from collections import UserDict, defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import engine
import numpy as np
import pytest
import torch
import torchmetrics
from engine.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassRecall,
)
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_recall,
)
from toy import Memory, Net, dataset, trainer, weights

DIGITS = Path(engine.__file__).parents[1] / "data" / "digits.npz"


def digits(split: int) -> TensorDataset:
    """Handwritten digits, as vectors of 64 numbers: the training (0), validation (1) or test (2) set."""
    stored = np.load(DIGITS)
    chosen = stored["split"] == split
    images = torch.from_numpy(stored["images"][chosen]).float().flatten(1) / 16
    return TensorDataset(images, torch.from_numpy(stored["labels"][chosen]).long())


# Somebody who uses torchmetrics


class Classifier(engine.Module):
    """Metric objects in all the ways that the guides of torchmetrics and Lightning show."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.train_accuracy = MulticlassAccuracy(10, average="micro")
        # F1 and recall share their states; AUROC keeps all predictions.
        common = MetricCollection({"f1": MulticlassF1Score(10), "recall": MulticlassRecall(10)})
        self.val_metrics = common.clone(prefix="val_")
        self.by_batch = MulticlassAccuracy(10, average="micro")
        self.sets = nn.ModuleList([MulticlassAccuracy(10, average="micro") for _ in range(2)])
        self.test_metrics = common.clone(prefix="test_", postfix="_all")
        self.area = MulticlassAUROC(10)
        self.confusion = MulticlassConfusionMatrix(10)
        self.loss_mean = MeanMetric()
        self.matrices: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.train_accuracy(logits, y)
        self.log("train_accuracy", self.train_accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.loss_mean.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", self.loss_mean.compute())
        self.loss_mean.reset()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        logits = self(x)
        self.sets[dataloader_idx].update(logits, y)
        self.log("accuracy", self.sets[dataloader_idx])
        if dataloader_idx == 0:
            self.val_metrics.update(logits, y)
            self.log_dict(self.val_metrics, add_dataloader_idx=False)
            self.log("by_batch", self.by_batch(logits, y), batch_size=len(x), add_dataloader_idx=False)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.test_metrics.update(logits, y)
        self.area.update(logits, y)
        self.log("test_area", self.area)
        self.confusion.update(logits, y)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()
        self.matrices.append(self.confusion.compute())
        self.confusion.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def functional(model: Classifier, data: Any) -> dict[str, Any]:
    x, y = zip(*data, strict=True)
    with torch.no_grad():
        logits, labels = model(torch.stack(x)), torch.stack(y)
    return {
        "accuracy": float(multiclass_accuracy(logits, labels, 10, average="micro")),
        "f1": float(multiclass_f1_score(logits, labels, 10)),
        "recall": float(multiclass_recall(logits, labels, 10)),
        "area": float(multiclass_auroc(logits, labels, 10)),
        "confusion": multiclass_confusion_matrix(logits, labels, 10),
    }


def test_a_user_of_torchmetrics_trains_and_sees_the_values_of_whole_sets() -> None:
    engine.seed_everything(0)
    model, logger = Classifier(), Memory()
    train, validation, test = (digits(split) for split in range(3))
    first, second = Subset(validation, range(100)), Subset(validation, range(100, len(validation)))
    stopping = EarlyStopping("val_f1", mode="max", patience=4)
    run = trainer(max_epochs=12, logger=logger, log_every_n_steps=5, num_sanity_val_steps=2, callbacks=stopping)
    sets = [DataLoader(first, 32), DataLoader(second, 48)]
    run.fit(model, DataLoader(train, 32, shuffle=True), sets)
    seen = {name: float(value) for name, value in run.callback_metrics.items()}
    by_hand, of_second = functional(model, first), functional(model, second)
    assert by_hand["accuracy"] > 0.93 and of_second["accuracy"] > 0.88
    assert seen["accuracy/dataloader_idx_0"] == pytest.approx(by_hand["accuracy"], abs=1e-6)
    assert seen["accuracy/dataloader_idx_1"] == pytest.approx(of_second["accuracy"], abs=1e-6)
    assert seen["by_batch"] == pytest.approx(by_hand["accuracy"], abs=1e-6)
    assert seen["val_f1"] == pytest.approx(by_hand["f1"], abs=1e-6)
    assert seen["val_recall"] == pytest.approx(by_hand["recall"], abs=1e-6)
    epochs = [value for _, value in logger.of("train_accuracy_epoch")]
    assert epochs[0] < 0.8 < 0.95 < epochs[-1] and len(logger.of("train_accuracy_step")) > 50
    losses = [value for _, value in logger.of("train_loss")]
    assert losses[-1] < 0.2 * losses[0]

    for _ in range(2):
        # The second time nothing may be left of the first.
        [result] = run.test(model, DataLoader(test, 50), verbose=False)
        by_hand = functional(model, test)
        assert by_hand["accuracy"] > 0.88
        assert result["test_area"] == pytest.approx(by_hand["area"], abs=1e-5)
        assert result["test_f1_all"] == pytest.approx(by_hand["f1"], abs=1e-6)
        assert result["test_recall_all"] == pytest.approx(by_hand["recall"], abs=1e-6)
        assert model.matrices[-1].equal(by_hand["confusion"])


@pytest.mark.parametrize("order", ["before", "after", "forward", "at the end"])
def test_a_collection_counts_every_batch_whenever_it_is_logged(order: str) -> None:
    class Collects(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x, y = batch
            if order == "before":
                self.log_dict(self.val_metrics)
            if order == "forward":
                self.val_metrics(self(x), y)
            else:
                self.val_metrics.update(self(x), y)
            if order in ("after", "forward"):
                self.log_dict(self.val_metrics, on_step=order == "forward", on_epoch=True)

        def on_validation_epoch_end(self) -> None:
            if order == "at the end":
                self.log_dict(self.val_metrics)

    model, data, logger = Collects(), digits(1), Memory()
    run = trainer(logger=logger)
    for _ in range(2):
        [result] = run.validate(model, DataLoader(data, 32), verbose=False)
        tail = "_epoch" if order == "forward" else ""
        expected = functional(model, data)
        assert result[f"val_f1{tail}"] == pytest.approx(expected["f1"], abs=1e-6)
        assert result[f"val_recall{tail}"] == pytest.approx(expected["recall"], abs=1e-6)
    assert len(logger.of("val_f1_step")) == (2 * -(-len(data) // 32) if order == "forward" else 0)


def test_logging_a_collection_does_not_copy_what_it_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []
    monkeypatch.setattr(torchmetrics.collections, "deepcopy", lambda value: copied.append(value) or deepcopy(value))

    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            area = {"one": MulticlassAUROC(10), "other": MulticlassAUROC(10, average="weighted")}
            self.areas = MetricCollection(area)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.areas.update(torch.rand(200, 10).softmax(1), torch.arange(200) % 10)
            self.log_dict(self.areas)

    [result] = trainer().validate(Keeps(), DataLoader(dataset(10), 2), verbose=False)
    assert set(result) == {"one", "other"}
    assert not [value for value in copied if isinstance(value, Tensor | list)]


# Batches of any class


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Sample:
    """Does something when it is made, which is not to be done again when it is moved."""

    x: Tensor
    y: Tensor
    note: str = "none"
    ready: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.x, self.ready = self.x * 2, True


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor
    names: list[str]


class Custom:
    """As in torch's guide to pinned memory; moves itself."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.moved = 0

    def pin_memory(self) -> Custom:
        self.x, self.y = self.x.pin_memory(), self.y.pin_memory()
        return self

    def to(self, device: Any) -> Custom:
        made = Custom(self.x.to(device), self.y.to(device))
        made.moved = self.moved + 1
        return made


class InPlace(Custom):
    """Forgets to return itself."""

    def to(self, device: Any) -> None:  # type: ignore[override]
        self.x, self.y, self.moved = self.x.to(device), self.y.to(device), self.moved + 1


class Tokens(UserDict[str, Any]):
    """A mapping that moves itself, as tokenizers give."""

    moved = False

    def to(self, device: Any) -> Tokens:
        made = Tokens({name: value.to(device) for name, value in self.items()})
        made.moved = True
        return made


def with_default(x: Tensor, y: Tensor) -> Any:
    made: Any = defaultdict(list)
    made["x"], made["y"] = x, [y, {"nothing": None}]
    return made


# How a batch is made of (x, y), and what it is to the model.
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "dict": (lambda x, y: {"x": x, "more": {"y": y}, "text": ["a"]}, lambda b: (b["x"], b["more"]["y"])),
    "named tuple": (Pair, lambda b: (b.x, b.y)),
    "dataclass": (lambda x, y: Sample(x / 2, y), lambda b: (b.x, b.y) if b.ready else None),
    "frozen dataclass": (lambda x, y: Frozen(x, y, ["a", "b"]), lambda b: (b.x, b.y)),
    "class": (Custom, lambda b: (b.x, b.y) if b.moved == 1 else None),
    "class that moves in place": (InPlace, lambda b: (b.x, b.y) if b.moved == 1 else None),
    "mapping that moves": (lambda x, y: Tokens(x=x, y=y), lambda b: (b["x"], b["y"]) if b.moved else None),
    "defaultdict": (with_default, lambda b: (b["x"], b["y"][0]) if b["missing"] == [] else None),
    "list of pairs": (lambda x, y: [*zip(x, y, strict=True)], lambda b: [torch.stack(t) for t in zip(*b, strict=True)]),
}


class Collate:
    """A `collate_fn` that workers can be given."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, samples: list[Any]) -> Any:
        return KINDS[self.kind][0](*default_collate(samples))


class Unpacks(Net):
    """A `Net` on any kind of batch."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind

    def loss(self, batch: Any) -> Tensor:
        return super().loss(KINDS[self.kind][1](batch) if self.kind else batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), batch_size=None if self.sized else 16)

    @property
    def sized(self) -> bool:
        # Where the number of samples is the first dimension of the first tensor.
        return "class" not in self.kind.partition("data")[0] and self.kind != "list of pairs"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_class_train_to_the_same_bits_as_pairs(kind: str, workers: int) -> None:
    ends = []
    for name in ("", kind):
        engine.seed_everything(1)
        collate = Collate(name) if name else None
        options: dict[str, Any] = {"batch_size": 16, "collate_fn": collate, "num_workers": workers if name else 0}
        model, run = Unpacks(name), trainer(max_epochs=3)
        [before] = run.validate(model, DataLoader(dataset(48), **options), verbose=False)
        run.fit(model, DataLoader(dataset(64), shuffle=True, **options), DataLoader(dataset(48), **options))
        after = float(run.callback_metrics["val_loss"])
        assert after < 0.9 * before["val_loss"]
        ends.append((weights(model).tolist(), after))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "class" not in kind.partition("data")[0]])
def test_numbers_in_batches_of_any_class_take_the_format_of_the_run(kind: str) -> None:
    types: set[Any] = set()

    class Look(Unpacks):
        def loss(self, batch: Any) -> Tensor:
            types.update(part.dtype for part in KINDS[self.kind][1](batch))
            return super().loss(batch)

    data = DataLoader(dataset(16), 8, collate_fn=Collate(kind))
    trainer(precision="64-true").fit(Look(kind), data)
    assert types == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_class_are_pinned_and_moved_to_a_gpu(kind: str) -> None:
    data = DataLoader(dataset(64), 16, collate_fn=Collate(kind), pin_memory=True)
    model = Unpacks(kind)
    run = trainer(max_epochs=3, accelerator="gpu")
    run.fit(model, data, data)
    assert float(run.callback_metrics["val_loss"]) < 1.5 and model.device.type == "cuda"


class Ragged(Dataset[Any]):
    """Sequences of 3 to 9 numbers, and whether they grow."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(3, 10, (), generator=generator))
        slope = torch.randn((), generator=generator)
        line = slope * torch.linspace(-1, 1, length) + 0.2 * torch.randn(length, generator=generator)
        return line.unsqueeze(1), (slope > 0).float()


def as_lists(samples: list[Any]) -> Any:
    return [x for x, _ in samples], torch.stack([y for _, y in samples])


def as_packed(samples: list[Any]) -> Any:
    return pack_sequence([x for x, _ in samples], enforce_sorted=False), torch.stack([y for _, y in samples])


class Recurrent(engine.Module):
    """Reads sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(1, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, lines: Any) -> Tensor:
        packed = lines if isinstance(lines, PackedSequence) else pack_sequence(lines, enforce_sorted=False)
        _, state = self.rnn(packed)
        score: Tensor = self.head(state[-1]).squeeze(-1)
        return score

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        lines, y = batch
        loss = F.binary_cross_entropy_with_logits(self(lines), y)
        self.log("train_loss", loss, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        lines, y = batch
        self.log("accuracy", ((self(lines) > 0) == y.bool()).float().mean(), batch_size=len(y))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"scores": [*self(batch[0])], "input": batch[0]}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def test_ragged_sequences_are_learned_as_lists_and_packed_alike() -> None:
    ends = []
    for collate in (as_lists, as_packed):
        engine.seed_everything(0)
        data = DataLoader(Ragged(), 48, shuffle=True, collate_fn=collate)
        model, run = Recurrent(), trainer(max_epochs=6)
        run.fit(model, data, DataLoader(Ragged(), 48, collate_fn=collate))
        assert float(run.callback_metrics["accuracy"]) > 0.93
        ends.append(weights(model))
        predicted = run.predict(model, DataLoader(Ragged(), 100, collate_fn=collate))
        assert predicted is not None and [len(p["scores"]) for p in predicted] == [100, 100, 56]
        assert isinstance(predicted[0]["input"], list if collate is as_lists else PackedSequence)
    assert ends[0].equal(ends[1])


# Two views of each sample


class TwoViews(Dataset[Any]):
    """Two random views of every digit: shifted, dimmed and noisy, by torch's global random numbers."""

    def __init__(self, size: int = 256) -> None:
        self.images = digits(0)[:size][0].reshape(-1, 8, 8)

    def __len__(self) -> int:
        return len(self.images)

    def _view(self, image: Tensor) -> Tensor:
        shift = int(torch.randint(-1, 2, ()))
        return (image.roll(shift, 1) * (0.7 + 0.6 * torch.rand(())) + 0.05 * torch.randn(8, 8)).flatten()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._view(self.images[index]), self._view(self.images[index])


class Contrastive(engine.Module):
    """NT-Xent (Chen et al. 2020): a view is to find its sample's other view among all views of the batch."""

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 16)

    def shared_step(self, batch: Any, stage: str) -> Tensor:
        z = F.normalize(self.head(self.encoder(torch.cat(batch))), dim=1)
        similarity = (z @ z.T / self.temperature).fill_diagonal_(-1e4)
        other = torch.arange(len(z)).roll(len(z) // 2)
        self.log(f"{stage}_found", (similarity.argmax(1) == other).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(similarity, other)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.shared_step(batch, "train")
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.shared_step(batch, "val"))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def pretrain(epochs: int, workers: int = 0, ckpt_path: Any = None, **options: Any) -> tuple[Contrastive, Any]:
    engine.seed_everything(0 if ckpt_path is None else 99)
    model, run = Contrastive(), trainer(max_epochs=epochs, **options)
    train = DataLoader(TwoViews(), 64, shuffle=True, drop_last=True, num_workers=workers)
    run.fit(model, train, DataLoader(TwoViews(64), 64), ckpt_path=ckpt_path)
    return model, run


def test_a_model_of_two_views_learns_to_tell_samples_apart() -> None:
    model, run = pretrain(20)
    [untrained] = trainer().validate(Contrastive(), DataLoader(TwoViews(64), 64), verbose=False)
    after = {name: float(value) for name, value in run.callback_metrics.items()}
    assert untrained["val_found"] < 0.35 and after["val_found"] > 0.7
    assert after["val_loss"] < 0.5 * untrained["val_loss"]


def test_views_are_the_same_with_workers_and_after_a_resume_within_an_epoch() -> None:
    saver = ModelCheckpoint("c", "{step}", every_n_train_steps=3, save_top_k=-1)
    model, _ = pretrain(3, callbacks=saver, enable_checkpointing=True)
    by_workers, _ = pretrain(3, workers=2)
    assert weights(by_workers).equal(weights(model))
    for step, workers in ((3, 0), (6, 1)):
        resumed, _ = pretrain(3, workers, f"c/step={step}.ckpt")
        assert weights(resumed).equal(weights(model))
    first, second = next(iter(DataLoader(TwoViews(4), 4)))
    assert not first.equal(second)
