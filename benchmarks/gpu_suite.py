"""Everything that needs a GPU, in one command: tables, staircases, prediction, pruning, energy.

``python -m benchmarks.gpu_suite [--device cuda:0] [--out DIR] [--minutes 8]``

Parts are in order of worth, each with a time of its own; measuring stops with it and says so. One
that fails is reported with its error, and the others go on. What a part finds is kept in the
folder as soon as it exists, so the same command again goes on with what is left; with
``--minutes 0`` it only prints the table. ``--device cpu`` runs the same parts on a tiny network,
to exercise them where there is no GPU: its figures mean nothing. See docs/guide/gpu.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from benchmarks import harness
from benchmarks.guarded_parts import (
    Deadline,
    Figures,
    NotHere,
    OutOfTime,
    Part,
    run_parts,
    write_json,
)
from dsa_hw.allocation.allocate import allocate
from dsa_hw.allocation.target_loop import Timed
from dsa_hw.cost.counted import FlopsBudget, count, flops_budget
from dsa_hw.cost.latency.budget import LatencyBudget
from dsa_hw.cost.latency.profiling import CalibratedModel, profile_network
from dsa_hw.deployment.timing import loop_measure, time_networks
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.pipeline.opening import build_model, configured_table, example_for
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.runs.config import Precision, ProfileConfig
from dsa_hw.runs.console import Progress
from dsa_hw.search.settings import SearchSettings
from dsa_hw.worth.importance import AtomImportance
from dsa_hw.worth.values import kept_importance
from profilers.backends import Backend, open_backend
from profilers.errors import BackendUnavailable, MeasuringStopped
from profilers.steps import canonical_layers, sweep_keys
from profilers.table import LatencyTable, NetworkKey
from profilers.timing import Measurement, ratio
from profilers.workers.isolated import Isolated
from profilers.workers.parallel import members_of

NAME = "gpu_suite"
BUDGET_S = {
    "table": 150.0, "prune": 60.0, "flops": 45.0, "energy": 30.0, "overhead": 75.0, "quick": 20.0,
    "dense": 60.0, "other table": 90.0,
}  # fmt: skip
"""The most time of each kind of part. The parts before the other tables have 8.5 minutes at most
and take about 6; each of the other tables goes on where it was stopped."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Args:
        models: the first one is pruned.
        backends: all that are tried; the device's best one goes first.
        networks: whole networks a table, the dense one included.
        targets: parts of the dense latency to prune to.
        step_batch, turns: training batch of the step overhead, and how often it is timed.
    """

    models: tuple[str, ...]
    batches: tuple[int, ...]
    backends: tuple[str, ...]
    precision: Precision
    networks: int
    rounds: int
    targets: tuple[float, ...]
    measure_s: float
    step_batch: int
    turns: int


FULL = Scale(
    models=("resnet50", "resnet18"), batches=(1, 64),
    backends=("tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-tensorrt", "torch",
              "torch-compile"),
    precision="fp16", networks=21, rounds=2, targets=(0.7, 0.5, 0.3), measure_s=5.0,
    step_batch=64, turns=8,
)  # fmt: skip
QUICK = Scale(
    models=("resnet50",), batches=(1,), backends=("torch",), precision="fp16", networks=9,
    rounds=2, targets=(0.5,), measure_s=3.0, step_batch=32, turns=4,
)  # fmt: skip
ON_CPU = Scale(
    models=("cifar_resnet20",), batches=(1,), backends=("onnxruntime", "torch-compile"),
    precision="fp32", networks=4, rounds=2, targets=(0.7,), measure_s=0.2, step_batch=4, turns=2,
)  # fmt: skip


@dataclass(frozen=True)
class Profiled:
    """A network on a backend, measured."""

    model: nn.Module
    graph: DeployedGraph
    backend: Backend
    table: LatencyTable
    latency: CalibratedModel
    seconds: float
    entries: int
    left: int


class Suite:
    """The parts, over one device and folder."""

    def __init__(self, device: str, scale: Scale, folder: Path, progress: Progress) -> None:
        self.device, self.scale, self.folder, self.progress = device, scale, folder, progress
        self._opened: dict[tuple[str | None, int], Backend] = {}
        self._profiled: dict[tuple[str, int, str | None], Profiled] = {}
        self._networks: dict[tuple[str, int], tuple[nn.Module, DeployedGraph]] = {}
        self._absent: dict[str | None, str] = {}

    def parts(self) -> dict[str, Part]:
        """By name, in order of worth; ``best`` is the backend that the device gets by itself."""
        scale, first = self.scale, self.scale.models[0]
        batch = scale.batches[0]

        def part(kind: str, run: Callable[..., Figures], *arguments: Any) -> Part:
            return Part(functools.partial(run, *arguments), BUDGET_S[kind])

        parts = {f"table {first} b{batch} best": part("table", self.table, first, batch, None)}
        for target in scale.targets:
            parts[f"prune {first} to {target:.0%}"] = part("prune", self.prune, target)
        parts["flops against latency"] = part("flops", self.flops_against_latency)
        parts["energy"] = part("energy", self.energy)
        parts["staircases"] = part("quick", self.staircases)
        parts["step overhead"] = part("overhead", self.step_overhead)
        for name in scale.backends:
            parts[f"dense on {name}"] = part("dense", self.dense_on, name)
        parts["layers inside the network"] = part("quick", self.layers_inside)
        for name in (None, *scale.backends):
            for size in scale.batches:
                for model in scale.models:
                    title = f"table {model} b{size} {name or 'best'}"
                    own = part("other table", self.table, model, size, name)
                    parts.setdefault(title, own)
        return parts

    def interrupt(self) -> None:
        """End the worker processes: what waits for them fails, and the next question starts new
        ones. For another thread, when a part does not come back."""
        for backend in list(self._opened.values()):
            for member in members_of(backend):
                if isinstance(member, Isolated):
                    member.interrupt()

    # -- parts -----------------------------------------------------------------------------

    def table(self, model: str, batch: int, backend: str | None, deadline: Deadline) -> Figures:
        """Profile a network; held-out error of predicted against measured over whole networks."""
        found = self._profile(model, batch, backend, deadline)
        figures = self._table_figures(found)
        if (model, batch, backend) != (self.scale.models[0], self.scale.batches[0], None):
            self._release(backend, batch)
        return figures

    def _table_figures(self, found: Profiled) -> Figures:
        calibration = found.latency.calibration
        dense = next(p for p in calibration.points if p.widths == found.graph.dense_widths)
        early = f"; stopped early, {found.left} rounds left" if found.left else ""
        return {
            "summary": f"{dense.measured_ms:.4g} ms dense, held-out error "
            f"{calibration.heldout_mape_pct:.2f}% (max {calibration.heldout_max_pct:.2f}%) over "
            f"{len(calibration.points)} networks{early}",
            "left": found.left,
            "backend": found.backend.name,
            "dense_ms": dense.measured_ms,
            "dense_ci95_ms": list(dense.ci95_ms),
            "heldout_mape_pct": calibration.heldout_mape_pct,
            "heldout_max_pct": calibration.heldout_max_pct,
            "networks": [
                {"predicted_ms": p.predicted_ms, "measured_ms": p.measured_ms,
                 "ci95_ms": list(p.ci95_ms)} for p in calibration.points
            ],
            "steps": found.latency.steps,
            "entries": found.entries,
            "seconds": found.seconds,
            "chosen": list(found.backend.notes()),
            "observations": list(found.backend.observations()),
            "table": found.table.path.name if found.table.path else None,
            "provenance": found.backend.provenance(),
        }  # fmt: skip

    def dense_on(self, name: str, deadline: Deadline) -> Figures:
        """Latency of the dense networks on one backend, without a table; each is kept at once."""
        path = self.folder / f"dense-{name}.json"
        found: Figures = {"networks": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
        networks = found["networks"]
        cases = [(m, size) for size in self.scale.batches for m in self.scale.models]
        left = [(m, size) for m, size in cases if _title(m, size) not in networks]
        try:
            while left and not (networks and deadline.over()):
                model, size = left[0]
                deadline.check(_title(model, size))
                timed = self._dense(name, model, size, deadline)
                networks[_title(model, size)] = {
                    "ms": timed.median_ms, "ci95_ms": list(timed.ci95_ms),
                    "warning": timed.warning,
                }  # fmt: skip
                left.pop(0)
                backend = self.backend(name, size)
                found |= {"provenance": backend.provenance(), "notes": list(backend.notes())}
                write_json(path, found)
        finally:
            for size in self.scale.batches:
                self._release(name, size)
        pairs = ", ".join(f"{title} {v['ms']:.4g} ms" for title, v in networks.items())
        return found | {"summary": pairs, "left": len(left)}

    def _dense(self, name: str, model: str, size: int, deadline: Deadline) -> Measurement:
        _, graph = self._network(self._config(model, size))
        dense: dict[str, bytes | Path] = {"dense": graph.resized(graph.dense_widths)}
        limit_s = min(self.scale.measure_s, deadline.left_s())
        return time_networks(self.backend(name, size), dense, time_limit_s=limit_s)["dense"]

    def prune(self, target: float, deadline: Deadline) -> Figures:
        """To a part of the dense latency, by the closed loop; measured once more at the end."""
        found = self._first(deadline)
        widths, rounds = self._allocated(found, target, deadline)
        networks = {"dense": found.graph.dense_widths, "pruned": widths}
        timed = self._timed(found, networks, deadline)
        value, interval = ratio(timed["pruned"], timed["dense"])
        return {
            "summary": f"{timed['pruned'].median_ms:.4g} ms, {value / target:.3f} of the target, "
            f"{len(rounds)} rounds",
            "target_ratio": target,
            "measured_ratio": value,
            "ratio_ci95": list(interval),
            "over_target": value / target,
            "dense_ms": timed["dense"].median_ms,
            "pruned_ms": timed["pruned"].median_ms,
            "flops_ratio": _flops(found.graph, widths) / _flops(found.graph,
                                                                found.graph.dense_widths),
            "closed_loop": rounds,
            "widths": [int(w) for w in widths],
        }  # fmt: skip

    def flops_against_latency(self, deadline: Deadline) -> Figures:
        """Networks of equal FLOPs: chosen for latency, for FLOPs, and of one keep ratio."""
        found, target = self._first(deadline), self.scale.targets[len(self.scale.targets) // 2]
        by_latency, _ = self._allocated(found, target, deadline)
        share = _flops(found.graph, by_latency) / _flops(found.graph, found.graph.dense_widths)
        step = max(found.latency.steps.values())
        budget, choices = FlopsBudget(share, step).bind(found.graph)
        by_flops = allocate(choices, _values(found, choices), [budget.to("cpu")]).widths
        uniform = _uniform(found.graph, share)
        networks = {
            "dense": found.graph.dense_widths, "latency": by_latency, "flops": by_flops,
            "uniform": uniform,
        }  # fmt: skip
        timed = self._timed(found, networks, deadline)
        dense_flops = _flops(found.graph, found.graph.dense_widths)
        figures: Figures = {
            name: {
                "ms": timed[name].median_ms,
                "ci95_ms": list(timed[name].ci95_ms),
                "flops_ratio": _flops(found.graph, widths) / dense_flops,
                "latency_ratio": ratio(timed[name], timed["dense"])[0],
            }
            for name, widths in networks.items()
        }
        found_ratios = {k: figures[k]["latency_ratio"] for k in ("latency", "flops", "uniform")}
        pairs = ", ".join(f"{name} {value:.3f}" for name, value in found_ratios.items())
        return {"summary": f"at {share:.0%} of the FLOPs, latency left: {pairs}"} | figures

    def energy(self, deadline: Deadline) -> Figures:
        """Millijoules of the card a run, dense and at the middle target."""
        found = self._first(deadline)
        backend = members_of(found.backend)[0]
        if not isinstance(backend, Isolated):
            raise NotHere("energy is counted by NVIDIA cards")
        target = self.scale.targets[len(self.scale.targets) // 2]
        widths, _ = self._allocated(found, target, deadline)
        dense = backend.energy_mj(found.graph.resized(found.graph.dense_widths))
        pruned = backend.energy_mj(found.graph.resized(widths))
        if dense is None or pruned is None:
            raise NotHere("the card does not count its energy, or NVML is absent")
        return {
            "summary": f"{dense:.1f} mJ dense, {pruned:.1f} mJ at {target:.0%} of the latency",
            "dense_mj": dense,
            "pruned_mj": pruned,
        }

    def step_overhead(self, deadline: Deadline) -> Figures:
        """A training step with DSA over one without, masks live; both on the same batch.

        A turn is one cadence of steps, with its validation pass, on either side.
        """
        found = self._first(deadline)
        plain, dsa = self._training(found, False), self._training(found, True)
        turns = []
        for _ in range(self.scale.turns):
            if len(turns) > 1 and deadline.over():
                break
            turns.append((plain(), dsa()))
        plain_ms, dsa_ms = (statistics.median(side) for side in zip(*turns, strict=True))
        value = statistics.median(b / a for a, b in turns)
        return {
            "summary": f"{plain_ms:.3g} ms a training step, {value:.3f} times with DSA",
            "plain_ms": plain_ms,
            "dsa_ms": dsa_ms,
            "ratio": value,
            "turns": len(turns),
        }

    def staircases(self, deadline: Deadline) -> Figures:
        """The sweeps from which the steps were found, one a kind of layer."""
        found = self._first(deadline)
        layers = canonical_layers(layer.spec for layer in found.graph.layers)
        curves = {
            kind: [[k.cout, found.table.measurement(k).median_ms] for k in sweep_keys(spec)]
            for kind, spec in layers.items()
        }
        steps = ", ".join(f"{kind} {step}" for kind, step in found.latency.steps.items())
        return {"summary": f"steps: {steps}", "steps": found.latency.steps, "ms_by_width": curves}

    def layers_inside(self, deadline: Deadline) -> Figures:
        """Each layer's time inside the network by the runtime's profiler, where it has one."""
        found = self._first(deadline)
        backend = members_of(found.backend)[0]
        if not isinstance(backend, Isolated) or not backend.name.startswith("tensorrt"):
            raise NotHere("only tensorrt and tensorrt-rtx profile the layers of a network")
        times = backend.layer_times(found.graph.resized(found.graph.dense_widths))
        by_node: dict[str, float] = times["by_node"]
        slowest = max(by_node, key=lambda name: by_node[name])
        reformat_ms, other_ms = times["reformat_ms"], sum(times["other_ms"].values())
        return {
            "summary": f"{sum(by_node.values()):.4g} ms in {len(by_node)} layers (slowest: "
            f"{slowest}), {reformat_ms:.4g} ms in reformats, {other_ms:.4g} ms unattributed",
        } | times

    # -- what the parts share --------------------------------------------------------------

    def backend(self, name: str | None, batch: int) -> Backend:
        """Opened once.

        Raises:
            NotHere: the runtime does not run on this machine.
        """
        if name in self._absent:
            raise NotHere(self._absent[name])
        if (name, batch) not in self._opened:
            try:
                opened = open_backend(
                    self.device, backend=name, precision=self.scale.precision, batch_size=batch
                )
            except BackendUnavailable as error:
                if name is None:
                    raise
                self._absent[name] = str(error)
                raise NotHere(str(error)) from error
            self._opened[name, batch] = opened
        return self._opened[name, batch]

    def _release(self, name: str | None, batch: int) -> None:
        """End a backend's process: the next one must have the card to itself."""
        backend = self._opened.pop((name, batch), None)
        for key in [k for k in self._profiled if k[1:] == (batch, name)]:
            del self._profiled[key]
        for member in () if backend is None else members_of(backend):
            if isinstance(member, Isolated):
                member.close()

    def _first(self, deadline: Deadline) -> Profiled:
        return self._profile(self.scale.models[0], self.scale.batches[0], None, deadline)

    def _config(self, model: str, batch: int, table: str | None = None) -> ProfileConfig:
        return ProfileConfig(
            device=self.device, precision=self.scale.precision, batch_size=batch, model=model,
            table=table,
        )  # fmt: skip

    def _profile(self, model: str, batch: int, name: str | None, deadline: Deadline) -> Profiled:
        """Measured as far as the time goes; goes on from the table's file.

        Raises:
            OutOfTime: not far enough for a latency model.
        """
        kept = self._profiled.get((model, batch, name))
        if kept is not None and (kept.left == 0 or deadline.over()):
            return kept
        backend = self.backend(name, batch)
        slug = f"{backend.name}-{self.scale.precision}-b{batch}.jsonl"
        config = self._config(model, batch, str(self.folder / "tables" / slug))
        network, graph = self._network(config)
        started = time.perf_counter()
        table = configured_table(config, backend)
        try:
            profiled = profile_network(
                graph, backend, table, networks=self.scale.networks, rounds=self.scale.rounds,
                on_progress=self.progress, stop=deadline.over,
            )  # fmt: skip
        except MeasuringStopped as error:
            raise OutOfTime(str(error)) from error
        if NetworkKey(graph.digest, tuple(graph.dense_widths)) not in table:
            raise OutOfTime("the dense network was not measured in time; the same command goes on")
        found = Profiled(
            network, graph, backend, table, profiled.latency, time.perf_counter() - started,
            len(table.rounds), profiled.collected.left,
        )  # fmt: skip
        self._profiled[model, batch, name] = found
        return found

    def _network(self, config: ProfileConfig) -> tuple[nn.Module, DeployedGraph]:
        """Exported once, whatever backends time it."""
        key = (config.model, config.batch_size)
        if key not in self._networks:
            network, example = build_model(config), example_for(config)
            coupling = find_coupling(network, example)
            graph = DeployedGraph(export_onnx(network, example), coupling, config.precision)
            self._networks[key] = network, graph
        return self._networks[key]

    def _allocated(
        self, found: Profiled, target: float, deadline: Deadline
    ) -> tuple[np.ndarray, list[Figures]]:
        """Widths at a part of the dense latency (kept for the parts that share it)."""
        path = self.folder / f"widths-{target:g}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            return np.array(kept["widths"]), kept["rounds"]
        dense_ms = float(found.latency.model.staircase_ms(
            torch.as_tensor(found.latency.choices.dense, dtype=torch.float32)
        ))  # fmt: skip
        budget, choices = LatencyBudget(found.table, target * dense_ms).bind(found.graph)

        def measure(widths: np.ndarray) -> Timed:
            deadline.check("another round of the closed loop")
            time_limit_s = min(self.scale.measure_s, deadline.left_s())
            return loop_measure(
                found.graph, found.backend, target_ms=None, target_ratio=target,
                time_limit_s=time_limit_s,
            )(widths)  # fmt: skip

        allocation = allocate(choices, _values(found, choices), [budget], measure)
        rounds = [
            {"predicted_ms": r.predicted_ms, "measured_ms": r.timed.measured_ms,
             "target_ms": r.timed.target_ms, "correction": r.correction}
            for r in allocation.rounds
        ]  # fmt: skip
        write_json(path, {"widths": allocation.widths.tolist(), "rounds": rounds})
        return allocation.widths, rounds

    def _timed(self, found: Profiled, networks: dict[str, Any], deadline: Deadline):
        models: dict[str, bytes | Path] = {n: found.graph.resized(w) for n, w in networks.items()}
        time_limit_s = min(2 * self.scale.measure_s, deadline.left_s())
        return time_networks(found.backend, models, time_limit_s=time_limit_s)

    def _training(self, found: Profiled, with_dsa: bool) -> Callable[[], float]:
        """Gives the ms of a training step, over a cadence of them; the search has begun."""
        scale = self.scale
        config = ProfileConfig(model=scale.models[0], batch_size=scale.step_batch)
        device = torch.device(self.device.split(",")[0])
        model, x = build_model(config).to(device), example_for(config).to(device)
        with torch.no_grad():
            classes = model(x[:2]).shape[1]
        y = torch.randint(classes, (len(x),), device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        settings = SearchSettings(warmup=(0.0, 0.0), log_every=10**6)
        pruner = None
        if with_dsa:
            target_ms = 0.5 * max(p.measured_ms for p in found.latency.calibration.points)
            pruner = DSAPruner(
                model, x[: scale.batches[0]], LatencyBudget(found.table, target_ms),
                total_steps=10**4, settings=settings,
            )  # fmt: skip

        def loss() -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return nn.functional.cross_entropy(model(x).float(), y)

        cadence = settings.validation_every  # of a search of 10,000 steps

        def steps() -> float:
            _wait(device)
            started = time.perf_counter()
            for _ in range(cadence):
                loss().backward()
                optimizer.step()
                optimizer.zero_grad()
                if pruner is not None:
                    pruner.step(validation_loss=loss)
            _wait(device)
            return (time.perf_counter() - started) * 1e3 / cadence

        for _ in range(2):  # the search begins at the first cadence
            steps()
        assert pruner is None or pruner.searching
        return steps


def _title(model: str, batch: int) -> str:
    return f"{model} b{batch}"


def _values(found: Profiled, choices: Any) -> list[np.ndarray]:
    coupling = found.graph.coupling
    scores = AtomImportance(found.model, coupling, "filter_l1")().cpu().numpy()
    atoms = [scores[i, : g.atoms] for i, g in enumerate(coupling.groups)]
    return kept_importance(choices, atoms, [len(g.layers) for g in coupling.groups])


def _flops(graph: DeployedGraph, widths: Sequence[int] | np.ndarray) -> float:
    return count(flops_budget(graph, 1.0), [int(w) for w in widths])


def _uniform(graph: DeployedGraph, share: float) -> np.ndarray:
    """One keep ratio for all groups, without regard to steps, at a part of the FLOPs."""
    groups = graph.coupling.groups
    target, low, high = share * _flops(graph, graph.dense_widths), 0.01, 1.0

    def at(keep_ratio: float) -> np.ndarray:
        return np.array([
            g.dense_width if g.frozen else max(1, round(keep_ratio * g.atoms)) * g.atom_channels
            for g in groups
        ])  # fmt: skip

    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _flops(graph, at(middle)) <= target else (low, middle)
    return at(low)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- running ---------------------------------------------------------------------------------


def _report(records: dict[str, Figures], device: str, out: Path, quick: bool) -> None:
    table = Table(title=f"GPU suite on {device}")
    for column in ("part", "", "result", "s"):
        table.add_column(column, justify="right" if column == "s" else "left", overflow="fold")
    for name, record in records.items():
        seconds = record.get("took_s")
        table.add_row(name, record["status"], record["summary"],
                      "" if seconds is None else f"{seconds:.0f}")  # fmt: skip
    tables = [r for r in records.values() if "provenance" in r]
    origin = harness.provenance(tables[0]["provenance"] if tables else {"device": device})
    harness.finish(NAME, harness.Options(quick, out), {"parts": records}, origin, table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda:0", help="cuda:0, cuda:0,cuda:1, or cpu (tiny)")
    parser.add_argument("--quick", action="store_true", help="one network, one backend")
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME, help="folder for all")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="in all; what is left, the next call does"
    )
    parser.add_argument("--only", nargs="*", default=None, help="parts whose name contains one")
    options = parser.parse_args(argv)
    scale = ON_CPU if options.device == "cpu" else QUICK if options.quick else FULL
    if options.device != "cpu":
        from profilers.cards.cuda_device import check_cuda

        try:
            for each in options.device.split(","):
                check_cuda(each)
        except BackendUnavailable as error:
            print(f"{NAME}: {error}", file=sys.stderr)
            return 2
    progress = Progress()
    suite = Suite(options.device, scale, options.out, progress)
    parts = suite.parts()
    if options.only is not None:
        parts = {n: p for n, p in parts.items() if any(word in n for word in options.only)}
    records = run_parts(
        parts, options.out, progress.say, options.minutes, interrupt=suite.interrupt
    )
    _report(records, options.device, options.out, options.quick or options.device == "cpu")
    return 1 if any(r["status"] == "failed" for r in records.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
