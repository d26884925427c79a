"""Refining a network on the trainings it nowcasts."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from nowcast_lab.metatrain.collect import batches, draw_trainings, initial_parameters
from nowcast_lab.metatrain.data import Text, load
from nowcast_lab.metatrain.episodes import Episode, Outcome, RefineConfig, loss_gradients
from nowcast_lab.metatrain.errors import InvalidRecipe, InvalidTrajectories
from nowcast_lab.metatrain.graphs import prepare
from nowcast_lab.metatrain.lessons import CLIP, displacement, lesson
from nowcast_lab.metatrain.recipes import Group, Recipe, read_recipe
from nowcast_lab.metatrain.refine import refine
from nowcast_lab.metatrain.train import TrainConfig, basis, exported, imported, initial_network
from nowcast_lab.metatrain.zoo import Arch
from nowcast_proto.errors import Unavailable, UnreadableFile
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead
from nowcast_service.weights.registry import resolve_checkpoint

CPU = torch.device("cpu")
MLP = Arch(kind="mlp", widths=(6,), channels=1, size=8)
RECIPE = Recipe(
    groups=(
        Group(arch=MLP, source="digits", models=3, lr=(3e-3, 3e-3), batch=16),
        Group(arch=Arch(kind="convnet", widths=(3, 4), channels=1, size=8), source="digits", models=2, batch=16),
    )
)
CONFIG = RefineConfig(updates=4, episodes=2, periods=(10,), nowcasts=(2, 3), warmup=1)


@pytest.fixture(scope="module")
def start() -> Checkpoint:
    config = TrainConfig(hidden=8)
    twin = initial_network(config)
    return Checkpoint.of(twin.config, exported(twin, basis(5, 15.0, CPU)), metadata={"trajectories": "none"})


@pytest.mark.parametrize(
    "arch",
    [
        Arch(kind="convnet", widths=(4, 6), norm=True, size=8),
        Arch(kind="gpt2", dim=12, layers=2, heads=3, vocabulary=20, context=8),
        Arch(kind="llama", dim=16, layers=1, heads=4, kv_heads=2, vocabulary=20, context=8),
    ],
    ids=lambda arch: arch.kind,
)
def test_the_displacement_it_learns_by_is_the_one_inference_makes(arch: Arch) -> None:
    checkpoint, spec, change = resolve_checkpoint("nowcast-h32"), arch.spec(), basis(5, 15.0, CPU)
    torch.manual_seed(1)
    flat = torch.randn(spec.numel) * 0.1
    seen = torch.stack([flat + 0.01 * i + 0.02 * torch.randn(spec.numel) for i in range(5)])
    sizes = [p.numel for p in spec.parameters]
    first = slice(0, sizes[0])
    seen[:, first] = 0.5  # a tensor that did not move
    snapshots = [
        {p.name: part.view(p.shape) for p, part in zip(spec.parameters, row.split(sizes), strict=True)} for row in seen
    ]
    parameters, _ = ahead(make_predictor("nino", checkpoint), History.of(spec, snapshots), 7, None)
    expected = torch.cat([parameters[p.name].reshape(-1) for p in spec.parameters]) - seen[-1]
    graph = prepare(spec)
    with torch.no_grad():
        twin = imported(checkpoint, change)
        moved, spread = displacement(twin, graph, seen[None], 7, graph.encoding, change)
    assert expected.norm() > 0.1
    torch.testing.assert_close(moved[0], expected, rtol=1e-3, atol=1e-5)
    assert (moved[0, first] == 0).all()
    assert (spread[0, first] == 0).all()


def test_a_checkpoint_comes_back_from_the_coordinates_it_is_trained_in(start: Checkpoint) -> None:
    change = basis(5, 15.0, CPU)
    back = exported(imported(start, change), change)
    for name, tensor in start.state.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_lesson_takes_direction_from_gradients_and_length_from_pairs() -> None:
    spread = torch.full((1, 4), 2.0)
    moved = torch.tensor([[2.0, 0.0, 0.0, 0.0]], requires_grad=True)
    # Gradients ask for much more of the first element; those that went farther ended higher. The third is free.
    told = torch.tensor([[-3.0, 0.0, 0.5, 0.0]]), torch.tensor([1.4]), torch.tensor([1.0])
    outcome = Outcome(*told, jumped=torch.tensor([True]))
    value, measured, expected = lesson(moved, spread, outcome, 0.2, math.log(10))
    assert measured == pytest.approx(1.0)
    assert expected == pytest.approx(-6.0)
    value.backward()
    gradient = moved.grad
    assert gradient is not None
    # Per unit of the displacement the loss rises by `measured`; the rest stays as the gradients have it.
    assert gradient[0, 0] > 0
    assert float(gradient[0, 2] / gradient[0, 0]) == pytest.approx(0.5 / (measured / 2.0))
    assert gradient[0, [1, 3]].tolist() == [0, 0]


def test_a_training_that_diverged_teaches_nothing_and_a_steep_one_not_too_much() -> None:
    spread = torch.ones(4, 2)
    moved = torch.tensor([[1.0, 0.0]]).repeat(4, 1).requires_grad_()
    gradient = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1000.0], [0.0, 1.0]])
    outcome = Outcome(gradient, torch.tensor([1.0, 1.0, 1.0, math.nan]), torch.ones(4), torch.ones(4) > 0)
    value, _, _ = lesson(moved, spread, outcome, 0.4, math.log(10))
    value.backward()
    assert moved.grad is not None
    assert moved.grad[3].tolist() == [0, 0]
    mean = (1 + 1 + 1000) / 3
    assert float(moved.grad[2, 1]) == pytest.approx(CLIP / 3)
    assert float(moved.grad[0, 1]) == pytest.approx(1 / mean / 3)
    nothing, measured, _ = lesson(moved, spread, outcome._replace(far=torch.full((4,), 99.0)), 0.4, math.log(10))
    assert float(nothing.detach()) == 0
    assert math.isnan(measured)


def test_no_lesson_is_drawn_where_inference_makes_no_nowcast() -> None:
    """The rate of the first training has decayed to less than a tenth by the last period; the second's is constant."""
    group = RECIPE.groups[0].model_copy(update={"schedules": ("linear", "constant"), "models": 8})
    config = dataclasses.replace(CONFIG, nowcasts=(12, 12))
    episode = Episode(group, "one", config, load("digits"), prepare(MLP.spec()), CPU)
    schedules = [training.schedule for training in draw_trainings(group, "one", config.seed)]
    assert set(schedules) == {"linear", "constant"}
    episode.advance()
    seen = []
    while not episode.over:
        before = episode.seen[:, -1]
        outcome = episode.advance(torch.full_like(before, 0.01))
        seen.append(outcome.jumped.tolist())
    assert seen[0] == 8 * [True]
    assert seen[-1] == [schedule == "constant" for schedule in schedules]
    moved = torch.ones_like(before).requires_grad_()
    value, _, _ = lesson(moved, torch.ones_like(moved), outcome, 0.4, math.log(10))
    value.backward()
    assert moved.grad is not None
    assert (moved.grad.abs().sum(1) > 0).tolist() == seen[-1]


def test_a_refinement_that_was_stopped_ends_where_one_that_was_not_does(start: Checkpoint, tmp_path: Path) -> None:
    values = refine(start, RECIPE, CONFIG, tmp_path / "whole")
    assert set(values) == {f"{source}/{kind}" for source in ("pairs", "gradients") for kind in ("mlp", "convnet")}
    refine(start, RECIPE, CONFIG, tmp_path / "parts", stop_after=2)
    half = load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors")
    refine(start, RECIPE, CONFIG, tmp_path / "parts")
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.digest == parts.digest
    assert len({whole.digest, half.digest, start.digest}) == 3
    assert whole.metadata["start"] == start.digest
    assert json.loads(whole.metadata["start_metadata"]) == start.metadata
    with pytest.raises(InvalidTrajectories, match="other config"):
        refine(start, RECIPE, dataclasses.replace(CONFIG, lr=1e-5), tmp_path / "whole")
    (tmp_path / "whole" / "state.pt").write_bytes(b"not a state")
    with pytest.raises(UnreadableFile, match="damaged"):
        refine(start, RECIPE, CONFIG, tmp_path / "whole")


def test_it_does_not_matter_how_many_processes_train(start: Checkpoint, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of two processes has; sums differ with their number
    try:
        alone = refine(start, RECIPE, CONFIG, tmp_path / "alone")
    finally:
        torch.set_num_threads(threads)
    together = refine(start, RECIPE, CONFIG, tmp_path / "together", workers=2)
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("alone", "together"))
    assert one.digest == two.digest
    assert alone == together


def test_a_process_that_dies_is_told_and_what_was_saved_goes_on(start: Checkpoint, tmp_path: Path) -> None:
    def kill(update: int, _: dict[str, float]) -> None:
        if update == 2:
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(Unavailable, match=r"has died.*fewer workers"):
        refine(start, RECIPE, CONFIG, tmp_path, workers=2, save_every=1, on_update=kill)
    updates = []
    refine(start, RECIPE, CONFIG, tmp_path, on_update=lambda update, _: updates.append(update))
    assert updates == [3, 4]
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").metadata["step"] == "4"


@pytest.mark.kill
def test_no_process_outlives_a_killed_refinement(start: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "start.safetensors", start)
    (tmp_path / "recipe.json").write_text(RECIPE.model_dump_json())
    files = ["--start", tmp_path / "start.safetensors", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "nowcast_service", "metatrain", "refine", *files, "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "logs").exists() or len(workers := psutil.Process(process.pid).children()) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=120)
    for worker in alive:
        worker.kill()
    assert not alive


def test_the_checkpoint_is_an_average_over_updates(start: Checkpoint, tmp_path: Path) -> None:
    states = []
    for update in range(1, 4):
        refine(start, RECIPE, CONFIG, tmp_path, stop_after=update)
        states.append(torch.load(tmp_path / "state.pt", weights_only=True)["network"])
    share, name = CONFIG.average, "edge_out.fc.2.weight"
    expected = states[0][name]
    for state in states[1:]:
        expected = share * expected + (1 - share) * state[name]
    got = load_checkpoint(tmp_path / "checkpoint.safetensors").state[name]
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got, states[-1][name])


def test_compiled_trainings_have_the_same_gradients() -> None:
    group = RECIPE.groups[0]
    inputs, targets = next(batches(load(group.source), MLP, 3, 16, 0))
    parameters = initial_parameters(MLP, [1, 2, 3])
    plain, fused = (loss_gradients(MLP, compiled=compiled) for compiled in (False, True))
    for one, two in zip(plain(parameters, inputs, targets), fused(parameters, inputs, targets), strict=True):
        torch.testing.assert_close(one, two)


def test_a_network_that_knows_nothing_learns_to_help(start: Checkpoint, tmp_path: Path) -> None:
    """From random weights: what it has learned lowers the losses of trainings it has not seen."""
    group = RECIPE.groups[0].model_copy(update={"lr": (1e-3, 1e-3), "models": 4})
    config = dataclasses.replace(CONFIG, updates=40, episodes=1, periods=(20,), nowcasts=(3, 3), lr=3e-3, average=0.5)
    refine(start, Recipe(groups=(group,)), config, tmp_path)
    change, graph, data = basis(5, 15.0, CPU), prepare(MLP.spec()), load("digits")
    still = dataclasses.replace(config, apart=0.0)

    def gain(checkpoint: Checkpoint, key: str) -> float:
        """How much lower the loss is after a nowcast than without, same batches."""
        losses = []
        for share in (0.0, 1.0):
            episode = Episode(group, key, still, data, graph, CPU)
            episode.advance()
            with torch.no_grad():
                twin = imported(checkpoint, change)
                moved, _ = displacement(twin, graph, episode.seen, episode.horizon, graph.encoding, change)
            losses.append(float(episode.advance(share * moved).far.mean()))
        return losses[0] - losses[1]

    refined = load_checkpoint(tmp_path / "checkpoint.safetensors")
    for number in range(3):
        assert gain(refined, f"new/{number}") > 0.015
        assert abs(gain(start, f"new/{number}")) < 0.001


def test_what_a_nowcast_is_worth_is_seen_on_data_the_trainings_do_not_see() -> None:
    data, group, graph = load("digits"), RECIPE.groups[0], prepare(MLP.spec())
    few, rest = data.split(0.1)
    assert len(few.train_y) == 150
    images = {tuple(x.flatten().tolist()) for x in data.train_x}
    parts = [{tuple(x.flatten().tolist()) for x in part.train_x} for part in (few, rest)]
    assert parts[0] | parts[1] == images
    assert not parts[0] & parts[1]

    config = dataclasses.replace(CONFIG, periods=(100,), settle=0.0)
    told = {}
    for name, unseen in (("none", None), ("few", few), ("rest", rest)):
        episode = Episode(group, "one", config, few, graph, CPU, unseen=unseen)
        outcomes = [episode.advance() for _ in range(3)]
        told[name] = episode.seen, outcomes[-1]
    for name in ("few", "rest"):
        assert torch.equal(told["none"][0], told[name][0])  # it has no part in the training
    torch.testing.assert_close(told["few"][1].gradient, told["none"][1].gradient)
    assert (told["rest"][1].far > told["none"][1].far + 0.05).all()
    assert not torch.allclose(told["rest"][1].gradient, told["none"][1].gradient)


def test_a_text_is_split_too() -> None:
    data = load("headers:bytes")
    assert isinstance(data, Text)
    first, rest = data.split(0.25)
    assert torch.equal(torch.cat((first.train, rest.train)), data.train)
    assert len(first.train) == round(0.25 * len(data.train))


def test_what_is_held_out_and_what_cannot_be_are_refused(start: Checkpoint, tmp_path: Path) -> None:
    held_out = Arch(kind="convnet", widths=(16, 32, 32), size=16)
    with pytest.raises(InvalidRecipe, match="held out"):
        refine(start, Recipe(groups=(Group(arch=held_out, source="cifar10@16"),)), CONFIG, tmp_path)
    with pytest.raises(InvalidRecipe, match="multiples of 5"):
        refine(start, RECIPE, dataclasses.replace(CONFIG, periods=(12,)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_kind_of_network_has_a_slot_of_its_own() -> None:
    """Among ten, the default; the last two overfit."""
    groups = read_recipe("refine").groups
    kinds = [(group.arch.kind, group.arch.norm, group.warmup) for group in groups]
    assert kinds[:8] == kinds[10:18]
    assert [group.seen < 1 for group in groups] == 2 * (8 * [False] + 2 * [True])
    assert RefineConfig().episodes == 10
