"""What ``pyproject.toml`` promises: all that is imported is declared, and no more is shipped."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONAL = {"timm", "sklearn", "tensorrt", "tensorrt_rtx", "torch_tensorrt"}
"""Imported where a user asks for them by name, and named in the error if they are missing."""


def imported() -> Iterator[tuple[str, Path]]:
    for package in ("dsa_hw", "profilers"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from ((alias.name, path) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    yield node.module or "", path


def test_every_import_is_a_declared_dependency() -> None:
    declared = {
        re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!\[(]", line)[0]).lower()
        for line in requires("dsa-hw") or []
        if "extra ==" not in line
    }
    homes = packages_distributions()
    missing = {}
    for module, path in imported():
        top = module.split(".")[0]
        if top in sys.stdlib_module_names | OPTIONAL | {"dsa_hw", "profilers"}:
            continue
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in homes.get(top, [])}
        if not names & declared:
            missing[top] = str(path.relative_to(ROOT))
    assert missing == {}
