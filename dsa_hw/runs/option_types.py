"""What the options of a configuration may be, and what is said of a value that is none of it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any

from dsa_hw.errors import UserError

PLAIN = {
    int: "a whole number", float: "a finite number", str: "text", bool: "true or false",
    NoneType: "nothing (null)",
}  # fmt: skip


GONE: Mapping[str, str] = MappingProxyType(
    {
        "combination": "layers that share channels have the mean of their importances now; leave "
        "it out",
    }
)
"""Options that configurations of earlier versions may hold, and what to do about them."""


def check_options(values: Mapping[str, Any], config_class: type) -> None:
    """See that ``values`` are options of ``config_class``, as a YAML file or a command gives them.

    Raises:
        UserError: an unknown option or a value of the wrong type; names it and what was expected.
    """
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    for name, value in values.items():
        known = name.replace("-", "_")
        if known in GONE:
            raise UserError(f"{known} is gone: {GONE[known]}")
        if known not in names:
            near = difflib.get_close_matches(known, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise UserError(f"unknown option {name} (value: {value!r:.200}); {hint}")
        if not _fits(value, hints[known]):
            raise UserError(
                f"{known.replace('_', '-')} is {value!r:.200}; expected {_expected(hints[known])}"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        return any(_fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(v, arguments[0]) for v in value)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is float:
        return _is_finite(value)
    return isinstance(value, hint)


def _is_finite(value: Any) -> bool:
    """Whether it is a number; YAML reads 5e-4, which has no point, as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        return " or ".join(_expected(each) for each in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list of which each is {_expected(arguments[0])}"
    return PLAIN[hint]
