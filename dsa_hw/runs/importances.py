"""Importances by name: what ``--importance`` can ask for.

A factory takes the model, its coupling and the device of the scores, and returns an ``Importance``
(``worth.importance``). One of one's own needs no change here: ``IMPORTANCES.register`` it, or name
its factory as ``package.module:factory``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsa_hw.runs.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dsa_hw.network.coupling import Coupling
    from dsa_hw.worth.importance import Importance

ImportanceFactory = Callable[["nn.Module", "Coupling", "torch.device"], "Importance"]

IMPORTANCES: Registry[ImportanceFactory] = Registry(
    "importance",
    {
        "bn_scale": "dsa_hw.worth.importance:bn_scale",
        "filter_l1": "dsa_hw.worth.importance:filter_l1",
        "taylor": "dsa_hw.worth.taylor:taylor",
    },
)
"""The importances that a command can be given by name."""


def chosen_importance(choice: str, trains: bool = True) -> str:
    """Return what ``auto`` stands for: ``taylor`` where training gives gradients, else
    ``filter_l1``.

    What a channel's removal does to the loss says more than its size about a network that is used
    to all its channels.
    """
    if choice != "auto":
        return choice
    return "taylor" if trains else "filter_l1"
