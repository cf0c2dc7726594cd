"""What foretells how accurate an allocation ends? Rank correlations with fine-tuned accuracy.

Random allocations of one FLOPs budget are cut from one trained network, the most important channels
staying, and fine-tuned alike. Beside each one's accuracy stands what could have been said of it
before: the logarithm of the kept shares of importance (``rounding.kept_importance``, what a trained
network's rounding maximises most), the kept importance itself (what the integer program after MDP
maximises), and how near the widths are to uniform ones.

Every network is a run with a folder of its own; stopped and called again, the benchmark goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from benchmarks import harness
from benchmarks.methods import Bench
from dsa_hw.baselines import uniform_keep_ratio
from dsa_hw.baselines.gates import TaylorGates
from dsa_hw.baselines.mdp import kept_values
from dsa_hw.closed_loop import allocate
from dsa_hw.config import PruneConfig
from dsa_hw.rounding import closeness, kept_importance
from dsa_hw.surgery import keep_most_important, remove_channels
from dsa_hw.training import Stage

NAME = "allocation_values"
MODELS = ("glyphs_mobilenet5", "glyphs_resnet8")
FLOPS_RATIO = 0.3
ALLOCATIONS = 16
SPREAD = 0.45
"""Standard deviation of the groups' log keep ratios."""
DENSE_EPOCHS = 12
VALUES = ("log_kept_shares", "kept_importance", "near_uniform")


def main(argv: list[str] | None = None) -> None:
    """Every model's allocations."""
    options = harness.parse(NAME, __doc__, argv, models=MODELS)
    figures: dict[str, Any] = {}
    for model in options.models:
        config = _config(model, options.quick)
        root = Path(f"runs/{NAME}{'_quick' if options.quick else ''}") / model
        bench = Bench(config, root, root)
        figures[model] = _of_network(bench, 5 if options.quick else ALLOCATIONS)
    origin = harness.provenance(harness.machine()) | {
        "config": dataclasses.asdict(_config(options.models[0], options.quick))
    }
    harness.finish(NAME, options, figures, origin, _table(figures))


def _config(model: str, quick: bool) -> PruneConfig:
    return PruneConfig(
        model=model, data="glyphs", budget=("flops",), flops_ratio=FLOPS_RATIO,
        input_shape=(3, 16, 16), train_size=512 if quick else 12_000,
        test_size=500 if quick else 16_000, epochs=3 if quick else 6,
        finetune_epochs=2 if quick else 4, train_batch_size=64, lr=0.1,
        # PyTorch's depthwise convolutions train more slowly at bfloat16 on a CPU
        mixed_precision="no" if quick or "mobilenet" in model else "auto",
    )  # fmt: skip


def _of_network(bench: Bench, count: int) -> dict[str, Any]:
    model, atoms = _scored(bench)
    rng = np.random.default_rng(bench.config.seed)
    rows = []
    for number in range(count):
        widths = random_allocation(bench, rng)
        row = harness.once(
            bench.folder / f"allocation-{number}.json",
            lambda w=widths, n=number: {
                "widths": w.tolist(),
                "accuracy": _finetuned(bench, f"allocation-{n}", model, w, atoms),
            },
        )
        rows.append(row | values(bench, np.array(row["widths"]), atoms))
        print(f"{bench.config.model} {row}", file=sys.stderr)
    accuracies = [r["accuracy"] for r in rows]
    return {
        "rank_correlation": {
            name: float(spearmanr([r[name] for r in rows], accuracies)[0])  # pyright: ignore
            for name in VALUES
        },
        "accuracy": {"least": min(accuracies), "most": max(accuracies)},
        "allocations": rows,
    }


def _scored(bench: Bench) -> tuple[nn.Module, list[np.ndarray]]:
    """The trained network after the schedule's search epochs, and its atoms' Taylor scores."""
    trainer, _ = bench.run(bench.folder / "scored")
    model = bench.trained_dense(DENSE_EPOCHS, DENSE_EPOCHS)
    gates = TaylorGates(model, bench.coupling, bench.dense.example.to(trainer.device))
    last_epoch = (bench.config.search_epochs - 1) * trainer.steps
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        gates.note()
        if steps == last_epoch:
            gates.importance()  # forgets what came before

    def load(state: dict[str, Any]) -> None:
        nonlocal steps
        gates.load_state_dict(state["gates"])
        steps = state["steps"]

    stage = Stage("search", bench.config.search_epochs, 0, bench.config.epochs * trainer.steps)
    trainer.train(
        model, stage, after_step=step, load_extra=load,
        extra_state=lambda: {"gates": gates.state_dict(), "steps": steps},
    )  # fmt: skip
    importance = gates.importance()
    gates.remove()
    groups = bench.coupling.groups
    return model, [s[: g.atoms] for s, g in zip(importance, groups, strict=True)]


def random_allocation(bench: Bench, rng: np.random.Generator) -> np.ndarray:
    """(groups,) random keep ratios, scaled to the budget and rounded."""
    choices, budget = bench.choices, bench.budget
    own = np.exp(rng.normal(0.0, SPREAD, len(choices.dense)))
    low, high = 1e-2, 1e2
    for _ in range(50):
        middle = float(np.sqrt(low * high))
        widths = np.clip(middle * own * choices.dense, choices.least, choices.dense)
        fits = float(budget.cost(torch.as_tensor(widths).float())) <= budget.target
        low, high = (middle, high) if fits else (low, middle)
    widths = np.clip(low * own * choices.dense, choices.least, choices.dense)
    return allocate(choices, closeness(choices, widths), [budget]).widths


def values(bench: Bench, widths: np.ndarray, atoms: list[np.ndarray]) -> dict[str, float]:
    """What can be said of an allocation before it is fine-tuned; see the module."""
    choices = bench.choices
    uniform = uniform_keep_ratio(choices, bench.budget) * choices.dense
    layers = [len(g.layers) for g in bench.coupling.groups]
    found = zip(
        VALUES,
        (
            kept_importance(choices, atoms, layers),
            kept_values(choices, atoms),
            closeness(choices, uniform),
        ),
        strict=True,
    )
    chosen = [own.index(w) for own, w in zip(choices.widths, widths.tolist(), strict=True)]
    return {
        name: float(sum(v[i] for v, i in zip(value, chosen, strict=True))) for name, value in found
    }


def _finetuned(
    bench: Bench, name: str, model: nn.Module, widths: np.ndarray, atoms: list[np.ndarray]
) -> float:
    keep = keep_most_important(bench.coupling, widths, atoms)
    small = remove_channels(model, bench.coupling, keep)
    epochs = bench.config.resolved_finetune_epochs
    return bench.outcome(name, small, widths, epochs, bench.config.search_epochs).accuracy


def _table(figures: dict[str, Any]) -> Table:
    table = Table(title="rank correlation with the accuracy after fine-tuning")
    for column in ("network", "accuracies", *(n.replace("_", " ") for n in VALUES)):
        table.add_column(column, justify="right")
    for model, found in figures.items():
        least, most = (100 * found["accuracy"][k] for k in ("least", "most"))
        ranks = [f"{found['rank_correlation'][name]:.2f}" for name in VALUES]
        table.add_row(model, f"{least:.1f} to {most:.1f}%", *ranks)
    return table


if __name__ == "__main__":
    sys.exit(main())
