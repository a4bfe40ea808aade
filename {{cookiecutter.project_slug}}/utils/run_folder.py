"""The folder that a run leaves behind: `log_dir/experiment/run`, with checkpoints and what it takes to repeat it."""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import engine
from utils.processes import is_first, share_of_samples
from utils.registry import load_class
from utils.run_state import (
    CONFIG,
    ENVIRONMENT,
    LAUNCH,
    LOCK,
    begun_before,
    hold,
    job_id,
    mark_finished,
    note_launch,
    release,
    write_whole,
)
from utils.samples import fingerprint

PROJECT = Path(__file__).parents[1]
KINDS = ("versions", "data", "code")
CODE = ("data", "engine", "model", "utils")


class SaveRun(engine.Callback):
    """Writes the arguments and the environment of a run into its folder, once nothing can refuse it any more.

    Args:
        config: The arguments as YAML.
        repeats: Folder of the run that this one repeats: it is told where code, data or versions differ.
    """

    def __init__(self, config: str, repeats: str | None) -> None:
        self.config, self.repeats = config, repeats
        self.complete = self.failed = False

    def on_fit_end(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
        """Note whether training is over, or stopped by max_time."""
        self.complete = not getattr(trainer, "interruption", 0)

    def on_exception(self, trainer: engine.Trainer, pl_module: engine.Module, exception: BaseException) -> None:
        """Note that the run is not complete."""
        self.complete, self.failed = False, True

    def teardown(self, trainer: engine.Trainer, pl_module: engine.Module, stage: str) -> None:
        """After the test, mark the run as finished; after it, or an error, let go of it."""
        # Asked by every process, since in Lightning this is a broadcast.
        folder = Path(trainer.log_dir or "")
        if stage != "test" and not self.failed:
            return
        if trainer.is_global_zero and not trainer.fast_dev_run and folder.is_dir():
            if self.complete:
                for logger in trainer.loggers:
                    # A run that is marked is never opened again.
                    logger.save()
                mark_finished(folder)
            release(folder)

    def on_train_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
        """Write `config.yaml`, `environment.json` and, where the working tree is dirty, `git.diff`."""
        # Asked by every process, since in Lightning this is a broadcast.
        log_dir = trainer.log_dir
        if not trainer.is_global_zero:
            return
        environment = describe_environment(trainer.datamodule)
        if self.repeats is not None:
            warn_of_differences(Path(self.repeats), environment)
        if trainer.fast_dev_run or log_dir is None:
            return
        folder = Path(log_dir)
        write_whole(folder / CONFIG, self.config)
        write_whole(folder / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
        (folder / "git.diff").unlink(missing_ok=True)
        if diff := _git("diff", "HEAD"):
            write_whole(folder / "git.diff", diff)


def describe_environment(data: Any) -> dict[str, Any]:
    """What a run depends on beside its arguments: versions, device, code (hashes of files), and data (of samples)."""
    own = [PROJECT / "main.py", *(file for name in CODE for file in sorted((PROJECT / name).rglob("*.py")))]
    return {
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("torchvision", "torchmetrics", "numpy")},
        },
        "git_commit": _git("rev-parse", "HEAD").strip() or None,
        "job": job_id(),
        "processes": share_of_samples()[1],
        "data": {f"{split}/{name}": fingerprint(s) for split, sets in data.sets.items() for name, s in sets.items()},
        "code": {file.relative_to(PROJECT).as_posix(): f"{zlib.crc32(file.read_bytes()):08x}" for file in own},
    }


def warn_of_differences(folder: Path, now: dict[str, Any]) -> None:
    """Say on the error stream what is not as it was in an earlier run, a line for each kind."""
    try:
        then = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        then = None
    if not isinstance(then, dict) or not all(isinstance(then.get(kind, {}), dict) for kind in KINDS):
        print(f"warning: {folder / ENVIRONMENT} is damaged, so that nothing can be compared", file=sys.stderr)
        return
    for kind in KINDS:
        old, new = then.get(kind, {}), now[kind]
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        told = [name if kind == "code" else f"{name} ({old.get(name)}, now {new.get(name)})" for name in changed]
        if changed:
            print(f"warning: {kind} not as in {folder}: {', '.join(told)}; results may differ", file=sys.stderr)


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
        path = Path(wanted)
        try:
            if path.is_file():
                return path
            there = None if path.exists() else sorted(str(file) for file in path.parent.glob("*.ckpt"))
        except (OSError, ValueError) as error:
            raise engine.MisconfigurationException(f"--ckpt_path {wanted} cannot be read: {error}") from error
        if there is None:
            raise engine.MisconfigurationException(f"--ckpt_path {wanted!r} is no file; give best, last, or a file")
        others = f"there are: {', '.join(there)}" if there else f"there are no *.ckpt files in {path.parent}"
        raise engine.MisconfigurationException(f"checkpoint {wanted} does not exist; {others}")
    _check_names({"experiment": experiment, "run_name": run_name})
    pattern = f"{experiment or '*'}/{run_name or '*'}/checkpoints/{wanted}.ckpt"
    found = [
        file
        for glob in (pattern, pattern.replace("/checkpoints", "/fold_*/checkpoints"))
        for file in Path(log_dir).glob(glob)
    ]
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


def learned(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its net: arguments of MInterface, `class_names`, and `inputs` (see `describe_inputs`).

    Raises:
        MisconfigurationException: The file cannot be read, or was not saved by this project.
    """
    if hasattr(engine, "checkpoint"):
        content: Any = engine.checkpoint.load(checkpoint, foreign=True)
    else:
        # Lightning goes by the name of engine.
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    found = content.get("hyper_parameters")
    if not isinstance(found, dict) or "model_name" not in found:
        raise engine.MisconfigurationException(
            f"{checkpoint} does not say which net it is of; give one of this project"
        )
    of_data = content.get("datamodule_hyper_parameters")
    return found | {"datamodule": of_data if isinstance(of_data, dict) else {}}


def remember(model: Any, checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says (see `learned`); the model gets what no flag of its net says, such as num_classes."""
    about = learned(checkpoint)
    model.hparams["model"] = (about.get("model") or {}) | model.hparams["model"]
    return about


def learned_arguments(checkpoint: Path, interfaces: tuple[type[Any], type[Any]]) -> dict[str, Any]:
    """Arguments of DInterface and MInterface as a checkpoint has them, for one that lies anywhere."""
    found = learned(checkpoint)
    arguments: dict[str, Any] = {}
    for source, interface in zip((found["datamodule"], found), interfaces, strict=True):
        arguments |= {name: source[name] for name in inspect.signature(interface).parameters if name in source}
    # The dataset may have told more than the net has asked for.
    accepted = inspect.signature(load_class("model", found["model_name"])).parameters
    arguments["model"] = {name: value for name, value in (found.get("model") or {}).items() if name in accepted}
    return arguments


def logger_arguments(arguments: Any) -> dict[str, Any]:
    """Where loggers write: in the same folder again when a run goes on from its `last.ckpt`, else in a new one.

    Raises:
        MisconfigurationException: The new folder is there already, or its name is none.
    """
    _check_names({"experiment": arguments.experiment, "run_name": arguments.run_name})
    if not arguments.log_dir.isprintable():
        raise engine.MisconfigurationException(f"--log_dir {arguments.log_dir!r}: give the path of a folder")
    checkpoint = Path(arguments.ckpt_path) if arguments.ckpt_path else None
    folder = run_folder(checkpoint) if checkpoint is not None and checkpoint.name == "last.ckpt" else None
    # The run of a fold lies a folder deeper.
    same = folder is not None and arguments.experiment in (None, folder.parent.name, folder.parent.parent.name)
    if folder is not None and same and arguments.run_name in (None, folder.name):
        return {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    experiment = arguments.experiment or arguments.model_name
    # The first process may have written there by the time that the others ask.
    named = Path(arguments.log_dir, experiment, arguments.run_name or "")
    taken = arguments.run_name and is_first() and (named / CONFIG).is_file()
    if taken and arguments.ckpt_path != "auto" and not begun_before(arguments.log_dir):
        raise engine.MisconfigurationException(
            f"--run_name {arguments.run_name}: {Path(arguments.log_dir, experiment)} has a run of that name; choose "
            "another, or go on with it: --ckpt_path last"
        )
    return {"save_dir": arguments.log_dir, "name": experiment, "version": arguments.run_name}


def loggers(arguments: Any, config: str) -> list[engine.loggers.Logger]:
    """TensorBoard and CSV, in the folder of the run, which is taken; none for a fast_dev_run, which leaves nothing.

    Args:
        arguments: Those of the command line.
        config: The same as YAML.
    """
    if arguments.fast_dev_run:
        return []
    # Hyper-parameters are shown with the final metrics, or not at all: TensorBoard heeds only the first that it gets.
    tensorboard = engine.loggers.TensorBoardLogger(**logger_arguments(arguments), default_hp_metric=False)
    begin_run(tensorboard.log_dir, config, arguments)
    return [tensorboard, engine.loggers.CSVLogger(tensorboard.save_dir, tensorboard.name, tensorboard.version)]


def _check_names(names: dict[str, str | None]) -> None:
    for flag, name in names.items():
        # Each fold of a run has a folder within the run's.
        if name is not None and not re.fullmatch(r"\w[\w.-]*(/fold_\d+)?", name):
            raise engine.MisconfigurationException(
                f"--{flag} {name!r}: give the name of a folder, of letters, digits, - _ and ."
            )


def begin_run(log_dir: str, config: str, arguments: Any) -> None:
    """Take the folder of a run for this process, and write a new run's arguments into it, by which others find it.

    Args:
        log_dir: The folder.
        config: The arguments as YAML.
        arguments: The same as they are.

    Raises:
        MisconfigurationException: The folder cannot be made, or another process holds the run.
    """
    folder = Path(log_dir)
    if not is_first():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = hold(folder)
    except OSError as error:
        raise engine.MisconfigurationException(
            f"the folder {folder} cannot be made ({error.strerror}); choose another --log_dir"
        ) from error
    if not held:
        raise engine.MisconfigurationException(f"another process, which is alive, holds the run {folder}; wait for it")
    if not (folder / CONFIG).exists():
        write_whole(folder / CONFIG, config)
    note_launch(folder, arguments.log_dir, arguments.ckpt_path)


@contextmanager
def remove_if_refused(*folders: Path) -> Iterator[None]:
    """Around a run: where it is refused before it begins, its folder goes, if nothing is in it but its own logs."""
    try:
        yield
    except engine.MisconfigurationException:
        begun = [f for f in folders if (f / ENVIRONMENT).is_file() or (f / "checkpoints").is_dir()]
        if folders and not begun and is_first() and hold(folders[0]):
            _remove(folders[0])
        raise


def _remove(folder: Path) -> None:
    for events in folder.glob(f"events.out.tfevents.*.{os.getpid()}.*"):
        events.unlink()
    for name in (CONFIG, LOCK, LAUNCH, "hparams.yaml"):
        (folder / name).unlink(missing_ok=True)
    release(folder)
    # The folder of a fold lies within one for all.
    for empty in (folder, folder.parent) if folder.name.startswith("fold_") else (folder,):
        with suppress(OSError):
            empty.rmdir()


def _git(*words: str) -> str:
    try:
        root = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, timeout=10, check=True)
        return done.stdout.decode("utf-8", errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
