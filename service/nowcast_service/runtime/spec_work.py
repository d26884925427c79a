"""What a client's spec makes the service compute: in processes of their own, bounded, in turns, once per spec.

See `nowcast_service.runtime.spec_process` for the other end. Here are the queue, the clock and what was computed. No
lock is held while something is computed, and nobody waits in the event loop: all answers are futures, and cancelling
the last future that waits for an order ends its process.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgpack  # type: ignore[import-untyped]
import torch
from nowcast_proto.errors import Busy, ErrorBody, NowcastError, TooLarge, Unavailable
from nowcast_proto.messages import CoverageReport
from nowcast_proto.spec import ArchitectureSpec

from nowcast_service.predictors.graphs import Needs, Prepared
from nowcast_service.runtime.budget import Budget, Reservation
from nowcast_service.runtime.spec_nursery import Nursery, receive
from nowcast_service.runtime.spec_orders import LENGTH, order_of, restored
from nowcast_service.runtime.turns import Turns

log = logging.getLogger(__name__)

PARALLEL = 3
"""Specs worked on at once. A hostile one takes its place for some seconds; others need some milliseconds."""
_REMEMBERED = 256
"""Reports and refusals remembered."""
_REFUSED = 60.0
"""Seconds for which a spec that was refused is not tried again; the machine may have been busy."""
WAITING = 16
"""Specs of one tenant that may wait."""
_START_SECONDS = 60.0
"""Until a fresh process takes its first order; importing takes seconds on a busy machine."""
_PATIENCE = 1.5
"""Wall-clock seconds per allowed second of processor time, for a machine that has other things to do."""
_SECONDS_PER_ELEMENT = 1e-9
_BYTES_PER_ELEMENT = 1 / 16
"""What a network's elements add to the allowance: whoever holds a billion weights has neurons in proportion."""
_KEPT = 64 << 20
"""Bytes kept of what nobody uses at the moment."""
_PER_BYTE = 8
"""Bytes that a graph takes in memory, for each that it has on its way here."""

T = TypeVar("T")
Key = tuple[str, Needs, bool]


@dataclass(eq=False)
class _Order:
    """One spec to be worked on, and everybody who waits for it."""

    key: Key
    tenant: str
    spec: ArchitectureSpec
    seconds: float
    memory: int
    futures: list[Future[Any]] = field(default_factory=list)
    link: socket.socket | None = None
    number: int = 0
    unwanted: bool = False


class SpecWork:
    """Computes neural graphs, coverage and positional encodings of clients' specs. Thread-safe.

    Args:
        budget: What is computed is held against it for as long as it is used.
        seconds: Of processor time for one spec, before what its size adds.
        memory: Bytes beyond those of an idle process, before what its size adds.
        several: Whether there is more than one tenant; then none may take all places.
    """

    def __init__(self, budget: Budget, *, seconds: float, memory: int, several: bool = False) -> None:
        self._budget = budget
        self._seconds = seconds
        self._memory = memory
        self._most = PARALLEL - 1 if several else PARALLEL
        self._queue: Turns[_Order] = Turns()
        self._orders: dict[Key, _Order] = {}
        self._running: dict[str, int] = {}
        self._reports: OrderedDict[Key, CoverageReport] = OrderedDict()
        self._refusals: OrderedDict[Key, tuple[float, ErrorBody]] = OrderedDict()
        self._kept: OrderedDict[Key, Prepared] = OrderedDict()
        self._bytes: weakref.WeakKeyDictionary[Prepared, int] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakValueDictionary[Key, Prepared] = weakref.WeakValueDictionary()
        self._changed = threading.Condition()
        self.nursery = Nursery()
        self._threads: list[threading.Thread] = []
        self._stopped = False

    # Asking -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process and the threads that wait for it. Called by the first question too."""
        with self._changed:
            if self._threads or self._stopped:
                return
            self._threads = [
                threading.Thread(target=self._work, name=f"nowcast-spec-{n}", daemon=True) for n in range(PARALLEL)
            ]
        for thread in self._threads:
            thread.start()
        self.nursery.control()

    def stop(self) -> None:
        """End the process, and what it computes."""
        with self._changed:
            self._stopped = True
            orders = list(self._orders.values())
            self._changed.notify_all()
        for order in orders:
            self._end(order)
        self.nursery.stop()

    def coverage(self, tenant: str, spec: ArchitectureSpec, needs: Needs) -> Future[CoverageReport]:
        """Count what a predictor with these needs does with each parameter; fails where there can be no graph.

        Raises:
            Busy: As many specs of this tenant as may wait are waiting.
        """
        return self._ask((spec.digest(), needs, False), tenant, spec)

    def prepare(self, tenant: str, spec: ArchitectureSpec, needs: Needs) -> Future[Prepared]:
        """Compute the graph, and the encoding where it is needed.

        Raises:
            Busy: As many specs of this tenant as may wait are waiting.
        """
        return self._ask((spec.digest(), needs, True), tenant, spec)

    def prepared(self, spec: ArchitectureSpec, needs: Needs) -> Prepared:
        """See `nowcast_service.predictors.graphs.Source`: at once where somebody holds what `prepare` answered with."""
        with self._changed:
            found = self._known.get((spec.digest(), needs, True))
        return found if found is not None else self.prepare("", spec, needs).result()

    def ahead(self, tenant: str, needs: Iterable[Needs], spec: ArchitectureSpec) -> tuple[Future[Prepared], ...]:
        """Everything a predictor needs of a spec; see `prepare`."""
        return tuple(self.prepare(tenant, spec, need) for need in needs)

    def _ask(self, key: Key, tenant: str, spec: ArchitectureSpec) -> Future[Any]:
        self.start()
        future: Future[Any] = Future()
        with self._changed:
            found = self._known.get(key) or self._reports.get(key)
            if found is not None:
                future.set_result(found)
                return future
            refusal = self._refusals.get(key)
            if refusal is not None and time.monotonic() < refusal[0]:
                future.set_exception(NowcastError.from_body(refusal[1]))
                return future
            order = self._orders.get(key)
            if order is None:
                if self._queue.of(tenant) >= WAITING:
                    raise Busy(
                        f"{WAITING} specs of this key are waiting to be worked on",
                        remedy="try again after Retry-After",
                        retry_after=self._seconds,
                    )
                # What is allowed grows with the network: a session's memory, or the snapshots sent, vouch for its size.
                seconds = self._seconds + spec.numel * _SECONDS_PER_ELEMENT
                memory = self._memory + int(spec.numel * _BYTES_PER_ELEMENT)
                order = self._orders[key] = _Order(key, tenant, spec, seconds, memory)
                self._queue.push(tenant, order)
                self._changed.notify()
            order.futures.append(future)
        future.add_done_callback(lambda done: self._left(order) if done.cancelled() else None)
        return future

    def _left(self, order: _Order) -> None:
        """Somebody no longer waits; the last one ends the work."""
        with self._changed:
            if not all(future.cancelled() for future in order.futures):
                return
            self._orders.pop(order.key, None)
            if self._queue.remove(order.tenant, order):
                return
        self._end(order)

    def _end(self, order: _Order) -> None:
        order.unwanted = True
        link = order.link
        if link is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                link.shutdown(socket.SHUT_RDWR)

    # Waiting for it ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (order := self._next()) is not None:
            value: Any = None
            error: BaseException | None = None
            try:
                value = self._computed(order)
            except (NowcastError, CancelledError) as exc:
                error = exc.with_traceback(None)
            except Exception:  # a fault of ours must not end the thread that everybody's specs wait for
                log.exception("working on a spec failed")
                error = Unavailable("the spec could not be worked on", remedy="see the service's log", retry_after=5.0)
            self._finish(order, value, error)
            del order, value, error

    def _next(self) -> _Order | None:
        with self._changed:
            while not self._stopped:
                order = self._queue.pop(lambda tenant, _: self._running.get(tenant, 0) < self._most)
                if order is not None:
                    self._running[order.tenant] = self._running.get(order.tenant, 0) + 1
                    return order
                self._changed.wait()
        return None

    def _finish(self, order: _Order, value: Any, error: BaseException | None) -> None:
        with self._changed:
            self._orders.pop(order.key, None)
            self._running[order.tenant] -= 1
            if not self._running[order.tenant]:
                del self._running[order.tenant]
            if isinstance(value, Prepared):
                self._keep(order.key, value)
            elif value is not None:
                _remember(self._reports, order.key, value)
            elif isinstance(error, NowcastError) and not error.retry_after:
                _remember(self._refusals, order.key, (time.monotonic() + _REFUSED, error.body()))
            futures, order.futures = order.futures, []  # no cycle may keep the answer
            self._changed.notify_all()
        for future in futures:
            if future.set_running_or_notify_cancel():
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)

    def _keep(self, key: Key, made: Prepared) -> None:
        self._known[key] = self._kept[key] = made
        while sum(self._bytes[one] for one in self._kept.values()) > _KEPT:
            self._kept.popitem(last=False)

    def _computed(self, order: _Order) -> Any:
        for last in (False, True):
            number = self.nursery.number()
            link, theirs = socket.socketpair()
            with contextlib.closing(link):
                try:
                    order.link = link
                    if self._begun(link, theirs, number, order):
                        return self._answer(link, order)
                except TimeoutError as exc:
                    raise self._slow(order) from exc
                except (OSError, EOFError) as exc:
                    if not order.unwanted and last:
                        raise Unavailable(
                            "the process that works on specs ended", remedy="try again", retry_after=2.0
                        ) from exc
                finally:
                    self.nursery.tell(b"E", number)
            if order.unwanted:
                break
        if order.unwanted:
            raise CancelledError
        raise Unavailable("the process that works on specs does not start", remedy="try again", retry_after=5.0)

    def _begun(self, link: socket.socket, theirs: socket.socket, number: int, order: _Order) -> bool:
        """Give an order; whether a child has begun with it."""
        with theirs:
            self.nursery.tell(b"S", number, theirs)
        request = order_of(order.spec, order.key[1], whole=order.key[2], seconds=order.seconds, memory=order.memory)
        end = time.monotonic() + _START_SECONDS
        try:
            link.settimeout(_START_SECONDS)
            link.sendall(request)
            return bytes(receive(link, 1, end)) == b"S"
        except (OSError, EOFError):  # it may have ended since the last order: a fresh one gets a chance
            return False

    def _answer(self, link: socket.socket, order: _Order) -> Any:
        end = time.monotonic() + _PATIENCE * order.seconds
        kind = bytes(receive(link, 1, end))
        if kind == b"K":
            raise self._ended(order, receive(link, 1, end)[0])
        head = bytes(receive(link, self._length(link, order, end), end))
        if kind == b"X":
            raise NowcastError.from_body(ErrorBody.model_validate_json(head))
        length = self._length(link, order, end)
        if not order.key[2]:
            return CoverageReport.model_validate_json(head)
        reservation = self._room(order.tenant, _PER_BYTE * len(head) + length)
        try:
            return self._restored(order, head, receive(link, length, end), reservation)
        except BaseException:
            reservation.release()
            raise

    def _length(self, link: socket.socket, order: _Order, end: float) -> int:
        (length,) = LENGTH.unpack(receive(link, LENGTH.size, end))
        if length > order.memory:
            raise self._large(order)
        return int(length)

    def _restored(self, order: _Order, head: bytes, body: memoryview, reservation: Reservation) -> Prepared:
        graph = restored(msgpack.unpackb(head), order.spec)
        positions = torch.frombuffer(body, dtype=torch.float32).view(graph.n_nodes, -1) if len(body) else None
        made = Prepared(graph, positions)
        self._bytes[made] = reservation.nbytes
        weakref.finalize(made, reservation.release)
        return made

    def _room(self, tenant: str, nbytes: int) -> Reservation:
        while (reservation := self._budget.reserve(nbytes, tenant)) is None:
            with self._changed:
                if not self._kept:
                    raise Busy(
                        f"there is no room for the neural graph of this spec now: {nbytes} bytes are needed",
                        remedy="try again after Retry-After",
                        retry_after=2.0,
                    )
                self._kept.popitem(last=False)
        return reservation

    def _ended(self, order: _Order, number: int) -> NowcastError:
        if number in (signal.SIGPROF, signal.SIGXCPU):
            return self._slow(order)
        log.warning("work on a spec of kind %s was ended by signal %d", order.spec.kind, number)
        return self._large(order)

    @staticmethod
    def _slow(order: _Order) -> TooLarge:
        return TooLarge(
            f"the neural graph of this spec takes more than {order.seconds:.1f} s to compute",
            expected="a network whose graph is quickly worked out: few kinds of layers, connected parts",
            remedy="use a predictor that needs no graph, or raise NOWCAST_SPEC_SECONDS",
        )

    @staticmethod
    def _large(order: _Order) -> TooLarge:
        return TooLarge(
            f"the neural graph of this spec takes more than {order.memory} bytes to compute",
            expected="a spec of a network of the size that is sent",
            remedy="use a predictor that needs no graph, or raise NOWCAST_SPEC_MEMORY",
        )


def _remember(kept: OrderedDict[Key, T], key: Key, value: T) -> None:
    kept[key] = value
    while len(kept) > _REMEMBERED:
        kept.popitem(last=False)
