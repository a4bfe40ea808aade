"""Types of flags: which there can be, and how help and messages show them."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

PLAIN = (int, float, str, bool, type(None))


def is_list(hint: Any) -> bool:
    """Whether a value is given as a list."""
    return get_origin(hint) in (list, tuple) or any(get_origin(part) in (list, tuple) for part in get_args(hint))


def is_plain(hint: Any) -> bool:
    """Whether a type is built of numbers, strings, booleans and containers of them: no class, no callable."""
    if get_origin(hint) is Literal or hint in PLAIN:
        return True
    inner = [part for part in get_args(hint) if part is not Ellipsis and not (get_origin(hint) is dict and part is Any)]
    return get_origin(hint) in (Union, types.UnionType, list, tuple, dict) and all(map(is_plain, inner))


def without_any(hint: Any) -> Any:
    """The same type with bare dicts: of a class that is named in a dict of Any, jsonargparse imports the module."""
    parts = get_args(hint)
    if get_origin(hint) is dict and Any in parts:
        return dict
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(without_any, parts))]  # noqa: UP007
    return get_origin(hint)[tuple(map(without_any, parts))] if get_origin(hint) in (list, tuple, dict) else hint


def metavar(hint: Any) -> str:
    """How help shows a value of a type."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "|".join(map(str, parts))
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(dict.fromkeys(map(metavar, parts)))
    if get_origin(hint) in (list, tuple):
        return f"{metavar(parts[0])} ..."
    names: dict[Any, str] = {int: "N", float: "X", str: "TEXT", bool: "true|false", dict: "{...}"}
    return names[get_origin(hint) or hint]


def spell(hint: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return ", ".join(map(str, parts))
    if kind in (Union, types.UnionType):
        return " or ".join(spell(part) for part in parts if part is not int or float not in parts)
    if kind in (list, tuple):
        example = {int: "1, 2, 3", float: "0.1, 0.2, 0.3"}.get(parts[0], "a, b, c")
        return f"a list such as [{example}]"
    if dict in (hint, kind):
        return f"a mapping such as {{a: {0.1 if float in parts else 1}}}"
    return words[hint]
