"""Generated inputs to the decoder: it accepts, or refuses with a typed error; it never crashes, hangs or hoards."""

from __future__ import annotations

import itertools
import random
import struct
import time
import tracemalloc
from dataclasses import replace

import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nowcast_proto.errors import NowcastError
from nowcast_proto.stream import Decoder, Encoder
from nowcast_proto.tensors import Limits, TensorFrame, digest

LIMITS = replace(Limits(), max_header_bytes=1 << 16, max_tensor_bytes=1 << 16, max_body_bytes=1 << 18, max_tensors=64)
BUDGET = 8 * 2**20
"""Bytes one input may make the decoder hold: far above what the caps allow a header and one tensor to take."""


def good(rng: random.Random) -> bytes:
    """A small valid stream."""
    frames = [
        TensorFrame(f"t{i}", dtype, shape, rng.randbytes(size * width), snapshot=s)
        for s in range(rng.randrange(1, 3))
        for i, (dtype, shape, size, width) in enumerate((("float32", (2, 3), 6, 4), ("bfloat16", (5,), 5, 2)))
    ]
    return b"".join(bytes(c) for c in Encoder("snapshot", {"step": 3, "note": "x"}, frames).chunks())


JUNK = [None, True, -1, 0, 1, 2**31, 2**64 - 1, -(2**63), 0.5, float("inf"), "", "t0", "x" * 600, b"", b"\0" * 16]
JUNK += [b"\0" * 17, [], [0], [-1], [2**60, 2**60], [1] * 9, [[]], {}, {"a": 1}, "float64", "bfloat16"]


def inputs(seed: int):
    """Endless inputs: noise, damaged streams, valid framing around nonsense."""
    rng = random.Random(seed)
    streams = [good(rng) for _ in range(20)]
    while True:
        data = bytearray(rng.choice(streams))
        kind = rng.randrange(6)
        if kind == 0:
            yield rng.randbytes(rng.randrange(200))
        elif kind == 1:
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield bytes(data)
        elif kind == 2:
            a, b = sorted(rng.randrange(len(data)) for _ in range(2))
            yield bytes(data[:a] + data[b:])
        elif kind == 3:
            a, b = sorted(rng.randrange(len(data)) for _ in range(2))
            yield bytes(data[:b] + data[a:])
        elif kind == 4:
            length = rng.randrange(1, 60)
            yield struct.pack("<I", length) + rng.randbytes(length)
        else:
            (length,) = struct.unpack_from("<I", data)
            fields = msgpack.unpackb(data[4 : 4 + length])
            target = rng.choice([fields, *fields["tensors"]])
            target[rng.choice(list(target))] = rng.choice(JUNK)
            packed = msgpack.packb(fields)
            yield struct.pack("<I", len(packed)) + packed + bytes(data[4 + length :])


def test_a_hundred_thousand_generated_inputs():
    rng = random.Random(1)
    accepted = refused = truncated = 0
    slowest = 0.0
    for number, data in enumerate(itertools.islice(inputs(0), 100_000)):
        watch = number % 500 == 0
        if watch:
            tracemalloc.start()
        decoder = Decoder(limits=LIMITS)
        began = time.thread_time()  # of this thread, however busy the machine
        cut = rng.randrange(len(data) + 1)
        try:
            decoder.feed(data[:cut])
            decoder.feed(data[cut:])
            truncated += not decoder.complete
            accepted += decoder.complete
        except NowcastError:
            refused += 1
            assert not decoder.complete
        slowest = max(slowest, time.thread_time() - began)
        if watch:
            assert tracemalloc.get_traced_memory()[1] < BUDGET
            tracemalloc.stop()
    assert accepted + refused + truncated == 100_000
    assert refused > 50_000
    assert min(accepted, truncated) > 100, "the generator should reach both ends of the decoder too"
    assert slowest < 5


ENTRY = st.fixed_dictionaries(
    {
        "name": st.one_of(st.text(max_size=20), st.none()),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16", "int8", 4]),
        "shape": st.lists(st.integers(-2, 2**40), max_size=4),
        "digest": st.one_of(st.binary(max_size=20), st.just(digest(bytes(8)))),
        "snapshot": st.integers(-1, 70),
    }
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    version=st.one_of(st.just(1), ANYTHING),
    message=st.one_of(st.just({}), ANYTHING),
    rows=st.one_of(st.lists(ENTRY, max_size=4), ANYTHING),
    tail=st.binary(max_size=60),
)
def test_any_msgpack_in_the_header(version, message, rows, tail):
    packed = msgpack.packb({"version": version, "kind": "snapshot", "message": message, "tensors": rows})
    decoder, said = Decoder(limits=LIMITS), ""
    try:
        decoder.feed(struct.pack("<I", len(packed)) + packed + tail)
        decoder.finish()
    except NowcastError as exc:
        said = str(exc)
    assert bool(said) != decoder.complete
    assert len(said) < 2000  # what a peer sends is not echoed at length


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["float32", "float16"]), st.lists(st.integers(1, 5), max_size=3)), max_size=5),
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_whatever_is_encoded_is_decoded(tensors, sizes):
    rng = random.Random(0)
    width = {"float32": 4, "float16": 2}
    frames = []
    for i, (dtype, shape) in enumerate(tensors):
        count = 1
        for size in shape:
            count *= size
        frames.append(TensorFrame(f"t{i}", dtype, tuple(shape), rng.randbytes(count * width[dtype])))
    data = b"".join(bytes(c) for c in Encoder("snapshot", {"step": 1}, frames).chunks(chunk_bytes=sizes[0]))
    decoder, at, number = Decoder(), 0, 0
    while at < len(data):
        step = sizes[number % len(sizes)]
        decoder.feed(data[at : at + step])
        at, number = at + step, number + 1
    decoder.finish()
    assert [bytes(f.view()) for f in decoder.frames] == [bytes(f.view()) for f in frames]
    again = Encoder("snapshot", {"step": 1}, decoder.frames)
    assert b"".join(bytes(c) for c in again.chunks()) == data
