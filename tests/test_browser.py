"""The three reports in a real browser: drawn, saved, copied, by keyboard, on a phone, at night."""

from __future__ import annotations

import csv
import io
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PATIENCE_S, PHONE, WIDE, Browser, Tab, browser
from test_compare_report import fake_comparison, write_sweep
from test_html_report import fake_result, write_run, write_table

from dsa_hw.reports import write_comparison_report, write_run_report, write_table_report

OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module", params=["run", "table", "comparison"])
def page(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, painted: None
) -> Path:
    folder = tmp_path_factory.mktemp("page")
    if request.param == "run":
        return write_run_report(write_run(folder / "run", fake_result()))
    if request.param == "table":
        return write_table_report(write_table(folder / "fake.jsonl"), folder / "table.html")
    return write_comparison_report(write_sweep(folder / "sweep", fake_comparison()))


@pytest.fixture
def tab(running: Browser, page: Path) -> Iterator[Tab]:
    """On a wide window; whatever a test does, the page has nothing to say on the console."""
    shown = Tab(running, page)
    yield shown
    assert shown.console == []
    shown.close()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_is_drawn_and_can_be_read(
    running: Browser, page: Path, size: tuple[int, int], dark: bool
) -> None:
    shown = Tab(running, page, size, dark)
    shown.value(OPEN_ALL)
    boxes = shown.value(
        "[...document.querySelectorAll('svg')].map(s => {const b = s.getBoundingClientRect();"
        "return [b.width, b.height, s.querySelectorAll('path').length]})"
    )
    assert len(boxes) == page.read_text(encoding="utf-8").count("<svg") > 2
    assert all(width > 200 and height > 80 and paths > 3 for width, height, paths in boxes)
    assert shown.value("document.documentElement.scrollWidth <= innerWidth")
    # WCAG 2.2, 1.4.3: 4.5 to 1 for text of this size
    assert shown.value(CONTRAST) >= 4.5
    assert shown.console == []
    shown.close()


CONTRAST = """(() => {
 const light = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(c => c / 255)
   .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b};
 const behind = e => {
  for (; e; e = e.parentElement) {
   const back = getComputedStyle(e).backgroundColor;
   if (back !== 'rgba(0, 0, 0, 0)') return light(back)}
  return 1};
 let least = 21;
 const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
 while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || e.closest('script,style,desc')) continue;
  const style = getComputedStyle(e), inside = e.closest('svg');
  const front = light(inside ? style.fill : style.color), back = behind(e);
  least = Math.min(least, (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05))}
 return least})()"""


def test_tables_copy_what_they_show(tab: Tab) -> None:
    """By the Enter key, unrounded; the clipboard holds a line a row under the same headings."""
    tab.value(OPEN_ALL)
    count = tab.value("document.querySelectorAll('table').length")
    assert count > 1
    for index in range(count):
        table = f"document.querySelectorAll('table')[{index}]"
        tools = f"{table}.closest('.scroll').nextElementSibling"
        rows = copied(tab, f"{tools}.querySelector('.copy')")
        cells = "[...r.cells].map(c => c.textContent)"
        shown = tab.value(f"[...{table}.rows].map(r => {cells})")
        assert [len(r) for r in rows] == [len(r) for r in shown]
        assert rows[0] == shown[0]
        assert [r[0] for r in rows] == [r[0] for r in shown]
        for row, seen in zip(rows[1:], shown[1:], strict=True):
            assert all(same_number(raw, text) for raw, text in zip(row, seen, strict=True))


def same_number(raw: str, text: str) -> bool:
    """Whether a shown number is the raw one to three digits, where both are plain numbers."""
    try:
        exact, short = float(raw), float(text.replace(",", ""))
    except ValueError:
        return True
    return short == pytest.approx(exact, rel=6e-3, abs=6e-3)


def test_figures_copy_their_numbers(tab: Tab) -> None:
    """Every figure has numbers beside it: its own, or a table in its section."""
    tab.value(OPEN_ALL)
    figures = tab.value("document.querySelectorAll('figure').length")
    own = 0
    for index in range(figures):
        figure = f"document.querySelectorAll('figure')[{index}]"
        if tab.value(f"!{figure}.querySelector('.copy')"):
            assert tab.value(f"!!{figure}.closest('section').querySelector('table')"), index
            continue
        own += 1
        rows = copied(tab, f"{figure}.querySelector('.copy')")
        assert len(rows) > 1
        assert {len(r) for r in rows} == {len(rows[0])}
    assert own > 0


def test_copying_works_without_the_clipboard_interface(tab: Tab) -> None:
    """As in a browser that has none: by selecting the text."""
    tab.value("window.kept = navigator.clipboard; kept.writeText('before')")
    tab.value("Object.defineProperty(navigator, 'clipboard', {value: undefined}), 0")
    button = "document.querySelector('table').closest('.scroll').nextElementSibling.firstChild"
    press_on(tab, button)
    tab.wait("document.querySelector('#said').textContent === 'Copied'")
    assert tab.value("kept.readText()") == tab.value(f"{button}.dataset.csv")
    assert tab.value(f"document.activeElement === {button}")


def copied(tab: Tab, button: str) -> list[list[str]]:
    """The rows on the clipboard after a button was pressed."""
    tab.value("document.querySelector('#said').textContent = ''")
    tab.value("navigator.clipboard.writeText('nothing was copied')")
    press_on(tab, button)
    tab.wait("document.querySelector('#said').textContent === 'Copied'")
    return list(csv.reader(io.StringIO(tab.value("navigator.clipboard.readText()"))))


def press_on(tab: Tab, button: str) -> None:
    tab.value(f"{button}.focus()")
    tab.press("Enter")


def test_figures_are_saved_as_pictures_of_their_own(tab: Tab, running: Browser) -> None:
    """A file arrives for each: an SVG that needs neither the page's colours nor its width."""
    tab.value(OPEN_ALL)
    names = tab.value("[...document.querySelectorAll('.save')].map(b => b.dataset.name)")
    assert len(names) == len(set(names)) == tab.value("document.querySelectorAll('svg').length")
    for index, name in enumerate(names[:6]):
        press_on(tab, f"document.querySelectorAll('.save')[{index}]")
        saved = arrived(running.downloads / f"{name}.svg")
        drawing = ET.fromstring(saved)
        assert "var(" not in saved
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(drawing.attrib["width"]) > 200
        assert len(list(drawing.iter("{http://www.w3.org/2000/svg}path"))) > 3


def arrived(path: Path) -> str:
    end = time.monotonic() + PATIENCE_S
    text = ""
    while not text.rstrip().endswith("</svg>"):  # the browser makes the file before it fills it
        assert time.monotonic() < end, f"{path.name} was never saved"
        time.sleep(0.02)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.unlink()
    return text


def test_everything_can_be_reached_by_keyboard(tab: Tab) -> None:
    """Tab comes by every control once, in the page's order, starting with the way to the content;
    what has the focus shows it; a closed part opens by Enter."""
    tab.press("Tab")
    assert tab.value("document.activeElement.className") == "skip"
    assert tab.value("document.activeElement.getBoundingClientRect().left >= 0")
    tab.press("Enter")
    assert tab.value("location.hash") == "#content"
    tab.value("document.activeElement.blur(), scrollTo(0, 0)")
    opened = tab.value("document.querySelectorAll('summary').length")
    for index in range(opened):
        press_on(tab, f"document.querySelectorAll('summary')[{index}]")
    assert tab.value("document.querySelectorAll('details[open]').length") == opened
    tab.value(
        "window.controls = [...document.querySelectorAll('a, button, summary, [tabindex]')],"
        "window.passed = [], document.addEventListener('focusin', e => {"
        "const style = getComputedStyle(e.target);"
        "passed.push([controls.indexOf(e.target), style.outlineStyle])}), 0"
    )
    count = tab.value("controls.length")
    for _ in range(count + 1):  # at its end the round passes by the browser's own controls
        tab.press("Tab")
    passed = tab.value("passed")
    order = [index for index, _ in passed]
    start = order.index(0)  # the last control that was pressed decides where the round begins
    assert (order[start:] + order[:start])[:count] == list(range(count))
    assert {outline for _, outline in passed} == {"solid"}
    names = tab.value(
        "controls.filter(c => !(c.getAttribute('aria-label') || c.getAttribute('aria-labelledby')"
        " || c.textContent.trim())).length"
    )
    assert names == 0  # a screen reader has something to call each of them
