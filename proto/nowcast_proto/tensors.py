"""Tensors on the wire: the dtype table, the entries a header lists, frames with their bytes, and every cap.

Torch-free: a frame is a name, a dtype name, a shape and a buffer of little-endian bytes. `nowcast_proto.arrays` turns
frames into NumPy arrays and back.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from nowcast_proto.errors import MalformedFrame, TooLarge

DTYPES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Wire dtype -> bytes per element."""

MUCH = 1 << 22
"""Bytes from which on another thread is worth its while."""
DIGEST_BYTES = 16
_HASH_STEP = 1 << 24


@dataclass(frozen=True, slots=True)
class Limits:
    """Every cap a decoder enforces, before it allocates anything.

    Attributes:
        max_header_bytes: msgpack header of one stream.
        max_tensors: Tensor frames in one stream, over all its snapshots.
        max_snapshots: Snapshots in one stream.
        max_name: Characters in a tensor's name.
        max_dimensions: Dimensions of a tensor.
        max_tensor_bytes: Bytes of one tensor.
        max_body_bytes: Bytes of one whole stream, header and checksums included.
        max_string: Bytes of any string in the header.
        max_map: Keys of any map in the header.
    """

    max_header_bytes: int = 8 * 2**20
    max_tensors: int = 100_000
    max_snapshots: int = 64
    max_name: int = 512
    max_dimensions: int = 8
    max_tensor_bytes: int = 2**35
    max_body_bytes: int = 2**38
    max_string: int = 4096
    max_map: int = 100_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the header says about one tensor.

    Attributes:
        name: The tensor's name in the network.
        dtype: A key of `DTYPES`.
        shape: Sizes, each at least 1; empty for a scalar.
        digest: BLAKE2b-128 of the raw bytes.
        snapshot: Which snapshot of the stream the tensor belongs to, 0 = oldest.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes
    snapshot: int = 0

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Raw bytes on the wire."""
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(slots=True)
class TensorFrame:
    """A tensor with its bytes; nothing is copied.

    Attributes:
        name: The tensor's name in the network.
        dtype: A key of `DTYPES`.
        shape: Sizes, each at least 1; empty for a scalar.
        data: C-contiguous little-endian elements, any object with the buffer protocol.
        snapshot: Which snapshot of the stream it belongs to, 0 = oldest.
        digest: BLAKE2b-128 of the bytes; computed on first use where it is not given.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview | bytes | bytearray
    snapshot: int = 0
    digest: bytes | None = field(default=None, compare=False)

    def view(self) -> memoryview:
        """The bytes, flat."""
        return flat_bytes(self.data)

    def entry(self) -> TensorEntry:
        """What the header says about this tensor; computes the digest once.

        Raises:
            MalformedFrame: Unknown dtype, or the buffer's size contradicts dtype and shape.
        """
        check_dtype(self.name, self.dtype)
        expected = math.prod(self.shape) * DTYPES[self.dtype]
        view = self.view()
        if view.nbytes != expected:
            raise MalformedFrame(
                f"tensor {short(self.name)} of {self.dtype}{list(self.shape)} comes with {view.nbytes} bytes",
                expected=f"{expected} bytes",
            )
        if self.digest is None:
            self.digest = digest(view)
        return TensorEntry(self.name, self.dtype, tuple(self.shape), self.digest, self.snapshot)


def flat_bytes(data: memoryview | bytes | bytearray) -> memoryview:
    """A flat view of a C-contiguous buffer, byte by byte.

    Raises:
        MalformedFrame: The buffer is not C-contiguous.
    """
    view = memoryview(data)
    if not view.c_contiguous:
        raise MalformedFrame("a tensor's buffer is not contiguous", expected="C-contiguous elements")
    # A zero-dimensional or structured buffer is only castable from its own byte view.
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def digest(data: memoryview | bytes | bytearray) -> bytes:
    """BLAKE2b-128 of a buffer. The interpreter lock is free while it runs."""
    view = memoryview(data)
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for start in range(0, view.nbytes, _HASH_STEP):
        state.update(view[start : start + _HASH_STEP])
    return state.digest()


def seal(frames: Sequence[TensorFrame], threads: int) -> None:
    """Compute the digests that are missing, several tensors at a time where there is much to do.

    Args:
        frames: Any tensors; their digests are kept with them.
        threads: How many to work on at once.

    Raises:
        MalformedFrame: As `TensorFrame.entry`.
    """
    open_ = [frame for frame in frames if frame.digest is None]
    if threads == 1 or sum(frame.view().nbytes for frame in open_) < MUCH:
        for frame in open_:
            frame.entry()
    else:
        with ThreadPoolExecutor(threads) as pool:
            deque(pool.map(TensorFrame.entry, open_), maxlen=0)


def short(name: object) -> str:
    """A peer's word made fit for a message: quoted and cut off."""
    text = repr(name)
    return text if len(text) <= 80 else text[:76] + "…" + text[-1]


def check_dtype(name: str, dtype: object) -> str:
    """Accept a dtype of the wire.

    Raises:
        MalformedFrame: It is another one.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MalformedFrame(
            f"tensor {short(name)} has dtype {short(dtype)}",
            expected="one of " + ", ".join(DTYPES),
            remedy="convert the tensor before sending it",
        )
    return dtype


def parse_entries(rows: object, limits: Limits) -> tuple[TensorEntry, ...]:
    """Read and check the tensor list of a header.

    Snapshots must be numbered from 0 without a hole and come in order; each must list the same tensors in the same
    order with the same shapes.

    Args:
        rows: The header's ``tensors`` field as unpacked.
        limits: The caps to hold it to.

    Raises:
        MalformedFrame: A row is malformed, a name is listed twice in a snapshot, or snapshots differ or have a hole.
        TooLarge: A cap is exceeded.
    """
    if not isinstance(rows, list):
        raise MalformedFrame(f"the header's tensors are {short(rows)}", expected="a list of maps")
    if len(rows) > limits.max_tensors:
        raise TooLarge(f"the stream lists {len(rows)} tensors", expected=f"at most {limits.max_tensors}")
    entries = tuple(_parse_entry(row, limits) for row in rows)
    _check_snapshots(entries, limits)
    return entries


def _parse_entry(row: object, limits: Limits) -> TensorEntry:
    if not isinstance(row, dict) or row.keys() != _ROW_KEYS:
        raise MalformedFrame(
            f"a tensor is listed as {short(row)}", expected="a map with exactly name, dtype, shape, digest and snapshot"
        )
    name, shape, tag, snapshot = row["name"], row["shape"], row["digest"], row["snapshot"]
    if not isinstance(name, str) or not name:
        raise MalformedFrame(f"a tensor's name is {short(name)}", expected="a string that is not empty")
    if len(name) > limits.max_name:
        raise TooLarge(f"a tensor's name has {len(name)} characters", expected=f"at most {limits.max_name}")
    dtype = check_dtype(name, row["dtype"])
    if not isinstance(shape, list) or not all(type(size) is int and size >= 1 for size in shape):
        raise MalformedFrame(
            f"tensor {short(name)} has shape {short(shape)}", expected="a list of integers, each at least 1"
        )
    if len(shape) > limits.max_dimensions:
        raise TooLarge(f"tensor {short(name)} has {len(shape)} dimensions", expected=f"at most {limits.max_dimensions}")
    nbytes = math.prod(shape) * DTYPES[dtype]
    if nbytes > limits.max_tensor_bytes:
        raise TooLarge(f"tensor {short(name)} has {nbytes} bytes", expected=f"at most {limits.max_tensor_bytes}")
    if not isinstance(tag, bytes) or len(tag) != DIGEST_BYTES:
        raise MalformedFrame(f"tensor {short(name)} has digest {short(tag)}", expected=f"{DIGEST_BYTES} bytes")
    if type(snapshot) is not int or snapshot < 0:
        raise MalformedFrame(
            f"tensor {short(name)} belongs to snapshot {short(snapshot)}", expected="an integer of at least 0"
        )
    if snapshot >= limits.max_snapshots:
        raise TooLarge(
            f"tensor {short(name)} belongs to snapshot number {snapshot}",
            expected=f"at most {limits.max_snapshots} snapshots in a stream",
        )
    return TensorEntry(name, dtype, tuple(shape), tag, snapshot)


_ROW_KEYS = {"name", "dtype", "shape", "digest", "snapshot"}


def _check_snapshots(entries: tuple[TensorEntry, ...], limits: Limits) -> None:
    parts: list[dict[str, tuple[int, ...]]] = []
    for entry in entries:
        if entry.snapshot == len(parts):
            parts.append({})
        elif entry.snapshot != len(parts) - 1:
            raise MalformedFrame(
                f"tensor {short(entry.name)} of snapshot {entry.snapshot} follows one of snapshot {len(parts) - 1}",
                expected="snapshots numbered from 0, in order, without a hole",
            )
        if entry.name in parts[-1]:
            raise MalformedFrame(
                f"tensor {short(entry.name)} is listed twice in snapshot {entry.snapshot}",
                expected="every tensor once",
                remedy="send tied tensors once, under their first name",
            )
        parts[-1][entry.name] = entry.shape
    for number, part in enumerate(parts[1:], start=1):
        if list(part.items()) != list(parts[0].items()):
            raise MalformedFrame(
                f"snapshot {number} lists other tensors than snapshot 0",
                expected="the same names and shapes in the same order in every snapshot",
            )


def content_digest(entries: Iterable[TensorEntry]) -> str:
    """Digest of what a stream carries, whatever its framing: BLAKE2b-128 over a line per tensor.

    A line is ``snapshot TAB name TAB dtype TAB sizes joined by commas TAB digest in hex LF`` in UTF-8.

    Returns:
        32 hex digits; equal exactly where names, dtypes, shapes, bytes and their order are.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for e in entries:
        sizes = ",".join(map(str, e.shape))
        state.update(f"{e.snapshot}\t{e.name}\t{e.dtype}\t{sizes}\t{e.digest.hex()}\n".encode())
    return state.hexdigest()
