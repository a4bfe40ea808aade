"""The folder that a run leaves behind: `log_dir/experiment/run`, with checkpoints and what it takes to repeat it."""

from __future__ import annotations

import csv
import io
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision

import engine

CONFIG = "config.yaml"


class SaveRun(engine.Callback):
    """Writes the arguments and the environment of a run into its folder, once nothing can refuse it any more.

    Args:
        config: The arguments as YAML.
    """

    def __init__(self, config: str) -> None:
        self.config = config

    def on_train_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
        """Write `config.yaml`, `environment.json` and, where the working tree is dirty, `git.diff`."""
        # Asked by every process, since in Lightning this is a broadcast.
        log_dir = trainer.log_dir
        if not trainer.is_global_zero or trainer.fast_dev_run or log_dir is None:
            return
        folder = Path(log_dir)
        _write(folder / CONFIG, self.config)
        commit, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "platform": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "git_commit": commit.strip() or None,
        }
        _write(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        if diff:
            _write(folder / "git.diff", diff)


def find_checkpoint(wanted: str, log_dir: str, experiment: str | None, run_name: str | None) -> Path:
    """The checkpoint file that `--ckpt_path` means.

    Args:
        wanted: "best" or "last" of the newest run, or a path.
        log_dir: Folder of all runs.
        experiment: Look at its runs only.
        run_name: Look at runs of this name only.

    Raises:
        MisconfigurationException: No run has such a checkpoint.
    """
    if wanted not in ("best", "last"):
        return Path(wanted)
    pattern = f"{experiment or '*'}/{run_name or '*'}/checkpoints/{wanted}.ckpt"
    found = list(Path(log_dir).glob(pattern))
    if not found:
        raise engine.MisconfigurationException(
            f"--ckpt_path {wanted}: no run has one ({Path(log_dir, pattern)}); train first, or give a path"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def run_folder(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to, if it lies in one."""
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and (folder / CONFIG).is_file() else None


def saved_config(checkpoint: Path) -> Path | None:
    """The arguments that the checkpoint was trained with, if it lies in a run folder."""
    folder = run_folder(checkpoint)
    return folder and folder / CONFIG


def logger_arguments(arguments: Any) -> dict[str, Any]:
    """Where loggers write: in the same folder again when a run goes on from its `last.ckpt`, else in a new one.

    Raises:
        MisconfigurationException: The new folder is there already, or its name is none.
    """
    wanted = {"experiment": arguments.experiment, "run_name": arguments.run_name}
    for flag, name in wanted.items():
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
            raise engine.MisconfigurationException(
                f"--{flag} {name!r}: give the name of a folder, of letters, digits, - _ and ."
            )
    checkpoint = Path(arguments.ckpt_path) if arguments.ckpt_path else None
    folder = run_folder(checkpoint) if checkpoint is not None and checkpoint.name == "last.ckpt" else None
    same = folder is not None and arguments.experiment in (None, folder.parent.name)
    if folder is not None and same and arguments.run_name in (None, folder.name):
        return {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    experiment = arguments.experiment or arguments.model_name
    if arguments.run_name and Path(arguments.log_dir, experiment, arguments.run_name, CONFIG).is_file():
        raise engine.MisconfigurationException(
            f"--run_name {arguments.run_name}: {Path(arguments.log_dir, experiment)} has a run of that name; choose "
            "another, or go on with it: --ckpt_path last"
        )
    return {"save_dir": arguments.log_dir, "name": experiment, "version": arguments.run_name}


def write_predictions(folder: Path, batches: list[Any]) -> Path:
    """Write class probabilities as `predictions.csv`: a row for each sample, in the dataset's order.

    Args:
        folder: Where to write.
        batches: Tensors of shape (batch, num_classes).
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "class", *(f"probability_{number}" for number in range(batches[0].shape[1]))])
    for index, row in enumerate(row for batch in batches for row in batch):
        writer.writerow([index, int(row.argmax()), *(f"{probability:.6f}" for probability in row.tolist())])
    return _write(folder / "predictions.csv", text.getvalue())


def _write(path: Path, text: str) -> Path:
    """Write a file so that it is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    return temporary.replace(path)


def _git(*words: str) -> str:
    try:
        root = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
