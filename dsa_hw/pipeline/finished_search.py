"""What another run's search has learned, for a new target without a new search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa_hw.errors import RunFolderError, UserError
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.folder import CONFIG_FILE, RunFolder
from dsa_hw.runs.importances import chosen_importance
from dsa_hw.runs.options import parse
from dsa_hw.runs.yaml_files import read_mapping

SAME = ("model", "input_shape", "batch_size", "data", "exclude", "importance", "constraint",
        "remove_branches")  # fmt: skip
"""What has to agree for a search to mean the same."""
IDENTITY = (*SAME, "device", "precision", "epochs", "out")
"""What every run's configuration says: a default in the place of one of these would be a guess."""


@dataclass(frozen=True)
class FinishedSearch:
    """The end of a search.

    Args:
        model: state of the network, masks attached.
        pruner: state of the ``DSAPruner``.
        dense: state of the dense network that was trained beside it, if one was.
        importance: that ranked its channels.
        trained: whether it began with trained weights.
        lr: peak learning rate that it was trained with.
    """

    model: dict[str, Any]
    pruner: dict[str, Any]
    dense: dict[str, Any] | None
    importance: str
    trained: bool
    lr: float


def load_finished_search(config: PruneConfig) -> FinishedSearch | None:
    """The search that ``config.search_from`` names; None if it names none.

    Raises:
        RunFolderError: there is no finished search, or it was of another network or data.
    """
    if config.search_from is None:
        return None
    folder = RunFolder(Path(config.search_from))
    if not (folder.path / CONFIG_FILE).is_file():
        raise RunFolderError(f"search-from: {folder.path} holds no run")
    source = config_of(folder)
    for name in SAME:
        theirs, ours = getattr(source, name), getattr(config, name)
        if theirs != ours:
            raise RunFolderError(
                f"search-from: the search in {folder.path} was of another kind ({name}: "
                f"{theirs!r} there, {ours!r} here)"
            )
    state = folder.load_checkpoint("search")
    if state is None or state["epoch"] < source.search_epochs:
        done = 0 if state is None else state["epoch"]
        raise RunFolderError(
            f"search-from: the search in {folder.path} has not finished ({done} of "
            f"{source.search_epochs} epochs); run its own command to the end first"
        )
    dense = folder.load_checkpoint("dense")
    return FinishedSearch(
        state["model"], state["extra"], dense["model"] if dense else None,
        chosen_importance(source.importance), source.starts_trained, source.resolved_lr,
    )  # fmt: skip


def config_of(folder: RunFolder) -> PruneConfig:
    """What the run in ``folder`` was asked for, as data: nothing that it names is imported.

    Raises:
        UserError: its configuration is none; names the option, its value and what was expected.
    """
    path = folder.path / CONFIG_FILE
    missing = [name for name in IDENTITY if name not in read_mapping(path)]
    if missing:
        raise RunFolderError(
            f"{path} does not say {missing[0]}; expected all options of a run. Put back a copy"
        )
    try:
        return parse("prune", PruneConfig, ["--config", str(path)])
    except UserError as error:
        raise RunFolderError(f"{path}: {error}") from error
