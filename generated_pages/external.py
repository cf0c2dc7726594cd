"""What a page of HTML would load from another host."""

from __future__ import annotations

from html.parser import HTMLParser

LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
    "link": "href",
}
"""The attribute by which an element makes a browser fetch something; links to follow are not."""

NOT_FETCHED = {"canonical", "prev", "next", "edit", "alternate", "license"}
"""Relations of a ``link`` that only name an address."""


def external_loads(page: str) -> list[str]:
    """The addresses on other hosts that opening ``page`` fetches."""
    reader = _Reader()
    reader.feed(page)
    return reader.found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get(LOADS.get(tag, "")) or ""
        if tag == "link" and set((values.get("rel") or "").split()) <= NOT_FETCHED:
            return
        if address.startswith(("http://", "https://", "//")):
            self.found.append(address)
