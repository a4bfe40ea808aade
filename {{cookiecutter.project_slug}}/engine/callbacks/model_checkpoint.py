"""ModelCheckpoint: the best and the newest state of a run, on disk."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from engine import checkpoint, distributed, resume
from engine.callback import Callback
from engine.callbacks.early_stopping import check_mode, monitored_value
from engine.exceptions import MisconfigurationException
from engine.faults import check_weights
from engine.loggers import make_folder

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer

# The file written before the newest one.
PREVIOUS = "previous.ckpt"


class ModelCheckpoint(Callback):
    """Saves at the end of epochs: the `save_top_k` best by a logged value, and the newest as `last.ckpt`.

    Paths change only after a file is complete on disk, and files go only after their successor is. While training, the
    file that was written before the newest is kept as `previous.ckpt`, should the newest turn out to be damaged. A run
    that is interrupted leaves its state in `last.ckpt` in any case.

    Args:
        dirpath: Folder; default: `checkpoints` in the trainer's log folder.
        filename: Name without `.ckpt`; may hold values as in "{epoch}-{val_loss:.2f}". Without any, each better
            checkpoint replaces the one before.
        monitor: Name of the value that decides; None keeps the newest.
        mode: "min" where less is better, "max" where more is; of equals the older one is kept.
        save_top_k: How many to keep; -1 for all, 0 for none.
        save_last: Also keep the newest as `last.ckpt`, whether it is among the best or not.
        every_n_epochs: Save every so many epochs; default: 1.
        every_n_train_steps: Save after every so many optimizer steps instead.
        auto_insert_metric_name: Write "epoch=3-val_loss=0.12" rather than "3-0.12".
    """

    monitoring: ClassVar[bool] = True

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "{epoch}-{step}",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = False,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        auto_insert_metric_name: bool = True,
    ) -> None:
        check_mode(mode)
        if filename in ("last", Path(PREVIOUS).stem):
            raise MisconfigurationException(f"filename={filename!r} is the name of another file; choose another name")
        if save_top_k < -1 or (monitor is None and save_top_k > 1):
            raise MisconfigurationException(
                f"save_top_k={save_top_k}, monitor={monitor!r}; give -1, 0 or 1, or more with a value to monitor"
            )
        for name, every in {"every_n_epochs": every_n_epochs, "every_n_train_steps": every_n_train_steps}.items():
            if every is not None and (type(every) is not int or every < 1):
                raise MisconfigurationException(f"{name}={every!r}; give a whole number from 1")
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise MisconfigurationException("every_n_epochs and every_n_train_steps: give one, or two ModelCheckpoints")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename, self.auto_insert_metric_name = filename, auto_insert_metric_name
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.save_last, self.every_n_train_steps = save_last, every_n_train_steps
        self.every_n_epochs = 1 if every_n_epochs is None else every_n_epochs
        self._newest: Path | None = None
        self._saved_step = 0
        self.best_k_models: dict[str, float] = {}
        self.best_model_path = ""
        self.best_model_score: float | None = None
        self.last_model_path = ""

    @property
    def state_key(self) -> str:
        """Told apart by what is watched."""
        return f"ModelCheckpoint[{self.monitor}, {self.mode}, {self.filename}]"

    def state_dict(self) -> dict[str, Any]:
        """Which files there are, by name, so that a run folder can be moved."""
        return {
            "best_k_models": {self._name(path): score for path, score in self.best_k_models.items()},
            "best_model_path": self._name(self.best_model_path) if self.best_model_path else "",
            "best_model_score": self.best_model_score,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, as far as the files are in this run's folder."""
        assert self.dirpath is not None
        # What a file names is deleted one day: checkpoints of this folder only, and no links out of it.
        folder = self.dirpath.resolve()
        models = {self.dirpath / name: float(score) for name, score in state_dict["best_k_models"].items()}
        own = [path for path in models if path.suffix == ".ckpt" and path.resolve().is_relative_to(folder)]
        self.best_k_models = {str(path): models[path] for path in own if path.is_file()}
        best = str(self.dirpath / state_dict["best_model_path"])
        if best in self.best_k_models:
            self.best_model_path, self.best_model_score = best, state_dict["best_model_score"]

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Settle the folder, and clear away what a killed process left half-written."""
        if self.dirpath is None:
            self.dirpath = Path(trainer.log_dir, "checkpoints")
        if stage == "fit" and trainer.is_global_zero:
            for file in self.dirpath.glob(f"*.ckpt{checkpoint.TEMPORARY}"):
                file.unlink(missing_ok=True)
        self._newest = None

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Make the folder, or say that it cannot be made before a step is lost."""
        self._saved_step = trainer.global_step
        if trainer.is_global_zero and not trainer.fast_dev_run and self.dirpath is not None:
            make_folder(self.dirpath)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Save, if this step is one to save."""
        if not self.every_n_train_steps:
            return
        step = trainer.global_step
        if step % self.every_n_train_steps == 0 and step != self._saved_step:
            self._saved_step = step
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save, if this epoch is one to save."""
        if not self.every_n_train_steps and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """A finished run needs no second file to fall back to."""
        trainer.writer.wait()
        if not trainer.interruption and self.dirpath is not None and trainer.is_global_zero:
            (self.dirpath / PREVIOUS).unlink(missing_ok=True)

    def save_last_now(self, trainer: Trainer) -> Path:
        """Write `last.ckpt`, whatever else was to be saved when."""
        assert self.dirpath is not None
        path = self.dirpath / "last.ckpt"
        trainer.writer.wait()
        self._write(trainer, path, path, None)
        trainer.writer.wait()
        distributed.barrier()
        return path

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        assert self.dirpath is not None
        # What was saved last decides what is among the best now.
        trainer.writer.wait()
        last = self.dirpath / "last.ckpt" if self.save_last else None
        score = 0.0
        if self.monitor is not None:
            try:
                value = monitored_value(trainer, self.monitor, "ModelCheckpoint")
            except MisconfigurationException:
                # The name is wrong, the epoch was not.
                if last is not None:
                    self._write(trainer, last, last, None)
                raise
            # Every process must come to the same decision, and rank 0's value is the one in the logs.
            score = distributed.broadcast(math.nan if value is None else value)
        ranked = sorted(self.best_k_models, key=self._rank)
        judged = self.monitor is None or not math.isnan(score)
        if self.save_top_k and judged and (self.monitor is None or self._is_among_best(score, ranked)):
            goes = ranked[-1] if self.save_top_k != -1 and len(ranked) >= self.save_top_k else None
            path = self._unused(self.dirpath / f"{self._format(trainer)}.ckpt", goes)
            self._write(trainer, path, last, goes, score)
        elif last is not None:
            self._write(trainer, last, last, None)

    def _write(self, trainer: Trainer, path: Path, last: Path | None, goes: str | None, score: float = 0.0) -> None:
        """Write a file; it holds the ranking that is true once it is there, which becomes this callback's only then."""
        assert self.dirpath is not None
        before = self._ranking()
        if path != last:
            self.best_k_models = {k: v for k, v in self.best_k_models.items() if k != goes} | {str(path): score}
            self.best_model_path = min(self.best_k_models, key=self._rank) if self.monitor else str(path)
            self.best_model_score = self.best_k_models[self.best_model_path] if self.monitor else None
        try:
            captured = resume.capture(trainer)
        finally:
            after = self._ranking()
            self.best_k_models, self.best_model_path, self.best_model_score = before

        def committed() -> None:
            self.best_k_models, self.best_model_path, self.best_model_score = after
            if last is not None:
                if path != last and distributed.is_rank_zero():
                    checkpoint.link(path, last)
                self.last_model_path = str(last)
            if goes is not None and goes != str(path) and distributed.is_rank_zero():
                Path(goes).unlink(missing_ok=True)

        if not distributed.is_rank_zero():
            committed()
            return
        # Another ModelCheckpoint may have written it.
        newest = self.dirpath / "last.ckpt" if self.save_last else self._newest
        keep = None if newest is None else (newest, self.dirpath / PREVIOUS)
        trainer.writer.write(captured, path, keep, committed, partial(check_weights, trainer))
        self._newest = last or path

    def _ranking(self) -> tuple[dict[str, float], str, float | None]:
        return self.best_k_models, self.best_model_path, self.best_model_score

    def _unused(self, path: Path, goes: str | None) -> Path:
        """`path`, with -v1, -v2, ... behind its name while another of the best, which stays, has that name."""
        free, number = path, 0
        while str(free) in self.best_k_models and str(free) != goes:
            number += 1
            free = path.with_name(f"{path.stem}-v{number}.ckpt")
        return free

    def _name(self, path: str) -> str:
        assert self.dirpath is not None
        return Path(os.path.relpath(path, self.dirpath)).as_posix()

    def _is_among_best(self, score: float, ranked: list[str]) -> bool:
        if self.save_top_k == -1 or len(ranked) < self.save_top_k:
            return True
        worst = self.best_k_models[ranked[-1]]
        return score < worst if self.mode == "min" else score > worst

    def _rank(self, path: str) -> float:
        return self.best_k_models[path] if self.mode == "min" else -self.best_k_models[path]

    def _format(self, trainer: Trainer) -> str:
        values, metrics = {"epoch": trainer.current_epoch, "step": trainer.global_step}, trainer.callback_metrics

        def fill(match: re.Match[str]) -> str:
            name, spec = match[1], match[2] or ""
            if name not in values and name not in metrics:
                known = ", ".join(sorted({*values, *metrics}))
                raise MisconfigurationException(f"filename={self.filename!r}: no {name} was logged, only {known}")
            number = values[name] if name in values else float(metrics[name])
            return f"{f'{name}=' if self.auto_insert_metric_name else ''}{number:{spec}}"

        return re.sub(r"\{([^:{}]+)(?::([^{}]*))?\}", fill, self.filename)


def find_checkpoint(
    trainer: Trainer, ckpt_path: str | os.PathLike[str] | None
) -> tuple[Path, checkpoint.Checkpoint] | None:
    """The file that `ckpt_path` stands for, and what is in it.

    Args:
        trainer: Its ModelCheckpoint knows "best", "last" and the folder of "auto".
        ckpt_path: One of these, a path, or None.

    Returns:
        None without a path, and for "auto" where the folder has no good file.

    Raises:
        MisconfigurationException: There is no such ModelCheckpoint, it has saved nothing, or the file is not good.
    """
    if ckpt_path is None:
        return None
    if ckpt_path not in ("best", "last", "auto"):
        return Path(ckpt_path), checkpoint.load(Path(ckpt_path))
    callback = trainer.checkpoint_callback
    if ckpt_path == "auto" and callback is not None and callback.dirpath is not None and trainer.stage == "fit":
        return _newest_good(trainer, callback.dirpath)
    path = callback and (callback.best_model_path if ckpt_path == "best" else callback.last_model_path)
    if not path or ckpt_path == "auto":
        raise MisconfigurationException(
            f"ckpt_path={ckpt_path!r}, but no ModelCheckpoint of this trainer has saved one; give the path of a file"
        )
    return Path(path), checkpoint.load(Path(path))


def _newest_good(trainer: Trainer, folder: Path) -> tuple[Path, checkpoint.Checkpoint] | None:
    found = _search(trainer, folder) if trainer.is_global_zero else None
    # All processes take the file of the first one.
    path = distributed.broadcast(None if found is None else found[0])
    if path is not None:
        own = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath == folder]
        for callback in own:
            callback._newest = path
        if trainer.is_global_zero and any(callback.save_last for callback in own):
            # The newest file may have been cut off from its other name, or that one be damaged. A disk that is full for
            # a second copy is no reason not to go on.
            with suppress(OSError):
                checkpoint.link(path, folder / "last.ckpt")
        return found or (path, checkpoint.load(path))
    for logger in trainer.loggers if folder.is_dir() else ():
        # What a killed run has logged before its first checkpoint.
        if hasattr(logger, "load_state_dict"):
            logger.load_state_dict({})
    return None


def _search(trainer: Trainer, folder: Path) -> tuple[Path, checkpoint.Checkpoint] | None:
    try:
        found = [
            (file.name != PREVIOUS, file.stat().st_mtime_ns, file) for file in folder.glob("*.ckpt") if file.is_file()
        ]
    except OSError as error:
        raise MisconfigurationException(f"the checkpoints in {folder} cannot be listed: {error.strerror}") from error
    for *_, file in sorted(found, reverse=True):
        try:
            loaded = checkpoint.load(file)
            resume.check_resumable(file, loaded)
            return file, loaded
        except checkpoint.DamagedCheckpoint as error:
            distributed.rank_zero_warn(f"{str(error).partition('; ')[0]}; looking for an older one")
    if found:
        distributed.rank_zero_warn(f"{folder} has no good checkpoint; the run starts afresh")
    return None
