"""``nowcast average`` and ``nowcast merge``: the arithmetic, the history a nowcast merges from, and every bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nowcast_proto.errors import InvalidRequest
from nowcast_service.files.merging import averaged, nowcast, weights_of
from nowcast_service.nino.checkpoint import save_checkpoint
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead
from safetensors.torch import load_file, save_file

from . import command
from .nino.made import checkpoint, history, mlp

SPEC = mlp(5, 7, 4)


@pytest.fixture
def case(tmp_path: Path) -> list[Path]:
    return command.write_case(tmp_path, SPEC, history(SPEC))


def run(capfd: pytest.CaptureFixture[str], out: Path, *args: object) -> dict[str, torch.Tensor]:
    done = command.nowcast(capfd, *args, "--out", out)
    assert done.status == 0, done.err
    return load_file(out)


def test_weights_are_those_of_a_rate_that_decays() -> None:
    assert weights_of("mean", 4) == pytest.approx([0.25] * 4)
    assert weights_of("ema", 3, 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert weights_of("sqrt", 2) == pytest.approx([0.5**0.5, 1 - 0.5**0.5])
    for kind in ("mean", "ema", "sqrt", "cosine"):
        assert sum(weights_of(kind, 7)) == pytest.approx(1.0)  # type: ignore[arg-type]
    # What is left of their sum at checkpoint i is the rate there.
    cosine = weights_of("cosine", 4)
    assert [sum(cosine[i:]) for i in range(4)] == pytest.approx([1.0, 0.85355, 0.5, 0.14645], abs=1e-5)


def test_average_of_files(case: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = run(capfd, tmp_path / "out.safetensors", "average", *case, "--weights", "ema", "--decay", 0.5)
    files = [load_file(path) for path in case]
    for name, tensor in found.items():
        expected = sum(w * one[name].double() for w, one in zip(weights_of("ema", 5), files, strict=True))
        assert torch.allclose(tensor, expected.float(), atol=1e-6)


def test_counters_are_the_newest_s_and_types_stay() -> None:
    one = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    two = {"w": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor(8)}
    found = averaged([one, two], [0.5, 0.5])
    assert found["n"] == 8
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [0.5, 0.5]


def test_mean_and_task_arithmetic(case: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, one, two = (load_file(path) for path in case[:3])
    mean = run(capfd, tmp_path / "m.safetensors", "merge", *case[:3], "--method", "mean")
    task = run(capfd, tmp_path / "t.safetensors", "merge", *case[:3], "--method", "task", "--scale", 0.7)
    for name in base:
        assert torch.allclose(mean[name], (one[name] + two[name]) / 2, atol=1e-6)
        changed = base[name] + 0.7 * (one[name] - base[name] + two[name] - base[name])
        assert torch.allclose(task[name], changed, atol=1e-5)


def test_a_nowcast_takes_base_and_fine_tunings_there_and_back(
    case: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "made.safetensors", checkpoint())
    options = ["--spec", tmp_path / "spec.json", "--checkpoint", tmp_path / "made.safetensors"]
    found = run(capfd, tmp_path / "n.safetensors", "merge", *case[:3], *options, "--k", 2, "--k", 6, "--scale", 0.5)
    base, one, two = (load_file(path) for path in case[:3])
    past = history(SPEC)
    each = [
        ahead(make_predictor("nino", checkpoint()), type(past).of(SPEC, order), k, update_scale=0.5)[0]
        for order in ([base, one, two, two, one], [base, two, one, one, two])
        for k in (2, 6)
    ]
    for name in base:
        assert torch.allclose(found[name], sum(one[name] for one in each) / 4, atol=1e-6)


@pytest.mark.parametrize(("count", "order"), [(1, [0, 1, 1, 1, 1]), (3, [0, 1, 2, 2, 3]), (4, [0, 1, 2, 3, 4])])
def test_other_numbers_of_fine_tunings(count: int, order: list[int]) -> None:
    seen: list[Any] = []

    class Told:
        name, context, farthest, needs = "told", 5, 40, ()

        def predict(self, past: Any, k: int, state: Any = None, *, check: Any = None) -> Any:
            seen.append([int(one["0.bias"][0]) for one in past.snapshots])
            return {name: torch.zeros(shape) for name, shape in past.spec.shapes().items()}, {}

    networks = [{n: torch.full(shape, float(i)) for n, shape in SPEC.shapes().items()} for i in range(6)]
    nowcast(Told(), SPEC, networks[0], networks[1 : count + 1], [1])
    assert seen[0] == order
    assert seen[1:] == ([] if count == 1 else [[0, *(count + 1 - i for i in order[1:])]])
    with pytest.raises(InvalidRequest, match="5 fine-tunings"):
        nowcast(Told(), SPEC, networks[0], networks[1:], [1])


def test_what_cannot_be_done_is_said_and_nothing_is_written(
    case: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    out = tmp_path / "out.safetensors"
    for args, words in (
        (["average", *case, "--weights", "median"], ["median", "mean, ema"]),
        (["average", *case, "--weights", "ema", "--decay", "2"], ["decay 2"]),
        (["average", case[0], tmp_path / "other.safetensors"], ["checkpoint 2", "one network"]),
        (["merge", *case[:3], "--method", "nowcast"], ["--spec"]),
        (["merge", *case[:3], "--method", "ties"], ["ties", "nowcast, mean or task"]),
        (["merge", case[0], tmp_path / "gone.pt", "--method", "mean"], ["gone.pt"]),
    ):
        done = command.nowcast(capfd, *args, "--out", out)
        assert done.status == 2
        assert all(word in done.err for word in words), done.err
        assert not out.exists()
