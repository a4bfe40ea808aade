"""Every combination of choices gives a whole project, without anything that was not asked for."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
TEMPLATE = "{{cookiecutter.project_slug}}"
PICTURES = {
    *("model/torchvision_net.py", "data/torchvision_data.py", "data/folder_data.py", "configs/fashion_mnist.yaml"),
    *("data/digits.npz", "data/digits.md"),
}
# Beside what every project has: (files that are missing, files of its own).
OF_TASK = {
    "image_classification": (set(), set()),
    "tabular_regression": (PICTURES, {"data/diabetes.csv", "data/diabetes.md"}),
    "language_model": (PICTURES | {"model/mlp.py", "data/csv_data.py", "utils/augmentation.py"}, set()),
}
OF_CI = {"GitHub": {".gitlab-ci.yml"}, "GitLab": {".github/workflows/ci.yml"}}
OF_CI["none"] = OF_CI["GitHub"] | OF_CI["GitLab"]
SHORT = ["--max_epochs", "1", "--limit_train_batches", "3", "--limit_val_batches", "2", "--limit_test_batches", "2"]
TASKS = [task for task in OF_TASK if task != "image_classification"]


@pytest.fixture(scope="module")
def tool(load: Callable) -> object:
    return load("tools/combinations.py")


def test_the_combinations_are_those_of_the_questions(tool) -> None:
    questions = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
    assert tool.choices() == {name: questions[name] for name in ("license", "task", "ci")}
    assert set(questions["task"]) == set(OF_TASK) and set(questions["ci"]) == set(OF_CI)
    assert len({tuple(answers.values()) for answers in tool.combinations()}) == 4 * 3 * 3


@pytest.mark.parametrize("license", ["MIT", "Apache-2.0", "BSD-3-Clause", "Proprietary"])
@pytest.mark.parametrize("task", OF_TASK)
def test_a_combination_has_its_files_and_no_others(
    license: str, task: str, tool, generate: Callable, template_files: list[str], tmp_path: Path
) -> None:
    everything = {name.removeprefix(f"{TEMPLATE}/") for name in template_files if name.startswith(f"{TEMPLATE}/")}
    everything = {name for name in everything if not name.startswith("tasks/")}
    without, own = OF_TASK[task]
    for ci in OF_CI:
        project = generate(tmp_path / ci, license=license, task=task, ci=ci)
        files = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
        unasked = OF_CI[ci] | without
        assert files == everything - unasked | own
        assert len(files) <= 128
        assert not [path for path in project.rglob("*") if path.is_dir() and not any(path.iterdir())]
        assert tool.faults(project) == []


def test_faults_are_found(tool, generated: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(generated, tmp_path / "project"))
    (project / "README.md").write_text("{{ cookiecutter.project_name }}")
    (project / "pyproject.toml").write_text("name = ")
    (project / "configs/quick.yaml").write_text("a: [")
    (project / "main.py").write_text("if")
    assert [fault.split(":")[0] for fault in tool.faults(project)] == [
        *("README.md", "quick.yaml", "main.py", "pyproject.toml"),
    ]


def imported(project: Path) -> set[str]:
    """Modules of a project that some other file of it imports."""
    found = set()
    for path in project.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_is_left_dead(generated_of_task: Path, load: Callable) -> None:
    project = generated_of_task
    used, modules = imported(project), [path.relative_to(project) for path in (project / "utils").rglob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules}
    assert names - used - {"utils"} == set()
    readme = (project / "README.md").read_text(encoding="utf-8")
    for name in ("folder_data", "csv_data", "torchvision_data", "torchvision_net", "mlp", "digits"):
        is_there = bool([*project.glob(f"*/{name}.*")])
        assert (name in readme) == is_there, name
    examples = load(project / "tests/examples.py")
    assert [
        name for name in examples.FLAGS if not [*project.glob(f"model/{name}.py"), *project.glob(f"data/{name}.py")]
    ] == []


def test_no_code_names_a_module_that_its_task_does_without(generated_of_task: Path, load: Callable) -> None:
    project = generated_of_task
    without = [Path(name) for name in load("hooks/post_gen_project.py").WITHOUT[project.name]]
    # What lies in utils/ goes by its path: `augmentation` is a word of its own.
    modules = {path.stem for path in without if path.suffix == ".py" and path.parts[0] != "utils"}
    modules |= {"".join(part.title() for part in name.split("_")) for name in modules}
    modules |= {rf"utils[./]{path.stem}" for path in without if path.parts[0] == "utils"}
    assert bool(modules) == (project.name != "image_classification")
    files = [path for path in project.rglob("*.py") if path.relative_to(project).parts[0] != "engine"]
    assert len(files) > 30
    named = {
        path.name: re.findall(rf"\b(?:{'|'.join(modules)})\b", path.read_text("utf-8")) for path in files if modules
    }
    assert {name: found for name, found in named.items() if found} == {}


@pytest.mark.parametrize("license", ["MIT", "Proprietary"])
def test_what_others_may_use_they_can_cite(license: str, generate: Callable, tmp_path: Path) -> None:
    readme = (generate(tmp_path, license=license, author_name="Ada") / "README.md").read_text(encoding="utf-8")
    assert ("author = {Ada}" in readme) == (license != "Proprietary")


@pytest.mark.parametrize("ci", ["GitHub", "GitLab"])
def test_ci_runs_commands_that_exist(ci: str, generate: Callable, tmp_path: Path) -> None:
    project = generate(tmp_path, ci=ci)
    [file] = [*project.glob(".github/workflows/*.yml"), *project.glob(".gitlab-ci.yml")]
    jobs = yaml.safe_load(file.read_text(encoding="utf-8"))
    steps = jobs["check"]["script"] if ci == "GitLab" else [s.get("run") for s in jobs["jobs"]["check"]["steps"]]
    commands = [step for step in steps if step]
    assert commands == ["make lint", "make test"]
    makefile = (project / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{command.split()[1]}:" in makefile for command in commands)


@pytest.mark.parametrize("generated_of_task", TASKS, indirect=True)
def test_a_task_trains_goes_on_is_tested_and_predicts(of_task: Path) -> None:
    main = importlib.import_module("main").main
    quiet = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "--report", "false"]
    first = main([*SHORT, *quiet])
    longer = main([*SHORT, *quiet, "--max_epochs", "2", "--ckpt_path", "last"])
    assert {"train_loss", "val_loss", "test_loss"} <= set(first)
    assert {"test_r2", "test_mae"} <= set(first) or {"test_acc", "test_perplexity"} <= set(first)
    folder = of_task / "logs/standard_net/version_0"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert [*folder.parent.iterdir()] == [folder]
    tested = main(["test", "--ckpt_path", "best", "--limit_test_batches", "2"])
    assert tested["test_loss"] == longer["test_loss"]
    main(["predict", "--ckpt_path", "best"])
    assert (folder / "predictions.csv").stat().st_size > 500


@pytest.mark.parametrize("generated_of_task", ["language_model"], indirect=True)
def test_a_text_is_read_to_its_end_and_faults_are_one_line(of_task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("main").main
    main([*SHORT, "--report", "false"])
    for name, text in (("long", "To be, or not to be? " * 10), ("short", "To be")):
        (of_task / "texts").mkdir(exist_ok=True)
        (of_task / "texts" / f"{name}.txt").write_text(text, encoding="utf-8")
    main(["predict", "--ckpt_path", "best", "--input", "texts/long.txt", "--output", "one.csv"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["predict", "--ckpt_path", "best", "--input", "texts", "--output", "all.csv"])
    assert end.value.code == 1
    one, both = (list(csv.DictReader((of_task / f"{name}.csv").open(encoding="utf-8"))) for name in ("one", "all"))
    assert one[0]["class"] == both[0]["class"] != "" and both[1]["class"] == ""
    assert "has 5 letters of the alphabet, and the net takes 64" in both[1]["error"]
    with pytest.raises(SystemExit) as end:
        main([*SHORT, "--data.length", "300", "--report", "false"])
    assert end.value.code == 2 and "give --model.longest 300, or shorter ones" in capsys.readouterr().err


# What a README says of its example net, less a margin; of the text after three epochs: the commonest letter is 0.15.
SCORES = {"tabular_regression": ("test_r2", 0.4, ()), "language_model": ("test_acc", 0.22, ("--max_epochs", "3"))}


@pytest.mark.parametrize("generated_of_task", TASKS, indirect=True)
def test_a_task_is_learned(of_task: Path) -> None:
    metric, least, words = SCORES[of_task.name]
    main = importlib.import_module("main").main
    assert main(["--report", "false", "--enable_progress_bar", "false", *words])[metric] > least


def test_code_of_a_readme_runs(of_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those blocks that stand apart: how a batch is read at once, and how exported files are used."""
    main = importlib.import_module("main").main
    main([*SHORT, "--report", "false"])
    main(["export", "--ckpt_path", "best"])
    data = importlib.import_module("data.standard_data").StandardData("test")
    inputs = torch.stack([torch.as_tensor(data[number][0]) for number in range(2)])
    blocks = re.findall(r"```python\n(.*?)```", (of_task / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    [read] = [block for block in blocks if "__getitems__" in block]
    names = {"Tensor": torch.Tensor}
    if "random_crop" in read:
        names |= vars(importlib.import_module("utils.augmentation"))
    exec(read, names)
    own = SimpleNamespace(inputs=torch.rand(5, 3), targets=torch.arange(5), augment=True)
    own.images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    assert [len(part) for part in names["__getitems__"](own, [0, 2])] == [2, 2]
    monkeypatch.chdir("logs/standard_net/version_0/export")
    for block in [block for block in blocks if "metadata.json" in block]:
        [name] = {"images", "rows", "letters"} & set(re.findall(r"\w+", block))
        names = {name: inputs.numpy() if "onnx" in block else inputs}
        exec(block, names)
        assert len(names.get("probabilities", names.get("values"))) == 2 and names["about"]


@pytest.mark.parametrize("generated_of_task", TASKS, indirect=True)
def test_a_task_passes_the_linter(of_task: Path) -> None:
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_every_combination_is_put_through_what_its_user_does() -> None:
    done = subprocess.run([sys.executable, "tools/combinations.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") == 36
