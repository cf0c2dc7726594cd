"""What every benchmark shares: arguments, provenance, the table and the closing line of JSON."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """How a benchmark was called."""

    quick: bool
    out: Path
    models: tuple[str, ...] = ()


def parse(
    name: str,
    description: str | None,
    argv: Sequence[str] | None = None,
    models: Sequence[str] = (),
) -> Options:
    """``--quick`` and ``--out``; where there are ``models`` to choose from, ``--models``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller sample, in 5 minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.json")
    if models:
        parser.add_argument("--models", nargs="+", choices=models, default=models)
    found = parser.parse_args(argv)
    return Options(found.quick, found.out, tuple(getattr(found, "models", ())))


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` gives, kept in ``path``: a benchmark that was stopped goes on from there."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    content = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return content


CODE = ("dsa_hw", "profilers", "benchmarks/*.py", "configs")
"""What makes figures; a shipped latency table grows while they are measured."""


def provenance(backend_provenance: dict[str, Any]) -> dict[str, Any]:
    """Where, with what and when figures were measured."""
    import torch

    return {
        **backend_provenance,
        "torch": torch.__version__,
        "commit": _commit() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The checkout's commit, and whether code was changed since; empty where there is no git."""
    if shutil.which("git") is None:
        return ""
    commit = _git("rev-parse", "--short", "HEAD")
    return f"{commit}-dirty" if commit and _git("status", "--porcelain", "--", *CODE) else commit


def _git(*words: str) -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=root, check=False)
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What a benchmark of training ran on."""
    import platform

    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def finish(
    name: str, options: Options, figures: dict[str, Any], origin: dict[str, Any], *tables: Table
) -> None:
    """Print the tables and the closing line; write the same as JSON."""
    Console().print(*tables)
    content = {"benchmark": name, "figures": figures, "provenance": origin}
    write(options.out / f"{name}{'_quick' if options.quick else ''}.json", content)
    print(json.dumps(content))


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
