"""Generate a project for every combination of choices, put each through what its user does, and print a table.

    python tools/combinations.py

Projects whose Python is the same are alike in all that runs: the first of them is linted, type-checked, tested,
trained, resumed and asked for predictions, and the others are compared with it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml
from cookiecutter.main import cookiecutter
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TEMPLATE = "{{cookiecutter.project_slug}}"
SHORT = ["--limit_train_batches", "20", "--report", "false", "--enable_progress_bar", "false"]
# What its user does, in this order; each ends with exit code 0.
STEPS = {
    "lint": [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."]],
    "types": [["-m", "mypy"]],
    "tests": [["-m", "pytest", "-q"]],
    "train": [["main.py", "--max_epochs", "1", *SHORT]],
    "resume": [["main.py", "--max_epochs", "2", "--ckpt_path", "last", *SHORT]],
    "test": [["main.py", "test", "--ckpt_path", "best"]],
    "predict": [["main.py", "predict", "--ckpt_path", "best"]],
}


def choices(template: Path = ROOT) -> dict[str, list[str]]:
    """The questions that have a list of answers."""
    questions = json.loads((template / "cookiecutter.json").read_text(encoding="utf-8"))
    return {name: answers for name, answers in questions.items() if isinstance(answers, list) and name[0] != "_"}


def combinations(template: Path = ROOT) -> Iterator[dict[str, str]]:
    """Every combination of choices; the first is the default."""
    asked = choices(template)
    for answers in itertools.product(*asked.values()):
        yield dict(zip(asked, answers, strict=True))


def files_of(project: Path) -> Iterator[tuple[Path, str]]:
    """The files of a project that hold text, and their texts."""
    for path in sorted(path for path in project.rglob("*") if path.is_file() and path.suffix != ".npz"):
        yield path, path.read_text(encoding="utf-8")


def unrendered(project: Path) -> list[str]:
    """Files of a project in which Jinja is left."""
    # Python is not rendered, and free to use doubled braces in an f-string.
    return [
        f"{path.name}: Jinja is left"
        for path, text in files_of(project)
        if "cookiecutter." in text or (path.suffix != ".py" and re.search(r"\{\{|\{%", text))
    ]


def unparsed(project: Path) -> list[str]:
    """Files of a project that cannot be parsed, and why."""
    found = []
    for path, text in files_of(project):
        try:
            if path.suffix == ".toml":
                tomllib.loads(text)
            elif path.suffix in (".yaml", ".yml"):
                yaml.safe_load(text)
            elif path.suffix == ".json":
                json.loads(text)
            elif path.suffix == ".py":
                compile(text, str(path), "exec")
        except (ValueError, SyntaxError, yaml.YAMLError) as error:
            found.append(f"{path.name}: {error}")
    return found


def faults(project: Path) -> list[str]:
    """What is wrong with the files of a project: Jinja that is left, or a file that cannot be parsed."""
    return [*unrendered(project), *unparsed(project)]


def code_of(project: Path) -> str:
    """A checksum of all that runs."""
    total = hashlib.sha256()
    for path in sorted(project.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".csv", ".npz", ".yaml") and ".github" not in path.parts:
            total.update(path.relative_to(project).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def put_through(project: Path) -> dict[str, str]:
    """Run every step; returns seconds by step, or what went wrong."""
    results = {}
    # One thread is enough for nets this small.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for step, commands in STEPS.items():
        begin = time.monotonic()
        for command in commands:
            done = subprocess.run(
                [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                print(f"{step} of {project}:\n{(done.stdout + done.stderr)[-3000:]}", file=sys.stderr)
                results[step] = f"code {done.returncode}"
                break
        else:
            results[step] = f"{time.monotonic() - begin:.0f} s"
    return results


def main() -> int:
    """Print the table; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table, bad = Table(*choices(), "generated", *STEPS), False
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(f"cookiecutters_dir: '{folder}'\nreplay_dir: '{folder}'\n", encoding="utf-8")
        options = {"no_input": True, "config_file": str(config)}
        for number, answers in enumerate(combinations(), 1):
            output = Path(folder, str(number))
            project = Path(cookiecutter(str(ROOT), extra_context=answers, output_dir=str(output), **options))
            found = faults(project)
            first = seen.setdefault(code_of(project), number)
            results = put_through(project) if first == number else dict.fromkeys(STEPS, f"as {first}")
            bad |= bool(found) or any(result.startswith("code") for result in results.values())
            table.add_row(*answers.values(), "; ".join(found) or "ok", *results.values())
            print(f"{number}: {', '.join(answers.values())}", file=sys.stderr, flush=True)
    Console(width=160).print(table)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
