"""Every argument of the Trainer does what its docstring says: a test for each, by name."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from engine.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from toy import Memory, Net, Steps, dataset, fit, loader, trainer, weights


@pytest.fixture(autouse=True)
def usual_kernels() -> Iterator[None]:
    """What is set for all of torch, put back."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


class Notes(engine.Callback):
    """Notes the calls of some hooks."""

    def __init__(self, name: str = "") -> None:
        self.name, self.seen = name, list[str]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append("train")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append("sanity" if trainer.sanity_checking else "validation")


def test_every_argument_has_a_test() -> None:
    names = [p.name for p in inspect.signature(engine.Trainer).parameters.values() if p.kind is p.KEYWORD_ONLY]
    missing = [name for name in names if not any(test.startswith(f"test_{name}") for test in globals())]
    assert len(names) >= 40 and missing == []


# Devices and processes; more of them in test_torchrun.py


def test_accelerator_decides_where_the_model_is() -> None:
    run = fit(Net(), accelerator="cpu")
    assert run.device == torch.device("cpu") == run.module.device
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert trainer(accelerator="auto").device.type == best


def test_devices_is_the_number_of_processes() -> None:
    for devices in (1, "1", "auto"):
        assert trainer(devices=devices).num_devices == 1
    with pytest.raises(engine.MisconfigurationException, match="torchrun --nproc-per-node 2"):
        trainer(devices=2)


def test_num_nodes_is_the_number_of_machines() -> None:
    assert trainer(num_nodes=1).num_nodes == 1
    with pytest.raises(engine.MisconfigurationException, match="torchrun --nnodes 3"):
        trainer(num_nodes=3)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true"])
def test_strategy_changes_nothing_in_a_single_process(strategy: str) -> None:
    engine.seed_everything(1)
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    fit(model, strategy=strategy)
    fit(plain)
    assert weights(model).equal(weights(plain))


def test_use_distributed_sampler_changes_no_order_in_a_single_process() -> None:
    ends = []
    for share in (True, False):
        engine.seed_everything(1)
        fit(model := Net(), loader(16, shuffle=True), use_distributed_sampler=share)
        ends.append(weights(model))
    assert ends[0].equal(ends[1])


def test_sync_batchnorm_is_for_several_processes() -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    run = fit(Normed(), sync_batchnorm=True)
    assert [type(part) for part in run.module.net] == [nn.Linear, nn.BatchNorm1d, nn.Linear]


# Number formats; autocast in test_precision.py

TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16, "32-true": torch.float32}


@pytest.mark.parametrize("precision", TRUE)
def test_precision_is_that_of_weights_data_and_what_is_made_in_a_step(precision: Any) -> None:
    kind, seen = TRUE[precision], set[Any]()

    class Look(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.update(part.dtype for part in (*batch, torch.ones(1), self.net.weight))
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.add(self.net.weight.grad.dtype)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.add(self(batch[0]).dtype)
            super().validation_step(batch, batch_idx)

        def configure_model(self) -> None:
            seen.add(nn.Linear(1, 1).weight.dtype)

    model, run = Look(), trainer(precision=precision, max_epochs=4)
    [before] = run.validate(model, loader(32, 8), verbose=False)
    run.fit(model, loader(32, 8), loader(32, 8))
    assert seen == {kind} and torch.get_default_dtype() == torch.float32
    assert float(run.callback_metrics["val_loss"]) < before["val_loss"]
    run.save_checkpoint("a.ckpt")
    assert torch.load("a.ckpt", weights_only=True)["state_dict"]["net.weight"].dtype == kind
    predictions = run.predict(model, loader(8, 8))
    assert predictions is not None and predictions[0].dtype == kind


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_precision_of_all_goes_on_with_the_same_bits(precision: Any) -> None:
    def train(ckpt_path: Any = None) -> Tensor:
        engine.seed_everything(3 if ckpt_path is None else 9)
        saver = ModelCheckpoint("c", "{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(precision=precision, callbacks=saver, enable_checkpointing=True, max_epochs=2)
        run.fit(model := Net(), loader(8, shuffle=True), ckpt_path=ckpt_path)
        return weights(model)

    whole = train()
    assert train("c/step=3.ckpt").equal(whole) and train("c/step=6.ckpt").equal(whole)


def test_precision_has_short_names() -> None:
    names = {32: "32-true", "32": "32-true", None: "32-true", 16: "16-mixed", "16": "16-mixed", "bf16": "bf16-mixed"}
    names |= {64: "64-true", "64": "64-true"}
    for given, meant in names.items():
        assert trainer(precision=given).precision == meant


# What is added to a run


def test_logger_may_be_one_several_the_usual_one_or_none(tmp_path: Path) -> None:
    one, two = Memory(), CSVLogger(".", "logs", "v")
    fit(Net(), logger=[one, two], log_every_n_steps=1)
    assert len(one.of("train_loss")) == 4 and Path("logs/v/metrics.csv").is_file()
    assert trainer(logger=one).loggers == [one] and trainer(logger=one).logger is one
    assert trainer(logger=False).loggers == [] and trainer(logger=False).logger is None
    assert [type(each) for each in trainer(logger=True).loggers] == [TensorBoardLogger]


def test_callbacks_are_one_or_several_in_order_with_checkpoints_last() -> None:
    first, second, saver = Notes("first"), Notes("second"), ModelCheckpoint("c")
    assert trainer(callbacks=first).callbacks == [first]
    run = fit(Net(), callbacks=[saver, first, second], enable_checkpointing=True)
    assert run.callbacks == [first, second, saver] and first.seen == second.seen == ["train"]


def test_enable_checkpointing_saves_the_newest_by_default() -> None:
    fit(Net(), enable_checkpointing=True, max_epochs=2)
    assert [file.name for file in Path("checkpoints").iterdir()] == ["epoch=1-step=8.ckpt"]
    fit(Net(), enable_checkpointing=False, default_root_dir="other")
    assert not Path("other").exists()


def test_enable_progress_bar_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net(), enable_progress_bar=True)
    assert "epoch" in capsys.readouterr().out.lower()
    run = fit(Net(), enable_progress_bar=False)
    assert capsys.readouterr().out == "" and run.progress_bar_callback is None


def test_enable_model_summary_shows_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net(), enable_model_summary=True)
    assert "Linear" in capsys.readouterr().out
    fit(Net(), enable_model_summary=False)
    assert capsys.readouterr().out == ""


def test_default_root_dir_is_where_files_go_without_a_logger(tmp_path: Path) -> None:
    run = fit(Net(), default_root_dir="here", enable_checkpointing=True)
    assert run.default_root_dir == "here" and run.checkpoint_callback is not None
    assert [*Path("here/checkpoints").iterdir()] == [Path(run.checkpoint_callback.best_model_path)]
    run = fit(Net(), default_root_dir=Path("there"), enable_checkpointing=True, logger=True)
    assert Path(run.log_dir or "").is_relative_to("there") and [*Path(run.log_dir or "").glob("events*")]
    assert {file.name for file in tmp_path.iterdir()} == {"here", "there"}


def test_enable_autolog_hparams_hands_arguments_to_loggers() -> None:
    for enabled in (True, False):
        logger = Memory()
        fit(Net(lr=0.05), logger=logger, enable_autolog_hparams=enabled)
        assert logger.hparams == ({"lr": 0.05} if enabled else {})


def test_profiler_tells_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net(), profiler="simple")
    told = capsys.readouterr()
    assert "training_step" in told.out + told.err
    fit(Net(), profiler=None)
    assert capsys.readouterr().out == ""


# How long


def test_fast_dev_run_tries_every_kind_of_batch_and_writes_nothing(tmp_path: Path) -> None:
    model, options = Net(), {"logger": Memory(), "enable_checkpointing": True, "callbacks": ModelCheckpoint("c")}
    run = fit(model, loader(16), loader(16), fast_dev_run=3, max_epochs=9, num_sanity_val_steps=2, **options)
    run.test(model, loader(16), verbose=False)
    run.predict(model, loader(16))
    assert [model.count(stage) for stage in ("train", "val", "test")] == [3, 3, 3]
    assert [*tmp_path.iterdir()] == [] and run.current_epoch == 1


def test_max_epochs_ends_a_run() -> None:
    assert fit(Net(), max_epochs=3).current_epoch == 3
    assert fit(Net(), max_epochs=0).global_step == 0
    assert trainer(max_epochs=None).max_epochs == 1000
    assert fit(Net(), max_epochs=-1, max_steps=9).global_step == 9


def test_min_epochs_and_min_steps_hold_off_a_request_to_stop() -> None:
    class Stops(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = True

    assert fit(Stops(), max_epochs=5).global_step == 1
    assert fit(Stops(), max_epochs=5, min_epochs=2).global_step == 8
    assert fit(Stops(), max_epochs=5, min_steps=6).global_step == 6


test_min_steps = test_min_epochs_and_min_steps_hold_off_a_request_to_stop


@pytest.mark.parametrize("window", [1, 3])
def test_max_steps_counts_optimizer_steps(window: int) -> None:
    run = fit(Net(), loader(24), max_steps=5, max_epochs=-1, accumulate_grad_batches=window)
    assert run.global_step == 5 and run.state.total_batches == (5 if window == 1 else 15)


@pytest.mark.parametrize("span", ["00:00:00:01", timedelta(seconds=0.2), {"milliseconds": 200}], ids=str)
def test_max_time_ends_a_run_and_lifts_other_limits(span: Any) -> None:
    begin = time.monotonic()
    step = lambda model, batch, batch_idx: time.sleep(0.01) or model.loss(batch)  # noqa: E731
    run = fit(Steps(step), max_epochs=None, max_time=span)
    assert run.global_step > 10 and 0.19 < time.monotonic() - begin < 5


@pytest.mark.parametrize("limit", [3, 0.5, 0, 1.0, 99])
def test_limit_train_val_test_and_predict_batches(limit: Any) -> None:
    model = Net()
    names = [f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")]
    run = fit(model, loader(16), loader(16), **dict.fromkeys(names, limit))
    run.test(model, loader(16), verbose=False)
    expected = {3: 3, 0.5: 4, 0: 0, 1.0: 8, 99: 8}[limit]
    assert len(run.predict(model, loader(16)) or []) == expected
    # Without training there is no validation.
    counts = [model.count(stage) for stage in ("train", "val", "test")]
    assert counts == [expected, expected if expected else 0, expected]


test_limit_val_batches = test_limit_test_batches = test_limit_predict_batches = (
    test_limit_train_val_test_and_predict_batches
)
test_limit_train_batches = test_limit_train_val_test_and_predict_batches


class Indexed(Dataset[Any]):
    """Samples that know their number, noisy by torch's random numbers."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = dataset(64)[index]
        return torch.cat([x[:2], torch.tensor([float(index)])]), y


@pytest.mark.parametrize(("share", "batches"), [(2, 2), (0.25, 4)])
def test_overfit_batches_trains_on_the_same_few_batches(share: Any, batches: int) -> None:
    seen: dict[str, list[list[float]]] = {"train": [], "val": []}

    def training(model: Net, batch: Any, batch_idx: int) -> Tensor:
        seen["train"].append(batch[0][:, 2].tolist())
        return model.loss((batch[0] / 64, batch[1]))

    def validation(model: Net, batch: Any, batch_idx: int) -> None:
        seen["val"].append(batch[0][:, 2].tolist())

    data = [DataLoader(Indexed(), 4, shuffle=True) for _ in range(2)]
    fit(Steps(training, validation), *data, overfit_batches=share, max_epochs=3)
    ordered = [[float(4 * batch + n) for n in range(4)] for batch in range(batches)]
    assert seen == {"train": ordered * 3, "val": ordered * 3}


def test_overfit_batches_reaches_a_loss_of_nearly_zero() -> None:
    model = Net(lr=0.3)
    model.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
    run = fit(model, loader(64, 4, shuffle=True), overfit_batches=1, max_epochs=300)
    assert run.global_step == 300 and float(run.callback_metrics["train_loss"]) < 1e-3


# Validation and logs; more in test_val_check_interval.py and test_log.py


def test_val_check_interval_and_check_val_every_n_epoch_say_when_to_validate() -> None:
    for options, count in (
        ({"val_check_interval": 2}, 8),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": 2}, 4),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 5),
        ({"check_val_every_n_epoch": 4}, 1),
    ):
        fit(Net(), None, loader(2), max_epochs=4, callbacks=(notes := Notes()), **options)
        assert notes.seen == ["train", *["validation"] * count]


test_check_val_every_n_epoch = test_val_check_interval_and_check_val_every_n_epoch_say_when_to_validate


@pytest.mark.parametrize(("steps", "expected"), [(0, 0), (2, 2), (-1, 8), (99, 8)])
def test_num_sanity_val_steps_tries_validation_first(steps: int, expected: int) -> None:
    model, notes, logger = Net(), Notes(), Memory()
    run = trainer(num_sanity_val_steps=steps, callbacks=notes, logger=logger)
    run.fit(model, loader(), loader(16))
    assert notes.seen == [*["sanity"] * bool(expected), "train", "validation"]
    assert model.seen[:expected] == [("val", n) for n in range(expected)] and model.count("val") == expected + 8
    assert len(logger.of("val_loss")) == 1


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3]), (3, [2]), (0, []), (None, [])])
def test_log_every_n_steps_thins_out_step_values(every: int | None, steps: list[int]) -> None:
    logger = Memory()
    fit(Net(), logger=logger, log_every_n_steps=every)
    assert [step for step, _ in logger.of("train_loss")] == steps


# The optimizer's step; against loops by hand in test_training.py


@pytest.mark.parametrize("window", [1, 2, 4])
def test_accumulate_grad_batches_takes_fewer_and_equal_steps(window: int) -> None:
    model, whole = Net(), Net()
    whole.load_state_dict(model.state_dict())
    run = fit(model, loader(16, 16 // (4 * window)), accumulate_grad_batches=window)
    fit(whole, loader(16, 4))
    assert run.global_step == 4
    torch.testing.assert_close(weights(model), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("algorithm", "largest"), [(None, 0.02), ("norm", 0.02), ("value", math.inf)])
def test_gradient_clip_val_and_gradient_clip_algorithm_limit_gradients(algorithm: Any, largest: float) -> None:
    sizes: list[Tensor] = []

    class Look(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            sizes.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

    fit(Look(), gradient_clip_val=0.02, gradient_clip_algorithm=algorithm)
    assert all(gradient.norm() <= largest * 1.001 for gradient in sizes)
    assert all(gradient.abs().max() <= 0.02 * 1.001 for gradient in sizes)
    assert algorithm != "value" or any(gradient.norm() > 0.03 for gradient in sizes)


test_gradient_clip_algorithm = test_gradient_clip_val_and_gradient_clip_algorithm_limit_gradients


# Kernels


def test_deterministic_refuses_or_tells_of_kernels_that_are_not() -> None:
    trainer(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    trainer(deterministic="warn")
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    trainer(deterministic=None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_benchmark_is_cudnns() -> None:
    for wanted in (True, False):
        trainer(benchmark=wanted)
        assert torch.backends.cudnn.benchmark is wanted


@pytest.mark.parametrize("wanted", [True, False])
def test_inference_mode_is_for_evaluation_on_its_own(wanted: bool) -> None:
    seen: list[tuple[bool, bool]] = []
    note = lambda *args: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))  # noqa: E731
    model, run = Steps(validation=note), trainer(inference_mode=wanted)
    run.fit(model, loader(), loader(2))
    run.validate(model, loader(2), verbose=False)
    assert seen == [(False, False), (wanted, False)]


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_detect_anomaly_names_the_operation_whose_gradient_is_nan() -> None:
    # The loss is finite, its gradient is not.
    step = lambda model, batch, batch_idx: (model(batch[0]) * 0).sum().sqrt() + model.loss(batch)  # noqa: E731
    with pytest.raises(RuntimeError, match="Function .*Backward0.* returned nan values"):
        fit(Steps(step), detect_anomaly=True)
    assert not torch.is_anomaly_enabled()
    model = Steps(step)
    fit(model, detect_anomaly=False, detect_nonfinite="off")
    assert weights(model).isnan().any()


def test_detect_nonfinite_ends_warns_or_lets_go_on() -> None:
    step = lambda model, batch, batch_idx: model.loss(batch) * (math.nan if batch_idx == 1 else 1)  # noqa: E731
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        fit(Steps(step), detect_nonfinite="raise")
    with pytest.warns(UserWarning, match="the loss is nan at step 1"):
        assert fit(Steps(step), detect_nonfinite="warn").global_step == 4
    assert fit(Steps(step), detect_nonfinite="off").global_step == 4


def test_async_save_writes_the_same_files(tmp_path: Path) -> None:
    files = []
    for background in (False, True):
        engine.seed_everything(1)
        saver = ModelCheckpoint(f"c{background}", "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(Net(), callbacks=saver, enable_checkpointing=True, async_save=background)
        found = [
            torch.load(file, weights_only=True)["state_dict"] for file in sorted(Path(saver.dirpath or "").iterdir())
        ]
        files.append([weights_of["net.weight"].tolist() for weights_of in found])
    assert files[0] == files[1] and len(files[0]) == 4


def test_barebones_leaves_out_everything_beside_the_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plain, notes = Net(), Net(), Notes()
    plain.load_state_dict(model.state_dict())
    run = engine.Trainer(accelerator="cpu", barebones=True, max_epochs=2, callbacks=notes)
    run.fit(model, loader(), loader(4))
    fit(plain, max_epochs=2)
    assert weights(model).equal(weights(plain)) and notes.seen == ["train", "validation", "validation"]
    assert [*tmp_path.iterdir()] == [] and run.loggers == [] and run.callbacks == [notes]
    assert capsys.readouterr().out == ""


# Loaders


class Curriculum(engine.DataModule):
    """Its training set grows by an epoch; counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []

    def train_dataloader(self) -> Any:
        epoch = self.trainer.current_epoch
        self.asked.append(("train", epoch))
        return loader(4 + 2 * epoch)

    def val_dataloader(self) -> Any:
        self.asked.append(("val", self.trainer.current_epoch))
        return loader(2)


@pytest.mark.parametrize(("every", "epochs"), [(0, [0]), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_reload_dataloaders_every_n_epochs_asks_again(every: int, epochs: list[int]) -> None:
    data, model = Curriculum(), Net()
    run = trainer(max_epochs=4, reload_dataloaders_every_n_epochs=every)
    run.fit(model, datamodule=data)
    assert [epoch for kind, epoch in data.asked if kind == "train"] == epochs
    assert [epoch for kind, epoch in data.asked if kind == "val"] == epochs
    sizes = [2 + max(known for known in epochs if known <= epoch) for epoch in range(4)]
    assert run.global_step == sum(sizes)


class Remembers(IterableDataset[Any]):
    """Goes on where it stopped, on its own: its order is drawn from a generator that nobody else sees."""

    def __init__(self) -> None:
        self.random, self.left = random.Random(3), list[int]()

    def __iter__(self) -> Iterator[Any]:
        if not self.left:
            self.left = self.random.sample(range(12), 12)
        while self.left:
            yield dataset(12)[self.left.pop()]

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left, "random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = state["left"]
        self.random.setstate(state["random"])


@pytest.mark.parametrize(("kind", "every"), [("stateful", 2), ("shuffled", 2), ("growing", 1)])
def test_reload_dataloaders_goes_on_with_the_same_bits(kind: str, every: int) -> None:
    class Data(engine.DataModule):
        def train_dataloader(self) -> Any:
            if kind == "stateful":
                return DataLoader(Remembers(), 4)
            return loader(12 + 4 * self.trainer.current_epoch * (kind == "growing"), 4, shuffle=True)

    def train(ckpt_path: Any = None) -> Tensor:
        engine.seed_everything(3 if ckpt_path is None else 9)
        saver = ModelCheckpoint("c", "{step}", every_n_train_steps=1, save_top_k=-1)
        options: dict[str, Any] = {"callbacks": saver, "enable_checkpointing": True, "max_epochs": 4}
        run = trainer(**options, reload_dataloaders_every_n_epochs=every)
        run.fit(model := Net(), datamodule=Data(), ckpt_path=ckpt_path)
        return weights(model)

    whole = train()
    for step in (2, 3, 4, 7, 8, 10, 11):
        assert train(f"c/step={step}.ckpt").equal(whole), step
