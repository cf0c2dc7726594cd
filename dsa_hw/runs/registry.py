"""Things that a configuration calls by name, open to entries from outside the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from dsa_hw.errors import UserError
from dsa_hw.runs.factories import is_factory_name, load_factory

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Maps names to entries, which are imported on first use.

    Example:
        >>> from dsa_hw.runs.budgets import BUDGETS, BudgetSetting
        >>> def energy_budget(setting: BudgetSetting): ...
        >>> BUDGETS.register("energy", energy_budget)
        >>> sorted(BUDGETS)
        ['energy', 'flops', 'latency', 'memory', 'params']
        >>> BUDGETS.remove("energy")

    Args:
        what: what an entry is, as messages call it ("budget").
        entries: entries, or ``package.module:attribute`` where they are.
    """

    def __init__(self, what: str, entries: Mapping[str, Entry | str]) -> None:
        self._what = what
        self._entries: dict[str, Entry | str] = dict(entries)

    def register(self, name: str, entry: Entry | str) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"a {self._what} is called {name!r} already; choose another name")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Take an entry out again.

        Raises:
            KeyError: there is none of this name.
        """
        del self._entries[name]

    def find(self, name: str) -> Entry:
        """Return the entry of that name, or what ``package.module:attribute`` names.

        Raises:
            UserError: there is none, or its module does not import.
        """
        self.check(name)
        entry = self._entries.get(name, name)
        if isinstance(entry, str):
            return load_factory(entry)  # pyright: ignore[reportReturnType]
        return entry

    def check(self, name: str) -> None:
        """See that ``find`` knows the name, without importing anything.

        Raises:
            UserError: it does not.
        """
        if name in self._entries or is_factory_name(name):
            return
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no {self._what} called {name!r}; {hint}known: {', '.join(self._entries)}, "
            "or package.module:factory"
        )

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(name)
        return self.find(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
