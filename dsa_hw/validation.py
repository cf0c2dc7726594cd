"""Time deployed networks against each other, and check that they compute the right thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from dsa_hw.agreement import AGREEMENT, disagreement, random_batches
from dsa_hw.closed_loop import Measure, Timed
from dsa_hw.deployed import DeployedGraph, export_onnx
from dsa_hw.errors import UserError
from dsa_hw.search import outputs_of
from profilers.backends import Backend
from profilers.collect import References, threads_of
from profilers.host import Patience
from profilers.timing import Measurement, SamplePlan, measure_interleaved, paired

PLAN = SamplePlan(sample_ms=8.0, samples=3, warmup_ms=12.0)
"""Short rounds: the machine's speed drifts within seconds, so what is compared must alternate
faster than that. Sessions are opened and closed for each, or their threads would spin into the
next one's turn; and each round is a process of its own, or one layout of memory would decide."""


def time_networks(
    backend: Backend,
    models: dict[str, bytes | Path],
    *,
    half_width_pct: float = 0.6,
    time_limit_s: float = 20.0,
    seed: int = 0,
    on_round: Callable[[int], None] | None = None,
    fast_memory_ms: float | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> dict[str, Measurement]:
    """Interleaved measurements of whole networks, every round in a process of its own.

    Args:
        fast_memory_ms: the memory reference's time in the machine's fast state, where a table knows
            it (``LatencyTable.fast_memory_ms``).
        on_notice: told when other programs do not leave the processors alone.
    """
    return measure_interleaved(
        {name: lambda m=model: backend.open(m) for name, model in models.items()},
        plan=PLAN,
        min_rounds=15,
        max_rounds=200,
        half_width_pct=half_width_pct,
        time_limit_s=time_limit_s,
        seed=seed,
        before_round=backend.renew,
        on_round=on_round,
        memory=References(backend).memory,
        fast_memory_ms=fast_memory_ms,
        wait=Patience(threads_of(backend), on_notice=on_notice).wait,
    )


def loop_measure(
    graph: DeployedGraph,
    backend: Backend,
    *,
    target_ms: float | None,
    target_ratio: float | None,
    time_limit_s: float = 20.0,
    on_measured: Callable[[np.ndarray, dict[str, Measurement]], None] | None = None,
) -> Measure:
    """The closed loop's measurement: the dense network and the candidate, in turn.

    Args:
        target_ms, target_ratio: one of them; a ratio is of the dense network measured beside.
    """
    dense = graph.resized(graph.dense_widths)

    def measure(widths: np.ndarray) -> Timed:
        models: dict[str, bytes | Path] = {"dense": dense, "pruned": graph.resized(widths)}
        found = time_networks(backend, models, time_limit_s=time_limit_s)
        if on_measured:
            on_measured(widths, found)
        return timed_to_target(found, target_ms, target_ratio)

    return measure


def timed_to_target(
    found: Mapping[str, Measurement], target_ms: float | None, target_ratio: float | None
) -> Timed:
    """``"pruned"`` against the target; by pairs with ``"dense"`` where that is a part of it."""
    pruned = found["pruned"] if target_ms else paired(found["pruned"], found["dense"])
    return Timed(
        measured_ms=pruned.median_ms,
        ci95_ms=pruned.ci95_ms,
        target_ms=resolve_target(target_ms, target_ratio, found["dense"].median_ms),
        dense_ms=found["dense"].median_ms,
    )


@dataclass(frozen=True, slots=True)
class Validated:
    """A finished run's network, timed again.

    Args:
        dense_ms: of the dense network beside it; None where the target was not a part of it.
        target_ms: as it holds now; None without a latency target.
    """

    pruned: Measurement
    dense_ms: float | None
    target_ms: float | None


def validate_run(
    backend: Backend,
    pruned: Path,
    dense: bytes | None,
    *,
    target_ms: float | None,
    target_ratio: float | None,
    time_limit_s: float,
) -> Validated:
    """Time a run's network as the run did: in turn with the dense one, if that was its measure.

    The machine's speed then cancels, which in a number of milliseconds it does not.

    Args:
        target_ms: at pruning; a ``target_ratio`` goes before it.
    """
    if dense is None or target_ratio is None:
        alone = time_networks(backend, {"pruned": pruned}, time_limit_s=time_limit_s)
        return Validated(alone["pruned"], None, target_ms)
    models: dict[str, bytes | Path] = {"dense": dense, "pruned": pruned}
    found = time_networks(backend, models, time_limit_s=time_limit_s)
    dense_ms = found["dense"].median_ms
    return Validated(paired(found["pruned"], found["dense"]), dense_ms, target_ratio * dense_ms)


def resolve_target(target_ms: float | None, target_ratio: float | None, dense_ms: float) -> float:
    """The target in ms, from either of its forms."""
    if target_ms is not None:
        return target_ms
    assert target_ratio is not None
    return target_ratio * dense_ms


def export_checked(
    model: nn.Module, example_inputs: torch.Tensor, path: Path, backend: Backend
) -> float:
    """Write ``model`` as ONNX and compare the runtime with PyTorch.

    Returns:
        The largest absolute difference of the outputs on random inputs, over their standard
        deviation.

    Raises:
        UserError: they differ by more than ``AGREEMENT`` of it: what was exported is not the
            network. At int8 there is no limit: the scales are placeholders until calibrated.
    """
    exported = export_onnx(model, example_inputs)
    partial = path.with_name(f".{path.name}.new")
    onnx.save(exported, partial)
    batches = random_batches(example_inputs.float())
    expected = [outputs_of(model, batch).float() for batch in batches]
    got = [torch.from_numpy(backend.outputs(partial, b.cpu().numpy())) for b in batches]
    difference = disagreement(expected, got)
    limit = _agreement(backend.provenance())
    if limit is not None and not difference <= limit:
        raise UserError(
            f"the exported network does not compute what PyTorch computes: outputs differ by "
            f"{difference:.3g} standard deviations of them ({path})"
        )
    partial.replace(path)
    return difference


def _agreement(provenance: Mapping[str, str | int]) -> float | None:
    precision = str(provenance["precision"])
    on_cuda = provenance["driver"] != "none"
    return AGREEMENT.get("fp16" if precision == "fp32" and on_cuda else precision)


def conv_shapes(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Shapes of the weights of all convolutions and linear layers, sorted."""
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    return sorted(shapes[n.input[1]] for n in nodes)
