"""What foretells how accurate an allocation ends? Rank correlations with fine-tuned accuracy.

Random allocations of one FLOPs budget are cut from one trained network, the most important channels
staying, and fine-tuned alike. Beside each one's accuracy stands what could have been said of it
before: the logarithm of the kept shares of importance (``rounding.kept_importance``, what rounding
maximises most), the kept importance itself (what the integer program after MDP maximises), and how
near the widths are to uniform ones.

And what is a latency budget worth? At one latency by the calibrated model, the widths of the
highest logarithm of kept shares are looked for twice: under that latency, and under FLOPs, with as
many FLOPs as fit it. What the first keep more (rounding under latency is not exact, so that it may
be a little less) is said in points of accuracy, by its regression. Uniform widths beside them. What
the two budgets ask for differs as far as a group's share of the milliseconds does from its share of
the FLOPs, which is said too.

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
from dsa_hw.allocation.allocate import allocate
from dsa_hw.comparison.methods import allocate_uniform, uniform_keep_ratio
from dsa_hw.comparison.methods.gates import TaylorGates
from dsa_hw.comparison.methods.mdp import kept_values
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.counted import count, flops_budget
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.cost.latency.profiling import ProfiledNetwork, profile_network
from dsa_hw.cost.latency.shares import group_shares
from dsa_hw.network.removal import remove_channels
from dsa_hw.pipeline.opening import configured_backend, configured_table
from dsa_hw.runs.config import PruneConfig
from dsa_hw.surgery.channels import keep_most_important
from dsa_hw.training.schedule import Stage
from dsa_hw.worth.values import closeness, kept_importance

NAME = "allocation_values"
MODELS = ("glyphs_mobilenet5", "glyphs_resnet10")
FLOPS_RATIO = 0.3
ALLOCATIONS = 16
SPREAD = 0.45
"""Standard deviation of the groups' log keep ratios."""
DENSE_EPOCHS = 12
VALUES = ("log_kept_shares", "kept_importance", "near_uniform")
LATENCY_RATIOS = (0.7, 0.5, 0.3)
FLOPS_LEVELS = 192
"""Between the least and the dense network, even in their logarithm."""


def main(argv: list[str] | None = None) -> None:
    """Every model's allocations."""
    options = harness.parse(NAME, __doc__, argv, models=MODELS)
    figures: dict[str, Any] = {}
    for model in options.models:
        config = _config(model, options.quick)
        root = Path(f"runs/{NAME}{'_quick' if options.quick else ''}") / model
        bench = Bench(config, root, root)
        found, atoms = _of_network(bench, 5 if options.quick else ALLOCATIONS)
        profiled = _profiled(bench, 12 if options.quick else 48)
        figures[model] = found | {
            "latency_share_over_flops_share": [
                share.ms_over_flops for share in group_shares(bench.dense.graph, profiled.latency)
            ],
            "worth": budget_worth(bench, profiled, atoms, found["slope"]),
        }
    origin = harness.provenance(harness.machine()) | {
        "config": dataclasses.asdict(_config(options.models[0], options.quick))
    }
    harness.finish(NAME, options, figures, origin, _table(figures), _worth_table(figures))


def _config(model: str, quick: bool) -> PruneConfig:
    return PruneConfig(
        model=model, data="glyphs", budget=("flops",), flops_ratio=FLOPS_RATIO,
        input_shape=(3, 16, 16), train_size=512 if quick else 12_000,
        test_size=500 if quick else 16_000, epochs=3 if quick else 6,
        finetune_epochs=2 if quick else 4, train_batch_size=64, lr=0.1,
        device="cpu", threads=1, batch_size=8,
        # PyTorch's depthwise convolutions train more slowly at bfloat16 on a CPU
        mixed_precision="no" if quick or "mobilenet" in model else "auto",
    )  # fmt: skip


def _of_network(bench: Bench, number_of: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The allocations' figures, and the trained network's scores."""
    model, atoms = _scored(bench)
    rng = np.random.default_rng(bench.config.seed)
    rows = []
    for number in range(number_of):
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
    found = {
        "rank_correlation": {
            name: float(spearmanr([r[name] for r in rows], accuracies)[0])  # pyright: ignore
            for name in VALUES
        },
        "accuracy": {"least": min(accuracies), "most": max(accuracies)},
        "slope": float(np.polyfit([r["log_kept_shares"] for r in rows], accuracies, 1)[0]),
        "allocations": rows,
    }
    return found, atoms


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
    return {name: _total(choices, value, widths) for name, value in found}


def _profiled(bench: Bench, networks: int) -> ProfiledNetwork:
    backend = configured_backend(bench.config)
    table = configured_table(bench.config, backend)
    return profile_network(bench.dense.graph, backend, table, networks=networks)


def budget_worth(
    bench: Bench, profiled: ProfiledNetwork, atoms: list[np.ndarray], slope: float
) -> list[dict[str, Any]]:
    """What the best widths keep under each kind of budget, a row a latency target.

    Args:
        slope: accuracy a unit of the logarithm of kept shares.
    """
    graph, model, choices = bench.dense.graph, profiled.latency.model, profiled.latency.choices
    kept = kept_importance(choices, atoms, [len(g.layers) for g in graph.coupling.groups])
    flops = flops_budget(graph, 1.0)

    def ms(widths: np.ndarray) -> float:
        return float(model.staircase_ms(torch.as_tensor(widths).float()))

    least, most = (count(flops, w.tolist()) for w in (choices.least, choices.dense))
    by_flops = [
        allocate(choices, kept, [flops_budget(graph, float(level))]).widths
        for level in np.geomspace(least * 1.001, most, FLOPS_LEVELS)
    ]
    rows = []
    for ratio in LATENCY_RATIOS:
        target = ratio * ms(choices.dense)
        budget = ModelledLatency(model, target)
        found = {
            "latency": allocate(choices, kept, [budget]).widths,
            "flops": max(
                (w for w in by_flops if ms(w) <= target), key=lambda w: _total(choices, kept, w)
            ),
            "uniform": allocate_uniform(choices, [budget]).widths,
        }
        under = {
            name: {
                "widths": w.tolist(), "latency_ratio": ms(w) / ms(choices.dense),
                "flops_ratio": count(flops, w.tolist()) / most,
                "log_kept_shares": _total(choices, kept, w),
            }
            for name, w in found.items()
        }  # fmt: skip
        best = under["latency"]["log_kept_shares"]
        points = {n: 100 * slope * (best - u["log_kept_shares"]) for n, u in under.items()}
        rows.append({"latency_ratio": ratio, "under": under, "points_behind_latency": points})
    return rows


def _total(choices: WidthChoices, value: list[np.ndarray], widths: np.ndarray) -> float:
    """Sum of the groups' values at these allowed widths."""
    chosen = [own.index(w) for own, w in zip(choices.widths, widths.tolist(), strict=True)]
    return float(sum(v[i] for v, i in zip(value, chosen, strict=True)))


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


def _worth_table(figures: dict[str, Any]) -> Table:
    table = Table(title="accuracy that the kept importance says is lost, in points")
    for column in ("network", "latency share / FLOPs share", "latency", "FLOPs", "uniform"):
        table.add_column(column, justify="right")
    for model, found in figures.items():
        ratios = found["latency_share_over_flops_share"]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        for row in found["worth"]:
            points = row["points_behind_latency"]
            told = (f"{points[name]:.2f}" for name in ("flops", "uniform"))
            table.add_row(model, spread, f"{row['latency_ratio']:.0%}", *told)
    return table


if __name__ == "__main__":
    sys.exit(main())
