"""What the demo trains: its data, and a training alone."""

from __future__ import annotations

import sys

import pytest
import torch
from nowcast_lab.demo.training_job import letters
from nowcast_lab.demo.training_job.text import standard_library
from nowcast_lab.demo.training_job.train import TASKS, Job, share_of_peak, train
from nowcast_proto.errors import UnreadableFile


def _bright_share(images: torch.Tensor) -> torch.Tensor:
    """Share of bright pixels of every image."""
    return (images > 0.5).float().mean((1, 2, 3))


def test_every_character_of_every_typeface_is_drawn():
    folder = letters.typefaces()
    for name in (*letters.TRAINING, *letters.HELD_OUT):
        drawn = letters.drawn(folder / f"{name}.ttf")
        assert drawn.shape == (62, 1, 2 * letters.SIZE, 2 * letters.SIZE)
        bright = _bright_share(drawn)
        # Neither blank nor a box that stands for a glyph the typeface lacks, which would look the same 62 times.
        assert bright.min() > 0.005
        assert bright.max() < 0.5
        assert len({image.numpy().tobytes() for image in drawn}) == 62


def test_held_out_typefaces_are_not_learnt_from():
    assert not set(letters.TRAINING) & set(letters.HELD_OUT)


@pytest.mark.parametrize("name", list(TASKS))
def test_batches_depend_on_the_seed_alone(name):
    one, two = TASKS[name](), TASKS[name]()
    torch.manual_seed(1)
    first = one.draw(8, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    second = two.draw(8, torch.Generator().manual_seed(3))
    other = two.draw(8, torch.Generator().manual_seed(4))
    for a, b, c in zip(_tensors(first), _tensors(second), _tensors(other), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def _tensors(batch: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (batch,) if isinstance(batch, torch.Tensor) else batch


def test_labels_name_what_is_drawn():
    task = TASKS["letters"]()
    images, labels = task.held_out
    assert len(images) == len(labels) == 62 * len(letters.HELD_OUT) * letters.VIEWS
    # A capital W covers more than an l, in every typeface and however distorted, on average.
    brightness = images.mean((1, 2, 3))
    wide, thin = (brightness[labels == letters.CHARACTERS.index(c)].mean() for c in "Wl")
    assert wide > thin


def test_a_folder_without_typefaces_is_told(tmp_path):
    with pytest.raises(UnreadableFile, match="typeface") as caught:
        letters.letters(tmp_path)
    assert "--task text" in str(caught.value.remedy)


def test_a_library_without_source_is_told(tmp_path):
    (tmp_path / "short.py").write_text("pass\n")
    with pytest.raises(UnreadableFile, match="5 bytes of Python source in 1 files"):
        standard_library(tmp_path)


def test_missing_matplotlib_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnreadableFile, match="matplotlib") as caught:
        letters.letters()
    assert "--task text" in str(caught.value.remedy)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_training_alone_learns(name):
    events = []
    final = train(Job(task=name, steps=120, every=40), events.append)
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["step"] for event in progress] == [40, 80, 120]
    assert final == progress[-1]["held_out"] < progress[0]["held_out"]
    assert events[0]["about"].startswith(TASKS[name]().title)
    assert events[-1]["report"]["mode"] == "off"


def test_the_rate_is_warmed_up_and_decays_to_a_tenth():
    shares = [share_of_peak(step, 1000) for step in range(1001)]
    assert shares[0] == pytest.approx(0.01)
    assert shares[:99] == sorted(shares[:99])
    assert shares[100:] == sorted(shares[100:], reverse=True)
    assert 0.95 < max(shares) < 1.0
    assert shares[-1] == pytest.approx(0.1)
