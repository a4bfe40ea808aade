"""Whatever the arguments of the Trainer: the same hooks, logs and weights as in Lightning."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import deviations
import engine
import harness
import parts
import pytorch_lightning as lightning
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "60"))
_folders = itertools.count()


def counts(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a Trainer, and lengths of loaders."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "max_epochs": st.integers(0, 3),
        "max_steps": st.sampled_from([-1, 0, 1, 3, 4, 7]),
        "min_epochs": st.integers(0, 3),
        "min_steps": counts(9),
        "limit_train_batches": st.sampled_from([0, 1, 3, 10, 0.0, 0.5, 0.75, 1.0]),
        "limit_val_batches": st.sampled_from([0, 1, 2, 0.0, 0.5, 1.0]),
        "accumulate_grad_batches": st.integers(1, 4),
        "gradient_clip_val": st.sampled_from([None, 0, 0.05, 1.0]),
        "gradient_clip_algorithm": st.sampled_from(["norm", "value"]),
        "val_check_interval": st.sampled_from([1, 2, 3, 5, 0.25, 0.5, 1.0]),
        "check_val_every_n_epoch": st.sampled_from([None, 1, 2, 3]),
        "num_sanity_val_steps": st.sampled_from([-1, 0, 1, 2]),
        "log_every_n_steps": st.sampled_from([1, 2, 3, 50]),
        "overfit_batches": st.sampled_from([0.0, 1, 2]),
        "fast_dev_run": st.sampled_from([False, False, True, 2]),
        "reload_dataloaders_every_n_epochs": counts(2),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(optional)), max_size=6))
    drawn = {name: draw(optional[name]) for name in sorted(chosen)}
    stop = draw(st.one_of(st.none(), st.integers(1, 6)))
    return {
        "options": drawn,
        "train": draw(st.integers(1, 6)),
        "val": draw(st.lists(st.integers(1, 3), max_size=2).map(tuple)),
        "stop": stop,
        "closures": draw(st.booleans()),
    }


def fit(side: harness.Side, options: dict[str, Any], train: int, val: tuple[int, ...], stop: int | None) -> None:
    """Fit, and ask to stop after `stop` steps."""

    class Stop(side.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == stop

    trainer = side.trainer(callbacks=[side.callback(lambda pl: Stop)], **options)
    cls = parts.several if len(val) > 1 else parts.net
    loaders = parts.loaders(val) if len(val) > 1 else parts.loader(val[0], first=50) if val else None
    trainer.fit(side.module(cls), parts.loader(train), loaders)


def deviates(options: dict[str, Any], train: int, theirs: harness.Side) -> bool:
    """Whether a listed deviation changes this run."""
    batches = theirs.last.num_training_batches if theirs.last is not None else train
    window = options.get("accumulate_grad_batches", 1)
    partial_window = bool(batches % window)
    steps = options.get("max_steps", -1)
    ends_within_epoch = steps > 0 and theirs.observed["global_step"] == steps and not theirs.last.is_last_batch
    return partial_window or ends_within_epoch


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    # A failure is told at once: making it smaller takes minutes of training.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(run=runs())
def test_any_arguments(run: dict[str, Any]) -> None:
    closures = run.pop("closures")
    folder = Path.cwd() / str(next(_folders))

    def program(side: harness.Side) -> None:
        fit(side, **run)

    theirs = harness.run_on(lightning, program, closures, folder / "theirs")
    assume(theirs.observed["error"] or not deviates(run["options"], run["train"], theirs))
    ours = harness.run_on(engine, program, closures, folder / "ours")
    if theirs.observed["error"]:
        # It refuses an interval that is too long also where nothing is validated.
        assert ours.observed["error"] or not run["val"], f"Lightning refuses this: {theirs.observed['message']}"
        return
    if run["options"].get("log_every_n_steps", 1) > 1:
        deviations.NUMBERS_ON_LOG_STEPS.apply(ours, theirs)
    harness.compare(ours, theirs)
