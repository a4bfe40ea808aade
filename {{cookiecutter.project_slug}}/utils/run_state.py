"""What a run's folder tells of it: its arguments, whether it is finished, and which process holds it.

A run belongs to the process that holds the lock in its folder. The system lets go of the lock when that process
ends, however it ends, so that nothing has to be tidied up after a kill.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

import engine
from utils.processes import ask_first, is_first, is_restart, launch_id

try:
    import fcntl
except ImportError:
    # Windows: runs are not locked there.
    fcntl = None  # type: ignore[assignment]

CONFIG, ENVIRONMENT, LOCK, LAUNCH = "config.yaml", "environment.json", ".lock", ".launch"
# Arguments that may change from one start of a run to the next.
FREE = {"accelerator", "devices", "num_nodes", "strategy", "num_workers", "max_time", "async_save", "log_dir"}
FREE |= {"on_device", "enable_progress_bar", "enable_model_summary"}
_held: dict[Path, TextIO] = {}


def hold(folder: Path) -> bool:
    """Take a run for this process; whether no other live process has it. Only the first of several processes asks."""
    key = folder.resolve()
    if key in _held or fcntl is None or not is_first():
        return True
    file = open(folder / LOCK, "w")  # noqa: SIM115  # closing it would let go of the run
    try:
        # Unlike flock, lockf is not inherited by the processes that read data, which outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return False
        print(
            f"warning: {folder} cannot be locked ({error.strerror}); let one process use it at a time", file=sys.stderr
        )
    if not (folder / LOCK).exists() or os.fstat(file.fileno()).st_ino != (folder / LOCK).stat().st_ino:
        # Whoever held it has removed it meanwhile: this lock would keep nobody out.
        file.close()
        return hold(folder)
    _held[key] = file
    return True


def release(folder: Path) -> None:
    """Let go of a run."""
    if (file := _held.pop(folder.resolve(), None)) is not None:
        file.close()


def mark_finished(folder: Path) -> None:
    """Note in a run's folder that there is nothing left to do."""
    write_whole(folder / ENVIRONMENT, json.dumps({**read_environment(folder), "finished": True}, indent=2) + "\n")


def choose_folder(arguments: Any, config: str) -> None:
    """Decide which run this start goes on with, if with any: `--ckpt_path auto`, and what a launcher starts again.

    Args:
        arguments: Those of the command line; changed in place.
        config: The same as YAML.

    Raises:
        MisconfigurationException: A live process holds the run.
        SystemExit: With code 0: the run is finished.
    """
    experiment = arguments.experiment or arguments.model_name
    begun, runs = begun_before(arguments.log_dir), Path(arguments.log_dir, experiment)
    if begun and Path(begun["folder"]).is_relative_to(runs):
        arguments.run_name = Path(begun["folder"]).relative_to(runs).as_posix()
        # What it began from counts until it has saved something itself.
        if begun["saved"] or begun["ckpt_path"] is None:
            arguments.ckpt_path = "auto"
    if arguments.ckpt_path == "auto":
        arguments.run_name = choose_run(config, arguments.log_dir, experiment, arguments.run_name)


def resume_from(arguments: Any) -> str | None:
    """What `Trainer.fit` is to go on from."""
    if arguments.ckpt_path == "auto" and not hasattr(engine, "trainer"):
        # Lightning goes by the name of engine. It has no auto; its last starts afresh, too, if there is no file yet.
        return "last"
    return arguments.ckpt_path


def choose_run(config: str, log_dir: str, experiment: str, run_name: str | None) -> str | None:
    """The run to go on with, taken for this process.

    Args:
        config: The arguments as YAML.
        log_dir: Folder of all runs.
        experiment: Folder of the runs to look at.
        run_name: The one run to go on with; default: an unfinished run of the same arguments that no process holds,
            that of the same Slurm job before others, and the newest of several.

    Returns:
        Its name; None where a new one is to be started.

    Raises:
        MisconfigurationException: A live process holds the run of that name.
        SystemExit: With code 0: the run is finished.
    """
    try:
        chosen = ask_first("auto", lambda: _choose(config, Path(log_dir, experiment), run_name))
    except OSError as error:
        raise engine.MisconfigurationException(f"--ckpt_path auto: {error.filename}: {error.strerror}") from error
    if chosen["held"]:
        raise engine.MisconfigurationException(
            f"--run_name {run_name}: another process, which is alive, holds that run; wait for it, or choose another"
        )
    where = Path(log_dir, experiment, chosen["name"] or "")
    if is_first() and chosen["name"] is not None and where.is_dir():
        print(f"{where} is finished; nothing to do" if chosen["finished"] else f"going on with {where}", flush=True)
    if chosen["finished"]:
        raise SystemExit(0)
    return None if chosen["name"] is None else str(chosen["name"])


def note_launch(folder: Path, log_dir: str, ckpt_path: str | None) -> None:
    """Note in a run's folder which launcher has begun it, and from what, in case that it starts the run again."""
    if launch_id() is not None and not begun_before(log_dir):
        write_whole(folder / LAUNCH, json.dumps({"launch": launch_id(), "ckpt_path": ckpt_path}) + "\n")


def begun_before(log_dir: str) -> dict[str, Any]:
    """What the launcher of this process has begun, if it now starts it again; empty otherwise.

    Args:
        log_dir: Folder of all runs.

    Returns:
        `folder` of the run, the `ckpt_path` that it began from, and whether it has `saved` anything since.
    """
    return _begun_before(log_dir) if is_restart() else {}


@functools.cache
def _begun_before(log_dir: str) -> dict[str, Any]:
    return ask_first("begun", lambda: _begun(Path(log_dir)))


def _begun(log_dir: Path) -> dict[str, Any]:
    notes = {note: _read_yaml(note) for glob in (f"*/*/{LAUNCH}", f"*/*/*/{LAUNCH}") for note in log_dir.glob(glob)}
    own = [
        note for note, content in notes.items() if isinstance(content, dict) and content.get("launch") == launch_id()
    ]
    if not own:
        return {}
    newest = max(own, key=lambda note: note.stat().st_mtime_ns)
    saved = any(newest.parent.glob("checkpoints/*.ckpt"))
    return {"folder": str(newest.parent), "ckpt_path": notes[newest].get("ckpt_path"), "saved": saved}


def job_id() -> str | None:
    """Slurm's number of the job that this process belongs to, which stays the same when the job is queued again."""
    return os.environ.get("SLURM_JOB_ID")


@contextmanager
def writing(path: Path, advice: str = "put its folder back") -> Iterator[None]:
    """Around what is written to a file or folder: an error of the disk says which it is about, and what helps."""
    try:
        yield
    except OSError as error:
        error.add_note(f"{path} could not be written; free space, or {advice}")
        error.explained = True  # type: ignore[attr-defined]
        raise


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file so that it is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with writing(path):
            temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            return temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _choose(config: str, folder: Path, run_name: str | None) -> dict[str, Any]:
    nothing: dict[str, Any] = {"name": run_name, "finished": False, "held": False}
    if run_name is not None:
        if not (folder / run_name).is_dir():
            return nothing
        held = not hold(folder / run_name)
        done = not held and _is_finished(folder / run_name)
        old, new = _comparable(_read_yaml(folder / run_name / CONFIG)), _comparable(yaml.safe_load(config))
        changed = [name for name, value in new.items() if old.get(name) != value]
        if done and changed:
            raise engine.MisconfigurationException(
                f"--run_name {run_name}: that run is finished, with another {', '.join(changed)}; choose another name, "
                "or go on with it: --ckpt_path last"
            )
        return nothing | {"held": held, "finished": done}
    wanted, job = _comparable(yaml.safe_load(config)), job_id()
    found = [file.parent for glob in (f"*/{CONFIG}", f"*/fold_*/{CONFIG}") for file in folder.glob(glob)]
    runs = [run for run in found if _comparable(_read_yaml(run / CONFIG)) == wanted]
    runs.sort(
        key=lambda run: (job is not None and read_environment(run).get("job") == job, _started(run)), reverse=True
    )
    for run in runs:
        own = job is not None and read_environment(run).get("job") == job
        if not _is_finished(run) and _try_to_hold(run):
            # Whoever held it a moment ago may have finished it.
            if not _is_finished(run):
                return nothing | {"name": run.relative_to(folder).as_posix()}
            release(run)
        if own and _is_finished(run):
            return nothing | {"name": run.relative_to(folder).as_posix(), "finished": True}
    finished = [run for run in runs if _is_finished(run)]
    # A process that was killed before it could write its arguments leaves a folder with a lock that nobody holds.
    orphans = [lock.parent for lock in folder.glob(f"*/{LOCK}") if not (lock.parent / CONFIG).exists()]
    if not finished and (taken := next(filter(_try_to_hold, orphans), None)) is not None:
        return nothing | {"name": taken.name}
    return nothing | {"name": finished[0].relative_to(folder).as_posix(), "finished": True} if finished else nothing


def _try_to_hold(folder: Path) -> bool:
    """Whether this process has the run now; one of another user's is passed over."""
    try:
        return hold(folder)
    except PermissionError:
        return False


def _comparable(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in FREE} if isinstance(config, dict) else {}


def _is_finished(run: Path) -> bool:
    return read_environment(run).get("finished") is True


def _started(run: Path) -> int:
    try:
        return (run / CONFIG).stat().st_mtime_ns
    except OSError:
        return 0


def read_environment(run: Path) -> dict[str, Any]:
    try:
        content = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def read_config(run: Path) -> dict[str, Any]:
    """The arguments of a run, by the config in its folder; empty if there is none."""
    content = _read_yaml(run / CONFIG)
    return content if isinstance(content, dict) else {}
