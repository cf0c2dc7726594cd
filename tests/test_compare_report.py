"""The report of a comparison: self-contained, and complete."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from conftest import painting
from test_html_report import DEVICE, fake_log, fake_result, read_page

from dsa_hw import report
from dsa_hw.reports import write_comparison_report

METHODS = {
    "dsa-latency": "DSA on latency",
    "dsa-flops": "DSA on FLOPs",
    "uniform": "uniform",
    "magnitude": "Torch-Pruning, magnitude",
    "taylor": "Torch-Pruning, Taylor",
    "halp": "knapsack (after HALP)",
    "mdp": "integer program (after MDP)",
    "netadapt": "greedy (after NetAdapt)",
}
TARGETS = {"70%": 0.7, "50%": 0.5, "30%": 0.3}
SEEDS = (0, 1, 2)
DENSE_MS = 2.0


def accuracy(method: int, ratio: float, seed: int) -> float:
    """Made up: falls with the method's number and with the target."""
    return 0.9 - 0.01 * method - 0.15 * (1 - ratio) ** 2 + 0.004 * math.sin(7 * method + seed)


SPREADS = [
    {"target": target, "methods": list(METHODS), "seeds": 3, "run_sd_points": 0.6, "p_value": p}
    for target, p in zip(TARGETS, (0.41, 0.02, 1e-9), strict=True)
]


def fake_cells() -> list[dict]:
    """Made-up runs: every number follows from a formula, none was measured."""
    cells = []
    for target, ratio in TARGETS.items():
        for number, method in enumerate(METHODS):
            for seed in SEEDS:
                ms = DENSE_MS * ratio * (0.985 + 0.01 * math.sin(number + seed))
                cells.append(
                    {
                        "cell": f"{method}-{target.replace('%', 'pct')}-seed{seed}",
                        "method": method, "target": target, "seed": seed,
                        "accuracy": accuracy(number, ratio, seed),
                        "target_ms": DENSE_MS * ratio, "measured_ms": ms,
                        "ci95_low_ms": 0.99 * ms, "ci95_high_ms": 1.01 * ms,
                        "ratio": ms / DENSE_MS, "dense_ms": DENSE_MS,
                        "predicted_ms": ms * (1 + 0.02 * math.sin(3 * number)), "met": True,
                        "flops": 1e8 * ratio * (1 + 0.1 * math.sin(number)), "params": 1e6 * ratio,
                        "minutes": 3.5, "infeasible": None,
                        "keep_ratios": [
                            0.2 + 0.7 * ratio * abs(math.sin(number + 0.6 * g)) for g in range(12)
                        ],
                    }
                )  # fmt: skip
    return cells


def fake_comparison() -> dict:
    """A made-up sweep on a device that does not exist."""
    cells = fake_cells()
    rows, gains = [], []
    for target, ratio in TARGETS.items():
        for number, (method, title) in enumerate(METHODS.items()):
            own = [c for c in cells if (c["method"], c["target"]) == (method, target)]
            rows.append(
                {
                    "method": method, "title": title, "target": target, "runs": 3, "infeasible": 0,
                    "accuracy": sum(c["accuracy"] for c in own) / 3,
                    "accuracy_standard_error": 0.003,
                    "measured_ms": sum(c["measured_ms"] for c in own) / 3,
                    "measured_ms_standard_error": 0.01, "ratio": own[0]["ratio"],
                    "flops": own[0]["flops"], "params": 1e6 * ratio,
                    "target_ms": DENSE_MS * ratio, "met": 3, "minutes": 3.5,
                }
            )  # fmt: skip
            if number:
                gains.append(
                    {"target": target, "over": method, "title": title, "seeds": 3,
                     "points": number - 2.5, "points_standard_error": 0.4, "slower_pct": 0.5,
                     "points_at_its_latency": number - 2.25,
                     "points_at_its_latency_standard_error": 0.31}
                )  # fmt: skip
    return {
        "kind": "comparison", "model": "fakenet", "data": "made-up data", "epochs": 12,
        "seeds": list(SEEDS), "device": DEVICE, "backend": "fake runtime", "precision": "fp32",
        "batch_size": 1, "threads": 2, "statistic": "median",
        "methods": [{"name": n, "title": t} for n, t in METHODS.items()],
        "targets": list(TARGETS),
        "dense": {"accuracy": 0.905, "accuracy_standard_error": 0.002, "measured_ms": DENSE_MS,
                  "flops": 1.2e8, "params": 1e6},
        "rows": rows, "gains": gains, "spreads": SPREADS, "cells": cells, "unfinished": [],
        "networks": [
            {"flops": 1e7 * (i + 2), "measured_ms": 0.3 + 0.15 * i * (1 + 0.3 * math.sin(5 * i))}
            for i in range(12)
        ],
        "shares": [
            {"name": f"group{g}", "ms": (1 + 0.4 * math.sin(g)) / 12, "flops": 1 / 12}
            for g in range(12)
        ],
        "staircases": [
            {"kind": kind, "layer": "conv 3x3", "cout": list(range(16, 97, 4)), "cin": 64,
             "measured_ms": [0.1 * math.ceil(c / 16) for c in range(16, 97, 4)]}
            for kind in ("conv", "pointwise", "depthwise")
        ],
        "calibration": {"heldout_mape_pct": 1.8, "heldout_max_pct": 5.1},
        "environment": {"device": DEVICE, "runtime": "fake runtime"},
        "warnings": ["dsa-latency-70pct-seed1: made-up <warning>"],
    }  # fmt: skip


def write_sweep(folder: Path, result: dict) -> Path:
    """A sweep's folder with the DSA runs of the first seed in it."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text("model: fakenet\n")
    for cell in result["cells"]:
        if cell["method"].startswith("dsa") and cell["seed"] == 0:
            run = folder / "cells" / cell["cell"]
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps(fake_result()))
            (run / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in fake_log()))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("compare") / "sweep", fake_comparison())
    with painting():
        return write_comparison_report(folder)


def test_page_loads_nothing_and_escapes(page: Path) -> None:
    facts = read_page(page)
    assert facts.loads == []
    assert "made-up <warning>" in facts.words
    assert "<warning>" not in page.read_text(encoding="utf-8")
    assert len(facts.ids) == len(set(facts.ids))


def test_everything_asked_for_is_there(page: Path) -> None:
    headings = " ".join(read_page(page).headings)
    for wanted in (
        "Accuracy against measured latency", "FLOPs against measured latency", "Keep ratios",
        "Predicted against measured", "Staircases", "How the searches went",
        "Where the milliseconds go", "What a channel costs", "Environment",
        "How far ahead", "Every run",
    ):  # fmt: skip
        assert wanted in headings


def test_headline_is_what_the_numbers_say(page: Path, tmp_path: Path) -> None:
    assert "most accurate at 3 of 3 latency targets" in read_page(page).words
    result = fake_comparison()
    for row in result["rows"]:
        if row["method"] == "uniform" and row["target"] == "50%":
            row["accuracy"] = 0.99
    words = read_page(write_comparison_report(write_sweep(tmp_path / "s", result))).words
    assert "most accurate at 2 of 3 latency targets" in words


@pytest.mark.parametrize(
    ("factor", "met", "won"), [(1.0, 3, 3), (1.019, 2, 3), (1.021, 3, 3), (1.021, 2, 2)]
)
def test_networks_slower_than_the_target_do_not_lead(
    factor: float, met: int, won: int, tmp_path: Path
) -> None:
    result = fake_comparison()
    row = next(r for r in result["rows"] if (r["method"], r["target"]) == ("dsa-latency", "50%"))
    row["measured_ms"], row["met"] = factor * row["target_ms"], met
    words = read_page(write_comparison_report(write_sweep(tmp_path / "s", result))).words
    assert f"most accurate at {won} of 3 latency targets" in words
    assert ("50%: DSA on latency" in words) == (won == 3)


def test_caption_says_where_uniform_widths_start(tmp_path: Path) -> None:
    for number, (from_dense, said) in enumerate([(0, False), (12, True)]):
        result = fake_comparison() | {"from_dense": from_dense}
        page = write_comparison_report(write_sweep(tmp_path / str(number), result))
        words = read_page(page).words
        assert ("where they are compared: from random weights" in words) == said


@pytest.mark.parametrize(("slower_pct", "ahead"), [(0.0, 3), (1.9, 3), (2.1, 2), (-9.0, 3)])
def test_a_gain_of_slower_networks_does_not_count(
    slower_pct: float, ahead: int, tmp_path: Path
) -> None:
    result = fake_comparison()
    for gain in result["gains"]:
        gain["points"] = 2.0
    result["gains"][-1]["slower_pct"] = slower_pct
    words = read_page(write_comparison_report(write_sweep(tmp_path / "s", result))).words
    assert f"standard error of the difference at {ahead} of 3 targets" in words


def test_what_chance_explains_is_told(page: Path) -> None:
    """The error of a difference over three seeds is 0.6 * sqrt(2 / 3) = 0.49 points."""
    words = read_page(page).words
    assert "a difference over 3 seeds 0.49" in words
    assert words.count("differ no more than chance explains") == 1
    assert "differ no more than chance explains (p = 0.41)" in words
    assert "differ (p < 0.001)" in words


def test_what_channels_cost_is_told(page: Path, tmp_path: Path) -> None:
    assert "Here 0.60 (group11) to 1.40 (group8)." in read_page(page).words
    result = fake_comparison()
    result["shares"] = result["shares"][:1]
    words = read_page(write_comparison_report(write_sweep(tmp_path / "one", result))).words
    assert "fewer than two groups of channels" in words


def test_gains_at_the_others_latency_are_in_the_table(page: Path) -> None:
    text = next(t for t in read_page(page).csvs if t.startswith("Target,Against"))
    rows = list(csv.reader(io.StringIO(text)))
    assert "Ahead at its latency" in rows[0]
    column = rows[0].index("Ahead at its latency")
    assert [float(x) for x in rows[1][column : column + 2]] == [-1.25, 0.31]


def test_every_run_can_be_copied(page: Path) -> None:
    texts = read_page(page).csvs
    runs = next(t for t in texts if t.startswith("Run,Seed"))
    rows = list(csv.reader(io.StringIO(runs)))[1:]
    assert [float(r[2]) for r in rows] == pytest.approx([100 * c["accuracy"] for c in fake_cells()])


def test_unfinished_and_unreachable_are_named(tmp_path: Path) -> None:
    result = fake_comparison()
    result["unfinished"] = ["halp-30pct-seed2"]
    row = next(r for r in result["rows"] if r["method"] == "mdp")
    row |= {"accuracy": None, "measured_ms": None, "runs": 0, "infeasible": 3}
    cell = next(c for c in result["cells"] if c["method"] == "mdp")
    cell |= dict.fromkeys(("accuracy", "measured_ms", "predicted_ms", "flops", "met"))
    cell |= {"infeasible": "no widths within 1 ms", "keep_ratios": []}
    words = read_page(write_comparison_report(write_sweep(tmp_path / "s", result))).words
    assert "halp-30pct-seed2" in words
    assert "cannot reach it" in words
    assert "no widths within 1 ms" in words


@pytest.mark.parametrize("left", [["dsa-latency", "uniform"], ["uniform", "dsa-flops"]])
def test_one_budget_alone_is_drawn_as_that_one(left: list[str], tmp_path: Path) -> None:
    result = fake_comparison()
    for name, key in (("methods", "name"), ("rows", "method"), ("cells", "method")):
        result[name] = [item for item in result[name] if item[key] in left]
    result["gains"] = []
    with painting():
        written = write_comparison_report(write_sweep(tmp_path / "s", result))
    page = written.read_text(encoding="utf-8")
    figure = page.partition('<section id="keep"')[2].partition("</section>")[0]
    for name in ("dsa-latency", "dsa-flops"):
        assert (f">{METHODS[name]}</text>" in figure) == (name in left)


def test_nothing_finished_draws_nothing(tmp_path: Path) -> None:
    result = fake_comparison() | {"rows": [], "gains": [], "cells": [], "networks": [],
                                  "staircases": [], "shares": []}  # fmt: skip
    facts = read_page(write_comparison_report(write_sweep(tmp_path / "s", result)))
    assert "svg" not in facts.tags
    assert "no run has both yet" in facts.words


def test_report_command_knows_a_comparison(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", fake_comparison())
    assert report.main([str(folder)]) == 0
    assert "comparison of pruning methods" in (folder / "report.html").read_text(encoding="utf-8")
