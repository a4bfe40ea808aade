"""When training ends: epochs, steps, should_stop, -1 from on_train_batch_start; and when validation runs."""

from __future__ import annotations

from typing import Any

import engine
import pytest
from toy import Net, fit, loader, stream, trainer


class StopAt(engine.Callback):
    """Asks to stop at the end of a batch (counted over all epochs, from 1)."""

    def __init__(self, batch: int) -> None:
        self.batch, self.seen = batch, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.batch:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "batches", "epochs"),
    [
        ({"max_epochs": 3}, 12, 3),
        ({"max_epochs": 0}, 0, 0),
        ({"max_epochs": None, "max_steps": 6}, 6, 1),
        ({"max_epochs": -1, "max_steps": 8}, 8, 2),
        ({"max_epochs": 1, "max_steps": 99}, 4, 1),
        ({"max_epochs": 5, "max_steps": 0}, 0, 0),
        ({"max_epochs": 5, "max_steps": 3, "accumulate_grad_batches": 2}, 6, 1),
    ],
)
def test_training_ends_after_so_many_epochs_or_steps(options: dict[str, Any], batches: int, epochs: int) -> None:
    model = Net()
    run = fit(model, **options)
    assert (model.count("train"), run.current_epoch) == (batches, epochs)


def test_the_limit_of_epochs_is_1000_without_any_other() -> None:
    assert trainer(max_epochs=None).max_epochs == 1000
    assert trainer(max_epochs=None, max_steps=5).max_epochs == -1


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({}, 6),
        ({"min_epochs": 1}, 6),
        ({"min_epochs": 2}, 8),
        ({"min_epochs": 4}, 16),
        ({"min_steps": 7}, 7),
        ({"min_steps": 3}, 6),
        ({"min_steps": 7, "min_epochs": 3}, 12),
        ({"min_epochs": 99}, 20),
        ({"max_steps": 5, "min_epochs": 99}, 5),
    ],
)
def test_should_stop_waits_for_the_minimum_only(options: dict[str, Any], batches: int) -> None:
    model = Net()
    fit(model, callbacks=StopAt(6), **{"max_epochs": 5, **options})
    assert model.count("train") == batches


def test_a_stop_within_an_epoch_validates_and_ends_the_epoch() -> None:
    notes = []

    class Note(engine.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            notes.append(trainer.current_epoch)

    model = Net()
    run = fit(model, None, loader(), callbacks=[StopAt(2), Note()], max_epochs=3)
    assert (model.count("train"), model.count("val"), notes) == (2, 4, [0])
    assert run.current_epoch == 1


def test_max_steps_within_an_epoch_validates_once_and_ends_with_the_epochs_hooks() -> None:
    notes = []

    class Note(engine.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            notes.append((trainer.current_epoch, trainer.global_step))

    model = Net()
    fit(model, None, loader(), callbacks=Note(), max_epochs=9, max_steps=6)
    assert (model.count("train"), model.count("val")) == (6, 8)
    assert notes == [(0, 4), (1, 6)]


def test_a_stop_request_of_an_earlier_run_is_forgotten() -> None:
    model, run = Net(), trainer(callbacks=StopAt(2), max_epochs=3)
    run.fit(model, loader())
    run.fit(model, loader())
    assert model.count("train") == 2 + 2 * 4


def test_a_second_fit_goes_on_counting_and_does_nothing_at_the_limit() -> None:
    starts = []

    class Note(engine.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append(trainer.current_epoch)

    model, run = Net(), trainer(callbacks=Note())
    run.fit(model, loader())
    run.fit(model, loader())
    assert (model.count("train"), starts) == (4, [0])
    run.max_epochs = 2
    run.fit(model, loader())
    assert (model.count("train"), run.global_step, starts) == (8, 8, [0, 1])


@pytest.mark.parametrize("at", [0, 2])
def test_minus_one_from_on_train_batch_start_skips_the_rest_of_the_epoch(at: int) -> None:
    ended, epochs = [], []

    class Skipping(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == at else None

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ended.append(batch_idx)

        def on_train_epoch_end(self) -> None:
            epochs.append(self.current_epoch)

    model = Skipping()
    run = fit(model, None, loader(), max_epochs=2)
    assert ended == [*range(at)] * 2
    assert epochs == [0, 1]
    assert (run.current_epoch, run.global_step, model.count("val")) == (2, 2 * at, 0)


def test_only_the_module_can_skip() -> None:
    class Ignored(engine.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Any:
            return -1

    model = Net()
    fit(model, callbacks=Ignored())
    assert model.count("train") == 4


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4]), (6, [])])
def test_check_val_every_n_epoch(every: int, epochs: list[int]) -> None:
    validated = []

    class Note(engine.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            validated.append(trainer.current_epoch)

    fit(Net(), None, loader(), callbacks=Note(), max_epochs=5, check_val_every_n_epoch=every)
    assert validated == epochs


def test_no_validation_without_a_step_or_a_loader() -> None:
    class NoStep(Net):
        validation_step = engine.Module.validation_step

    with pytest.raises(engine.MisconfigurationException, match="no validation_step"):
        fit(NoStep(), None, loader())
    model = Net()
    fit(model, None, None, num_sanity_val_steps=2)
    assert model.count("val") == 0


def test_counters_in_the_hooks_of_an_epoch() -> None:
    notes = []

    class Note(engine.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            notes.append(("start", trainer.current_epoch, trainer.global_step))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            notes.append(("batch", batch_idx, trainer.global_step))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            notes.append(("end", trainer.current_epoch, trainer.global_step))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            notes.append(("over", trainer.current_epoch, trainer.global_step))

    fit(Net(), loader(6), callbacks=Note(), accumulate_grad_batches=2)
    batches = [("batch", 0, 0), ("batch", 1, 1), ("batch", 2, 2)]
    assert notes == [("start", 0, 0), *batches, ("end", 0, 2), ("over", 1, 2)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": -1}, float("inf")),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
    ],
)
def test_estimated_stepping_batches_is_known_when_optimizers_are_made(options: dict[str, Any], expected: float) -> None:
    estimates = []

    class Ask(Net):
        def configure_optimizers(self) -> Any:
            estimates.append(self.trainer.estimated_stepping_batches)
            self.trainer.max_epochs = 0
            return super().configure_optimizers()

    fit(Ask(), **options)
    assert estimates == [expected]


def test_estimated_stepping_batches_of_a_loader_without_length_is_infinite() -> None:
    run = fit(Net(), stream(), max_epochs=1)
    assert run.estimated_stepping_batches == float("inf")


def test_stopping_waits_for_the_end_of_an_accumulation_window() -> None:
    model = Net()
    run = fit(model, loader(16), max_epochs=2, accumulate_grad_batches=4, callbacks=[StopAt(2)])
    assert (model.count("train"), run.global_step) == (4, 1)


def test_an_epoch_without_batches_ends_the_run_instead_of_repeating_for_ever() -> None:
    with pytest.raises(engine.MisconfigurationException, match="gave no batch in epoch 0"):
        fit(Net(), stream(0), max_epochs=-1, max_steps=5)


def test_a_lower_max_epochs_ends_the_run_at_that_step() -> None:
    class Lowers(engine.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                trainer.max_epochs = trainer.current_epoch

    run = trainer(max_epochs=5, callbacks=Lowers())
    run.fit(Net(), loader())
    assert run.global_step == 3
