"""`python main.py predict`: what a net says of test data, or of pictures, tables and arrays that lie anywhere.

Predictions are written batch by batch, and none of them is kept.
"""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

import engine
from utils.arguments import constructor_arguments
from utils.batches import shape_of
from utils.exits import exit_with, one_line
from utils.inputs import KINDS, open_input
from utils.run_folder import remember, run_folder
from utils.run_state import writing
from utils.samples import per_sample

# Faults that are told one by one.
MOST_TOLD = 10


def predict(model: Any, data: Any, arguments: Any) -> dict[str, float]:
    """Write predictions, and say where.

    Args:
        model: The MInterface.
        data: The DInterface. With `--input` it only makes the loader, and need not have any data.
        arguments: Those of the command line.

    Returns:
        Nothing: predictions have no metrics.

    Raises:
        MisconfigurationException: The input does not suit the net, nothing of it can be read, or the output cannot be
            made.
        SystemExit: With code 1: some of the inputs could not be read; all others were predicted. With 130 or 143:
            Ctrl-C, or SIGTERM.
    """
    path, source = Path(arguments.ckpt_path), arguments.input
    output = _output(path, arguments.output, source)
    batches: dict[str, Any] = {"datamodule": data}
    if source is not None:
        about = remember(model, path)
        batches = {"dataloaders": data.loader(open_input(source, about.get("inputs"), data))}
    with stoppable(output), replacing(output) as file:
        writer = WritePredictions(file, output, None if source is not None else data)
        settings = constructor_arguments(engine.Trainer, arguments)
        trainer = engine.Trainer(**settings, logger=False, callbacks=[writer])
        trainer.predict(model, **batches, ckpt_path=path, return_predictions=False)
        writer.finish(source)
    print(f"predictions  {writer.count - writer.faulty:,} in {output}\ncheckpoint   {path}")
    if writer.faulty:
        rows = "its row is" if writer.faulty == 1 else "their rows are"
        exit_with(f"{writer.faulty} of {writer.count} inputs could not be read; {rows} empty in {output}", code=1)
    return {}


def _output(checkpoint: Path, wanted: str | None, source: str | None) -> Path:
    """The file to write, once it is clear that it can be one."""
    path = (run_folder(checkpoint) or Path()) / "predictions.csv" if wanted is None else Path(wanted)
    if path.suffix.lower() not in (".csv", ".npy"):
        raise engine.MisconfigurationException(f"--output {path}: give a file that ends in .csv or .npy")
    if path.is_dir():
        raise engine.MisconfigurationException(f"--output {path} is a folder; give a file")
    if source is not None and os.path.exists(source) and path.exists() and path.samefile(source):
        raise engine.MisconfigurationException(f"--output {path} is the input; give another file")
    return path


@contextmanager
def stoppable(path: Path) -> Iterator[None]:
    """Around what writes a file: SIGTERM ends it as Ctrl-C does, so that nothing half-written stays."""

    def stop(number: int, frame: Any) -> None:
        exit_with(f"SIGTERM: stopped; {path} was not written", code=143)

    # Python lets only the main thread set handlers.
    heeds = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if heeds:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        exit_with(f"interrupted; {path} was not written", code=130)
    finally:
        if heeds:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of `path` at the end; if anything goes wrong, all is left as it was.

    Raises:
        MisconfigurationException: It cannot be made.
        OSError: It cannot be written to its end.
    """
    # What a link stands for is replaced, not the link.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    made = [folder for folder in target.parents if not folder.exists()]
    file = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = open(temporary, "wb")  # noqa: SIM115  # closing it may fail, too
        except OSError as error:
            raise engine.MisconfigurationException(
                f"--output {path} cannot be made ({error.strerror}); choose another"
            ) from error
        yield file
        with writing(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            if file is not None:
                file.close()
        with suppress(OSError):
            temporary.unlink()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


class Writer(Protocol):
    """A file that takes predictions, batch by batch."""

    def write(self, rows: Tensor, about: Sequence[dict[str, Any]]) -> None:
        """Append the predictions of a batch, float32 of shape (batch, ...), and what is known of each sample."""

    def finish(self, count: int) -> None:
        """Complete the file, after so many samples."""


class CsvWriter:
    """A row for each sample, in UTF-8; lone surrogates, as of file names in other encodings, are written as \\udcxx.

    Args:
        file: Where to.
        columns: What is known of samples: keys of `about`, of which `error` comes last.
        class_names: Names of the classes, if they are known.
        task: Probabilities follow a class, values of a regression stand alone.
        width: Numbers in a row.
    """

    def __init__(
        self, file: BinaryIO, columns: list[str], class_names: list[str] | None, task: str, width: int
    ) -> None:
        self.file, self.columns, self.width = file, columns, width
        self.single = task in ("multiclass", "sequence")
        fits = class_names and len(class_names) == width
        self.labels = class_names if class_names and fits else [str(number) for number in range(width)]
        kind = "value" if task == "regression" else "probability"
        names = [f"{kind}_{label}" for label in self.labels] if width > 1 else [kind]
        self.last = [name for name in columns if name == "error"]
        self.first = [name for name in columns if name != "error"]
        self._write([[*self.first, *["class"] * self.single, *names, *self.last]])

    def write(self, rows: Tensor, about: Sequence[dict[str, Any]]) -> None:
        """See `Writer`."""
        self._write(map(self._cells, rows.reshape(len(rows), -1).tolist(), about))

    def _cells(self, row: list[float], told: dict[str, Any]) -> list[Any]:
        if told.get("error"):
            predicted = [""] * (self.single + self.width)
        else:
            predicted = [self.labels[max(range(self.width), key=row.__getitem__)]] if self.single else []
            predicted += [f"{value:.6g}" for value in row]
        return [*(told[name] for name in self.first), *predicted, *(told[name] for name in self.last)]

    def _write(self, lines: Any) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        self.file.write(text.getvalue().encode("utf-8", "backslashreplace"))

    def finish(self, count: int) -> None:
        """See `Writer`."""


class ArrayWriter:
    """A float32 array of shape (samples, *shape); rows of what could not be read are NaN.

    Not mapped into memory, where a full disk would end the process with a signal.

    Args:
        file: Where to.
        shape: Shape of a sample's prediction.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, ...]) -> None:
        self.file, self.shape = file, shape
        self.file.write(self._header(0))

    def _header(self, count: int) -> bytes:
        header = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": (count, *self.shape)}
        # Of the same length for every count: numpy leaves room for arrays that grow.
        np.lib.format.write_array_header_1_0(header, about)
        return header.getvalue()

    def write(self, rows: Tensor, about: Sequence[dict[str, Any]]) -> None:
        """See `Writer`."""
        faulty = torch.tensor([bool(told.get("error")) for told in about])
        rows = torch.where(faulty.reshape(-1, *[1] * (rows.ndim - 1)), torch.nan, rows)
        self.file.write(rows.numpy().astype("<f4").tobytes())

    def finish(self, count: int) -> None:
        """See `Writer`."""
        self.file.seek(0)
        self.file.write(self._header(count))


class WritePredictions(engine.Callback):
    """Writes what each batch gave as soon as it is there.

    Args:
        file: Where to.
        path: What the file will be called: .csv or .npy.
        data: The DInterface whose sets are predicted; None for batches of `utils.inputs`.

    Attributes:
        count: Samples so far.
        faulty: Those of them that could not be read.
    """

    def __init__(self, file: BinaryIO, path: Path, data: Any) -> None:
        self.file, self.path, self.data = file, path, data
        self.count = self.faulty = 0
        self.counts: dict[int, int] = {}
        self.first_fault = ""
        self.writer: Writer | None = None
        self.shape: tuple[int, ...] = ()
        self.names: dict[str, list[Any] | None] = {}

    def on_predict_batch_end(
        self,
        trainer: engine.Trainer,
        pl_module: engine.Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of a batch."""
        if not isinstance(outputs, Tensor) or not outputs.ndim:
            raise engine.MisconfigurationException(
                f"predict_step gives {shape_of(outputs)}; let it give a tensor with a row for each sample"
            )
        rows = outputs.detach().float().cpu()
        about = self._of_sets(rows, dataloader_idx) if self.data is not None else self._of_inputs(rows, batch)
        with writing(self.path):
            if self.writer is None:
                self.writer, self.shape = self._begin(rows, about, pl_module.hparams), tuple(rows.shape[1:])
            if rows.shape[1:] != self.shape:
                raise engine.MisconfigurationException(
                    f"predictions of shape {tuple(rows.shape[1:])} follow others of {self.shape}; one file holds one "
                    "shape"
                )
            self.writer.write(rows, about)
        self.count += len(rows)
        self.counts[dataloader_idx] = self.counts.get(dataloader_idx, 0) + len(rows)

    def finish(self, source: str | None) -> None:
        """Complete the file.

        Args:
            source: The `--input`, if there is one.

        Raises:
            MisconfigurationException: Nothing could be predicted.
        """
        what = "the dataset" if source is None else f"--input {source}"
        if self.writer is None:
            raise engine.MisconfigurationException(f"{what}: nothing to predict; see also limit_predict_batches")
        if self.faulty == self.count:
            raise engine.MisconfigurationException(
                f"{what}: nothing of it can be read ({self.first_fault}); give what the net was trained on: {KINDS}"
            )
        if self.faulty > MOST_TOLD:
            print(f"warning: {self.faulty - MOST_TOLD} more of the inputs could not be read", file=sys.stderr)
        with writing(self.path):
            self.writer.finish(self.count)

    def _begin(self, rows: Tensor, about: list[dict[str, Any]], learned: Any) -> Writer:
        if self.path.suffix.lower() == ".npy":
            return ArrayWriter(self.file, tuple(rows.shape[1:]))
        if rows.ndim > 2 and learned["task"] == "multiclass":
            raise engine.MisconfigurationException(
                f"a sample has predictions of shape {tuple(rows.shape[1:])}, which is no row; give --output X.npy"
            )
        return CsvWriter(self.file, list(about[0]), learned["class_names"], learned["task"], rows[0].numel())

    def _of_sets(self, rows: Tensor, number: int) -> list[dict[str, Any]]:
        """What is known of a batch of the datasets, by column."""
        sets = self.data.sets["predict"]
        self.names = self.names or {name: per_sample(dataset, "names") for name, dataset in sets.items()}
        dataset, begin = list(sets)[number], self.counts.get(number, 0)
        named, told = any(self.names.values()), []
        for index in range(begin, begin + len(rows)):
            of_set = {"dataset": dataset} if len(sets) > 1 else {}
            of_name = {"name": (self.names[dataset] or {index: ""})[index]} if named else {}
            told.append({**of_set, "index": index, **of_name})
        return told

    def _of_inputs(self, rows: Tensor, batch: Any) -> list[dict[str, Any]]:
        """What is known of a batch of `utils.inputs`, by column; counts and tells faults."""
        _, names, faults = batch
        if len(rows) != len(names):
            raise engine.MisconfigurationException(f"predict_step gives {len(rows)} rows for {len(names)} samples")
        finite = rows.reshape(len(rows), -1).isfinite().all(dim=1).tolist()
        told = []
        for index, (name, fault) in enumerate(zip(names, faults, strict=True), self.count):
            fault = fault or ("" if finite[index - self.count] else "what the net makes of it is not finite")
            if fault:
                fault = one_line(fault)
                self._tell(f"{name or f'sample {index}'}: {fault}")
            told.append({"index": index, **({"name": name} if any(names) else {}), "error": fault})
        return told

    def _tell(self, fault: str) -> None:
        self.faulty += 1
        self.first_fault = self.first_fault or fault
        if self.faulty <= MOST_TOLD:
            print(f"warning: {one_line(fault)}", file=sys.stderr)
