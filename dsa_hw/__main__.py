"""``dsa-hw VERB ...``: all commands behind one name, also as ``python -m dsa_hw VERB ...``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import dsa_hw
from dsa_hw.runs.config import COMMANDS, COMPLETION, SCRIPT, SHELLS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that the first word names with the words after it; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        _find_factories()
        return importlib.import_module(f"dsa_hw.{words[0]}").main(words[1:])
    if words and words[0] == COMPLETION:
        return _print_completion(words[1:])
    if words and not words[0].startswith("-"):
        return _refuse(words[0])
    parser = _parser()
    parser.parse_args(words)
    parser.print_help(sys.stderr)
    return 2


def _find_factories() -> None:
    """Let ``package.module:factory`` be found in the working folder, as ``python -m`` does.

    At the end of the path: a file ``numpy.py`` in that folder must not be taken for the package.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=SCRIPT,
        description=(dsa_hw.__doc__ or "").splitlines()[0],
        epilog=f"{SCRIPT} VERB --help lists a verb's options. "
        "python -m dsa_hw.VERB is the same command.",
    )
    parser.add_argument("--version", action="version", version=f"{SCRIPT} {dsa_hw.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for name, config_class in COMMANDS.items():
        verbs.add_parser(name, help=config_class.__doc__, add_help=False)
    verbs.add_parser(COMPLETION, help="Print what makes a shell complete options.", add_help=False)
    return parser


def _refuse(word: str) -> int:
    known = [*COMMANDS, COMPLETION]
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    print(f"{SCRIPT}: unknown verb {word!r}; {hint}", file=sys.stderr)
    return 2


def _print_completion(words: Sequence[str]) -> int:
    from dsa_hw.runs.completion import completion_script

    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT} {COMPLETION}",
        description="Print what makes a shell complete verbs, options and values.",
        epilog=f'For this shell: eval "$({SCRIPT} {COMPLETION} bash)". '
        "The same line in ~/.bashrc keeps it.",
    )
    parser.add_argument("shell", choices=SHELLS)
    print(completion_script(SCRIPT, parser.parse_args(words).shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
