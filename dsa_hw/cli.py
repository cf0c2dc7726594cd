"""Command line and YAML -> configuration; errors -> one message and exit code 2."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from dsa_hw.config import GONE, SCRIPT
from dsa_hw.errors import UserError

Config = TypeVar("Config")

HOLD_S = 10.0
"""A launcher ends all processes of a run when one ends: the main one gets so long to speak."""


def run_command(
    name: str,
    config_class: type[Config],
    run: Callable[[Config], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn errors a user can cause into a message and exit code 2.

    Args:
        name: of the verb.
        config_class: a frozen dataclass whose fields carry ``metadata["help"]``.

    Returns:
        The exit code: 0, 2 for an error of the user's, 130 after Ctrl-C.
    """
    from profilers.errors import ProfilerError

    try:
        config = parse(name, config_class, argv)
        return run(config) or 0
    except (UserError, ProfilerError) as error:
        _say(f"{name}: {error}")
        return 2
    except KeyboardInterrupt:
        _say(f"\n{name}: interrupted; the same command again goes on from here")
        return 130
    except Exception:  # not the user's to mend: raised on, once the main process has spoken
        _hold()
        raise


def _say(message: str) -> None:
    """Print it in the main process of a run; the others leave it to that one."""
    _hold()
    if _is_main():
        print(message, file=sys.stderr, flush=True)


def _hold() -> None:
    """Give the main process time to speak first: what fails elsewhere may have failed with it."""
    if not _is_main():
        time.sleep(HOLD_S)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def parse(name: str, config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The configuration that the arguments (and the YAML they name) describe.

    Raises:
        UserError: an unknown key or a wrong value; names it and what was expected.
    """
    parser = _parser(name, config_class)
    try:
        found = parser.parse_args(None if argv is None else list(argv))
    except ArgumentError as error:
        raise UserError(_explain(str(error), config_class, argv)) from None
    values = {f.name: found[f.name] for f in options_of(config_class)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return config_class(**values)


def to_yaml(config: Any) -> str:
    """The whole configuration, fully resolved, in the form ``--config`` reads."""
    values = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(values, sort_keys=False)


def _fields(config_class: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(config_class)


def _parser(name: str, config_class: type) -> ArgumentParser:
    by_script = os.path.basename(sys.argv[0]) == SCRIPT
    prog = f"{SCRIPT} {name}" if by_script else f"python -m dsa_hw.{name}"
    words = [o.name.upper() for o in options_of(config_class) if o.metadata["positional"]]
    parser = ArgumentParser(
        prog=prog,
        usage=" ".join([prog, *words, "[--option VALUE ...]"]),
        description=config_class.__doc__,
        exit_on_error=False,
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    hints = typing.get_type_hints(config_class)
    for title, options in option_groups(config_class):
        group = parser.add_argument_group(title)
        for option in options:
            settings = _settings(option, hints[option.name])
            if option.metadata["positional"]:
                settings.pop("default")
                parser.add_argument(option.name, **settings)
            else:
                group.add_argument(option_name(option), **settings)
    return parser


def _settings(option: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """What the parser needs to know of one option."""
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    settings: dict[str, Any] = {"help": option.metadata["help"], "default": default}
    element = element_of(hint)
    if element is not None:
        return settings | {"nargs": "+", "type": element}
    if hint is bool:  # --option alone says true
        return settings | {"type": hint, "nargs": "?", "const": True}
    return settings | {"type": hint}


def options_of(config_class: type) -> tuple[dataclasses.Field, ...]:
    """All options of a configuration."""
    return dataclasses.fields(config_class)


def option_name(option: dataclasses.Field) -> str:
    """An option as the command line spells it."""
    return f"--{option.name.replace('_', '-')}"


def option_groups(config_class: type) -> list[tuple[str, list[dataclasses.Field]]]:
    """The options with a title for each class that brings some, the command's own first."""
    options = {option.name: option for option in options_of(config_class)}
    groups: list[tuple[str, list[dataclasses.Field]]] = []
    for part in reversed(config_class.__mro__):
        names = [name for name in inspect.get_annotations(part) if name in options]
        if names:
            title = "This command's own options" if part is config_class else str(part.__doc__)
            groups.insert(0, (title, [options.pop(name) for name in names]))
    return groups


def element_of(hint: Any) -> Any:
    """The element type of ``tuple[X, ...]``, also when it is optional; None for anything else."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        return typing.get_args(hint)[0]
    if origin in (UnionType, typing.Union):
        found = [e for e in map(element_of, typing.get_args(hint)) if e is not None]
        return found[0] if found else None
    return None


def _explain(message: str, config_class: type, argv: Sequence[str] | None) -> str:
    """A parser's message in one line, with the nearest known option for an unknown one."""
    known = [f.name for f in options_of(config_class)]
    for name, reason in GONE.items():
        if re.search(rf"\b{name}\b|\b{name.replace('_', '-')}\b", message):
            return f"{name} is gone: {reason}"
    unknown = re.search(r"(?:Option|Key) '([^']+)' is not accepted", message)
    if unknown is None:  # jsonargparse up to 4.46 writes it with a capital
        unknown = re.search(r"unrecognized arguments: -*([^ =]+)", message, re.IGNORECASE)
    if unknown is not None:
        key = unknown[1]
        near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
        hint = (
            f"did you mean {near[0].replace('_', '-')}?" if near else f"known: {', '.join(known)}"
        )
        value = _value_of(key, argv)
        return f"unknown option {key}{value}; {hint}"
    return " ".join(message.split())


def _value_of(key: str, argv: Sequence[str] | None) -> str:
    """`` = value`` as the YAML file among the arguments has it; nothing if it came otherwise."""
    words = list(sys.argv[1:] if argv is None else argv)
    for index, word in enumerate(words):
        if word == "--config" and index + 1 < len(words):
            with open(words[index + 1], encoding="utf-8") as file:
                content = yaml.safe_load(file)
            if isinstance(content, dict) and key in content:
                return f" (value: {content[key]!r})"
        if word.lstrip("-") == key and index + 1 < len(words):
            return f" (value: {words[index + 1]!r})"
    return ""
