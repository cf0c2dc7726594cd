"""DSA's search: keep ratios learned by gradient, end to end, under budgets.

Ning et al., ECCV 2020, arXiv:2004.02164: weights are trained on the training data under sampled
masks, keep ratios on validation data through the differentiable pruning process (``dpp``), and
the budget is held by a Lagrangian. Where this differs from the paper, and why:

- From random weights, keep ratios wait for two fifths of the search, and until the loss has
  started to fall: they would only learn from noise.
- The budget's target is lowered linearly, from the network's own cost to the target near the end,
  and the keep ratios are projected onto it after each move. The paper's splitting (ADMM) and an
  augmented Lagrangian are ``SearchSettings.constraint``; see ``constraints``.
- beta2 rises exponentially, in units of the spread of log importance.
- Weights are trained whole: masks are on the validation passes alone, and rounding looks at the
  importance that stays more than at the learned widths. ``SearchSettings.mask_training`` trains
  them under the masks and rounds to the nearest widths, as in the paper.
- Masks are the keep probabilities themselves rather than Bernoulli samples of them: the same limit
  with less noise on the way. ``SearchSettings.masks`` has the paper's form, and a hard one.
- The validation loss is scaled before it is differentiated, or what float16 cannot hold of the
  gradients would be lost (Micikevicius et al., ICLR 2018, arXiv:1710.03740, section 3.2).
- Keep ratios can reach zero where a residual branch may be removed. Below the narrowest width the
  channels' process stays where it is (it has no meaning for less than a step of channels), and the
  branch's gate takes over; see ``branch_gates``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsa_hw.allocation.allocate import Allocation, Measure, Refine, allocate
from dsa_hw.cost.branch_gates import BranchGates
from dsa_hw.cost.budget import Budget, BudgetRequest, check_names
from dsa_hw.cost.choices import WidthChoices, merged_choices
from dsa_hw.errors import InfeasibleBudget, SearchWarning
from dsa_hw.network.agreement import masked_and_cut_difference, outputs_on, random_batches
from dsa_hw.network.branches.branch import Branch, removed_branches
from dsa_hw.network.forward import Inputs, device_of, frozen_statistics
from dsa_hw.network.inventory import fixed_branches_warning, take_inventory
from dsa_hw.network.masks import ChannelMasks, hard_masks
from dsa_hw.network.removal import Keep, remove_channels
from dsa_hw.runs.importances import IMPORTANCES, chosen_importance
from dsa_hw.search.dpp import (
    hard_top_masks,
    keep_probabilities,
    sample_masks,
    standardized_inexactness,
    straight_through,
)
from dsa_hw.search.holding import make_mover
from dsa_hw.search.holding.mover import fit_to_budget
from dsa_hw.search.settings import SearchSettings
from dsa_hw.surgery.channels import keep_most_important
from dsa_hw.training.batch_norms import retake_statistics
from dsa_hw.worth.importance import split_atoms
from dsa_hw.worth.values import closeness, near_and_important

RETARGETING_STEPS = 20
LONGEST_STEP = 0.1
"""Of a keep ratio, however few moves there are."""
LOSS_SCALE = 2.0**14
"""What a validation loss is multiplied by, at first. The mean over 16 or more examples then still
has gradients by float16 outputs within its range (65,504), and what remains of them at the first
layers is 16,384 times further from its least number (6e-8) than without."""
BACKOFF = 0.25
"""What a scale at which gradients overflowed is multiplied by; it does not grow again."""

Event = dict[str, Any]
"""One line of the search's history; see ``DSAPruner._log``."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a search ends with.

    Args:
        model: the smaller network.
        allocation: its widths and what the budgets say of them.
        keep: the atoms that stayed.
        keep_ratios: (groups,) as learned, before rounding.
        masked_vs_pruned_max_abs: largest difference between the masked and the pruned network's
            outputs on the example inputs, in evaluation mode at float32.
        removed: branches that are gone.
    """

    model: nn.Module
    allocation: Allocation
    keep: Keep
    keep_ratios: np.ndarray
    masked_vs_pruned_max_abs: float
    removed: tuple[Branch, ...] = ()


class DSAPruner:
    """Prunes a model while the user's own loop trains it.

    Example:
        >>> pruner = DSAPruner(model, example, budget, total_steps=1000)    # doctest: +SKIP
        >>> for x, y in loader:                                              # doctest: +SKIP
        ...     criterion(model(x), y).backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     pruner.step(validation_loss=lambda: criterion(model(xv), yv))
        >>> small = pruner.finish()                                          # doctest: +SKIP

    A training step may be a CUDA graph: masks change in place. It is captured anew when the search
    begins (``searching``), since there are none before.

    Args:
        model: trained in place; masks are live in it until ``finish``.
        example_inputs: (N, C, H, W) on the model's device, or one such tensor an argument.
        budgets: one or several; all of them are met.
        total_steps: calls of ``step`` that the search will have.
        trained: the model's weights are: its loss may rise at first, since the learning rate does.
        importance: base importance of the pruning process; ``auto`` is ``taylor``.
        exclude: patterns of module names whose channels all stay.
        remove_branches: whole residual branches may go, where their shortcut is the identity.
        seed: of the sampled masks; the same on all processes.
        on_event: receives the history (``log.jsonl`` of the command); without it, its warnings are
            Python's (``SearchWarning``).

    Raises:
        InfeasibleBudget: no allowed widths meet a budget.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        budgets: BudgetRequest | Sequence[BudgetRequest],
        total_steps: int,
        *,
        settings: SearchSettings | None = None,
        trained: bool = False,
        importance: str = "auto",
        exclude: Sequence[str] = (),
        remove_branches: bool = False,
        seed: int = 0,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.settings = settings or SearchSettings()
        self.total_steps, self._trained = total_steps, trained
        self._model, self._example = model, example_inputs
        device = device_of(example_inputs)
        self.graph = take_inventory(
            model, example_inputs, exclude=exclude, remove_branches=remove_branches
        )
        self.coupling = self.graph.coupling
        self._on_event = on_event or _warn_of
        for message in fixed_branches_warning(self.graph):
            self._warn(message)

        groups = self.coupling.groups
        self._dense = torch.tensor([float(g.dense_width) for g in groups], device=device)
        self._least = torch.zeros_like(self._dense)
        self.keep_ratios = torch.ones(len(groups), device=device, requires_grad=True)
        self._bind(budgets)
        make = IMPORTANCES.find(chosen_importance(importance))
        self._importance = make(model, self.coupling, device)
        self._wants_gradients = self._importance.wants == "gate gradients"
        self._masks = self._masked()
        self._mover = make_mover(
            self.settings.constraint, self.keep_ratios, self._least, len(self.budgets)
        )
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._steps = 0
        self._search_from: int | None = None
        self._first_loss: float | None = None
        self._recent = torch.zeros(2, device=device)  # sum and number of validation losses
        self._last_loss = torch.zeros((), device=device)
        self._refused = torch.zeros((), device=device)  # gradients that were not finite
        self._loss_scale = torch.full((), LOSS_SCALE, device=device)
        self._open_masks()

    def _bind(self, budgets: BudgetRequest | Sequence[BudgetRequest]) -> None:
        """The budgets over this network, their targets, and the widths they allow."""
        device = self._dense.device
        requests = budgets if isinstance(budgets, Sequence) else [budgets]
        bound = [request.bind(self.graph) for request in requests]
        budgets_of_all = [budget.to(device) for budget, _ in bound]
        check_names(budgets_of_all)
        choices = merged_choices([choices for _, choices in bound])
        _refuse_infeasible(budgets_of_all, choices)
        self.budgets, self.choices = budgets_of_all, choices
        least = torch.as_tensor(self.choices.least, dtype=torch.float32, device=device)
        self._least.copy_(least / self._dense)
        self._gates = None
        if self.graph.branches:
            self._gates = BranchGates(self.graph, self.choices, device)
        self._targets = torch.tensor([b.target for b in self.budgets], device=device)
        self._first_costs = self._costs(self._dense).detach()

    def _masked(self) -> ChannelMasks:
        gated = self._wants_gradients
        return ChannelMasks(
            self._model, self.coupling, self._example, with_gradients=gated,
            branches=self.graph.branches,
        )  # fmt: skip

    # -- in the loop -------------------------------------------------------------------------

    def step(self, validation_loss: Callable[[], Tensor], loss_scale: Tensor | float = 1.0) -> None:
        """Move the keep ratios and draw new masks; to be called after every optimizer step.

        Args:
            validation_loss: runs the model on validation data and returns its scalar loss; called
                at every ``cadence``-th step. It is scaled here: give it as it is, also at float16.
            loss_scale: what the training loss was multiplied by before its backward pass, where a
                ``GradScaler`` did that: ``scaler.scale(torch.ones(()))``.
        """
        self._steps += 1
        self._note_gradients(loss_scale)
        turn = self._steps % self.cadence == 0
        if self._search_from is None:
            if turn:
                with torch.no_grad(), frozen_statistics(self._model):
                    self._note_loss(_averaged(validation_loss()))
            self._watch_loss()
        elif turn:
            self._move_keep_ratios(validation_loss)
        began = self._search_from == self._steps
        if self._search_from is not None and (turn or began or self.settings.masks == "sampled"):
            with torch.no_grad():
                self._mask_training()
        if self._steps % self.settings.log_every == 0:
            self._log()

    def _mask_training(self) -> None:
        """The masks under which the weights are trained until the next move."""
        if self.settings.mask_training:
            self._masks.set(*self._draw())
        else:
            self._open_masks()

    def _open_masks(self) -> None:
        """Nothing is masked; where scores are gradients by the masks, those are collected."""
        open_ = None
        if self._wants_gradients:
            open_ = torch.ones(self._importance.present.shape, device=self._dense.device)
        self._masks.set(open_)

    @property
    def cadence(self) -> int:
        """Steps between two moves of the keep ratios."""
        settings = self.settings
        often = int(self.total_steps * (1.0 - self._warmup()[0])) // settings.moves
        return min(settings.validation_every, max(2, often))

    def _warmup(self) -> tuple[float, float]:
        """Least and most of the steps without masks."""
        trained = self.settings.trained_warmup
        return (trained, trained) if self._trained else self.settings.warmup

    def _note_gradients(self, loss_scale: Tensor | float) -> None:
        """Hand the training batch's gradients by mask to the importance that wants them."""
        if not self._wants_gradients or (found := self._masks.gate_gradients()) is None:
            return
        layers, gradients = found
        self._importance.note(layers, _averaged(gradients), loss_scale)
        gradients.zero_()

    @property
    def searching(self) -> bool:
        """Whether masks are live already."""
        return self._search_from is not None

    @property
    def progress(self) -> float:
        """How much of the search (without the warm-up) is done, in [0, 1]."""
        if self._search_from is None:
            return 0.0
        length = max(1, self.total_steps - self._search_from)
        return min(1.0, (self._steps - self._search_from) / length)

    @property
    def beta2(self) -> float:
        """Inexactness now, in spreads of log importance."""
        first, last = self.settings.beta2
        return first * math.pow(last / first, self.progress)

    def current_targets(self) -> Tensor:
        """(budgets,) the targets that hold now: lowered linearly from the dense network's cost."""
        share = min(1.0, self.progress / self.settings.budget_ramp)
        return torch.lerp(self._first_costs, self._targets, share)

    def _probabilities(self) -> Tensor:
        scores = self._importance().log()
        present = self._importance.present
        beta2 = standardized_inexactness(scores, present, self.beta2)
        ratios = self.keep_ratios
        if self._gates is not None:
            ratios = self._gates.floored(ratios * self._dense) / self._dense
        return keep_probabilities(ratios, scores, present, beta2)

    def _branch_gates(self) -> Tensor | None:
        """(branches,) how far each branch is there."""
        return None if self._gates is None else self._gates.smooth(self.keep_ratios * self._dense)

    def _draw(self) -> tuple[Tensor, Tensor | None]:
        """(groups, atoms) masks and (branches,) gates for the next forward pass."""
        kind = self.settings.masks
        probabilities, gates = self._probabilities(), self._branch_gates()
        if kind == "soft":
            return probabilities, gates
        if kind == "sampled":
            masks = sample_masks(probabilities, self._generator)
            return masks, None if gates is None else sample_masks(gates, self._generator)
        masks = hard_top_masks(probabilities, self._importance(), self._importance.present)
        if gates is not None:
            gates = straight_through((gates.detach() >= 0.5).to(gates.dtype), gates)
        return masks, gates

    def _costs(self, widths: Tensor) -> Tensor:
        return torch.stack([budget.cost(widths) for budget in self.budgets])

    def _move_keep_ratios(self, validation_loss: Callable[[], Tensor]) -> None:
        self._masks.set(*self._draw())
        with frozen_statistics(self._model):
            loss = validation_loss()
        (scaled,) = torch.autograd.grad(loss * self._loss_scale, self.keep_ratios)
        loss = _averaged(loss.detach())
        self._note_loss(loss)
        step = self._first_step() * (1.0 - 0.9 * self.progress)
        self._mover.move(self._unscaled(_averaged(scaled), loss), self._violations, step)

    def _first_step(self) -> float:
        """Adam's step before it falls."""
        moves = (self.total_steps - (self._search_from or 0)) / self.cadence
        longer = min(LONGEST_STEP, self.settings.travel / max(1.0, moves))
        return max(self.settings.keep_ratio_lr, longer)

    def _unscaled(self, gradient: Tensor, loss: Tensor) -> Tensor:
        """The loss's gradient, or nothing where it is not finite: moments would never forget it.

        Where the loss itself is finite, the scale was too large, and is smaller from now on.
        """
        scale = self._loss_scale
        finite = torch.isfinite(gradient).all()
        overflowed = ~finite & torch.isfinite(loss) & (scale > 1.0)
        self._refused += ~finite & ~overflowed
        found = torch.where(finite, gradient / scale, torch.zeros_like(gradient))
        scale.copy_(torch.where(overflowed, BACKOFF * scale, scale))
        return found

    def _violations(self, keep_ratios: Tensor) -> Tensor:
        """(budgets,) cost over the target that holds now, less 1."""
        return self._costs(keep_ratios * self._dense) / self.current_targets() - 1.0

    def _note_loss(self, loss: Tensor) -> None:
        self._last_loss = loss.detach()
        self._recent += torch.stack([loss.detach().float(), torch.ones_like(self._recent[1])])

    def _watch_loss(self) -> None:
        """Begin the search when the loss is known to fall, or at the latest allowed step."""
        least, most = (round(f * self.total_steps) for f in self._warmup())
        window = max(self.cadence, least // 4 or 1)
        if self._steps % window and self._steps < most:
            return
        total, count = self._recent.tolist()
        if count == 0:
            return
        self._recent.zero_()
        loss = total / count
        first = self._first_loss = loss if self._first_loss is None else self._first_loss
        fallen = self._trained or loss <= self.settings.fallen * first
        if self._steps >= most and not fallen:
            self._warn(
                f"the loss has not started to fall in {self._steps} steps ({first:.3g} "
                f"at the start, {loss:.3g} now); keep ratios will be learned from noise: train "
                "longer, raise the learning rate, or start from a trained network"
            )
        if (self._steps >= least and fallen) or self._steps >= most:
            self._search_from = self._steps

    # -- history -------------------------------------------------------------------------------

    @torch.no_grad()
    def _log(self) -> None:
        ratios = self.keep_ratios.tolist()
        if not math.isfinite(float(self._last_loss)):
            self._warn(f"the validation loss is {float(self._last_loss)} at step {self._steps}")
        if refused := int(self._refused):
            self._warn(
                f"{refused} gradients of the validation loss were not finite up to step "
                f"{self._steps}, and were left out: see that the training itself does not diverge"
            )
            self._refused.zero_()
        names = [b.name for b in self.budgets]
        costs = self._costs(self.keep_ratios * self._dense).tolist()
        gates = self._branch_gates()
        branches = [b.name for b in self.graph.branches]
        own = {} if gates is None else {
            "branch_gates": dict(zip(branches, gates.tolist(), strict=True))
        }  # fmt: skip
        self._on_event(
            {
                "event": "search_step",
                "step": self._steps,
                "phase": "search" if self.searching else "warmup",
                "validation_loss": float(self._last_loss),
                "inexactness_beta2": self.beta2 if self.searching else None,
                "keep_ratios": [round(r, 5) for r in ratios],
                "costs": dict(zip(names, costs, strict=True)),
                "targets": dict(zip(names, self.current_targets().tolist(), strict=True)),
            }
            | own
        )

    def _warn(self, message: str) -> None:
        self._on_event({"event": "warning", "message": message})

    def _warn_of_the_end(self, ratios: np.ndarray) -> None:
        widths = torch.as_tensor(ratios, dtype=torch.float32, device=self._dense.device)
        costs = self._costs(widths * self._dense).tolist()
        for budget, cost in zip(self.budgets, costs, strict=True):
            if cost > 1.05 * budget.target:
                self._warn(
                    f"the search ended at {cost:.4g} {budget.unit}, above its {budget.name} target "
                    f"of {budget.target:.4g}; rounding takes the rest: search longer"
                )
        least = self._least.tolist()
        movable = [g.frozen is None and floor < 1 for g, floor in
                   zip(self.coupling.groups, least, strict=True)]  # fmt: skip
        fallen = [
            group.name
            for group, ratio, floor, free in zip(
                self.coupling.groups, ratios, least, movable, strict=True
            )
            if free and ratio <= floor + 1e-3
        ]
        if len(fallen) > max(1, sum(movable) // 2):
            self._warn(
                f"{len(fallen)} of {sum(movable)} groups ended at their smallest width "
                f"({', '.join(fallen[:4])}, ...): the target may be too low for this network"
            )

    @property
    def model(self) -> nn.Module:
        """The network being pruned."""
        return self._model

    # -- the end -------------------------------------------------------------------------------

    def retarget(self, budgets: BudgetRequest | Sequence[BudgetRequest] | None = None) -> None:
        """Take what has been learned to other budgets, without a new search.

        All keep ratios are scaled by one factor until the tightest budget is just met: how the
        groups compare to each other stays as learned. ``finish`` may be called again afterwards.

        Args:
            budgets: from now on; None are those of the constructor (after ``load_state_dict`` of a
                search that had others).
        """
        if budgets is not None:
            self._bind(budgets)
        with torch.no_grad():
            self.keep_ratios.copy_(torch.maximum(self.keep_ratios, self._least))

        def violations(keep_ratios: Tensor) -> Tensor:
            return self._costs(keep_ratios * self._dense) / self._targets - 1.0

        fit_to_budget(self.keep_ratios, self._least, violations, RETARGETING_STEPS)

    def finish(
        self,
        measure: Measure | Mapping[str, Measure] | None = None,
        batches: Iterable[Any] | None = None,
    ) -> nn.Module:
        """Cut the model to the budgets and return the smaller network.

        ``finish_with_report`` tells what else is known of it.

        Args:
            measure: times a network of given widths (``closed_loop.Measure``); with several
                latency budgets one for each, by the budget's name. Without it budgets are met as
                predicted.
            batches: some hundred training images, on which its batch-norms' statistics are taken
                again (see ``batch_norms.retake_statistics``); without them they are the whole
                network's, which fit a smaller one badly until it has been trained a little.
        """
        return self.finish_with_report(measure, batches).model

    def finish_with_report(
        self,
        measure: Measure | Mapping[str, Measure] | None = None,
        batches: Iterable[Any] | None = None,
        refine: Mapping[str, Refine] | None = None,
    ) -> Pruned:
        """Round the keep ratios to widths at the budgets, and remove the channels.

        Args:
            measure, batches: see ``finish``.
            refine: by budget's name, what refines its model around the first allocation.

        Raises:
            InfeasibleBudget: no allowed widths meet the budgets.
            UserError: it is not clear which budget a measurement is of.
        """
        budgets = [budget.to("cpu") for budget in self.budgets]
        values = self.rounding_values(self.choices, self.learned_widths())
        allocation = allocate(self.choices, values, budgets, measure, refine=refine)
        found = self.finish_at(allocation)
        if batches is not None:
            retake_statistics(found.model, batches, device_of(self._example))
        return found

    def rounding_values(self, choices: WidthChoices, widths: np.ndarray) -> list[np.ndarray]:
        """Per group, one number a choice: what rounding maximises near ``widths`` (groups,).

        Weights that were trained under the masks are used to these widths. Whole ones are not.
        """
        if self.settings.mask_training:
            return closeness(choices, widths)
        layers = [len(group.layers) for group in self.coupling.groups]
        return near_and_important(choices, widths, self._atom_scores(), layers)

    def _atom_scores(self) -> list[np.ndarray]:
        """(atoms,) importance of every group."""
        return split_atoms(self.coupling, self._importance())

    def learned_widths(self) -> np.ndarray:
        """(groups,) keep ratios times dense widths, not rounded."""
        ratios = self.keep_ratios.detach().cpu().numpy().astype(float)
        return ratios * np.array(self.graph.dense_widths)

    def finish_at(self, allocation: Allocation) -> Pruned:
        """Remove the channels down to an allocation's widths.

        Raises:
            UnsupportedModel: what is left does not compute what it computed under the masks.
        """
        ratios = self.keep_ratios.detach().cpu().numpy().astype(float)
        if not self.searching:
            self._warn("the search never began: too few steps; keep ratios are all 1")
        self._warn_of_the_end(ratios)
        keep = keep_most_important(self.coupling, allocation.widths, self._atom_scores())
        if self._masks.removed:  # finished before, for another target
            self._masks = self._masked()
        masked = self._outputs_with(keep)
        self._masks.remove()
        branches = self.graph.branches
        small = remove_channels(self._model, self.coupling, keep, branches)
        cut = outputs_on(small, random_batches(self._example))
        difference = masked_and_cut_difference(masked, cut)
        gone = removed_branches(branches, allocation.widths.tolist())
        return Pruned(small, allocation, keep, ratios, difference, gone)

    def _outputs_with(self, keep: Keep) -> list[Tensor]:
        masks, gates = hard_masks(self.coupling, self.graph.branches, keep)
        self._masks.set(masks.to(self._dense.device), gates.to(self._dense.device))
        return outputs_on(self._model, random_batches(self._example))

    # -- resume --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model, for an exact resume."""
        return {
            "settings": asdict(self.settings),
            "keep_ratios": self.keep_ratios.detach().clone(),
            "mover": self._mover.state_dict(),
            "generator": self._generator.get_state(),
            "masks": self._masks.store.flat,
            "importance": self._importance.state(),
            "steps": self._steps,
            "search_from": self._search_from,
            "first_loss": self._first_loss,
            "recent": self._recent.clone(),
            "last_loss": self._last_loss.clone(),
            "loss_scale": self._loss_scale.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the model's own state is the caller's."""
        with torch.no_grad():
            self.keep_ratios.copy_(state["keep_ratios"])
        self._mover.load_state_dict(state["mover"])
        self._generator.set_state(state["generator"].cpu())
        masks = state["masks"]
        self._masks.store.set_flat(None if masks is None else masks.to(self._dense.device))
        self._importance.restore(state["importance"])
        self._steps = state["steps"]
        self._search_from = state["search_from"]
        self._first_loss = state["first_loss"]
        self._recent.copy_(state["recent"])
        self._last_loss = state["last_loss"]
        self._loss_scale.copy_(state.get("loss_scale", self._loss_scale))


def _averaged(value: Tensor) -> Tensor:
    """Mean over all processes, so that all of them move alike; ``value`` itself when alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _refuse_infeasible(budgets: Sequence[Budget], choices: WidthChoices) -> None:
    """A search would end with this error, too late.

    Raises:
        InfeasibleBudget: the least widths cost more than a budget.
    """
    least = torch.as_tensor(choices.least, dtype=torch.float32)[None]
    for budget in budgets:
        cost = float(budget.to("cpu").charged(least)[0])
        if cost > budget.target:
            raise InfeasibleBudget(
                f"the {budget.name} target of {budget.target:.4g} {budget.unit} cannot be reached: "
                f"the least this network can have is {cost:.4g} {budget.unit} (every group at its "
                "smallest width)"
            )


def _warn_of(event: Event) -> None:
    """What becomes of the history where nobody receives it."""
    if event["event"] == "warning":
        warnings.warn(event["message"], SearchWarning, stacklevel=2)
