"""What is known of the device before anything is pruned, and whether the target can be had."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from dsa_hw.cost.budget import BudgetRequest
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.latency.profiling import CalibratedModel, ProfiledNetwork, profile_network
from dsa_hw.deployment.timing import resolve_target
from dsa_hw.errors import InfeasibleBudget, UserError
from dsa_hw.pipeline import opening
from dsa_hw.pipeline.opening import Dense, configured_table
from dsa_hw.runs.budgets import BUDGETS, BudgetSetting
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.console import Progress
from profilers.backends import Backend
from profilers.table import LatencyTable


@dataclass(frozen=True)
class KnownDevice:
    """What is known of the device before anything is pruned.

    Args:
        backend: None in processes that do not measure.
        target_ms: as it looks now; None without a latency target.
        seconds: that measuring it took.
    """

    backend: Backend | None
    table: LatencyTable
    profiled: ProfiledNetwork
    target_ms: float | None
    seconds: float


def know_device(config: PruneConfig, dense: Dense, progress: Progress) -> KnownDevice:
    backend = opening.configured_backend(config)
    started = time.perf_counter()
    table = configured_table(config, backend)
    progress.say(f"latency table: {table.path}")
    profiled = profile_network(
        dense.graph, backend, table, networks=config.calibration_networks, rounds=config.rounds,
        seed=config.seed, on_progress=progress, on_notice=progress.say,
    )  # fmt: skip
    if disturbed := profiled.collected.disturbed:
        progress.say(
            f"{disturbed} rounds of the profile do not count: other programs had the processor, or "
            "the machine was slower than it can be"
        )
    target_ms = check_target(config, profiled)
    return KnownDevice(backend, table, profiled, target_ms, time.perf_counter() - started)


def check_target(config: PruneConfig, profiled: ProfiledNetwork) -> float | None:
    """The latency target in ms as it looks before anything is pruned; None without one.

    Raises:
        UserError: it is at or above the dense latency.
        InfeasibleBudget: it is below the least this network can have.
    """
    if "latency" not in config.budget_values:
        return None
    latency = profiled.latency
    dense_ms = staircase_latency_ms(profiled, latency.choices.dense)
    least_ms = staircase_latency_ms(profiled, latency.choices.least)
    target_ms = resolve_target(config.target_ms, config.target_ratio, dense_ms)
    if target_ms >= dense_ms:
        raise UserError(
            f"the target of {target_ms:.4g} ms is not below the dense network's latency here, "
            f"{dense_ms:.4g} ms: there is nothing to prune"
        )
    if target_ms < least_ms:
        raise InfeasibleBudget(
            f"the target of {target_ms:.4g} ms cannot be reached: the least that {config.model} "
            f"can have here is {least_ms:.4g} ms ({least_ms / dense_ms:.2f} of its dense "
            f"{dense_ms:.4g} ms), with every group at its smallest width"
        )
    return target_ms


def budget_requests(
    config: PruneConfig,
    target_ms: float | None,
    table: LatencyTable,
    choices: WidthChoices,
    latency: CalibratedModel | None = None,
) -> list[BudgetRequest]:
    """Everything that the configuration limits.

    Args:
        target_ms: of the latency budget, where there is one.
        choices: widths on the device's steps. What is limited beside latency does not change them.
        latency: the network's model, so that nothing fits the table again.

    Raises:
        UserError: a budget's factory cannot be imported.
    """
    requests = []
    for name, value in config.budget_values.items():
        value = target_ms if name == "latency" else value
        assert value is not None  # the configuration has been checked
        make = BUDGETS.find(name)
        requests.append(make(BudgetSetting(name, value, table, choices, latency)))
    return requests


def staircase_latency_ms(profiled: ProfiledNetwork, widths: np.ndarray) -> float:
    model = profiled.latency.model
    return float(model.staircase_ms(torch.as_tensor(widths, dtype=torch.float32)))
