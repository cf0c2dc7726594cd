"""Options in YAML files, read as data and told apart from everything else that YAML can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dsa_hw.errors import UserError

MOST_BYTES = 1_000_000
"""A configuration has some 2,000 bytes; what is larger than this is something else."""


def read_mapping(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by name.

    Raises:
        UserError: no such file, not YAML, or no options in it; says which, and what was expected.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path} is larger than {MOST_BYTES:,} bytes; expected options in YAML")
        loaded = yaml.safe_load(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join((str(error) or type(error).__name__).split())
        raise UserError(
            f"{path} is not YAML ({said:.300}); expected lines `option: value`"
        ) from None
    if not isinstance(loaded, dict):
        holds = "nothing" if loaded is None else f"{loaded!r:.60}"
        raise UserError(f"{path} holds {holds}; expected lines `option: value`")
    for name in loaded:
        if not isinstance(name, str):
            raise UserError(f"{path}: {name!r:.60} is not the name of an option")
    return loaded
