"""Several equal devices that measure into one table at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from profilers.backends import Backend
from profilers.errors import BackendUnavailable
from profilers.timing import Runner

MUST_AGREE = (
    "device", "driver", "runtime", "runtime_version", "provider", "precision", "batch_size",
    "memory_mib", "power_limit_w", "sm_clock_max_mhz", "memory_clock_max_mhz",
)  # fmt: skip


class Parallel:
    """Equal backends on several devices; ``collect`` shares its requests among the members.

    Whole networks that are compared with each other are timed on the first.

    Args:
        members: one a device.
        devices: their names, for messages.

    Raises:
        BackendUnavailable: the devices differ; names the field.
    """

    def __init__(self, members: Sequence[Backend], devices: Sequence[str]) -> None:
        self.members = tuple(members)
        self._first = self.members[0]
        self._devices = tuple(devices)
        self.name = self._first.name
        self.layers_pay_call = self._first.layers_pay_call
        expected = self._first.provenance()
        for member, device in zip(self.members[1:], devices[1:], strict=True):
            found = member.provenance()
            for field in MUST_AGREE:
                if found.get(field) != expected.get(field):
                    raise BackendUnavailable(
                        f"{devices[0]} and {device} differ in {field}: {expected.get(field)!r} "
                        f"and {found.get(field)!r}; a table is of one kind of device"
                    )

    def provenance(self) -> dict[str, str | int]:
        """The first device's, and how many there are."""
        return self._first.provenance() | {"devices": len(self.members)}

    def open(self, model: bytes | Path) -> AbstractContextManager[Runner]:
        """On the first device."""
        return self._first.open(model)

    def open_layer(self, model: bytes) -> AbstractContextManager[Runner]:
        """On the first device."""
        return self._first.open_layer(model)

    def renew(self) -> None:
        """All devices."""
        for member in self.members:
            member.renew()

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """On the first device."""
        return self._first.outputs(model, inputs)

    def notes(self) -> tuple[str, ...]:
        """Of the first device's choice, and that there are several."""
        return (*self._first.notes(), f"measuring on {', '.join(self._devices)} at once")

    def observations(self) -> tuple[str, ...]:
        """Of all devices."""
        return tuple(
            f"{device}: {text}"
            for device, member in zip(self._devices, self.members, strict=True)
            for text in member.observations()
        )


def members_of(backend: Backend) -> tuple[Backend, ...]:
    """The backends that measure independently of each other."""
    return backend.members if isinstance(backend, Parallel) else (backend,)
