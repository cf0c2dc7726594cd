"""Residual branches that can be removed whole.

A branch is what lies between a tensor and the add that brings the same tensor back in (an identity
shortcut). Without it the add is the shortcut, and none of the branch's cost is left. Groups of
channels that are made inside a branch only are its *internal* groups; the branch is removed when
all of them have width zero, and they have width zero together or not at all. (In a bottleneck these
are the two inner widths, in a block with squeeze-and-excitation that of the squeeze as well.)

What is removable is found twice (``inventory``), and both times by structure, not by the names of
classes: in the deployed ONNX graph (``onnx_branches``), where latency is, and in the module whose
forward adds (``branch_surgery``), where the branch is masked and cut. Their layers match them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch that can be removed.

    Args:
        name: of the module that adds; where it adds several, of the one that holds the layers.
        layers: names of its convolutions and linear layers.
        groups: its internal groups; all have width zero when it is removed, or none.
        owner: name of the module whose forward adds; "" is the model itself.
        end: name of the module whose output, times a gate, is the branch's output times the gate.
    """

    name: str
    layers: tuple[str, ...]
    groups: tuple[int, ...]
    owner: str
    end: str


def removed_branches(
    branches: Sequence[Branch], widths: Sequence[int] | Sequence[float]
) -> tuple[Branch, ...]:
    """The branches that are gone at these widths of the groups.

    Raises:
        ValueError: some but not all of a branch's internal groups have width zero, or a group
            that belongs to none has.
    """
    gone = {g for g, width in enumerate(widths) if width == 0}
    removed = tuple(b for b in branches if gone.issuperset(b.groups))
    left = gone.difference(g for b in removed for g in b.groups)
    if left:
        raise ValueError(
            f"groups {sorted(left)} have width zero, but no branch goes with them: the internal "
            "groups of a removable branch have width zero together"
        )
    return removed
