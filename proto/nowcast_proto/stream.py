"""Incremental encoder and decoder of tensor streams. Sans-IO: bytes in, bytes out, no sockets.

A stream is, little-endian::

    u32 length of the header
    header: msgpack map {version, kind, message, tensors: [{name, dtype, shape, digest, snapshot}, …]}
    per tensor, in the header's order:
        u64 length of the data, raw data, u32 CRC-32 of the data

and ends there. The encoder yields views of the caller's buffers, the decoder writes into the receiver's: neither holds
more than the header and one chunk, however long the stream is.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

import msgpack  # type: ignore[import-untyped]
from pydantic import BaseModel

from nowcast_proto.errors import ChecksumMismatch, MalformedFrame, NowcastError, TooLarge
from nowcast_proto.tensors import DIGEST_BYTES, Limits, TensorEntry, TensorFrame, content_digest, parse_entries, short
from nowcast_proto.version import PROTOCOL_VERSION, check_version

CHUNK_BYTES = 1 << 20
"""Most bytes the encoder yields at once."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PER_TENSOR = _U64.size + _U32.size


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a stream.

    Attributes:
        kind: Which message it is: ``nowcast.request``, ``nowcast.reply`` or ``snapshot``.
        message: The message's own fields; `nowcast_proto.messages` has a model per kind.
        tensors: What follows, in order.
        version: Protocol version.
    """

    kind: str
    message: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    version: int = PROTOCOL_VERSION

    @property
    def snapshots(self) -> int:
        """Number of snapshots in the stream; 0 where it carries no tensors."""
        return self.tensors[-1].snapshot + 1 if self.tensors else 0

    @property
    def tensor_bytes(self) -> int:
        """Raw bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.tensors)

    def content_digest(self) -> str:
        """Digest of the tensors, whatever their framing; see `nowcast_proto.tensors.content_digest`."""
        return content_digest(self.tensors)


def pack_header(header: Header) -> bytes:
    """The msgpack form of a header, without its length."""
    rows = [
        {"name": e.name, "dtype": e.dtype, "shape": list(e.shape), "digest": e.digest, "snapshot": e.snapshot}
        for e in header.tensors
    ]
    fields = {"version": header.version, "kind": header.kind, "message": header.message, "tensors": rows}
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedFrame("a map in the header has a key twice", expected="every key once")
    return found


def _no_extension(code: int, data: bytes) -> Any:
    raise MalformedFrame(f"the header has a msgpack extension of type {code}", expected="plain msgpack types")


def unpack_header(data: bytes | bytearray | memoryview, limits: Limits) -> Header:
    """Read and check a msgpack header.

    Raises:
        MalformedFrame: Not msgpack, or a field is missing, unknown or of a wrong type.
        TooLarge: A cap is exceeded.
        UnsupportedVersion: The version is not served.
    """
    try:
        # unpackb makes a fresh Unpacker each time: one that raised is never used again.
        fields = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_no_extension,
            timestamp=0,
            max_str_len=limits.max_string,
            max_bin_len=DIGEST_BYTES,
            max_array_len=limits.max_tensors,
            max_map_len=limits.max_map,
            max_ext_len=0,
        )
    except NowcastError:
        raise
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as exc:
        raise MalformedFrame(
            f"the header is not what the protocol packs: {type(exc).__name__}: {str(exc)[:120]}",
            expected="one msgpack map within the caps",
        ) from exc
    if not isinstance(fields, dict):
        raise MalformedFrame(f"the header is {short(fields)}", expected="a msgpack map")
    # The version decides what else may stand in the header, so it is looked at first.
    version = check_version(fields.get("version"), where="the stream header")
    if fields.keys() != {"version", "kind", "message", "tensors"}:
        raise MalformedFrame(
            f"the header has the fields {short(sorted(map(str, fields)))}",
            expected="exactly version, kind, message and tensors",
        )
    kind, message = fields["kind"], fields["message"]
    if not isinstance(kind, str) or not isinstance(message, dict):
        raise MalformedFrame(
            f"the header's kind is {short(kind)} and its message is a {type(message).__name__}",
            expected="a string and a map",
        )
    return Header(kind, message, parse_entries(fields["tensors"], limits), version)


class Encoder:
    """Encodes one stream.

    Args:
        kind: Kind of message.
        message: Its fields, or a model of `nowcast_proto.messages`.
        frames: The tensors in order, snapshots oldest first. Their buffers are read while `chunks` runs and must not
            change until then; digests that are missing are computed here (one pass over the data).
        limits: The caps to hold the stream to.

    Raises:
        MalformedFrame: A frame contradicts itself or the others.
        TooLarge: A cap is exceeded.
    """

    def __init__(
        self,
        kind: str,
        message: Mapping[str, Any] | BaseModel,
        frames: Iterable[TensorFrame] = (),
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        fields = message.model_dump(mode="json", exclude_none=True) if isinstance(message, BaseModel) else dict(message)
        self._frames = tuple(frames)
        packed = pack_header(Header(kind, fields, tuple(frame.entry() for frame in self._frames)))
        if len(packed) > limits.max_header_bytes:
            raise TooLarge(
                f"the stream's header has {len(packed)} bytes", expected=f"at most {limits.max_header_bytes}"
            )
        # Reading it back holds the sender to what the receiver will check.
        self.header = unpack_header(packed, limits)
        self._prefix = _U32.pack(len(packed)) + packed
        self.content_length = stream_length(len(packed), self.header)
        if self.content_length > limits.max_body_bytes:
            raise TooLarge(f"the stream has {self.content_length} bytes", expected=f"at most {limits.max_body_bytes}")

    def chunks(self, start: int = 0, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes | memoryview]:
        """The stream from byte ``start`` on, in pieces of at most ``chunk_bytes``.

        Raises:
            MalformedFrame: ``start`` lies outside the stream.
        """
        if not 0 <= start <= self.content_length:
            raise MalformedFrame(f"the stream has no byte {start}", expected=f"0 to {self.content_length}")
        for at in range(0, len(self._prefix), chunk_bytes):
            yield from _tail(self._prefix[at : at + chunk_bytes], start - at)
        position = len(self._prefix)
        for frame in self._frames:
            view = frame.view()
            end = position + _PER_TENSOR + view.nbytes
            if end > start:  # a frame already sent whole is not read again
                yield from _tail(_U64.pack(view.nbytes), start - position)
                position += _U64.size
                crc = 0
                for at in range(0, view.nbytes, chunk_bytes):
                    chunk = view[at : at + chunk_bytes]
                    crc = zlib.crc32(chunk, crc)
                    yield from _tail(chunk, start - position - at)
                yield from _tail(_U32.pack(crc), start - position - view.nbytes)
            position = end


def _tail(piece: bytes | memoryview, skip: int) -> Iterator[bytes | memoryview]:
    if skip <= 0:
        yield piece
    elif skip < len(piece):
        yield piece[skip:]


def stream_length(header_bytes: int, header: Header) -> int:
    """Bytes of a whole stream whose packed header has ``header_bytes``."""
    return _U32.size + header_bytes + sum(_PER_TENSOR + entry.nbytes for entry in header.tensors)


Sink = Callable[[int, TensorEntry], memoryview]
"""Given a tensor's place in the stream and its entry, the writable buffer of ``entry.nbytes`` bytes it goes to."""


def allocate(number: int, entry: TensorEntry) -> memoryview:
    """The default sink: memory of its own for every tensor.

    Raises:
        TooLarge: There is not that much memory.
    """
    try:
        return memoryview(bytearray(entry.nbytes))
    except MemoryError as exc:
        raise TooLarge(
            f"tensor {short(entry.name)} has {entry.nbytes} bytes", expected="a tensor that fits into memory"
        ) from exc


class _Expect(Enum):
    HEADER_LENGTH = auto()
    HEADER = auto()
    LENGTH = auto()
    DATA = auto()
    CRC = auto()
    END = auto()


class Decoder:
    """Decodes one stream, fed in pieces of any size.

    Args:
        open_sink: Called once with the checked header, before any tensor is read; returns where the tensors go, or
            raises to refuse the stream. Each tensor gets memory of its own by default.
        limits: The caps to hold the stream to.
        check: Called with every tensor that is whole and matched both checksums; may raise to refuse the stream.

    Attributes:
        header: The header once it has arrived whole, else None.
        header_bytes: Length of the packed header, once known.
        frames: Tensors that arrived whole and passed every check, in order; their buffers are the sink's.
        position: Bytes of the stream consumed so far.
        complete: Whether the last byte has arrived and every check passed.
        aside: Where digests and ``check`` run, which are most of the cost: a function that runs what it is given
            elsewhere, one after another in the order given (an executor's ``submit``, with one worker). May be set
            between calls of `feed`; whoever sets it waits for what was given before `finish`. None: in `feed`, at once.
    """

    def __init__(
        self,
        open_sink: Callable[[Header], Sink] | None = None,
        limits: Limits | None = None,
        check: Callable[[TensorFrame], None] | None = None,
    ) -> None:
        self._open_sink = open_sink or (lambda header: allocate)
        self._limits = limits or Limits()
        self._check = check
        self._begun = 0
        self._expect = _Expect.HEADER_LENGTH
        self._need = _U32.size
        self._small = bytearray()
        self._sink: Sink = allocate
        self._data = memoryview(b"")
        self._filled = 0
        self._crc = 0
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._error: Exception | None = None
        self.aside: Callable[[Callable[[], None]], object] | None = None
        self.header: Header | None = None
        self.header_bytes = 0
        self.frames: list[TensorFrame] = []
        self.position = 0

    @property
    def complete(self) -> bool:
        return self._expect is _Expect.END and self._error is None and len(self.frames) == self._begun

    @property
    def content_length(self) -> int | None:
        """Bytes of the whole stream; None until the header has arrived."""
        return None if self.header is None else stream_length(self.header_bytes, self.header)

    def feed(self, data: bytes | bytearray | memoryview) -> list[TensorFrame]:
        """Take the next bytes of the stream.

        Returns:
            The tensors that passed every check meanwhile.

        Raises:
            MalformedFrame: The bytes break the format, or go on after the stream's end.
            ChecksumMismatch: A tensor's bytes do not match its CRC-32 or its digest.
            TooLarge: A cap is exceeded.
            UnsupportedVersion: The stream's version is not served.
            NowcastError: Whatever ``open_sink`` or ``check`` raised. A decoder that raised once raises it for ever.
        """
        if self._error is not None:
            raise self._error
        done = len(self.frames)
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        try:
            at = 0
            while at < view.nbytes:
                if self._expect is _Expect.DATA:
                    taken = self._take_data(view[at:])
                elif self._expect is _Expect.END:
                    raise MalformedFrame("bytes follow the stream's last tensor", expected="the end of the stream")
                else:
                    taken = min(self._need - len(self._small), view.nbytes - at)
                    self._small += view[at : at + taken]
                    if len(self._small) == self._need:
                        small, self._small = self._small, bytearray()
                        self._take_small(small)
                at += taken
                self.position += taken
        except Exception as exc:
            self._error = exc
            raise
        return self.frames[done:]

    def finish(self) -> Header:
        """State that no more bytes will come.

        Returns:
            The header.

        Raises:
            MalformedFrame: The stream is not complete.
        """
        if self._error is not None:
            raise self._error
        if self.header is None or not self.complete:
            whole = self.content_length
            raise MalformedFrame(
                f"the stream ends after {self.position} bytes",
                expected="a whole header" if whole is None else f"{whole} bytes",
                remedy="send it again, or resume it from where it broke off",
            )
        return self.header

    def _take_small(self, small: bytearray) -> None:
        if self._expect is _Expect.HEADER_LENGTH:
            (length,) = _U32.unpack(small)
            if length > self._limits.max_header_bytes:
                raise TooLarge(
                    f"the stream's header has {length} bytes", expected=f"at most {self._limits.max_header_bytes}"
                )
            if length == 0:
                raise MalformedFrame("the stream's header has no bytes", expected="a msgpack map")
            self._expect, self._need, self.header_bytes = _Expect.HEADER, length, length
        elif self._expect is _Expect.HEADER:
            header = unpack_header(small, self._limits)
            whole = stream_length(self.header_bytes, header)
            if whole > self._limits.max_body_bytes:
                raise TooLarge(f"the stream has {whole} bytes", expected=f"at most {self._limits.max_body_bytes}")
            self._sink = self._open_sink(header)
            self.header = header
            self._next_tensor()
        elif self._expect is _Expect.LENGTH:
            entry = self._entry()
            (length,) = _U64.unpack(small)
            if length != entry.nbytes:
                raise MalformedFrame(
                    f"the frame of tensor {short(entry.name)} has {length} bytes", expected=f"{entry.nbytes} bytes"
                )
            self._data = memoryview(self._sink(self._begun, entry)).cast("B")
            self._begun += 1
            if self._data.nbytes != entry.nbytes or self._data.readonly:
                raise TypeError(f"the sink gave {self._data.nbytes} bytes for a tensor of {entry.nbytes}")
            self._filled, self._crc = 0, 0
            self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
            self._expect = _Expect.DATA
        else:
            (crc,) = _U32.unpack(small)
            self._close_tensor(crc)

    def _take_data(self, view: memoryview) -> int:
        taken = min(self._data.nbytes - self._filled, view.nbytes)
        part = self._data[self._filled : self._filled + taken]
        part[:] = view[:taken]
        self._crc = zlib.crc32(part, self._crc)
        self._do(partial(self._hash.update, part))
        self._filled += taken
        if self._filled == self._data.nbytes:
            self._expect, self._need = _Expect.CRC, _U32.size
        return taken

    def _close_tensor(self, crc: int) -> None:
        entry = self._entry()
        if crc != self._crc:
            raise _mismatch(entry, "CRC-32")
        frame = TensorFrame(entry.name, entry.dtype, entry.shape, self._data, entry.snapshot, digest=entry.digest)
        self._do(partial(self._accept, frame, self._hash))
        self._data = memoryview(b"")
        self._next_tensor()

    def _accept(self, frame: TensorFrame, state: Any) -> None:
        if state.digest() != frame.digest:
            raise _mismatch(frame, "digest")
        if self._check is not None:
            self._check(frame)
        self.frames.append(frame)

    def _do(self, work: Callable[[], None]) -> None:
        if self.aside is None:
            work()
        else:
            self.aside(partial(self._caught, work))

    def _caught(self, work: Callable[[], None]) -> None:
        try:
            if self._error is None:
                work()
        except Exception as exc:  # raised by the next `feed`, or by `finish`
            self._error = exc

    def _next_tensor(self) -> None:
        more = self._begun < len(self._listed())
        self._expect, self._need = (_Expect.LENGTH, _U64.size) if more else (_Expect.END, 0)

    def _listed(self) -> tuple[TensorEntry, ...]:
        return () if self.header is None else self.header.tensors

    def _entry(self) -> TensorEntry:
        """The tensor at hand: the next one where its length is still to come, else the one that is being read."""
        return self._listed()[self._begun - (self._expect is not _Expect.LENGTH)]


def _mismatch(tensor: TensorEntry | TensorFrame, which: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"the bytes of tensor {short(tensor.name)} do not match its {which}",
        expected="the bytes the sender read",
        remedy="send the stream again",
    )
