"""The colours of the pages, by role, in light and in dark."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shade:
    """A colour role: the CSS variable ``--name``, its light and its dark value.

    Figures are drawn with ``light``; the finished SVG then names the variable
    instead (with the light value as its fallback), so it follows the page.
    """

    name: str
    light: str
    dark: str


INK = Shade("ink", "#1b2430", "#e9ecf1")
MUTED = Shade("muted", "#566173", "#a7b0bf")
RULE = Shade("rule", "#dce1e7", "#343c48")
DENSE = Shade("dense", "#8c97a8", "#77849a")
PRUNED = Shade("pruned", "#0e7c86", "#3dbcc2")
PREDICTED = Shade("predicted", "#86c5c9", "#2a747b")
TARGET = Shade("target", "#c8470f", "#ff9459")
SECOND = Shade("second", "#5c52c9", "#a39cff")
SHADE = Shade("shade", "#eef1f4", "#262d37")
FIGURE_SHADES = (INK, MUTED, RULE, DENSE, PRUNED, PREDICTED, TARGET, SECOND, SHADE)

PAGE_SHADES = (
    Shade("page", "#f5f6f8", "#11151a"),
    Shade("panel", "#ffffff", "#191f27"),
    Shade("met", "#0c6b3f", "#5fd39a"),
    Shade("met-back", "#dcf3e6", "#12382a"),
    Shade("missed", "#a52216", "#ff9d90"),
    Shade("missed-back", "#fde5e1", "#45201c"),
)

# Mid-tone ramp for "one line per group" and "one line per cin": both ends keep
# enough contrast with a white and with a near-black page.
RAMP = ("#c65d21", "#b8752a", "#8f8a35", "#4f9457", "#27937f", "#2a8aa8", "#4a79c4", "#7a68cc")


def css_variables() -> str:
    """``:root`` rules for the light page, and for a reader who prefers dark."""
    shades = FIGURE_SHADES + PAGE_SHADES
    light = "".join(f"--{shade.name}:{shade.light};" for shade in shades)
    dark = "".join(f"--{shade.name}:{shade.dark};" for shade in shades)
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    )


def ramp(count: int) -> list[str]:
    """``count`` hex colours spread evenly over the ramp, in order."""
    if count == 1:
        return [RAMP[-3]]
    return [_ramp_at(index / (count - 1)) for index in range(count)]


def _ramp_at(position: float) -> str:
    scaled = position * (len(RAMP) - 1)
    left = min(int(scaled), len(RAMP) - 2)
    share = scaled - left
    pairs = zip(_channels(RAMP[left]), _channels(RAMP[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
