"""The list of decisions: one line for each file ``NNNN-name.md`` in ``docs/decisions``."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"\d{4}-[a-z0-9-]+\.md")
HEAD = """# Decisions

Each decision is one file: what was decided, why, on what evidence, and what would change it. The
measurements that led to the older ones are told in full in the [lab notes](../lab-notes.md).

| | decision | status |
| --- | --- | --- |
"""


def files(folder: Path) -> list[Path]:
    """The decisions, by number."""
    return sorted(path for path in folder.glob("*.md") if NAME.fullmatch(path.name))


def page(folder: Path) -> str:
    """The list as a page."""
    rows = []
    for path in files(folder):
        text = path.read_text(encoding="utf-8")
        rows.append(f"| {path.name[:4]} | [{title(text)}]({path.name}) | {status(text)} |")
    return HEAD + "\n".join(rows) + "\n"


def title(text: str) -> str:
    """What a decision's first heading says, without its number."""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    words = re.sub(r"^#+\s*(\d{4}\s*[:.-]?\s*)?", "", first).strip().replace("|", "/")
    return words[:1].upper() + words[1:]


def status(text: str) -> str:
    """What stands behind ``Status:``, up to the end of its sentence or line."""
    found = re.search(r"^\W*Status\W*[:.]?\W*\s*(.+)$", text, re.MULTILINE | re.IGNORECASE)
    return found[1].split(". ")[0].strip(" .*").replace("|", "/") if found else "not told"
