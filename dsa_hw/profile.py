"""``python -m dsa_hw.profile``: measure a network's latency table on a device."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsa_hw.runs.config import ProfileConfig
from dsa_hw.runs.options import run_command


def _run(config: ProfileConfig) -> int:
    from dsa_hw.cost.latency.profiling import profile_network
    from dsa_hw.cost.latency.shares import group_shares
    from dsa_hw.network.inventory import fixed_branches_warning, frozen_note, take_inventory
    from dsa_hw.pipeline.opening import (
        build_model,
        configured_backend,
        configured_table,
        example_for,
        unknown_operations_warning,
    )
    from dsa_hw.runs.console import Progress

    progress = Progress()
    backend = configured_backend(config)
    progress.say(f"measuring with {backend.name} on {backend.provenance()['device']}")
    for note in backend.notes():
        progress.say(f"  {note}")
    model, example = build_model(config), example_for(config)
    graph = take_inventory(
        model, example, exclude=config.exclude, precision=config.precision,
        remove_branches=config.remove_branches,
    )  # fmt: skip
    for note in frozen_note(graph):
        progress.say(note)
    for warning in unknown_operations_warning(graph) + fixed_branches_warning(graph):
        progress.say(f"warning: {warning}")
    table = configured_table(config, backend)
    profiled = profile_network(
        graph, backend, table, networks=config.calibration_networks, rounds=config.rounds,
        seed=config.seed, on_progress=progress, on_notice=progress.say,
    )  # fmt: skip
    collected, calibration = profiled.collected, profiled.latency.calibration
    steps = ", ".join(f"{kind} {step}" for kind, step in profiled.latency.steps.items())
    print(
        f"measured {collected.measured} entries in {collected.seconds:.0f} s, "
        f"reused {collected.reused}, unstable {collected.unstable}, "
        f"{collected.disturbed} rounds set aside\n"
        f"steps in channels: {steps}\n"
        f"held-out prediction error on {len(calibration.points)} whole networks: "
        f"{calibration.heldout_mape_pct:.2f}% mean, {calibration.heldout_max_pct:.2f}% max "
        f"(their own rounds differ by {calibration.noise_mape_pct:.2f}%)\n"
        f"table: {table.path} ({len(table.rounds)} entries)"
    )
    shares = sorted(group_shares(graph, profiled.latency), key=lambda s: s.ms_over_flops)
    if len(shares) > 1:
        low, high = shares[0], shares[-1]
        print(
            "share of the milliseconds over share of the FLOPs, by group of channels: "
            f"{low.ms_over_flops:.2f} ({low.name}) to {high.ms_over_flops:.2f} ({high.name}); "
            "where all are near 1, a latency budget gains nothing over a FLOPs budget "
            "with widths on these steps"
        )
    for text in backend.observations():
        print(f"note: {text}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command("profile", ProfileConfig, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
