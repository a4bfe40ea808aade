"""What all tests of the template share: clean caches, a copy of the template, a generated project."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from cookiecutter.main import cookiecutter
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
TEMPLATE = "{{cookiecutter.project_slug}}"
TASKS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))["task"]

# Cookiecutter copies whatever lies in the template folder, so no cache may end up there: neither from this
# process nor from those that it starts.
CACHES = ROOT / ".cache"
sys.pycache_prefix = str(CACHES / "pycache")
os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(CACHES / "hypothesis")
os.environ["RUFF_CACHE_DIR"] = str(CACHES / "ruff")
os.environ["MYPY_CACHE_DIR"] = str(CACHES / "mypy")

# Nets in tests are tiny: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(ROOT / TEMPLATE))  # so that `import engine` finds the one in the template

# Tests of many cases that take seconds each: as many as this, evenly chosen, are in every run; others are long ones.
CASES = {
    "test_exit_to_lightning.py::test_every_command_works": 2,
    "test_fuzz.py::test_flags_that_have_to_do_with_each_other": 2,
    "test_hostile_files.py::test_hyper_parameters_of_a_checkpoint_name_nothing_else": 4,
    "test_options.py::test_a_combination_has_its_files_and_no_others": 3,
    "test_said_once.py::test_wrong_input_is_refused_once": 2,
    "test_tasks.py::test_a_setting_trains_the_digits": 4,
    "test_torchvision_net.py::test_every_classification_net_gives_the_scores_of_the_classes": 4,
    "engine/test_ddp_equality.py::test_losses_and_weights_are_those_of_one_process": 4,
    "engine/test_ddp_equality.py::test_processes_with_parts_of_the_weights_compute_the_same": 2,
    "engine/test_failures_of_one.py::test_an_exception_of_one_process_ends_all_with_its_traceback_first": 3,
    "engine/test_fsdp.py::test_two_processes_step_as_one": 1,
    "engine/test_hostile_checkpoints.py::test_hyper_parameters_of_other_names_and_types_are_refused_or_left": 1,
    "engine/test_other_processes.py::test_no_sample_is_repeated_or_skipped_where_batches_do_not_fit_each_other": 1,
    "engine/test_resume_within_epoch.py::test_from_every_point_of_a_run": 1,
    "engine/test_resume_within_epoch.py::test_with_every_kind_of_loader": 3,
    "engine/test_signals.py::test_a_signal_at_any_moment_saves_a_step_from_which_no_bit_changes": 24,
    "engine/test_signals_to_one.py::test_a_signal_to_one_process_stops_both_and_no_bit_changes": 5,
}
# Files of tests that share what takes up to a minute to make: one process runs all of a file.
TOGETHER = {
    f"tests/{name}.py" for name in ("test_chaos", "test_exit_to_lightning", "test_export_command", "test_predict")
}
TOGETHER |= {
    f"tests/engine/test_{name}.py" for name in ("ddp_equality", "fsdp", "signals", "signals_to_one", "torchrun")
}


class Scheduler(LoadScopeScheduling):
    """Hands out tests one by one, and those of some files at once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    """The groups of pytest-xdist 3.8 itself are without effect under pytest 9.2."""
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make long ones of the cases that are too many."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0].removeprefix("tests/"), []).append(item)
    for name, most in CASES.items():
        found = [item for item in cases.get(name, []) if item.get_closest_marker("long") is None]
        kept = {found[position * len(found) // most].nodeid for position in range(most)} if found else set()
        for item in found:
            if item.nodeid not in kept:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """A function that imports a file of this repository which is in no package: `load("tools/x.py")`."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def template_files() -> list[str]:
    """Files of this repository that git tracks or would track, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    return sorted({name for name in names.split("\0") if name and (ROOT / name).is_file()})


@pytest.fixture(scope="session")
def template(template_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository as a fresh clone would be, without anything that git ignores."""
    copy = tmp_path_factory.mktemp("template")
    for name in template_files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def user_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of cookiecutter that leave the home of whoever runs the tests alone."""
    home = tmp_path_factory.mktemp("cookiecutter")
    config = home / "config.yaml"
    config.write_text(f"cookiecutters_dir: '{home}'\nreplay_dir: '{home}'\n", encoding="utf-8")
    return config


@pytest.fixture(scope="session")
def generate(template: Path, user_config: Path) -> Callable[..., Path]:
    """A function that generates a project: `generate(folder, project_name="X")` returns its path."""

    def generate(folder: Path, **answers: str) -> Path:
        project = cookiecutter(
            str(template),
            no_input=True,
            extra_context=answers,
            output_dir=str(folder),
            config_file=str(user_config),
        )
        return Path(project)

    return generate


@pytest.fixture(scope="session")
def generated(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project generated with the default answers. Tests share it: leave it as it is."""
    return generate(tmp_path_factory.mktemp("generated"))


@pytest.fixture(scope="session", params=TASKS)
def generated_of_task(
    request: pytest.FixtureRequest, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A project of each task, in a folder of the task's name. Tests share it: leave it as it is."""
    return generate(tmp_path_factory.mktemp("tasks"), task=request.param, project_slug=request.param)


class Outcome(NamedTuple):
    """What a command left behind: its exit code (0 for none), metrics, and both output streams."""

    code: int
    metrics: dict[str, float]
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """A function that calls `main` of the template's own project, in an empty working folder: `run("test", ...)`."""
    monkeypatch.chdir(tmp_path)
    return runner(capsys)


def unreported(words: tuple[str, ...]) -> list[str]:
    """What turns the report off, which takes seconds, unless a test asks for one."""
    return [] if "--report" in words or "--help" in words else ["--report", "false"]


def runner(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls `main.main` in this process; starting a new one would import torch every time."""

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        code, metrics = 0, {}
        try:
            metrics = importlib.import_module("main").main([*words, *unreported(words)])
        except SystemExit as end:
            code = end.code
        return Outcome(code, metrics, *capsys.readouterr())

    return run


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """A function that makes a project the working folder, where `import main` finds it, and returns its path."""

    def taken_out() -> dict[str, ModuleType]:
        ours = {"main", "engine", "data", "model", "utils"}
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ours}

    def enter(folder: Path) -> Path:
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        return folder

    set_aside = taken_out()
    yield enter
    taken_out()
    sys.modules.update(set_aside)


@pytest.fixture
def project(generated: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    """A generated project of one's own, to add files to; `import main` finds it, and it is the working folder."""
    return enter(Path(shutil.copytree(generated, tmp_path / "project")))


@pytest.fixture
def of_task(generated_of_task: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    """As `project`, of each task."""
    return enter(Path(shutil.copytree(generated_of_task, tmp_path / generated_of_task.name)))


@pytest.fixture
def run_in_project(project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """As `run`, in a generated project of one's own."""
    return runner(capsys)
