"""Trajectories on disk: one memory-mapped ``.npy`` per shard and a manifest that says where every number came from.

A shard is (models, snapshots, elements): all parameters of a network in spec order, flattened end to end. The manifest
is replaced atomically after each shard, so a run that was killed resumes at the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nowcast_proto.errors import TooLarge
from nowcast_proto.spec import ArchitectureSpec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nowcast_lab.metatrain.errors import InvalidTrajectories
from nowcast_lab.metatrain.zoo import Arch

MANIFEST = "manifest.json"
Precision = Literal["float32", "float16"]


class Training(BaseModel):
    """One trajectory of a shard: how this network was trained, and how it ended.

    Attributes:
        seed: Initial weights and batches.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        schedule: ``constant`` or ``cosine``.
        final_loss: Mean training loss of the last tenth of the run; None where it is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    final_loss: float | None = None


class Shard(BaseModel):
    """One file of trajectories of one architecture.

    Attributes:
        key: What was asked for (the group and its repeat), for resuming.
        file: File name beside the manifest.
        sha256: Digest of that file.
        spec: The architecture.
        arch: The same as the zoo names it; None for imported snapshots.
        source: Data source, or where the snapshots were imported from.
        source_sha256: Digest of the data that was read, or of the imported files.
        snapshots: Snapshots per trajectory.
        every: Optimizer steps between snapshots.
        optimizer: Base optimizer.
        batch: Batch size; None where it is not known.
        trainings: One entry per trajectory.
        jumps: Snapshots right after which a nowcast moved the parameters.
        nowcasts: Digest of the checkpoint that made them; None where there were none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    file: str
    sha256: str
    spec: ArchitectureSpec
    arch: Arch | None = None
    source: str
    source_sha256: str
    snapshots: int
    every: int
    optimizer: str | None = None
    batch: int | None = None
    trainings: tuple[Training, ...]
    jumps: tuple[int, ...] = ()
    nowcasts: str | None = None


class Manifest(BaseModel):
    """Everything in a trajectory folder.

    Attributes:
        version: Layout version of the folder.
        shards: In the order they were collected.
        made_with: Versions of what made them.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    shards: list[Shard] = Field(default_factory=list)
    made_with: dict[str, str] = Field(default_factory=dict)


class TrajectoryStore:
    """A folder of trajectories.

    Args:
        folder: Created when it does not exist.
        budget: Most bytes all shards together may take.
        create: Start an empty folder when there is no manifest; else that is an error.

    Raises:
        InvalidTrajectories: The manifest is missing (and `create` is false) or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], *, budget: int | None = None, create: bool = False) -> None:
        self.folder = Path(folder)
        self.budget = budget
        path = self.folder / MANIFEST
        if path.exists():
            try:
                self.manifest = Manifest.model_validate_json(path.read_bytes())
            except ValidationError as exc:
                raise InvalidTrajectories(
                    f"{path} is damaged: {exc.error_count()} fields do not fit",
                    remedy="collect again into an empty folder",
                ) from exc
        elif create:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest = Manifest()
        else:
            raise InvalidTrajectories(
                f"{self.folder} holds no {MANIFEST}",
                expected="a folder made by `nowcast metatrain collect`",
                remedy="collect first, or correct the path",
            )

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.manifest.shards)

    def __len__(self) -> int:
        return len(self.manifest.shards)

    @property
    def bytes_used(self) -> int:
        """Size of all shards on disk."""
        return sum((self.folder / shard.file).stat().st_size for shard in self)

    def has(self, key: str) -> bool:
        """Whether a shard with this key is complete."""
        return any(shard.key == key for shard in self)

    def require_room(self, n_bytes: int) -> None:
        """Refuse what would not fit.

        Raises:
            TooLarge: The next shard would exceed the budget.
        """
        used = self.bytes_used
        if self.budget is not None and used + n_bytes > self.budget:
            raise TooLarge(
                f"the next shard of {n_bytes:,} bytes does not fit: {used:,} of {self.budget:,} are used",
                remedy="raise --disk-budget, snapshot less often, or store float16",
            )

    def create(self, shape: tuple[int, int, int], precision: Precision) -> tuple[Path, np.memmap[Any, Any]]:
        """A new shard file to fill, under a temporary name until `add`.

        Args:
            shape: (models, snapshots, elements).
            precision: How the numbers are stored.

        Raises:
            TooLarge: It would exceed the budget.
        """
        dtype = np.dtype(precision)
        self.require_room(int(np.prod(shape)) * dtype.itemsize)
        path = self.folder / f"shard-{len(self):05d}.npy.part"
        return path, np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    def add(self, part: Path, **fields: Any) -> Shard:
        """Take a filled shard file into the manifest.

        Args:
            part: The path `create` returned; its memory map is flushed.
            fields: All of `Shard` but ``file`` and ``sha256``.
        """
        final = part.with_suffix("")
        part.replace(final)
        shard = Shard(file=final.name, sha256=sha256_of(final), **fields)
        self.manifest.shards.append(shard)
        scratch = self.folder / (MANIFEST + ".part")
        scratch.write_text(self.manifest.model_dump_json(indent=1, exclude_none=True))
        scratch.replace(self.folder / MANIFEST)
        return shard

    def open(self, shard: Shard) -> np.memmap[Any, Any]:
        """The shard's trajectories, (models, snapshots, elements), memory-mapped.

        Raises:
            InvalidTrajectories: The file is missing or of another shape than the manifest says.
        """
        path = self.folder / shard.file
        expected = (len(shard.trainings), shard.snapshots, shard.spec.numel)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as exc:
            raise InvalidTrajectories(f"shard {path} cannot be read: {exc}") from exc
        if array.shape != expected:
            raise InvalidTrajectories(f"shard {path} has shape {array.shape}", expected=f"{expected}")
        found: np.memmap[Any, Any] = array
        return found

    def verify(self) -> None:
        """Compare every shard with its digest.

        Raises:
            InvalidTrajectories: A shard was changed or is missing.
        """
        for shard in self:
            path = self.folder / shard.file
            if not path.exists() or sha256_of(path) != shard.sha256:
                raise InvalidTrajectories(f"shard {path} is missing or changed since it was written")

    def digest(self, first: int | None = None) -> str:
        """SHA-256 over the digests of all shards, or of the first so many: names this collection in a model card."""
        return hashlib.sha256(json.dumps([s.sha256 for s in self][:first]).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
