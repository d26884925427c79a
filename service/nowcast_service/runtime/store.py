"""All sessions of one service: quotas, expiry, and room made for new ones.

The service is a cache of the history; the client keeps the truth until it is used. So dropping a session is always
allowed, and always said: the next call on it is answered ``expired`` or ``missing_snapshots``.

A session reserves all it will ever need when it is created. Otherwise many half-full sessions could fill the budget and
wait for each other for ever.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from nowcast_proto.errors import Busy, Conflict, Expired, NotFound, NowcastError, TooLarge
from nowcast_proto.messages import SessionCreate
from nowcast_proto.tensors import DTYPES

from nowcast_service.runtime.arrival import spec_bytes, spec_memory
from nowcast_service.runtime.budget import Budget, Reservation, Shares
from nowcast_service.runtime.session import Session

_REMEMBERED = 10_000


class SessionStore:
    """All sessions of one service.

    Args:
        budget: What histories, uploads and answers may take together.
        tenant_bytes: What the sessions of one tenant may reserve.
        session_bytes: What one session may reserve.
        max_sessions: Sessions in all.
        max_sessions_per_tenant: Sessions of one tenant.
        expiry: Seconds of idleness after which a session is dropped.
        evict_after: Seconds of idleness after which it may be dropped to make room for another of its tenant.
        lapse_after: Seconds after which the memory set aside for one that sends nothing is given to others.
        tenants: How many tenants there are; see `Shares`.
        results: Answers a session keeps.
        on_drop: Called with the reason for every session dropped.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        tenant_bytes: int,
        session_bytes: int,
        max_sessions: int,
        max_sessions_per_tenant: int,
        expiry: float,
        evict_after: float,
        lapse_after: float,
        tenants: int = 1,
        results: int,
        on_drop: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.budget = budget
        self._tenant_bytes = tenant_bytes
        self._session_bytes = session_bytes
        self._places = Shares(max_sessions, tenants, max_sessions_per_tenant)
        self.expiry = expiry
        self._evict_after = evict_after
        self._lapse_after = lapse_after
        self._results = results
        self._on_drop = on_drop
        self._sessions: dict[tuple[str, str], Session] = {}
        self._leaving: list[Session] = []
        self._expired: OrderedDict[tuple[str, str], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def unfetched(self) -> int:
        """Nowcasts that are done and were not fetched yet."""
        found = (n for session in self._sessions.values() for n in session.nowcasts.values())
        return sum(n.job.state in ("done", "failed") and not n.fetched for n in found)

    def create(self, tenant: str, name: str, request: SessionCreate, need: int | None = None) -> tuple[Session, bool]:
        """Create a session, or find the same one; whether it is new.

        Args:
            tenant: Whose.
            name: Its id.
            request: What it is for.
            need: What `check_size` said, where it was asked.

        Raises:
            Conflict: It exists with another spec.
            TooLarge: It would never fit its quota.
            Busy: There is no room now.
        """
        digest = request.spec.digest()
        held = self._sessions.get((tenant, name))
        if held is not None:
            if (held.spec_digest, held.keep, held.dtype) != (digest, request.keep, request.dtype):
                raise Conflict(
                    f"session {name} exists with another spec, number of snapshots or dtype",
                    expected=f"spec digest {held.spec_digest}, keep {held.keep}, {held.dtype}",
                    remedy="use a new session id for another model",
                )
            held.touched = time.monotonic()
            return held, False
        need = need or self.check_size(name, request)
        session = Session(
            tenant,
            name,
            request.spec,
            digest,
            request.keep,
            request.dtype,
            need,
            self._room(tenant, need),
            self._results,
        )
        self._sessions[tenant, name] = session
        self._expired.pop((tenant, name), None)
        return session, True

    def check_size(self, name: str, request: SessionCreate) -> int:
        """Bytes a session will need: the snapshots kept, one more on its way in, the answers, and the spec.

        Raises:
            TooLarge: It would never fit its quota.
        """
        one = spec_bytes(request.spec, DTYPES[request.dtype])
        need = (request.keep + 1) * one + self._results * spec_bytes(request.spec) + spec_memory(request.spec)
        cap = min(self._session_bytes, self._tenant_bytes, self.budget.most)
        if need > cap:
            raise TooLarge(
                f"session {name} would need {need} bytes",
                expected=f"at most {cap}",
                remedy="keep fewer snapshots, send them as bfloat16, or raise NOWCAST_BUDGET and its quotas",
            )
        return need

    def get(self, tenant: str, name: str) -> Session:
        """A tenant's session; another tenant's does not exist for it.

        Raises:
            NotFound: There is none.
            Expired: There was one, and it was dropped.
        """
        self.sweep()
        session = self._sessions.get((tenant, name))
        if session is None:
            reason = self._expired.get((tenant, name))
            if reason is not None:
                raise Expired(
                    f"session {name} was dropped: {reason}",
                    remedy="create it again and send its snapshots again",
                    detail={"reason": reason},
                )
            raise NotFound(f"there is no session {name}", remedy="create it with PUT, then send its snapshots")
        session.touched = time.monotonic()
        return session

    def delete(self, tenant: str, name: str) -> None:
        """Drop a session at its owner's wish; one that does not exist is as good as dropped."""
        self._drop((tenant, name), None)

    def sweep(self) -> None:
        """Drop sessions that were idle for too long; give back what dropped ones still used when they were dropped."""
        self._leaving = [session for session in self._leaving if not session.leave()]
        now = time.monotonic()
        for key, session in list(self._sessions.items()):
            if now - session.touched > self.expiry and session.idle:
                self._drop(key, "expired")
            else:
                session.lapse(now - self._lapse_after)

    def reserve(self, tenant: str, nbytes: int, what: str) -> Reservation:
        """Reserve bytes outside any session, dropping the tenant's longest idle sessions where that makes room.

        Raises:
            TooLarge: It would never fit.
            Busy: There is no room now.
        """
        if nbytes > self.budget.most:
            raise TooLarge(
                f"{what} would need {nbytes} bytes",
                expected=f"at most {self.budget.most}",
                remedy="use a smaller model, or raise NOWCAST_BUDGET",
            )
        self.sweep()
        while (reservation := self.budget.reserve(nbytes, tenant)) is None:
            if not self._evict_one(tenant):
                raise Busy(
                    f"there is no room for {what} now: {nbytes} bytes are needed",
                    expected="fewer bytes, or others' share to be free",
                    remedy="try again after Retry-After",
                    retry_after=2.0,
                )
        return reservation

    def _room(self, tenant: str, need: int) -> Reservation:
        while self._bytes_of(tenant) + need > self._tenant_bytes:
            self._evict_or_refuse(tenant)
        while not self._places.take(tenant):
            self._evict_or_refuse(tenant)
        try:
            return self.reserve(tenant, need, "the session")
        except NowcastError:
            self._places.give(tenant)
            raise

    def _bytes_of(self, tenant: str) -> int:
        return sum(s.reservation.nbytes for (owner, _), s in self._sessions.items() if owner == tenant)

    def _evict_or_refuse(self, tenant: str) -> None:
        if not self._evict_one(tenant):
            held = self._places.of(tenant)
            everybody = held < self._places.most and self._bytes_of(tenant) < self._tenant_bytes // 2
            raise Busy(
                f"{len(self._sessions)} sessions are held already"
                if everybody
                else f"this key holds {held} sessions already",
                expected=f"at most {self._places.most} sessions and {self._tenant_bytes} bytes",
                remedy="delete sessions that are done, or try again after Retry-After",
                retry_after=5.0,
            )

    def _evict_one(self, tenant: str) -> bool:
        """Drop the longest idle session of a tenant, never another's."""
        now = time.monotonic()
        idle = [
            (session.touched, key)
            for key, session in self._sessions.items()
            if session.tenant == tenant and session.idle and now - session.touched >= self._evict_after
        ]
        if not idle:
            return False
        self._drop(min(idle)[1], "evicted to make room")
        return True

    def _drop(self, key: tuple[str, str], reason: str | None) -> None:
        session = self._sessions.pop(key, None)
        if session is None:
            return
        self._places.give(session.tenant)
        if not session.leave():
            self._leaving.append(session)
        self._on_drop(reason or "deleted")
        if reason is not None:
            self._expired[key] = reason
            while len(self._expired) > _REMEMBERED:
                self._expired.popitem(last=False)
