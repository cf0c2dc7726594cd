"""What MkDocs calls while it builds the site (``hooks`` in ``mkdocs.yml``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from generated_pages import decisions, figures, options, results
from generated_pages.external import external_loads

ROOT = Path(__file__).parent.parent
FIGURE = re.compile(r"^<!-- figure: ([a-z-]+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Give each benchmark's page its place in the navigation."""
    pages = [{title: path} for path, (title, _) in _results().items()]
    for entry in config.nav:
        if "Results" in entry:
            entry["Results"] = [{"All": "results/index.md"}, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the code and from the results."""
    made = {
        "reference/options.md": options.page(),
        "decisions/index.md": decisions.page(ROOT / "docs" / "decisions"),
        "results/index.md": results.index(ROOT / "benchmarks" / "results"),
        **{path: text for path, (_, text) in _results().items()},
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put each figure where a comment asks for it."""

    def drawn(found: re.Match[str]) -> str:
        if found[1] not in figures.FIGURES:
            known = ", ".join(sorted(figures.FIGURES))
            raise PluginError(f"{page.file.src_uri}: no figure {found[1]!r}; known: {known}")
        return figures.drawn(found[1])

    return FIGURE.sub(drawn, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from another host."""
    found = external_loads(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads {', '.join(found)}; a page needs no network")
    return output


def _results() -> dict[str, tuple[str, str]]:
    return results.pages(ROOT / "benchmarks" / "results")
