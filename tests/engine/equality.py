"""What `test_ddp_equality.py` runs: `equality.py STRATEGY ENGINE TESTS SCENARIOS [ACCELERATOR]`, or under torchrun.

Every scenario trains or evaluates on the same global batches, however many processes share them, and leaves what it
has computed in `NAME-WORLD-RANK.json`.
"""

from __future__ import annotations

# ruff: noqa: E402
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STRATEGY, ACCELERATOR = sys.argv[1], sys.argv[5] if len(sys.argv) > 5 else "cpu"
sys.path[:0] = sys.argv[2:4]

import engine
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryConfusionMatrix, BinaryStatScores
from toy import Memory, dataset, trainer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Regression(engine.Module):
    """Two layers, losses of steps that are logged as the mean over processes, and metrics that count samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.counts, self.confusion, self.average = BinaryStatScores(), BinaryConfusionMatrix(), MeanMetric()
        self.kept: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        outputs, targets = self.net(x), (y > 0).int()
        for metric in (self.counts, self.confusion):
            metric.update((outputs > 0).int(), targets)
        self.average.update(outputs)
        self.log("average", self.average)
        self.log("mean", outputs.mean(), sync_dist=True)
        self.log("samples", float(len(x)), reduce_fx="sum", sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        # The sums of all processes, as torchmetrics gathers them.
        self.kept["counts"] = self.counts.compute().tolist()
        self.kept["confusion"] = self.confusion.compute().tolist()
        self.counts.reset()
        self.confusion.reset()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches(size: int, global_batch: int, **options: Any) -> DataLoader[Any]:
    """A loader whose batches, of all processes together, have `global_batch` samples."""
    return DataLoader(dataset(size), batch_size=global_batch // WORLD, **options)


def train(name: str, model: Regression, train: DataLoader[Any], strategy: str = STRATEGY, **options: Any) -> None:
    """Train, then test on 13 samples; keeps losses, values and weights."""
    memory = Memory()
    usual = {"max_epochs": 2, "logger": memory, "log_every_n_steps": 1, "accelerator": ACCELERATOR}
    run = trainer(strategy=strategy, **usual, **options)
    run.fit(model, train, batches(7, 4))
    kept = {"validation": dict(model.kept)}
    kept["values"] = {key: float(value) for key, value in run.callback_metrics.items() if key != "loss"}
    kept["losses"] = [value for _, value in memory.of("loss")]
    kept["weights"] = full(model)
    [kept["tested"]] = run.test(model, batches(13, 4), verbose=False)
    write(name, **kept, test=model.kept)


def full(model: nn.Module) -> dict[str, Any]:
    """All weights, those that are spread over processes put together."""
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    return {name: value.tolist() for name, value in state.items()}


def write(name: str, **values: Any) -> None:
    Path(f"{name}-{WORLD}-{RANK}.json").write_text(json.dumps(values))


def seeded(kind: type[Regression] = Regression) -> Any:
    """A model whose weights are the same, however many processes there are."""
    engine.seed_everything(3)
    return kind()


def scenario_float32() -> None:
    # Batches of 8, 8 and 4 samples.
    train("float32", seeded(), batches(20, 8, shuffle=True))


def scenario_float64() -> None:
    train("float64", seeded(), batches(20, 8, shuffle=True), precision="64-true")


def scenario_accumulated() -> None:
    train("accumulated", seeded(), batches(40, 8, shuffle=True), accumulate_grad_batches=2)


def scenario_clipped() -> None:
    train("clipped", seeded(), batches(20, 8, shuffle=True), gradient_clip_val=0.02, accumulate_grad_batches=2)


def scenario_weighted() -> None:
    sampler = WeightedRandomSampler(torch.arange(1, 21).double().tolist(), 16)
    train("weighted", seeded(), batches(20, 8, sampler=sampler))


class OwnShare(Sampler[int]):
    """Backwards through the dataset, with the share of each process by itself."""

    num_replicas = WORLD

    def __init__(self, size: int) -> None:
        self.order = list(range(size))[::-1][RANK::WORLD]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def scenario_own_sampler() -> None:
    train("own_sampler", seeded(), batches(24, 8, sampler=OwnShare(24)))


class Branches(Regression):
    """Each batch leaves parameters unused, always others."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x) + self.branches[batch_idx % 2](x), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def scenario_unused() -> None:
    train("unused", seeded(Branches), batches(20, 8), strategy="ddp_find_unused_parameters_true")


def scenario_false() -> None:
    train("false", seeded(), batches(20, 8, shuffle=True), strategy="ddp_find_unused_parameters_false")


class Counts(engine.Callback):
    """How often DistributedDataParallel sends a bucket of gradients, by batch."""

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()
        self.batch_idx = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        ddp = trainer.strategy.training_step
        assert isinstance(ddp, DistributedDataParallel)
        ddp.register_comm_hook(None, self.hook)

    def hook(self, state, bucket):  # type: ignore[no-untyped-def]  # torch takes no annotation that is a string
        self.sent[self.batch_idx] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch_idx = batch_idx


def scenario_sent() -> None:
    counts = Counts()
    # 5 batches in windows of 3 and 2.
    options = {"callbacks": counts, "accumulate_grad_batches": 3, "strategy": "ddp"}
    trainer(**options).fit(seeded(), batches(40, 8))
    write("sent", batches=sorted(counts.sent))


class Normed(Regression):
    """With running statistics, which every process has of its own batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.features: list[Tensor] = []
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.features.append(self.net[0](batch[0]))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.statistics())
        super().validation_step(batch, batch_idx)

    def statistics(self) -> list[float]:
        norm = self.net[1]
        return [*norm.running_mean.tolist(), *norm.running_var.tolist(), norm.num_batches_tracked.item()]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.05)


def scenario_normed() -> None:
    model = seeded(Normed)
    run = trainer(strategy=STRATEGY, max_epochs=2)
    run.fit(model, batches(24, 12, shuffle=True), batches(7, 4))
    run.save_checkpoint(f"normed-{WORLD}.ckpt")
    at_validation, model.seen = model.seen, []
    run.test(model, batches(13, 4), verbose=False)
    # The same batches through a norm of its own.
    alone = nn.BatchNorm1d(4)
    for features in model.features:
        alone(features)
    expected = [*alone.running_mean.tolist(), *alone.running_var.tolist(), len(model.features)]
    write("normed", validation=at_validation, test=model.seen, expected=expected)


class Synchronised(Regression):
    """With a norm over the batches of all processes, on GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def scenario_synchronised() -> None:
    train("synchronised", seeded(Synchronised), batches(24, 8), sync_batchnorm=ACCELERATOR == "gpu")


warnings.simplefilter("ignore")
torch.set_num_threads(1)
for scenario in sys.argv[4].split(","):
    globals()[f"scenario_{scenario}"]()
