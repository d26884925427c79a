"""The encoder and decoder of tensor streams: golden bytes, any cut, every cap, every corruption."""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from nowcast_proto.arrays import frame_of
from nowcast_proto.errors import ChecksumMismatch, MalformedFrame, NowcastError, TooLarge, UnsupportedVersion
from nowcast_proto.messages import NowcastReplyHeader, NowcastRequest, SnapshotHeader
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Decoder, Encoder, Header, pack_header, unpack_header
from nowcast_proto.tensors import Limits, TensorFrame, digest

from .streams import joined, spelled

SPEC = ArchitectureSpec.model_validate({"family": "sequential", "parameters": [{"name": "w", "shape": [2, 2]}]})

GOLDEN_SNAPSHOT = bytes.fromhex(
    "f600000084a776657273696f6e01a46b696e64a8736e617073686f74a76d65737361676581a473746570cd03e8a774656e736f72"
    "739385a46e616d65a177a56474797065a7666c6f61743332a57368617065920202a6646967657374c410f62942590068075fe93a"
    "8218463b5160a8736e617073686f740085a46e616d65a162a56474797065a862666c6f61743136a573686170659102a664696765"
    "7374c410beb16dfd83a027722c87835994800554a8736e617073686f740085a46e616d65a173a56474797065a7666c6f61743136"
    "a5736861706590a6646967657374c410ebb082735735eb4bad765ba3226eb61da8736e617073686f740010000000000000000000"
    "803f000000c00000003f0000504076ac10180400000000000000c03f80be7795646f020000000000000000406f530537"
)
GOLDEN_REQUEST = bytes.fromhex(
    "5101000084a776657273696f6e01a46b696e64af6e6f77636173742e72657175657374a76d65737361676587a16b28a970726564"
    "6963746f72a66c696e656172a57265706c79aa706172616d6574657273ab7265706c795f6474797065a7666c6f61743332ac7570"
    "646174655f7363616c65cb3ff0000000000000a8646561646c696e65cb4004000000000000a47370656383a666616d696c79aa73"
    "657175656e7469616caa706172616d65746572739182a46e616d65a177a57368617065920202a47469657380a774656e736f7273"
    "9285a46e616d65a177a56474797065a7666c6f61743332a57368617065920202a6646967657374c410463be1d58a72e9618ea598"
    "84367c4358a8736e617073686f740085a46e616d65a177a56474797065a7666c6f61743332a57368617065920202a66469676573"
    "74c4103a6b725679b8c936e576488bea859152a8736e617073686f74011000000000000000000000000000000000000000000000"
    "00554bbbec10000000000000000000803f0000803f0000803f0000803f561468e8"
)
GOLDEN_REPLY = bytes.fromhex(
    "3401000084a776657273696f6e01a46b696e64ad6e6f77636173742e7265706c79a76d65737361676588a76e6f7763617374a26e"
    "31a16b28a9707265646963746f72a66c696e656172a57265706c79a564656c7461ac7570646174655f7363616c65cb3ff0000000"
    "000000a5737465707392ccc8cd0190ab737065635f646967657374d9203066386266626530343731353430363562376534303132"
    "353831306137653933a774696d696e677384a57175657565cb0000000000000000a5696e707574cb0000000000000000a7636f6d"
    "70757465cb0000000000000000a66f7574707574cb0000000000000000a774656e736f72739185a46e616d65a177a56474797065"
    "a7666c6f61743332a57368617065920202a6646967657374c410463be1d58a72e9618ea59884367c4358a8736e617073686f7400"
    "100000000000000000000000000000000000000000000000554bbbec"
)


def snapshot_encoder() -> Encoder:
    frames = [
        frame_of("w", np.array([[1.0, -2.0], [0.5, 3.25]], dtype=np.float32)),
        frame_of("b", np.array([1.5, -0.25], dtype=np.float32), dtype="bfloat16"),
        frame_of("s", np.float16(2.0).reshape(()), dtype="float16"),
    ]
    return Encoder(SnapshotHeader.KIND, SnapshotHeader(step=1000), frames)


def request_encoder() -> Encoder:
    frames = [frame_of("w", np.full((2, 2), i, dtype=np.float32), snapshot=i) for i in range(2)]
    return Encoder(NowcastRequest.KIND, NowcastRequest(spec=SPEC, k=40, predictor="linear", deadline=2.5), frames)


def reply_encoder() -> Encoder:
    message = NowcastReplyHeader(
        nowcast="n1",
        k=40,
        predictor="linear",
        reply="delta",
        update_scale=1.0,
        steps=(200, 400),
        spec_digest=SPEC.digest(),
    )
    frames = [frame_of("w", np.zeros((2, 2), dtype=np.float32))]
    return Encoder(NowcastReplyHeader.KIND, message, frames)


CASES = [
    pytest.param(snapshot_encoder, GOLDEN_SNAPSHOT, id="snapshot"),
    pytest.param(request_encoder, GOLDEN_REQUEST, id="request"),
    pytest.param(reply_encoder, GOLDEN_REPLY, id="reply"),
]


@pytest.mark.parametrize(("make", "golden"), CASES)
def test_golden_stream_byte_for_byte(make, golden):
    encoder = make()
    assert joined(encoder) == golden
    assert encoder.content_length == len(golden)


def test_golden_snapshot_reads_by_hand():
    """The documented layout, read with nothing but struct, msgpack and zlib."""
    data = GOLDEN_SNAPSHOT
    (length,) = struct.unpack_from("<I", data)
    header = msgpack.unpackb(data[4 : 4 + length])
    assert header["version"] == 1
    assert header["kind"] == "snapshot"
    assert header["message"] == {"step": 1000}
    at, values = 4 + length, {}
    for row in header["tensors"]:
        (size,) = struct.unpack_from("<Q", data, at)
        raw = data[at + 8 : at + 8 + size]
        assert struct.unpack_from("<I", data, at + 8 + size) == (zlib.crc32(raw),)
        assert row["digest"] == digest(raw)
        values[row["name"]] = raw
        at += 12 + size
    assert at == len(data)
    assert values == {
        "w": struct.pack("<4f", 1.0, -2.0, 0.5, 3.25),
        "b": bytes.fromhex("c03f80be"),
        "s": bytes.fromhex("0040"),
    }


@pytest.mark.parametrize(("make", "golden"), CASES)
def test_decodes_whatever_the_cut(make, golden):
    for size in (1, 2, 3, 7, 64, len(golden)):
        decoder = Decoder()
        for at in range(0, len(golden), size):
            decoder.feed(golden[at : at + size])
        header = decoder.finish()
        assert decoder.complete
        assert header == make().header
        assert decoder.content_length == len(golden)
        again = Encoder(header.kind, header.message, decoder.frames)
        assert joined(again) == golden


@pytest.mark.parametrize(("make", "golden"), CASES)
def test_truncation_at_every_byte_is_refused(make, golden):
    for end in range(len(golden)):
        decoder = Decoder()
        decoder.feed(golden[:end])
        assert not decoder.complete
        with pytest.raises(MalformedFrame, match=f"ends after {end} bytes"):
            decoder.finish()


@pytest.mark.parametrize(("make", "golden"), CASES)
def test_a_stream_resumes_at_every_byte(make, golden):
    encoder = make()
    for start in range(len(golden) + 1):
        assert joined(encoder, start=start, chunk_bytes=5) == golden[start:]
    with pytest.raises(MalformedFrame):
        joined(encoder, start=len(golden) + 1)


def test_every_flipped_bit_is_noticed():
    """A flip in the header may leave a valid header, but never the same one; one in the data is always refused."""
    original = snapshot_encoder().header
    (header_length,) = struct.unpack_from("<I", GOLDEN_SNAPSHOT)
    for at in range(len(GOLDEN_SNAPSHOT)):
        for bit in range(8):
            damaged = bytearray(GOLDEN_SNAPSHOT)
            damaged[at] ^= 1 << bit
            decoder = Decoder()
            try:
                decoder.feed(damaged)
                header = decoder.finish()
            except NowcastError:
                continue
            assert 4 <= at < 4 + header_length, f"bit {bit} of byte {at} outside the header passed unnoticed"
            assert header != original


def test_trailing_bytes_are_refused():
    decoder = Decoder()
    with pytest.raises(MalformedFrame, match="follow"):
        decoder.feed(GOLDEN_SNAPSHOT + b"\0")
    with pytest.raises(MalformedFrame, match="follow"):  # it stays refused
        decoder.finish()


def test_writes_straight_into_the_callers_buffer():
    target = bytearray(16 + 4 + 2)
    offsets = [0, 16, 20]
    decoder = Decoder(lambda header: lambda n, e: memoryview(target)[offsets[n] : offsets[n] + e.nbytes])
    decoder.feed(GOLDEN_SNAPSHOT)
    decoder.finish()
    assert bytes(target) == struct.pack("<4f", 1.0, -2.0, 0.5, 3.25) + bytes.fromhex("c03f80be0040")


def test_chunks_are_views_of_the_senders_buffer_of_a_mebibyte_at_most():
    array = np.arange(3 * 2**20, dtype=np.float32)
    frame = frame_of("w", array)
    encoder = Encoder("snapshot", {"step": 1}, [frame])
    big = [chunk for chunk in encoder.chunks() if len(chunk) > 1000]
    assert max(map(len, big)) == 2**20
    assert all(isinstance(chunk, memoryview) for chunk in big)
    array[0] = 7.0  # seen through the view: nothing was copied
    assert np.frombuffer(big[0], dtype="<f4")[0] == 7.0


def test_open_sink_can_refuse_before_anything_is_read():
    def refuse(header: Header):
        raise TooLarge(f"{header.tensor_bytes} bytes")

    decoder = Decoder(refuse)
    with pytest.raises(TooLarge, match="22 bytes"):
        decoder.feed(GOLDEN_SNAPSHOT)
    assert decoder.header is None


def header_with(**fields: object) -> bytes:
    base = {"version": 1, "kind": "snapshot", "message": {}, "tensors": []}
    packed = msgpack.packb({**base, **fields})
    return struct.pack("<I", len(packed)) + packed


def row(**fields: object) -> dict[str, object]:
    return {"name": "w", "dtype": "float32", "shape": [2], "digest": bytes(16), "snapshot": 0, **fields}


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ([row(dtype="float64")], MalformedFrame, "float64"),
        ([row(dtype=3)], MalformedFrame, "dtype 3"),
        ([row(shape=[-1])], MalformedFrame, "at least 1"),
        ([row(shape=[0])], MalformedFrame, "at least 1"),
        ([row(shape=[2.0])], MalformedFrame, "at least 1"),
        ([row(shape=[True])], MalformedFrame, "at least 1"),
        ([row(shape=2)], MalformedFrame, "shape 2"),
        ([row(shape=[2**62, 2**62])], TooLarge, "bytes"),
        ([row(shape=[2**63 + 5])], TooLarge, "bytes"),
        ([row(name="")], MalformedFrame, "name"),
        ([row(name=b"w")], MalformedFrame, "name"),
        ([row(digest=bytes(15))], MalformedFrame, "digest"),
        ([row(digest="0" * 16)], MalformedFrame, "digest"),
        ([row(snapshot=1)], MalformedFrame, "hole"),
        ([row(), row(name="v", snapshot=2)], MalformedFrame, "hole"),
        ([row(snapshot=-1)], MalformedFrame, "at least 0"),
        ([row(), row()], MalformedFrame, "twice"),
        ([row(), row(shape=[3], snapshot=1)], MalformedFrame, "other tensors"),
        ([row(), row(name="v", snapshot=1)], MalformedFrame, "other tensors"),
        ([row(), row(name="v"), row(snapshot=1)], MalformedFrame, "other tensors"),
        ([row(), row(snapshot=1), row(name="v")], MalformedFrame, "in order"),
        ([{**row(), "more": 1}], MalformedFrame, "exactly"),
        ([{"name": "w"}], MalformedFrame, "exactly"),
        (["w"], MalformedFrame, "exactly"),
        ({"w": 1}, MalformedFrame, "list"),
        (None, MalformedFrame, "list"),
    ],
)
def test_bad_tensor_lists_are_refused(rows, error, match):
    with pytest.raises(error, match=match):
        Decoder().feed(header_with(tensors=rows))


@pytest.mark.parametrize(
    ("packed", "match"),
    [
        (b"\xc1", "not what the protocol packs"),
        (b"\x01", "map"),
        (b"\x80\x80", "not what the protocol packs"),
        (b"\x81\x01\x01", "not what the protocol packs"),  # an integer key
        (b"\x82\xa1a\x01\xa1a\x02", "key twice"),
        (b"\x81\xa1a\xd4\x05\x00", "not what the protocol packs"),  # an extension type
        (b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "not what the protocol packs"),  # a timestamp
        (b"\x91" * 2000 + b"\x01", "not what the protocol packs"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "not what the protocol packs"),
        (b"\x81\xa1a\xa2\xff\xfe", "not what the protocol packs"),  # not UTF-8
    ],
)
def test_bad_msgpack_is_refused(packed, match):
    with pytest.raises(MalformedFrame, match=match):
        Decoder().feed(struct.pack("<I", len(packed)) + packed)


def test_header_fields_are_exact():
    with pytest.raises(MalformedFrame, match="fields"):
        Decoder().feed(header_with(more=1))
    with pytest.raises(MalformedFrame, match="kind"):
        Decoder().feed(header_with(kind=1))
    with pytest.raises(MalformedFrame, match="kind"):
        Decoder().feed(header_with(message=[1]))
    with pytest.raises(MalformedFrame, match="no bytes"):
        Decoder().feed(struct.pack("<I", 0))


@pytest.mark.parametrize("version", [0, 2, -1, 2**40, "1", None, True, 1.0])
def test_an_unknown_version_names_those_served(version):
    with pytest.raises(UnsupportedVersion) as caught:
        Decoder().feed(header_with(version=version))
    assert caught.value.detail == {"served": [1]}


def test_frame_length_must_match_the_header():
    packed = header_with(tensors=[row()])
    for length in (0, 7, 9, 2**63, 2**64 - 1):
        with pytest.raises(MalformedFrame, match="expected 8 bytes"):
            Decoder().feed(packed + struct.pack("<Q", length))


def test_wrong_checksums_are_told_from_wrong_framing():
    raw = struct.pack("<2f", 1.0, 2.0)
    good = header_with(tensors=[row(digest=digest(raw))]) + struct.pack("<Q", 8) + raw
    Decoder().feed(good + struct.pack("<I", zlib.crc32(raw)))
    with pytest.raises(ChecksumMismatch, match="CRC-32"):
        Decoder().feed(good + struct.pack("<I", zlib.crc32(raw) ^ 1))
    forged = header_with(tensors=[row()]) + struct.pack("<Q", 8) + raw + struct.pack("<I", zlib.crc32(raw))
    with pytest.raises(ChecksumMismatch, match="digest"):
        Decoder().feed(forged)


def test_digests_may_be_checked_elsewhere():
    """With ``aside`` set, `feed` leaves digests and the check to somebody else, in order."""
    stream, later, seen = joined(request_encoder()), [], []
    decoder = Decoder(check=lambda frame: seen.append(frame.name))
    decoder.aside = later.append
    assert decoder.feed(stream) == []
    assert not decoder.complete
    with pytest.raises(MalformedFrame):
        decoder.finish()
    for work in later:
        work()
    assert decoder.complete
    assert decoder.finish() == request_encoder().header
    whole = Decoder()
    whole.feed(stream)
    assert [(f.name, bytes(f.view())) for f in decoder.frames] == [(f.name, bytes(f.view())) for f in whole.frames]
    assert seen == [f.name for f in whole.frames]


def test_what_is_found_elsewhere_is_raised_by_whatever_comes_next():
    raw = struct.pack("<2f", 1.0, 2.0)
    rows = [row(digest=digest(raw)), row(name="v", digest=digest(bytes(8)))]
    tensor = struct.pack("<Q", 8) + raw + struct.pack("<I", zlib.crc32(raw))
    stream = header_with(tensors=rows) + 2 * tensor  # the second is not what its digest says
    with ThreadPoolExecutor(1) as pool:
        decoder = Decoder()
        decoder.aside = pool.submit
        decoder.feed(stream)
    assert [frame.name for frame in decoder.frames] == [rows[0]["name"]]
    assert not decoder.complete
    for call in (decoder.finish, lambda: decoder.feed(b"")):
        with pytest.raises(ChecksumMismatch, match="digest"):
            call()

    def refuse(frame: TensorFrame) -> None:
        raise TooLarge("no")

    for aside in (None, lambda work: work()):
        strict = Decoder(check=refuse)
        strict.aside = aside
        with pytest.raises(TooLarge):
            (strict.feed(stream), strict.finish())
        assert not strict.frames


def test_caps_on_the_stream():
    stream = GOLDEN_REQUEST
    (header_bytes,) = struct.unpack_from("<I", stream)
    exact = replace(Limits(), max_header_bytes=header_bytes, max_tensors=4, max_snapshots=2, max_body_bytes=len(stream))
    Decoder(limits=exact).feed(stream)
    for cap in ("max_header_bytes", "max_body_bytes"):
        with pytest.raises(TooLarge, match="bytes"):
            Decoder(limits=replace(exact, **{cap: getattr(exact, cap) - 1})).feed(stream)
    with pytest.raises(TooLarge, match="at most 1 snapshots"):
        Decoder(limits=replace(exact, max_snapshots=1)).feed(stream)
    two = joined(Encoder("snapshot", {}, [frame_of(n, np.ones(1, np.float32)) for n in "ab"]))
    Decoder(limits=replace(Limits(), max_tensors=2)).feed(two)
    # msgpack itself refuses an array over the cap before it is built
    with pytest.raises((TooLarge, MalformedFrame)):
        Decoder(limits=replace(Limits(), max_tensors=1)).feed(two)


def test_caps_inside_the_header():
    limits = replace(Limits(), max_string=30, max_map=5)
    Decoder(limits=limits).feed(header_with(message={"a": "x" * 30}))
    Decoder(limits=limits).feed(header_with(message={str(i): 1 for i in range(5)}))
    with pytest.raises(MalformedFrame):
        Decoder(limits=limits).feed(header_with(message={"a": "x" * 31}))
    with pytest.raises(MalformedFrame):
        Decoder(limits=limits).feed(header_with(message={str(i): 1 for i in range(6)}))


def test_a_length_over_the_cap_is_refused_from_its_four_bytes():
    limits = replace(Limits(), max_header_bytes=100)
    Decoder(limits=limits).feed(struct.pack("<I", 100))
    with pytest.raises(TooLarge):
        Decoder(limits=limits).feed(struct.pack("<I", 101))


def test_encoder_refuses_frames_that_contradict_themselves():
    with pytest.raises(MalformedFrame, match="7 bytes"):
        spelled(Limits(), data=bytes(7))
    with pytest.raises(MalformedFrame, match="float64"):
        spelled(Limits(), dtype="float64")
    with pytest.raises(MalformedFrame, match="contiguous"):
        spelled(Limits(), data=memoryview(bytes(16))[::2])


def test_content_digest_ignores_framing_but_not_content():
    header = snapshot_encoder().header
    other = Header(header.kind, {"step": 7}, header.tensors)
    assert header.content_digest() == other.content_digest()
    changed = Header(header.kind, header.message, (replace(header.tensors[0], digest=bytes(16)), *header.tensors[1:]))
    assert header.content_digest() != changed.content_digest()


def test_header_round_trip():
    header = request_encoder().header
    assert unpack_header(pack_header(header), Limits()) == header
    assert header.snapshots == 2
    assert header.tensor_bytes == 32
