"""A run that goes on within an epoch on another number of processes, or with batches of another size."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.reading import Reader
from injection import two_processes
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from torchmetrics import CatMetric, MaxMetric, MeanMetric
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.regression import PearsonCorrCoef
from toy import Net, Steps, dataset, fit, loader, trainer, weights

Results = list[dict[str, Any]]


def on(number: int, work: Any) -> Results:
    """What `work()` returns in each of so many processes that train together."""
    if number == 1:
        return [json.loads(json.dumps(work()))]
    children = two_processes(lambda rank: Path(f"result-{rank}.json").write_text(json.dumps(work())), number)
    codes = [child.end(120) for child in children]
    assert not any(codes), "\n".join(child.err for child in children)
    return [json.loads(Path(f"result-{rank}.json").read_text()) for rank in range(number)]


class Numbered(Dataset[Any]):
    """Samples that know their number."""

    def __init__(self, size: int) -> None:
        self.rows = dataset(size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return (*self.rows[index], int(index))


class Measured(Net):
    """Tells which samples it was given, and measures training in all ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.average, self.most, self.all = BinaryAccuracy(), MeanMetric(), MaxMetric(), CatMetric()
        # [epoch, batches done in all, [number of each sample]]
        self.taken: list[list[Any]] = []
        self.whole: dict[int, list[int]] = {}

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [StepLR(optimizer, 1, 0.5)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, numbers = batch
        self.taken.append([self.current_epoch, self.trainer.state.total_batches, numbers.tolist()])
        prediction = self(x)
        loss = nn.functional.mse_loss(prediction, y)
        self.accuracy.update((prediction > 0).int(), (y > 0).int())
        for metric in (self.average, self.most, self.all):
            metric.update(numbers.to(x))
        options = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.log("loss", loss, **options)
        self.log("number", numbers.to(x).mean(), **options)
        self.log("samples", float(len(x)), reduce_fx="sum", **options)
        self.log("first", float(numbers.min()), reduce_fx="min", **options)
        self.log("last", numbers.max(), reduce_fx="max", **options)
        self.log_dict({"accuracy": self.accuracy, "average": self.average, "most": self.most}, **options)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y, _ = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.whole[self.current_epoch] = sorted(int(number) for number in self.all.compute().reshape(-1).tolist())
        self.all.reset()


class Save(engine.Callback):
    """Saves after every batch."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/{trainer.state.total_batches}.ckpt")


def train(size: int, batch_size: int, ckpt_path: Any = None, save: str | None = None, **options: Any) -> dict[str, Any]:
    """Train two epochs; what came of it, as plain data."""
    engine.seed_everything(5 if ckpt_path is None else 99)
    model, sampler = Measured(), options.pop("sampler", None)
    order = {"shuffle": True} if sampler is None else {"sampler": sampler}
    order |= {"drop_last": options.pop("drop_last", False)}
    run = trainer(max_epochs=2, callbacks=[] if save is None else Save(save), **options)
    val = DataLoader(Numbered(4), 1)
    run.fit(model, DataLoader(Numbered(size), batch_size, **order), val, ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    whole = {str(epoch): numbers for epoch, numbers in model.whole.items()}
    rates = [float(group["lr"]) for group in run.optimizers[0].param_groups]
    done = {"steps": run.global_step, "batches": run.state.total_batches, "rates": rates}
    return {"weights": weights(model).tolist(), "metrics": metrics, "taken": model.taken, "whole": whole, **done}


def taken(results: Results, epoch: int, until: float = float("inf")) -> list[int]:
    """Numbers of the samples that all processes were given in an epoch, up to the checkpoint after `until` batches."""
    batches = [batch for result in results for batch in result["taken"] if batch[0] == epoch and batch[1] < until]
    return sorted(number for *_, numbers in batches for number in numbers)


# 36 samples in global batches of 8: four whole ones and a half one in each epoch.
SIZE, GLOBAL = 36, 8
POINTS = [6, 8, 9, 10]


@pytest.mark.long
def test_weights_and_metrics_are_those_of_one_process_that_never_stopped() -> None:
    formats = {"32-true": 1e-6, "64-true": 1e-12}

    def go_on(world: int) -> Any:
        runs = [(name, point) for name in formats for point in POINTS]
        return {
            f"{name} {point}": train(SIZE, GLOBAL // world, f"{name}/{point}.ckpt", precision=name)
            for name, point in runs
        }

    def begin() -> Any:
        whole = {name: train(SIZE, GLOBAL // 2, save=name, precision=name) for name in formats}
        return whole, go_on(2)

    both = on(2, begin)
    again = {1: on(1, lambda: go_on(1)), 4: on(4, lambda: go_on(4))}
    for name, tolerance in formats.items():
        alone = train(SIZE, GLOBAL, precision=name)
        for whole, resumed in both:
            assert whole[name]["weights"] == pytest.approx(alone["weights"], rel=0, abs=tolerance)
            # On the same number of processes with the same bits, those that it was without a stop.
            for point in POINTS:
                for key in ("weights", "metrics", "steps", "batches", "rates"):
                    assert resumed[f"{name} {point}"][key] == whole[name][key], (key, point)
        for number, processes in again.items():
            for point in POINTS:
                results = [process[f"{name} {point}"] for process in processes]
                for result in results:
                    assert result["weights"] == pytest.approx(alone["weights"], rel=0, abs=tolerance), (number, point)
                    assert result["metrics"] == pytest.approx(alone["metrics"], rel=0, abs=1e-6), (number, point)
                    assert [result[key] for key in ("steps", "batches", "rates")] == [10, 10, alone["rates"]]
                    assert result["whole"]["1"] == [*range(SIZE)]
                before = [whole[name] for whole, _ in both]
                assert sorted(taken(before, 1, point) + taken(results, 1)) == [*range(SIZE)]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"weighted": True}], ids=str)
def test_no_sample_is_repeated_or_skipped_where_batches_do_not_fit_each_other(options: dict[str, Any]) -> None:
    size, options = 29, dict(options)
    if options.pop("weighted", False):
        # An order without replacement, so that each comes once.
        options["sampler"] = WeightedRandomSampler([1.0 + n % 3 for n in range(size)], size, replacement=False)
    # Two processes take 6 samples at a time and leave out one of 29; 5 batches in each epoch.
    before = on(2, lambda: train(size, 3, save="two", **options))
    assert len(taken(before, 1)) == 28
    done = {6: 6, 7: 12, 8: 18, 9: 24, 10: 28}
    points = [7, 9, 10] if "accumulate_grad_batches" in options else [6, 8, 9, 10]

    def go_on(batch_size: int) -> Any:
        return {point: train(size, batch_size, f"two/{point}.ckpt", **options) for point in points}

    for world, batch_size in [(1, 3), (1, 7), (2, 4), (3, 2), (4, 1)]:
        after = on(world, partial(go_on, batch_size))
        for point in points:
            results = [result[str(point)] for result in after]
            numbers = taken(before, 1, point) + taken(results, 1)
            # After the last batch nothing comes back of what was left out.
            left_out = 1 if point == 10 else (size - done[point]) % world
            assert len(numbers) == len(set(numbers)) == size - left_out, (world, batch_size, point)
            for result in results:
                assert result["whole"]["1"] == sorted(numbers)
                metrics = result["metrics"]
                assert metrics["samples"] == len(numbers)
                assert metrics["number"] == pytest.approx(sum(numbers) / len(numbers), abs=1e-6)
                assert metrics["average"] == pytest.approx(metrics["number"], abs=1e-5)
                assert (metrics["first"], metrics["last"]) == (min(numbers), max(numbers)), (world, point)
                assert metrics["most"] == max(numbers)
                assert result["rates"] == before[0]["rates"]


def test_an_epoch_that_goes_on_in_other_batches_goes_on_once_more_with_the_same_bits() -> None:
    on(2, lambda: train(29, 3, save="two", accumulate_grad_batches=2, val_check_interval=3))

    def once_more() -> Any:
        options = {"accumulate_grad_batches": 2, "val_check_interval": 3}
        whole = train(29, 2, "two/7.ckpt", "three", **options)
        # From 8 to 10: the rest of the epoch after 12 samples, 6 at a time; all points, within windows, too.
        return whole, {number: train(29, 2, f"three/{number}.ckpt", **options) for number in (8, 9, 10)}

    for whole, resumed in on(3, once_more):
        assert [batch for _, batch, _ in whole["taken"]] == [7, 8, 9]
        for number, result in resumed.items():
            assert result["weights"] == whole["weights"] and result["metrics"] == whole["metrics"], number
            assert result["taken"] == [batch for batch in whole["taken"] if batch[1] >= int(number)], number


def test_the_number_of_the_next_batch_is_that_of_a_window() -> None:
    reader = Reader(DataLoader(Numbered(40), 3), 14)
    numbers = [reader.next_number(samples, window) for samples in (1, 3, 4, 12, 13) for window in (1, 2)]
    assert numbers == [1, 2, 1, 2, 2, 2, 4, 4, 5, 6]


class Numbers(Net):
    """Tells its batches, and where it validates."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(("train", batch_idx))
        return self.loss(batch)


@pytest.mark.parametrize(
    ("options", "saved", "expected"),
    [
        # 40 samples were to come 2 at a time, and come 4 at a time.
        ({"val_check_interval": 5}, 6, [*range(3, 5), "val", *range(5, 10), "val"]),
        ({"val_check_interval": 0.5}, 11, [*range(6, 10), "val", 10]),
        ({"val_check_interval": 0.5}, 9, ["val", *range(5, 10), "val", 10]),
        ({"limit_train_batches": 8}, 7, [*range(4, 8), "val"]),
        # Cut short to 3 batches, of which 4 are done already.
        ({"limit_train_batches": 3}, 8, ["val"]),
        ({"accumulate_grad_batches": 4}, 4, [*range(4, 12), "val"]),
        ({"drop_last": True}, 19, ["val"]),
        ({"limit_train_batches": 0.5}, 7, [*range(4, 5), "val"]),
    ],
    ids=str,
)
def test_intervals_and_limits_count_batches_of_the_new_size(
    options: dict[str, Any], saved: int, expected: list[Any]
) -> None:
    class SaveOnce(engine.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == saved - 1:
                trainer.save_checkpoint("a.ckpt")

    before, drop_last = dict(options), options.pop("drop_last", False)
    window = {name: value for name, value in options.items() if name == "accumulate_grad_batches"}
    fit(Numbers(), loader(40), loader(2), callbacks=SaveOnce(), **window)
    model = Numbers()
    run = trainer(**options)
    run.fit(model, loader(40, 4, drop_last=drop_last), loader(2), ckpt_path="a.ckpt")
    assert [batch if stage == "train" else stage for stage, batch in model.seen] == expected, before
    assert run.current_epoch == 1


def test_what_is_left_of_an_epoch_may_be_nothing_for_more_processes() -> None:
    on(2, lambda: train(10, 1, save="two"))

    def rest() -> Any:
        return train(10, 1, "two/9.ckpt"), train(10, 2, "two/4.ckpt")

    # Of 10 samples, 8 are done: two, for four processes.
    for last, first in on(4, rest):
        assert last["taken"] == [] and last["metrics"]["samples"] == 8 and "val_loss" in last["metrics"]
        assert last["rates"] == [0.025] and last["whole"] == {"1": last["whole"]["1"]}
        # And in the first epoch, after which another follows, of one batch of 8 samples.
        assert [(epoch, len(numbers)) for epoch, _, numbers in first["taken"]] == [(1, 2)]
        assert first["rates"] == [0.025]


@pytest.mark.parametrize(
    ("saved", "now", "told"),
    [
        ({"accumulate_grad_batches": 2}, {"batch": 4, "accumulate_grad_batches": 2}, "gradients within a window of ac"),
        ({"accumulate_grad_batches": 2}, {}, "other batches, .*now {'accumulate_grad_batches': 1}, then {'accum"),
        ({}, {"size": 22}, "other samples: now {'samples': 22}, then {'samples': 20}"),
        ({}, {"shuffle": True}, "other samples: now {'shuffle': True}, then {'shuffle': False}"),
        ({"own": True}, {"own": True, "batch": 4}, "dealt out anew, since the loader has an order of its own"),
        ({}, {"own": True}, "cannot go on with other samples"),
    ],
    ids=str,
)
def test_what_cannot_go_on_says_why(saved: dict[str, Any], now: dict[str, Any], told: str) -> None:
    class SaveThird(engine.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint("a.ckpt")

    def data(options: dict[str, Any]) -> Any:
        size, batch, own = options.pop("size", 20), options.pop("batch", 2), options.pop("own", False)
        samples = {"sampler": range(size)} if own else {"shuffle": options.pop("shuffle", False)}
        return loader(size, batch, **samples), options

    train, options = data(dict(saved))
    fit(Net(), train, callbacks=SaveThird(), **options)
    train, options = data(dict(now))
    with pytest.raises(engine.MisconfigurationException, match=told) as refused:
        trainer(**options).fit(Net(), train, ckpt_path="a.ckpt")
    line = str(refused.value)
    assert re.match("checkpoint a.ckpt was saved within epoch 0, which cannot go on with ", line) and "\n" not in line


def test_a_metric_that_cannot_be_merged_is_refused_by_fewer_processes_only() -> None:
    class Correlated(Measured):
        def __init__(self) -> None:
            super().__init__()
            self.correlation = PearsonCorrCoef()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.correlation.update(self(batch[0]).flatten(), batch[1].flatten())
            return super().training_step(batch, batch_idx)

    def run(ckpt_path: Any = None) -> Any:
        saver = [Save("two")] if ckpt_path is None else []
        data = DataLoader(Numbered(24), 2)
        trainer(callbacks=saver).fit(Correlated(), data, ckpt_path=ckpt_path)

    on(2, run)
    told = "cannot go on with fewer processes than 2: nobody knows how to merge the running values of correlation;"
    with pytest.raises(engine.MisconfigurationException, match=told):
        run("two/2.ckpt")
    on(3, lambda: run("two/2.ckpt"))


def test_random_numbers_of_other_processes_are_drawn_anew_and_one_line_says_so(
    recwarn: pytest.WarningsRecorder,
) -> None:
    drawn: list[float] = []

    def step(model: Steps, batch: Any, batch_idx: int) -> Tensor:
        drawn.append(float(torch.rand(())))
        return model.loss(batch)

    def run(ckpt_path: Any = None, **options: Any) -> list[float]:
        drawn.clear()
        engine.seed_everything(3)
        trainer(callbacks=[] if ckpt_path else Save("two"), **options).fit(Steps(step), loader(24), ckpt_path=ckpt_path)
        return drawn[:]

    whole = on(2, run)
    again, other = on(4, lambda: run("two/2.ckpt")), on(2, lambda: run("two/2.ckpt"))
    assert other == [numbers[2:] for numbers in whole]
    firsts = [numbers[0] for numbers in again]
    assert len(set(firsts)) == 4 and firsts == [numbers[0] for numbers in on(4, lambda: run("two/2.ckpt"))]
    recwarn.clear()
    assert run("two/2.ckpt")[0] == firsts[0]
    lines = [str(warning.message) for warning in recwarn if "drawn anew" in str(warning.message)]
    assert len(lines) == 1 and lines[0].startswith("saved by 2 processes, going on with 1: ")


def test_an_epochs_end_goes_on_with_any_number() -> None:
    class SaveEnd(engine.Callback):
        def on_validation_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(f"end/{trainer.current_epoch}.ckpt")

        def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(f"start/{trainer.current_epoch}.ckpt")

    def begin() -> None:
        engine.seed_everything(5)
        data = DataLoader(Numbered(12), 2, shuffle=True)
        trainer(max_epochs=2, callbacks=SaveEnd()).fit(Measured(), data, DataLoader(Numbered(4), 1))

    on(2, begin)
    for path in ("end/0.ckpt", "start/1.ckpt"):
        results = on(3, lambda path=path: train(12, 1, path))
        assert taken(results, 1) == [*range(12)] and {r["metrics"]["samples"] for r in results} == {12}


class Endless(IterableDataset[Any]):
    """As many samples as asked for; others for each process."""

    def __init__(self, sizes: list[int], rank: int, told: bool = False) -> None:
        self.size, self.rank = sizes[rank], rank
        self.position = 0

    def __iter__(self) -> Any:
        while self.position < self.size:
            self.position += 1
            yield dataset(300)[100 * self.rank + self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_streams_of_unequal_length_end_together_and_go_on_with_the_same_bits() -> None:
    def work() -> Any:
        def run(ckpt_path: Any = None, **options: Any) -> Any:
            engine.seed_everything(2 if ckpt_path is None else 99)
            model = Net()
            rank = engine.distributed.rank()
            data = DataLoader(Endless([11, 7, 20], rank), 2)
            # Plain DDP orders its buckets anew after its first step, and sums of three depend on their order.
            options |= {"strategy": "ddp_find_unused_parameters_true"}
            callbacks = [] if ckpt_path else Save("each")
            done = trainer(max_epochs=2, callbacks=callbacks, **options)
            done.fit(model, data, loader(6), ckpt_path=ckpt_path)
            return [model.count("train"), done.current_epoch, weights(model).tolist()]

        whole = run()
        return whole, [run(f"each/{number}.ckpt") for number in range(1, whole[0])]

    results = on(3, work)
    # The second has 4 batches; what the others have read ahead is left out. Then they go on where they are.
    for whole, resumed in results:
        assert whole[1] == 2 and whole == [results[0][0][0], 2, results[0][0][2]]
        for number, again in enumerate(resumed, start=1):
            assert again == [whole[0] - number, 2, whole[2]], number
    assert results[0][0][0] > 4


def test_loaders_of_unequal_length_are_refused_by_all() -> None:
    def run(**options: Any) -> None:
        trainer(use_distributed_sampler=False, **options).fit(Net(), loader(8 + 2 * engine.distributed.rank()))

    def work() -> str:
        with pytest.raises(engine.MisconfigurationException) as refused:
            run()
        return str(refused.value)

    expected = "the train loaders of the 2 processes have 4, 5 batches; give every process as many, or "
    assert on(2, work) == [expected + "limit_train_batches=4"] * 2
    on(2, lambda: run(limit_train_batches=4))
