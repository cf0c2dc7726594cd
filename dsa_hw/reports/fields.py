"""Typed, tolerant access to JSON written by an older, newer or killed run."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

from dsa_hw.errors import UserError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Interval: TypeAlias = tuple[float, float]
T = TypeVar("T")

LARGEST = 1e24
"""No count or time of a network reaches it, and figures of what is larger overflow."""


class ReportInputError(UserError):
    """The file a report is made from is missing or is not what it should be."""


@dataclass(slots=True)
class Fields:
    """One JSON object, read key by key.

    A key that is absent or null reads as None. A value of the wrong type (or
    a number that is not finite) also reads as None and is noted in
    ``problems``, which every nested object shares, so that the page can say so.

    Example:
        >>> Fields({"target_ms": 4.0}).number("target_ms")
        4.0
    """

    values: Mapping[str, Json]
    where: str = ""
    problems: list[str] = field(default_factory=list)

    def number(self, key: str) -> float | None:
        return self._checked(key, as_number, "a finite number")

    def text(self, key: str) -> str | None:
        return self._checked(key, lambda value: value if isinstance(value, str) else None, "text")

    def flag(self, key: str) -> bool | None:
        return self._checked(
            key, lambda value: value if isinstance(value, bool) else None, "true or false"
        )

    def shown(self, key: str) -> str | None:
        """Any value, as a person would read it."""
        return self._checked(key, show_json, "a value")

    def numbers(self, key: str) -> tuple[float, ...] | None:
        return self._checked(key, as_numbers, "a list of finite numbers")

    def texts(self, key: str) -> tuple[str, ...] | None:
        return self._checked(key, as_texts, "a list of texts")

    def interval(self, key: str) -> Interval | None:
        return self._checked(key, as_interval, "[low, high]")

    def object(self, key: str) -> "Fields | None":
        values = self._checked(
            key, lambda value: value if isinstance(value, dict) else None, "an object"
        )
        return None if values is None else Fields(values, f"{self.where}{key}.", self.problems)

    def objects(self, key: str) -> "tuple[Fields, ...] | None":
        """The objects of a list; elements that are not objects are noted and skipped."""
        items = self._checked(
            key, lambda value: value if isinstance(value, list) else None, "a list of objects"
        )
        if items is None:
            return None
        found = []
        for index, item in enumerate(items):
            if isinstance(item, dict):
                found.append(Fields(item, f"{self.where}{key}[{index}].", self.problems))
            else:
                self._note(f"{key}[{index}]", item, "an object")
        return tuple(found)

    def flat_numbers(self) -> dict[str, float]:
        """Every key whose value is a finite number."""
        found = {key: self.number(key) for key in self.values}
        return {key: value for key, value in found.items() if value is not None}

    def texts_of(self, key: str) -> tuple[tuple[str, str], ...]:
        """``flat_texts`` of a nested object; empty where there is none."""
        nested = self.object(key)
        return () if nested is None else nested.flat_texts()

    def flat_texts(self) -> tuple[tuple[str, str], ...]:
        """Every key with its value as text, in file order; null reads as "unknown"."""
        return tuple((key, show_json(value) or "unknown") for key, value in self.values.items())

    def _checked(self, key: str, read: Callable[[Json], T | None], expected: str) -> T | None:
        value = self.values.get(key)
        if value is None:
            return None
        result = read(value)
        if result is None:
            self._note(key, value, expected)
        return result

    def _note(self, key: str, value: Json, expected: str) -> None:
        self.problems.append(f"{self.where}{key}: expected {expected}, found {value!r:.60}")


def as_number(value: Json) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None


def as_numbers(value: Json) -> tuple[float, ...] | None:
    if not isinstance(value, list):
        return None
    found = [as_number(item) for item in value]
    numbers = tuple(item for item in found if item is not None)
    return numbers if len(numbers) == len(found) else None


def as_texts(value: Json) -> tuple[str, ...] | None:
    if not isinstance(value, list):
        return None
    return tuple(item if isinstance(item, str) else json.dumps(item) for item in value)


def as_interval(value: Json) -> Interval | None:
    numbers = as_numbers(value)
    return (numbers[0], numbers[1]) if numbers is not None and len(numbers) == 2 else None


def show_json(value: Json) -> str | None:
    """Text as it is, numbers short, lists and objects as ``a, b`` and ``k: v``."""
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(show_json(item) or "unknown" for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {show_json(item) or 'unknown'}" for key, item in value.items())
    return str(value)


def read_object(path: Path) -> Fields:
    """The one JSON object in ``path``.

    Raises:
        ReportInputError: the file is missing or does not hold a JSON object.
    """
    check_inside(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportInputError(
            f"{path} does not exist: give the folder of a run that wrote {path.name}."
        ) from None
    except OSError as error:
        raise ReportInputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ReportInputError(f"{path} is not JSON ({error}): run again to rewrite it.") from None
    if not isinstance(values, dict):
        raise ReportInputError(f"{path} holds a {type(values).__name__}, expected an object.")
    return Fields(values)


def read_text(path: Path) -> str | None:
    """A file for people to read as it is; None where there is none."""
    check_inside(path)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def read_json_lines(path: Path, problems: list[str]) -> Iterator[Fields]:
    """The objects of a JSON-lines file; unreadable lines are counted in ``problems``."""
    check_inside(path)
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if isinstance(values, dict):
                yield Fields(values, f"{path.name} line {number}: ", problems)
            else:
                unreadable += 1
    if unreadable:
        plural = "s" if unreadable > 1 else ""
        problems.append(f"{path.name}: {unreadable} unreadable line{plural} skipped")


def check_inside(path: Path) -> None:
    """See that a file of a folder is not a link to somewhere else.

    Raises:
        ReportInputError: it is; what is there is none of the folder's.
    """
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise ReportInputError(f"{path} is a link out of its folder; put the file itself there")


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is that of a file in a folder, and not a way out of it."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")
