"""Real data for small trainings: images and text, with a digest of what was read.

CIFAR-10 and tinyshakespeare are read from a folder the user names; scikit-learn's digits, the standard library's own
source (``stdlib``), PyTorch's C++ headers (``headers``) and SymPy's source (``sympy``, which comes with PyTorch) are on
every machine. Sources are named by strings, so recipes and manifests can hold them: ``cifar10@16`` (averaged down to
16 x 16), ``cifar10@32``, ``digits``, ``shakespeare:bytes``, ``headers:bytes``, ``shakespeare:words2000``.
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

import numpy as np
import torch
from nowcast_proto.errors import UnreadableFile
from torch import Tensor

from nowcast_lab.metatrain.errors import InvalidRecipe

CIFAR_FILES = ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz")
CODE_BYTES = 4_000_000
"""How much of a body of source code is read: enough that a short run never sees a byte twice."""


def _stdlib() -> tuple[Path, tuple[str, ...]]:
    return Path(sysconfig.get_path("stdlib")), ("*.py", "[a-s]*/*.py")


def _headers() -> tuple[Path, tuple[str, ...]]:
    return Path(torch.__file__).parent / "include", ("**/*.h",)


def _sympy() -> tuple[Path, tuple[str, ...]]:
    import sympy  # comes with torch

    return Path(sympy.__file__).parent, ("**/*.py",)


CODE = {"stdlib": _stdlib, "headers": _headers, "sympy": _sympy}
"""Bodies of source code: where they lie, and the files to read."""


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
    """Where CIFAR-10 and tinyshakespeare lie: the argument, else ``$NOWCAST_SHARED/data``, else ``../shared/data``."""
    if folder is not None:
        return Path(folder)
    return Path(os.environ.get("NOWCAST_SHARED", "../shared")) / "data"


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
        path = data_folder(folder) / "tinyshakespeare.txt"
        try:
            raw = path.read_bytes()
        except OSError as exc:
            raise UnreadableFile(
                f"{path} cannot be read: {exc.strerror}", remedy="give --data the folder that holds it"
            ) from exc
        return _tokens(source, raw, variant)
    if corpus in CODE:
        root, patterns = CODE[corpus]()
        return _tokens(source, _joined(root, patterns), variant)
    raise InvalidRecipe(
        f"no data source is called {source!r}",
        expected=f"cifar10[@size], digits, or a text ({', '.join(('shakespeare', *CODE))}) with or without :tokens",
    )


def _cifar10(source: str, size: int, folder: Path) -> Images:
    from PIL import Image  # an extra's dependency, needed for this source alone

    if 32 % size:
        raise InvalidRecipe(f"{source!r}: {size} does not divide 32", expected="a size of 8, 16 or 32")
    digest = hashlib.sha256()
    parts: list[Tensor] = []
    for name in CIFAR_FILES:
        path = folder / name
        try:
            raw = path.read_bytes()
        except OSError as exc:
            raise UnreadableFile(
                f"{path} cannot be read: {exc.strerror}", remedy="give --data the folder that holds it"
            ) from exc
        digest.update(raw)
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            blob, offset, label = arrays["blob"].tobytes(), arrays["offset"], arrays["label"]
        pixels = np.empty((len(label), 32, 32, 3), np.uint8)
        for i in range(len(label)):
            pixels[i] = np.asarray(Image.open(io.BytesIO(blob[offset[i] : offset[i + 1]])).convert("RGB"))
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
        if size != 32:
            x = torch.nn.functional.avg_pool2d(x, 32 // size)
        parts += [x, torch.from_numpy(label.astype(np.int64))]
    return _normalised(source, digest.hexdigest(), *parts)


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


def _joined(root: Path, patterns: tuple[str, ...]) -> bytes:
    """Files below a folder in file-name order, without tests and generated or installed files, cut at `CODE_BYTES`.

    Raises:
        UnreadableFile: There are none.
    """
    parts: list[bytes] = []
    size = 0
    for path in (path for pattern in patterns for path in sorted(root.glob(pattern))):
        if size >= CODE_BYTES:
            break
        if not {"test", "tests", "site-packages", "ops"} & set(path.relative_to(root).parts):
            parts.append(path.read_bytes())
            size += len(parts[-1])
    if not parts:
        raise UnreadableFile(f"{root} holds no source code", remedy="install the whole package, not a stripped one")
    return b"\n".join(parts)[:CODE_BYTES]


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
