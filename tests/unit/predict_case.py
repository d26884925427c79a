"""A folder with all that ``nowcast predict`` needs."""

from __future__ import annotations

from pathlib import Path

import torch
from nowcast_service.nino.checkpoint import save_checkpoint
from safetensors.torch import load_file, save_file

from .command import nowcast, write_case
from .nino.made import checkpoint, history, mlp

SPEC = mlp(5, 7, 4)


class Case:
    def __init__(self, folder: Path, capfd) -> None:
        self.folder, self.capfd = folder, capfd
        self.past = history(SPEC)
        self.snapshots = write_case(folder, SPEC, self.past)
        self.made, self.edgewise = checkpoint(), checkpoint(gnn=False)
        save_checkpoint(folder / "nino.safetensors", self.made)
        save_checkpoint(folder / "wnn.safetensors", self.edgewise)
        self.out = folder / "out.safetensors"
        self.before = set(folder.iterdir())

    def run(self, *more: object, **changed: object):
        """The ordinary request, with options changed or (None) left out."""
        options = {
            "spec": self.folder / "spec.json",
            "snapshots": self.snapshots,
            "checkpoint": self.folder / "nino.safetensors",
            "k": 8,
            "out": self.out,
            **changed,
        }
        args: list[object] = []
        for name, value in options.items():
            if value is not None:
                args += [f"--{name}", *(value if isinstance(value, list) else [value])]
        return nowcast(self.capfd, "predict", *args, *more)

    def refused(self, *words: str, **changed: object) -> None:
        """The request fails with status 2, one message that has all the words, no traceback, and writes nothing."""
        before = set(self.folder.iterdir())
        outcome = self.run(**changed)
        assert outcome.status == 2
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        for word in words:
            assert word in outcome.err, outcome.err
        assert set(self.folder.iterdir()) == before


# -- bad input --


def change(case: Case, number: int, name: str, tensor: torch.Tensor | None) -> None:
    tensors = {**load_file(case.snapshots[number]), name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, case.snapshots[number])
