"""Two processes that train together: what each may do alone, and what a checkpoint keeps of both."""

from __future__ import annotations

from typing import Any

import engine
import pytest
import torch
from engine.callbacks import EarlyStopping
from test_manual_optimization import both
from torch.optim import SGD
from toy import Net, loader, trainer, weights


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
