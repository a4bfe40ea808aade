"""`report/` in a run's folder: figures, and a page that shows them; the same figures in TensorBoard."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch

import engine
from utils import figures
from utils.metrics import as_numbers, usual_mode
from utils.processes import share_of_samples
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
from utils.run_state import read_environment, write_whole
from utils.samples import per_sample

PAGE = "report.html"


class Report(engine.Callback):
    """Looks on while a checkpoint is judged, and writes the report when it was tested.

    Args:
        arguments: Those of the command line.
        folder: The run's; default: where the trainer logs.
        watch: Count what is right and wrong; otherwise only metrics are kept, and shown in TensorBoard.
        draw: Write figures and page, if it was watched.

    Attributes:
        metrics: Of the checkpoint, on validation and test sets.
        results: What it made of them, by split and, of several, by name: "val", or "test/night".
        title: What was trained on what.
        class_names: As the data tells them, if it does.
        page: The page, once it is written.
    """

    def __init__(self, arguments: Any, folder: Path | None = None, watch: bool = True, draw: bool = True) -> None:
        self.arguments, self.folder, self.watch, self.draw = arguments, folder, watch, draw
        self.metrics: dict[str, float] = {}
        self.results: dict[str, Results] = {}
        self.title = ""
        self.class_names: list[str] | None = None
        self.page: Path | None = None
        self._stage = ""

    def setup(self, trainer: engine.Trainer, pl_module: engine.Module, stage: str) -> None:
        """Note what the trainer is about to do; validation within fit is of no concern."""
        self._stage = {"validate": "val", "test": "test"}.get(stage, "")

    def on_validation_batch_end(
        self, trainer: engine.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        if self._stage:
            self._add(trainer, pl_module, outputs, batch, dataloader_idx)

    def on_test_batch_end(
        self, trainer: engine.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        self._add(trainer, pl_module, outputs, batch, dataloader_idx)

    def _add(self, trainer: engine.Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        if not self.watch or trainer.fast_dev_run or not isinstance(outputs, dict):
            return
        data: Any = trainer.datamodule
        names = data.names[self._stage]
        key = f"{self._stage}/{names[number]}" if len(names) > 1 else self._stage
        if key not in self.results:
            self.results[key] = Results(module.hparams["task"], module.num_outputs)
        self.results[key].add(batch[0], outputs["outputs"], outputs["targets"], module.scale)

    def teardown(self, trainer: engine.Trainer, pl_module: engine.Module, stage: str) -> None:
        """Keep the metrics of a validation."""
        if stage == "validate":
            self._keep_metrics(trainer)

    def on_test_end(self, trainer: engine.Trainer, pl_module: Any) -> None:
        """Write the report, and what TensorBoard compares runs by."""
        self._keep_metrics(trainer)
        data: Any = trainer.datamodule
        self.title = f"{self.arguments.model_name} on {', '.join(data.names['train'])}"
        self.class_names = pl_module.hparams.get("class_names")
        if trainer.fast_dev_run:
            return
        for key, results in self.results.items():
            split, _, name = key.partition("/")
            results.merge(per_sample(data.sets[split][name or data.names[split][0]], "names"))
        folder = self.folder or Path(trainer.log_dir or "")
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, engine.loggers.TensorBoardLogger):
                final = {f"final/{name}": value for name, value in self.metrics.items()}
                logger.log_hyperparams({**pl_module.hparams, **data.hparams}, final)
            logger.save()
        if not (self.watch and self.draw):
            return
        try:
            with figures.style():
                drawn = self._draw(trainer, pl_module, folder)
            self.page = write(folder / "report", drawn)
            show_in_tensorboard(trainer, pl_module, drawn)
        except OSError as error:
            # The run is done: it is not to be lost for want of a figure.
            print(
                f"warning: no report: {error}; python main.py report --ckpt_path best writes it anew", file=sys.stderr
            )

    def _keep_metrics(self, trainer: engine.Trainer) -> None:
        self.metrics |= as_numbers(trainer.callback_metrics)

    def _draw(self, trainer: engine.Trainer, module: Any, folder: Path) -> Page:
        """The page, with all figures."""
        data: Any = trainer.datamodule
        given = self.arguments
        page = Page(self.title, str(folder))
        show_metrics(page, self.metrics)
        file = folder / "metrics.csv"
        curves = read_curves(file) if file.is_file() else {}
        show_curves(page, curves, given.monitor, given.monitor_mode or usual_mode(given.monitor))
        for key, results in self.results.items():
            if key.startswith("test"):
                show_results(page, results, class_names(results, self.class_names), key)
        speed = read_speed(folder, given.batch_size * given.accumulate_grad_batches * share_of_samples()[1])
        show_rate_and_speed(page, curves, speed)
        training = data.sets.get("train")
        show_samples(page, next(iter((training or data.sets["test"]).values())), self.class_names, training is not None)
        show_settings(page, given.as_dict(), read_environment(folder))
        return page


def report_on_folds(folder: Path, reports: list[Report], table: dict[str, list[float]], mean: dict[str, float]) -> Path:
    """Write one report over all folds; see `show_folds` for the numbers.

    Args:
        folder: That of all folds.
        reports: Those that have watched the folds.
        table: For each measure its values by fold.
        mean: Means of these, and under a name with `_std` their deviation.

    Returns:
        The page's file.
    """
    first = reports[0]
    with figures.style():
        page = Page(f"{first.title}: {len(reports)} folds", str(folder))
        show_folds(page, table, mean)
        show_curves_of_folds(page, [read_curves(folder / f"fold_{n}" / "metrics.csv") for n in range(len(reports))])
        for key in [key for key in first.results if key.startswith("val")]:
            results = Results.of_folds([report.results[key] for report in reports])
            show_results(page, results, class_names(results, first.class_names), key)
        show_settings(page, first.arguments.as_dict(), read_environment(folder / "fold_0"))
    return write(folder / "report", page)


def write(folder: Path, page: Page) -> Path:
    """Write a page and, beside it, each of its figures; figures of an earlier page go.

    Returns:
        The page's file.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.png"):
        if file.stem not in page.figures:
            file.unlink()
    for name, content in page.figures.items():
        write_whole(folder / f"{name}.png", content)
    return write_whole(folder / PAGE, page.render())


def show_in_tensorboard(trainer: engine.Trainer, module: Any, page: Page) -> None:
    """Give TensorBoard the figures of a page, and the graph of the net."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for logger in trainer.loggers:
        if isinstance(logger, engine.loggers.TensorBoardLogger):
            for name, content in page.figures.items():
                # As they are: to draw them again would take as long as the first time.
                width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
                image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
                summary = Summary(value=[Summary.Value(tag=f"report/{name}", image=image)])
                logger.experiment._get_file_writer().add_summary(summary, trainer.global_step)
            draw_graph(logger.experiment, module)
            logger.save()


def draw_graph(writer: Any, module: Any) -> None:
    """Draw the graph of the net, if it can be traced with a batch of one sample."""
    inputs = module.hparams.get("inputs")
    if inputs is None or module.hparams["compile"] or share_of_samples()[1] > 1:
        return
    example = torch.zeros(1, *inputs["shape"], dtype=getattr(torch, inputs["dtype"]), device=module.device)
    # What cannot be traced is said in prints, warnings, and errors of any kind.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), suppress(Exception), torch.no_grad():
        warnings.simplefilter("ignore")
        writer.add_graph(module.net, example)
