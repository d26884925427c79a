"""Trajectories from snapshots somebody saved: a folder per run, any family."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nowcast_proto.errors import InvalidSnapshot, UnreadableFile
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.history import History
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nowcast_lab.metatrain.errors import InvalidTrajectories
from nowcast_lab.metatrain.store import Precision, Shard, Training, TrajectoryStore, sha256_of

SUFFIXES = (".safetensors", ".npz", ".pt")


def import_snapshots(
    store: TrajectoryStore,
    folders: Sequence[Path],
    spec_path: Path,
    *,
    every: int,
    precision: Precision = "float32",
) -> list[Shard]:
    """Add runs that were saved as files to a store, one shard per folder.

    Files are taken in the order of the last number in their names (``step_200.safetensors`` before
    ``step_1000.safetensors``); they must be evenly spaced, by `every` optimizer steps.

    Args:
        store: Where to.
        folders: One folder per run.
        spec_path: The architecture all of them share.
        every: Optimizer steps between files.
        precision: How they are stored.

    Returns:
        The shards that are new; folders whose files are unchanged since an earlier import are skipped.

    Raises:
        InvalidSpec: The spec is not one.
        InvalidSnapshot: A file does not fit the spec.
        InvalidTrajectories: A folder holds too few snapshots, or names that do not order or space them.
        UnreadableFile: A file cannot be read.
        TooLarge: The disk budget is used up.
    """
    spec = ArchitectureSpec.read(spec_path)
    new = []
    for folder in folders:
        files = ordered_files(folder)
        digest = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
        key = f"import/{digest[:24]}/{every}"
        if store.has(key):
            continue
        part, out = store.create((1, len(files), spec.numel), precision)
        try:
            for i, file in enumerate(files):
                tensors = read_tensors(file)
                history = History.of(spec, [tensors])  # checks names, shapes and finiteness
                row = torch.cat([history.flat(p.name)[0].float() for p in spec.parameters])
                out[0, i] = row.numpy()
        except (InvalidSnapshot, UnreadableFile):
            part.unlink()
            raise
        if not np.isfinite(out[0]).all():
            part.unlink()
            raise InvalidTrajectories(f"{folder} does not fit in {precision}", remedy="use --precision float32")
        out.flush()
        new.append(
            store.add(
                part,
                key=key,
                spec=spec,
                source=folder.name,
                source_sha256=digest,
                snapshots=len(files),
                every=every,
                trainings=(Training(),),
            )
        )
    return new


def ordered_files(folder: Path) -> list[Path]:
    """The snapshots of one run, oldest first.

    Raises:
        InvalidTrajectories: Fewer than seven files, or names without evenly spaced numbers.
    """
    files = [path for path in folder.glob("*") if path.suffix in SUFFIXES] if folder.is_dir() else []
    if len(files) < 7:
        raise InvalidTrajectories(
            f"{folder} holds {len(files)} snapshots", expected=f"at least 7 of {', '.join(SUFFIXES)}: 5 seen, 2 ahead"
        )
    numbered = []
    for path in files:
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise InvalidTrajectories(f"{path.name} has no number", expected="a step or running number in every name")
        numbered.append((int(numbers[-1]), path))
    numbered.sort()
    gaps = {b[0] - a[0] for a, b in itertools.pairwise(numbered)}
    if len(gaps) != 1 or 0 in gaps:
        raise InvalidTrajectories(
            f"the snapshots in {folder} are not evenly spaced: gaps of {sorted(gaps)}",
            expected="one gap throughout",
            remedy="move what does not belong to another folder",
        )
    return [path for _, path in numbered]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one snapshot file; ``.pt`` is read with ``weights_only``.

    Raises:
        UnreadableFile: Missing, truncated, or not a mapping of names to tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
        raise UnreadableFile(f"{path} cannot be read: {exc}", expected="a whole snapshot file") from exc
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise UnreadableFile(f"{path} is not a state dict", expected="a mapping of names to tensors")
    return loaded
