"""`main.py export`: files that give what the checkpoint gives, and a line for what cannot be exported."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

PROJECT = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"
FEW = ("--max_epochs", "1", "--limit_train_batches", "6", "--limit_val_batches", "1", "--limit_test_batches", "1")
FEW += ("--enable_progress_bar", "false", "--enable_model_summary", "false", "--report", "false")
BEST = "checkpoints/best.ckpt"
# Has nothing of what it was made with but the files: no data, no run folder.
FRESH = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import main
main.main(["export", "--ckpt_path", "copied.ckpt"])
import numpy, onnxruntime, torch
inputs = numpy.load("inputs.npy")
session = onnxruntime.InferenceSession("export/model.onnx")
module = torch.export.load("export/model.pt2").module()
found = []
for count in (1, 2, 5, 100):
    by_onnx = session.run(["values"], {"inputs": inputs[:count]})[0]
    found.append([by_onnx.tolist(), module(torch.from_numpy(inputs[:count])).tolist()])
pathlib.Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder of a run on digits that kept averages of its weights, and its metrics."""
    folder = tmp_path_factory.mktemp("digits")
    with contextlib.chdir(folder):
        words = [*FEW, "--max_epochs", "3", "--ema_decay", "0.5", "--model.width", "8"]
        metrics = importlib.import_module("main").main([*words, "--limit_test_batches", "1.0"])
    return folder / "logs/standard_net/version_0", metrics


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learned prices, and whose data is gone."""
    folder = tmp_path_factory.mktemp("houses")
    inputs = np.random.default_rng(0).random((200, 2))
    lines = [f"{100 * a:.2f},{2000 + 20 * b:.0f},{2e5 * a + 1e5 * b + 2e5:.0f}" for a, b in inputs]
    (folder / "houses.csv").write_text("\n".join(["size,year,price", *lines]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "houses.csv", "--model_name", "mlp", "--precision", "bf16-mixed")
    with contextlib.chdir(folder):
        importlib.import_module("main").main([*FEW, *words])
    (folder / "houses.csv").unlink()
    return folder / "logs/mlp/version_0"


def predictions(checkpoint: Path, inputs: np.ndarray) -> np.ndarray:
    """What predict_step gives, with the weights of a checkpoint."""
    model = importlib.import_module("model").MInterface.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        return model.predict_step(torch.from_numpy(inputs), 0).numpy()


def changed(checkpoint: Path, path: Path, **hyper_parameters: Any) -> Path:
    """A copy of a checkpoint that says something else of its net."""
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= hyper_parameters
    torch.save(content, path)
    return path


def told(folder: Path) -> dict[str, Any]:
    """The metadata of both files, which is the same."""
    extra = {"metadata.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    by_onnx = json.loads(session.get_modelmeta().custom_metadata_map["metadata.json"])
    assert json.loads(extra["metadata.json"]) == by_onnx
    return by_onnx


def fails(outcome: Any, text: str, code: int = 2) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert text in outcome.err


def test_files_give_what_the_checkpoint_gives_in_a_fresh_process(houses: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "copied.ckpt"
    checkpoint.write_bytes((houses / BEST).read_bytes())
    inputs = (np.random.default_rng(1).random((100, 2)) * [100, 20] + [0, 2000]).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    command = [sys.executable, "-c", FRESH, str(PROJECT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["torch", "export/model.pt2"], ["onnx", "export/model.onnx"]]
    assert all("(agrees with the checkpoint to " in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["model.onnx", "model.pt2"]
    expected = predictions(checkpoint, inputs)
    # In the units of the table, of which the deviation is 65,000.
    assert expected.shape == (100, 1) and expected.std() > 1000 and 2e5 < expected.mean() < 5e5
    for count, both in zip((1, 2, 5, 100), json.loads((tmp_path / "found.json").read_text()), strict=True):
        for found in both:
            np.testing.assert_allclose(found, expected[:count], rtol=1e-5)
    about = told(tmp_path / "export")
    assert about["outputs"] == {
        "name": "values",
        "shape": ["batch", 1],
        "dtype": "float32",
        "meaning": "values in the units of the targets",
    }
    assert about["inputs"]["shape"] == ["batch", 2] and about["inputs"]["columns"] == ["size", "year"]
    assert about["class_names"] == ["price"]


def test_the_weights_that_were_judged_are_exported(digits: tuple[Path, dict[str, float]], run: Callable) -> None:
    folder, metrics = digits
    outcome = run("export", "--ckpt_path", str(folder / BEST))
    assert outcome.code == 0 and outcome.err == "", outcome.err
    assert outcome.metrics.keys() == {"torch", "onnx"} and max(outcome.metrics.values()) < 1e-5
    assert f"torch        {folder}/export/model.pt2  (agrees with the checkpoint to " in outcome.out
    with np.load(PROJECT / "data/digits.npz") as data:
        chosen = data["split"] == 2
        images, labels = data["images"][chosen][:, None].astype(np.float32) / 16, data["labels"][chosen]
    session = onnxruntime.InferenceSession(folder / "export/model.onnx")
    (by_onnx,) = session.run(None, {"inputs": images})
    by_torch = torch.export.load(folder / "export/model.pt2").module()(torch.from_numpy(images)).numpy()
    expected = predictions(folder / BEST, images)
    for found in (by_onnx, by_torch):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
        assert (found.argmax(axis=1) == labels).mean() == pytest.approx(metrics["test_acc"])
    saved = torch.load(folder / BEST, weights_only=True)
    assert any(not torch.equal(saved["current_model_state"][n], value) for n, value in saved["state_dict"].items())


def test_files_say_what_they_are(digits: tuple[Path, dict[str, float]], run: Callable, tmp_path: Path) -> None:
    pixels = {"mean": [0.5], "std": [0.25]}
    inputs = {"shape": [1, 8, 8], "dtype": "float32", **pixels}
    names = [f"digit {n}" for n in range(10)]
    changed(digits[0] / BEST, tmp_path / "named.ckpt", class_names=names, inputs=inputs)
    assert run("export", "--ckpt_path", "named.ckpt", "--output", "deep/er").code == 0
    about = told(tmp_path / "deep/er")
    saved = torch.load(tmp_path / "named.ckpt", weights_only=True)
    assert about == {
        "project": PROJECT.name,
        "net": "standard_net",
        "task": "multiclass",
        "class_names": names,
        "inputs": {"name": "inputs", "shape": ["batch", 1, 8, 8], "dtype": "float32", **pixels},
        "outputs": {
            "name": "probabilities",
            "shape": ["batch", 10],
            "dtype": "float32",
            "meaning": "probability of each class",
        },
        "checkpoint": "named.ckpt",
        "epoch": saved["epoch"],
        "global_step": saved["global_step"],
        "torch": torch.__version__,
    }
    session = onnxruntime.InferenceSession(tmp_path / "deep/er/model.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("inputs", ["batch", 1, 8, 8], "tensor(float)")
    assert (returned.name, returned.shape) == ("probabilities", ["batch", 10])
    # Nothing of the machine that it was made on.
    for path in (tmp_path / "deep/er").iterdir():
        assert str(PROJECT.parent).encode() not in path.read_bytes()


NETS = {
    "tokens": """
class Tokens(nn.Module):
    def __init__(self, num_classes: int, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(17, 8), nn.Linear(8, num_classes)

    def forward(self, images):
        return self.read(self.embed((images * 16).long() if images.is_floating_point() else images).mean((1, 2, 3)))
""",
    "picky": """
class Picky(nn.Module):
    def __init__(self, num_classes: int, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.read = nn.Linear(64, num_classes)

    def forward(self, images):
        scores = self.read(images.flatten(1))
        if scores.sum() > 0:
            scores = 2 * scores
        return scores
""",
    "rigid": """
class Rigid(nn.Module):
    def __init__(self, num_classes: int, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.read = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.read(images.reshape(int(images.shape[0]), 64))
""",
    "no_onnx": """
class NoOnnx(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(64, 10)

    def forward(self, images):
        squares = self.read(images.flatten(1))[:, :9].reshape(-1, 3, 3)
        return torch.linalg.eigvals(squares.detach()).real.repeat(1, 4)[:, :10] + self.read(images.flatten(1))
""",
}


def test_nets_of_ones_own_are_exported_or_told_why_not(project: Path, run_in_project: Callable) -> None:
    for name, text in NETS.items():
        (project / f"model/{name}.py").write_text(f"import torch\nfrom torch import nn\n{text}")
        trained = run_in_project(*FEW, "--limit_train_batches", "1", "--model_name", name)
        assert trained.code == 0, trained.err
    runs = project / "logs"

    # Whole numbers go in as they are.
    inputs = {"shape": [1, 8, 8], "dtype": "int64"}
    changed(runs / "tokens/version_0" / BEST, project / "tokens.ckpt", inputs=inputs)
    assert run_in_project("export", "--ckpt_path", "tokens.ckpt", "--output", "tokens").code == 0
    given = np.random.default_rng(0).integers(0, 17, (3, 1, 8, 8))
    (found,) = onnxruntime.InferenceSession(project / "tokens/model.onnx").run(None, {"inputs": given})
    np.testing.assert_allclose(found, predictions(project / "tokens.ckpt", given), atol=1e-5)

    for name, reason in (("picky", "depends on values in the batch (picky.py:11)"), ("rigid", "one size (2 here)")):
        fails(run_in_project("export", "--ckpt_path", str(runs / name / "version_0" / BEST)), reason)
        assert not (runs / name / "version_0/export").exists()

    outcome = run_in_project("export", "--ckpt_path", str(runs / "no_onnx/version_0" / BEST))
    fails(outcome, "the net cannot be exported to ONNX: ")
    assert "linalg_eig" in outcome.err and "torch  " in outcome.out
    assert [path.name for path in (runs / "no_onnx/version_0/export").iterdir()] == ["model.pt2"]


def test_a_compiled_run_is_exported_as_it_is(
    digits: tuple[Path, dict[str, float]], run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(digits[0] / BEST, tmp_path / "compiled.ckpt", compile=True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: pytest.fail("compiled"))
    assert run("export", "--ckpt_path", "compiled.ckpt", "--formats", "torch").metrics.keys() == {"torch"}


def test_what_is_not_installed_is_left_out_or_asked_for(
    digits: tuple[Path, dict[str, float]], run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", "--ckpt_path", str(digits[0] / BEST), "--output", "here")
    exporting = importlib.import_module("utils.export")
    missing = {"onnxruntime"}
    there = exporting.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name in missing else there(name))
    outcome = run(*words, "--formats", "onnx")
    assert outcome.out == "onnx         here/model.onnx  (not checked: pip install onnxruntime)\n"
    assert outcome.metrics == {} and outcome.code == 0
    missing |= {"onnxscript"}
    fails(run(*words, "--formats", "onnx"), "needs onnxscript; run: pip install onnx onnxscript onnxruntime")
    outcome = run(*words)
    assert outcome.code == 0 and outcome.metrics.keys() == {"torch"}
    assert "onnx         left out; for it: pip install onnx onnxscript onnxruntime\n" in outcome.out


def test_a_file_that_gives_something_else_is_not_kept(
    digits: tuple[Path, dict[str, float]], run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting = importlib.import_module("utils.export")
    right = exporting.LOAD["onnx"]

    def wrong(path: Path) -> Any:
        loaded = right(path)
        # Right but for the last of a batch of five.
        return lambda batch: loaded(batch) + 2e-5 * (torch.arange(len(batch)) == 4)[:, None]

    monkeypatch.setitem(exporting.LOAD, "onnx", wrong)
    outcome = run("export", "--ckpt_path", str(digits[0] / BEST), "--output", "here")
    fails(outcome, "model.onnx gives other predictions than the checkpoint (by 2e-05", code=1)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["model.pt2"]
    fails(run("export", "--ckpt_path", str(digits[0] / BEST), "--formats", "onnx", "--output", "no"), "by 2e-05", 1)
    assert not (tmp_path / "no").exists()


def test_a_full_disk_and_a_bad_folder_leave_nothing(
    digits: tuple[Path, dict[str, float]], run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    words = ("export", "--ckpt_path", str(digits[0] / BEST), "--formats", "torch", "--output")
    fails(run(*words, "file/folder"), "file/folder/model.pt2 could not be written", 1)

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(run(*words, "folder"), "No space left on device; folder/model.pt2 could not be written", 1)
    assert not (tmp_path / "folder").exists()


def test_bad_input_is_one_line(digits: tuple[Path, dict[str, float]], run: Callable, tmp_path: Path) -> None:
    best = str(digits[0] / BEST)
    changed(digits[0] / BEST, tmp_path / "mute.ckpt", inputs=None)
    fails(run("export", "--ckpt_path", "mute.ckpt"), "mute.ckpt does not say what its net is given")
    (tmp_path / "text.ckpt").write_text("hello")
    fails(run("export", "--ckpt_path", "text.ckpt"), "text.ckpt is damaged")
    fails(run("export"), "export needs --ckpt_path")
    fails(run("export", "--ckpt_path", best, "--model.width", "4"), "is of another net than this one")
    fails(run("export", "--ckpt_path", best, "--input", "picture.png"), "--input: that flag is for predict")
    fails(run("export", "--ckpt_path", best, "--formats", "tflite"), "--formats")
    assert not (tmp_path / "export").exists()
