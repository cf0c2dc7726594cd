"""Pages that are made when the documentation is built: they say what the code and the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsa_hw.runs.config import COMMANDS
from dsa_hw.runs.options import option_name, options_of
from generated_pages import decisions, figures, options, results
from generated_pages.external import external_loads

pytestmark = pytest.mark.usefixtures("painted")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_reference_has_every_option_of_every_verb(verb: str) -> None:
    section = options.page().split(f"\n## {verb}\n")[1].split("\n## ")[0]
    config_class = COMMANDS[verb]
    for option in options_of(config_class):
        name = option.name.upper() if option.metadata["positional"] else option_name(option)
        rows = [line for line in section.splitlines() if f"| `{name}` |" in line]
        assert len(rows) == 1
        assert option.metadata["help"].replace("|", "\\|").replace("<", "&lt;") in rows[0]


def test_every_result_file_has_a_page() -> None:
    pages = results.pages(RESULTS)
    assert {Path(path).stem for path in pages} == {path.stem for path in RESULTS.glob("*.json")}
    index = results.index(RESULTS)
    assert all(f"({Path(path).name})" in index for path in pages)


def test_a_page_has_the_file_s_numbers() -> None:
    figures_of = json.loads((RESULTS / "latency_prediction.json").read_text())["figures"]
    _, text = results.pages(RESULTS)["results/latency_prediction.md"]
    for network, values in figures_of.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {network} |"))
        assert f"| {values['mape_pct']:.1f}% | {values['p95_pct']:.1f}% |" in row


def test_a_result_that_nobody_described_is_shown_all_the_same() -> None:
    content = {
        "figures": {
            "tried": 12,
            "undecided": None,
            "met": True,
            "networks": {"a": {"ms": 0.51234, "kept": [1, 2]}, "b": {"ms": 2.0, "kept": [3, 4]}},
            "cases": [{"name": "x|y", "lost": 0}, {"name": "z", "lost": 1}],
        },
        "provenance": {"device": "some CPU", "config": {"out": "runs/x"}},
    }
    title, text = results.page("new_benchmark", content)
    assert title == "New benchmark"
    for row in ("| tried | 12 |", "| undecided |  |", "| met | yes |", "| a | 0.5123 | 1, 2 |",
                "| x\\|y | 0 |", "| device | some CPU |"):  # fmt: skip
        assert row in text
    assert "runs/x" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (1234.5, "1234"), (1e-9, "1e-09"), (12, "12"), (0.0, "0"), (None, "")],
)
def test_numbers_are_written_as_people_do(value: float | None, text: str) -> None:
    assert results.number(value) == text


def test_the_list_of_decisions_has_every_file() -> None:
    folder = ROOT / "docs" / "decisions"
    page = decisions.page(folder)
    listed = decisions.files(folder)
    assert {path.name for path in listed} == {path.name for path in folder.glob("*.md")}
    for path in listed:
        assert f"]({path.name}) |" in page
    assert len({path.name[:4] for path in listed}) == len(listed)


@pytest.mark.parametrize("path", decisions.files(ROOT / "docs" / "decisions"), ids=lambda p: p.name)
def test_a_decision_says_what_it_is_worth(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25
    assert decisions.title(text)
    assert decisions.status(text) != "not told"
    for part in ("Context", "Decision", "Evidence", "What would change it"):
        assert re.search(rf"\b{part}\b", text, re.IGNORECASE), f"{path.name} has no {part}"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_has_the_page_s_colours(name: str) -> None:
    drawn = figures.drawn(name)
    assert not [colour for colour in figures.COLOURS if colour in drawn]
    assert "currentColor" in drawn
    assert 'role="img" aria-label="' in drawn
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)


def test_keep_probabilities_of_the_figure_have_the_keep_ratio_as_their_mean() -> None:
    import numpy as np

    importance = np.geomspace(0.1, 10, 200)
    for steepness in (1.0, 30.0):
        kept = figures.keep_probability(importance, steepness, 0.5)
        assert kept.mean() == pytest.approx(0.5, abs=1e-6)  # a bisection of 80 halvings
        assert (np.diff(kept) >= 0).all()


@pytest.mark.parametrize(
    ("page", "loads"),
    [
        ('<a href="https://example.org">read</a>', []),
        ('<script src="https://example.org/a.js"></script>', ["https://example.org/a.js"]),
        ('<link rel="stylesheet" href="//example.org/a.css">', ["//example.org/a.css"]),
        ('<link rel="canonical" href="https://example.org">', []),
        ('<img src="figure.svg">', []),
    ],
)
def test_what_a_page_fetches_from_elsewhere_is_seen(page: str, loads: list[str]) -> None:
    assert external_loads(page) == loads


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
