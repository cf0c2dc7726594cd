"""Run folders, comparisons and networks from strangers are data: nothing of them is run."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_compare_report import fake_comparison, write_sweep

from dsa_hw import report, validate
from dsa_hw.errors import UserError
from dsa_hw.pipeline.finished_result import finished_result
from dsa_hw.pipeline.finished_search import load_finished_search
from dsa_hw.pipeline.opening import configured_table
from dsa_hw.reports.page import csv_text, inert
from dsa_hw.runs.config import DeviceConfig, PruneConfig
from dsa_hw.runs.folder import RunFolder
from dsa_hw.runs.options import to_yaml
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.errors import BackendUnavailable
from profilers.timing import SamplePlan
from profilers.workers.model_inputs import input_shape

EVIL = "open('ran', 'w').close()\n\n\ndef factory(*a, **k):\n    raise SystemExit\n"
PART = {"measured_ms": 1.0, "ci95_ms": [0.9, 1.1], "accuracy": None, "flops": 1e6, "params": 1e3}
RESULT = {
    "model": "evil:factory", "device": "x", "backend": "onnxruntime", "precision": "fp32",
    "batch_size": 1, "threads": 1, "target_ms": 0.5, "target_ratio": 0.5, "met": True,
    "seconds": {"search": 1.0}, "dense": PART, "pruned": PART | {"predicted_ms": 0.5},
    "num_classes": None, "input_shape": [3, 8, 8],
}  # fmt: skip


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a module beside its configuration, which names it; one stands in it."""
    config = PruneConfig(target_ratio=0.5, model="evil:factory", data="evil:factory")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "model.onnx").write_bytes(b"")
    for name in ("evil", "yaml", "numpy", "onnx", "rich", "difflib"):
        (tmp_path / f"{name}.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [["validate", "--run", "."], ["report", "."]])
def test_a_strangers_folder_runs_nothing(evil: Path, words: list[str]) -> None:
    """Neither what its configuration names, nor what its files shadow."""
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", f"dsa_hw.{words[0]}", *words[1:]],
        capture_output=True, text=True, check=False, env=known,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    if words[0] == "validate":
        assert done.returncode == 2
        assert "names code of its own (model evil:factory)" in done.stderr
        assert "--trust-run true" in done.stderr
    assert not (evil / "ran").exists()


def test_a_trusted_folder_s_code_is_run(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(evil))
    with pytest.raises(SystemExit):
        validate.main(["--run", ".", "--trust-run", "true"])
    assert (evil / "ran").exists()


def test_search_from_imports_nothing_that_the_other_run_names(evil: Path) -> None:
    config = PruneConfig(target_ratio=0.5, model="resnet18", search_from=str(evil))
    with pytest.raises(UserError, match="model: 'evil:factory' there, 'resnet18' here"):
        load_finished_search(config)
    assert not (evil / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pruned": 5}, "pruned is 5; expected an object"),
        ({"dense": PART | {"measured_ms": "2"}}, "dense.measured_ms is '2'; expected a positive"),
        ({"dense": PART | {"ci95_ms": [1]}}, r"dense.ci95_ms is \[1\]; expected two numbers"),
        ({"threads": 1e400}, "threads is inf"),
        ({"batch_size": 10**400}, "batch_size is 1000"),
        ({"warnings": [1]}, r"warnings is \[1\]"),
    ],
)
def test_a_result_is_checked_before_it_is_believed(
    evil: Path, change: dict[str, object], said: str
) -> None:
    (evil / "result.json").write_text(json.dumps(RESULT | change))
    with pytest.raises(UserError, match=said):
        finished_result(RunFolder(evil))
    for text in ("[1]", "{", "[" * 100_000, "\x00"):
        (evil / "result.json").write_text(text)
        with pytest.raises(UserError, match=r"result\.json"):
            finished_result(RunFolder(evil))


@pytest.mark.parametrize("name", ["../../private", "/etc", "..", ".", "a/b", "a\\b", "a\0b"])
def test_no_way_leads_out_of_a_comparison(name: str, tmp_path: Path, capsys) -> None:
    content = fake_comparison()
    content["cells"][0]["cell"] = name
    sweep = write_sweep(tmp_path / "sweep", fake_comparison())
    (sweep / "result.json").write_text(json.dumps(content))
    assert report.main([str(sweep)]) == 2
    assert "cells[0].cell is" in capsys.readouterr().err


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path, capsys) -> None:
    sweep = write_sweep(tmp_path / "sweep", fake_comparison())
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    (sweep / "config.yaml").unlink()
    (sweep / "config.yaml").symlink_to(secret)
    assert report.main([str(sweep)]) == 2
    assert "link out of its folder" in capsys.readouterr().err


def test_a_comparison_without_seeds_has_a_report(tmp_path: Path) -> None:
    content = fake_comparison() | {"cells": [{"method": "dsa-latency", "cell": "x"}]}
    sweep = write_sweep(tmp_path / "sweep", fake_comparison())
    (sweep / "result.json").write_text(json.dumps(content))
    assert report.main([str(sweep)]) == 0


@pytest.mark.parametrize("text", ["=1+1", "+1+cmd", "-1+1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_csv_cell_is_a_formula(text: str) -> None:
    assert inert(text) == f"'{text}"
    if "\r" not in text:  # which Python's own reader takes for the end of a line
        (_, line) = csv.reader(io.StringIO(csv_text(["a", "b"], [[text, -1.5]])))
        assert line == [f"'{text}", "-1.5"]


@pytest.mark.parametrize("value", ["-1.5", "+2", "1e-3", "a=b", "", None, -3])
def test_other_csv_cells_stay(value: object) -> None:
    assert inert(value) == value


def test_an_open_batch_is_the_deployment_s() -> None:
    assert input_shape("x", ["N", 3, 8, 8], 4) == (4, 3, 8, 8)
    with pytest.raises(BackendUnavailable, match="dimension 2 of the model's input x is open"):
        input_shape("x", ["N", 3, "height", 8], 4)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    with OnnxRuntimeCpu(batch_size=2, threads=1).open(model.SerializeToString()) as runner:
        plan = SamplePlan(sample_ms=0.01, samples=1, warmup_ms=0.01)
        assert np.isfinite(runner.take_round(plan).median_ms)


def test_tables_go_where_tables_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_device import FakeDevice

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    elsewhere = configured_table(DeviceConfig(), FakeDevice()).path
    assert elsewhere is not None
    assert elsewhere.is_relative_to(tmp_path / "data" / "dsa_hw" / "latency_tables")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    Path("latency_tables").mkdir()
    assert configured_table(DeviceConfig(), FakeDevice()).path == Path(
        "latency_tables", elsewhere.name
    )
