"""The page as people see it: Chromium shows a real training as it happens."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from nowcast_client import attach
from nowcast_service.runtime.keys import hash_key

from .service_harness import Serve, Server, Training, create, send, sequential

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.socket
RUN = "run-1"
CHROMIUM = os.environ.get("NOWCAST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")  # its event loop would be in the way of other files in this process
def browser() -> Iterator[Any]:
    """Chromium, as the system has it."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH, or its path in NOWCAST_CHROMIUM")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page in either colour scheme that fails its test on any error of its scripts."""
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1300, "height": 900})
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    context.close()
    assert not errors, errors


@contextmanager
def opened(server: Server, key: str | None = None) -> Iterator[httpx.Client]:
    """A client that has opened a session of its own."""
    with server.client(key) as client:
        create(client, RUN, sequential(8, 16, 4)).raise_for_status()
        yield client


def report(client: httpx.Client, steps: range, **more: Any) -> None:
    """Report falling losses of these steps."""
    losses = [2.0 / (1 + 0.01 * step) for step in steps]
    told = {"step": steps[-1], "name": "digits", "loss_steps": list(steps), "losses": losses, **more}
    client.post(f"/v1/sessions/{RUN}/reports", json=told).raise_for_status()


PATCHED = [
    {"kind": "patched", "step": 100, "horizon": 20},
    {"kind": "kept", "step": 150, "reason": "the loss is back on trend"},
    {"kind": "patched", "step": 180, "horizon": 14},
]


def test_a_training_appears_and_moves_on(serve: Serve, page: Any) -> None:
    """The list, the loss, the nowcasts and what became of them, without a reload."""
    server = serve()
    page.goto(server.url)
    page.wait_for_selector("#empty:not([hidden])")
    with opened(server) as client:
        report(client, range(1, 200), events=PATCHED, total_steps=1000, period=100, device="cpu")
        page.click("text=digits")
        page.wait_for_selector("#whole:not([hidden])")
        label = page.locator("#loss")
        page.wait_for_selector("#loss[aria-label*='1 nowcasts kept, 0 undone, 1 on trial']")
        assert "199 of 1000" in page.inner_text("#rows")
        report(client, range(200, 300), events=[{"kind": "rolled_back", "step": 240, "reason": "loss above trend"}])
        page.wait_for_selector("#loss[aria-label*='1 nowcasts kept, 1 undone']")
        assert "at step 299" in (label.get_attribute("aria-label") or "")
        assert "loss above trend" in page.inner_text("#events")
        label.focus()
        page.keyboard.press("End")
        assert re.search(r"step 299 .* loss 0\.5", page.inner_text("#read"))
        client.delete(f"/v1/sessions/{RUN}")
        page.wait_for_selector("#rows .ended")


def test_a_real_training_reports_itself(serve: Serve, page: Any) -> None:
    """`attach` is enough: losses, nowcasts and their verdicts appear, and the end."""
    torch.manual_seed(0)
    server = serve()
    page.goto(server.url)
    page.wait_for_selector("#empty:not([hidden])")
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    teacher = torch.randn(16, 4)
    with attach(model, optimizer, server.url, name="teacher", period=100, total_steps=1000, wait=60) as handle:
        for _ in range(360):
            x = torch.randn(32, 16)
            loss = torch.nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
            optimizer.zero_grad()
            loss.backward()
            handle.observe(loss)
            optimizer.step()
        done = handle.summary()
        page.click("text=teacher")
        page.wait_for_selector("#whole:not([hidden])")
    page.wait_for_selector("#rows .ended")
    assert done["patched"]
    told = f"{done['kept']} nowcasts kept, {done['rolled_back']} undone"
    page.wait_for_selector(f"#loss[aria-label*='{told}'][aria-label*='at step 359']")
    assert "AdamW" in page.inner_text("#facts")


def test_movement_of_real_snapshots(serve: Serve, page: Any) -> None:
    """Two snapshots show as a stride of the heat map."""
    server = serve()
    training = Training(sequential(8, 16, 4))
    with opened(server) as client:
        for step in (100, 200):
            send(client, "PUT", f"/v1/sessions/{RUN}/snapshots/{step}", training.snapshot(step)).raise_for_status()
        page.goto(f"{server.url}/#{RUN}")
        page.wait_for_selector("#heat[aria-label*='over 1 strides']")
        told = client.get(f"/v1/trainings/{RUN}").json()
    old, new = training.at(100), training.at(200)
    moved = [float(np.linalg.norm(new[n] - old[n]) / np.linalg.norm(new[n])) for n in ("0.weight", "2.weight")]
    assert told["layers"] == ["0.weight", "2.weight"]
    assert told["movements"] == [{"step": 200, "moved": pytest.approx(moved, rel=1e-4)}]


def test_the_neural_graph_is_drawn(serve: Serve, page: Any) -> None:
    server = serve()
    with opened(server):
        page.goto(f"{server.url}/#{RUN}")
        page.click("#graph-show")
        page.wait_for_selector("#graph svg[aria-label*='ranges']")
    assert page.locator("#graph rect").count() == 3  # 8, 16 and 4 neurons


def test_keys_are_asked_for_and_keep_trainings_apart(serve: Serve, page: Any) -> None:
    """Without a key nothing is shown; with one, that key's trainings."""
    keys = {"ann": "ann-has-a-long-key", "ben": "ben-has-a-long-key"}
    server = serve(api_key_hashes=",".join(f"{who}:{hash_key(key)}" for who, key in keys.items()))
    with opened(server, keys["ann"]) as client:
        report(client, range(1, 50))
    page.goto(server.url)
    page.fill("#key-value", "not-the-right-key")
    page.press("#key-value", "Enter")
    page.wait_for_selector("text=the key is not known")
    assert page.inner_text("#rows") == ""
    page.fill("#key-value", keys["ben"])
    page.press("#key-value", "Enter")
    page.wait_for_selector("#empty:not([hidden])")
    page.click("#forget")
    page.fill("#key-value", keys["ann"])
    page.press("#key-value", "Enter")
    page.wait_for_selector("text=digits")


def test_usable_by_everyone(serve: Serve, page: Any) -> None:
    """axe finds nothing to object to, in the list, in a training, and where a key is asked for."""
    server = serve()
    with opened(server) as client:
        report(client, range(1, 300), events=PATCHED, total_steps=1000)
    page.goto(f"{server.url}/#{RUN}")
    page.wait_for_selector("#rows a")
    page.wait_for_selector("#service meter")
    page.wait_for_selector("#events tr")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.evaluate("document.getElementById('key').hidden = false")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_page_and_data_carry_no_script_of_others(serve: Serve, page: Any) -> None:
    """What a training calls itself is text and nothing else, and no address but the service's own is asked."""
    server = serve()
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url.split("/", 3)[2]))
    with opened(server) as client:
        report(client, range(1, 50), name="<img src=x onerror=alert(1)>")
    page.goto(server.url)
    page.wait_for_selector("#rows a")
    assert page.inner_text("#rows a") == "<img src=x onerror=alert(1)>"
    assert asked == {server.url.removeprefix("http://")}
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_export_and_archive(serve: Serve, page: Any, tmp_path: Path) -> None:
    """A training can be saved, and a service that restarts still shows it."""
    server = serve(archive=tmp_path / "trainings.db")
    with opened(server) as client:
        report(client, range(1, 200), events=PATCHED)
        table = client.get(f"/v1/trainings/{RUN}?format=csv").text.splitlines()
        assert table[0] == "step,loss,event,horizon,reason"
        assert "100,,patched,20," in table
        assert len(table) == 1 + 199 + len(PATCHED)
    server.signal(signal.SIGTERM)
    server.process.wait(60)
    server.start()
    page.goto(f"{server.url}/#{RUN}")
    page.wait_for_selector("#loss[aria-label*='1 nowcasts kept']")
    page.wait_for_selector("#rows .ended")
