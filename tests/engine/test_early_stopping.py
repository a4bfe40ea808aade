"""EarlyStopping: every reason to stop, and when there is none."""

from __future__ import annotations

from typing import Any

import engine
import pytest
from engine.callbacks import EarlyStopping
from toy import Net, loader, trainer

NAN, INF = float("nan"), float("inf")


class Scores(Net):
    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("score", self.scores[self.current_epoch])


def epochs(scores: list[float], stopping: EarlyStopping, **options: Any) -> int:
    """How many epochs were trained."""
    run = trainer(callbacks=stopping, **{"max_epochs": len(scores), **options})
    run.fit(Scores(scores), loader(2), loader(2))
    return run.current_epoch


@pytest.mark.parametrize(
    ("scores", "options", "expected", "reason"),
    [
        ([5, 4, 3, 2], {}, 4, ""),
        ([5, 6, 6, 6, 6], {}, 4, "not been better than 5 for 3 checks"),
        ([5, 5, 5, 5, 5], {}, 4, "not been better"),
        ([5, 6, 6, 4, 6, 6, 6, 6], {}, 7, "not been better than 4"),
        ([5, 6, 6], {"patience": 1}, 2, "for 1 checks"),
        ([1, 0, 0, 0, 0], {"mode": "max", "patience": 2}, 3, "not been better than 1"),
        ([1, 2, 3, 4], {"mode": "max"}, 4, ""),
        ([5, NAN, 1], {}, 2, "score is nan"),
        ([5, INF, 1], {}, 2, "score is inf"),
        ([5, NAN, 1, 1], {"check_finite": False, "patience": 3}, 4, ""),
        ([5, 0.9, 0], {"stopping_threshold": 1.0}, 2, "passed stopping_threshold=1.0"),
        ([5, 1.0, 1.0], {"stopping_threshold": 1.0}, 3, ""),
        ([0, 0.9, 1], {"mode": "max", "stopping_threshold": 0.5}, 2, "passed stopping_threshold=0.5"),
        ([5, 11, 4], {"divergence_threshold": 10.0}, 2, "passed divergence_threshold=10.0"),
        ([5, 10, 4], {"divergence_threshold": 10.0}, 3, ""),
        ([5, -1, 6], {"mode": "max", "divergence_threshold": 0.0}, 2, "passed divergence_threshold=0.0"),
        # An improvement by exactly min_delta is none.
        ([4, 3, 2, 1], {"min_delta": 1.0, "patience": 1}, 2, "not been better than 4"),
        ([4, 3, 2, 1], {"min_delta": 0.99, "patience": 1}, 4, ""),
        ([1, 2, 3, 4], {"mode": "max", "min_delta": 1.0, "patience": 2}, 4, ""),
        ([1, 2, 2, 2], {"mode": "max", "min_delta": 1.0, "patience": 2}, 3, "not been better than 1"),
    ],
)
def test_training_stops_after(scores: list[float], options: dict[str, Any], expected: int, reason: str) -> None:
    stopping = EarlyStopping("score", **options)
    assert epochs(scores, stopping) == expected
    message = stopping.stopping_reason_message or ""
    assert reason in message and bool(reason) == bool(message)
    if reason:
        assert stopping.stopped_epoch == expected - 1


def test_minimum_epochs_are_honoured() -> None:
    assert epochs([5] * 9, EarlyStopping("score", patience=1), min_epochs=6) == 6


def test_patience_counts_checks_not_epochs() -> None:
    assert epochs([5] * 9, EarlyStopping("score", patience=2), check_val_every_n_epoch=2) == 6


def test_a_value_of_the_training_epoch_can_be_watched() -> None:
    class Late(Net):
        def on_train_epoch_end(self) -> None:
            self.log("late", 1.0)

    run = trainer(callbacks=EarlyStopping("late", patience=1), max_epochs=9)
    run.fit(Late(), loader(2))
    assert run.current_epoch == 2


def test_several_watch_different_values_and_keep_their_own_state() -> None:
    first, second = EarlyStopping("score", patience=9), EarlyStopping("score", mode="max", patience=9)
    run = trainer(callbacks=[first, second], max_epochs=2)
    run.fit(Scores([1.0, 2.0]), loader(2), loader(2))
    assert (first.wait_count, second.wait_count) == (1, 0)
    assert first.state_key != second.state_key


def test_the_sanity_check_is_no_check() -> None:
    stopping = EarlyStopping("score", patience=1)
    assert epochs([5, 4, 3], stopping, num_sanity_val_steps=2) == 3


@pytest.mark.parametrize(("options", "message"), [({"mode": "best"}, "mode='best'"), ({"patience": -1}, "patience=-1")])
def test_senseless_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match=message):
        EarlyStopping("score", **options)
