"""Remove what was not asked for from a new project, and say which commands come next. Standard library only."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

PICTURES = ["model/torchvision_net.py", "data/torchvision_data.py", "data/folder_data.py", "configs/fashion_mnist.yaml"]
DIGITS = ["data/digits.npz", "data/digits.md"]
TABLES = ["model/mlp.py", "data/csv_data.py"]
# What a project does without, by an answer. What tasks have in its place lies in tasks/.
WITHOUT = {
    "image_classification": [],
    "tabular_regression": [*PICTURES, *DIGITS],
    "language_model": [*PICTURES, *DIGITS, *TABLES, "utils/augmentation.py"],
    "GitHub": [".gitlab-ci.yml"],
    "GitLab": [".github"],
    "none": [".gitlab-ci.yml", ".github"],
}
LEARNS = {
    "image_classification": "the example net on real digits",
    "tabular_regression": "the example net on a real table",
    "language_model": "the example net on a real text",
}


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def choose_files(answers: dict[str, str]) -> None:
    """Remove what the answers do without, and put the task's own files in their places."""
    for name in [*WITHOUT[answers["task"]], *WITHOUT[answers["ci"]]]:
        remove(Path(name))
    own = Path("tasks", answers["task"])
    for file in sorted(path for path in own.rglob("*") if path.is_file()):
        file.replace(file.relative_to(own))
    remove(Path("tasks"))


def remove_caches() -> None:
    """Remove caches of tools that were run inside the template: cookiecutter copies whatever lies there."""
    for name in ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"):
        for folder in list(Path().rglob(name)):
            shutil.rmtree(folder)


def main() -> None:
    """Tidy up, then print the first commands of the new project."""
    answers = json.loads(r"""{{ cookiecutter | tojson }}""")
    remove_caches()
    choose_files(answers)
    # As seen from where cookiecutter was started; the shell that did so tells where that was.
    begun = Path(os.environ.get("PWD", Path.cwd().parent))
    folder = Path.cwd().relative_to(begun) if Path.cwd().is_relative_to(begun) else Path.cwd()
    commands = {
        f"cd {shlex.quote(str(folder))}": "",
        "git init && git add . && git commit -m 'New project'": "so that every run notes its code",
        "make train": f"sets up .venv, then trains {LEARNS[answers['task']]}",
    }
    width = max(map(len, list(commands)[1:]))
    lines = [f"  {command:<{width}}  {'# ' if about else ''}{about}".rstrip() for command, about in commands.items()]
    print(
        "",
        "Your project is ready. Next:",
        "",
        *lines,
        "",
        "README.md tells how to add your own net and data.",
        sep="\n",
    )


if __name__ == "__main__":
    main()
