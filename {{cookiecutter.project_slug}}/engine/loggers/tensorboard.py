"""TensorBoardLogger."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.distributed import is_rank_zero, rank_zero_warn
from engine.export import evaluating
from engine.hooks import move_to_device
from engine.loggers.logger import DummyExperiment, FolderLogger, make_folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(FolderLogger):
    """Scalars for `tensorboard --logdir SAVE_DIR`, in `save_dir/name/version/sub_dir`.

    Args:
        save_dir: Folder of all experiments.
        name: Name of the experiment; an empty one stands for no folder of its own.
        version: Name of the run; a number n stands for version_n, None for the next free number.
        log_graph: Draw the model, if it has an `example_input_array`.
        default_hp_metric: Log a metric `hp_metric` of -1 with hyper-parameters that come without metrics; TensorBoard
            shows them only with one.
        prefix: Text in front of all names of metrics, with a dash.
        sub_dir: Folder within that of the run.
        **kwargs: Further arguments of `torch.utils.tensorboard.SummaryWriter`. Without `max_queue` or `flush_secs` an
            event is in the run's file once it is logged; with one of them a thread writes, which a slow disk asks for.
    """

    _writer: SummaryWriter | None = None
    _written = ""

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self.sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._log_graph, self._default_hp_metric, self._options = log_graph, default_hp_metric, kwargs

    @property
    def log_dir(self) -> str:
        """Folder of the run, with `~` and variables of the environment filled in."""
        return os.path.expanduser(os.path.expandvars(Path(super().log_dir, self.sub_dir or "")))

    @property
    def experiment(self) -> SummaryWriter | Any:
        """The SummaryWriter, for figures, images and the like; on other ranks than 0 one that does nothing."""
        if not is_rank_zero():
            return DummyExperiment()
        if self._writer is None:
            # Imported when it is needed: `--help` and runs without this logger need not wait for it.
            from torch.utils.tensorboard import SummaryWriter

            make_folder(Path(self.log_dir))
            self._writer = SummaryWriter(self.log_dir, **self._options)
            events = self._writer._get_file_writer().event_writer  # type: ignore[no-untyped-call]
            threaded, appends = events._async_writer, hasattr(events._general_file_writer, "fs_supports_append")
            if appends and self._options.keys().isdisjoint(("max_queue", "flush_secs")):
                # To hand an event over to TensorBoard's thread takes longer than to write it.
                threaded.flush()
                events._async_writer = threaded._writer
                threaded._worker.stop()
        return self._writer

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write a scalar for each number, and one with several lines for each dict of numbers."""
        values = self._prefixed(metrics)
        for name in [name for name, value in values.items() if isinstance(value, dict)]:
            self.experiment.add_scalars(name, values.pop(name), step)
        if values and is_rank_zero():
            from tensorboard.compat.proto.summary_pb2 import Summary

            # One event for all of them, which takes half of the time.
            scalars = [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
            self.experiment._get_file_writer().add_summary(Summary(value=scalars), step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, metrics: Any = None, step: int | None = None) -> None:
        """Write hyper-parameters to `hparams.yaml`, and for TensorBoard's HPARAMS page.

        Args:
            params: Hyper-parameters; those within others get names with slashes.
            metrics: Numbers by name that they led to, or one number.
            step: Step of these.
        """
        super().log_hyperparams(params)
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, dict):
            metrics = {"hp_metric": metrics}
        # A test that follows a fit has the same ones.
        written, self._written = self._written, repr((_flat(params), metrics))
        if metrics and is_rank_zero() and self._written != written:
            from torch.utils.tensorboard.summary import hparams as hparams_summary

            self.log_metrics(metrics, step)
            file_writer = self.experiment._get_file_writer()
            for summary in hparams_summary(_flat(params), metrics):  # type: ignore[no-untyped-call]
                file_writer.add_summary(summary, step)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Draw the operations of a model in a run, on an example: a tensor, or a tuple of arguments of `forward`."""
        if not self._log_graph or not is_rank_zero():
            return
        example = model.example_input_array if input_array is None else input_array
        if isinstance(example, Tensor | tuple):
            with evaluating(model):
                self.experiment.add_graph(model, move_to_device(example, model.device))
        else:
            rank_zero_warn(
                f"log_graph: no graph is drawn, since example_input_array is a {type(example).__name__}; set it in the "
                "module's __init__, to a tensor or a tuple of the arguments of forward"
            )

    def state_dict(self) -> dict[str, Any]:
        """Bytes of each event file."""
        return {file.name: file.stat().st_size for file in self._files()} if is_rank_zero() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cut the event files of this folder to the bytes they had, and remove those that came later.

        Another run's folder, and files that no SummaryWriter has named, are left alone.
        """
        self.finalize("resumed")
        files = self._files() if is_rank_zero() else []
        if not state_dict.keys() <= {file.name for file in files}:
            return
        for file in files:
            if file.name not in state_dict:
                if re.fullmatch(r"events\.out\.tfevents\.\d+\..+\.\d+\.\d+", file.name):
                    file.unlink()
            elif file.stat().st_size > int(state_dict[file.name]) >= 0:
                os.truncate(file, int(state_dict[file.name]))

    def save(self) -> None:
        """Bring everything to disk."""
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Close the file; logging again would open another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))


def _flat(params: Any, path: str = "") -> dict[str, bool | int | float | str]:
    """Hyper-parameters by their path, as values that TensorBoard takes."""
    params = vars(params) if isinstance(params, Namespace) else params
    flat: dict[str, bool | int | float | str] = {}
    for name, value in params.items():
        value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(value, Mapping | Namespace):
            flat |= _flat(value, f"{path}{name}/")
        else:
            value = value.item() if getattr(value, "ndim", None) == 0 else value
            flat[f"{path}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
