"""What the uploader's thread does beside the trainer: nothing that makes the trainer wait."""

from __future__ import annotations

import json
import threading

import torch
from nowcast_client.tensors.layout import layout_of
from nowcast_client.tensors.snapshot import Ring
from nowcast_client.testing import FakeTransport
from nowcast_client.wire.session import Session
from nowcast_client.wire.transport import Request
from nowcast_client.wire.uploader import Uploader, Window
from nowcast_proto.messages import NowcastJob
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from nowcast_proto.trainings import Report
from torch import nn

SPEC = ArchitectureSpec(family="sequential", parameters=(ParameterSpec(name="weight", shape=(2, 3)),))


def test_a_window_nobody_wants_gives_its_slots_back_while_the_service_hangs() -> None:
    """But for one that is being sent: its bytes must stay what they are."""
    hangs, asked = threading.Event(), threading.Event()
    digests: list[str] = []

    def handle(request: Request) -> tuple[int, dict[str, str], bytes]:
        if "/snapshots/" in request.path:
            digest = request.headers["Nowcast-Digest"]
            if digest in digests or request.path.endswith("/9"):
                asked.set()
                hangs.wait(60)
            digests.append(digest)
            return 200, {}, json.dumps({"step": 0, "state": "complete", "digest": digest}).encode()
        if "/nowcasts" in request.path:
            asked.set()
            hangs.wait(60)
        state = {"session": "s", "spec_digest": SPEC.digest(), "keep": 6, "snapshots": [], "expires_in": 9.0}
        return 200, {}, json.dumps(state).encode()

    model = nn.Linear(3, 2, bias=False)
    layout = layout_of(model, [torch.optim.SGD(model.parameters(), 0.1)], SPEC)
    ring = Ring(layout, 6, None)
    session = Session(FakeTransport(handle), SPEC)
    uploader = Uploader(session, ring, layout, upload_seconds=60.0, nowcast_seconds=60.0, patch_bound=4.0)
    for last, left in ((4, 6), (9, 5)):  # it hangs over the nowcast, then over the upload of the fifth snapshot
        window = Window()
        for step in range(last - 4, last + 1):
            with torch.no_grad():
                model.weight.add_(1.0)
            slot = ring.take(layout, step)
            assert slot is not None
            window.slots.append(slot)
            uploader.snapshot(window, slot)
        uploader.ask(window, NowcastJob(nowcast=f"n{last}", steps=window.steps, k=1))
        assert asked.wait(60)
        uploader.drop(window)
        assert ring.free == left
        hangs.set()
        assert uploader.idle(60)
        assert ring.free == 6
        hangs.clear()
        asked.clear()
    uploader.close(5.0)


def test_a_report_that_cannot_be_made_ends_nothing() -> None:
    model = nn.Linear(3, 2, bias=False)
    layout = layout_of(model, [torch.optim.SGD(model.parameters(), 0.1)], SPEC)
    session = Session(FakeTransport(lambda request: (200, {}, b"{}")), SPEC)
    uploader = Uploader(
        session, Ring(layout, 6, None), layout, upload_seconds=9.0, nowcast_seconds=9.0, patch_bound=4.0
    )

    def broken() -> Report:
        raise ValueError("a loss nobody thought of")

    told: list[bool] = []
    assert uploader.tell(broken, lambda: told.append(True))
    assert uploader.idle(60)
    assert uploader.tell(broken, lambda: told.append(True))  # the thread lives, and takes the next one
    assert uploader.idle(60)
    assert not told
    assert uploader.close(60)
