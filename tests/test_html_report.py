"""The HTML reports: self-contained, complete, honest about what is missing."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsa_hw.reports import ReportInputError, write_run_report, write_table_report
from profilers.errors import TableError
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey, NetworkKey
from profilers.timing import Round

pytestmark = pytest.mark.usefixtures("painted")

DEVICE = "FAKE DEVICE (test)"
GROUPS = 12
STEPS = 900


@dataclass
class PageFacts(HTMLParser):
    """What a reader, a screen reader and a browser would find in a page."""

    text: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    csvs: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    scopes: int = 0
    open_tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.open_tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.csvs += [values["data-csv"]] if "data-csv" in values else []
        self.scopes += "scope" in values
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            if key in values and not values[key].startswith("#"):
                self.loads.append(values[key])

    def handle_endtag(self, tag: str) -> None:
        while self.open_tags and self.open_tags.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = set(self.open_tags)
        if inside & {"script", "style"}:
            return
        self.text.append(data)
        if inside & {"h1", "h2"}:
            self.headings.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)


def read_page(path: Path) -> PageFacts:
    facts = PageFacts()
    facts.feed(path.read_text(encoding="utf-8"))
    return facts


def fake_result() -> dict:
    """A made-up run: every number follows from a formula, none was measured."""
    widths = [(32 * 2 ** (index // 3), 16 * (1 + index % 4)) for index in range(GROUPS)]
    return {
        "model": "fakenet",
        "data": "made-up data",
        "seed": 7,
        "met": True,
        "epochs": {"search": 6, "finetune": 4},
        "target_ms": 14.5,
        "statistic": "median",
        "device": DEVICE,
        "backend": "fake runtime",
        "precision": "fp32",
        "batch_size": 1,
        "threads": 2,
        "dense": {
            "measured_ms": 24.125,
            "ci95_ms": [23.9, 24.4],
            "accuracy": 0.9312,
            "flops": 1_814_073_344,
            "params": 11_689_512,
        },
        "pruned": {
            "predicted_ms": 14.21,
            "measured_ms": 14.32,
            "ci95_ms": [14.11, 14.55],
            "accuracy": 0.9244,
            "flops": 902_000_000,
            "params": 4_321_000,
            "masked_vs_pruned_max_abs": 3.5e-6,
        },
        "seconds": {"profile": 412.0, "search": 5521.0, "finetune": 71.5, "validate": None},
        "groups": [
            {
                "name": f"stage{index // 3}.block{index % 3}.conv1",
                "dense_width": dense,
                "width": min(width, dense),
                "step": 16,
                "keep_ratio": min(0.97, width / dense * 0.95 + 0.02),
                "members": [f"stage{index // 3}.block{index % 3}.{name}" for name in ("a", "b")],
            }
            for index, (dense, width) in enumerate(widths)
        ],
        "layers": [
            {
                "name": f"stage{index // 12}.layer{index}",
                "op": "conv 3x3 s1 28x28",
                "cin_dense": 64,
                "cout_dense": 128,
                "cin": 48,
                "cout": 80,
                "dense_ms": 0.2 + 0.9 * abs(math.sin(index)),
                "pruned_ms": 0.1 + 0.4 * abs(math.sin(index)),
            }
            for index in range(46)
        ],
        "calibration": {
            "networks": [
                {
                    "predicted_ms": 8 + index,
                    "measured_ms": (8 + index) * (1 + 0.03 * math.sin(2 * index)),
                    "ci95_ms": [(8 + index) * 0.96, (8 + index) * 1.04],
                    "held_out": index % 3 == 0,
                }
                for index in range(18)
            ],
            "heldout_mape_pct": 1.85,
            "heldout_max_pct": 5.2,
            "constant_ms": 0.31,
            "scales": {"conv": 1.04, "linear": 0.98},
        },
        "closed_loop": [
            {
                "round": 1,
                "predicted_ms": 14.4,
                "measured_ms": 15.02,
                "ci95_ms": [14.9, 15.2],
                "target_ms": 14.5,
                "correction": 1.043,
            },
            {
                "round": 2,
                "predicted_ms": 14.21,
                "measured_ms": 14.32,
                "ci95_ms": [14.11, 14.55],
                "target_ms": 14.5,
                "correction": 1.0,
            },
        ],
        "environment": {"fake_runtime": "0.0.0", "cores": 2},
        "warnings": ["group stage0.block1.conv1 stayed at its smallest width"],
        "table": {"path": "fake.jsonl", "entries": 812, "measured": 120, "reused": 692},
    }


def fake_log() -> Iterator[dict]:
    for step in range(STEPS):
        share = step / STEPS
        yield {
            "event": "search_step",
            "step": step,
            "phase": "warmup" if share < 0.2 else "search",
            "loss": 3.2 * math.exp(-3 * share) + 0.05 * math.sin(step),
            "validation_loss": 3.3 * math.exp(-2.8 * share) if step % 2 else None,
            "inexactness_beta2": None if share < 0.2 else 4 * 25**share,
            "keep_ratios": [1 - share * (0.05 + 0.9 * g / GROUPS) for g in range(GROUPS)],
            "costs": {"latency": 24.1 - 10 * share},
            "targets": {"latency": 24.1 - 9.6 * min(1, 1.3 * share)},
        }
    for stage, epochs in (("search", 6), ("finetune", 4)):
        for epoch in range(epochs):
            accuracy = 0.5 + 0.04 * epoch if epoch else None
            loss = 2.0 / (1 + epoch)
            yield {"event": "epoch", "stage": stage, "epoch": epoch, "train_loss": loss,
                   "accuracy": accuracy}  # fmt: skip
    yield {"event": "warning", "message": "the loss stopped falling at step 700"}
    yield {"event": "something else", "value": 1}


def write_run(folder: Path, result: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in fake_log()))
    (folder / "config.yaml").write_text("target_ms: 14.5\nmodel: fakenet\n")
    return folder


def write_table(path: Path, specs: int = 3) -> Path:
    """A fake staircase: one made-up millisecond per 16 x 16 block of channels."""
    provenance: dict[str, str | int | float] = {
        "device": DEVICE, "runtime": "fake runtime", "precision": "fp32", "reference_ms": 1.0,
    }  # fmt: skip
    table = LatencyTable.open(path, provenance)
    for number in range(specs):
        groups = "depthwise" if number == 1 else "dense"
        size = 29 + number
        spec = LayerSpec.parse(
            f"conv k3x3 s1x1 p1.1.1.1 d1x1 g{groups} {size}x{size} b1 fp32 +relu"
        )
        for cin in (16,) if number == 1 else (16, 32, 64):
            for cout in range(8, 100, 8):
                cin_here = cout if number == 1 else cin
                ms = 0.01 * (number + 1) * math.ceil(cin_here / 16) * math.ceil(cout / 16)
                for taken in (0.95 * ms, ms, 1.05 * ms):
                    table.append(
                        LayerKey(spec, cin_here, cout), Round(taken, taken, taken, 3, 9), 1.0
                    )
    for index in range(4):
        key = NetworkKey(f"hash{index}", (8, 1 + index))
        table.append(key, Round(9.0 + index, 9.0, 12.0, 3, 9), 1.0)
    return path


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_report(write_run(tmp_path_factory.mktemp("page") / "run", fake_result()))


@pytest.fixture(scope="module")
def table_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_table_report(write_table(folder / "fake.jsonl"), folder / "table.html")


@pytest.fixture(params=["run_page", "table_page"])
def any_page(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_page_loads_nothing(any_page: Path):
    facts, source = read_page(any_page), any_page.read_text(encoding="utf-8")
    assert facts.loads == []
    assert "link" not in facts.tags
    assert not re.search(r"@import|url\((?!#)", source)
    # XML namespaces are names, not addresses; nothing else may look like one.
    assert set(re.findall(r"https?://[^\s\"'<>]+", source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_and_references_resolve(any_page: Path):
    facts, source = read_page(any_page), any_page.read_text(encoding="utf-8")
    assert len(facts.ids) == len(set(facts.ids))
    named = set(re.findall(r'(?:href="#|url\(#|labelledby=")([\w.-]+)', source))
    assert named <= set(facts.ids)


def test_tables_have_csv_and_scopes(any_page: Path):
    source = any_page.read_text(encoding="utf-8")
    tables = re.findall(r"<table.*?</table></div><div class=\"tools\">(.*?)</div>", source, re.S)
    assert len(tables) == source.count("<table") > 0
    assert all('class="copy" data-csv="' in tools for tools in tables)
    for text in read_page(any_page).csvs:
        rows = list(csv.reader(io.StringIO(text)))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    assert read_page(any_page).scopes > 10


def test_figures_have_captions_and_descriptions(any_page: Path):
    facts = read_page(any_page)
    count = facts.tags.count("figure")
    assert count >= 3
    assert facts.tags.count("figcaption") == facts.tags.count("svg") == count
    assert facts.tags.count("desc") >= count
    for landmark in ("header", "nav", "main", "footer"):
        assert facts.tags.count(landmark) == 1


def test_headline_says_what_came_out(run_page: Path):
    words = read_page(run_page).words
    assert (
        f"fakenet: 24.12 ms → 14.32 ms measured (target 14.5 ms) on {DEVICE}, fake runtime, "
        "2 threads" in words
    )
    assert "Target met" in words


def test_main_table_shows_every_number(run_page: Path):
    facts = read_page(run_page)
    shown = ["24.12", "14.5", "14.21", "14.32", "23.9 to 24.4", "14.11 to 14.55", "93.1 %"]
    shown += ["92.4 %", "1.814 G", "902 M", "11.69 M", "4.321 M", "6.9 min", "1.5 h", "71.5 s"]
    assert [number for number in shown if number not in facts.words] == []
    main = next(text for text in facts.csvs if text.startswith(",Dense,Target"))
    # The CSV carries unrounded values.
    for raw in ("24.125", "0.9312", "1814073344.0", "23.9 to 24.4", "3.5e-06"):
        assert raw in main


def test_met_is_shown_as_the_run_says(tmp_path: Path):
    """The target is 14.5 ms. Older runs have no verdict; without any, the interval decides."""
    cases = (
        ("met", True, [14.1, 14.5], "Target met"),
        ("missed", False, [14.8, 15.0], "Target missed"),
        ("undecided", None, [14.1, 15.5], "Target undecided"),
        (None, True, [14.1, 14.5], "Target met"),
        (None, None, [14.1, 14.5], "Target met"),
        (None, None, [14.1, 15.5], "Target undecided"),
        (None, None, None, "Target not checked"),
    )
    for verdict, met, interval, badge in cases:
        result = fake_result()
        pruned = result["pruned"] | {"ci95_ms": interval}
        result = result | {"met": met, "verdict": verdict, "pruned": pruned}
        page = write_run_report(write_run(tmp_path / "run", result))
        assert badge in read_page(page).words


def test_names_are_escaped(tmp_path: Path):
    result = fake_result()
    evil = '<img src=x onerror="alert(1)">&$a_b$</script>'
    result["model"] = result["groups"][0]["name"] = result["layers"][0]["name"] = evil
    result["warnings"] = [evil]
    result["groups"][0]["members"] = [evil]
    run = write_run(tmp_path / "run", result)
    (run / "config.yaml").write_text(f"model: {evil}\n")
    facts = read_page(write_run_report(run))
    assert "img" not in facts.tags
    assert facts.tags.count("script") == 1
    assert facts.words.count(evil) >= 4


def test_missing_parts_are_named_and_not_invented(tmp_path: Path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "result.json").write_text(json.dumps({"device": DEVICE, "target_ms": 4.0}))
    facts = read_page(write_run_report(run))
    assert "Target not checked" in facts.words
    for key in (
        "groups",
        "layers",
        "calibration",
        "closed_loop",
        "seconds",
        "table",
        "environment",
    ):
        assert f"{key} is not in result.json" in facts.words
    for name in ("search_step", "epoch events", "config.yaml", "warnings"):
        assert name in facts.words
    assert "svg" not in facts.tags
    assert "not measured" in facts.words
    # No number but the target's own 4, the 95 of "95 % interval", and the heading levels' none.
    numbers = set(re.findall(r"(?<![\w.])\d[\d.,]*", facts.words))
    assert numbers <= {"4", "95", "95.", "4."}


def test_null_accuracy_is_not_measured(tmp_path: Path):
    result = fake_result()
    result["dense"]["accuracy"] = result["pruned"]["accuracy"] = None
    facts = read_page(write_run_report(write_run(tmp_path / "run", result)))
    row = next(text for text in facts.csvs if text.startswith(",Dense")).split("\n")[3]
    assert row == "Accuracy,,,,,"
    assert "not measured" in facts.words


def test_stages_without_times_have_no_total(tmp_path: Path):
    result = fake_result() | {"seconds": {"profile": None, "search": None}}
    words = read_page(write_run_report(write_run(tmp_path / "run", result))).words
    assert "seconds is not in result.json" in words
    assert "total" not in words


def test_unreadable_values_are_named(tmp_path: Path):
    result = fake_result()
    result["target_ms"] = "soon"
    result["pruned"]["ci95_ms"] = [float("nan"), 2.0]
    run = write_run(tmp_path / "run", result)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"event": "search_st')
    words = read_page(write_run_report(run)).words
    assert "target_ms: expected a finite number, found 'soon'" in words
    assert "pruned.ci95_ms: expected [low, high]" in words
    assert "log.jsonl: 1 unreadable line skipped" in words


def test_log_may_be_empty(tmp_path: Path):
    run = write_run(tmp_path / "run", fake_result())
    (run / "log.jsonl").write_text("")
    assert "log.jsonl has no search_step events" in read_page(write_run_report(run)).words


def test_long_histories_stay_small(tmp_path: Path):
    result = fake_result()
    result["groups"] = [group | {"name": f"group{i}"} for i, group in
                        enumerate(result["groups"] * 7)]  # fmt: skip
    run = write_run(tmp_path / "run", result)
    with (run / "log.jsonl").open("w") as log:
        for step in range(6000):
            ratios = [0.5 + 0.4 * math.sin(step / 500 + g) for g in range(7 * GROUPS)]
            line = {"event": "search_step", "step": step, "loss": math.sin(step) + 2}
            log.write(json.dumps(line | {"keep_ratios": ratios}) + "\n")
    assert write_run_report(run).stat().st_size < 1_500_000


def test_report_is_reproducible(tmp_path: Path):
    run = write_run(tmp_path / "run", fake_result())
    first, second = (write_run_report(run, tmp_path / f"{n}.html").read_text() for n in (1, 2))
    assert first == second


def test_global_matplotlib_settings_are_left_alone(tmp_path: Path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_run_report(write_run(tmp_path / "run", fake_result()))
    assert dict(matplotlib.rcParams) == before


def test_missing_result_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(ReportInputError, match=r"result\.json does not exist"):
        write_run_report(tmp_path)


def test_table_page_counts_and_says_where_it_is_from(table_page: Path):
    words = read_page(table_page).words
    assert f"84 layer measurements of 3 layer kinds and 4 whole networks on {DEVICE}" in words
    assert "fake runtime" in words
    assert "cin = cout" in words  # depthwise: one line, not one for each width


def test_table_page_draws_the_costliest_and_counts_the_rest(tmp_path: Path):
    table = write_table(tmp_path / "fake.jsonl", specs=27)
    facts = read_page(write_table_report(table, tmp_path / "table.html"))
    assert facts.tags.count("figure") == 24
    assert "3 cheaper ones are left out" in facts.words


@pytest.mark.parametrize("first_line", ["", '{"format": "other", "version": 1}', "not json"])
def test_other_files_are_refused(tmp_path: Path, first_line: str):
    path = tmp_path / "fake.jsonl"
    path.write_text(first_line + "\n")
    with pytest.raises(TableError, match="line 1: not the header of a latency table"):
        write_table_report(path, tmp_path / "table.html")
