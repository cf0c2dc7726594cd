"""Importance by squared first-order Taylor scores (Molchanov et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsa_hw.errors import UserError
from dsa_hw.network.coupling import Coupling
from dsa_hw.worth.importance import Wants, positive, present_atoms

DECAY = 3.0
"""The n-th training batch weighs about n**DECAY in the Taylor scores.

The newest quarter of the batches then has 68% of the weight and the first tenth 0.01%, in a search
of a hundred steps as in one of a hundred thousand: nothing is left of batches at another learning
rate. (Shamir and Zhang, ICML 2013, arXiv:1212.1824, section 4, average iterates like this.)
"""


class TaylorScores:
    """Squared first-order effect of removing an atom on the training loss.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
    arXiv:1906.10771, section 3.1 (equation 8) and 3.2: the square of the sum of parameter times
    gradient over a channel's scale and shift, which is the gradient by a gate of value 1 on the
    channel, averaged over batches. The masks are the gates. Squares add up, to a diagonal of the
    Fisher information; near a minimum, where the mean gradient is zero, an average of absolute
    values would measure its noise instead, in another unit for each batch size.

    Where this differs from the paper: an atom's channels open and close together in all layers that
    share it, so their gradients are added before they are squared; the average is weighted towards
    the newest batches (``DECAY``); and the gradient is taken at the mask's own value and not
    multiplied by it, so that a channel that is nearly closed can still come back.

    Args:
        squared: whether the effects are squared; HALP and MDP take their absolute values.
        decay: see ``DECAY``; 0 is the plain mean.
    """

    wants: Wants = "gate gradients"

    def __init__(
        self,
        coupling: Coupling,
        device: torch.device,
        *,
        squared: bool = True,
        decay: float = DECAY,
    ) -> None:
        self.present = present_atoms(coupling, device)
        self._squared, self._decay = squared, decay
        self._average = torch.ones(self.present.numel(), device=device)
        self._batches = 0
        self._positions: Tensor | None = None

    def note(
        self, layers: Sequence[Tensor], gradients: Tensor, loss_scale: Tensor | float = 1.0
    ) -> None:
        """Take in one training batch.

        Args:
            layers: for every masked layer, the positions of its channels in the flat masks.
            gradients: (channels of all layers,) of the loss by the masks.
            loss_scale: that the loss was multiplied by before it was differentiated.
        """
        if self._positions is None:
            self._positions = torch.cat(list(layers))
        atoms = self.present.numel()
        unscaled = gradients.detach().float() / loss_scale
        finite = torch.nan_to_num(unscaled, posinf=0.0, neginf=0.0)
        total = finite.new_zeros(atoms + 1)  # the last for channels that no atom has
        self.note_atoms(total.index_add_(0, self._positions, finite)[:atoms])

    def note_atoms(self, gradients: Tensor) -> None:
        """Take in one batch's gradients by gates of the atoms, (groups, atoms) or flat."""
        effects = gradients.detach().flatten()
        effects = effects.square() if self._squared else effects.abs()
        self._batches += 1
        self._average.lerp_(effects, (1.0 + self._decay) / (self._batches + self._decay))

    def mean(self) -> Tensor:
        """(groups, atoms) without a floor; 0 before the first batch."""
        return self._average.view_as(self.present) * float(self._batches > 0)

    def forget(self) -> None:
        """Begin anew, as if no batch had been seen."""
        self._average.fill_(1.0)
        self._batches = 0

    def __call__(self) -> Tensor:
        """(groups, atoms); all 1 before the first batch."""
        return positive(self._average, self.present)

    def state(self) -> dict[str, Any]:
        """What to keep for an exact resume."""
        return {"average": self._average.clone(), "batches": self._batches}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from ``state``.

        Raises:
            UserError: it is of a search with the scores of an earlier version.
        """
        if not isinstance(state, dict):
            raise UserError(
                "this search was saved by an earlier version, whose Taylor scores were not "
                "squared; search again in another folder"
            )
        self._average.copy_(state["average"])
        self._batches = state["batches"]


def taylor(model: nn.Module, coupling: Coupling, device: torch.device) -> TaylorScores:
    """``--importance taylor``: what removing a channel does to the training loss."""
    return TaylorScores(coupling, device)
