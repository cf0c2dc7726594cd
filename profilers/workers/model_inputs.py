"""The inputs that a model is timed with."""

from __future__ import annotations

from collections.abc import Sequence

from profilers.errors import BackendUnavailable


def input_shape(name: str, declared: Sequence[object], batch_size: int) -> tuple[int, ...]:
    """An input's shape as it is timed: the batch size stands where the model leaves that open.

    Args:
        declared: a whole number for each dimension; a name or None where any size will do.

    Raises:
        BackendUnavailable: another dimension than the first is open.
    """
    shape = [_size(size) for size in declared]
    if shape and shape[0] is None:
        shape[0] = batch_size
    for number, size in enumerate(shape):
        if size is None:
            raise BackendUnavailable(
                f"dimension {number} of the model's input {name} is open ({declared[number]!r}); "
                "export the network with the size that will be deployed"
            )
    return tuple(size for size in shape if size is not None)


def _size(declared: object) -> int | None:
    return declared if isinstance(declared, int) and declared > 0 else None
