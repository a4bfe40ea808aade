"""What a report shows of a run, section by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from utils import figures
from utils.report.logs import Curve
from utils.report.page import Page, as_text
from utils.report.results import Mistake, Results, per_class
from utils.samples import same_randomness

# Numbers at the top, panels of learning curves, samples and confusions that are shown.
MOST_NUMBERS, MOST_PANELS, SAMPLES, CONFUSIONS = 4, 9, 12, 10
SEPARATOR = " · "
STAGES = ("train", "val", "test")


def show_metrics(page: Page, metrics: Mapping[str, float], checkpoint: str) -> None:
    """The numbers that count, and a table of all.

    Args:
        page: Where to.
        metrics: By name.
        checkpoint: What they are those of.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        stage, _, measure = name.partition("_")
        rows.setdefault(measure, {})[stage] = value
    judged = {name: value for name, value in metrics.items() if name.startswith("test_") and "/" not in name}
    # A loss says less than a share of what is right.
    first = sorted(judged or metrics, key=lambda name: name.endswith("loss"))[:MOST_NUMBERS]
    page.numbers({name: as_text(metrics[name]) for name in first})
    stages = [stage for stage in ("val", "test") if any(stage in row for row in rows.values())]
    words = {"val": "validation", "test": "test"}
    if len(rows) > len(first) or len(stages) > 1:
        table = [[measure, *(row.get(stage, float("nan")) for stage in stages)] for measure, row in rows.items()]
        page.table([checkpoint, *(words[stage] for stage in stages)], table)


def show_curves(page: Page, curves: Mapping[str, Curve], monitor: str, mode: str) -> None:
    """Every measure over epochs."""
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        stage, _, rest = name.partition("_")
        if stage not in STAGES or name.startswith("lr-"):
            continue
        measure, _, of_set = rest.partition("/")
        line = stage + (f"/{of_set}" if of_set else "") + (" (steps)" if measure.endswith("_step") else "")
        panels.setdefault(measure.removesuffix("_step").removesuffix("_epoch"), {})[line] = curve
    if not panels:
        return
    ordered = {name: _in_order(panels[name]) for name in sorted(panels, key=lambda name: name != "loss")[:MOST_PANELS]}
    best = None
    if monitor in curves and np.isfinite(curves[monitor][1]).any():
        epochs, values = curves[monitor]
        best = float(epochs[np.nanargmin(values) if mode == "min" else np.nanargmax(values)])
    page.heading("Learning curves", "Faint: single steps. The test after training is that of the best checkpoint.")
    for measure, lines in ordered.items():
        drawn = figures.learning_curve(measure, lines, best)
        page.figure(f"curve_{measure}", figures.png(drawn), f"{measure} over epochs: {', '.join(lines)}")


def show_results(page: Page, results: Results, names: Sequence[str], title: str) -> None:
    """What was right and wrong in a set.

    Args:
        page: Where to.
        results: Merged.
        names: Of classes, labels, or targets.
        title: What the set is called, such as "test".
    """
    one_of_several = title.partition("/")[2]
    suffix = one_of_several and f"-{one_of_several}"
    of = f"{title}: {results.seen:,} samples"
    counts = None if results.counts is None else results.counts.cpu().numpy()
    if results.values:
        values = np.array(results.values)[:, :, : figures.MOST_TARGETS]
        named = names if len(names) >= values.shape[2] else [f"value {n}" for n in range(values.shape[2])]
        drawn = figures.predicted_against_true(values, named, of)
        page.heading(f"Predicted and true values{_of(suffix)}", "Points on the line are right.")
        page.figure(f"predicted_against_true{suffix}", figures.png(drawn), "Predicted against true values")
    if counts is not None:
        _show_classes(page, counts, names, of, suffix)
    show_mistakes(page, results, names, suffix)


def show_mistakes(page: Page, results: Results, names: Sequence[str], suffix: str) -> None:
    """The samples with the largest loss among those that are wrong."""
    worst, regression = results.worst, results.task == "regression"
    page.heading(f"{'Largest errors' if regression else 'Worst mistakes'}{_of(suffix)}", _about(results))
    if not worst:
        return
    known = worst[0].true is not None  # a sequence, say, has many
    told = [tell(mistake, results.task, names) if known else ("", "") for mistake in worst]
    if all(mistake.picture is not None for mistake in worst):
        lines = [
            (f"true: {true}", f"said: {said}", mistake.name) for (true, said), mistake in zip(told, worst, strict=True)
        ]
        captions = lines if known else [(mistake.name,) for mistake in worst]
        drawn = figures.pictures([m.picture for m in worst if m.picture is not None], captions, inches=1.6)
        page.figure(f"worst_mistakes{suffix}", figures.png(drawn), "Pictures that the net got most wrong")
    words = ["true", "predicted"] if known else []
    rows = [[m.name, *(pair if known else ()), m.loss] for pair, m in zip(told, worst, strict=True)]
    page.table(["sample", *words, "loss"], rows, folded="As a table" if worst[0].picture is not None else "")


def tell(mistake: Mistake, task: str, names: Sequence[str]) -> tuple[str, str]:
    """Target and output of a sample in words."""
    if task == "regression":
        true, said = (list(part[: figures.MOST_TARGETS]) for part in (mistake.true, mistake.said))
        named = [f"{_name(names, n)} " if len(true) > 1 else "" for n in range(len(true))]
        return tuple(SEPARATOR.join(map(str.__add__, named, map(as_text, part))) for part in (true, said))  # type: ignore[return-value]
    if task == "multilabel":
        true, said = ([_name(names, n) for n in part] for part in (mistake.true, mistake.said))
        return SEPARATOR.join(true) or "none", SEPARATOR.join(said) or "none"
    return _name(names, mistake.true), f"{_name(names, mistake.said)} ({mistake.share:.0%})"


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else str(number)


def show_samples(page: Page, dataset: Dataset[Any], names: Sequence[str] | None, training: bool) -> None:
    """Some samples as the net gets them; only pictures are shown."""
    count = len(dataset)  # type: ignore[arg-type]
    try:
        with same_randomness():
            torch.manual_seed(0)
            chosen = [dataset[int(n)] for n in np.linspace(0, count - 1, min(SAMPLES, count))]
    except (ValueError, OSError) as error:
        # One that the run has never read, if it has read a part of the set only.
        page.paragraph(f"No samples are shown: {error}")
        return
    pairs = [sample if isinstance(sample, list | tuple) else (sample, None) for sample in chosen]
    if not all(isinstance(pair[0], torch.Tensor) and pair[0].ndim == 3 and len(pair[0]) in (1, 3) for pair in pairs):
        return
    captions = [[_target(pair[1], names)] for pair in pairs]
    page.heading("Samples", f"As the net gets them{', augmented as in training' if training else ''}.")
    drawn = figures.pictures([pair[0].float().numpy() for pair in pairs], captions, inches=1.2)
    page.figure("samples", figures.png(drawn), "Samples with their targets")


def show_rate_and_speed(page: Page, curves: Mapping[str, Curve], speed: Curve) -> None:
    """The learning rate, and samples a second."""
    rates = {name.removeprefix("lr-"): curve for name, curve in curves.items() if name.startswith("lr-")}
    # Groups of parameters that differ in weight decay alone have one rate.
    different = {tuple(values): name for name, (_, values) in reversed(rates.items())}
    shown = {name: rates[name] for name in rates if name in different.values()}
    if len(shown) == 1:
        shown = {name.partition("/")[0]: curve for name, curve in shown.items()}
    page.heading("Learning rate and throughput")
    if shown:
        page.figure("learning_rate", figures.png(figures.learning_rate(shown)), "Learning rate over epochs")
    if not shown and not len(speed[1]):
        page.paragraph("Nothing was logged between the first step and the last: give a smaller --log_every_n_steps.")
    if len(speed[1]):
        page.figure("throughput", figures.png(figures.throughput(*speed)), "Samples per second over optimizer steps")


def show_settings(page: Page, arguments: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Arguments, and versions."""
    flat = {**{k: v for k, v in arguments.items() if not isinstance(v, Mapping)}}
    for section, values in arguments.items():
        flat |= {f"{section}.{k}": v for k, v in values.items()} if isinstance(values, Mapping) else {}
    page.heading("Settings")
    page.table(["argument", "value"], [[k, str(v)] for k, v in sorted(flat.items()) if v is not None], "Arguments")
    versions = {**environment.get("versions", {}), "git commit": environment.get("git_commit")}
    page.table(["what", "version"], [[k, str(v)] for k, v in versions.items() if v is not None], "Versions and device")


def class_names(results: Results, told: Sequence[str] | None) -> list[str]:
    """Names of classes, labels or targets; their numbers, where the dataset does not tell."""
    count = len(told or ()) if results.counts is None else len(results.counts)
    named = told if told and len(told) == count else range(count)
    return [str(name) for name in named]


def _show_classes(page: Page, counts: np.ndarray, names: Sequence[str], title: str, suffix: str) -> None:
    """The confusion matrix, and what is right by class."""
    matrix = counts.ndim == 2
    told = "Rows of the matrix are true classes; dark cells hold a large share of them. " if matrix else ""
    page.heading(f"Right and wrong by class{_of(suffix)}", f"{told}In the list, the worst class is at the top.")
    if matrix:
        drawn = figures.confusion_matrix(counts, names, title)
        page.figure(f"confusion_matrix{suffix}", figures.png(drawn), "Samples by true and predicted class")
    table = per_class(counts)
    if not counts.sum():
        return
    drawn = figures.per_class(names, table, title)
    page.figure(f"per_class{suffix}", figures.png(drawn), "Precision and recall by class")
    if matrix:
        _show_confusions(page, counts, names)
    columns = ["precision", "recall", "F1"]
    rows = [[name, *(row[c] for c in columns), int(row["samples"])] for name, row in zip(names, table, strict=True)]
    page.table(["class", *columns, "samples"], rows, folded="All numbers by class")


def _show_confusions(page: Page, counts: np.ndarray, names: Sequence[str]) -> None:
    """What is taken for what most often: in a large matrix, single cells are hard to see."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    places = [divmod(int(place), len(counts)) for place in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]]
    rows = [
        [names[t], names[p], int(wrong[t, p]), float(wrong[t, p] / counts[t].sum())] for t, p in places if wrong[t, p]
    ]
    if len(counts) > figures.WITH_NUMBERS and rows:
        page.table(["true", "taken for", "samples", "share of the true class"], rows)


def _of(suffix: str) -> str:
    """What a heading adds to tell one of several sets from the others."""
    return f": {suffix[1:]}" if suffix else ""


def _about(results: Results) -> str:
    if results.task == "regression":
        return "Loss: how far off, in deviations of the target."
    if results.counts is None or results.counts.ndim != 2:
        return "Those with the largest loss."
    right, total = int(results.counts.diagonal().sum()), int(results.counts.sum())
    if right == total:
        return f"None: all {total:,} are right."
    return f"{total - right:,} of {total:,} are wrong. These have the largest loss."


def _target(target: Any, names: Sequence[str] | None) -> str:
    values = np.asarray(target).reshape(-1) if target is not None else np.empty(0)
    if values.size != 1:
        return ""
    value = values[0]
    number = int(value) if float(value).is_integer() else -1
    return str(names[number]) if names and 0 <= number < len(names) else f"{value:.4g}"


def _in_order(lines: Mapping[str, Curve]) -> dict[str, Curve]:
    """Training before validation before the test; faint lines lie below."""
    places = {name: (not name.endswith("(steps)"), STAGES.index(name.replace("/", " ").split()[0])) for name in lines}
    return {name: lines[name] for name in sorted(lines, key=lambda name: (places[name], name))}


def show_folds(page: Page, table: Mapping[str, Sequence[float]], mean: Mapping[str, float]) -> None:
    """What each fold has reached.

    Args:
        page: Where to.
        table: For each measure its values by fold.
        mean: Means of these, and under a name with `_std` their deviation.
    """
    first = [name for name in table if name.startswith("val_") and "/" not in name] or list(table)
    first = sorted(first, key=lambda name: name.endswith("loss"))[:MOST_NUMBERS]
    page.numbers({name: f"{as_text(mean[name])} ± {as_text(mean[f'{name}_std'])}" for name in first})
    page.heading(
        "Folds", "Mean and deviation are over folds; each is judged on the samples that it was not trained on."
    )
    for name in first:
        page.figure(f"folds_{name}", figures.png(figures.folds(name, table[name])), f"{name} of each fold")
    count = len(next(iter(table.values())))
    rows = [[name, *values, mean[name], mean[f"{name}_std"]] for name, values in table.items()]
    page.table(["measure", *(f"fold {fold}" for fold in range(count)), "mean", "deviation"], rows)


def show_curves_of_folds(page: Page, folds: Sequence[Mapping[str, Curve]]) -> None:
    """The validation of every fold over epochs."""
    shared = set.intersection(*(set(curves) for curves in folds))
    measures = sorted((name for name in shared if name.startswith("val_")), key=lambda name: (name != "val_loss", name))
    if measures:
        page.heading("Learning curves", "A line for each fold.")
    for name in measures[:MOST_PANELS]:
        lines = {f"fold {number}": curves[name] for number, curves in enumerate(folds)}
        page.figure(f"curve_{name.replace('/', '-')}", figures.png(figures.learning_curve(name, lines, None)), name)
