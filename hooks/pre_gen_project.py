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

LONGEST = {"project_name": 100, "project_slug": 64, "description": 300, "author_name": 100}
MAY_BE_EMPTY = {"description"}
# Cookiecutter itself refuses other answers to these.
CHOICES = ("license", "task", "ci")

# For what has nothing in it that could be kept.
INSTEAD = {"project_name": "My Project", "project_slug": "my-project", "description": "", "author_name": "Your Name"}

# The slug names a folder on every system and the project in pyproject.toml (PEP 508).
SLUG = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}

# A project named like one of its own dependencies cannot be installed.
DEPENDENCIES = {
    "docstring-parser",
    "jsonargparse",
    "mypy",
    "numpy",
    "matplotlib",
    "pillow",
    "pytest",
    "pyyaml",
    "rich",
    "ruff",
    "tensorboard",
    "torch",
    "torchmetrics",
    "torchvision",
}

# Control characters, lone surrogates, line and paragraph separators do harm in terminals, TOML and Markdown.
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
# These reorder the text around them, in the reader's editor too.
REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def text_fault(key: str, value: str) -> str | None:
    """Return what is wrong with a free-text answer, or None."""
    if not value.strip() and key not in MAY_BE_EMPTY:
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
    if key != "project_slug":
        text = "".join(" " if text_fault("description", letter) else letter for letter in value)
        return " ".join(text.split())[: LONGEST[key]].strip() or INSTEAD[key]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("._-")[: LONGEST[key] - len("-project")].strip("._-")
    return slug if slug and not slug_fault(slug) else f"{slug.split('.')[0]}-project" if slug else INSTEAD[key]


def find_faults(answers: dict[str, str]) -> list[str]:
    """Say what is wrong with the answers and what to do about it.

    Args:
        answers: Every answer by the name of its question. Choices are checked by cookiecutter.

    Returns:
        One line for each faulty answer (what was given, what is allowed), then how to go on. Empty when all
        is well.
    """
    faults = {}
    for key in LONGEST:
        fault = slug_fault(answers[key]) if key == "project_slug" else text_fault(key, answers[key])
        if fault:
            faults[key] = f"error: {key} is {answers[key]!r}: {fault}."
    if not faults:
        return []
    given = {key: corrected(key, answers[key]) if key in faults else answers[key] for key in (*LONGEST, *CHOICES)}
    template = answers.get("_template", "gh:org/cookiecutter-torch-trainer")
    command = ["cookiecutter", template, "--no-input", *(f"{key}={value}" for key, value in given.items())]
    return [*faults.values(), f"Nothing was generated. This would be, with answers that can: {shlex.join(command)}"]


def main() -> int:
    """Report all faults at once and return the exit status."""
    faults = find_faults(json.loads(r"""{{ cookiecutter | tojson }}"""))
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
