"""Tensors on the wire: caps, digests and number formats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nowcast_proto.arrays import array_of, float32_of, frame_of, from_bfloat16, to_bfloat16
from nowcast_proto.errors import MalformedFrame, TooLarge
from nowcast_proto.stream import Decoder, Encoder
from nowcast_proto.tensors import Limits, TensorFrame, digest, seal

from .streams import joined, spelled


@pytest.mark.parametrize(
    ("cap", "at", "over"),
    [
        ("max_name", {"name": "n" * 20}, {"name": "n" * 21}),
        ("max_dimensions", {"shape": (1,) * 19 + (2,)}, {"shape": (1,) * 20 + (2,)}),
        ("max_tensor_bytes", {"shape": (5,), "data": bytes(20)}, {"shape": (6,), "data": bytes(24)}),
    ],
)
def test_caps_on_one_tensor(cap, at, over):
    wide = replace(Limits(), max_dimensions=30)
    limits = replace(wide, **{cap: 20})
    Decoder(limits=limits).feed(spelled(wide, **at))
    spelled(limits, **at)
    with pytest.raises(TooLarge):
        Decoder(limits=limits).feed(spelled(wide, **over))
    with pytest.raises(TooLarge):  # the encoder holds itself to the same caps
        spelled(limits, **over)


@pytest.mark.parametrize("threads", [1, 3])
def test_seal_computes_the_digests_that_are_missing(threads: int):
    frames = [TensorFrame(str(i), "float32", (size,), bytes(4 * size)) for i, size in enumerate((3, 1 << 20, 1 << 19))]
    frames[0].digest = b"known" + bytes(11)
    seal(frames, threads)
    assert [frame.digest for frame in frames] == [b"known" + bytes(11), *(digest(f.view()) for f in frames[1:])]
    with pytest.raises(MalformedFrame):
        seal(
            [TensorFrame("w", "float32", (1 << 20,), bytes(4 << 20)), TensorFrame("v", "float32", (2,), bytes(7))],
            threads,
        )


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=200_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    ours = to_bfloat16(values)
    theirs = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    finite = ~np.isnan(values)
    assert np.array_equal(ours[finite], theirs[finite])
    assert np.isnan(from_bfloat16(ours[~finite])).all()
    assert np.array_equal(from_bfloat16(ours[finite]), torch.from_numpy(values[finite].copy()).bfloat16().float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arrays_survive_the_wire(dtype):
    values = np.linspace(-2, 2, 24, dtype=np.float32).reshape(2, 3, 4)[:, ::-1]
    decoder = Decoder()
    decoder.feed(joined(Encoder("snapshot", {"step": 0}, [frame_of("w", values, dtype=dtype)])))
    (frame,) = decoder.frames
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert np.allclose(float32_of(frame), values, rtol=tolerance, atol=0)
    assert array_of(frame).shape == (2, 3, 4)
    with pytest.raises(MalformedFrame, match="int64"):
        frame_of("w", np.arange(3), dtype=dtype)
