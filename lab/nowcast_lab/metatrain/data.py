"""Real data for small trainings: images and text, with a digest of what was read.

CIFAR-10 and tinyshakespeare are read from a folder, in the files they are published in (see `data_folder`);
scikit-learn's digits, the standard library's own source (``stdlib``), PyTorch's C++ headers (``headers``) and Python
source (``torch``), and SymPy's source (``sympy``, which comes with PyTorch) are on every machine. Sources are named by
strings, so recipes and manifests can hold them: ``cifar10@16`` (averaged down to 16 x 16), ``cifar10@32``, ``digits``,
``shakespeare:bytes``, ``headers:bytes``, ``shakespeare:words2000``; and the data sets of
`nowcast_lab.metatrain.standard`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from nowcast_proto.errors import UnreadableFile
from numpy.typing import NDArray
from torch import Tensor

from nowcast_lab.metatrain import standard
from nowcast_lab.metatrain.errors import InvalidRecipe

CIFAR_BINARY = (tuple(f"data_batch_{n}.bin" for n in range(1, 6)), ("test_batch.bin",))
"""CIFAR-10 as it is published ("binary version"): training and test files of records of one label and 3,072 pixels."""
CIFAR_JPEG = ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz")
"""The same as JPEG images: arrays ``blob`` (all files end to end), ``offset`` and ``label``."""
CIFAR_RECORD = 1 + 3 * 32 * 32
SHAKESPEARE = ("tinyshakespeare.txt", "input.txt")
DATA = "data"
CODE_BYTES = 4_000_000
"""How much of a body of source code is read: enough that a short run never sees a byte twice."""


def _stdlib() -> tuple[Path, tuple[str, ...]]:
    return Path(sysconfig.get_path("stdlib")), ("*.py", "[a-s]*/*.py")


def _headers() -> tuple[Path, tuple[str, ...]]:
    return Path(torch.__file__).parent / "include", ("**/*.h",)


def _sympy() -> tuple[Path, tuple[str, ...]]:
    import sympy  # comes with torch

    return Path(sympy.__file__).parent, ("**/*.py",)


def _torch() -> tuple[Path, tuple[str, ...]]:
    return Path(torch.__file__).parent, ("**/*.py",)


CODE = {"stdlib": _stdlib, "headers": _headers, "sympy": _sympy, "torch": _torch}
"""Bodies of source code: where they lie, and the files to read."""
MUCH = {"torch": 12_000_000}
"""Of these more is read than `CODE_BYTES`: enough for 4,000 steps of 2,048 bytes that no training sees twice."""


@dataclass(frozen=True)
class Images:
    """Labelled images, normalised per channel by the training part's mean and deviation.

    Attributes:
        source: Name it was asked for by.
        digest: SHA-256 of the bytes that were read.
        train_x: (n, channels, size, size) float32.
        train_y: (n,) int64.
        test_x: As ``train_x``.
        test_y: As ``train_y``.
    """

    source: str
    digest: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        return Images(self.source, self.digest, *(t.to(device) for t in tensors))

    def split(self, share: float) -> tuple[Images, Images]:
        """Two that share the test part: one with this share of the training part, drawn at random but always the
        same, and one with the rest."""
        order = torch.randperm(len(self.train_y), generator=torch.Generator().manual_seed(0)).to(self.train_y.device)
        first, rest = order.tensor_split([round(share * len(order))])
        one, other = (replace(self, train_x=self.train_x[i], train_y=self.train_y[i]) for i in (first, rest))
        return one, other


@dataclass(frozen=True)
class Text:
    """A token stream, its first nine tenths for training, the rest for validation.

    Attributes:
        source: Name it was asked for by.
        digest: SHA-256 of the bytes that were read.
        train: (n,) int64 token ids.
        test: (m,) int64 token ids.
        vocabulary: Number of token ids.
    """

    source: str
    digest: str
    train: Tensor
    test: Tensor
    vocabulary: int

    def to(self, device: torch.device) -> Text:
        """The same tokens on another device."""
        return Text(self.source, self.digest, self.train.to(device), self.test.to(device), self.vocabulary)

    def split(self, share: float) -> tuple[Text, Text]:
        """Two that share the validation part: one with the first share of the training part, one with the rest."""
        first, rest = self.train.tensor_split([round(share * len(self.train))])
        return replace(self, train=first), replace(self, train=rest)


def data_folder(folder: str | os.PathLike[str] | None) -> Path:
    """Where CIFAR-10 and tinyshakespeare lie: the argument, else ``NOWCAST_DATA``, else ``data`` where one stands."""
    return Path(folder or os.environ.get("NOWCAST_DATA") or DATA)


def corpus_of(source: str) -> str:
    """The data behind a source, whatever its resolution or tokens: ``cifar10@16`` and ``cifar10@32`` are one."""
    return re.split(r"[@:]", source, maxsplit=1)[0]


@lru_cache(maxsize=4)
def load(source: str, folder: str | None = None) -> Images | Text:
    """Read a source by name.

    Args:
        source: See the module's docstring.
        folder: Folder of the files that do not come with Python, see `data_folder`.

    Raises:
        InvalidRecipe: No such source.
        UnreadableFile: Its file is missing or not what it should be.
    """
    corpus, _, variant = source.replace(":", "@").partition("@")
    if corpus == "cifar10":
        return _cifar10(source, int(variant or 32), data_folder(folder))
    if corpus == "digits":
        return _digits(source)
    if corpus == "shakespeare":
        return _tokens(source, _shakespeare(data_folder(folder)), variant)
    if corpus in standard.IMAGES:
        return _standard(source, data_folder(folder))
    if corpus in standard.TEXTS:
        train, test = standard.TEXTS[corpus](data_folder(folder))
        return _parts(source, train, test, variant, data_folder(folder))
    if corpus in CODE:
        root, patterns = CODE[corpus]()
        return _tokens(source, _joined(root, patterns, MUCH.get(corpus, CODE_BYTES)), variant)
    raise InvalidRecipe(
        f"no data source is called {source!r}",
        expected=f"cifar10[@size], digits, {', '.join(standard.IMAGES)}, or a text "
        f"({', '.join(('shakespeare', *CODE, *standard.TEXTS))}) with or without :tokens",
    )


class Digest(Protocol):
    """Takes the bytes that were read."""

    def update(self, data: bytes, /) -> None: ...


def _cifar10(source: str, size: int, folder: Path) -> Images:
    if 32 % size:
        raise InvalidRecipe(f"{source!r}: {size} does not divide 32", expected="a size of 8, 16 or 32")
    digest = hashlib.sha256()
    parts: list[Tensor] = []
    for pixels, labels in _cifar10_binary(folder, digest) or _cifar10_jpeg(folder, digest) or _no_cifar10(folder):
        x = torch.from_numpy(pixels).float().div_(255)
        if size != 32:
            x = torch.nn.functional.avg_pool2d(x, 32 // size)
        parts += [x, torch.from_numpy(labels.astype(np.int64))]
    return _normalised(source, digest.hexdigest(), *parts)


_Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Pixels (n, 3, 32, 32) and labels (n,), both uint8."""


def _cifar10_binary(folder: Path, digest: Digest) -> list[_Part]:
    """Both parts from the published files; empty where there are none."""
    places = (folder, folder / "cifar-10-batches-bin")
    found = next((place for place in places if (place / CIFAR_BINARY[1][0]).exists()), None)
    if found is None:
        return []
    parts = []
    for names in CIFAR_BINARY:
        records = []
        for path in (found / name for name in names):
            raw = standard.read(path)
            if not raw or len(raw) % CIFAR_RECORD:
                raise UnreadableFile(
                    f"{path} has {len(raw)} bytes",
                    expected=f"records of {CIFAR_RECORD} bytes, 10,000 of them in a published file",
                    remedy="unpack the archive again",
                )
            digest.update(raw)
            records.append(np.frombuffer(raw, np.uint8).reshape(-1, CIFAR_RECORD))
        rows = np.concatenate(records)
        if rows[:, 0].max() > 9:
            raise UnreadableFile(
                f"{found} holds the label {rows[:, 0].max()}", expected="CIFAR-10, whose labels are 0 to 9"
            )
        parts.append((np.ascontiguousarray(rows[:, 1:]).reshape(-1, 3, 32, 32), rows[:, 0]))
    return parts


def _cifar10_jpeg(folder: Path, digest: Digest) -> list[_Part]:
    """Both parts from JPEG images; empty where there are none."""
    if not any((folder / name).exists() for name in CIFAR_JPEG):
        return []
    from PIL import Image  # an extra's dependency, needed for this form alone

    parts = []
    for name in CIFAR_JPEG:
        raw = standard.read(folder / name)
        digest.update(raw)
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            blob, offset, label = arrays["blob"].tobytes(), arrays["offset"], arrays["label"]
        pixels = np.empty((len(label), 3, 32, 32), np.uint8)
        for i in range(len(label)):
            image = Image.open(io.BytesIO(blob[offset[i] : offset[i + 1]])).convert("RGB")
            pixels[i] = np.asarray(image).transpose(2, 0, 1)
        parts.append((pixels, label))
    return parts


def _no_cifar10(folder: Path) -> list[_Part]:
    raise UnreadableFile(
        f"CIFAR-10 is not in {folder.absolute()}",
        expected="data_batch_1.bin to data_batch_5.bin and test_batch.bin, there or in cifar-10-batches-bin",
        remedy="unpack https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz (162 MB) there, or name the folder with "
        "--data or NOWCAST_DATA",
    )


def _shakespeare(folder: Path) -> bytes:
    for name in SHAKESPEARE:
        if (folder / name).exists():
            return standard.read(folder / name)
    raise UnreadableFile(
        f"tinyshakespeare is not in {folder.absolute()}",
        expected=" or ".join(SHAKESPEARE),
        remedy="put https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt (1.1 MB) "
        "there, or name the folder with --data or NOWCAST_DATA",
    )


def _standard(source: str, folder: Path) -> Images:
    parts = standard.IMAGES[source](folder)
    digest = hashlib.sha256()
    tensors: list[Tensor] = []
    for part in parts:
        digest.update(part.pixels.tobytes())
        digest.update(part.labels.tobytes())
        tensors += [torch.from_numpy(part.pixels.astype(np.float32)).div_(255), torch.from_numpy(part.labels)]
    return _normalised(source, digest.hexdigest(), *tensors)


def _parts(source: str, train: bytes, test: bytes, tokens: str, folder: Path) -> Text:
    """A text that is published in two parts."""
    if not tokens or tokens == "bytes" or tokens.startswith("words"):
        # Read as one, so that both have the same ids; their border is found again.
        whole, first = _tokens(source, train + test, tokens), _tokens(source, train, tokens or "bytes")
        ids, cut = torch.cat((whole.train, whole.test)), len(first.train) + len(first.test)
        return replace(whole, train=ids[:cut], test=ids[cut:])
    (one, vocabulary), (two, _) = standard.encode(train, tokens, folder), standard.encode(test, tokens, folder)
    digest = hashlib.sha256(train + test).hexdigest()
    return Text(source, digest, torch.from_numpy(one), torch.from_numpy(two), vocabulary)


def _digits(source: str) -> Images:
    from sklearn.datasets import load_digits  # an extra's dependency, needed for this source alone

    bunch = load_digits()
    images = np.ascontiguousarray(bunch.images.astype(np.float32))
    labels = np.ascontiguousarray(bunch.target.astype(np.int64))
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    x, y = torch.from_numpy(images).unsqueeze(1) / 16, torch.from_numpy(labels)
    return _normalised(source, digest, x[:1500], y[:1500], x[1500:], y[1500:])


def _normalised(source: str, digest: str, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Images:
    mean = train_x.mean((0, 2, 3), keepdim=True)
    deviation = train_x.std((0, 2, 3), keepdim=True)
    return Images(
        source,
        digest,
        ((train_x - mean) / deviation).contiguous(),
        train_y,
        ((test_x - mean) / deviation).contiguous(),
        test_y,
    )


def _joined(root: Path, patterns: tuple[str, ...], most: int) -> bytes:
    """Files below a folder in file-name order, without tests and generated or installed files, cut at ``most`` bytes.

    Raises:
        UnreadableFile: There are none.
    """
    parts: list[bytes] = []
    size = 0
    for path in (path for pattern in patterns for path in sorted(root.glob(pattern))):
        if size >= most:
            break
        if not {"test", "tests", "site-packages", "ops"} & set(path.relative_to(root).parts):
            parts.append(path.read_bytes())
            size += len(parts[-1])
    if not parts:
        raise UnreadableFile(f"{root} holds no source code", remedy="install the whole package, not a stripped one")
    return b"\n".join(parts)[:most]


def _tokens(source: str, raw: bytes, tokens: str) -> Text:
    digest = hashlib.sha256(raw).hexdigest()
    tokens = tokens or "bytes"
    if tokens == "bytes":
        ids = torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64))
        vocabulary = 256
    elif match := re.fullmatch(r"words(\d+)", tokens):
        # Words by frequency: the long tail of rare rows that byte tokens lack. Id 0 stands for everything rarer.
        vocabulary = int(match[1])
        words = re.findall(r"\w+|\s+|[^\w\s]", raw.decode("utf-8", "replace"))
        known = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
        ids = torch.tensor([known.get(word, 0) for word in words])
    else:
        raise InvalidRecipe(f"{source!r}: unknown tokens {tokens!r}", expected="bytes or words<N>")
    cut = len(ids) * 9 // 10
    return Text(source, digest, ids[:cut], ids[cut:], vocabulary)
