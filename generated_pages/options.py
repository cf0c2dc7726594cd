"""The reference of options, from the configurations that the commands parse."""

from __future__ import annotations

import typing
from types import UnionType
from typing import Any

from dsa_hw.runs.config import COMMANDS
from dsa_hw.runs.options import element_of, option_groups, option_name

HEAD = """# Options

`dsa-hw VERB --option value` and `python -m dsa_hw.VERB --option value` are the same command. Every
option can stand in a YAML file as well (`--config FILE.yaml`, with `_` or `-` between words); what
the command line says goes before the file. An option that is true or false says true by itself.
`--print-config` prints what a command would use.
"""


def page() -> str:
    """All verbs, with a table for each group of their options."""
    parts = [HEAD]
    seen: set[str] = set()
    for verb, config_class in COMMANDS.items():
        parts.append(f"\n## {verb}\n\n{config_class.__doc__}\n")
        hints = typing.get_type_hints(config_class)
        for heading, options in option_groups(config_class):
            common = heading in seen
            seen.add(heading)
            if common:
                parts.append(f'\n??? note "{heading} (as above)"\n\n')
            else:
                parts.append(f"\n### {heading}\n\n")
            lines = ["| option | takes | default | what it says |", "| --- | --- | --- | --- |"]
            lines += [_row(option, hints[option.name]) for option in options]
            indent = "    " if common else ""
            parts.append("".join(f"{indent}{line}\n" for line in lines))
    return "".join(parts)


def _row(option: Any, hint: Any) -> str:
    name = option.name.upper() if option.metadata["positional"] else option_name(option)
    cells = [f"`{name}`", _takes(hint), _default(option.default), option.metadata["help"]]
    cells = [cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells]
    return f"| {' | '.join(cells)} |"


def _takes(hint: Any) -> str:
    element = element_of(hint)
    if element is not None:
        return f"one or more: {_takes(element)}"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (UnionType, typing.Union):
        return ", ".join(_takes(part) for part in typing.get_args(hint) if part is not type(None))
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return names.get(hint, str(hint))


def _default(value: Any) -> str:
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, tuple):
        return " ".join(f"`{part}`" for part in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
