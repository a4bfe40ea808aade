"""What ModelCheckpoint writes, when EarlyStopping stops, and how a run goes on from a file."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import deviations
import parts
import pytest
import torch
from harness import Side, same

# What is logged as val_score, epoch by epoch.
SCORES = [3.0, 2.0, 2.5, 2.5, 1.0, 1.5]


def scored(pl: Any) -> type:
    class Scored(parts.net(pl)):  # type: ignore[misc]
        def __init__(self, scores: Any = None) -> None:
            super().__init__()
            self.scores = scores or SCORES

        def on_validation_epoch_end(self) -> None:
            self.log("val_score", self.scores[self.current_epoch])

    return Scored


def checkpointed(side: Side, checkpoint: dict[str, Any], **options: Any) -> Any:
    """Fit six epochs with a ModelCheckpoint, and observe what it knows of its files."""
    callback = side.pl.callbacks.ModelCheckpoint(**{"dirpath": "files", **checkpoint})
    options = {"max_epochs": 6, "enable_checkpointing": True, "num_sanity_val_steps": 0, **options}
    trainer = side.trainer(callbacks=[side.callback(), callback], **options)
    try:
        trainer.fit(side.module(scored), parts.loader(4), parts.loader(2, first=50))
    finally:
        for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
            path = getattr(callback, name)
            side.observe(name, path and str(Path(path).resolve().relative_to(Path.cwd().resolve())))
        side.observe("best", callback.best_model_score)
        last = callback.last_model_path and torch.load(callback.last_model_path, weights_only=False)["global_step"]
        side.observe("last_step", last)
        side.observe("kept", sorted(float(score) for score in callback.best_k_models.values()))
    return trainer


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "default": {},
    "folder_of_the_logger": {"dirpath": None},
    "keep_all": {"save_top_k": -1},
    "keep_none": {"save_top_k": 0},
    "best": {"monitor": "val_score"},
    "best_two": {"monitor": "val_score", "save_top_k": 2},
    "all_by_score": {"monitor": "val_score", "save_top_k": -1},
    "greatest": {"monitor": "val_score", "mode": "max"},
    "every_2_epochs": {"every_n_epochs": 2, "save_top_k": -1},
    "every_3_steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "every_4_steps_by_train_loss": {"every_n_train_steps": 4, "monitor": "train_loss_step", "save_top_k": 2},
    "long_time": {"train_time_interval": timedelta(hours=1)},
    "file_name": {"monitor": "val_score", "filename": "{epoch:02d}-{val_score:.2f}", "save_top_k": 2},
    "file_name_without_names": {
        "monitor": "val_score",
        "filename": "e{epoch}-s{step}-{val_score:.1f}",
        "auto_insert_metric_name": False,
    },
    "fixed_file_name": {"filename": "fixed", "save_top_k": 2, "monitor": "val_score"},
    "fixed_and_overwritten": {"filename": "fixed", "enable_version_counter": False},
    "last": {"save_last": True},
    "last_and_all": {"save_last": True, "save_top_k": -1},
    "at_train_epoch_end": {"monitor": "train_loss_epoch", "save_on_train_epoch_end": True},
    "at_validation_end": {"monitor": "val_score", "save_on_train_epoch_end": False},
    "weights_only": {"save_weights_only": True},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_files(name: str) -> None:
    expected = {
        "default": [deviations.LOGGED_BEFORE_SAVING],
        "last": [deviations.SAVED_ONCE],
        "every_3_steps": [deviations.MONITORING_LAST],
        "every_4_steps_by_train_loss": [deviations.MONITORING_LAST],
    }
    same(lambda side: checkpointed(side, CHECKPOINTS[name]), *expected.get(name, []))


def test_last_follows_every_trigger() -> None:
    program = lambda side: checkpointed(side, {"monitor": "val_score", "save_last": True})  # noqa: E731
    same(program, deviations.LAST_IS_NEWEST)


@pytest.mark.parametrize(
    "options",
    [{"check_val_every_n_epoch": 2}, {"val_check_interval": 2}, {"limit_val_batches": 0}, {"fast_dev_run": True}],
    ids=str,
)
def test_files_and_validation(options: dict[str, Any]) -> None:
    checkpoint = {} if "limit_val_batches" in options else {"monitor": "val_score", "save_top_k": 2}
    same(lambda side: checkpointed(side, checkpoint, **options))


def test_a_checkpoint_is_made_by_default() -> None:
    def program(side: Side) -> None:
        trainer = side.trainer(enable_checkpointing=True)
        trainer.fit(side.module(), parts.loader(4), parts.loader(1))
        side.observe("kind", type(trainer.checkpoint_callback).__name__)

    same(program)


def stopped(side: Side, stopping: dict[str, Any], scores: Any = None, **options: Any) -> None:
    """Fit up to six epochs with an EarlyStopping, and observe its state."""
    callback = side.pl.callbacks.EarlyStopping(**{"monitor": "val_score", **stopping})
    trainer = side.trainer(**{"callbacks": [side.callback(), callback], "max_epochs": 6, **options})
    try:
        trainer.fit(side.module(scored, scores=scores), parts.loader(4), parts.loader(2, first=50))
    finally:
        for name in ("stopped_epoch", "wait_count", "best_score"):
            side.observe(name, getattr(callback, name))


STOPPINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patience_1": ({"patience": 1}, {}),
    "patience_2": ({"patience": 2}, {}),
    "patience_3": ({}, {}),
    "patience_0": ({"patience": 0}, {}),
    "min_delta": ({"patience": 1, "min_delta": 1.0}, {}),
    "greatest": ({"patience": 2, "mode": "max"}, {}),
    "threshold": ({"stopping_threshold": 2.2}, {}),
    "divergence": ({"divergence_threshold": 2.4, "patience": 5}, {}),
    "not_finite": ({}, {"scores": [1.0, float("nan")] * 3}),
    "not_finite_and_unchecked": ({"check_finite": False}, {"scores": [1.0, float("nan"), 2.0, 3.0, 4.0, 5.0]}),
    "train_metric": ({"monitor": "train_loss_epoch", "patience": 0, "mode": "max"}, {}),
    "at_train_epoch_end": ({"patience": 1, "check_on_train_epoch_end": True}, {}),
    "at_validation_end": ({"patience": 1, "check_on_train_epoch_end": False}, {}),
    "interval": ({"patience": 2}, {"val_check_interval": 2}),
    "every_2_epochs": ({"patience": 1}, {"check_val_every_n_epoch": 2}),
    "min_epochs": ({"patience": 1}, {"min_epochs": 5}),
    "fast_dev_run": ({"patience": 0}, {"fast_dev_run": True}),
    "missing_and_not_strict": ({"monitor": "nothing", "strict": False}, {"max_epochs": 2}),
    "missing": ({"monitor": "nothing"}, {}),
}


@pytest.mark.parametrize("name", STOPPINGS)
def test_early_stopping(name: str) -> None:
    stopping, options = STOPPINGS[name]
    expected = [deviations.TEARDOWN_AFTER_ERROR, deviations.LOGGED_BEFORE_ERROR, deviations.REFUSED] * (
        name == "missing"
    )
    same(lambda side: stopped(side, stopping, **options), *expected)


def resumed(side: Side, first: dict[str, Any], second: dict[str, Any], file: str, **checkpoint: Any) -> None:
    """Fit, then go on from a file with a new trainer, module, data module and callbacks."""
    keeping = side.pl.callbacks.ModelCheckpoint(**{"dirpath": "files", "save_top_k": -1, **checkpoint})
    trainer = side.trainer(callbacks=[side.callback(), keeping], enable_checkpointing=True, **first)
    trainer.fit(side.module(), datamodule=side.datamodule())
    side.note("resume")
    trainer = side.trainer(**second)
    trainer.fit(side.module(), datamodule=side.datamodule(), ckpt_path=file)


def test_resume_from_the_end_of_an_epoch() -> None:
    program = lambda side: resumed(side, {"max_epochs": 1}, {"max_epochs": 3}, "files/epoch=0-step=4.ckpt")  # noqa: E731
    same(program, deviations.EPOCH_AFTER_RESUME, deviations.ASKED_BEFORE_RESUME)


def test_resume_of_a_run_that_is_over() -> None:
    program = lambda side: resumed(side, {"max_epochs": 2}, {"max_epochs": 2}, "files/epoch=1-step=8.ckpt")  # noqa: E731
    same(program, deviations.EPOCH_AFTER_RESUME, deviations.ASKED_BEFORE_RESUME, deviations.METRICS_RESTORED)


def test_resume_within_an_epoch() -> None:
    def program(side: Side) -> None:
        resumed(side, {"max_epochs": 2}, {"max_epochs": 3}, "files/epoch=1-step=6.ckpt", every_n_train_steps=3)

    same(program, deviations.MONITORING_LAST, deviations.POSITION_RESTORED)


def stateful(pl: Any) -> type:
    class Stateful(pl.Callback):
        seen = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen += 1

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seen = state_dict["seen"]

    return Stateful


def test_states_of_callbacks_and_optimizers_are_restored() -> None:
    def program(side: Side) -> None:
        trainer = side.trainer(callbacks=[side.callback(stateful)], max_epochs=1)
        trainer.fit(side.module(adam), parts.loader(4))
        trainer.save_checkpoint("mine.ckpt")
        again = side.callback(stateful)
        trainer = side.trainer(callbacks=[again], max_epochs=2)
        trainer.fit(side.module(adam), parts.loader(4), ckpt_path="mine.ckpt")
        side.observe("seen", again.seen)

    same(program)


def adam(pl: Any) -> type:
    class WithAdam(parts.net(pl)):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = 1

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert checkpoint["mine"] == 1

    return WithAdam


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("which", ["files/epoch=0-step=4.ckpt", "best", "last"])
def test_evaluation_of_a_file(stage: str, which: str) -> None:
    def program(side: Side) -> None:
        checkpoint = side.pl.callbacks.ModelCheckpoint(dirpath="files", save_top_k=-1, save_last=True)
        trainer = side.trainer(callbacks=[side.callback(), checkpoint], enable_checkpointing=True)
        datamodule = side.datamodule()
        trainer.fit(side.module(), datamodule=datamodule)
        side.observe(stage, getattr(trainer, stage)(side.last_module, datamodule=datamodule, ckpt_path=which))

    same(program)


def hyperparameters(pl: Any) -> type:
    class Hyperparameters(parts.net(pl)):  # type: ignore[misc]
        def __init__(self, lr: float = 0.1, width: int = 4) -> None:
            super().__init__(lr)
            self.save_hyperparameters()

    return Hyperparameters


def test_load_from_checkpoint() -> None:
    def program(side: Side) -> None:
        trainer = side.trainer()
        trainer.fit(side.module(hyperparameters, lr=0.05), parts.loader(4))
        trainer.save_checkpoint("mine.ckpt")
        loaded = hyperparameters(side.pl).load_from_checkpoint("mine.ckpt", width=5)
        side.observe("hparams", dict(loaded.hparams))
        side.observe("loaded", loaded.state_dict())

    same(program)
