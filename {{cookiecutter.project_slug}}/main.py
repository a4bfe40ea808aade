"""Train, validate, test, predict: `python main.py --help` lists the arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import engine
from data import DInterface
from model import MInterface
from utils.arguments import constructor_arguments, exit_with, parse
from utils.run_folder import SaveRun, logger_arguments, run_folder, write_predictions


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run one command.

    Args:
        argv: Words of the command line; default: those of this process.

    Returns:
        The last value of every logged metric, those of the test included.
    """
    try:
        command, arguments, config = parse(sys.argv[1:] if argv is None else argv)
        engine.seed_everything(arguments.seed)
        data = DInterface(**constructor_arguments(DInterface, arguments))
        model = MInterface(**constructor_arguments(MInterface, arguments))
        if command == "fit":
            return fit(model, data, arguments, config)
        return evaluate(command, model, data, arguments)
    except engine.MisconfigurationException as error:
        exit_with(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; if an epoch was finished, --ckpt_path last goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def fit(model: MInterface, data: DInterface, arguments: Any, config: str) -> dict[str, float]:
    """Train, then test the best checkpoint."""
    beside, logs = callbacks(arguments, config), loggers(arguments)
    try:
        trainer = make_trainer(arguments, logger=logs, callbacks=beside)
        trainer.fit(model, datamodule=data, ckpt_path=arguments.ckpt_path)
    except engine.MisconfigurationException:
        # A run that was refused before it began leaves no folder: only an empty one can be removed so.
        with suppress(OSError):
            Path(logs[0].log_dir if logs else "").rmdir()
        raise
    results = metrics(trainer)
    best = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else ""
    trainer.test(model, datamodule=data, ckpt_path=best or None)
    folder = trainer.log_dir
    if trainer.is_global_zero and not trainer.fast_dev_run:
        print(f"\nbest checkpoint  {best or 'none: no epoch was validated'}\nlogs             {folder}")
        print(f"TensorBoard      tensorboard --logdir {arguments.log_dir}")
    return results | metrics(trainer)


def evaluate(command: str, model: MInterface, data: DInterface, arguments: Any) -> dict[str, float]:
    """Validate, test or predict from a checkpoint."""
    trainer = make_trainer(arguments, logger=False)
    path = Path(arguments.ckpt_path)
    if command == "predict":
        if trainer.world_size > 1:
            raise engine.MisconfigurationException("predict writes one file; run it without torchrun, in one process")
        batches = trainer.predict(model, datamodule=data, ckpt_path=path)
        if trainer.is_global_zero and batches:
            print(f"predictions  {write_predictions(run_folder(path) or Path(), batches)}")
    else:
        run = trainer.validate if command == "validate" else trainer.test
        run(model, datamodule=data, ckpt_path=path)
    if trainer.is_global_zero:
        print(f"checkpoint   {path}")
    return metrics(trainer)


def make_trainer(arguments: Any, **more: Any) -> engine.Trainer:
    """A trainer with the arguments of the command line and those that main.py decides."""
    return engine.Trainer(**constructor_arguments(engine.Trainer, arguments), **more)


def loggers(arguments: Any) -> list[engine.loggers.Logger]:
    """TensorBoard and CSV, in one folder; none for a fast_dev_run, which leaves nothing behind."""
    if arguments.fast_dev_run:
        return []
    tensorboard = engine.loggers.TensorBoardLogger(**logger_arguments(arguments))
    return [tensorboard, engine.loggers.CSVLogger(tensorboard.save_dir, tensorboard.name, tensorboard.version)]


def callbacks(arguments: Any, config: str) -> list[engine.Callback]:
    """What runs beside the training loop."""
    # Without validation there is nothing to compare: the newest checkpoint counts as the best.
    blind = not arguments.limit_val_batches and arguments.monitor.startswith("val_")
    watch = {"monitor": None if blind else arguments.monitor, "mode": arguments.monitor_mode}
    chosen = [
        SaveRun(config),
        engine.callbacks.LearningRateMonitor(),
        engine.callbacks.ModelCheckpoint(**watch, filename="best", save_last=True),
    ]
    if arguments.patience is not None and blind:
        raise engine.MisconfigurationException("--patience needs validation, which --limit_val_batches 0 turns off")
    if arguments.patience is not None:
        chosen.append(engine.callbacks.EarlyStopping(**watch, patience=arguments.patience))
    return chosen


def metrics(trainer: engine.Trainer) -> dict[str, float]:
    """The trainer's metrics as plain numbers."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main()
