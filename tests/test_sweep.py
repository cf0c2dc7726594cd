"""A sweep's harness: what runs share, what goes on when one breaks off, who trains for how long."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fake_device import FakeRuntime
from test_compare import arguments
from torch import Tensor

from benchmarks import allocation, flow_cost
from benchmarks.compare_methods import seed_by_seed, together
from benchmarks.methods import Bench
from dsa_hw import compare
from dsa_hw.comparison import cells, sweep
from dsa_hw.comparison.methods.uniform import Uniform
from dsa_hw.comparison.shared_training import SHARED, SharedTraining
from dsa_hw.comparison.summary import COLUMNS
from dsa_hw.errors import RunFolderError, UserError
from dsa_hw.pipeline import opening, run
from dsa_hw.runs.config import CompareConfig, PruneConfig
from dsa_hw.runs.folder import RunFolder, Stopwatch


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "configured_backend", lambda config: FakeRuntime())
    monkeypatch.setattr(run, "write_run_report", lambda folder: None)


def test_parts_of_a_run_add_up_to_the_whole(tmp_path: Path) -> None:
    """Whatever is measured inside something else is counted once."""
    ticks = iter(range(100))
    watch = Stopwatch(RunFolder(tmp_path), clock=lambda: float(next(ticks)))
    with watch.measure("search"):  # from 0 to 7
        with watch.measure("search"), watch.measure("validate"):  # 1 to 4, in it 2 to 3
            pass
        with watch.measure("validate"):  # 5 to 6
            pass
    assert watch.seconds == {"search": 5.0, "validate": 2.0}
    assert Stopwatch(RunFolder(tmp_path)).seconds == watch.seconds


def test_shared_training_happens_once_and_is_charged_to_all(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Tensor]:
        made.append(len(made))
        return {"weights": torch.full((2,), 7.0)}

    watches = []
    for number in range(2):
        folder = RunFolder(tmp_path / str(number))
        folder.path.mkdir()
        ticks = iter(range(100))
        watches.append(Stopwatch(folder, clock=lambda t=ticks: float(next(t))))
        state = SharedTraining(tmp_path, 3, watches[-1])("dense", make)
        assert state["weights"].tolist() == [7.0, 7.0]
    assert made == [0]
    assert [w.seconds[SHARED] for w in watches] == [1.0, 1.0]
    SharedTraining(tmp_path, 4, watches[0])("dense", make)
    assert made == [0, 1]  # another seed's is another


@pytest.mark.usefixtures("fake")
def test_one_method_that_breaks_off_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*arguments(tmp_path / "sweep"), "--methods", "uniform", "magnitude"]
    with monkeypatch.context() as broken:

        def refuse(self: Uniform, bench: object) -> None:
            raise RuntimeError("the runtime went away")

        broken.setattr(Uniform, "make", refuse)
        assert compare.main(argv) == 2
    assert "1 run failed (uniform-60pct-seed0: RuntimeError: the runtime went away)" in (
        capsys.readouterr().err
    )
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert [c["method"] for c in result["cells"]] == ["magnitude"]
    assert result["unfinished"] == ["uniform-60pct-seed0"]
    trace = tmp_path / "sweep" / "cells" / "uniform-60pct-seed0.error"
    assert "in refuse" in trace.read_text()
    assert compare.main(argv) == 0
    assert not trace.exists()
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert (result["unfinished"], result["failed"]) == ([], {})


@pytest.mark.usefixtures("fake")
def test_a_stopped_sweep_has_a_report_of_what_it_did_and_shares_its_dense_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    argv = [*arguments(out), "--methods", "magnitude", "--target-ratios", "0.8", "0.6", "0.7"]
    done = sweep._work

    def until_the_last(config: CompareConfig, cell: cells.Cell, *rest: object) -> None:
        if cell.target is not None and cell.target.ratio == 0.6:
            raise KeyboardInterrupt
        done(config, cell, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(sweep, "_work", until_the_last)
    assert compare.main(argv) == 130
    result = json.loads((out / "result.json").read_text())
    assert [c["target"] for c in result["cells"]] == ["80%", "70%"]
    assert (out / "report.html").is_file()
    trained = [(out / "cells" / c["cell"] / "checkpoints/search.pt").exists()
               for c in result["cells"]]  # fmt: skip
    assert trained == [True, False]
    own = [json.loads((out / "cells" / c["cell"] / "result.json").read_text())["seconds"]
           for c in result["cells"]]  # fmt: skip
    shared = json.loads((out / "cells" / result["cells"][0]["cell"] / "seconds.json").read_text())
    assert all(seconds["search"] >= shared[SHARED] for seconds in own)


@pytest.mark.usefixtures("fake")
def test_a_sweep_killed_while_profiling_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    def reached(*args: object, **options: object) -> None:
        raise UserError("profiling again")

    for stand_in, code in ((killed, 130), (reached, 2)):
        monkeypatch.setattr(sweep, "profile_network", stand_in)
        assert compare.main(arguments(tmp_path / "sweep")) == code
    assert "profiling again" in capsys.readouterr().err


def test_the_device_is_looked_at_before_network_and_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--device", "toaster", "--model", "no_such_network", "--target-ratios", "0.5"]
    assert compare.main([*argv, "--out", str(tmp_path / "x")]) == 2
    assert "toaster" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("asked", "shape"), [(None, (1, 1, 8, 8)), ((3, 16, 16), (1, 3, 16, 16))])
def test_the_input_shape_reaches_data_and_network(
    asked: tuple[int, ...] | None, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.setattr(opening, "outputs_of", lambda model, example: torch.zeros(1, 10))
    monkeypatch.setattr(opening, "take_inventory", lambda *args, **options: None)
    config = CompareConfig(
        model="cifar_resnet20", data="digits", input_shape=asked, target_ratios=(0.5,)
    )
    dense = opening.load_dense(cells.run_config(config, cells.plan(config)[0]))
    assert dense.example.shape == shape
    assert dense.data is not None
    assert dense.data.train[0][0].shape == shape[1:]


def test_both_networks_have_their_first_seed_before_either_has_its_second() -> None:
    a, b = (CompareConfig(model=m, target_ratios=(0.5,), seeds=s)
            for m, s in (("a", (0, 1)), ("b", (4, 5, 6))))  # fmt: skip
    order = [(c.model, c.seeds) for c in seed_by_seed([a, b])]
    assert order == [("a", (0,)), ("b", (4,)), ("a", (1,)), ("b", (5,)), ("b", (6,))]


def test_seeds_measured_apart_add_up_to_one_table() -> None:
    """Accuracies, and gains seed by seed."""

    def seed(number: int, ours: float, theirs: float) -> dict[str, object]:
        cells = [
            dict.fromkeys(COLUMNS)
            | {"method": m, "target": "50%", "seed": number, "accuracy": a, "ratio": 0.49,
               "measured_ms": 1.0, "flops": 1.0, "params": 1.0, "target_ms": 1.0, "met": True,
               "minutes": 1.0}
            for m, a in (("dsa-latency", ours), ("uniform", theirs))
        ]  # fmt: skip
        methods = [{"name": "dsa-latency", "title": "DSA"}, {"name": "uniform", "title": "uniform"}]
        return {
            "seeds": [number], "methods": methods, "targets": ["50%"],
            "dense": {"accuracy": 0.8}, "cells": cells, "warnings": [f"of {number}"],
        }  # fmt: skip

    found = together([seed(0, 0.75, 0.73), seed(1, 0.77, 0.74)])
    assert found["seeds"] == [0, 1]
    assert [r["accuracy"] for r in found["rows"]] == pytest.approx([0.76, 0.735])
    (gain,) = found["gains"]
    assert gain["points"] == pytest.approx(2.5)
    assert gain["points_standard_error"] == pytest.approx(0.5)
    assert found["warnings"] == ["of 0", "of 1"]


def test_flow_costs_are_of_training_and_those_of_measuring_stand_beside() -> None:
    def run(search: float, finetune: float) -> dict[str, object]:
        return {
            "seconds": {"search": search, "finetune": finetune, "validate": 20.0},
            "pruned": {"accuracy": 0.7}, "ratio": {"measured": 0.49},
        }  # fmt: skip

    found = flow_cost.costs(
        {
            "dense": {"seconds": {"dense": 100.0}, "accuracy": 0.8},
            "dsa-latency": run(40, 40),
            "halp": run(50, 40),
            "netadapt": run(200, 40),
        }
    )
    assert (found["over_dense"], found["over_dense_with_measuring"]) == (0.8, 1.0)
    assert (found["greedy_over_dsa"], found["iterative_over_dsa"]) == (3.0, 90 / 80)
    assert found["iterative_from_trained_over_dsa"] == 190 / 80


def test_allocation_gives_rivals_as_many_epochs_and_runs_none_twice(tmp_path: Path) -> None:
    config = PruneConfig(
        model="test_compare:small", data="test_compare:colours", budget=("flops",),
        flops_ratio=0.5, epochs=3, finetune_epochs=2, train_batch_size=40, lr=0.05,
    )  # fmt: skip
    bench = Bench(config, tmp_path / "0.5", tmp_path)
    rivals = {3: ("dsa", "uniform", "magnitude"),
              6: ("dsa_trained", "uniform_twice_as_long", "magnitude_trained")}  # fmt: skip
    for epochs, names in rivals.items():
        for name in names:
            found = allocation.once(bench, name, allocation.METHODS[name])
            assert found["epochs"] == epochs, name
            assert _logged_epochs(tmp_path, name) == (epochs if "twice" in name else 3), name
            # an upper limit: widths of 16 are coarse here, and the most valuable ones count
            assert 0.8 < found["cost_over_target"] <= 1.0

    def refuse(bench: Bench, name: str) -> allocation.Outcome:
        pytest.fail(f"{name} ran again")

    assert allocation.once(bench, "dsa", refuse)["epochs"] == 3
    faster = dataclasses.replace(config, lr=0.1)
    other = Bench(faster, tmp_path / "0.5", tmp_path, bench.dense)
    with pytest.raises(RunFolderError, match="lr"):
        allocation.once(other, "dsa", refuse)


def _logged_epochs(root: Path, name: str) -> int:
    """Epochs in the run's own log, and in the dense network's that it was cut from."""
    lines = (root / "0.5" / name / "log.jsonl").read_text().splitlines()
    own = sum(json.loads(line)["event"] == "epoch" for line in lines)
    return own + (1 if name == "magnitude" else 0)
