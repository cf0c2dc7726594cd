"""The parts a page is made of. Every text that comes in is escaped here, once."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from dsa_hw.reports.assets import SCRIPT, STYLE
from dsa_hw.reports.drawing import Drawing
from dsa_hw.reports.palette import css_variables

BADGES = {
    "met": "✓ Target met",
    "missed": "✕ Target missed",
    "undecided": "Target undecided",
    "unknown": "Target not checked",
}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
CELL_CLASSES = {"text": "", "number": "", "key": "key", "none": "none"}


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that is safe to put on a page; a plain ``str`` is text and gets escaped."""

    markup: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: what is shown, and what goes into the CSV (unrounded).

    ``kind`` is ``"text"``, ``"number"``, ``"key"`` (a number to look at first)
    or ``"none"`` (there is no value, and ``shown`` says why).
    """

    shown: str
    raw: str
    kind: str = "text"


@dataclass(frozen=True, slots=True)
class Table:
    """``header`` names the columns; the first cell of each row names the row."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    strong_rows: frozenset[int] = frozenset()
    is_facts: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """``anchor`` is the id the navigation links to."""

    anchor: str
    title: str
    body: tuple[Html, ...]


@dataclass(frozen=True, slots=True)
class Headline:
    """The first thing read: a sentence, a badge (see ``BADGES``; or None) and its proof."""

    kind: str
    sentence: str
    badge: str | None
    details: tuple[str, ...]


def text_cell(value: str | None, absent: str = "not recorded") -> Cell:
    return Cell(absent, "", "none") if value is None else Cell(value, value)


def number_cell(shown: str, value: float, is_key: bool = False) -> Cell:
    return Cell(shown, repr(value), "key" if is_key else "number")


def no_cell(why: str = "") -> Cell:
    return Cell(why, "", "none")


def text(value: str, classes: str = "") -> Html:
    return Html(f"<p{_class(classes)}>{escape(value)}</p>")


def notes(items: Sequence[str], classes: str = "notes") -> Html:
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return Html(f'<ul class="{escape(classes)}">{listed}</ul>')


def preformatted(value: str, label: str) -> Html:
    return Html(
        f'<pre tabindex="0" role="region" aria-label="{escape(label)}">{escape(value)}</pre>'
    )


def details(summary: str, *body: Html) -> Html:
    inner = "".join(part.markup for part in body)
    return Html(f"<details><summary>{escape(summary)}</summary>{inner}</details>")


def tiles(items: Sequence[Html]) -> Html:
    return Html('<div class="tiles">' + "".join(item.markup for item in items) + "</div>")


def table(content: Table) -> Html:
    """The table in its own scrolling box, with a button that copies it as CSV."""
    kinds = [_column_kind(content, column) for column in range(len(content.header))]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{escape(name)}</th>'
        for name, kind in zip(content.header, kinds, strict=True)
    )
    body = "".join(
        _row(row, kinds, index in content.strong_rows) for index, row in enumerate(content.rows)
    )
    classes = _class("facts" if content.is_facts else "")
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(content.caption)}">'
        f"<table{classes}><caption><span>{escape(content.caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<div class="tools">{copy_button(content.caption, to_csv(content)).markup}</div>'
    )


def to_csv(content: Table) -> str:
    return csv_text(content.header, ([cell.raw for cell in row] for row in content.rows))


def csv_text(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([header, *([inert(value) for value in line] for line in lines)])
    return out.getvalue()


def inert(value: object) -> object:
    """A CSV cell that no spreadsheet takes for a formula: an apostrophe goes before a text."""
    if isinstance(value, str) and value[:1] in FORMULA_STARTS and not _is_number(value):
        return f"'{value}"
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def copy_button(what: str, csv_text: str, label: str = "Copy as CSV") -> Html:
    return Html(
        f'<button type="button" class="copy" data-csv="{escape(csv_text)}"'
        f' aria-label="{escape(f"{label}: {what}")}">{escape(label)}</button>'
    )


def figure(drawing: Drawing, caption: str, csv_text: str | None = None, kind: str = "wide") -> Html:
    """A figure with its caption, a save button and, given CSV, a copy button.

    ``kind`` is ``"wide"`` (the whole column), ``"lead"`` (the same, with larger
    text) or ``"medium"`` (about two thirds of the column).
    """
    return Html(_figure(drawing, caption, kind, "", csv_text))


def tile_figure(drawing: Drawing, title: str, caption: str, csv_text: str) -> Html:
    """One of many small figures, headed by its own title."""
    return Html(_figure(drawing, caption, "tile", f"<h3>{escape(title)}</h3>", csv_text))


def page(title: str, headline: Headline, sections: Sequence[Section], footer: str) -> str:
    """The whole document, as text."""
    links = "".join(
        f'<li><a href="#{item.anchor}">{escape(item.title)}</a></li>' for item in sections
    )
    body = "".join(_section(item) for item in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css_variables()}{STYLE}</style></head>\n<body>"
        '<a class="skip" href="#content">Skip to the results</a>\n'
        f'<header>{_headline(headline)}<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f'<main id="content">{body}</main>\n'
        f"<footer><p>{escape(footer)}</p></footer>"
        '<div id="said" class="said" role="status" aria-live="polite"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _figure(drawing: Drawing, caption: str, kind: str, head: str, csv_text: str | None) -> str:
    label = f"{drawing.name}-caption"
    copy = (
        ""
        if csv_text is None
        else copy_button(drawing.name, csv_text, "Copy numbers as CSV").markup
    )
    return (
        f'<figure role="figure" class="{kind}" aria-labelledby="{label}">{head}'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{label}">'
        f"{drawing.svg}</div>"
        f'<figcaption id="{label}">{escape(caption)}</figcaption>'
        f'<div class="tools"><button type="button" class="save" data-name="{drawing.name}"'
        f' aria-label="Save as SVG: {drawing.name}">Save as SVG</button>{copy}</div></figure>'
    )


def _column_kind(content: Table, column: int) -> str:
    """``"number"`` (aligned right) unless the column names the rows or holds text."""
    is_text = column == 0 or any(row[column].kind == "text" for row in content.rows)
    return "" if is_text else "number"


def _row(row: tuple[Cell, ...], kinds: Sequence[str], is_strong: bool) -> str:
    head, *rest = row
    cells = "".join(
        f"<td{_class(kind, CELL_CLASSES[cell.kind])}>{escape(cell.shown)}</td>"
        for cell, kind in zip(rest, kinds[1:], strict=True)
    )
    strong = _class("strong" if is_strong else "")
    return f'<tr{strong}><th scope="row">{escape(head.shown)}</th>{cells}</tr>'


def _class(*names: str) -> str:
    listed = " ".join(name for name in names if name)
    return f' class="{escape(listed)}"' if listed else ""


def _headline(headline: Headline) -> str:
    badge = ""
    if headline.badge is not None:
        badge = f'<span class="badge {headline.badge}">{BADGES[headline.badge]}</span>'
    proof = "".join(f"<p>{escape(line)}</p>" for line in headline.details)
    return (
        f'<p class="kind">{escape(headline.kind)}</p><h1>{escape(headline.sentence)}</h1>'
        f'<div class="verdict">{badge}{proof}</div>'
    )


def _section(section: Section) -> str:
    label = f"{section.anchor}-title"
    body = "".join(part.markup for part in section.body)
    return (
        f'<section id="{section.anchor}" aria-labelledby="{label}">'
        f'<h2 id="{label}">{escape(section.title)}</h2>{body}</section>\n'
    )
