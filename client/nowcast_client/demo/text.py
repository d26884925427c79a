"""Real text every machine with Python has: the source of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nowcast_proto.errors import UnreadableFile
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of other packages, and of tests, which some systems leave out."""
LEAST = 1_000_000
"""Bytes of text below which a network would see everything several times."""


@dataclass(frozen=True)
class Text:
    """A corpus split by file.

    Attributes:
        training: (n,) bytes of the files to learn from, end to end.
        held_out: (m,) bytes of the files never learnt from: every tenth file.
        files: Number of files in all.
        folder: Where they lie.
    """

    training: Bytes
    held_out: Bytes
    files: int
    folder: Path


def standard_library(folder: Path | None = None) -> Text:
    """Read the standard library's own source.

    Which file is held out depends on its name alone, so the split is the same on every machine with the same Python.

    Args:
        folder: The library's folder; this interpreter's by default.

    Raises:
        UnreadableFile: There is too little text, as in a Python whose library is zipped or stripped of its source.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    found = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    names = [name for name in found if not _LEFT_OUT.intersection(name.parts)]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in names:
        held_out = zlib.crc32(name.as_posix().encode()) % 10 == 0
        parts[held_out].append((folder / name).read_bytes())
    training, held = (np.frombuffer(b"".join(part), dtype=np.uint8) for part in parts)
    if training.size < LEAST or not held.size:
        raise UnreadableFile(
            f"{folder} holds {training.size + held.size} bytes of Python source in {len(names)} files",
            expected=f"a standard library with its source, at least {LEAST} bytes of it",
            remedy="run the demo with a Python that was installed with its library's .py files",
        )
    return Text(training, held, len(names), folder)
