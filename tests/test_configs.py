"""Every experiment in ``configs/`` is one that its command accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsa_hw.runs.config import CompareConfig, PruneConfig
from dsa_hw.runs.options import parse, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def parsed(path: Path) -> PruneConfig | CompareConfig:
    """By the command that its name says; ``prune`` where it says none."""
    if path.name.startswith("compare_"):
        return parse("compare", CompareConfig, ["--config", str(path)])
    return parse("prune", PruneConfig, ["--config", str(path)])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_it_parses_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = parsed(path)
    assert 0 < config.resolved_finetune_epochs < config.epochs
    resolved = tmp_path / path.name
    resolved.write_text(to_yaml(config))
    assert parsed(resolved) == config


def test_each_run_has_a_folder_of_its_own() -> None:
    folders = [parsed(p).out for p in CONFIGS]
    assert len(set(folders)) == len(folders) > 10
