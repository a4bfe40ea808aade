"""The report of a run: figures, the page in a browser, TensorBoard, and what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix, precision_recall_fscore_support
from utils import figures
from utils.report.callback import write
from utils.report.page import Page as ReportPage
from utils.report.results import WORST, Results, per_class
from utils.report.sections import tell

QUIET = ("--enable_progress_bar", "false", "--enable_model_summary", "false")
SHORT = ("--max_epochs", "2", *QUIET, "--log_every_n_steps", "5", "--report", "true")
FEW = ("--max_epochs", "1", "--limit_train_batches", "4", *QUIET, "--log_every_n_steps", "2", "--report", "true")
FIGURES = {"curve_loss", "curve_acc", "curve_f1", "confusion_matrix", "per_class", "worst_mistakes", "samples"}
FIGURES |= {"learning_rate", "throughput"}


def main(project: Path, folder: Path, *words: str) -> str:
    """What `python main.py` prints in a fresh process."""
    command = [sys.executable, str(project / "main.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_of(page: Path) -> str:
    """The words of a page."""
    return re.sub(r"<[^>]*>", " ", page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    out = main(generated, folder, *SHORT)
    assert "report           logs/standard_net/version_0/report/report.html\n" in out
    return folder / "logs" / "standard_net" / "version_0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, of Debian or wherever it lies."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        assert not os.environ.get("CI"), "CI has to install chromium"
        pytest.skip("no Chromium is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


def test_every_figure_is_drawn(trained: Path) -> None:
    files = {file.stem: file for file in (trained / "report").glob("*.png")}
    assert set(files) == FIGURES
    for file in files.values():
        with Image.open(file) as picture:
            assert min(picture.size) > 250 and np.asarray(picture.convert("L")).std() > 5, file
    assert not list((trained / "report").glob("*.tmp"))


@pytest.mark.parametrize("width", [1366, 390])
def test_the_page_in_a_browser(trained: Path, browser: Any, width: int) -> None:
    page: Page = browser.new_page(viewport={"width": width, "height": 800})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    page.goto((trained / "report" / "report.html").as_uri())
    assert said == [] and set(asked) <= {"file", "data"}
    images = page.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
    )
    assert len(images) == len(FIGURES)
    for complete, natural, shown, alternative in images:
        # At its natural size, text has the size of the page's; shrunk to less than two thirds it cannot be read.
        assert complete and alternative and shown >= natural * 96 / 150 * 0.65
    # Nothing but boxes of their own are moved sideways.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("h1").inner_text() == "standard_net on standard_data"
    page.locator("summary").first.click()
    assert page.locator("details[open] td").first.is_visible()
    page.close()


def test_the_page_says_what_was_measured(trained: Path) -> None:
    text = text_of(trained / "report" / "report.html")
    rows = (trained / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    accuracy = float(rows[-1].split(",")[columns.index("test_acc")])
    assert f"{accuracy:.4f}" in text and "269 are wrong" in text
    assert f"{269 - round(accuracy * 269)} of 269" in text


def tensorboard(logs: Path) -> Iterator[Callable[..., Any]]:
    """Start TensorBoard, and give a function that asks it: `ask("scalars/tags")`."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", "0", "--load_fast", "false"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://" in line)
        where = re.findall(r"http://\S+?/", line)[0]

        def ask(path: str, body: Any = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(f"{where}data/plugin/{path}", data, {"Content-Type": "application/json"})
            content = urllib.request.urlopen(request, timeout=60).read()
            return content if content.startswith(b"\x89PNG") else json.loads(content)

        yield ask
        process.terminate()


@pytest.fixture(scope="module")
def ask(trained: Path) -> Iterator[Callable[..., Any]]:
    """A function that asks a real TensorBoard, once it has read the run."""
    for ask in tensorboard(trained.parents[1]):
        end = time.monotonic() + 60
        while not (ask("scalars/tags") and ask("images/tags")) and time.monotonic() < end:
            time.sleep(0.3)
        yield ask


def test_tensorboard_has_scalars_figures_and_the_graph(ask: Callable[..., Any], trained: Path) -> None:
    (run,) = ask("scalars/tags")
    assert {"train_loss_step", "val_acc", "test_acc", "final/test_acc", "final/val_loss"} <= set(
        ask("scalars/tags")[run]
    )
    assert set(ask("images/tags")[run]) == {f"report/{name}" for name in FIGURES}
    for name in FIGURES:
        (found,) = ask(f"images/images?run={run}&tag=report/{name}&sample=0")
        png = ask(f"images/individualImage?{found['query']}")
        assert png == (trained / "report" / f"{name}.png").read_bytes()
    assert ask("graphs/info")[run]["run_graph"] is True


def test_tensorboard_compares_runs_by_their_final_metrics(ask: Callable[..., Any], trained: Path) -> None:
    experiment = ask("hparams/experiment", {"experimentName": "", "hparamsLimit": 0, "includeMetrics": True})
    metrics = [info["name"] for info in experiment["metricInfos"]]
    assert {"final/test_acc", "final/val_loss"} <= {metric["tag"] for metric in metrics}
    params = {info["name"]: info for info in experiment["hparamInfos"]}
    assert {"lr", "batch_size", "model/width", "optimizer"} <= set(params)
    wanted = [{"metric": metric} for metric in metrics] + [{"hparam": name} for name in params]
    request = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING"]}
    request |= {"colParams": wanted, "startIndex": 0, "sliceSize": 10}
    (group,) = ask("hparams/session_groups", request)["sessionGroups"]
    assert group["hparams"]["lr"] == 0.003
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    rows = (trained / "metrics.csv").read_text().splitlines()
    test_acc = float(rows[-1].split(",")[rows[0].split(",").index("test_acc")])
    assert values["final/test_acc"] == pytest.approx(test_acc, abs=1e-6)


def test_from_a_checkpoint_alone(generated: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "moved.ckpt")
    out = main(generated, tmp_path, "report", "--ckpt_path", "moved.ckpt")
    assert "report       moved-report/report.html\n" in out
    # Nobody knows how it was trained.
    there = {file.stem for file in (tmp_path / "moved-report").glob("*.png")}
    assert there == FIGURES - {"curve_loss", "curve_acc", "curve_f1", "learning_rate", "throughput"}
    before, now = text_of(trained / "report" / "report.html"), text_of(tmp_path / "moved-report" / "report.html")
    for line in (r"\d+ of 269 are wrong", r"loss\s+[\d.]+\s+[\d.]+"):
        assert re.findall(line, now)[:1] == re.findall(line, before)[:1] != []


@pytest.mark.long
def test_two_processes_count_every_sample_once(generated: Path, trained: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "moved.ckpt")
    main(generated, tmp_path, "report", "--ckpt_path", str(checkpoint), "--devices", "2", "--accelerator", "cpu")
    alone, both = (
        text_of(page) for page in (trained / "report" / "report.html", tmp_path / "moved-report" / "report.html")
    )
    by_class = r"All numbers by class.*?Worst mistakes .*?no\. \d+"
    assert re.findall(by_class, both, re.DOTALL) == re.findall(by_class, alone, re.DOTALL) != []


def test_a_run_can_do_without(run: Callable, tmp_path: Path) -> None:
    assert run(*FEW[:-2], "--report", "false").code == 0
    assert not list(tmp_path.glob("logs/*/*/report"))
    assert run("report", "--ckpt_path", "best").code == 0
    assert (tmp_path / "logs/standard_net/version_0/report/report.html").is_file()


def test_a_dev_run_leaves_none(run: Callable, tmp_path: Path) -> None:
    assert run("--fast_dev_run", "true", "--report", "true").code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_costs_no_run(run: Callable, tmp_path: Path) -> None:
    blocked = tmp_path / "logs/standard_net/mine"
    blocked.mkdir(parents=True)
    (blocked / "report").write_text("in the way")
    outcome = run(*FEW, "--run_name", "mine")
    assert outcome.code == 0 and outcome.metrics["test_acc"] > 0
    assert re.search(r"^warning: no report: .*/report is there already, .*--ckpt_path best", outcome.err, re.M)
    assert (blocked / "report").read_text() == "in the way"
    assert json.loads((blocked / "environment.json").read_text())["finished"] is True


def test_folds_have_one_report(run: Callable, tmp_path: Path) -> None:
    outcome = run(*FEW, "--num_folds", "2", "--fold", "all")
    assert "report           logs/standard_net/version_0/report/report.html" in outcome.out
    assert [page.parent.parent.name for page in tmp_path.rglob("report.html")] == ["version_0"]
    folder = tmp_path / "logs/standard_net/version_0/report"
    assert {"folds_val_acc", "curve_val_loss", "confusion_matrix"} <= {file.stem for file in folder.glob("*.png")}
    assert len(list(folder.parent.glob("events.out.tfevents.*"))) == 1  # TensorBoard's, with the same figures
    text = text_of(folder / "report.html")
    # 1,528 samples, each judged in the fold that it was not trained in.
    wrong = round((1 - outcome.metrics["val_acc"]) * 1528)
    assert f"{wrong:,} of 1,528 are wrong" in text and "fold 1, no. " in text
    assert f"{outcome.metrics['val_acc']:.4f} ± {outcome.metrics['val_acc_std']:.4f}" in text


def write_table(kind: str) -> list[str]:
    """A table for a task; returns the flags that train on it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3))
    targets = {
        "regression": {"price": x[:, 0] * 1e4, "weight": x[:, 1] + 70},
        "multilabel": {"wet": (x[:, 0] > 0) * 1, "cold": (x[:, 1] > 0) * 1},
        "binary": {"ill": np.where(x[:, 0] + x[:, 1] > 0, "<b>ill</b>", "健康")},
    }[kind]
    columns = {"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], **targets}
    lines = [",".join(columns), *(",".join(str(cell) for cell in row) for row in zip(*columns.values(), strict=True))]
    Path("table.csv").write_text("\n".join(lines), encoding="utf-8")
    return ["--dataset", "csv_data", "--data.file", "table.csv", "--model_name", "mlp", "--task", kind,
            "--data.target", *targets]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "figures", "words"),
    [
        ("regression", {"predicted_against_true"}, ["Largest errors", "row "]),
        ("multilabel", {"per_class"}, ["Worst mistakes", "wet", "cold"]),
        ("binary", {"confusion_matrix", "per_class"}, ["Worst mistakes", "健康", "&lt;b&gt;ill&lt;/b&gt;"]),
    ],
)
def test_tasks_on_tables(task: str, figures: set[str], words: list[str], run: Callable, tmp_path: Path) -> None:
    outcome = run(*FEW, *write_table(task), "--batch_size", "16")
    assert outcome.code == 0 and "warning" not in outcome.err, outcome.err
    folder = tmp_path / "logs/mlp/version_0/report"
    there = {file.stem for file in folder.glob("*.png")}
    assert figures <= there and "samples" not in there and "worst_mistakes" not in there
    text = text_of(folder / "report.html")
    assert [word for word in words if word not in text] == []


class Unscaled:
    """A TargetScale that does nothing."""

    def __call__(self, targets: torch.Tensor) -> torch.Tensor:
        return targets

    def restore(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs


def judged(task: str, outputs: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor, classes: int) -> Results:
    results = Results(task, classes)
    for start in range(0, len(inputs), 7):
        part = slice(start, start + 7)
        results.add(inputs[part], outputs[part], targets[part], len(inputs[part]), Unscaled())
    results.merge([f"sample {number}" for number in range(len(inputs))])
    return results


def test_counts_are_those_of_sklearn() -> None:
    torch.manual_seed(0)
    outputs, targets, images = torch.randn(100, 4), torch.randint(4, (100,)), torch.rand(100, 1, 5, 5)
    results = judged("multiclass", outputs, targets, images, 4)
    said = outputs.argmax(dim=1)
    assert results.counts is not None and (results.counts.numpy() == confusion_matrix(targets, said)).all()
    wanted = precision_recall_fscore_support(targets, said)
    table = per_class(results.counts)
    for column, values in zip(("precision", "recall", "F1", "samples"), wanted, strict=True):
        assert [row[column] for row in table] == pytest.approx(values.tolist())
    # The worst are the wrong ones of the largest loss, and know their sample.
    losses = torch.nn.functional.cross_entropy(outputs, targets, reduction="none") * (said != targets)
    order = losses.argsort(descending=True)[:WORST].tolist()
    assert [mistake.index for mistake in results.worst] == order
    assert results.worst[0].name == f"sample {order[0]}"
    assert results.worst[0].picture is not None
    assert (results.worst[0].picture == images[order[0]].numpy()).all()


def test_counts_of_labels_and_of_two_classes_are_those_of_sklearn() -> None:
    torch.manual_seed(1)
    outputs, targets = torch.randn(50, 3), torch.randint(2, (50, 3)).float()
    labels = judged("multilabel", outputs, targets, torch.rand(50, 2), 3)
    assert labels.counts is not None
    assert (labels.counts.numpy() == multilabel_confusion_matrix(targets, outputs > 0)).all()
    wanted = precision_recall_fscore_support(targets, outputs > 0)
    assert [row["F1"] for row in per_class(labels.counts)] == pytest.approx(wanted[2].tolist())
    two = judged("binary", outputs[:, 0], targets[:, 0], torch.rand(50, 2), 1)
    assert two.counts is not None and (two.counts.numpy() == confusion_matrix(targets[:, 0], outputs[:, 0] > 0)).all()


def test_labels_that_do_not_count_are_left_out_and_sequences_count_by_position() -> None:
    outputs, targets = torch.randn(4 * 6, 5), torch.randint(5, (4 * 6,))
    targets[:3] = -100
    results = Results("sequence", 5)
    results.add(torch.zeros(4, 6, dtype=torch.long), outputs, targets, 4, Unscaled())
    results.merge(None)
    assert results.counts is not None and results.seen == 4 and int(results.counts.sum()) == 21
    assert len(results.worst) == 4 and all(mistake.true is None for mistake in results.worst)


def test_memory_does_not_grow_with_the_set() -> None:
    results = Results("multiclass", 10)
    for _ in range(300):
        results.add(torch.rand(64, 3, 8, 8), torch.randn(64, 10), torch.randint(10, (64,)), 64, Unscaled())
    assert results.seen == 64 * 300 and len(results.worst) == WORST
    regression = Results("regression", None)
    for _ in range(400):
        regression.add(torch.rand(64, 2), torch.randn(64), torch.randn(64), 64, Unscaled())
    assert len(regression.values) == 20_000 and regression.seen == 64 * 400


def test_samples_that_a_sampler_repeats_count_once() -> None:
    results = Results("multiclass", 3, size=10)
    outputs = torch.eye(3)[torch.zeros(6, dtype=torch.long)]
    for _ in range(2):
        results.add(torch.rand(6, 2), outputs, torch.ones(6, dtype=torch.long), 6, Unscaled())
    results.merge([f"sample {number}" for number in range(10)])
    assert results.counts is not None and results.seen == 10 == int(results.counts.sum())
    assert {mistake.index for mistake in results.worst} == set(range(10))


def test_losses_that_are_no_numbers_are_the_worst() -> None:
    outputs, targets = torch.randn(40, 3), torch.randint(3, (40,))
    outputs[7], outputs[9, :] = torch.nan, torch.tensor([5.0, -torch.inf, -torch.inf])
    targets[7], targets[9], targets[:3] = 2, 1, -100
    results = judged("multiclass", outputs, targets, torch.rand(40, 2), 3)
    assert {mistake.index for mistake in results.worst[:2]} == {7, 9}
    assert all(mistake.loss > 0 for mistake in results.worst)


def test_many_classes_keep_their_names_and_pictures_of_values_have_none() -> None:
    outputs = torch.zeros(2, 2000)
    outputs[:, 1700] = 9
    many = judged("multiclass", outputs, torch.tensor([1500, 1700]), torch.rand(2, 2), 2000)
    assert many.counts is None and [(m.true, m.said) for m in many.worst] == [(1500, 1700)]
    assert tell(many.worst[0], "multiclass", [])[0] == "1500"
    images = judged("regression", torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4), torch.rand(3, 2), 1)
    assert len(images.values) == 3 * 16 and all(m.true is None for m in images.worst) and len(images.worst) == 3


def test_names_that_are_shortened_stay_apart() -> None:
    names = [f"class number {number:02} of thirty" for number in range(30)]
    assert len(set(figures._labels(names))) == 30
    assert figures._labels(["cat", "dog"]) == ["cat", "dog"]
    assert figures._short("中华田园犬中华田园犬中华田园犬") == "中华田园…华田园犬"
    with figures.style():
        drawn = figures.confusion_matrix(np.eye(3, dtype=int), ["$_$", "a$b$c", "\udcff"], "$")
        assert figures.png(drawn).startswith(b"\x89PNG")


STEPS = '''

class Own(MInterface):
    """Steps of one's own."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        super().test_step(batch, batch_idx, dataloader_idx)
        return {"loss": 0}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)


MInterface = Own
'''


def test_steps_of_ones_own_leave_the_curves(project: Path, run_in_project: Callable) -> None:
    with open("model/model_interface.py", "a") as file:
        file.write(STEPS)
    outcome = run_in_project(*FEW)
    assert outcome.code == 0 and "warning" not in outcome.err, outcome.err
    there = {file.stem for file in project.glob("logs/*/*/report/*.png")}
    assert "curve_loss" in there and "samples" in there and "confusion_matrix" not in there


def test_without_a_test_the_validation_is_shown(run: Callable, tmp_path: Path) -> None:
    assert run(*FEW, "--limit_test_batches", "0").code == 0
    text = text_of(tmp_path / "logs/standard_net/version_0/report/report.html")
    assert re.search(r"val: 269 samples|of 269 are wrong", text)


def test_each_checkpoint_has_a_report_of_its_own(run: Callable, tmp_path: Path) -> None:
    assert run(*FEW).code == 0
    folder = tmp_path / "logs/standard_net/version_0"
    before = (folder / "report" / "report.html").read_bytes()
    (tmp_path / "last-report").mkdir()
    (tmp_path / "last-report" / "mine.png").write_text("my own")
    outcome = run("report", "--ckpt_path", "last", "--batch_size", "32")
    assert outcome.code == 0 and (folder / "report" / "report.html").read_bytes() == before
    text = text_of(folder / "report-last" / "report.html")
    assert "last.ckpt" in text and re.search(r"batch_size\s+64", text)
    shutil.copy(folder / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    refused = run("report", "--ckpt_path", "last.ckpt")
    assert refused.code == 2 and "last-report is there already, and is no report" in refused.err
    assert [file.name for file in (tmp_path / "last-report").iterdir()] == ["mine.png"]


def test_a_full_disk_leaves_the_report_before(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*FEW).code == 0
    folder = tmp_path / "logs/standard_net/version_0"
    before = {file.name: file.read_bytes() for file in (folder / "report").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.report.page.Page.render", full)
    outcome = run("report", "--ckpt_path", "best")
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and "No space left on device" in outcome.err
    assert {file.name: file.read_bytes() for file in (folder / "report").iterdir()} == before
    assert not list(folder.glob("report.*"))


def test_a_report_that_cannot_take_its_place_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, folder = ReportPage("a title", "a line"), tmp_path / "report"
    assert write(folder, page) == folder / "report.html"
    before, rename = (folder / "report.html").read_bytes(), Path.replace

    def fails(path: Path, target: Path) -> Path:
        if path.name == "report.tmp":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="Input/output error") as raised:
        write(folder, ReportPage("another title", "a line"))
    assert raised.value.__notes__ == [f"{folder} could not be written; free space, or choose another folder to work in"]
    assert (folder / "report.html").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(generated: Path, trained: Path, tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mount is not allowed here")
    try:
        command = [sys.executable, str(generated / "main.py"), "report", "--ckpt_path", str(tmp_path / "net.ckpt")]
        (tmp_path / "net.ckpt").symlink_to(trained / "checkpoints" / "best.ckpt")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["net.ckpt"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
