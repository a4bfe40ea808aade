"""ModelCheckpoint: the best and the newest state of a run, on disk."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from engine import checkpoint, distributed
from engine.callback import Callback
from engine.callbacks.early_stopping import check_mode, monitored_value
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class ModelCheckpoint(Callback):
    """Saves at the end of epochs: the `save_top_k` best by a logged value, and the newest as `last.ckpt`.

    Paths change only after a file is complete on disk, and files go only after their successor is.

    Args:
        dirpath: Folder; default: `checkpoints` in the trainer's log folder.
        filename: Name without `.ckpt`; may hold values as in "{epoch}-{val_loss:.2f}". Without any, each better
            checkpoint replaces the one before.
        monitor: Name of the value that decides; None keeps the newest.
        mode: "min" where less is better, "max" where more is; of equals the older one is kept.
        save_top_k: How many to keep; -1 for all, 0 for none.
        save_last: Also keep the newest as `last.ckpt`, whether it is among the best or not.
        every_n_epochs: Save every so many epochs.
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
        every_n_epochs: int = 1,
        auto_insert_metric_name: bool = True,
    ) -> None:
        check_mode(mode)
        if save_top_k < -1 or (monitor is None and save_top_k > 1):
            raise MisconfigurationException(
                f"save_top_k={save_top_k}, monitor={monitor!r}; give -1, 0 or 1, or more with a value to monitor"
            )
        if every_n_epochs < 1:
            raise MisconfigurationException(f"every_n_epochs={every_n_epochs}; give a whole number from 1")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename, self.auto_insert_metric_name = filename, auto_insert_metric_name
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.save_last, self.every_n_epochs = save_last, every_n_epochs
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
        models = {str(self.dirpath / name): score for name, score in state_dict["best_k_models"].items()}
        self.best_k_models = {path: score for path, score in models.items() if Path(path).is_file()}
        best = str(self.dirpath / state_dict["best_model_path"])
        if best in self.best_k_models:
            self.best_model_path, self.best_model_score = best, state_dict["best_model_score"]

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Settle the folder."""
        if self.dirpath is None:
            self.dirpath = Path(trainer.log_dir, "checkpoints")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Save, if this epoch is one to save."""
        if trainer.fast_dev_run or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        score = 0.0
        if self.monitor is not None:
            try:
                value = monitored_value(trainer, self.monitor, "ModelCheckpoint")
            except MisconfigurationException:
                # The name is wrong, the epoch was not.
                if self.save_last:
                    self._save_last(trainer, None)
                raise
            # Every process must come to the same decision, and rank 0's value is the one in the logs.
            score = distributed.broadcast(math.nan if value is None else value)
        saved = self._save_if_among_best(trainer, score) if self.save_top_k else None
        if self.save_last:
            self._save_last(trainer, saved)

    def _save_if_among_best(self, trainer: Trainer, score: float) -> Path | None:
        assert self.dirpath is not None
        ranked = sorted(self.best_k_models, key=self._rank)
        if self.monitor is not None and (math.isnan(score) or not self._is_among_best(score, ranked)):
            return None
        full = self.save_top_k != -1 and len(ranked) >= self.save_top_k
        goes = ranked[-1] if full else None
        path = self._unused(self.dirpath / f"{self._format(trainer)}.ckpt", goes)
        before = (dict(self.best_k_models), self.best_model_path, self.best_model_score)
        # The file holds the state as it will be once the file is there; on failure the old state comes back.
        if goes is not None:
            del self.best_k_models[goes]
        self.best_k_models[str(path)] = score
        self.best_model_path = min(self.best_k_models, key=self._rank) if self.monitor else str(path)
        self.best_model_score = self.best_k_models[self.best_model_path] if self.monitor else None
        try:
            trainer.save_checkpoint(path)
        except BaseException:
            self.best_k_models, self.best_model_path, self.best_model_score = before
            raise
        if goes is not None and goes != str(path) and distributed.is_rank_zero():
            Path(goes).unlink(missing_ok=True)
        return path

    def _unused(self, path: Path, goes: str | None) -> Path:
        """`path`, with -v1, -v2, ... behind its name while another of the best, which stays, has that name."""
        free, number = path, 0
        while str(free) in self.best_k_models and str(free) != goes:
            number += 1
            free = path.with_name(f"{path.stem}-v{number}.ckpt")
        return free

    def _save_last(self, trainer: Trainer, saved: Path | None) -> None:
        assert self.dirpath is not None
        path = self.dirpath / "last.ckpt"
        if saved is None:
            trainer.save_checkpoint(path)
        elif distributed.is_rank_zero():
            checkpoint.link(saved, path)
        self.last_model_path = str(path)

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


def find_checkpoint(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> Path | None:
    """The file that `ckpt_path` stands for: itself, or the "best" or "last" of the trainer's ModelCheckpoint.

    Raises:
        MisconfigurationException: There is no such ModelCheckpoint, or it has saved nothing.
    """
    if ckpt_path not in ("best", "last"):
        return None if ckpt_path is None else Path(ckpt_path)
    callback = trainer.checkpoint_callback
    path = callback and (callback.best_model_path if ckpt_path == "best" else callback.last_model_path)
    if not path:
        raise MisconfigurationException(
            f"ckpt_path={ckpt_path!r}, but no ModelCheckpoint of this trainer has saved one; give the path of a file"
        )
    return Path(path)
