"""How numbers are written on the pages."""

from dsa_hw.reports.fields import Interval

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def show_number(value: float) -> str:
    """Four significant digits, never in powers of ten for 0.001 and up."""
    if abs(value) >= 9999.5:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def show_ms(value: float) -> str:
    return f"{show_number(value)} ms"


def show_interval(interval: Interval) -> str:
    return f"{show_number(interval[0])} to {show_number(interval[1])}"


def show_pct(fraction: float) -> str:
    """A fraction in 0..1 as a percentage with one decimal."""
    return f"{fraction * 100:.1f} %"


def show_count(value: float) -> str:
    """A large count with its SI prefix: ``1.814 G``."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g} {prefix}"
    return f"{value:.4g}"


def show_change(before: float, after: float) -> str:
    """Relative change, with a real minus sign, as ``-40.7 %``."""
    change = (after / before - 1) * 100
    return f"{change:+.1f} %".replace("-", MINUS)


def show_points(before: float, after: float) -> str:
    """Difference of two fractions in percentage points."""
    return f"{(after - before) * 100:+.1f} points".replace("-", MINUS)


def show_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
