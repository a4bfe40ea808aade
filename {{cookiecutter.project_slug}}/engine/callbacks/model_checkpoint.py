"""ModelCheckpoint: the best and the newest state of a run, on disk."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engine import checkpoint, distributed, resume, shards
from engine.callbacks.checkpoint import Checkpoint, check_numbers, check_triggers, link, save_after
from engine.callbacks.monitor import check_mode, looks_at_epoch_end, monitored_value, validated_in_fit
from engine.exceptions import MisconfigurationException
from engine.faults import check_weights
from engine.loggers import checkpoint_folder_of, make_folder
from engine.loops import stop_reason, validation_due
from engine.older import refuse_arguments

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer

# The file written before the newest one.
PREVIOUS = "previous.ckpt"
# Attributes that tell of files: they change once the file is there.
RANKING = ("best_k_models", "best_model_path", "current_score", "last_model_path")
# {name} or {name:format} in the name of a file.
FIELD = re.compile(r"\{([^:{}]+)(?::([^{}]*))?\}")


class ModelCheckpoint(Checkpoint):
    """Saves the `save_top_k` best by a logged value, and the newest as `last.ckpt`.

    It saves at the end of epochs or, where the trainer validates more or less often than once an epoch, at the end of
    validations. Paths change only after a file is complete on disk, and files go only after their successor is. While
    training, the file that was written before the newest is kept as `previous.ckpt`, should the newest turn out to be
    damaged. A run that is interrupted leaves its state in `last.ckpt` in any case. Parameters in parts (FSDP) lie in
    `shards/`, which files name: they go together.

    Args:
        dirpath: Folder; default: `checkpoints` in the trainer's log folder.
        filename: Name without `.ckpt`; may hold values as in "{epoch}-{val_loss:.2f}"; default: "{epoch}-{step}".
            Where another file has that name, -v1, -v2, ... is put behind it.
        monitor: Name of the value that decides; None keeps the newest.
        verbose: Print what is saved, and what is not.
        save_last: Also keep the newest as `last.ckpt`, among the best or not; "link" makes that a symbolic link.
        save_top_k: How many to keep; -1 for all, 0 for none.
        save_on_exception: Save when training fails, too.
        save_weights_only: Leave out what is needed to go on.
        mode: "min" where less is better, "max" where more is; of equals the older one is the best.
        auto_insert_metric_name: Write "epoch=3-val_loss=0.12" rather than "3-0.12".
        every_n_train_steps: Save after every so many optimizer steps; 0 for never.
        train_time_interval: Save after so much time.
        every_n_epochs: Save every so many epochs, 1 if none of these three is given; 0 for never.
        save_on_train_epoch_end: Save at the end of epochs, or of validations; default: as above.
        enable_version_counter: Otherwise a file of the same name is overwritten.

    Without `monitor`, `best_model_path` is the newest file.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: Literal["min", "max"] = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        **older: Any,
    ) -> None:
        refuse_arguments(ModelCheckpoint, older)
        check_mode(mode)
        check_triggers(every_n_train_steps, every_n_epochs, train_time_interval)
        if filename in (self.CHECKPOINT_NAME_LAST, Path(PREVIOUS).stem):
            raise MisconfigurationException(f"filename={filename!r} is the name of another file; choose another name")
        check_numbers(save_top_k, save_last, monitor)
        self.dirpath = None if dirpath is None else Path(os.path.realpath(os.path.expanduser(dirpath)))
        self.filename, self.auto_insert_metric_name = filename, auto_insert_metric_name
        self.monitor, self.mode, self.verbose, self.save_top_k = monitor, mode, verbose, save_top_k
        self.save_last, self.save_on_exception, self.save_weights_only = save_last, save_on_exception, save_weights_only
        self.every_n_train_steps, self.train_time_interval = every_n_train_steps or 0, train_time_interval
        default = int(every_n_train_steps is None and train_time_interval is None)
        self.every_n_epochs = default if every_n_epochs is None else every_n_epochs
        self.save_on_train_epoch_end, self.enable_version_counter = save_on_train_epoch_end, enable_version_counter
        self.best_k_models: dict[str, Tensor] = {}
        self.best_model_path = self.last_model_path = ""
        self.current_score: Tensor | None = None
        # Files that were there before this run, the one that it was told to go on from, and its newest.
        self.others: set[str] = set()
        self.resumed_from: Path | None = None
        self.newest: Path | None = None
        self._step, self._saved_step, self._time = 0, 0, 0.0
        # A save was due, but for the value, which validation is to bring.
        self._waiting = False

    @property
    def state_key(self) -> str:
        """Told apart by what is watched, when and under which name."""
        names = ("monitor", "mode", "every_n_train_steps", "every_n_epochs", "train_time_interval", "filename")
        return f"ModelCheckpoint{ {name: getattr(self, name) for name in names} }"

    @property
    def best_model_score(self) -> Tensor | None:
        """The value of the best file; None without `monitor`."""
        return self.best_k_models.get(self.best_model_path)

    @property
    def kth_best_model_path(self) -> str:
        """The worst of the best files, once there are `save_top_k` of them."""
        full = self.best_k_models and len(self.best_k_models) >= self.save_top_k
        return max(self.best_k_models, key=self._rank) if full else ""

    def state_dict(self) -> dict[str, Any]:
        """Which files there are, by name, so that a run folder can be moved."""
        score, current = self.best_model_score, self.current_score
        return {
            "best_k_models": {self._name(path): float(score) for path, score in self.best_k_models.items()},
            "best_model_path": self._name(self.best_model_path),
            "best_model_score": None if score is None else float(score),
            "current_score": None if current is None else float(current),
            "last_model_path": self._name(self.last_model_path),
            "others": sorted(self.others),
            "saved_step": self._saved_step,
            "waiting": self._waiting,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, as far as the files are in this run's folder."""
        models, current = state_dict["best_k_models"].items(), state_dict["current_score"]
        self.best_k_models = {path: torch.tensor(float(score)) for name, score in models if (path := self._own(name))}
        self.best_model_path = self._own(state_dict["best_model_path"])
        self.current_score = None if current is None else torch.tensor(float(current))
        self.last_model_path = self._own(state_dict["last_model_path"])
        self.others = {str(name) for name in state_dict["others"]}
        self._saved_step, self._waiting = int(state_dict["saved_step"]), bool(state_dict["waiting"])

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Settle the folder, and clear away what a killed process left half-written."""
        if self.dirpath is None:
            self.dirpath = distributed.broadcast(checkpoint_folder_of(trainer.loggers, trainer.default_root_dir))
        self.newest, self.resumed_from = None, None
        if stage == "fit":
            if trainer.is_global_zero:
                for file in self.dirpath.glob(f"*{self.FILE_EXTENSION}{checkpoint.TEMPORARY}"):
                    file.unlink(missing_ok=True)
            own = {*self.best_k_models, self.last_model_path, str(self.dirpath / PREVIOUS)}
            found = [file for start in ("", "*/") for file in self.dirpath.glob(f"{start}*{self.FILE_EXTENSION}")]
            self.others = distributed.broadcast({self._name(str(file)) for file in found if str(file) not in own})

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Make the folder, or say that it cannot be made before a step is lost."""
        self._step, self._time = trainer.global_step, time.monotonic()
        if trainer.is_global_zero and not trainer.fast_dev_run and self.dirpath is not None:
            make_folder(self.dirpath)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Save, if this step is one to save."""
        before, self._step = self._step, trainer.state.global_step
        if self._step == before or not self._step_is_due():
            return
        # Where the next validation brings a newer value.
        between = self.monitor is not None and not looks_at_epoch_end(trainer, self.save_on_train_epoch_end)
        self._waiting = between and validation_due(trainer, stopping=stop_reason(trainer) is not None)
        if not self._waiting:
            self._save(trainer, fresh=True, wait=True)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save, if validations are what counts."""
        due = validated_in_fit(trainer) and not looks_at_epoch_end(trainer, self.save_on_train_epoch_end)
        if due and (self._waiting or self._epoch_is_due(trainer)):
            self._save(trainer, fresh=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save, if epochs are what counts; the newest in any case."""
        if looks_at_epoch_end(trainer, self.save_on_train_epoch_end):
            if self._waiting or self._epoch_is_due(trainer):
                self._save(trainer, fresh=True)
        elif self._epoch_is_due(trainer):
            self._write_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save the end as the newest, if nothing else was."""
        trainer.writer.wait()
        if not self.last_model_path:
            self._write_last(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """A finished run needs no second file to fall back to."""
        trainer.writer.wait()
        if not trainer.interruption and self.dirpath is not None and trainer.is_global_zero:
            (self.dirpath / PREVIOUS).unlink(missing_ok=True)
            shards.tidy(self.dirpath)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Save, if asked to."""
        if self.save_on_exception and trainer.stage == "fit" and trainer.global_step != self._saved_step:
            save_after(trainer, exception, str(self._path(trainer, self.filename, "")), self.save_weights_only)

    def save_last_now(self, trainer: Trainer) -> Path:
        """Write all that is needed to go on as the newest, whatever else was to be saved when."""
        trainer.writer.wait()
        path = self._write(trainer, whole=True)
        trainer.writer.wait()
        distributed.barrier()
        return path

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether a value is among the best so far."""
        if current is None or not self.save_top_k:
            return False
        worst = self.best_k_models.get(self.kth_best_model_path) if self.save_top_k != -1 else None
        return worst is None or bool(current < worst if self.mode == "min" else current > worst)

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, ver: int | None = None
    ) -> str:
        """The path of a file whose name is filled with values; 0 where there is none."""

        def fill(match: re.Match[str]) -> str:
            key = f"{match[1]}{self.CHECKPOINT_EQUALS_CHAR}" if self.auto_insert_metric_name else ""
            return f"{key}{metrics.get(match[1], 0):{match[2] or ''}}"

        name = FIELD.sub(fill, filename or self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}")
        name += "" if ver is None else f"{self.CHECKPOINT_JOIN_CHAR}v{ver}"
        return str(Path(self.dirpath or "", f"{name}{self.FILE_EXTENSION}"))

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write the best files and their values; default: to `best_k_models.yaml` in the folder."""
        lines = [f"{json.dumps(path)}: {float(score)}\n" for path, score in self.best_k_models.items()]
        Path(filepath or Path(self.dirpath or "", "best_k_models.yaml")).write_text("".join(lines), encoding="utf-8")

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return bool(due) and trainer.global_step != self._saved_step

    def _step_is_due(self) -> bool:
        if self.train_time_interval is None:
            return bool(self.every_n_train_steps) and self._step % self.every_n_train_steps == 0
        due = distributed.broadcast(time.monotonic() - self._time >= self.train_time_interval.total_seconds())
        self._time = time.monotonic() if due else self._time
        return due

    def _save(self, trainer: Trainer, fresh: bool, wait: bool = False) -> None:
        """Save what is due: the newest, and one of the best if the value, which may have to be of this epoch, says so.

        Where `wait`, a value that is missing may come later.
        """
        if trainer.fast_dev_run:
            return
        trainer.writer.wait()  # what was saved last decides what is among the best now
        self._saved_step, self._waiting = trainer.global_step, False
        score, told = None, ""
        if self.monitor is not None:
            try:
                score = monitored_value(trainer, self.monitor, "ModelCheckpoint", fresh, wait)
            except MisconfigurationException:
                # The name is wrong, the epoch was not.
                self._write_last(trainer)
                raise
            # Every process must come to the same decision, and rank 0's value is the one in the logs.
            score, told = distributed.broadcast(score), f"{self.monitor}={score}: "
            self._waiting = score is None and wait
            if score is not None and math.isnan(score):
                score = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        if self.check_monitor_top_k(trainer, score) if self.monitor else self.save_top_k:
            told += f"saved {self._write(trainer, score, among_best=True)}"
        else:
            self._write_last(trainer)
            told += f"not among the best {self.save_top_k}"
        if self.verbose and trainer.is_global_zero:
            print(f"ModelCheckpoint: after {trainer.global_step} steps, {told}", flush=True)

    def _write_last(self, trainer: Trainer) -> None:
        if self.save_last and not trainer.fast_dev_run:
            self._write(trainer)

    def _write(
        self, trainer: Trainer, score: Tensor | None = None, among_best: bool = False, whole: bool = False
    ) -> Path:
        """Write one of the best, or only the last; with all that is needed to go on, where `whole`.

        The file holds the ranking that is true once it is there, which becomes this callback's only then.
        """
        before = {name: getattr(self, name) for name in RANKING}
        last, goes = self._path(trainer, self.CHECKPOINT_NAME_LAST, self.last_model_path), ""
        path = last
        if among_best:
            path, goes = self._replacing(trainer)
            self.best_model_path = str(path)
        if score is not None:
            self.best_k_models = {k: v for k, v in self.best_k_models.items() if k != goes} | {str(path): score}
            self.best_model_path, self.current_score = min(self.best_k_models, key=self._rank), score
        self.last_model_path = str(last) if self.save_last or not among_best else self.last_model_path
        try:
            captured = resume.capture(trainer, self.save_weights_only and not whole)
        finally:
            after = {name: getattr(self, name) for name in RANKING}
            vars(self).update(before)
        checks = [partial(check_weights, trainer)]
        if trainer.device_mesh is not None:
            checks.pop()(captured)  # each process looks at its part, and writes it
            captured = shards.write(checkpoint.plain_checkpoint(captured), self._folder)
        committed = partial(self._committed, trainer, path, goes, after)
        if not trainer.is_global_zero:
            committed()
            return path
        if path.parent != self._folder:
            make_folder(path.parent)  # a name such as {val/loss} stands for a folder
        # Another ModelCheckpoint may have written it.
        newest = Path(self.last_model_path or last) if self.save_last else self.newest
        keep = None if newest is None else (newest.resolve(), self._folder / PREVIOUS)
        trainer.writer.write(captured, path, keep, committed, *checks)
        self.newest = last if self.save_last else path
        return path

    def _committed(self, trainer: Trainer, path: Path, goes: str, after: dict[str, Any]) -> None:
        """A file is on the disk."""
        # A last file that is called otherwise each time is one file all the same.
        gone = {goes, self.last_model_path} - {"", str(path), after["last_model_path"]}
        vars(self).update(after)
        if not trainer.is_global_zero:
            return
        if self.save_last and str(path) != self.last_model_path:
            link(path, Path(self.last_model_path), softly=self.save_last == "link")
        for file in gone:
            if Path(file).absolute() != self.resumed_from:
                Path(file).unlink(missing_ok=True)
        shards.tidy(self._folder)
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)

    def _replacing(self, trainer: Trainer) -> tuple[Path, str]:
        """Where to write one of the best, and which file goes then."""
        limited = self.save_top_k != -1
        replaced = self.best_model_path if self.monitor is None else self.kth_best_model_path if limited else ""
        return self._path(trainer, self.filename, replaced), replaced if limited else ""

    def _path(self, trainer: Trainer, filename: str | None, goes: str) -> Path:
        """Where to write a file; not where another one is that stays, which gets -v1, -v2, ... behind its name."""
        metrics: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        metrics |= trainer.callback_metrics
        metrics |= {name: int(metrics[name]) for name in ("epoch", "step")}
        unknown = {match[1] for match in FIELD.finditer(filename or "")} - metrics.keys()
        over = trainer.state.epoch_over or trainer.current_epoch
        if unknown and over and (trainer.metrics.validated or not trainer.validates):
            raise MisconfigurationException(
                f"filename={filename!r}: no {', '.join(sorted(unknown))} was logged, only {', '.join(sorted(metrics))}"
            )
        savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
        taken = {path for saver in savers for path in (saver.best_model_path, *saver.best_k_models)}
        taken |= {str(self._folder / name) for name in self.others}
        path, version = self.format_checkpoint_name(metrics, filename), self.STARTING_VERSION
        while self.enable_version_counter and path != goes and path in taken:
            path, version = self.format_checkpoint_name(metrics, filename, ver=version), version + 1
        return Path(path)

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return self.dirpath

    def _name(self, path: str) -> str:
        return Path(os.path.relpath(path, self._folder)).as_posix() if path else ""

    def _own(self, name: str) -> str:
        """The path of a checkpoint that was written to this folder, by its name; empty if it is not there."""
        path = self._folder / name
        # What a file names is deleted one day: checkpoints of this folder only, and no links out of it.
        inside = name.endswith(self.FILE_EXTENSION) and path.resolve().is_relative_to(self._folder.resolve())
        return str(path) if inside and path.is_file() else ""

    def _rank(self, path: str) -> Tensor:
        return self.best_k_models[path] if self.mode == "min" else -self.best_k_models[path]
