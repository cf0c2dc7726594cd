"""Sections and cells that the reports of a run and of a comparison share."""

from collections.abc import Sequence

from dsa_hw.reports import page as parts
from dsa_hw.reports.fields import Interval
from dsa_hw.reports.formatting import show_interval
from dsa_hw.reports.page import Cell, Section, Table, no_cell

Absent = str
"""A section that the data did not suffice for: what is missing, in words."""


def with_left_out(built: Sequence[Section | Absent], problems: Sequence[str]) -> list[Section]:
    """The sections there are, then one that names the others and what could not be read."""
    left_out = [item for item in built if isinstance(item, str)]
    sections = [item for item in built if isinstance(item, Section)]
    body = [parts.notes(left_out)] if left_out else []
    if problems:
        body += [parts.text("Values that could not be read:"), parts.notes(problems)]
    return [*sections, *([Section("left-out", "Not in this report", tuple(body))] if body else ())]


def facts_table(caption: str, facts: Sequence[tuple[str, str]]) -> parts.Html:
    """Names and values, two columns."""
    rows = tuple((Cell(name, name), Cell(value, value)) for name, value in facts)
    return parts.table(Table(caption, ("Key", "Value"), rows, is_facts=True))


def environment_section(environment: Sequence[tuple[str, str]], caption: str) -> Section | Absent:
    """Where it was measured."""
    if not environment:
        return "Environment: environment is not in result.json."
    body = parts.details(f"{len(environment)} entries", facts_table(caption, environment))
    return Section("environment", "Environment", (body,))


def config_section(config_text: str | None) -> Section | Absent:
    """What was asked for."""
    if config_text is None:
        return "Configuration: config.yaml is not in the folder."
    shown = parts.preformatted(config_text, "config.yaml")
    return Section("config", "Resolved configuration", (parts.details("config.yaml", shown),))


def interval_cell(interval: Interval | None, absent: str = "not recorded") -> Cell:
    """``low to high``."""
    if interval is None:
        return no_cell(absent)
    return Cell(show_interval(interval), f"{interval[0]!r} to {interval[1]!r}", "number")
