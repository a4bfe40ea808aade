"""`report/` in a run's folder: figures, and a page that shows them; the same figures in TensorBoard."""

from __future__ import annotations

import io
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import engine
from utils import figures
from utils.report.logs import read_curves, read_speed
from utils.report.page import Page
from utils.report.results import Results
from utils.report.sections import (
    class_names,
    show_curves,
    show_curves_of_folds,
    show_folds,
    show_metrics,
    show_rate_and_speed,
    show_results,
    show_samples,
    show_settings,
)
from utils.run_folder import run_folder
from utils.run_state import read_config, read_environment, writing
from utils.samples import per_sample

PAGE = "report.html"


class Report(engine.Callback):
    """Looks on while a checkpoint is judged, and writes the report when it was tested.

    Args:
        arguments: Those of the command line.
        checkpoint: The one that the command `report` was given; what goes wrong is an error then. Default: the best of
            the run that ends, which is not to be lost for want of a figure.
        watch: Count what is right and wrong; otherwise only metrics are kept, and shown in TensorBoard.
        draw: Write figures and page, if it was watched.

    Attributes:
        metrics: Of the checkpoint, on validation and test sets.
        results: What it made of them, by split and, of several, by name: "val", or "test/night".
        title: What was trained on what.
        class_names: As the data tells them, if it does.
        page: The page, once it is written.
    """

    def __init__(self, arguments: Any, checkpoint: Path | None = None, watch: bool = True, draw: bool = True) -> None:
        self.arguments, self.checkpoint, self.watch, self.draw = arguments, checkpoint, watch, draw
        self.metrics: dict[str, float] = {}
        self.results: dict[str, Results] = {}
        self.title = ""
        self.class_names: list[str] | None = None
        self.page: Path | None = None
        self._stage, self._over = "", False

    def setup(self, trainer: engine.Trainer, pl_module: engine.Module, stage: str) -> None:
        """Note what the trainer is about to do; validation within fit is of no concern."""
        self._stage = {"validate": "val", "test": "test"}.get(stage, "")

    def on_validation_batch_end(
        self, trainer: engine.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        if self._stage and self.watch:
            self._add(trainer, pl_module, outputs, batch, dataloader_idx)

    def on_test_batch_end(
        self, trainer: engine.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        if self.watch:
            self._add(trainer, pl_module, outputs, batch, dataloader_idx)

    def _add(self, trainer: engine.Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        told = isinstance(outputs, dict) and outputs.keys() >= {"outputs", "targets"}
        pair = isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)
        if not told or not pair or trainer.fast_dev_run:
            # Steps or batches of one's own.
            return
        data: Any = trainer.datamodule
        names = data.names[self._stage]
        key = f"{self._stage}/{names[number]}" if len(names) > 1 else self._stage
        if key not in self.results:
            dataset = self._set(data, key)
            size = len(dataset) if dataset is not None else None
            self.results[key] = Results(module.hparams["task"], module.num_outputs, size)
        self.results[key].add(batch[0], outputs["outputs"], outputs["targets"], len(batch[1]), module.scale)

    def _set(self, data: Any, key: str) -> Any:
        """The set that a key of `results` stands for; None if the loader was not made of one by DInterface."""
        split, _, name = key.partition("/")
        return data.sets.get(split, {}).get(name or data.names[split][0])

    def on_validation_end(self, trainer: engine.Trainer, pl_module: Any) -> None:
        """Add up what was counted."""
        if self._stage:
            self._close(trainer, pl_module)

    def on_test_end(self, trainer: engine.Trainer, pl_module: Any) -> None:
        """Add up what was counted, and write the report."""
        self._close(trainer, pl_module)
        self._write(trainer, pl_module)

    def on_exception(self, trainer: engine.Trainer, pl_module: engine.Module, exception: BaseException) -> None:
        """There will be nothing to report on."""
        self._over = True

    def teardown(self, trainer: engine.Trainer, pl_module: engine.Module, stage: str) -> None:
        """Write the report of a run that nothing was tested in."""
        if stage == "test" and not self._over:
            self._write(trainer, pl_module)

    def _close(self, trainer: engine.Trainer, module: Any) -> None:
        """Add up what the processes have counted: each of them comes here."""
        data: Any = trainer.datamodule
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.class_names = module.hparams.get("class_names")
        for key, results in self.results.items():
            if key.partition("/")[0] == self._stage:
                dataset = self._set(data, key)
                results.merge(None if dataset is None else per_sample(dataset, "names"))

    def _write(self, trainer: engine.Trainer, module: Any) -> None:
        """Draw and write everything, in one process; nothing here waits for others."""
        self._over = True
        data: Any = trainer.datamodule
        self.title = f"{self.arguments.model_name} on {', '.join(data.names['train'])}"
        # Asked by every process, since in Lightning this is a broadcast.
        log_dir = Path(trainer.log_dir or "")
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, engine.loggers.TensorBoardLogger):
                final = {f"final/{name}": value for name, value in self.metrics.items()}
                logger.log_hyperparams({**module.hparams, **data.hparams}, final)
            logger.save()
        if self.watch and self.draw:
            with nullcontext() if self.checkpoint is not None else only_warned():
                run = log_dir if self.checkpoint is None else run_folder(self.checkpoint)
                page = self._draw(run, data)
                self.page = write(self._folder(run), page)
                for logger in trainer.loggers:
                    if isinstance(logger, engine.loggers.TensorBoardLogger):
                        show_in_tensorboard(logger.experiment, page, trainer.global_step)
                        draw_graph(logger.experiment, module)
                        logger.save()

    def _folder(self, run: Path | None) -> Path:
        """Where the report goes: each checkpoint has its own."""
        name = "best" if self.checkpoint is None else self.checkpoint.stem
        return Path(f"{name}-report") if run is None else run / ("report" if name == "best" else f"report-{name}")

    def _draw(self, folder: Path | None, data: Any) -> Page:
        """The page, with all figures; `folder` is the run's, if there is one."""
        from utils.metrics import usual_mode

        given = self.arguments.as_dict() | ({} if folder is None else read_config(folder))
        page = Page(self.title, str(self.checkpoint or folder))
        with figures.style():
            name = "best" if self.checkpoint is None else self.checkpoint.stem
            show_metrics(page, self.metrics, "best checkpoint" if name == "best" else f"{name}.ckpt")
            curves = {}
            if folder is not None and (folder / "metrics.csv").is_file():
                curves = read_curves(folder / "metrics.csv")
                show_curves(page, curves, given["monitor"], given["monitor_mode"] or usual_mode(given["monitor"]))
            tested = [key for key in self.results if key.startswith("test")]
            for key in tested or self.results:
                names = class_names(self.results[key], self.class_names)
                show_results(page, self.results[key], names, key)
            environment = {} if folder is None else read_environment(folder)
            if folder is not None:
                step = given["batch_size"] * given["accumulate_grad_batches"] * environment.get("processes", 1)
                show_rate_and_speed(page, curves, read_speed(folder, step))
            for split in [split for split in ("train", "test", "val") if data.sets.get(split)][:1]:
                dataset = next(iter(data.sets[split].values()))
                show_samples(page, dataset, self.class_names, training=split == "train")
            show_settings(page, given, environment)
        return page


@contextmanager
def only_warned() -> Iterator[None]:
    """Around a report of a run that is done: what goes wrong is told, and costs nothing else."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "python main.py report --ckpt_path best writes it anew"
        print(f"warning: no report: {reason} ({type(error).__name__}); {advice}", file=sys.stderr)


def report_on_folds(folder: Path, reports: list[Report], table: dict[str, list[float]], mean: dict[str, float]) -> None:
    """Write one report over all folds, say where, and show its figures in TensorBoard, too.

    Args:
        folder: That of all folds.
        reports: Those that have watched the folds.
        table: For each measure its values by fold.
        mean: Means of these, and under a name with `_std` their deviation.
    """
    # Late: it is imported for seconds.
    from torch.utils.tensorboard import SummaryWriter

    first, runs = reports[0], [folder / f"fold_{number}" for number in range(len(reports))]
    with only_warned(), figures.style():
        page = Page(f"{first.title}: {len(reports)} folds", str(folder))
        show_folds(page, table, mean)
        show_curves_of_folds(page, [read_curves(run / "metrics.csv") for run in runs])
        for key in [key for key in first.results if key.startswith("val")]:
            results = Results.of_folds([report.results[key] for report in reports])
            show_results(page, results, class_names(results, first.class_names), key)
        show_settings(page, read_config(runs[0]), read_environment(runs[0]))
        print(f"report           {write(folder / 'report', page)}")
        with SummaryWriter(str(folder)) as writer:
            show_in_tensorboard(writer, page, step=0)


def write(folder: Path, page: Page) -> Path:
    """Write a page and, beside it, its figures, into a folder that takes the place of an earlier report.

    Returns:
        The page's file.

    Raises:
        MisconfigurationException: The folder holds something else.
        OSError: It cannot be written; the earlier report is still there.
    """
    if folder.exists() and not (folder / PAGE).is_file():
        raise engine.MisconfigurationException(f"{folder} is there already, and is no report; move it away")
    new, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    try:
        with writing(folder, "choose another folder to work in"):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            for name, content in page.figures.items():
                (new / f"{name}.png").write_bytes(content)
            (new / PAGE).write_bytes(page.render())
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.replace(old)
            new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder / PAGE


def show_in_tensorboard(writer: Any, page: Page, step: int) -> None:
    """Give TensorBoard the figures of a page.

    Args:
        writer: A SummaryWriter.
        page: The page.
        step: At which step they are shown.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, content in page.figures.items():
        # As they are: to draw them again would take as long as the first time.
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
        summary = Summary(value=[Summary.Value(tag=f"report/{name}", image=image)])
        writer._get_file_writer().add_summary(summary, step)


def draw_graph(writer: Any, module: Any) -> None:
    """Draw the graph of the net, if it can be traced with a batch of one sample."""
    inputs, several = module.hparams.get("inputs"), dist.is_available() and dist.is_initialized()
    if inputs is None or module.hparams["compile"] or several and dist.get_world_size() > 1:
        return
    example = torch.zeros(1, *inputs["shape"], dtype=getattr(torch, inputs["dtype"]), device=module.device)
    if example.is_floating_point():
        example = example.to(next((p.dtype for p in module.net.parameters()), example.dtype))
    # What cannot be traced is said in prints, warnings, and errors of any kind.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), suppress(Exception), torch.no_grad():
        warnings.simplefilter("ignore")
        writer.add_graph(module.net, example)
