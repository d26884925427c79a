"""Standard data sets of images and text, in the files they are published in.

Images are ``fashion`` (FashionMNIST: the four idx files, packed or not), ``cifar100`` (binary version, fine labels) and
``imagenet32`` (ImageNet at 32 x 32, npz version); texts ``lm1b`` (One Billion Word Benchmark) and ``wikitext103``
(WikiText-103). Which files that are, and the folders they may lie in, say the `Published` below.

Texts may be read with a tokenizer: ``lm1b:gpt2`` looks for ``gpt2/tokenizer.json`` in the folder.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nowcast_proto.errors import UnreadableFile
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
TEXT_BYTES = 200_000_000
"""How much of a text is read: 50 million tokens and more, which a run of 10,000 steps hardly repeats."""


@dataclass(frozen=True)
class Pictures:
    """One part of an image data set.

    Attributes:
        pixels: (n, channels, height, width).
        labels: (n,) from 0.
    """

    pixels: Bytes
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Published:
    """A data set as it is published.

    Attributes:
        title: What people call it.
        places: Folders its files may lie in, below the one named.
        files: What is expected there, for a message.
        mark: File (or pattern) whose presence says that it is here.
        source: Where it is to be had.
    """

    title: str
    places: tuple[str, ...]
    files: str
    mark: str
    source: str

    def find(self, folder: Path) -> Path:
        """The folder that holds it.

        Raises:
            UnreadableFile: None does.
        """
        for place in (folder, *(folder / name for name in self.places)):
            if any(place.glob(self.mark)):
                return place
        raise UnreadableFile(
            f"{self.title} is not in {folder.absolute()}",
            expected=f"{self.files}, there or in {' or '.join(self.places)}",
            remedy=f"get it from {self.source}, or name the folder with --data or NOWCAST_DATA",
        )


FASHION = Published(
    "FashionMNIST",
    ("FashionMNIST/raw",),
    "train-images-idx3-ubyte and its three companions, packed or not",
    "train-images-idx3-ubyte*",
    "https://github.com/zalandoresearch/fashion-mnist",
)
CIFAR100 = Published(
    "CIFAR-100",
    ("cifar-100-binary",),
    "train.bin and test.bin",
    "train.bin",
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
)
IMAGENET32 = Published(
    "ImageNet at 32 x 32",
    ("imagenet32",),
    "train_data_batch_1.npz to train_data_batch_10.npz, or some of them, and val_data.npz",
    "train_data_batch_*.npz",
    "https://image-net.org/download-images (downsampled, npz)",
)
LM1B = Published(
    "the One Billion Word Benchmark",
    ("1-billion-word-language-modeling-benchmark-r13output",),
    "training-monolingual.tokenized.shuffled and heldout-monolingual.tokenized.shuffled",
    "training-monolingual.tokenized.shuffled/news.en-*",
    "https://www.statmt.org/lm-benchmark/",
)
WIKITEXT103 = Published(
    "WikiText-103",
    ("wikitext-103-raw", "wikitext-103"),
    "wiki.train.raw and wiki.valid.raw, or the same as .tokens",
    "wiki.train.*",
    "https://www.salesforce.com/blog/the-wikitext-long-term-dependency-language-modeling-dataset/",
)


def fashion(folder: Path) -> tuple[Pictures, Pictures]:
    """Training and test part of FashionMNIST."""
    place = FASHION.find(folder)
    parts = []
    for part, count in (("train", "60,000"), ("t10k", "10,000")):
        pixels, labels = _idx(place / f"{part}-images-idx3-ubyte", 3), _idx(place / f"{part}-labels-idx1-ubyte", 1)
        if len(pixels) != len(labels):
            raise UnreadableFile(f"{place} holds {len(pixels)} images and {len(labels)} labels", expected=count)
        parts.append(Pictures(pixels[:, None], labels.astype(np.int64)))
    return parts[0], parts[1]


def _idx(path: Path, dimensions: int) -> Bytes:
    """An array of the idx format: zero, zero, type 8, number of dimensions, each as four bytes, then the bytes."""
    packed = path.with_name(path.name + ".gz")
    raw = gzip.decompress(read(packed)) if packed.exists() else read(path)
    shape = np.frombuffer(raw[4 : 4 + 4 * dimensions], ">u4").astype(np.int64)
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) != 4 + 4 * dimensions + int(shape.prod()):
        raise UnreadableFile(
            f"{path} is no idx file of {dimensions} dimensions, or is cut short", remedy="fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def cifar100(folder: Path) -> tuple[Pictures, Pictures]:
    """Training and test part of CIFAR-100, with its fine labels."""
    place = CIFAR100.find(folder)
    parts = []
    for name in ("train.bin", "test.bin"):
        raw = read(place / name)
        record = 2 + 3 * 32 * 32
        if not raw or len(raw) % record:
            raise UnreadableFile(
                f"{place / name} has {len(raw)} bytes", expected=f"records of {record} bytes", remedy="unpack it again"
            )
        rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
        parts.append(Pictures(rows[:, 2:].reshape(-1, 3, 32, 32), rows[:, 1].astype(np.int64)))
    return parts[0], parts[1]


def imagenet32(folder: Path) -> tuple[Pictures, Pictures]:
    """Training and validation part of ImageNet at 32 x 32; of the former as many files as there are."""
    place = IMAGENET32.find(folder)
    found = [_npz(path) for path in sorted(place.glob("train_data_batch_*.npz"))]
    pixels, labels = (np.concatenate([getattr(one, what) for one in found]) for what in ("pixels", "labels"))
    return Pictures(pixels, labels), _npz(place / "val_data.npz")


def _npz(path: Path) -> Pictures:
    try:
        with np.load(io.BytesIO(read(path)), allow_pickle=False) as arrays:
            pixels, labels = arrays["data"], arrays["labels"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
        raise UnreadableFile(f"{path} is no archive of data and labels: {exc}", remedy="fetch it again") from exc
    if pixels.dtype != np.uint8 or pixels.size != len(labels) * 3 * 32 * 32:
        raise UnreadableFile(f"{path} has data of shape {list(pixels.shape)}", expected="rows of 3,072 bytes")
    return Pictures(pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64) - 1)  # published labels begin at 1


IMAGES: dict[str, Callable[[Path], tuple[Pictures, Pictures]]] = {
    "fashion": fashion,
    "cifar100": cifar100,
    "imagenet32": imagenet32,
}


def lm1b(folder: Path) -> tuple[bytes, bytes]:
    """Training and held-out text of the One Billion Word Benchmark, each cut at `TEXT_BYTES`."""
    place = LM1B.find(folder)
    held = sorted(place.glob("heldout-monolingual.tokenized.shuffled/news.en.heldout-*"))
    if not held:
        raise UnreadableFile(f"{place} holds no held-out text", expected=LM1B.files)
    return _head(sorted(place.glob(LM1B.mark))), _head(held)


def wikitext103(folder: Path) -> tuple[bytes, bytes]:
    """Training and validation text of WikiText-103, each cut at `TEXT_BYTES`."""
    train = sorted(WIKITEXT103.find(folder).glob(WIKITEXT103.mark))[0]
    return _head([train]), _head([train.with_name(train.name.replace("train", "valid"))])


def _head(paths: Sequence[Path]) -> bytes:
    parts: list[bytes] = []
    for path in paths:
        if sum(map(len, parts)) >= TEXT_BYTES:
            break
        parts.append(read(path))
    return b"".join(parts)[:TEXT_BYTES]


TEXTS: dict[str, Callable[[Path], tuple[bytes, bytes]]] = {"lm1b": lm1b, "wikitext103": wikitext103}


def encode(text: bytes, name: str, folder: Path) -> tuple[NDArray[np.int64], int]:
    """Token ids of a text and the number of ids there are, with the tokenizer of ``NAME/tokenizer.json``.

    Raises:
        UnreadableFile: It is not there, or no tokenizer.
    """
    from tokenizers import Tokenizer  # an extra's dependency, needed for this alone

    path = folder / name / "tokenizer.json"
    raw = read(path)
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except ValueError as exc:
        raise UnreadableFile(f"{path} is no tokenizer: {exc}", remedy="save it with the tokenizers library") from exc
    lines = text.decode("utf-8", "replace").splitlines(keepends=True)
    ids = [one.ids for one in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
    return np.concatenate([np.array(one, np.int64) for one in ids]), int(tokenizer.get_vocab_size())


def read(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        UnreadableFile: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UnreadableFile(
            f"{path} cannot be read: {exc.strerror}", remedy="put all files of the data set there"
        ) from exc
