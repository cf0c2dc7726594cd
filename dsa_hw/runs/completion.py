"""Shell completion of the console script: verbs, options, values of a fixed set, and paths."""

from __future__ import annotations

import argparse
import typing
from typing import Any

import shtab

from dsa_hw.runs.config import COMMANDS, COMPLETION, SHELLS
from dsa_hw.runs.options import element_of, option_name, options_of

PATHS = {"file": shtab.FILE, "folder": shtab.DIRECTORY}


def completion_script(script: str, shell: str) -> str:
    """The text that ``shell`` (bash or zsh) has to evaluate to complete ``script``."""
    parser = argparse.ArgumentParser(prog=script)
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers()
    for name, config_class in COMMANDS.items():
        _add_options(verbs.add_parser(name, help=config_class.__doc__), config_class)
    shells = verbs.add_parser(COMPLETION, help="print what makes a shell complete options")
    shells.add_argument("shell", choices=SHELLS)
    return shtab.complete(parser, shell)


def _add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """The options of one verb as shtab reads them; their types are left to the verb itself."""
    configuration: Any = parser.add_argument("--config", help="YAML file with any of these options")
    configuration.complete = shtab.FILE
    hints = typing.get_type_hints(config_class)
    for option in options_of(config_class):
        hint, element = hints[option.name], element_of(hints[option.name])
        settings: dict[str, Any] = {
            "help": option.metadata["help"].replace("%", "%%"),
            "choices": list(option.metadata["known"]) or _choices(element or hint),
        }
        if element is not None:
            settings["nargs"] = "+"
        elif hint is bool:
            settings["nargs"] = "?"
        word = option.name if option.metadata["positional"] else option_name(option)
        action: Any = parser.add_argument(word, **settings)
        if option.metadata["path"] is not None:
            action.complete = PATHS[option.metadata["path"]]


def _choices(hint: Any) -> list[str] | None:
    """The values of a type that allows only some; None for all others."""
    if hint is bool:
        return ["true", "false"]
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    return None
