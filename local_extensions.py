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
    faults = hook.find_faults(answers)
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
        raise FailedHookException(f"{len(faults) - 1} of the answers cannot be used.")
    return "yes"
