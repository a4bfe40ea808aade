"""Predictions from a checkpoint alone: of pictures, tables and arrays, some of them bad, to CSV and arrays."""

from __future__ import annotations

import csv
import gc
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

PROJECT = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"
QUICK = ("--max_epochs", "1", "--limit_train_batches", "4", "--log_every_n_steps", "1", "--report", "false")
QUICK += ("--enable_progress_bar", "false", "--enable_model_summary", "false", "--accelerator", "cpu")


class Trained(NamedTuple):
    """A checkpoint that lies alone, what its net predicted of the dataset, and what it was predicted from."""

    checkpoint: Path
    predicted: list[dict[str, str]]
    inputs: Path


def rows(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(table: list[dict[str, str]]) -> np.ndarray:
    """The probabilities, or values, of those rows that have any; shape (rows, outputs)."""
    return np.array([[float(v) for k, v in row.items() if re.match("probability|value", k) and v] for row in table])


def train_and_predict(folder: Path, *words: str) -> Trained:
    """Train, predict the dataset, and leave nothing of the run but a copy of its checkpoint."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        main = importlib.import_module("main").main
        main([*words, *QUICK])
        main(["predict", "--ckpt_path", "best"])
    finally:
        os.chdir(before)
    (run,) = (folder / "logs").glob("*/version_0")
    copied = shutil.copy(run / "checkpoints" / "best.ckpt", folder / "net.ckpt")
    predicted = rows(run / "predictions.csv")
    shutil.rmtree(folder / "logs")
    return Trained(Path(copied), predicted, folder / "kept")


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (24, 20)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A net of pictures. Its data is gone; the test pictures lie elsewhere."""
    folder = tmp_path_factory.mktemp("pets")
    for number in range(24):
        picture(
            folder / "data" / ("train", "test")[number % 3 // 2] / ("cat", "dog")[number % 2] / f"{number}.png", number
        )
    words = ("--dataset", "folder_data", "--data.root", "data", "--data.size", "16", "--model.width", "4")
    trained = train_and_predict(folder, *words)
    (folder / "data" / "test").rename(folder / "kept")
    shutil.rmtree(folder / "data")
    return trained


TABLE = [(f"{number / 7:.3f}", f"{number % 5}", ("low", "high")[number % 2]) for number in range(60)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A net of the columns a and b. Its table is gone."""
    folder = tmp_path_factory.mktemp("table")
    lines = [",".join([*cells, "test" if number >= 30 else "train"]) for number, cells in enumerate(TABLE)]
    (folder / "table.csv").write_text("\n".join(["a,b,class,part", *lines]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "table.csv", "--data.split_column", "part", "--model_name", "mlp")
    trained = train_and_predict(folder, *words, "--monitor", "train_loss", "--limit_val_batches", "0")
    (folder / "table.csv").unlink()
    return trained


def refuses(outcome: Any, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: "), outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def predict(run: Callable, net: Trained, given: Path | str, *words: str) -> Any:
    return run("predict", "--ckpt_path", str(net.checkpoint), "--input", str(given), *words)


# Inputs


def test_a_folder_from_a_checkpoint_alone_in_a_fresh_process_and_another_working_folder(
    pets: Trained, tmp_path: Path
) -> None:
    shutil.copytree(pets.inputs, tmp_path / "in")
    (tmp_path / "in" / "cat" / "0 broken one.png").write_bytes(b"no picture")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    (tmp_path / "in" / "notes.txt").write_text("notes")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    command = [sys.executable, str(PROJECT / "main.py"), "predict", "--ckpt_path", str(pets.checkpoint)]
    done = subprocess.run([*command, "--input", "../in"], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[0].startswith("warning: cat/0 broken one.png: cannot be read as a picture")
    assert done.stderr.splitlines()[1:] == [
        "error: 1 of 9 inputs could not be read; its row is empty in predictions.csv"
    ]
    assert "predictions  8 in predictions.csv\n" in done.stdout and f"checkpoint   {pets.checkpoint}\n" in done.stdout
    assert [path.name for path in elsewhere.iterdir()] == ["predictions.csv"]
    predicted = rows(elsewhere / "predictions.csv")
    names = sorted(str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").glob("*/*.png"))
    assert [row["name"] for row in predicted] == names and names[0] == "cat/0 broken one.png"
    assert list(predicted[0]) == ["index", "name", "class", "probability_cat", "probability_dog", "error"]
    assert [*predicted[0].values()][2:5] == ["", "", ""] and "cannot be read" in predicted[0]["error"]
    same = {row["name"].removeprefix("test/"): row for row in pets.predicted}
    for row in predicted[1:]:
        assert row["class"] == same[row["name"]]["class"] and row["error"] == ""
        assert np.allclose(numbers([row]), numbers([same[row["name"]]]), rtol=0, atol=1e-6)


def test_one_picture_of_any_size(pets: Trained, run: Callable, tmp_path: Path) -> None:
    picture(tmp_path / "wide.jpg", size=(9, 200))
    assert predict(run, pets, "wide.jpg").code == 0
    assert [(row["name"], row["error"]) for row in rows("predictions.csv")] == [("wide.jpg", "")]


def test_pictures_that_a_table_names(pets: Trained, run: Callable, tmp_path: Path) -> None:
    names = [str(path.relative_to(pets.inputs)) for path in sorted(pets.inputs.rglob("*.png"))]
    named = [*names[:3], "cat/gone.png", "", *names[3:]]
    lines = [f'"{name}";{index}' for index, name in enumerate(named)]
    listed = pets.inputs.parent / "kept" / "list.csv"
    listed.write_text("\n".join(["File;age", *lines]) + "\n")
    try:
        outcome = predict(run, pets, listed)
        listed.write_text(listed.read_text().replace("File", "Foto"))
        refuses(predict(run, pets, listed), "no column image, file, path", "it has Foto, age; name it image")
    finally:
        listed.unlink()
    assert outcome.code == 1 and "error: 2 of 10 inputs could not be read; their rows are empty" in outcome.err
    predicted = rows("predictions.csv")
    assert [row["name"] for row in predicted] == [name or "row 6" for name in named]
    assert [row["error"].partition(" /")[0] for row in predicted if row["error"]] == [
        "there is no file",
        "column File: the cell is empty",
    ]
    same = {row["name"].removeprefix("test/"): row for row in pets.predicted}
    good = [row for row in predicted if not row["error"]]
    assert np.allclose(numbers(good), numbers([same[row["name"]] for row in good]), rtol=0, atol=1e-6)


def test_pictures_of_a_table_that_trained_the_net(run: Callable, tmp_path: Path) -> None:
    lines = [f"in/{number}.png,{'ab'[number % 2]},{'test' if number > 20 else 'train'}" for number in range(28)]
    for number in range(28):
        picture(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "all.csv").write_text("\n".join(["foto,kind,part", *lines]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "all.csv", "--data.image_column", "foto", "--data.size", "16")
    assert run(*words, "--data.grayscale", "--data.split_column", "part", "--data.target", "kind", *QUICK).code == 0
    assert run("predict", "--ckpt_path", "best").code == 0
    told = rows("logs/standard_net/version_0/predictions.csv")
    (tmp_path / "all.csv").rename("test.csv")
    here = ("predict", "--ckpt_path", "best", "--input", "test.csv", "--output", "there.csv")
    assert run(*here).code == 0
    assert [row["name"] for row in told] == [f"in/{number}.png" for number in range(21, 28)]
    assert np.allclose(numbers(rows("there.csv"))[21:], numbers(told), rtol=0, atol=1e-6)
    (tmp_path / "test.csv").write_text("Photo\nin/0.png\n")
    refuses(run(*here), "no column foto", "it has Photo", "or give --data.image_column")
    assert run(*here, "--data.image_column", "Photo").code == 0


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_numbers_with_its_columns_in_any_order(
    table: Trained, run: Callable, tmp_path: Path, delimiter: str
) -> None:
    lines = [delimiter.join([f"{number}", b, f'"x{delimiter} y"', a]) for number, (a, b, _) in enumerate(TABLE[30:])]
    text = "\n".join([delimiter.join(["id", "b", "note", " a "]), *lines]) + "\n" + delimiter * 3 + "\n"
    (tmp_path / "new.txt").write_text("\ufeff" + text, encoding="utf-8")
    assert predict(run, table, "new.txt").code == 0
    predicted = rows("predictions.csv")
    assert list(predicted[0]) == ["index", "name", "class", "probability_high", "probability_low", "error"]
    assert [row["name"] for row in predicted] == [f"row {number + 2}" for number in range(30)]
    assert [row["class"] for row in predicted] == [row["class"] for row in table.predicted]
    assert np.allclose(numbers(predicted), numbers(table.predicted), rtol=0, atol=1e-6)


def test_bad_rows_of_a_table_are_named_and_the_rest_is_predicted(table: Trained, run: Callable, tmp_path: Path) -> None:
    good = [f"{a},{b}" for a, b, _ in TABLE[30:]]
    bad = {3: "1.5,many", 7: "1.5", 11: ",2", 12: '"1.5"x,2', 20: "1e39,2", 25: "\udcff,2"}
    lines = list(good)
    for place, line in bad.items():
        lines.insert(place, line)
    text = "\n".join(["a,b", *lines]) + "\n"
    (tmp_path / "new.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    outcome = predict(run, table, "new.csv", "--output", "there.csv")
    assert (
        outcome.code == 1
        and "error: 6 of 36 inputs could not be read; their rows are empty in there.csv" in outcome.err
    )
    predicted = rows("there.csv")
    assert {place: row["error"] for place, row in enumerate(predicted) if row["error"]} == {
        3: "column b: many is no number",
        7: "there are 1 cells for 2 columns",
        11: "column a: the value is missing",
        12: "',' expected after '\"'; mend its quotes",
        20: "column a: 1e39 is no number",
        25: r"column a: \udcff is no number",
    }
    assert [row["name"] for row in predicted] == [f"row {number + 2}" for number in range(36)]
    left = [row for row in predicted if not row["error"]]
    assert np.allclose(numbers(left), numbers(table.predicted), rtol=0, atol=1e-6)
    assert all(not row["class"] and not row["probability_low"] for row in predicted if row["error"])


def test_an_array_to_an_array(table: Trained, run: Callable, tmp_path: Path) -> None:
    inputs = np.array([[float(a), float(b)] for a, b, _ in TABLE[30:]])
    np.save("in.npy", inputs.astype(">f8"))
    assert predict(run, table, "in.npy", "--output", "made/of/it.npy").code == 0
    predicted = np.load("made/of/it.npy", mmap_mode="r")
    assert predicted.dtype == np.float32 and predicted.shape == (30, 2)
    assert np.allclose(predicted, numbers(table.predicted), rtol=0, atol=1e-6)
    assert predict(run, table, "in.npy").code == 0
    assert list(rows("predictions.csv")[0]) == ["index", "class", "probability_high", "probability_low", "error"]
    # What cannot be predicted is a row of NaN, and neither class.
    inputs[4, 1] = np.inf
    np.save("in.npy", inputs.astype(np.float32))
    assert predict(run, table, "in.npy", "--output", "it.NPY").code == 1
    some = np.load("it.NPY")
    assert np.isnan(some[4]).all() and np.allclose(np.delete(some, 4, 0), np.delete(predicted, 4, 0), atol=1e-6)
    assert predict(run, table, "in.npy").code == 1
    assert rows("predictions.csv")[4]["error"] == "what the net makes of it is not finite"


# Faults


def test_what_cannot_be_an_input_is_one_line(pets: Trained, table: Trained, run: Callable, tmp_path: Path) -> None:
    np.save("wide.npy", np.zeros((4, 3), np.float32))
    refuses(predict(run, table, "wide.npy"), "float32 of shape (4, 3)", "float32 of shape (samples, 2)")
    np.save("whole.npy", np.zeros((4, 2), np.uint8))
    refuses(predict(run, table, "whole.npy"), "uint8 of shape (4, 2)", "float32 of shape (samples, 2)")
    np.save("none.npy", np.zeros((0, 2), np.float32))
    refuses(predict(run, table, "none.npy"), "holds no samples")
    np.save("objects.npy", np.array([{}, None], object), allow_pickle=True)
    refuses(predict(run, table, "objects.npy"), "cannot be read as an array")
    Path("new.csv").write_text("A,b\n1,2\n")
    refuses(predict(run, table, "new.csv"), "new.csv has no column a,", "it has A, b")
    Path("new.csv").write_text("a,a,b\n1,2,3\n")
    refuses(predict(run, table, "new.csv"), "names the column a twice")
    Path("new.csv").write_text("a,b\n")
    refuses(predict(run, table, "new.csv"), "nothing to predict")
    Path("new.csv").write_text("")
    refuses(predict(run, table, "new.csv"), "it is empty")
    Path("new.csv").write_text("a,b\n1,2\n", encoding="utf-16")
    refuses(predict(run, table, "new.csv"), "not UTF-8")
    Path("empty").mkdir()
    refuses(predict(run, table, "empty"), "shape (2,), which are no pictures; give a table")
    refuses(predict(run, pets, "empty"), "the folder holds no pictures; give a picture, a table")
    refuses(predict(run, pets, "gone"), "--input 'gone': there is no such file")
    refuses(predict(run, pets, ""), "there is no such file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["wide.npy", "whole.npy", "none.npy", "objects.npy", "new.csv", "empty"]
    )


def test_where_nothing_can_be_read_no_file_is_written(pets: Trained, run: Callable, tmp_path: Path) -> None:
    Path("notes.md").write_text("notes")
    outcome = predict(run, pets, "notes.md", "--output", "new/folder/x.csv")
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith("error: --input notes.md: nothing of it can")
    assert "a picture, a table (.csv, .tsv, .txt), what the dataset's read_file reads" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_of_many_faults_the_first_are_told_and_the_rest_counted(pets: Trained, run: Callable, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "good.png")
    for number in range(13):
        (tmp_path / "in" / f"{number:02}.png").write_bytes(b"")
    outcome = predict(run, pets, "in", "--batch_size", "4", "--num_workers", "2")
    lines = outcome.err.splitlines()
    assert outcome.code == 1 and len(lines) == 12
    assert [line.split(":")[1] for line in lines[:10]] == [f" {number:02}.png" for number in range(10)]
    assert lines[10] == "warning: 3 more of the inputs could not be read"
    assert lines[11].startswith("error: 13 of 14 inputs could not be read; their rows are empty")


def test_names_may_hold_anything(pets: Trained, run: Callable, tmp_path: Path) -> None:
    names = [
        b'comma, "quote".png',
        b"line\nbreak\r.png",
        "\u732b \u043a\u043e\u0442.png".encode(),
        b"caf\xe9.png",
        b"\xff bad.png",
    ]
    (tmp_path / "in").mkdir()
    picture(tmp_path / "one.png")
    for name in names:
        shutil.copy(b"one.png", b"in/" + name)
    (tmp_path / "in" / os.fsdecode(names[-1])).write_bytes(b"")
    outcome = predict(run, pets, "in")
    assert outcome.code == 1 and outcome.err.startswith(r"warning: \udcff bad.png: ")
    found = {row["name"]: row["class"] for row in rows("predictions.csv")}
    expected = [os.fsdecode(name).encode("utf-8", "backslashreplace").decode() for name in names]
    assert sorted(found) == sorted(expected)
    assert [bool(found[name]) for name in expected] == [True, True, True, True, False]


def test_folders_that_cannot_be_read_and_links_that_lead_round(
    pets: Trained, run: Callable, tmp_path: Path, load: Callable[[str], ModuleType]
) -> None:
    picture(tmp_path / "in" / "deep" / "1.png")
    picture(tmp_path / "in" / "locked" / "2.png")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "locked").chmod(0)
    try:
        with load("tests/engine/injection.py").ordinary_user():
            outcome = predict(run, pets, "in")
    finally:
        (tmp_path / "in" / "locked").chmod(0o700)
    assert outcome.code == 1 and outcome.err.startswith("warning: locked: ") and "Permission denied" in outcome.err
    assert [row["name"] for row in rows("predictions.csv")] == ["deep/1.png", "locked"]


def test_what_cannot_be_an_output_is_one_line(pets: Trained, run: Callable, tmp_path: Path) -> None:
    refuses(predict(run, pets, pets.inputs, "--output", "x.parquet"), "--output x.parquet", ".csv or .npy")
    Path("x.csv").mkdir()
    refuses(predict(run, pets, pets.inputs, "--output", "x.csv"), "x.csv is a folder")
    Path("file").write_text("")
    refuses(predict(run, pets, pets.inputs, "--output", "file/x.csv"), "cannot be made")
    Path("list.csv").write_text(f"image\n{next(pets.inputs.rglob('*.png'))}\n")
    Path("link.csv").symlink_to("list.csv")
    refuses(predict(run, pets, "list.csv", "--output", "link.csv"), "--output link.csv is the input")
    assert Path("list.csv").read_text().startswith("image\n")


def fail_at(batch: int, fault: BaseException | signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the net's step fail, or the process be sent a signal, at a batch."""
    interface = importlib.import_module("model").MInterface
    real = interface.predict_step

    def step(self: Any, given: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == batch and isinstance(fault, signal.Signals):
            os.kill(os.getpid(), fault)
        elif batch_idx == batch:
            raise fault
        return real(self, given, batch_idx, dataloader_idx)

    monkeypatch.setattr(interface, "predict_step", step)


@pytest.mark.parametrize("name", ["there.csv", "there.npy"])
def test_an_older_file_is_replaced_only_by_a_whole_one(
    name: str, pets: Trained, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("older")
    Path("link" + Path(name).suffix).symlink_to(name)
    with monkeypatch.context() as patched:
        fail_at(2, KeyboardInterrupt(), patched)
        outcome = predict(run, pets, pets.inputs, "--output", name, "--batch_size", "2")
        assert outcome.code == 130 and outcome.err == f"error: interrupted; {name} was not written\n"
    with monkeypatch.context() as patched:
        fail_at(2, signal.SIGTERM, patched)
        outcome = predict(run, pets, pets.inputs, "--output", name, "--batch_size", "2")
        assert outcome.code == 143 and outcome.err == f"error: SIGTERM: stopped; {name} was not written\n"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with monkeypatch.context() as patched:
        fail_at(2, RuntimeError("a bug"), patched)
        with pytest.raises(RuntimeError, match="a bug"):
            predict(run, pets, pets.inputs, "--output", name, "--batch_size", "2")
    assert (tmp_path / name).read_text() == "older" and len([*tmp_path.iterdir()]) == 2
    assert predict(run, pets, pets.inputs, "--output", "link" + Path(name).suffix, "--batch_size", "2").code == 0
    assert (tmp_path / ("link" + Path(name).suffix)).is_symlink() and (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_full_disk_leaves_the_older_file_whole(
    kind: str, table: Trained, run: Callable, tmp_path: Path, load: Callable[[str], ModuleType]
) -> None:
    np.save(tmp_path / "in.npy", np.ones((12_000, 2), np.float32))
    with load("tests/engine/injection.py").space(kind, tmp_path, limit=20_000, size="64k") as disk:
        for name in ("there.csv", "there.npy"):
            Path(name).write_text("older")
            if kind == "limit":
                disk.fill()
            try:
                outcome = predict(run, table, tmp_path / "in.npy", "--output", name)
            finally:
                disk.free()
            assert outcome.code == 1, outcome
            (line,) = outcome.err.splitlines()
            assert re.match(r"error: .*(No space left|File too large)", line), line
            assert f"{name} could not be written; free space" in line
            assert Path(name).read_text() == "older" and not [*Path().glob("*.tmp")]
            assert predict(run, table, tmp_path / "in.npy", "--output", name, "--limit_predict_batches", "3").code == 0
            assert (len(rows(name)) if name.endswith("csv") else len(np.load(name))) == 192


# Memory


@contextmanager
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts batches: how many were predicted, and how many of them were held at once, inputs or predictions."""
    interface = importlib.import_module("model").MInterface
    real, counts, held = interface.predict_step, [0, 0], {"in": 0, "out": 0}

    def watch(kind: str, tensor: torch.Tensor) -> None:
        held[kind] += 1
        counts[1] = max(counts[1], *held.values())
        weakref.finalize(tensor, lambda: held.__setitem__(kind, held[kind] - 1))

    def step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        outputs = real(self, batch, batch_idx, dataloader_idx)
        counts[0] += 1
        watch("in", batch[0])
        watch("out", outputs)
        return outputs

    with monkeypatch.context() as patched:
        patched.setattr(interface, "predict_step", step)
        yield counts


@pytest.mark.parametrize("output", ["there.csv", "there.npy"])
def test_a_long_array_is_never_in_memory(
    output: str, table: Trained, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("in.npy", np.random.default_rng(0).random((20_000, 2), np.float32))
    with alive(monkeypatch) as counts:
        assert predict(run, table, "in.npy", "--output", output, "--batch_size", "100").code == 0
    assert counts[0] == 200 and 1 <= counts[1] <= 4, counts


def test_a_long_table_is_never_in_memory(table: Trained, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    padding = "x" * 2000
    with open("in.csv", "w") as file:
        file.write("a,note,b\n")
        file.writelines(f"{number / 1000},{padding},{number % 5}\n" for number in range(6000))
    assert predict(run, table, "in.csv", "--limit_predict_batches", "1").code == 0  # imports
    gc.collect()
    with alive(monkeypatch) as counts:
        tracemalloc.start()
        try:
            assert predict(run, table, "in.csv", "--batch_size", "100").code == 0
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert counts[0] == 60 and 1 <= counts[1] <= 4, counts
    assert os.path.getsize("in.csv") > 10_000_000 and peak < 4_000_000, peak
    assert len(rows("predictions.csv")) == 6000


# Tasks, datasets and nets


@pytest.mark.parametrize(
    ("target", "columns"),
    [
        (["--data.target", "size", "class", "--task", "multilabel"], ["probability_size", "probability_class"]),
        (["--data.target", "size", "price"], ["value_size", "value_price"]),
        (["--data.target", "class", "--data.task", "binary"], ["probability"]),
    ],
)
def test_every_task_is_written_as_for_a_dataset(
    target: list[str], columns: list[str], run: Callable, tmp_path: Path
) -> None:
    lines = [
        f"{n / 7:.3f},{n % 5},{n % 2},{n // 2 % 2 + (0.5 if 'price' in target else 0)},{n * 1000}" for n in range(60)
    ]
    (tmp_path / "all.csv").write_text("\n".join(["a,b,class,size,price", *lines]) + "\n")
    words = ["--dataset", "csv_data", "--data.file", "all.csv", "--data.features", "a", "b", "--model_name", "mlp"]
    assert run(*words, *target, *QUICK).code == 0
    # One by one: how many are multiplied at once decides about the last bit, and so about the last digit.
    one_by_one = ("predict", "--ckpt_path", "best", "--batch_size", "1")
    assert run(*one_by_one).code == 0
    whole = run("predict", "--ckpt_path", "best", "--input", "all.csv", "--output", "all.npy")
    assert whole.code == 0 and "predictions  60 in all.npy" in whole.out
    told = rows("logs/mlp/version_0/predictions.csv")
    assert [name for name in told[0] if name not in ("index", "name")] == columns
    assert run(*one_by_one, "--input", "all.csv").code == 0
    same = {row["name"]: row for row in rows("logs/mlp/version_0/predictions.csv")}
    assert list(same["row 2"]) == ["index", "name", *columns, "error"]
    assert numbers(told).tolist() == numbers([same[row["name"]] for row in told]).tolist()
    array = np.load("all.npy")
    assert array.shape == ((60,) if columns == ["probability"] else (60, 2))
    assert array.reshape(60, -1) == pytest.approx(numbers([*same.values()]), rel=1e-5)
    # What the dataset itself is asked for goes into arrays as well.
    assert run("predict", "--ckpt_path", "best", "--output", "set.npy").code == 0
    assert np.load("set.npy").reshape(len(told), -1) == pytest.approx(numbers(told), rel=1e-5)


SQUARES = '''"""Bright and dark files of 6 bytes, brought to -1 and 1."""
import numpy as np
import torch
from torch.utils.data import Dataset


class Squares(Dataset):
    num_classes, class_names = 2, ["dark", "bright"]

    def __init__(self, split, root: str = "squares") -> None:
        self.files = sorted(__import__("pathlib").Path(root).glob("*.raw"))
        self.targets = [int(file.stem) % 2 for file in self.files]
        part = {"train": slice(0, 20), "val": slice(20, 30)}.get(split, slice(30, 40))
        self.files, self.targets = self.files[part], self.targets[part]
        self.names = [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        return self.read_file(self.files[index], (1, 2, 3)), self.targets[index]

    @staticmethod
    def read_file(file, shape):
        return torch.from_numpy(np.fromfile(file, np.uint8) / 127.5 - 1).reshape(shape).float()
'''
FLAT = '''"""A net that takes no arguments."""
from torch import nn


class Flat(nn.Sequential):
    """A net that takes no arguments."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(6, 2))
'''


def test_a_dataset_that_reads_files_by_itself(project: Path, run_in_project: Callable) -> None:
    (project / "data" / "squares.py").write_text(SQUARES)
    (project / "model" / "flat.py").write_text(FLAT)
    files = project / "squares"
    files.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(128, size=6, dtype=np.uint8) + 128 * (number % 2)
        (files / f"{number:02}.raw").write_bytes(pixels.astype(np.uint8).tobytes())
    assert run_in_project("--dataset", "squares", "--model_name", "flat", *QUICK).code == 0
    assert run_in_project("predict", "--ckpt_path", "best").code == 0
    told = rows("logs/flat/version_0/predictions.csv")
    (files / "99.raw").write_bytes(bytes(5))
    outcome = run_in_project("predict", "--ckpt_path", "best", "--input", "squares", "--num_workers", "2")
    assert outcome.code == 1 and outcome.err.startswith("warning: 99.raw: RuntimeError: shape '[1, 2, 3]' is invalid")
    predicted = rows("logs/flat/version_0/predictions.csv")
    assert [row["name"] for row in predicted] == [*(f"{n:02}.raw" for n in range(40)), "99.raw"]
    assert predicted[30]["class"] in ("dark", "bright")
    assert np.allclose(numbers(predicted[30:40]), numbers(told), rtol=0, atol=1e-6)


def test_a_net_that_is_not_square_gets_pictures_of_exactly_its_size(tmp_path: Path) -> None:
    from utils.pictures import picture_of_shape

    left = np.repeat(np.array([[255] * 30 + [0] * 30], np.uint8), 30, 0)
    Image.fromarray(left).save(tmp_path / "1.png")
    image = picture_of_shape(tmp_path / "1.png", (3, 8, 4))
    assert image.shape == (3, 8, 4) and image[:, :, 0].eq(1).all() and image[:, :, 3].eq(0).all()
