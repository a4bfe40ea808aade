"""Two processes that train together: weights, what each may do alone, and what a checkpoint keeps of both."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
import torch.distributed as dist
from engine import distributed
from engine.callbacks import EarlyStopping, ModelCheckpoint
from engine.signals import StopRequest
from injection import at, two_processes
from test_manual_optimization import GAN, by_closure, in_windows, manual, plainly, points_loader
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from toy import Net, dataset, fit, loader, same_bits, trainer, weights


def both(work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns in each of two processes that know each other."""
    children = two_processes(lambda rank: Path(f"result-{rank}.json").write_text(json.dumps(work(rank))))
    for child in children:
        assert child.end() == 0, child.err
    return [json.loads(Path(f"result-{rank}.json").read_text()) for rank in range(2)]


class Reads(Net):
    """Its first process reads what can be monitored while an epoch ends."""

    def read(self) -> None:
        if self.trainer.is_global_zero:
            self.read_values = getattr(self, "read_values", 0) + len(self.trainer.callback_metrics)

    def on_validation_epoch_end(self) -> None:
        self.read()

    def on_train_epoch_end(self) -> None:
        self.read()


def test_one_process_may_read_monitored_values_alone() -> None:
    def work(rank: int) -> int:
        model = Reads()
        trainer(max_epochs=2).fit(model, loader(16), {"one": loader(8), "two": loader(6)})
        return getattr(model, "read_values", 0)

    first, second = both(work)
    assert first > 0 and second == 0


def test_early_stopping_may_watch_what_one_process_lacks() -> None:
    class One(Net):
        def on_train_epoch_end(self) -> None:
            if self.global_rank == 0:
                self.log("own", 1.0)

    def work(rank: int) -> int:
        stop = EarlyStopping("own", patience=2, strict=False)
        run = trainer(max_epochs=9, callbacks=stop)
        run.fit(One(), loader(16))
        return run.current_epoch

    assert both(work) == [3, 3]


class SaveInWindow(engine.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 2:
            trainer.save_checkpoint("window.ckpt")


def test_gradients_within_a_window_are_those_of_each_process() -> None:
    def work(rank: int) -> list[list[float]]:
        def train(path: str | None) -> list[float]:
            engine.seed_everything(4)
            model = Net()
            run = trainer(max_epochs=2, accumulate_grad_batches=4, callbacks=SaveInWindow())
            run.fit(model, loader(32, shuffle=True), ckpt_path=path)
            return weights(model).tolist()

        return [train(None), train("window.ckpt")]

    (whole, resumed), other = both(work)
    assert whole == resumed and other == [whole, resumed]


def test_clipping_by_hand_sees_the_gradients_of_all() -> None:
    class Clips(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.1)

    def work(rank: int) -> list[float]:
        engine.seed_everything(2)
        by_hand, automatic = Clips(), Net()
        automatic.load_state_dict(by_hand.state_dict())
        trainer().fit(by_hand, loader(16))
        trainer(gradient_clip_val=0.05).fit(automatic, loader(16))
        torch.testing.assert_close(weights(by_hand), weights(automatic), rtol=0, atol=1e-6)
        return weights(by_hand).tolist()

    first, second = both(work)
    assert first == pytest.approx(second)


def shared(size: int, global_batch: int, world: int) -> DataLoader[Any]:
    return DataLoader(dataset(size), global_batch // world)


@pytest.mark.parametrize("step", [plainly, by_closure, in_windows])
def test_two_processes_step_to_the_weights_of_one(step: Any) -> None:
    def work(rank: int) -> list[float]:
        # Weights that differ at first are those of the first process.
        engine.seed_everything(1 + rank)
        model = manual(step)
        fit(model, shared(20, 4, 2), max_epochs=2)
        return weights(model).tolist()

    first, second = both(work)
    model = manual(step)
    fit(model, shared(20, 4, 1), max_epochs=2)
    assert first == second
    assert first == pytest.approx(weights(model).tolist(), abs=1e-6)


def test_a_gan_on_two_processes_goes_on_with_the_same_bits() -> None:
    def train(rank: int, ckpt_path: Any = None) -> Any:
        engine.seed_everything(3 if ckpt_path is None else 99)
        saver = ModelCheckpoint("c", "{step}", every_n_train_steps=2, save_top_k=-1)
        run = trainer(max_epochs=2, callbacks=saver, enable_checkpointing=True)
        model = GAN(8)
        run.fit(model, points_loader(48, 8), points_loader(8, 4), ckpt_path=ckpt_path)
        own = [buffer.tolist() for _, buffer in sorted(model.named_buffers())]
        return [p.tolist() for p in model.parameters()], own, float(run.callback_metrics["d_loss_epoch"])

    def work(rank: int) -> Any:
        return train(rank), train(rank, "c/step=8.ckpt")

    (whole, resumed), (other, other_resumed) = both(work)
    assert whole[0] == other[0] and other[1] == whole[1]
    assert same_bits(whole, resumed) and same_bits(other, other_resumed)


def test_two_processes_share_running_statistics_and_go_on_with_them() -> None:
    def train(rank: int, ckpt_path: Any = None) -> Any:
        class Save(engine.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                trainer.save_checkpoint(f"each/{trainer.state.total_batches}.ckpt")

        engine.seed_everything(3 if ckpt_path is None else 99)
        model = manual(plainly)
        model.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        options = {"max_epochs": 2, "callbacks": Save(), "num_sanity_val_steps": 0}
        run = trainer(**options)
        run.fit(model, shared(16, 4, 2), shared(8, 4, 2), ckpt_path=ckpt_path)
        return weights(model).tolist(), float(run.callback_metrics["val_loss"])

    def work(rank: int) -> Any:
        return train(rank), train(rank, "each/3.ckpt")

    for whole, resumed in both(work):
        assert whole == resumed


def test_a_gradient_that_one_process_lacks_counts_as_zero() -> None:
    def work(rank: int) -> list[float]:
        def step(model: Any, batch: Any, batch_idx: int) -> None:
            optimizer = model.optimizers()
            optimizer.zero_grad()
            if (batch_idx + rank) % 2:
                model.manual_backward(model.loss(batch))
            optimizer.step()

        model = manual(step)
        fit(model, shared(8, 4, 2))
        return weights(model).tolist()

    first, second = both(work)
    assert first == second


@pytest.mark.parametrize("when", [1, 2, 3, 40, 333])
def test_a_signal_to_one_process_stops_both_at_the_same_step(when: int) -> None:
    def work(rank: int) -> int:
        terminate = at("on_train_batch_start", when if rank else 0, lambda run: signal.raise_signal(signal.SIGTERM))
        run = trainer(max_epochs=9, callbacks=terminate)
        with pytest.raises(SystemExit):
            run.fit(Net(), loader(512, shuffle=True))
        return run.global_step

    first, second = both(work)
    assert first == second and when <= first < 9 * 128


def agreements(seconds: float, calls: int) -> list[list[int]]:
    """In which of so many calls of `agreed`, so far apart, the processes exchange what they know."""

    def work(rank: int) -> list[int]:
        distributed.init(torch.device("cpu"))
        started, number = [], 0
        plain = dist.all_reduce

        def counted(*args: Any, **options: Any) -> Any:
            started.append(number)
            return plain(*args, **options)

        dist.all_reduce = counted
        with StopRequest() as stop:
            for number in range(calls):  # noqa: B007  # `counted` notes it
                time.sleep(seconds * (1 + rank))
                stop.agreed()
        dist.all_reduce = plain
        distributed.destroy()
        return started

    return both(work)


def test_processes_agree_rarely_where_steps_are_short_and_at_each_where_they_are_long() -> None:
    first, second = agreements(0, 500)
    assert first == second and len(first) < 100
    assert agreements(0.06, 5) == [[0, 1, 2, 3, 4]] * 2
