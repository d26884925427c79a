"""Snapshots from files, parameters to a file.

Snapshots are ``.safetensors`` (memory-mapped), ``.npz`` or ``.pt`` read with ``weights_only=True``: name -> tensor, or
for ``.pt`` that mapping under ``state_dict``. Nothing is ever unpickled beyond tensors and plain containers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from nowcast_proto.errors import InvalidSnapshot, UnreadableFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nowcast_service.files.replacing import replacing

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


def read_snapshot(path: str | Path) -> dict[str, Tensor]:
    """Tensors of one snapshot file, on the CPU.

    Raises:
        UnreadableFile: Missing, truncated, or in no known format.
        InvalidSnapshot: Readable, but not a mapping of names to tensors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UnreadableFile(
            f"snapshot {path} has suffix {path.suffix!r}", expected="one of " + ", ".join(SUFFIXES[:3])
        )
    try:
        with path.open("rb"):
            pass
    except OSError as exc:
        raise UnreadableFile(f"snapshot {path} cannot be read: {exc.strerror}", remedy="check the path") from exc
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    return _read_pt(path)


def read_positions(path: str | Path) -> Tensor:
    """(n_nodes, columns) float32 positional encoding from a ``.npy`` file.

    Raises:
        UnreadableFile: Missing, truncated or no ``.npy`` file.
        InvalidSnapshot: Not a float32 matrix, or not finite.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as exc:
        raise UnreadableFile(
            f"positions {path} cannot be read: {exc.strerror or exc}", remedy="check the path"
        ) from exc
    except (ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise UnreadableFile(f"positions {path} is no .npy file or is damaged: {exc}", expected="a .npy file") from exc
    if not isinstance(array, np.ndarray):
        array.close()
        raise UnreadableFile(f"positions {path} is an archive of arrays", expected="a .npy file with one array")
    if array.dtype != np.float32 or array.ndim != 2:
        raise InvalidSnapshot(
            f"positions {path} has shape {list(array.shape)} and dtype {array.dtype}",
            expected="a float32 matrix (n_nodes, 8)",
        )
    if not np.isfinite(array).all():
        raise InvalidSnapshot(f"positions {path} has NaN or infinity", expected="finite values")
    return torch.from_numpy(np.ascontiguousarray(array))


def write_parameters(path: str | Path, parameters: Mapping[str, Tensor]) -> None:
    """Write name -> tensor as ``.safetensors``, whole or not at all.

    Raises:
        UnreadableFile: The file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in parameters.items()}, temporary)
    except (OSError, SafetensorError) as exc:
        raise UnreadableFile(
            f"output {path} cannot be written: {getattr(exc, 'strerror', None) or exc}",
            remedy="choose a folder that exists and that you may write to",
        ) from exc


def check_writable(path: str | Path) -> None:
    """Find out early, before long work, whether a file can be written.

    Raises:
        UnreadableFile: ``path`` is a folder, or its folder is missing or not writable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise UnreadableFile(
            f"output {path} cannot be written: {exc.strerror}",
            remedy="choose a folder that exists and that you may write to",
        ) from exc


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as exc:
        raise UnreadableFile(
            f"snapshot {path} is damaged or no safetensors file: {exc}", remedy="save it again"
        ) from exc


def _read_npz(path: Path) -> dict[str, Tensor]:
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UnreadableFile(f"snapshot {path} is not an .npz archive", remedy="save it with numpy.savez")
            for name in archive.files:
                array = archive[name]
                if array.dtype.kind != "f" or array.dtype.itemsize > 8:
                    raise InvalidSnapshot(
                        f"snapshot {path}: array {name!r} has dtype {array.dtype}", expected="float32 or float16"
                    )
                native = array.astype(array.dtype.newbyteorder("="), copy=False)
                tensors[name] = torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile) as exc:
        raise UnreadableFile(f"snapshot {path} is damaged or no .npz file: {exc}", remedy="save it again") from exc
    return tensors


def _read_pt(path: Path) -> dict[str, Tensor]:
    try:
        # Only files in the zip format can be memory-mapped; older ones are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as exc:  # a damaged or hostile pickle raises whatever it likes; all of it means one thing
        reason = str(exc).strip().splitlines()
        raise UnreadableFile(
            f"snapshot {path} is damaged, or holds more than tensors" + (f" ({reason[0]})" if reason else ""),
            expected="a file torch.save wrote from a state_dict",
            remedy="save model.state_dict() again",
        ) from exc
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise InvalidSnapshot(f"snapshot {path} holds a {type(content).__name__}", expected="name -> tensor")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InvalidSnapshot(
                f"snapshot {path}: entry {name!r} is a {type(tensor).__name__}", expected="a tensor under its name"
            )
        if tensor.layout != torch.strided:
            raise InvalidSnapshot(
                f"snapshot {path}: tensor {name!r} has layout {tensor.layout}", expected="a dense tensor"
            )
    return dict(content)
