"""Jinja filters that the template needs beyond those of cookiecutter."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from cookiecutter.exceptions import FailedHookException
from cookiecutter.utils import simple_filter

HOOK = Path(__file__).parent / "hooks" / "pre_gen_project.py"


@simple_filter
def toml(answer: str) -> str:
    """Escape an answer for use between the double quotes of a TOML basic string.

    JSON and TOML share their escapes, with one difference: TOML also forbids a bare DEL character.

    Args:
        answer: Any text.

    Returns:
        The escaped text, without the quotes around it.
    """
    return json.dumps(answer, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007F")


@simple_filter
def check_answers(answers: dict[str, str]) -> str:
    """Refuse faulty answers before cookiecutter makes a folder.

    The pre_gen_project hook makes the same checks, but too late to be tidy: cookiecutter adds a traceback to
    what the hook says, and for the slug `a/b` it removes only `b` of the two folders that it has made.

    Args:
        answers: All answers given so far, by the name of their question.

    Returns:
        "yes".

    Raises:
        FailedHookException: An answer is faulty; cookiecutter shows the message and exits with status 1.
    """
    spec = importlib.util.spec_from_file_location("pre_gen_project", HOOK)
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    faults = hook.find_faults(answers, _command([*hook.LONGEST, *hook.CHOICES]))
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
        raise FailedHookException(f"{len(faults) - 1} of the answers cannot be used.")
    return "yes"


def _command(questions: list[str]) -> list[str]:
    """The words of this process up to the answers, if it is cookiecutter's; they are asked for no more."""
    program = Path(sys.argv[0])
    if program.parts[-2:] == ("cookiecutter", "__main__.py"):
        start = ["python", "-m", "cookiecutter"]
    elif program.stem == "cookiecutter":
        start = ["cookiecutter"]
    else:
        return []
    words = [word for word in sys.argv[1:] if word != "--no-input" and word.partition("=")[0] not in questions]
    return [*start, "--no-input", *words]


@simple_filter
def markdown(answer: str) -> str:
    """Escape what opens HTML, such as a comment that would hide the rest of a page."""
    return answer.replace("&", "&amp;").replace("<", "&lt;")


@simple_filter
def bibtex(answer: str) -> str:
    """Escape what is special to TeX; braces, which BibTeX counts even where they are escaped, become brackets."""
    special = {character: f"\\{character}" for character in "&%$#_"}
    special |= {"{": "(", "}": ")", "\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
    return "".join(special.get(character, character) for character in answer)
