"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from nowcast_proto import errors, version
from nowcast_proto.arrays import float32_of
from nowcast_proto.stream import Decoder
from nowcast_service.http.app import create_app
from nowcast_service.observe.metrics import Metrics
from nowcast_service.settings import Settings
from pydantic import ByteSize
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).resolve().parents[3] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
PROTOCOL = (DOCS / "protocol.md").read_text()


def shown(value: object) -> str:
    """A default as the table spells it."""
    if value is None or value == () or value is PydanticUndefined:  # made when it is read
        return ""
    if isinstance(value, ByteSize):
        return f"`{value.human_readable().replace('.0', '')}`"
    if isinstance(value, bool):
        return f"`{int(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_the_settings_table_is_the_settings():
    rows = re.findall(r"^\| `(NOWCAST_\w+)` \| (.*?) ?\| (.*) \|$", OPERATIONS, re.M)
    wanted = [
        (f"NOWCAST_{name.upper()}", shown(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert rows == wanted


def test_every_metric_is_listed():
    for family in Metrics().registry.collect():
        name = family.name + "_total" * (family.type == "counter")
        assert f"`{name}`" in OPERATIONS, name


def test_every_error_code_is_listed_with_its_status():
    table = {
        code: int(status)
        for status, codes in re.findall(r"^\| (\d{3}) \| (.*?) \|", PROTOCOL, re.M)
        for code in re.findall(r"`([a-z_]+)`", codes)
    }
    for cls in errors._BY_CODE.values():  # those on the wire; the client has some of its own
        assert table[cls.code] == cls.http_status


@pytest.mark.parametrize("name", [name for name in vars(version) if name.startswith(("ROUTE_", "HEADER_"))])
def test_routes_and_headers_are_listed(name: str):
    value = getattr(version, name)
    value = value.replace("{session}", "{id}")
    assert value in PROTOCOL or value.replace("/v1/sessions/{id}", "…") in PROTOCOL


def test_every_served_route_is_a_route_of_the_protocol():
    routes = {value for name, value in vars(version).items() if name.startswith("ROUTE_")}
    assert set(create_app(Settings(predictor="linear")).openapi()["paths"]) == routes - {version.ROUTE_NOWCAST}


def test_the_example_stream_decodes():
    (block,) = re.findall(r"```\n((?:[0-9a-f]{2}[ \n])+)```", PROTOCOL)
    decoder = Decoder()
    decoder.feed(bytes.fromhex(block.replace("\n", " ")))
    header = decoder.finish()
    assert (header.kind, header.message) == ("snapshot", {"step": 1000})
    assert np.array_equal(float32_of(decoder.frames[0]), np.array([1, 2], dtype=np.float32))
