"""The snapshots of the nowcast to come, the nowcast that was asked for, and the one that has arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nowcast_proto.messages import NowcastJob, Outcome
from nowcast_proto.spec import ArchitectureSpec

from nowcast_client.tensors.layout import Layout
from nowcast_client.tensors.patch import Patch
from nowcast_client.tensors.snapshot import Ring, Slot
from nowcast_client.wire.uploader import Arrived, Failed, Result, Uploaded, Uploader, Window

Open = Callable[[ArchitectureSpec, Layout], tuple[Ring, Uploader]]
"""Opens a session for a network, and makes room for its snapshots."""


class Windows:
    """What is on its way to the service and back.

    Args:
        open_: Opens the session; None where this process talks to no service.
        spec: What travels.
        layout: The live parameters.
        context: Snapshots per nowcast.
        at_once: Open the session now; else `open` does, once it is known how the network is wired.

    Attributes:
        ring: Where snapshots lie; None without a service.
        uploader: Talks to the service; None without one.
        current: The window that is being filled.
        asked: The one whose nowcast was asked for.
        asked_at: Step of its last snapshot.
        arrived: A nowcast that has not been used yet.
        upload_bytes: Bytes of snapshots sent.
        in_one_piece: See `nowcast_client.wire.uploader.Uploader`.
    """

    def __init__(
        self, open_: Open | None, spec: ArchitectureSpec, layout: Layout, context: int, *, at_once: bool = True
    ) -> None:
        self.ring: Ring | None = None
        self.uploader: Uploader | None = None
        self.current = Window()
        self.asked: Window | None = None
        self.arrived: Arrived | None = None
        self.asked_at = 0
        self.upload_bytes = 0
        self._open = open_
        self._context = context
        self._spec = spec
        self.in_one_piece = False
        if at_once:
            self.open(spec, layout)

    def open(self, spec: ArchitectureSpec, layout: Layout) -> None:
        """Open a session for a network: the first one, or one in place of another's."""
        if self._open is None:
            return
        if self.uploader is not None:
            self.abandon()
            self.drop()
            self.uploader.close(0.0)
        self.ring, self.uploader = self._open(spec, layout)
        self.uploader.in_one_piece = self.in_one_piece
        self._spec = spec

    def proven(self, share: float | None) -> None:
        """Tell the coverage report which share of the elements is proven; None where nothing was tried."""
        if self.uploader is not None:
            self.uploader.prove(share)

    def follow(self, spec: ArchitectureSpec, layout: Layout) -> None:
        """Parameters were replaced: start again, with a session of its own where the network is another."""
        self.abandon()
        self.drop()
        if self.uploader is None:
            return
        if spec != self._spec:
            self.open(spec, layout)
        self.uploader.layout = layout

    @property
    def trouble(self) -> str:
        """Why the service could not be reached at the last try; empty where it could."""
        return self.uploader.session.trouble if self.uploader is not None else ""

    def add(self, slot: Slot) -> bool:
        """A snapshot has been taken; returns whether the window is full with it."""
        self.current.slots.append(slot)
        if self.uploader is not None:
            self.uploader.snapshot(self.current, slot)
        return len(self.current.steps) >= self._context

    def full_with_next(self) -> bool:
        """Whether one more snapshot makes the window full."""
        return len(self.current.steps) + 1 >= self._context

    def ask(self, job: NowcastJob) -> None:
        """Ask for the nowcast of the full window; a nowcast under way is given up."""
        window, self.current = self.current, Window()
        self.abandon()
        self.asked, self.asked_at = window, window.steps[-1]
        if self.uploader is not None:
            self.uploader.ask(window, job.model_copy(update={"steps": window.steps}))

    def await_(self, seconds: float) -> float:
        """Wait for the nowcast that was asked for; returns the seconds it took."""
        uploader, window, begun = self.uploader, self.asked, time.perf_counter()
        if uploader is None or window is None:
            return 0.0
        with uploader.arrived:
            uploader.arrived.wait_for(lambda: uploader.answered(window), seconds)
        return time.perf_counter() - begun

    def results(self) -> Iterator[Result]:
        """What the uploader has finished, as far as anybody still wants it."""
        uploader = self.uploader
        while uploader is not None and uploader.results:
            result = uploader.results.popleft()
            if isinstance(result, Uploaded):
                self.upload_bytes += result.nbytes
            elif isinstance(result, Failed):
                if result.window is not None and result.window is self.asked:
                    self.asked = None
                if result.kind == "resume" and result.window is self.current:
                    self.drop()
            elif result.window is self.asked:
                self.arrived = result
            else:
                continue
            yield result

    def used(self, arrived: Arrived) -> None:
        """A nowcast was taken, or turned away: its snapshots are not needed any more."""
        self.arrived, self.asked = None, None
        self._release(arrived.window)

    def drop(self) -> None:
        """Begin the window again."""
        window, self.current = self.current, Window()
        if window.steps:
            self._release(window)

    def abandon(self) -> None:
        """Forget a nowcast that was asked for or has arrived."""
        for window in (self.asked, self.arrived.window if self.arrived else None):
            if window is not None:
                self._release(window)
        self.asked, self.arrived = None, None

    def tell(self, patch: Patch, outcome: Outcome, reason: str | None, step: int) -> None:
        """Tell the service what became of a nowcast."""
        if self.uploader is not None:
            self.uploader.verdict(patch.nowcast_id, outcome, reason, step)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for `load_state_dict`."""
        return {
            "session": self.uploader.session.id if self.uploader else None,
            "window": list(self.current.steps),
            "moved": dict(self.current.moved),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the window of an earlier run, where the service still holds it."""
        self.drop()
        self.abandon()
        if self.uploader is None or not state["session"]:
            return
        remote = tuple(state["window"])
        if len(remote) > self._context - 2:  # what lies still is seen from two snapshots held here
            remote = ()
        self.current = Window(remote=remote, moved=dict(state["moved"]) if remote else {})
        self.uploader.take_up(str(state["session"]), self.current)

    def _release(self, window: Window) -> None:
        if self.uploader is not None:
            self.uploader.drop(window)
