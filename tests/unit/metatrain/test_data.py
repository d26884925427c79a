"""Data sets in the files they are published in, small ones made here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_lab.metatrain.data import CIFAR_RECORD, Images, Text, data_folder, load
from nowcast_proto.errors import UnreadableFile


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    load.cache_clear()
    yield
    load.cache_clear()


def write_cifar10(folder: Path, images: int = 20) -> dict[str, np.ndarray]:
    """The six files, each with so many random images; name -> records."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    files = {}
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        rows = draw.integers(0, 256, (images, CIFAR_RECORD), dtype=np.uint8)
        rows[:, 0] = np.arange(images) % 10
        (folder / name).write_bytes(rows.tobytes())
        files[name] = rows
    return files


@pytest.mark.parametrize("below", [".", "cifar-10-batches-bin"])
def test_cifar10_in_its_binary_files(tmp_path: Path, below: str) -> None:
    files = write_cifar10(tmp_path / below)
    data = load("cifar10", str(tmp_path))
    assert isinstance(data, Images)
    assert data.train_x.shape == (100, 3, 32, 32)
    assert data.test_x.shape == (20, 3, 32, 32)
    assert data.test_y.tolist() == [n % 10 for n in range(20)]
    # Red, then green, then blue, each row by row.
    raw = np.concatenate([files[f"data_batch_{n}.bin"] for n in range(1, 6)])[:, 1:].astype(np.float32) / 255
    raw = raw.reshape(-1, 3, 32, 32)
    wanted = (raw - raw.mean((0, 2, 3), keepdims=True)) / raw.std((0, 2, 3), keepdims=True, ddof=1)
    assert torch.allclose(data.train_x, torch.from_numpy(wanted), atol=1e-4)
    assert load("cifar10@16", str(tmp_path)).train_x.shape == (100, 3, 16, 16)  # type: ignore[union-attr]


def test_a_missing_data_set_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"data_batch_1\.bin.*cifar-10-binary\.tar\.gz.*--data or NOWCAST_DATA"):
        load("cifar10@16", str(tmp_path))
    with pytest.raises(UnreadableFile, match=r"input\.txt.*--data or NOWCAST_DATA"):
        load("shakespeare", str(tmp_path))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    files = write_cifar10(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"x" * (CIFAR_RECORD + 1))
    with pytest.raises(UnreadableFile, match=r"test_batch\.bin has 3074 bytes"):
        load("cifar10", str(tmp_path))
    rows = files["test_batch.bin"].copy()
    rows[3, 0] = 77  # CIFAR-100 looks like that
    (tmp_path / "test_batch.bin").write_bytes(rows.tobytes())
    with pytest.raises(UnreadableFile, match="label 77"):
        load("cifar10", str(tmp_path))
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(UnreadableFile, match=r"data_batch_3\.bin cannot be read"):
        load("cifar10", str(tmp_path))


def test_text_under_its_published_name(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("First Citizen: " * 10)
    data = load("shakespeare", str(tmp_path))
    assert isinstance(data, Text)
    assert len(data.train) == 135


def test_the_folder_is_said_or_stands_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOWCAST_SHARED", "/elsewhere")
    monkeypatch.delenv("NOWCAST_DATA", raising=False)
    assert data_folder(None) == Path("data")
    monkeypatch.setenv("NOWCAST_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    assert data_folder("given") == Path("given")
