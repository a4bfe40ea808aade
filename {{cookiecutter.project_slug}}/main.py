"""Train, validate, test, predict: `python main.py --help` lists the arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
from data import DInterface
from model import MInterface
from utils.arguments import constructor_arguments, parse, to_yaml
from utils.cross_validation import fit_folds
from utils.exits import exit_after
from utils.export import export
from utils.metrics import as_numbers, usual_mode
from utils.prediction import predict
from utils.processes import launch, processes_to_start
from utils.run_folder import SaveRun, begin_run, logger_arguments, remove_if_refused
from utils.run_state import choose_folder, resume_from
from utils.search import search


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run one command.

    Args:
        argv: Words of the command line; default: those of this process.

    Returns:
        Every logged metric, of validation and test for the best checkpoint; with --fold all, means and _std.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        command, arguments = parse(words, (DInterface, MInterface))
        if processes := processes_to_start(arguments):
            return launch(processes, arguments.max_restarts, __file__, words)
        if arguments.fold == "all":
            return fit_folds(arguments, lambda one: run("fit", one))
        if command == "fit":
            choose_folder(arguments, to_yaml(arguments))
        return run(command, arguments)
    except (Exception, KeyboardInterrupt) as error:
        exit_after(error)


def run(command: str, arguments: Any) -> dict[str, float]:
    """Build data and model, and run one command on them."""
    engine.seed_everything(arguments.seed)
    data = DInterface(**constructor_arguments(DInterface, arguments))
    # With a checkpoint, all weights come from there.
    start = {} if arguments.ckpt_path in (None, "auto") else {"pretrained": None}
    model = MInterface(**constructor_arguments(MInterface, arguments) | start)
    if arguments.find_lr or arguments.find_batch_size:
        return search(model, data, arguments)
    if command == "export":
        return export(model, arguments)
    if command == "predict":
        return predict(model, data, arguments)
    return fit(model, data, arguments) if command == "fit" else evaluate(command, model, data, arguments)


def fit(model: MInterface, data: DInterface, arguments: Any) -> dict[str, float]:
    """Train, then test the best checkpoint."""
    logs, settings = loggers(arguments), constructor_arguments(engine.Trainer, arguments)
    with remove_if_refused(*(Path(logger.log_dir) for logger in logs if logger.log_dir)):
        trainer = engine.Trainer(**settings, logger=logs, callbacks=callbacks(arguments))
        trainer.fit(model, datamodule=data, ckpt_path=resume_from(arguments))
    results = as_numbers(trainer.callback_metrics)
    best = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else ""
    if judged := best and any(name.startswith("val_") for name in results):
        judge = engine.Trainer(**settings, logger=False)
        judge.validate(model, datamodule=data, ckpt_path=best, verbose=False)
        results |= as_numbers(judge.callback_metrics)
    trainer.test(model, datamodule=data, ckpt_path=None if judged else best or None)  # the judge has loaded it
    if trainer.is_global_zero and not trainer.fast_dev_run:
        print(f"\nbest checkpoint  {best or 'none: no epoch was validated'}\nlogs             {logs[0].log_dir}")
        print(f"TensorBoard      tensorboard --logdir {arguments.log_dir}")
    return results | as_numbers(trainer.callback_metrics)


def evaluate(command: str, model: MInterface, data: DInterface, arguments: Any) -> dict[str, float]:
    """Validate, test or report on a checkpoint."""
    path = Path(arguments.ckpt_path)
    trainer = engine.Trainer(**constructor_arguments(engine.Trainer, arguments), logger=False)
    (trainer.validate if command == "validate" else trainer.test)(model, datamodule=data, ckpt_path=path)
    if trainer.is_global_zero:
        print(f"checkpoint   {path}")
    return as_numbers(trainer.callback_metrics)


def loggers(arguments: Any) -> list[engine.loggers.Logger]:
    """TensorBoard and CSV, in one folder; none for a fast_dev_run, which leaves nothing behind."""
    if arguments.fast_dev_run:
        return []
    tensorboard = engine.loggers.TensorBoardLogger(**logger_arguments(arguments))
    begin_run(tensorboard.log_dir, to_yaml(arguments), arguments)
    return [tensorboard, engine.loggers.CSVLogger(tensorboard.save_dir, tensorboard.name, tensorboard.version)]


def callbacks(arguments: Any) -> list[engine.Callback]:
    """What runs beside the training loop."""
    # Without validation the newest checkpoint counts as the best.
    blind = arguments.limit_val_batches == 0 and arguments.monitor.startswith("val_")
    watch: dict[str, Any] = {"monitor": None if blind else arguments.monitor}
    watch["mode"] = arguments.monitor_mode or usual_mode(arguments.monitor)
    # A run that goes on writes its own files anew, under the names that they have.
    files: dict[str, Any] = {"save_last": True, "enable_version_counter": False}
    chosen: list[engine.Callback] = [
        SaveRun(to_yaml(arguments), arguments.repeats),
        engine.callbacks.ModelCheckpoint(**watch, **files, filename="best"),
    ]
    chosen += [] if arguments.fast_dev_run else [engine.callbacks.LearningRateMonitor()]  # it needs a logger
    optional: dict[str, Any] = {
        "save_every_n_steps": lambda n: engine.callbacks.ModelCheckpoint(every_n_train_steps=n, save_top_k=0, **files),
        "ema_decay": lambda decay: engine.callbacks.EMAWeightAveraging(decay=decay),
        "patience": lambda n: engine.callbacks.EarlyStopping(**watch, patience=n),
    }
    return chosen + [make(arguments[name]) for name, make in optional.items() if arguments[name] is not None]


if __name__ == "__main__":
    main()
