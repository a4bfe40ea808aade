"""Say which commands come next. Standard library only; the project is complete before this runs."""

from __future__ import annotations

import json


def main() -> None:
    """Print the first commands of the new project."""
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
        sep="\n",
    )


if __name__ == "__main__":
    main()
