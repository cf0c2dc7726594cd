"""Comparisons: every method comes to the target, and a sweep does each run once."""

from __future__ import annotations

import csv
import itertools
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from colours import coloured
from conftest import Residual
from fake_device import FakeDevice, FakeRuntime
from filelock import FileLock
from safetensors.torch import load_file
from test_latency_model import reference_table
from torch import Tensor, nn

from dsa_hw import compare
from dsa_hw.allocation.target_loop import Timed
from dsa_hw.comparison import cell_run, cells, sweep
from dsa_hw.comparison.cell_run import give_way
from dsa_hw.comparison.methods import find_method
from dsa_hw.comparison.methods.gates import TaylorGates
from dsa_hw.comparison.methods.halp import Knapsack, choose
from dsa_hw.comparison.methods.mdp import WidthProgram
from dsa_hw.comparison.methods.netadapt import shrunken
from dsa_hw.comparison.methods.to_target import reach_target
from dsa_hw.comparison.shared_training import WAITING
from dsa_hw.cost.counted import uniform_choices
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.cost.latency.profiling import ProfiledNetwork, profile_network
from dsa_hw.data import DataSplits
from dsa_hw.errors import InfeasibleBudget, UserError
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.forward import outputs_of
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.removal import remove_channels
from dsa_hw.pipeline import opening, run
from dsa_hw.runs.config import CompareConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.folder import RunFolder, Stopwatch
from dsa_hw.runs.options import parse
from dsa_hw.surgery.channels import keep_most_important

GAVE_WAY: dict[int, Stopwatch] = {}
"""Watches of the runs whose batches have asked whether another process times."""
METHODS = [
    "dsa-latency", "dsa-flops", "dsa-flops-by-8", "uniform", "magnitude", "taylor", "halp",
    "mdp", "netadapt",
]  # fmt: skip


class Small(nn.Module):
    """A stem, a residual block with a depthwise convolution, a head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.a = nn.Conv2d(32, 48, 1, bias=False)
        self.a_bn = nn.BatchNorm2d(48)
        self.dw = nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False)
        self.dw_bn = nn.BatchNorm2d(48)
        self.b = nn.Conv2d(48, 32, 3, padding=1, bias=False)
        self.b_bn = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        y = torch.relu(self.a_bn(self.a(x)))
        y = torch.relu(self.dw_bn(self.dw(y)))
        x = torch.relu(x + self.b_bn(self.b(y)))
        return self.head(x.mean((2, 3)))


def small(num_classes: int = 10) -> nn.Module:
    """As ``--model test_compare:small``."""
    return Small(num_classes)


def colours(root: Path | None = None) -> DataSplits:
    """As ``--data test_compare:colours``: ten colours under noise, 16x16."""
    return coloured(10, 16, 320, 200)


EXAMPLE = torch.zeros(1, 3, 16, 16)


def arguments(out: Path) -> list[str]:
    return [
        "--model", "test_compare:small", "--data", "test_compare:colours",
        "--train-batch-size", "20", "--epochs", "3", "--finetune-epochs", "1", "--lr", "0.05",
        "--calibration-networks", "8", "--rounds", "2", "--table", str(out.parent / "fake.jsonl"),
        "--target-ratios", "0.6", "--seeds", "0", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished sweep of all methods on the fake device."""
    waited = cell_run.give_way

    def noted(timing: FileLock, watch: Stopwatch) -> None:
        assert Path(timing.lock_file).parent.name == "sweep"
        GAVE_WAY.setdefault(id(watch), watch)  # kept, so that no other gets its id
        waited(timing, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_run, "give_way", noted)
        patch.setattr(sweep, "configured_backend", lambda config: FakeRuntime())
        patch.setattr(run, "write_run_report", lambda folder: None)  # tested elsewhere
        out = tmp_path_factory.mktemp("compare") / "sweep"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the network is too small to share
        assert compare.main([*arguments(out), "--methods", "dsa", *METHODS[2:]]) == 0
        patch.setattr(cell_run, "give_way", waited)
        yield out
        torch.set_num_threads(threads)


def test_every_method_ends_at_the_target_with_what_it_learned(swept: Path) -> None:
    result = json.loads((swept / "result.json").read_text())
    assert [c["method"] for c in result["cells"]] == METHODS
    for cell in result["cells"]:
        assert cell["infeasible"] is None
        # this network has few widths: no method is over its target, and none wastes a quarter
        assert 0.45 < cell["ratio"] <= 0.6 * 0.993, cell["method"]
        assert cell["accuracy"] > 0.3, cell["method"]  # ten classes
    for name in METHODS:
        cell = json.loads((swept / "cells" / f"{name}-60pct-seed0" / "result.json").read_text())
        difference = cell["pruned"]["masked_vs_pruned_max_abs"]
        # the real library's surgery and this project's agree, and both are the masked network
        assert (difference is None) == (name == "netadapt")
        assert difference is None or difference <= 1e-4
    lines = list(csv.DictReader((swept / "cells.csv").read_text().splitlines()))
    assert [float(x["accuracy"]) for x in lines] == [c["accuracy"] for c in result["cells"]]


def test_eight_channels_where_the_device_has_steps_of_sixteen(tmp_path: Path) -> None:
    def charge(cin: int, cout: int, pixels: int, taps: int) -> float:
        up = [math.ceil(c / 16) * 16 for c in (cin, cout)]
        return 0.002 + 2e-8 * up[0] * up[1] * pixels * taps

    out = tmp_path / "sweep"
    argv = [*arguments(out), "--budgets", "flops", "--methods", "dsa", "dsa-flops-by-8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "configured_backend", lambda config: FakeRuntime(charge=charge))
        patch.setattr(run, "write_run_report", lambda folder: None)  # tested elsewhere
        assert compare.main(argv) == 0
    widths = {}
    for name in ("dsa-flops", "dsa-flops-by-8"):
        cell = json.loads((out / "cells" / f"{name}-60pct-seed0" / "result.json").read_text())
        widths[name] = [g["width"] for g in cell["groups"] if g["frozen"] is None]
        assert cell["ratio"]["measured"] <= 0.6
    assert all(w % 16 == 0 for w in widths["dsa-flops"])
    assert all(w % 8 == 0 for w in widths["dsa-flops-by-8"])
    # What it may choose, not what it chose: of two widths on one step the larger has more FLOPs.
    graph = DeployedGraph(export_onnx(small(), EXAMPLE), find_coupling(small(), EXAMPLE))
    offered = uniform_choices(graph, 8).widths
    assert any(w % 16 for own in offered for w in own)
    assert set(widths["dsa-flops-by-8"]) <= {w for own in offered for w in own}


def test_a_finished_run_never_runs_twice(swept: Path) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in swept.glob("cells/*/result.json")}
    assert len(stamps) == len(METHODS) + 1
    timed = {p: p.stat().st_mtime_ns for p in swept.glob("timing/*.json")}
    assert compare.main([*arguments(swept), "--methods", "dsa", "mdp"]) == 0
    assert {p: p.stat().st_mtime_ns for p in swept.glob("cells/*/result.json")} == stamps
    assert {p: p.stat().st_mtime_ns for p in swept.glob("timing/*.json")} == timed
    shown = json.loads((swept / "result.json").read_text())
    assert [m["name"] for m in shown["methods"]] == ["dsa-latency", "dsa-flops", "mdp"]


def test_a_run_in_other_hands_is_left_alone(swept: Path, capsys) -> None:
    """A lock held elsewhere means that someone is at it: it is named, not done."""
    name = "uniform-80pct-seed0"
    more = [*arguments(swept), "--methods", "uniform", "--target-ratios", "0.8"]
    with FileLock(swept / "cells" / f"{name}.lock"):
        assert compare.main(more) == 0
    assert name in capsys.readouterr().out
    assert not (swept / "cells" / name).exists()


def test_another_network_is_refused_in_the_same_folder(swept: Path, capsys) -> None:
    assert compare.main([*arguments(swept), "--epochs", "4"]) == 2
    assert "already holds another run (epochs: 3 there, 4 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs one of --targets-ms and --target-ratios"),
        (["--targets-ms", "-1"], "targets-ms is -1.0"),
        (["--target-ratios", "0.5", "1.5"], "target-ratios is 1.5"),
        (["--target-ratios", "0.5", "--methods", "magic"], "magic"),
        (["--target-ratios", "0.5", "--seeds", "1", "1"], "seeds is (1, 1)"),
        (["--target-ratios", "0.5", "--epochs", "0"], "epochs is 0"),
        (["--target-ratios", "0.5", "--from-dense", "1", "--pretrained", "true"], "from-dense"),
    ],
)
def test_bad_input(argv: list[str], message: str, capsys, tmp_path: Path) -> None:
    assert compare.main([*argv, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_plan_is_methods_times_targets_times_seeds_and_a_dense_run_a_seed() -> None:
    config = parse("compare", CompareConfig, [
        "--target-ratios", "0.3", "0.7", "--seeds", "4", "5", "--budgets", "flops",
        "--methods", "dsa", "halp",
    ])  # fmt: skip
    names = [c.name for c in cells.plan(config)]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * 2)
    assert names[:3] == ["dense-seed4", "dsa-flops-70pct-seed4", "halp-70pct-seed4"]
    cell = cells.run_config(config, cells.plan(config)[-1])
    assert (cell.seed, cell.target_ratio, cell.target_ms) == (5, 0.3, None)


def test_runs_from_dense_networks_have_as_many_updates(tmp_path: Path, swept: Path) -> None:
    """Uniform widths are trained from scratch for as long as both trainings of the others."""
    out = tmp_path / "sweep"
    argv = [*arguments(out), "--from-dense", "2", "--methods", "dsa", "uniform", "mdp"]
    argv += ["--budgets", "latency", "--table", str(swept.parent / "fake.jsonl")]
    config = parse("compare", CompareConfig, argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "configured_backend", lambda config: FakeRuntime())
        patch.setattr(run, "write_run_report", lambda folder: None)  # tested elsewhere
        assert compare.main(argv) == 0
    dense = load_file(out / "cells" / "dense-seed0" / "dense.safetensors")
    updates = {"dense": int(dense["stem_bn.num_batches_tracked"])}
    for cell in cells.plan(config)[1:]:
        weights = load_file(cell.folder(out) / "weights.safetensors")
        updates[cell.method] = int(weights["stem_bn.num_batches_tracked"])
        started = opening.build_model(cells.run_config(config, cell), 10).state_dict()
        same = all(torch.equal(started[name], dense[name]) for name in dense)
        assert same == (cell.method != "uniform")
    whole = updates.pop("dense") // 2 * (2 + 3)
    assert updates == {"dsa-latency": whole, "uniform": whole, "mdp": whole}
    assert json.loads((out / "result.json").read_text())["from_dense"] == 2
    assert "3 epochs from a dense network trained for 2" in (out / "report.html").read_text()


def test_a_seeds_dense_network_is_there_when_its_runs_begin(tmp_path: Path) -> None:
    config = parse("compare", CompareConfig, [
        "--target-ratios", "0.5", "--seeds", "4", "5", "6", "--methods", "mdp", "--from-dense",
        "2", "--out", str(tmp_path),
    ])  # fmt: skip
    planned = cells.plan(config)
    assert [c.name for c in planned] == [
        "dense-seed4", "dense-seed5", "mdp-50pct-seed4", "dense-seed6", "mdp-50pct-seed5",
        "mdp-50pct-seed6",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no dense network to start from"):
        sweep._wait_for_dense(config, planned[2], Progress(silent=True))


# -- the solvers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled() -> ProfiledNetwork:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(1, 3, 24, 24)
    graph = DeployedGraph(export_onnx(model, x), find_coupling(model, x))
    return profile_network(graph, FakeDevice(), reference_table(), networks=10, rounds=2)


def all_widths(profiled: ProfiledNetwork) -> np.ndarray:
    return np.array(list(itertools.product(*profiled.latency.choices.widths)))


@torch.no_grad()
def staircase_ms(profiled: ProfiledNetwork, widths: np.ndarray) -> np.ndarray:
    rows = torch.as_tensor(widths, dtype=torch.float32)
    return profiled.latency.model.staircase_ms(rows).double().numpy()


@pytest.mark.parametrize("share", [0.45, 0.6, 0.85])
def test_integer_program_finds_what_enumeration_finds(
    profiled: ProfiledNetwork, share: float, rng: np.random.Generator
) -> None:
    choices = profiled.latency.choices
    values = [np.cumsum(rng.random(len(w))) for w in choices.widths]
    every = all_widths(profiled)
    times = staircase_ms(profiled, every)
    limit_ms = share * times.max()
    index = np.array(list(itertools.product(*(range(len(w)) for w in choices.widths))))
    total = np.sum([v[column] for v, column in zip(values, index.T, strict=True)], axis=0)
    # the solver stops within its gap of 0.1%, and its feasibility tolerance is 1e-6
    best = total[times <= limit_ms].max()
    found = WidthProgram(choices, values, profiled.latency.model).within(limit_ms)
    row = int(np.flatnonzero((every == found).all(1))[0])
    assert times[row] <= limit_ms * (1 + 1e-5)
    assert total[row] >= best * (1 - 2e-3)


def test_integer_program_says_when_nothing_fits(profiled: ProfiledNetwork) -> None:
    choices = profiled.latency.choices
    program = WidthProgram(choices, [np.ones(len(w)) for w in choices.widths],
                           profiled.latency.model)  # fmt: skip
    least = staircase_ms(profiled, choices.least[None])[0]
    with pytest.raises(InfeasibleBudget, match="no widths within"):
        program.within(0.9 * least)


def test_knapsack_is_exact_to_its_bins(rng: np.random.Generator) -> None:
    for _ in range(20):
        values = [np.cumsum(rng.random(4)) for _ in range(4)]
        costs = [np.concatenate([[0.0], np.cumsum(rng.random(3))]) for _ in range(4)]
        capacity = float(rng.uniform(0.5, 6.0))
        options = np.array(list(itertools.product(range(4), repeat=4)))
        value = np.sum([v[column] for v, column in zip(values, options.T, strict=True)], axis=0)
        cost = np.sum([c[column] for c, column in zip(costs, options.T, strict=True)], axis=0)
        picked = choose(values, costs, capacity)
        row = int(np.flatnonzero((options == picked).all(1))[0])
        assert cost[row] <= capacity
        # four costs rounded up to 1/2000 of the capacity each
        assert value[row] >= value[cost <= capacity * (1 - 4 / 2000)].max() - 1e-12


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_knapsack_leaves_no_chunk_that_fits(
    profiled: ProfiledNetwork, share: float, rng: np.random.Generator
) -> None:
    """Whatever is within the limit by the whole model, not by the knapsack's own sum."""
    choices, graph = profiled.latency.choices, profiled.latency.model.graph
    atoms = [np.sort(rng.random(g.atoms))[::-1] for g in graph.coupling.groups]
    budget = ModelledLatency(profiled.latency.model, 1.0)
    bench = SimpleNamespace(
        choices=choices, budget=budget, graph=graph,
        modelled_ms=lambda widths: staircase_ms(profiled, widths),
    )  # fmt: skip
    limit_ms = share * float(staircase_ms(profiled, choices.dense[None])[0])
    found = Knapsack(cast(Any, bench), choices.dense, atoms).within(limit_ms)
    assert staircase_ms(profiled, found[None])[0] <= limit_ms
    for group, offered in enumerate(choices.widths):
        for width in [w for w in offered if w > found[group]][:1]:
            wider = found.copy()
            wider[group] = width
            assert staircase_ms(profiled, wider[None])[0] > limit_ms


def test_own_solvers_close_the_loop_on_a_slower_device(profiled: ProfiledNetwork) -> None:
    """Networks run 15% slower than predicted: measured at the target all the same."""
    every = all_widths(profiled)
    times = staircase_ms(profiled, every)
    target_ms = 0.6 * times.max()

    def solve(limit_ms: float) -> np.ndarray:
        return every[np.where(times <= limit_ms, times, -np.inf).argmax()]

    def measure(widths: np.ndarray) -> Timed:
        ms = 1.15 * float(staircase_ms(profiled, widths[None])[0])
        return Timed(ms, (ms, ms), target_ms)

    budget = ModelledLatency(profiled.latency.model, target_ms)
    allocation = reach_target(solve, budget, measure)
    assert len(allocation.rounds) > 1
    chosen = allocation.chosen
    assert chosen is not None
    assert 0.963 <= chosen.use <= 0.998


def test_every_network_has_had_as_many_updates(swept: Path) -> None:
    """Batch-norms count them; 320 images in batches of 20, three epochs."""
    for cell in json.loads((swept / "result.json").read_text())["cells"]:
        weights = load_file(swept / "cells" / cell["cell"] / "weights.safetensors")
        counted = {int(v) for k, v in weights.items() if k.endswith("num_batches_tracked")}
        assert counted == {3 * 16}, (cell["method"], counted)


# -- the parts ---------------------------------------------------------------------------------


def test_training_gives_way_to_another_process_that_times(tmp_path: Path) -> None:
    """No batch while it does, and the wait counts apart."""
    watch = Stopwatch(RunFolder(tmp_path))
    timing = FileLock(tmp_path / "timing.lock")
    other = FileLock(tmp_path / "timing.lock")  # as another process has it
    seen = threading.Event()

    def batch() -> None:
        with watch.measure("search"):
            give_way(timing, watch)
            seen.set()

    other.acquire()
    training = threading.Thread(target=batch)
    training.start()
    assert not seen.wait(0.5)
    other.release()
    assert seen.wait(5)
    training.join()
    assert watch.seconds[WAITING] >= 0.5 > watch.seconds["search"]
    with timing:  # one's own timing is no hindrance
        give_way(timing, watch)
        assert timing.is_locked


def test_every_run_of_a_sweep_gives_way(swept: Path) -> None:
    runs = [p.parent for p in swept.glob("cells/*/result.json")]
    assert len(GAVE_WAY) == len(METHODS) + 1 == len(runs)


def test_gates_measure_the_first_order_change_of_the_loss(
    residual: nn.Module, images: Tensor
) -> None:
    """Closing a gate by a little changes the loss by that much of the importance."""
    model = residual.double().eval()
    x = images.double()
    coupling = find_coupling(model, x)
    gates = TaylorGates(model, coupling, x)
    model(x).square().mean().backward()
    gates.note()
    importance = gates.importance()
    for group, atom in ((0, 0), (1, 5)):
        losses = []
        for value in (1 + 1e-3, 1 - 1e-3):
            kept = torch.ones(importance.shape, dtype=torch.float64)
            kept[group, atom] = value
            gates.close(kept)
            losses.append(float(model(x).square().mean().detach()))
        slope = abs(losses[0] - losses[1]) / 2e-3
        assert importance[group, atom] == pytest.approx(slope, rel=1e-3)  # gates are float32
    gates.remove()


def test_cutting_twice_is_cutting_once(residual: nn.Module, images: Tensor) -> None:
    """The coupling of a small network, derived rather than traced, cuts it rightly again."""
    coupling = find_coupling(residual, images)
    rng = np.random.default_rng(3)
    scores = [rng.random(g.atoms) for g in coupling.groups]
    halves = [max(1, g.atoms // 2) * g.atom_channels if g.frozen is None else g.dense_width
              for g in coupling.groups]  # fmt: skip
    most = [g.dense_width if w == g.dense_width else w + 2 * g.atom_channels
            for g, w in zip(coupling.groups, halves, strict=True)]  # fmt: skip
    first = keep_most_important(coupling, most, scores)
    middle = remove_channels(residual, coupling, first)
    again = shrunken(coupling, first)
    left = [s[k] for s, k in zip(scores, first, strict=True)]
    twice = remove_channels(middle, again, keep_most_important(again, halves, left))
    once = remove_channels(residual, coupling, keep_most_important(coupling, halves, scores))
    torch.testing.assert_close(outputs_of(twice, images), outputs_of(once, images))
    traced = find_coupling(middle, images)
    assert [g.dense_width for g in again.groups] == [g.dense_width for g in traced.groups]


def test_methods_are_known_by_the_names_of_the_configuration() -> None:
    names = set(METHODS) - {"dsa-latency"}
    assert len({find_method(n).title for n in names}) == len(names)
    with pytest.raises(UserError, match="seeds"):
        CompareConfig(target_ratios=(0.5,), seeds=())
