"""Draw with matplotlib, off screen, into SVG that can stand inside an HTML page."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, TypeVar

from dsa_hw.reports.palette import FIGURE_SHADES, INK, MUTED, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

T = TypeVar("T")
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MAX_POINTS = 400


@dataclass(frozen=True, slots=True)
class Drawing:
    """An inline ``<svg>``; ``name`` is unique in its page (it prefixes every id)."""

    name: str
    svg: str


def draw_svg(
    name: str,
    description: str,
    size_in: tuple[float, float],
    draw: Callable[["Figure"], None],
) -> Drawing:
    """Run ``draw`` on an empty figure and return it as an inline SVG.

    Args:
        name: unique in the page; letters, digits and hyphens.
        description: what a reader who cannot see the figure should know.
        size_in: width and height in inches (72 SVG units each).
        draw: adds axes and artists; names are never read as math text.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(_style(name)), warnings.catch_warnings():
        # The browser, not matplotlib, supplies the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size_in, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True)
    return Drawing(name, _inline(buffer.getvalue(), name, description))


def style_axes(axes: "Axes", grid: str = "y") -> None:
    """Two quiet spines and a faint grid across the value axis (``"x"``, ``"y"``, ``"both"``)."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE.light)
    axes.tick_params(colors=MUTED.light, length=0)
    axes.set_axisbelow(True)
    if grid in ("x", "both"):
        axes.xaxis.grid(True, color=RULE.light, linewidth=0.7)
    if grid in ("y", "both"):
        axes.yaxis.grid(True, color=RULE.light, linewidth=0.7)


def thin(items: Sequence[T], limit: int = MAX_POINTS) -> list[T]:
    """At most ``limit`` of ``items``, evenly spaced, the first and last among them."""
    if len(items) <= limit:
        return list(items)
    last = len(items) - 1
    return [items[round(index * last / (limit - 1))] for index in range(limit)]


def shorten(name: str, limit: int = 34) -> str:
    """``name`` with its middle cut out where it is longer than ``limit``."""
    if len(name) <= limit:
        return name
    head = limit // 3
    return f"{name[:head]}…{name[head + 1 - limit :]}"


def _style(name: str) -> "dict[RcKeyType, object]":
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 9.0,
        "text.color": INK.light,
        "axes.labelcolor": MUTED.light,
        "axes.titlecolor": INK.light,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.solid_capstyle": "round",
    }


def _inline(svg: str, name: str, description: str) -> str:
    """Strip the XML prologue and metadata; scope ids; name colours and fonts by role."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = _scope_ids(body, name)
    body = re.sub(r'\bd="[^"]*"', lambda found: _round_path(found.group()), body)
    for shade in FIGURE_SHADES:
        body = body.replace(f" {shade.light}", f" var(--{shade.name},{shade.light})")
    body = re.sub(r"'DejaVu Sans'(?:, [\w'\- ]+)*", FONTS, body)
    body = re.sub(r">\s+<", "><", body)
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None  # matplotlib always writes one
    start = (
        f'<svg viewBox="{view_box.group(1)}" role="img" aria-labelledby="{name}-about">'
        f'<desc id="{name}-about">{escape(description)}</desc>'
    )
    return start + body[body.index(">") + 1 :].strip()


def _scope_ids(body: str, name: str) -> str:
    """Prefix the ids that are referred to with ``name``; drop the others."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))

    def rename(found: re.Match[str]) -> str:
        return f' id="{name}-{found.group(1)}"' if found.group(1) in used else ""

    body = re.sub(r'\sid="([^"]*)"', rename, body)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)


def _round_path(path: str) -> str:
    """Two decimals are a fiftieth of a pixel; matplotlib writes six."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path)
