"""Command line and YAML -> configuration; errors -> one message and exit code 2."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
import itertools
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from dsa_hw.errors import UserError
from dsa_hw.runs.config import SCRIPT
from dsa_hw.runs.option_types import GONE, check_options
from dsa_hw.runs.yaml_files import read_mapping

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
        The exit code: 0, 2 for an error of the user's (a full disk and missing permissions among
        them), 130 after Ctrl-C, 141 where whoever read the output has gone.
    """
    from profilers.errors import ProfilerError

    try:
        config = parse(name, config_class, argv)
        code = run(config) or 0
        sys.stdout.flush()  # a reader that has gone, or a full disk, is met here and not at exit
        return code
    except (UserError, ProfilerError) as error:
        _say(f"{name}: {error}")
        return 2
    except KeyboardInterrupt:
        _say(f"\n{name}: interrupted; the same command again goes on from here")
        return 130
    except BrokenPipeError:
        _forget_output()
        return 141
    except OSError as error:
        _say(f"{name}: {_refusal(error)}")
        _forget_output()
        return 2
    except Exception:  # not the user's to mend: raised on, once the main process has spoken
        _hold()
        raise


def _say(message: str) -> None:
    """Print it in the main process of a run; the others leave it to that one."""
    _hold()
    if _is_main():
        try:
            print(message, file=sys.stderr, flush=True)
        except OSError:  # nobody can be told: the exit code has to say it
            _forget_output()


def _refusal(error: OSError) -> str:
    """What the operating system refused, which file it was, and what can be done."""
    file = f": {error.filename}" if error.filename is not None else ""
    steps = {
        errno.ENOSPC: "free some space; the same command then goes on from what is kept",
        errno.EDQUOT: "free some space; the same command then goes on from what is kept",
        errno.EACCES: "it may belong to another user: name a place of your own (--out, --table)",
        errno.EPERM: "it may belong to another user: name a place of your own (--out, --table)",
        errno.EROFS: "name a place that can be written (--out, --table)",
    }
    step = steps.get(error.errno or 0)
    return f"{error.strerror or error}{file}" + (f" ({step})" if step else "")


def _forget_output() -> None:
    """Let Python end without writing what cannot be written any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
    words = list(sys.argv[1:] if argv is None else argv)
    for path in _config_files(words):
        check_options(read_mapping(path), config_class)
    parser = _parser(name, config_class)
    try:
        found = parser.parse_args(words)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_explain(str(error), config_class, words)) from None
    values = {f.name: found[f.name] for f in options_of(config_class)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    check_options(values, config_class)
    return config_class(**values)


def _config_files(words: Sequence[str]) -> list[Path]:
    """The YAML files that the arguments name."""
    named = [after for word, after in itertools.pairwise(words) if word == "--config"]
    named += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return [Path(name) for name in named]


def to_yaml(config: Any) -> str:
    """The whole configuration, fully resolved, in the form ``--config`` reads."""
    values = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(values, sort_keys=False)


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


def _explain(message: str, config_class: type, words: Sequence[str]) -> str:
    """A parser's message in one line, with the nearest known option for an unknown one."""
    known = [f.name for f in options_of(config_class)]
    unknown = re.search(r"(?:Option|Key) '([^']+)' is not accepted", message)
    if unknown is None:  # jsonargparse up to 4.46 writes it with a capital
        unknown = re.search(r"unrecognized arguments: -*([^ =]+)", message, re.IGNORECASE)
    if unknown is not None:
        key = unknown[1]
        if key in GONE:
            return f"{key} is gone: {GONE[key]}"
        near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
        hint = (
            f"did you mean {near[0].replace('_', '-')}?" if near else f"known: {', '.join(known)}"
        )
        return f"unknown option {key}{_value_of(key, words)}; {hint}"
    return " ".join(message.split())


def _value_of(key: str, words: Sequence[str]) -> str:
    """`` (value: ...)`` of an option as the command line has it; nothing without one."""
    for word, after in itertools.pairwise(words):
        if word.lstrip("-") == key:
            return f" (value: {after!r:.200})"
    return ""
