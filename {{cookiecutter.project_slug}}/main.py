"""Train, validate, test, predict: `python main.py --help` lists the arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine
from data import DInterface
from model import MInterface
from utils.arguments import constructor_arguments, parse, to_yaml
from utils.cross_validation import fit_folds
from utils.exits import exit_after
from utils.export import export
from utils.prediction import predict
from utils.processes import launch, processes_to_start
from utils.report import Report
from utils.run_folder import SaveRun, loggers, remove_if_refused
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
            return fit_folds(arguments, partial(run, "fit"))
        if command == "fit":
            choose_folder(arguments, to_yaml(arguments))
        return run(command, arguments)
    except (Exception, KeyboardInterrupt) as error:
        exit_after(error)


def run(command: str, arguments: Any, report: Report | None = None) -> dict[str, float]:
    """Build data and model, and run one command on them."""
    engine.seed_everything(arguments.seed)
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    data = DInterface(**constructor_arguments(DInterface, arguments))
    # With a checkpoint, all weights come from there.
    start = {} if arguments.ckpt_path in (None, "auto") else {"pretrained": None}
    model = MInterface(**constructor_arguments(MInterface, arguments) | start)
    if command == "fit":
        return fit(model, data, arguments, report or Report(arguments, watch=arguments.report))
    others: dict[str, Callable[..., dict[str, float]]] = {"search": search, "predict": predict, "export": export}
    return others.get(command, partial(evaluate, command))(model, data, arguments)


def fit(model: MInterface, data: DInterface, arguments: Any, report: Report) -> dict[str, float]:
    """Train, then test the best checkpoint."""
    logs, settings = loggers(arguments, to_yaml(arguments)), constructor_arguments(engine.Trainer, arguments)
    with remove_if_refused(*(Path(logger.log_dir) for logger in logs if logger.log_dir)):
        trainer = engine.Trainer(**settings, logger=logs, callbacks=[report, *callbacks(arguments)])
        trainer.fit(model, datamodule=data, ckpt_path=resume_from(arguments))
    results = {name: float(value) for name, value in trainer.callback_metrics.items()}
    best = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else ""
    if judged := best and any(name.startswith("val_") for name in results):
        judge = engine.Trainer(**settings, logger=False, callbacks=[report])
        judge.validate(model, datamodule=data, ckpt_path=best, verbose=False)
    trainer.test(model, datamodule=data, ckpt_path=None if judged else best or None)  # the judge has loaded it
    if trainer.is_global_zero and not trainer.fast_dev_run:
        print(f"\nbest checkpoint  {best or 'none: no epoch was validated'}\nlogs             {logs[0].log_dir}")
        print(f"report           {report.page}\n" if report.page else "", end="")
        print(f"TensorBoard      tensorboard --logdir {arguments.log_dir}")
    return results | report.metrics


def evaluate(command: str, model: MInterface, data: DInterface, arguments: Any) -> dict[str, float]:
    """Validate or test a checkpoint, or do both and write the report."""
    path = Path(arguments.ckpt_path)
    report = Report(arguments, path, watch=command == "report")
    trainer = engine.Trainer(**constructor_arguments(engine.Trainer, arguments), logger=False, callbacks=[report])
    for stage in ("validate", "test") if command == "report" else (command,):
        getattr(trainer, stage)(model, datamodule=data, ckpt_path=path)
    if trainer.is_global_zero:
        print(f"checkpoint   {path}" + (f"\nreport       {report.page}" if report.page else ""))
    return report.metrics


def callbacks(arguments: Any) -> list[engine.Callback]:
    """What runs beside the training loop."""
    from utils.metrics import usual_mode  # torchmetrics takes longer to import than torch: --help does without

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
