"""Every experiment in ``configs/`` is one that its command accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsa_hw.cli import parse, to_yaml
from dsa_hw.config import PruneConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_it_parses_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = parse("prune", PruneConfig, ["--config", str(path)])
    assert 0 < config.resolved_finetune_epochs < config.epochs
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert parse("prune", PruneConfig, ["--config", str(resolved)]) == config


def test_each_run_has_a_folder_of_its_own() -> None:
    folders = [parse("prune", PruneConfig, ["--config", str(p)]).out for p in CONFIGS]
    assert len(set(folders)) == len(folders) > 10
