"""self.log: defaults by place, names, destinations, where it is forbidden, what it refuses."""

from __future__ import annotations

from typing import Any

import engine
import pytest
import torch
from torchmetrics import MeanMetric
from toy import Memory, Net, Steps, fit, loader, trainer


def logging_in(hook: str, **options: Any) -> Any:
    """A `Net` without other logging that logs x = 1.0 in `hook`."""

    class Logging(Steps):
        def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.log("x", 1.0, **options)
        return getattr(super(model, self), hook)(*args, **kwargs)

    model = type("Logging", (Logging,), {hook: run})
    return model()


TRAIN_HOOKS = [
    *("on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward"),
    *("backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"),
    "on_train_batch_end",
]
EVAL_HOOKS = ["on_validation_batch_start", "validation_step", "on_validation_batch_end"]
EPOCH_HOOKS = [
    *("on_train_start", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"),
]
FORBIDDEN = [
    *("setup", "configure_model", "configure_optimizers", "prepare_data", "on_fit_start", "on_fit_end"),
    *("on_train_end", "on_validation_end", "on_validation_model_eval", "on_validation_model_zero_grad", "teardown"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "on_save_checkpoint"),
    *("train_dataloader", "val_dataloader"),
]


@pytest.mark.parametrize("hook", TRAIN_HOOKS)
def test_in_training_batches_steps_are_logged_by_default(hook: str) -> None:
    logger = Memory()
    fit(logging_in(hook), logger=logger, log_every_n_steps=1)
    assert [step for step, _ in logger.of("x")] == [0, 1, 2, 3]


@pytest.mark.parametrize("hook", [*EVAL_HOOKS, *EPOCH_HOOKS])
def test_elsewhere_the_epoch_is_logged_by_default(hook: str) -> None:
    logger = Memory()
    fit(logging_in(hook), None, loader(), logger=logger, log_every_n_steps=1, num_sanity_val_steps=2)
    assert logger.of("x") == [(3, 1.0)]


@pytest.mark.parametrize("hook", [*TRAIN_HOOKS, *EVAL_HOOKS])
def test_batch_hooks_may_log_both_steps_and_epoch(hook: str) -> None:
    logger = Memory()
    run = fit(logging_in(hook, on_step=True, on_epoch=True), None, loader(), logger=logger, log_every_n_steps=1)
    assert len(logger.of("x_step")) == 4
    assert logger.of("x_epoch") == [(3, 1.0)]
    assert {"x", "x_epoch"} <= set(run.callback_metrics)
    assert not logger.of("x")


@pytest.mark.parametrize("hook", EPOCH_HOOKS)
def test_epoch_hooks_have_no_steps(hook: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match="on_step=True.*only on_epoch works here"):
        fit(logging_in(hook, on_step=True), None, loader())


@pytest.mark.parametrize("hook", FORBIDDEN)
def test_logging_is_refused_where_it_would_be_lost(hook: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match="'x'.*not possible in this hook"):
        train, val = (None if hook == f"{kind}_dataloader" else loader() for kind in ("train", "val"))
        trainer(enable_checkpointing=True).fit(logging_in(hook), train, val)


@pytest.mark.parametrize("hook", ["predict_step", "on_predict_batch_end", "on_predict_epoch_end", "on_predict_start"])
def test_logging_is_refused_in_prediction(hook: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match="not possible in this hook"):
        trainer().predict(logging_in(hook), loader())


def test_callbacks_log_through_the_module() -> None:
    class Logs(engine.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pl_module.log("from_callback", float(batch_idx))

    logger = Memory()
    fit(Net(), callbacks=Logs(), logger=logger, log_every_n_steps=2)
    assert logger.of("from_callback") == [(1, 1.0), (3, 3.0)]


def test_a_module_without_a_trainer_only_warns() -> None:
    with pytest.warns(UserWarning, match="'x'.*does nothing without a Trainer"):
        Net().log("x", 1.0)


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [2, 5]), (4, [3, 7]), (8, [7]), (50, [])]
)
def test_log_every_n_steps_counts_across_epochs_from_zero(every: int, steps: list[int]) -> None:
    logger = Memory()
    fit(Net(), logger=logger, log_every_n_steps=every, max_epochs=2)
    assert [step for step, _ in logger.of("train_loss")] == steps
    assert [row["epoch"] for _, row in logger.rows] == [step // 4 for step in steps]


def test_accumulating_batches_log_nothing() -> None:
    logger = Memory()
    fit(Net(), loader(10), logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
    assert [step for step, _ in logger.of("train_loss")] == [0, 1, 2]


def test_evaluation_steps_have_a_counter_of_their_own_per_loader() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> None:
        model.log("v", float(batch_idx), on_step=True, on_epoch=False)

    logger = Memory()
    run, model = trainer(logger=logger, max_epochs=2, num_sanity_val_steps=2), Steps(validation=step)
    run.fit(model, loader(), [loader(4), loader(2)])
    assert logger.of("v/dataloader_idx_0") == [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)]
    assert logger.of("v/dataloader_idx_1") == [(0, 0.0), (1, 0.0)]


def test_prog_bar_and_logger_choose_the_destinations() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        model.log("bar", 1.0, prog_bar=True, logger=False)
        model.log("both", 2.0, prog_bar=True, on_epoch=True)
        model.log("none", 3.0, logger=False)
        return model.loss(batch)

    logger = Memory()
    run = fit(Steps(step), logger=logger, log_every_n_steps=1)
    logged = {name for _, row in logger.rows for name in row}
    assert logged == {"both_step", "both_epoch", "epoch"}
    assert set(run.logged_metrics) == {"both_step", "both_epoch"}
    assert run.progress_bar_metrics == {"bar": 1.0, "both_step": 2.0, "both_epoch": 2.0}
    assert all(type(value) is float for value in run.progress_bar_metrics.values())
    assert set(run.callback_metrics) == {"bar", "both", "both_step", "both_epoch", "none"}


def test_callback_metrics_are_0d_tensors_and_the_epochs_value_wins() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        model.log("number", float(batch_idx), on_step=True, on_epoch=True)
        model.log("tensor", torch.tensor([batch_idx], dtype=torch.float64), on_epoch=True)
        model.log("whole", batch_idx)
        model.log("loss", model.loss(batch))
        return model.loss(batch)

    metrics = fit(Steps(step)).callback_metrics
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in metrics.values())
    assert not any(value.requires_grad for value in metrics.values())
    assert float(metrics["number"]) == float(metrics["number_epoch"]) == float(metrics["tensor"]) == 1.5
    assert float(metrics["number_step"]) == float(metrics["tensor_step"]) == float(metrics["whole"]) == 3.0


def test_each_entry_point_starts_with_empty_metrics() -> None:
    run = fit(Net(), None, loader())
    assert set(run.callback_metrics) == {"train_loss", "val_loss"}
    run.test(Net(), loader(), verbose=False)
    assert set(run.callback_metrics) == {"test_loss"}


def test_what_was_logged_may_be_changed_in_place_afterwards() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        value = torch.ones(())
        model.log("x", value, on_step=True, on_epoch=True)
        value.fill_(100)
        return model.loss(batch)

    metrics = fit(Steps(step)).callback_metrics
    assert float(metrics["x_step"]) == float(metrics["x_epoch"]) == 1.0


BAD_VALUES = [torch.ones(2), torch.ones(0), "text", None, {"nested": 1.0}, [1.0], 1j]


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
def test_a_senseless_value_is_refused_with_its_name(value: Any) -> None:
    with pytest.raises(engine.MisconfigurationException, match="self.log\\('x', ...\\) was given a"):
        fit(Steps(lambda model, batch, idx: model.log("x", value)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce_fx": "median"}, "give 'mean', 'sum', 'min' or 'max'"),
        ({"reduce_fx": torch.prod}, "give 'mean', 'sum', 'min' or 'max'"),
        ({"on_step": False, "on_epoch": False}, "set one of them to True"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match=message):
        fit(Steps(lambda model, batch, idx: model.log("x", 1.0, **options)))


@pytest.mark.parametrize(
    "other", [{"on_epoch": True}, {"prog_bar": True}, {"logger": False}, {"reduce_fx": "sum"}, {"sync_dist": True}]
)
def test_the_same_name_with_other_options_is_refused(other: dict[str, Any]) -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> None:
        model.log("x", 1.0)
        model.log("x", 1.0, **other)

    with pytest.raises(engine.MisconfigurationException, match="'x'.*called before with other options"):
        fit(Steps(step))


def test_the_same_name_twice_in_a_step_counts_twice() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        model.log("x", 1.0, on_step=True, on_epoch=True)
        model.log("x", torch.tensor(3.0), on_step=True, on_epoch=True)
        return model.loss(batch)

    metrics = fit(Steps(step)).callback_metrics
    assert (float(metrics["x_step"]), float(metrics["x_epoch"])) == (3.0, 2.0)


def test_stages_with_the_same_name_do_not_mix() -> None:
    class Same(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0, on_step=False, on_epoch=True)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("loss", 2.0)

    logger = Memory()
    fit(Same(), None, loader(), logger=logger)
    assert logger.of("loss") == [(3, 2.0), (3, 1.0)]


def test_log_dict_logs_every_item_with_the_same_options() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        model.log_dict({"a": 1.0, "b": torch.tensor(2.0)}, prog_bar=True, on_epoch=True, on_step=False)
        return model.loss(batch)

    assert fit(Steps(step)).progress_bar_metrics == {"a": 1.0, "b": 2.0}


def test_hyper_parameters_of_model_and_data_reach_the_logger() -> None:
    class Data(engine.DataModule):
        def __init__(self, size: int = 6) -> None:
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader(self.hparams.size)

    logger = Memory()
    trainer(logger=logger).fit(Net(lr=0.3), datamodule=Data())
    assert logger.hparams == {"size": 6, "lr": 0.3}


def test_a_step_value_of_an_evaluation_is_logged_once() -> None:
    def step(model: Net, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            model.log("v", 3.0, on_step=True, on_epoch=False)

    logger = Memory()
    trainer(logger=logger).fit(Steps(validation=step), loader(), loader(8))
    assert logger.of("v") == [(0, 3.0)]


def test_a_metric_that_was_only_updated_has_an_epochs_value_and_none_for_steps() -> None:
    class Updates(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.mean.update(loss.detach())
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            return loss

    run = fit(Updates(), logger=(memory := Memory()), log_every_n_steps=1)
    assert len(memory.of("mean_epoch")) == 1 and not memory.of("mean_step")
    assert "mean_epoch" in run.callback_metrics


def test_a_mean_over_batches_of_no_known_size_asks_for_it() -> None:
    def step(model: Net, batch: Any, batch_idx: int, **options: Any) -> Any:
        loss = model.loss(next(iter(loader(2))))
        model.log("loss", loss, on_epoch=True, **options)
        return loss

    with pytest.raises(engine.MisconfigurationException, match="a batch of type str does not tell its size"):
        fit(Steps(step), iter(["one", "two"]))
    fit(Steps(lambda *args: step(*args, batch_size=2)), iter(["one", "two"]))
