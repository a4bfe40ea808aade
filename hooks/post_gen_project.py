"""Remove what does not belong into a new project, and say which commands come next. Standard library only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def remove_caches() -> None:
    """Remove caches of tools that were run inside the template: cookiecutter copies whatever lies there."""
    for name in ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"):
        for folder in list(Path().rglob(name)):
            shutil.rmtree(folder)


def main() -> None:
    """Tidy up, then print the first commands of the new project."""
    remove_caches()
    answers = json.loads(r"""{{ cookiecutter | tojson }}""")
    print(
        "",
        "Your project is ready. Next (make first installs what is needed into .venv):",
        "",
        f"  cd {answers['project_slug']}",
        "  make train    # trains the example net on real digits",
        "  make test     # checks every net and dataset",
        "",
        "README.md tells how to add your own net and data.",
        "",
        sep="\n",
    )


if __name__ == "__main__":
    main()
