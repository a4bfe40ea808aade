"""EMAWeightAveraging: what it averages, who sees it, and where it is kept."""

from __future__ import annotations

from typing import Any

import engine
import pytest
import torch
from engine.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from toy import Net, loader, same_bits, trainer


class Normed(Net):
    """With a batch norm, whose statistics are buffers, one of them an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class Notes(engine.Callback):
    """Keeps copies of the weights: after each step, and as validation sees them."""

    def __init__(self) -> None:
        self.stepped: list[dict[str, Tensor]] = []
        self.judged: list[dict[str, Tensor]] = []

    def on_fit_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
        self.stepped.append(copy(pl_module))

    def on_train_batch_end(self, trainer: engine.Trainer, pl_module: engine.Module, *args: Any) -> None:
        if len(self.stepped) == trainer.global_step:
            self.stepped.append(copy(pl_module))

    def on_validation_batch_start(self, trainer: engine.Trainer, pl_module: engine.Module, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.judged.append(copy(pl_module))


def copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def averaged(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average by its definition."""
    average = dict(steps[0])
    for newest in steps[1:]:
        for name, value in newest.items():
            floating = value.is_floating_point()
            average[name] = average[name].lerp(value, 1 - decay) if floating else value
    return average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_checkpoints_and_the_end_have_the_average(accumulate: int) -> None:
    notes, model = Notes(), Normed()
    saver = ModelCheckpoint("c", "best", monitor="val_loss", save_last=True)
    run = trainer(
        callbacks=[notes, EMAWeightAveraging(decay=0.7), saver],
        enable_checkpointing=True,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=1,
    )
    run.fit(model, loader(), loader(4))
    steps = 4 // accumulate
    expected = [averaged(notes.stepped[1 : 1 + steps * epoch], 0.7) for epoch in (1, 2)]
    # Two validation batches in each epoch.
    assert same_bits(notes.judged, [expected[0]] * 2 + [expected[1]] * 2)
    saved = torch.load("c/last.ckpt", weights_only=True)
    assert same_bits(dict(saved["state_dict"]), expected[1])
    assert same_bits(dict(saved["current_model_state"]), notes.stepped[-1])
    assert same_bits(copy(model), expected[1])
    assert not same_bits(expected[1], notes.stepped[-1])


def test_the_average_moves_every_so_many_steps() -> None:
    notes, model = Notes(), Normed()
    trainer(callbacks=[notes, EMAWeightAveraging(decay=0.5, update_every_n_steps=2)]).fit(model, loader())
    assert same_bits(copy(model), averaged([notes.stepped[1], notes.stepped[3]], 0.5))


def test_a_validation_that_fails_leaves_the_modules_own_weights() -> None:
    class Fails(Normed):
        def on_validation_epoch_end(self) -> None:
            raise ValueError("fails")

    notes, model = Notes(), Fails()
    with pytest.raises(ValueError, match="fails"):
        trainer(callbacks=[notes, EMAWeightAveraging(decay=0.9)]).fit(model, loader(), loader())
    assert same_bits(copy(model), notes.stepped[-1])


def test_what_is_saved_within_validation_holds_both_in_their_places() -> None:
    class Saves(engine.Callback):
        def on_validation_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
            trainer.save_checkpoint("within.ckpt")

    notes = Notes()
    trainer(callbacks=[notes, EMAWeightAveraging(decay=0.9), Saves()]).fit(Normed(), loader(), loader())
    saved = torch.load("within.ckpt", weights_only=True)
    assert same_bits(dict(saved["current_model_state"]), notes.stepped[-1])
    assert same_bits(dict(saved["state_dict"]), averaged(notes.stepped[1:], 0.9))


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"update_every_n_steps": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(engine.MisconfigurationException, match="give a decay from 0 to below 1"):
        EMAWeightAveraging(**options)
