"""The process that computes what a client's spec asks for: neural graph, coverage, positional encoding.

A few hundred bytes of spec can ask for any amount of work. So none of it is done in the service: this process, which
holds nothing, imports the graph code once (without torch: it is small, and there in a second) and forks a child for
every order. The child has a limit on processor time and on memory that the kernel enforces, and can be killed at any
moment; the service only waits for its socket.

What is said over which socket is in `nowcast_service.runtime.spec_orders`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
from nowcast_proto.errors import InternalError, InvalidSpec, NowcastError, TooLarge, UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec

from nowcast_service.graph import positional
from nowcast_service.graph.coverage import report
from nowcast_service.graph.wiring import build
from nowcast_service.predictors.graphs import Needs, graph_of
from nowcast_service.runtime.long_messages import in_pieces
from nowcast_service.runtime.spec_orders import LENGTH, ORDER, portable

log = logging.getLogger(__name__)

_NICE = 5
"""The event loop and the device come first."""
_HEAVY = (build, positional)
"""Imported before the first fork, so that no child has to."""


# The child ------------------------------------------------------------------------------------------------------------


def _child(link: socket.socket) -> None:
    with link:
        (length,) = LENGTH.unpack(_exactly(link, LENGTH.size))
        order = msgpack.unpackb(_exactly(link, length))
        link.sendall(b"S")
        try:
            gc.disable()  # it ends before there is much to collect
            _confine(order["seconds"], order["memory"])
            head, body = _read(order) if "message" in order else _answer(order)
        except NowcastError as exc:
            head, body = exc.body().model_dump_json().encode(), None
        except MemoryError:
            head, body = _too_much_memory(order), None
        except RecursionError:
            head, body = _refused(InvalidSpec("the spec nests too deeply", expected="a flatter table")), None
        except Exception as exc:  # whatever the graph code stumbles over in a stranger's spec ends here, typed
            if "allocate memory" in str(exc):
                head, body = _too_much_memory(order), None
            elif isinstance(exc, ArithmeticError | np.linalg.LinAlgError | RuntimeError):
                head, body = _refused(_not_computable(type(exc).__name__)), None
            else:
                log.exception("an order failed: %s", str(order)[:200])
                head, body = _refused(InternalError("the spec's graph failed inside the service")), None
        link.sendall((b"X" if body is None else b"R") + LENGTH.pack(len(head)))
        link.sendall(head)
        if body is not None:
            link.sendall(LENGTH.pack(len(body)))
            link.sendall(body)


def _answer(order: dict[str, Any]) -> tuple[bytes, memoryview]:
    spec = ArchitectureSpec.parse(order["spec"])
    needs = Needs(**order["needs"])
    graph = graph_of(spec, needs)
    if not order["whole"]:
        return report(graph.coverage, spec).model_dump_json().encode(), memoryview(b"")
    packed: bytes = msgpack.packb(portable(graph))
    if not needs.positions:
        return packed, memoryview(b"")
    return packed, positional.encode(graph).reshape(-1).view(np.uint8).data


def _read(order: dict[str, Any]) -> tuple[bytes, memoryview]:
    module, _, name = order["message"].partition(":")
    head, pieces = in_pieces(getattr(importlib.import_module(module), name), order["json"])
    return head, memoryview(b"".join(part for piece in pieces for part in (LENGTH.pack(len(piece)), piece)))


def _confine(seconds: float, memory: int) -> None:
    """Have the kernel hold this process to its limits."""
    # Processor time ends it by SIGPROF, to the fraction of a second; the hard limit is for code that blocks that.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2, int(seconds) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not on every system; the limits on time hold without it
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    with contextlib.suppress(OSError):  # where memory runs out all the same, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")


def _too_much_memory(order: dict[str, Any]) -> bytes:
    what, how = ("this message", "read") if "message" in order else ("the neural graph of this spec", "compute")
    return _refused(
        TooLarge(
            f"{what} takes more than {order['memory']} bytes to {how}",
            expected="a spec of a network of the size that is sent",
            remedy="use a predictor that needs no graph, or raise NOWCAST_SPEC_MEMORY",
        )
    )


def _not_computable(what: str) -> NowcastError:
    return UnsupportedArchitecture(
        f"the neural graph of this spec cannot be computed ({what})", remedy="use a predictor that needs no graph"
    )


def _refused(error: NowcastError) -> bytes:
    return error.body().model_dump_json().encode()


def _exactly(link: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        got = link.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


# The parent -----------------------------------------------------------------------------------------------------------


class _Nursery:
    """Forks children, ends them on demand, and says what became of those that ended without a word."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, tuple[int, socket.socket]] = {}
        self._woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Take orders until the service has gone."""
        try:
            while True:
                ready, _, _ = select.select([self._control.fileno(), self._woken], [], [])
                if self._woken in ready:
                    os.read(self._woken, 4096)
                    self._reap()
                if self._control.fileno() in ready and not self._take():
                    return
        finally:
            for number in list(self._children):
                self._end(number)

    def _take(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._control, ORDER.size, 1)
        while message and len(message) < ORDER.size:
            more = self._control.recv(ORDER.size - len(message))
            if not more:
                return False
            message += more
        if not message:
            return False
        letter, number = ORDER.unpack(message)
        if letter == b"S":
            self._start(number, socket.socket(fileno=fds[0]))
        else:
            self._end(number)
        return True

    def _start(self, number: int, link: socket.socket) -> None:
        pid = os.fork()
        if pid:
            self._children[number] = pid, link
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            self._control.close()
            for _, other in self._children.values():
                other.close()
            _child(link)
            status = 0
        except (OSError, EOFError):  # the service no longer wants the answer
            pass
        finally:
            os._exit(status)  # nothing of this process's own end may run twice

    def _end(self, number: int) -> None:
        found = self._children.pop(number, None)
        if found is not None:
            pid, link = found
            link.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _reap(self) -> None:
        for number, (pid, link) in list(self._children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._children[number]
                with link, contextlib.suppress(OSError):  # nobody may be listening any more
                    link.setblocking(False)
                    link.sendall(b"K" + bytes([os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0]))


def main() -> None:
    """Serve the socket whose number is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the service says when to end
    os.nice(_NICE)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        _Nursery(control).run()


if __name__ == "__main__":
    main()
