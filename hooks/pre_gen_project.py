"""Check every answer before the first file is written.

`check_answers` in local_extensions.py asks for the faults right after the last question, before there is a
folder. Cookiecutter also runs this file as a hook, inside the new folder, which it removes when the exit
status is not 0: that is what checks answers that are replayed rather than asked. Standard library only.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

LONGEST = {"project_name": 100, "project_slug": 64, "description": 300, "author_name": 100}
MAY_BE_EMPTY = {"description"}
# Those of cookiecutter.json, which cookiecutter itself holds to unless answers are replayed.
CHOICES = {
    "license": ["MIT", "Apache-2.0", "BSD-3-Clause", "Proprietary"],
    "task": ["image_classification", "tabular_regression", "language_model"],
    "ci": ["GitHub", "GitLab", "none"],
}

# For what has nothing in it that could be kept.
INSTEAD = {"project_name": "My Project", "project_slug": "my-project", "description": "", "author_name": "Your Name"}

# The slug names a folder on every system and the project in pyproject.toml (PEP 508).
SLUG = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}

# A project named like something that is installed with it cannot be installed.
DEPENDENCIES = set(
    """
    docstring-parser jsonargparse matplotlib mypy numpy onnx onnxruntime onnxscript pillow pip pytest pyyaml rich ruff
    setuptools tensorboard torch torchmetrics torchvision uv
    absl-py ast-serialize colorama contourpy cycler filelock flatbuffers fonttools fsspec grpcio iniconfig jinja2
    kiwisolver librt lightning-utilities markdown markdown-it-py markupsafe mdurl ml-dtypes mpmath mypy-extensions
    networkx onnx-ir packaging pathspec pluggy protobuf pygments pyparsing python-dateutil six sympy
    tensorboard-data-server triton typeshed-client typing-extensions tzdata werkzeug
    """.split()
)
# Letters, and the like, that nobody can see.
INVISIBLE = "\u115f\u1160\u2800\u3164\uffa0"
# What a project is made of. Where one of these lies there is one already, or something else of the user's. README.md,
# LICENSE and .gitignore are not among them: a repository that was made on a server has them, and nothing else.
PARTS = [".github", ".gitlab-ci.yml", "Makefile", "configs", "data", "engine", "main.py", "model", "pyproject.toml"]
PARTS += ["slurm.sh", "tasks", "tests", "utils"]

# Control characters, lone surrogates, line and paragraph separators do harm in terminals, TOML and Markdown.
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
# These reorder the text around them, in the reader's editor too.
REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def text_fault(key: str, value: str) -> str | None:
    """Return what is wrong with a free-text answer, or None."""
    seen = any(unicodedata.category(letter)[0] in "LNPS" and letter not in INVISIBLE for letter in value)
    if not seen and key not in MAY_BE_EMPTY:
        return "at least one visible character is needed"
    if len(value) > LONGEST[key]:
        return f"it has {len(value)} characters, at most {LONGEST[key]} are allowed"
    for character in value:
        if unicodedata.category(character) in UNPRINTABLE or unicodedata.bidirectional(character) in REORDERING:
            return f"the character U+{ord(character):04X} is not allowed, only one line of printable text is"
    return None


def slug_fault(slug: str) -> str | None:
    """Return what is wrong with the slug, or None."""
    if not SLUG.fullmatch(slug) or len(slug) > LONGEST["project_slug"]:
        return (
            f"allowed are 1 to {LONGEST['project_slug']} of A-Z a-z 0-9 . _ - "
            "that begin and end with a letter or a digit"
        )
    if slug.split(".")[0].lower() in WINDOWS_DEVICES:
        return "Windows reserves this name for a device, any other is allowed"
    if re.sub(r"[-_.]+", "-", slug).lower() in DEPENDENCIES:
        return "the project depends on a package of that name, any other is allowed"
    return None


def corrected(key: str, value: str) -> str:
    """An answer that is allowed, as near to a faulty one as can be."""
    if key in CHOICES:
        return CHOICES[key][0]
    if key != "project_slug":
        text = "".join(" " if text_fault("description", letter) else letter for letter in value)
        text = " ".join(text.split())[: LONGEST[key]].strip()
        return INSTEAD[key] if text_fault(key, text) else text
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("._-")[: LONGEST[key] - len("-project")].strip("._-")
    return slug if slug and not slug_fault(slug) else f"{slug.split('.')[0]}-project" if slug else INSTEAD[key]


def fault_of(key: str, value: str) -> str | None:
    """Return what is wrong with an answer, or None."""
    if key in CHOICES:
        return None if value in CHOICES[key] else f"allowed are {', '.join(CHOICES[key])}"
    return slug_fault(value) if key == "project_slug" else text_fault(key, value)


def find_faults(answers: dict[str, str], command: Sequence[str] = ()) -> list[str]:
    """Say what is wrong with the answers and what to do about it.

    Args:
        answers: Every answer by the name of its question.
        command: What starts cookiecutter, up to the answers, or cruft, up to those in JSON behind --extra-context;
            empty where something else has started it.

    Returns:
        One line for each faulty answer (what was given, what is allowed), then how to go on. Empty when all
        is well.
    """
    keys = (*LONGEST, *CHOICES)
    faults = {key: fault for key in keys if (fault := fault_of(key, answers[key]))}
    if not faults:
        return []
    told = [f"error: {key} is {shortened(answers[key])}: {fault}." for key, fault in faults.items()]
    given = {key: corrected(key, answers[key]) if key in faults else answers[key] for key in keys}
    if not command:
        return [
            *told,
            f"Nothing was generated. It would be with these answers: {json.dumps(given, ensure_ascii=False)}",
        ]
    pairs = [f"{key}={value}" for key, value in given.items()]
    words = [json.dumps(given, ensure_ascii=False)] if command[-1] == "--extra-context" else pairs
    return [*told, f"Nothing was generated. This would be, with answers that can: {shlex.join([*command, *words])}"]


def shortened(value: str, most: int = 80) -> str:
    """An answer as it is shown in a line."""
    return repr(value) if len(value) <= most else f"{value[:most]!r}... ({len(value)} characters)"


def replay(answers: dict[str, str]) -> list[str]:
    """The command that does again what brought these answers, up to the answers."""
    command = ["cookiecutter", "--no-input", answers["_template"]]
    command += ["--checkout", answers["_checkout"]] if answers.get("_checkout") else []
    return [*command, "--output-dir", answers["_output_dir"]] if answers.get("_output_dir") else command


def left_behind(answers: dict[str, str]) -> Path | None:
    """The empty folder that cookiecutter leaves where a slug has several parts: of `a/b` it removes `b` alone."""
    output, project = Path(answers.get("_output_dir") or ".").resolve(), Path.cwd()
    for folder in reversed((output / answers["project_slug"]).parents):
        if output.is_relative_to(folder.resolve()):
            continue
        return None if any(not project.is_relative_to(path) for path in folder.resolve().rglob("*")) else folder
    return None


def main() -> int:
    """Report all faults at once and return the exit status."""
    answers = json.loads(r"""{{ cookiecutter | tojson }}""")
    faults = find_faults(answers, replay(answers))
    if faults and (folder := left_behind(answers)):
        faults.append(f"The empty folder {folder} is left: remove it.")
    if not faults and (there := [name for name in PARTS if Path(name).exists()]):
        faults = [
            f"error: {Path.cwd()} has {', '.join(there)} already: they, or files in them, would be overwritten or "
            "removed; give another project_slug or --output-dir. A newer version of the template: `cruft update`; "
            "where the project was made without cruft, `cruft link` comes first, to the commit that it was made with."
        ]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
