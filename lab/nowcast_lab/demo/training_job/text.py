"""Real text every machine with Python has: the source of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nowcast_proto.errors import UnreadableFile
from numpy.typing import NDArray
from torch import Tensor

from nowcast_lab.demo.training_job.gpt import GPT, GPTConfig
from nowcast_lab.demo.training_job.task import Task

Bytes = NDArray[np.uint8]

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of other packages, and of tests, which some systems leave out."""
LEAST = 1_000_000
"""Bytes of text below which a network would see everything several times."""
HELD_OUT_WINDOWS = 256


def code() -> Task:
    """The task: a small GPT learns the next byte.

    Raises:
        UnreadableFile: See `standard_library`.
    """
    text, config = standard_library(), GPTConfig()
    training, held_out = (torch.from_numpy(part.copy()) for part in (text.training, text.held_out))
    offsets = torch.arange(config.n_positions + 1)

    def windows(source: Tensor, count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(0, source.numel() - offsets.numel(), (count, 1), generator=generator)
        return source[starts + offsets].long()

    return Task(
        title="A GPT",
        subject=f"learns the Python standard library's source ({training.numel() / 1e6:.1f} MB)",
        unit="nats per byte",
        model=lambda: GPT(config),
        loss=lambda model, batch: model.loss(batch),  # type: ignore[operator]  # a GPT
        draw=lambda count, generator: windows(training, count, generator),
        held_out=windows(held_out, HELD_OUT_WINDOWS, torch.Generator().manual_seed(0)),
        batch=16,
        steps=1000,
        rate=1.6e-2,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip=1.0,
    )


@dataclass(frozen=True)
class Text:
    """A corpus split by file.

    Attributes:
        training: (n,) bytes of the files to learn from, end to end.
        held_out: (m,) bytes of the files never learnt from: every tenth file.
    """

    training: Bytes
    held_out: Bytes


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
    return Text(training, held)
