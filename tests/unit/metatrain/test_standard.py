"""Standard data sets: small files in the form they are published in, and tasks that read them."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_lab.evaluate.arms import Arm, read_arms
from nowcast_lab.evaluate.paper import PAPER_TASKS, task
from nowcast_lab.evaluate.run import run
from nowcast_lab.metatrain.data import Images, Text, corpus_of, load
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.heldout import why_held_out
from nowcast_proto.errors import UnreadableFile


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    load.cache_clear()
    yield
    load.cache_clear()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, *, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        files = {
            f"{part}-images-idx3-ubyte": idx(draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            f"{part}-labels-idx1-ubyte": idx((np.arange(count) % 10).astype(np.uint8)),
        }
        for name, raw in files.items():
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)


def write_cifar100(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train.bin", 200), ("test.bin", 100)):
        rows = np.random.default_rng(1).integers(0, 256, (count, 3074), dtype=np.uint8)
        rows[:, 0], rows[:, 1] = np.arange(count) % 20, np.arange(count) % 100
        (folder / name).write_bytes(rows.tobytes())


def write_imagenet32(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train_data_batch_1", "train_data_batch_2", "val_data"):
        pixels = np.random.default_rng(2).integers(0, 256, (8, 3072), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", data=pixels, labels=np.array([1, 1000, 3, 4, 5, 6, 7, 8]))


def write_lm1b(folder: Path) -> None:
    for below, name, text in (
        ("training-monolingual.tokenized.shuffled", "news.en-00001-of-00100", "The cat sat .\n" * 300),
        ("training-monolingual.tokenized.shuffled", "news.en-00002-of-00100", "A dog ran .\n" * 300),
        ("heldout-monolingual.tokenized.shuffled", "news.en.heldout-00000-of-00050", "A cat ran .\n" * 300),
    ):
        (folder / below).mkdir(parents=True, exist_ok=True)
        (folder / below / name).write_text(text)


def write_wikitext(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wiki.train.raw").write_text(" = Title = \n\n The cat sat . \n" * 300)
    (folder / "wiki.valid.raw").write_text(" = Other = \n\n A dog ran . \n" * 300)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["?", "The", "A", "cat", "dog", "sat", "ran", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(("below", "packed"), [(".", False), ("FashionMNIST/raw", True)])
def test_fashion_mnist(below: str, packed: bool, tmp_path: Path) -> None:
    write_fashion(tmp_path / below, packed=packed)
    data = load("fashion", str(tmp_path))
    assert isinstance(data, Images)
    assert data.train_x.shape == (30, 1, 28, 28)
    assert data.test_y.tolist() == [n % 10 for n in range(20)]
    raw = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8) / 255.0
    wanted = torch.from_numpy((raw - raw.mean()) / raw.std(ddof=1)).float()
    assert torch.allclose(data.train_x[:, 0], wanted, atol=1e-4)


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "cifar-100-binary")
    data = load("cifar100", str(tmp_path))
    assert isinstance(data, Images)
    assert data.classes == 100
    assert data.test_y.tolist() == list(range(100))


def test_imagenet32_takes_the_files_there_are(tmp_path: Path) -> None:
    write_imagenet32(tmp_path)
    data = load("imagenet32", str(tmp_path))
    assert isinstance(data, Images)
    assert data.train_x.shape == (16, 3, 32, 32)
    assert data.train_y[:3].tolist() == [0, 999, 2]


def test_texts_keep_their_published_parts(tmp_path: Path) -> None:
    write_lm1b(tmp_path)
    write_wikitext(tmp_path)
    lm1b, wiki = load("lm1b:bytes", str(tmp_path)), load("wikitext103:words6", str(tmp_path))
    assert isinstance(lm1b, Text)
    assert isinstance(wiki, Text)
    assert bytes(lm1b.train.tolist()).startswith(b"The cat sat .\n")
    assert bytes(lm1b.test.tolist()) == b"A cat ran .\n" * 300
    assert len(lm1b.train) == 300 * (14 + 12)
    assert wiki.vocabulary == 6
    assert int(wiki.test.max()) < 6


def test_a_tokenizer_from_the_folder(tmp_path: Path) -> None:
    write_lm1b(tmp_path)
    with pytest.raises(UnreadableFile, match=r"gpt2/tokenizer\.json"):
        load("lm1b:gpt2", str(tmp_path))
    write_tokenizer(tmp_path / "gpt2")
    data = load("lm1b:gpt2", str(tmp_path))
    assert isinstance(data, Text)
    assert data.vocabulary == 8
    assert data.test[:8].tolist() == [2, 3, 6, 7, 2, 3, 6, 7]


@pytest.mark.parametrize("source", ["fashion", "cifar100", "imagenet32", "lm1b", "wikitext103"])
def test_what_is_missing_is_named_with_where_to_get_it(source: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"get it from https://.*--data or NOWCAST_DATA"):
        load(source, str(tmp_path))


def _cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])


@pytest.mark.parametrize(
    ("write", "source", "name"),
    [
        (write_fashion, "fashion", "t10k-images-idx3-ubyte"),
        (write_cifar100, "cifar100", "test.bin"),
        (write_imagenet32, "imagenet32", "val_data.npz"),
    ],
)
def test_damaged_files_are_refused(write: Callable[[Path], None], source: str, name: str, tmp_path: Path) -> None:
    write(tmp_path)
    _cut(tmp_path, name)
    with pytest.raises(UnreadableFile, match=name.replace(".", r"\.")):
        load(source, str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(UnreadableFile, match=name.replace(".", r"\.")):
        load(source, str(tmp_path))


def test_tasks_by_the_paper_s_names_and_nothing_of_theirs_is_collected() -> None:
    assert task("FM-16").arch.widths == (16, 32, 32)
    assert task("C10-32").target == 72.5
    assert task("LM1B/3-24").target == pytest.approx(math.log(352))
    assert task("Wiki/3-64").arch.dim == 64
    with pytest.raises(InvalidRecipe, match=r"fm-16.*vit-imagenet32"):
        task("MNIST-16")
    for one in PAPER_TASKS:
        assert why_held_out(one.arch, one.source), one.name
        assert why_held_out(one.arch, corpus_of(one.source)), one.name
    spec = task("Llama 111M").arch.spec()
    assert sum(math.prod(p.shape) for p in spec.parameters) == pytest.approx(111e6, rel=0.005)


@pytest.mark.parametrize(
    ("name", "write"), [("fm-16", write_fashion), ("c100-32", write_cifar100), ("vit-imagenet32", write_imagenet32)]
)
def test_a_step_of_a_paper_s_task(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    made = task(name)
    made = made.model_copy(update={"batch": 8, "eval_every": 2, "arch": made.arch.model_copy(update={"layers": 1})})
    line = run(made, Arm(), 1, load(made.source, str(tmp_path)), None, steps=2)
    assert 0 <= line["final"] <= 100


@pytest.mark.parametrize("name", ["paper-adamw", "paper-nowcasts", "paper-settings"])
def test_the_paper_s_arms_can_be_read(name: str) -> None:
    arms = read_arms(Path(__file__).parents[3] / "docs" / "results" / "arms" / f"{name}.json")
    assert len(set(arms)) == len(arms) > 1


def test_a_step_on_text_that_is_never_repeated() -> None:
    made = task("gpt2-1m")
    assert 0.7e6 < sum(math.prod(p.shape) for p in made.arch.spec().parameters) < 1.3e6
    data = load(made.source)
    assert isinstance(data, Text)
    assert len(data.train) > made.steps * made.batch * made.arch.context
