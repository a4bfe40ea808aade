"""Jinja filters that the template needs beyond those of cookiecutter."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
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
    command = _command([*hook.LONGEST, *hook.CHOICES])
    faults = hook.find_faults(answers, command)
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
        if "--extra-context" in command[-1:]:
            sys.exit(1)  # cruft would show a traceback
        raise FailedHookException(f"{len(faults) - 1} of the answers cannot be used.")
    return "yes"


def _command(questions: list[str]) -> list[str]:
    """The words of this process up to the answers, if it is cookiecutter's or cruft's; they are asked for no more."""
    program, words = Path(sys.argv[0]), sys.argv[1:]
    as_module = program.name == "__main__.py"
    name = program.parent.name if as_module else program.stem
    start = [_called(sys.executable), "-m", name] if as_module else [_called(sys.argv[0])]
    if name == "cookiecutter":
        kept = [word for word in words if "=" not in word or word.partition("=")[0] not in questions]
        return [*start, "--no-input", *(word for word in kept if word != "--no-input")]
    if name == "cruft" and words[:1] == ["create"]:
        return [*start, *_without_answers(words), "--no-input", "--extra-context"]
    return []


def _called(program: str) -> str:
    """A program's name where that finds it, otherwise its path."""
    name = Path(program).name
    # The path itself, not what it links to: the Python of a virtual environment is a link to another one.
    found = shutil.which(name)
    return name if found is not None and os.path.abspath(found) == os.path.abspath(program) else program


def _without_answers(words: list[str]) -> list[str]:
    """The words of `cruft create`, without its answers and the option that does not ask for them."""
    options, kept, left = ("--extra-context", "--extra-context-file", "-E"), [], iter(words)
    for word in left:
        if word in options:
            next(left, None)
        elif word.partition("=")[0] not in (*options, "--no-input", "-y"):
            kept.append(word)
    return kept


@simple_filter
def markdown(answer: str) -> str:
    """Escape what is special to Markdown and HTML, as entities; a name such as My_Project stays readable.

    Args:
        answer: One line of text, for a heading or a paragraph of its own.

    Returns:
        The text, which a page shows as it was given.
    """
    special = {"&": "&amp;", "<": "&lt;"} | {character: f"&#{ord(character)};" for character in r"`~*[\|"}
    text = "".join(special.get(character, character) for character in answer)
    # At the end of a heading a # is none of its text; at the start of a line one opens a heading, and others a list,
    # a quotation, a rule or code; between letters a _ stands for itself.
    for pattern in (r"^[#=>+ -]", r"#$", r"(?<![^\W_])_", r"_(?![^\W_])"):
        text = re.sub(pattern, lambda found: f"&#{ord(found[0])};", text)
    return re.sub(r"^([0-9]+)([.)])", lambda found: f"{found[1]}&#{ord(found[2])};", text)


@simple_filter
def bibtex(answer: str) -> str:
    """Escape what is special to TeX; braces, which BibTeX counts even where they are escaped, become brackets."""
    special = {character: f"\\{character}" for character in "&%$#_"}
    special |= {"{": "(", "}": ")", "\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
    return "".join(special.get(character, character) for character in answer)
