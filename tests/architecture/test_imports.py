"""The order of imports: a stage knows nothing of the stages after it.

The folders of ``dsa_hw`` are the chain of ``docs/how-it-works.md``. Each may import itself and what
stands before it in ``ORDER``; the imports are read from the source, those inside of functions too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsa_hw
import profilers

ROOT = Path(dsa_hw.__file__).parent
PROFILERS = Path(profilers.__file__).parent
ORDER = (
    "errors",
    "runs",  # options, folder, processes and console of any command
    "data",
    "models",
    "network",  # 1
    "cost",  # 2
    "worth",  # 3
    "search",  # 4
    "allocation",  # 5
    "surgery",  # 6
    "deployment",  # 7
    "training",
    "reports",
    "pipeline",  # the stages in a row
    "comparison",
)
VERBS = ("profile", "prune", "compare", "validate", "report")


def is_for_types(node: ast.AST) -> bool:
    """Whether it is ``if TYPE_CHECKING:``, whose imports never happen.

    The registries of ``runs`` name the types of their entries so, and know them by name alone.
    """
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it that run."""
    if not is_for_types(node):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from nodes_of(child)


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that the file at ``path`` imports, wherever in it."""
    for node in nodes_of(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""
            if node.module == "dsa_hw":
                yield from (f"dsa_hw.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def stage_of(module: str) -> str | None:
    """The part of ``dsa_hw`` that a module belongs to; None for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "dsa_hw" and len(parts) > 1 else None


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_imports_only_what_stands_before_it(stage: str) -> None:
    folder = ROOT / stage
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files, f"there is no {stage}"
    allowed = set(ORDER[: ORDER.index(stage) + 1])
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported_modules(path)
        if (other := stage_of(module)) is not None and other not in allowed
    ]
    assert wrong == []


def test_the_listing_of_the_package_is_the_chain() -> None:
    names = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert names - {"__init__", "__main__"} == {*ORDER, *VERBS}


def test_profilers_know_nothing_of_pruning() -> None:
    for path in sorted(PROFILERS.rglob("*.py")):
        assert not [m for m in imported_modules(path) if m.split(".")[0] == "dsa_hw"], path


LONG = {
    "run.py": 476,
    "pruner.py": 624,
    "table.py": 422,
    "compare_report.py": 520,
    "run_report.py": 483,
}
"""Files that hold more than one noun still, and how long they may be: they only get shorter."""


@pytest.mark.parametrize(
    "path", [*ROOT.rglob("*.py"), *PROFILERS.rglob("*.py")], ids=lambda path: path.name
)
def test_a_file_holds_one_noun(path: Path) -> None:
    # 450 lines are a long file already; a longer one has a second noun in it.
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONG.get(path.name, 450)
