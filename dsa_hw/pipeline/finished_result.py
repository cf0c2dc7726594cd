"""A finished run's ``result.json``, checked before anything relies on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from dsa_hw.allocation.verdict import VERDICTS
from dsa_hw.errors import RunFolderError
from dsa_hw.runs.factories import is_factory_name
from dsa_hw.runs.folder import RESULT_FILE, RunFolder

Check = Callable[[Any], bool]


def finished_result(folder: RunFolder) -> dict[str, Any] | None:
    """What the run in ``folder`` came to; None if it has not finished.

    Raises:
        RunFolderError: the file holds something else; names the field, its value and what was
            expected.
    """
    result = folder.read_json(RESULT_FILE)
    if result is None or (isinstance(result, dict) and "infeasible" in result):
        return result
    path = folder.path / RESULT_FILE
    if not isinstance(result, dict):
        raise RunFolderError(f"{path} holds {result!r:.60}; expected the result of a run")
    for name, value, (is_right, expected) in _checks(result):
        if not is_right(value):
            raise RunFolderError(f"{path}: {name} is {value!r:.60}; expected {expected}")
    return result


def names_code(model: str, data: str) -> str | None:
    """What of a configuration is a module that using it would import; None if nothing is.

    timm's networks are no more a stranger's code than torchvision's.
    """
    named = {"model": model.removeprefix("timm:"), "data": data}
    return next((f"{k} {v}" for k, v in named.items() if is_factory_name(v)), None)


def _number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e24 and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


def _is_share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _numbers_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


TEXT = (_is_text, "text")
POSITIVE = (_positive, "a positive number")
WHOLE = (_whole, "a positive whole number")
TOP: dict[str, tuple[Check, str]] = {
    "model": TEXT, "device": TEXT, "backend": TEXT, "precision": TEXT,
    "batch_size": WHOLE,
    "threads": (_or_none(lambda n: isinstance(n, int) and 0 <= n < 2**31), "a whole number"),
    "target_ms": (_or_none(_positive), "a positive number or null"),
    "target_ratio": (_or_none(_is_share), "a number between 0 and 1, or null"),
    "met": (lambda met: met is None or isinstance(met, bool), "true, false or null"),
    "seconds": (_numbers_by_name, "numbers by name"),
    "dense": (lambda part: isinstance(part, dict), "an object"),
    "pruned": (lambda part: isinstance(part, dict), "an object"),
}  # fmt: skip
OPTIONAL: dict[str, tuple[Check, str]] = {
    "verdict": (lambda verdict: verdict in VERDICTS, f"one of {', '.join(VERDICTS)}"),
    "verdict_reason": TEXT,
    "warnings": (_list_of(_is_text), "a list of texts"),
    "removed_branches": (_list_of(_is_text), "a list of texts"),
    "fast_state": (
        _or_none(lambda state: _numbers_by_name(state) and set(state) == set(FAST_STATE)),
        "the times of two reference kernels, or null",
    ),
    "num_classes": (_or_none(_whole), "a positive whole number or null"),
    "input_shape": (
        lambda shape: _list_of(_whole)(shape) and len(shape) == 3, "channels, height and width"
    ),
}  # fmt: skip
FAST_STATE = ("compute_ms", "memory_ms")
PART: dict[str, tuple[Check, str]] = {
    "measured_ms": POSITIVE, "flops": POSITIVE, "params": POSITIVE,
    "ci95_ms": (_is_interval, "two numbers"),
    "accuracy": (_or_none(_is_share), "a number between 0 and 1, or null"),
}  # fmt: skip


def _checks(result: dict[str, Any]) -> Iterator[tuple[str, Any, tuple[Check, str]]]:
    """(field, its value, what it has to be) of all that the commands rely on, outer ones first."""
    yield from ((name, result.get(name), check) for name, check in TOP.items())
    yield from ((n, result[n], check) for n, check in OPTIONAL.items() if n in result)
    for part in ("dense", "pruned"):
        for name, check in PART.items():
            yield f"{part}.{name}", result[part].get(name), check
    yield "pruned.predicted_ms", result["pruned"].get("predicted_ms"), POSITIVE
