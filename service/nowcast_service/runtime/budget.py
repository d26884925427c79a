"""What tenants share: bytes that may be reserved, places that may be taken."""

from __future__ import annotations

import threading
from collections import Counter


class Shares:
    """A number of places or bytes that tenants share. Thread-safe.

    With several tenants, half of them are common: whoever comes first has them. The other half is divided equally and
    kept for its owner, at least one for each, so that no tenant can leave another without any.

    Args:
        total: How many there are.
        tenants: How many tenants there are.
        most: That one tenant may hold, if less than its own and the common ones.
    """

    def __init__(self, total: int, tenants: int = 1, most: int | None = None) -> None:
        self.total = total
        self.own = 0 if tenants == 1 else max(1, total // (2 * tenants))
        self._common = max(0, total - self.own * tenants)
        self.most = min(self.own + self._common, total if most is None else most)
        self._held: Counter[str] = Counter()
        self._common_held = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Held by all tenants together."""
        with self._lock:
            return self._held.total()

    def of(self, tenant: str) -> int:
        """Held by one tenant."""
        with self._lock:
            return self._held[tenant]

    def take(self, tenant: str, number: int = 1) -> bool:
        """Take so many more; False, and nothing changed, where the tenant cannot have them. A negative number gives.

        The tenant without a name is the service itself, which has no share of its own.
        """
        own = self.own if tenant else 0
        with self._lock:
            held = self._held[tenant]
            common = max(0, held + number - own) - max(0, held - own)
            if number > 0 and (held + number > self.most or self._common_held + common > self._common):
                return False
            self._held[tenant] += number
            self._common_held += common
            if not self._held[tenant]:
                del self._held[tenant]
        return True

    def give(self, tenant: str, number: int = 1) -> None:
        """Give so many back."""
        self.take(tenant, -number)


class Budget:
    """Bytes that may be reserved, in all and by each tenant. Thread-safe.

    Args:
        total: Bytes.
        tenants: How many tenants there are; see `Shares`.
    """

    def __init__(self, total: int, tenants: int = 1) -> None:
        self.total = total
        self._shares = Shares(total, tenants)

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._shares.used

    @property
    def most(self) -> int:
        """Bytes one tenant may reserve."""
        return self._shares.most

    def reserve(self, nbytes: int, tenant: str = "") -> Reservation | None:
        """Reserve bytes for a tenant; None when it cannot have that many now."""
        return Reservation(self._shares, tenant, nbytes) if self._shares.take(tenant, nbytes) else None


class Reservation:
    """A part of a `Budget`, given back once."""

    def __init__(self, shares: Shares, tenant: str, nbytes: int) -> None:
        self._shares = shares
        self._tenant = tenant
        self.nbytes = nbytes
        self._lock = threading.Lock()

    def resize(self, nbytes: int) -> bool:
        """Make it this large; False, and nothing changed, when there is not that much left."""
        with self._lock:
            if not self._shares.take(self._tenant, nbytes - self.nbytes):
                return False
            self.nbytes = nbytes
        return True

    def release(self) -> None:
        """Give the bytes back; safe to call more than once."""
        self.resize(0)
