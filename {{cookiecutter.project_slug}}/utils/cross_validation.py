"""Cross-validation: a run for each fold, and the mean and spread of what they reached."""

from __future__ import annotations

import csv
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import engine
from utils.processes import ask_first, is_first
from utils.report import Report, report_on_folds
from utils.run_folder import logger_arguments
from utils.run_state import write_whole


def fit_folds(arguments: Any, fit: Callable[[Any, Report], dict[str, float]]) -> dict[str, float]:
    """Train once for each fold, then print and write `folds.csv`: every metric of every fold, their mean and spread.

    Args:
        arguments: Those of the command line; `fold` is "all".
        fit: Trains one fold, watched by a report, and returns its metrics.

    Returns:
        The mean of every metric, and under its name with `_std` the sample standard deviation.

    Raises:
        MisconfigurationException: The number of folds is missing, or a checkpoint was given.
    """
    if arguments.num_folds is None or arguments.num_folds < 2:
        raise engine.MisconfigurationException(f"--fold all with num_folds={arguments.num_folds}; give 2 or more")
    if arguments.ckpt_path is not None:
        raise engine.MisconfigurationException("--fold all starts anew; go on with one fold by its own checkpoint")
    # The folder of all folds is numbered like that of any other run.
    where = logger_arguments(arguments)
    if arguments.fast_dev_run:
        name = "fast_dev_run"  # leaves no folder
    else:
        # Several processes agree on it.
        new = ask_first("folds", lambda: {"name": f"version_{engine.loggers.TensorBoardLogger(**where).version}"})
        name = where["version"] or new["name"]
    results, reports = [], []
    for fold in range(arguments.num_folds):
        if is_first():
            print(f"\nfold {fold}: {fold + 1} of {arguments.num_folds}")
        one = _with(arguments, fold=fold, run_name=f"{name}/fold_{fold}")
        reports.append(Report(one, watch=arguments.report, draw=False))
        results.append(fit(one, reports[-1]))
        # Trainer and module hold each other: without this the weights of a fold would stay for the next.
        gc.collect()
    folder = Path(where["save_dir"], where["name"], name)
    return _summarize(results, reports, None if arguments.fast_dev_run else folder)


def _with(arguments: Any, **changes: Any) -> Any:
    changed = arguments.clone()
    for name, value in changes.items():
        changed[name] = value
    return changed


def _summarize(results: list[dict[str, float]], reports: list[Report], folder: Path | None) -> dict[str, float]:
    names = sorted(set.intersection(*(set(result) for result in results)))
    # A value that is logged for steps and epochs is there once more under its plain name.
    names = [name for name in names if name.removesuffix("_step").removesuffix("_epoch") not in set(names) - {name}]
    names = [name for name in names if not name.startswith("lr-")]
    values = {name: [result[name] for result in results] for name in names}
    mean = {name: float(np.mean(column)) for name, column in values.items()}
    spread = {name: float(np.std(column, ddof=1)) for name, column in values.items()}
    summary = mean | {f"{name}_std": value for name, value in spread.items()}
    if is_first():
        # Here, since every start of main.py imports this file, also one for `--help`.
        from rich.console import Console
        from rich.table import Table

        table = Table(f"{len(results)} folds", box=None, header_style="bold", pad_edge=False)
        table.add_column("mean ± std", justify="right", style="bold green")
        for name in names:
            table.add_row(name, f"{mean[name]:.4f} ± {spread[name]:.4f}")
        Console().print("", table)
        if folder is not None:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["fold", *names])
            writer.writerows([fold, *(result[name] for name in names)] for fold, result in enumerate(results))
            writer.writerow(["mean", *(mean[name] for name in names)])
            writer.writerow(["std", *(spread[name] for name in names)])
            print(f"\nfolds            {write_whole(folder / 'folds.csv', text.getvalue())}")
            if reports and reports[0].watch:
                report_on_folds(folder, reports, values, summary)
    return summary
