"""Which file `ckpt_path` stands for."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engine import checkpoint, distributed, resume, shards
from engine.callbacks.model_checkpoint import FIELD, PREVIOUS, ModelCheckpoint
from engine.exceptions import DamagedCheckpoint, MisconfigurationException

if TYPE_CHECKING:
    from engine.trainer import Trainer


def find_checkpoint(
    trainer: Trainer, ckpt_path: str | os.PathLike[str] | None
) -> tuple[Path, checkpoint.Checkpoint] | None:
    """The file that `ckpt_path` stands for, and what is in it.

    Args:
        trainer: Its ModelCheckpoint knows "best", "last" and the folder of "auto".
        ckpt_path: One of these, a path, or None.

    Returns:
        None without a path, for "auto" where the folder has no good file, and for "last" where there is none yet.

    Raises:
        MisconfigurationException: There is no such ModelCheckpoint, it has saved nothing, or the file is not good.
    """
    if ckpt_path is None:
        return None
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    path = ckpt_path
    if ckpt_path == "auto" and savers and savers[0].dirpath is not None and trainer.stage == "fit":
        return _newest_good(trainer, savers[0].dirpath)
    if ckpt_path == "last" and (savers or trainer.stage == "fit"):
        path = distributed.broadcast(_last(savers))
        if not path and trainer.stage == "fit":
            distributed.rank_zero_warn("ckpt_path='last', but there is no last checkpoint yet; the run starts afresh")
            return None
    elif ckpt_path in ("best", "last", "auto"):
        path = savers[0].best_model_path if savers and ckpt_path == "best" else ""
    if not path:
        raise MisconfigurationException(
            f"ckpt_path={ckpt_path!r}, but no ModelCheckpoint of this trainer has saved one; give the path of a file"
        )
    for saver in savers:
        saver.resumed_from = Path(path).absolute() if ckpt_path != "last" else None
    # Of Lightning's files, weights can be taken.
    return Path(path), _load(trainer, Path(path), foreign=trainer.stage != "fit")


def _load(trainer: Trainer, path: Path, foreign: bool = False, whole: bool = False) -> checkpoint.Checkpoint:
    """Read a file; tensors that are spread over processes go where the module's are."""
    place = None if trainer.device_mesh is None else shards.like(trainer.module)
    return checkpoint.load(path, foreign=foreign, place=place, whole=whole or trainer.device_mesh is None)


def _last(savers: list[ModelCheckpoint]) -> str:
    """The newest of the files that are called last, of this run or of one before it."""
    files = {Path(saver.last_model_path) for saver in savers if saver.last_model_path}
    for saver in savers:
        name = f"{FIELD.sub('*', saver.CHECKPOINT_NAME_LAST)}*{saver.FILE_EXTENSION}"
        files |= set() if saver.dirpath is None else set(saver.dirpath.glob(name))
    return str(max(files, key=lambda file: file.stat().st_mtime_ns)) if files else ""


def _newest_good(trainer: Trainer, folder: Path) -> tuple[Path, checkpoint.Checkpoint] | None:
    own = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath == folder]
    found = _search(trainer, folder) if trainer.is_global_zero else None
    # All processes take the file of the first one.
    path = distributed.broadcast(None if found is None else found[0])
    if path is not None:
        for callback in own:
            callback.newest = path
        last = next((c.CHECKPOINT_NAME_LAST + c.FILE_EXTENSION for c in own if c.save_last), "{}")
        if trainer.is_global_zero and "{" not in last:
            # The newest file may have been cut off from its other name, or that one be damaged. A disk that is full for
            # a second copy is no reason not to go on.
            with suppress(OSError):
                checkpoint.link(path, folder / last)
        return found or (path, _load(trainer, path))
    for callback in own:
        # What is there is this run's, and no good.
        callback.others = set()
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
            loaded = _load(trainer, file, whole=True)
            resume.check_resumable(file, loaded)
            return file, loaded
        except DamagedCheckpoint as error:
            distributed.rank_zero_warn(f"{str(error).partition('; ')[0]}; looking for an older one")
    if found:
        distributed.rank_zero_warn(f"{folder} has no good checkpoint; the run starts afresh")
    return None
