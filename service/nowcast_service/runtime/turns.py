"""Tenants take turns: one line per tenant, served round robin."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """First in, first out within a tenant; between tenants, one each in turn. Not thread-safe."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def of(self, tenant: str) -> int:
        """How many a tenant has waiting."""
        return len(self._lines.get(tenant, ()))

    def push(self, tenant: str, item: T) -> None:
        """Queue an item at the end of its tenant's line; a tenant that had none comes after all others."""
        self._lines.setdefault(tenant, deque()).append(item)

    def pop(self, ready: Callable[[str, T], bool] = lambda tenant, item: True) -> T | None:
        """The next item that is ready, whose tenant has had its turn then; None where none is."""
        for tenant, line in self._lines.items():
            for item in line:
                if ready(tenant, item):
                    self._take(tenant, item)
                    if tenant in self._lines:
                        self._lines.move_to_end(tenant)
                    return item
        return None

    def remove(self, tenant: str, item: T) -> bool:
        """Take an item out of its line; whether it was there."""
        if item not in self._lines.get(tenant, ()):
            return False
        self._take(tenant, item)
        return True

    def before(self, tenant: str, item: T) -> int:
        """How many are served before an item; 0 for one that is not queued."""
        mine = self._lines.get(tenant, deque())
        if item not in mine:
            return 0
        place = mine.index(item)
        count, behind = place, False
        for other, line in self._lines.items():
            if other == tenant:
                behind = True
            else:
                count += min(len(line), place if behind else place + 1)
        return count

    def _take(self, tenant: str, item: T) -> None:
        line = self._lines[tenant]
        line.remove(item)
        if not line:
            del self._lines[tenant]
