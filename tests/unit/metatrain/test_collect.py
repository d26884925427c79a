"""Vectorised trainings, the store and its manifest, and what may never be collected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_lab.evaluate.tasks import TASKS
from nowcast_lab.metatrain import zoo
from nowcast_lab.metatrain.collect import (
    collect,
    draw_trainings,
    flat_loss,
    hidden_matrices,
    initial_parameters,
    jumps,
    nowcaster,
    train_group,
)
from nowcast_lab.metatrain.data import CODE, CODE_BYTES, MUCH, Text, load
from nowcast_lab.metatrain.errors import InvalidRecipe, InvalidTrajectories
from nowcast_lab.metatrain.heldout import why_held_out
from nowcast_lab.metatrain.imports import import_snapshots, ordered_files
from nowcast_lab.metatrain.recipes import RECIPES, Group, Nowcasts, Recipe, read_recipe
from nowcast_lab.metatrain.sampler import Sampler, SamplerConfig
from nowcast_lab.metatrain.store import TrajectoryStore
from nowcast_lab.metatrain.vector import REST, VectorOptimizer, learning_rate
from nowcast_lab.metatrain.zoo import Arch
from nowcast_proto.errors import InvalidSnapshot, TooLarge
from nowcast_service.weights.registry import resolve_checkpoint
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.func import grad, vmap

TINY = Arch(kind="mlp", widths=(4,), channels=1, size=8)


def tiny(**changes: object) -> Group:
    fields = {"arch": TINY, "source": "digits", "models": 2, "steps": 20, "every": 2, "batch": 16} | changes
    return Group.model_validate(fields)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_model_is_trained_as_if_alone(kind: str) -> None:
    """The stacked optimizer and loss against torch.optim and autograd, each model with its own rate and decay."""
    rates, decays, seeds = (1e-3, 1e-2), (0.0, 0.1), [5, 6]
    data = load("digits")
    x, y = data.train_x[:16], data.train_y[:16]
    stacked = initial_parameters(TINY, seeds)
    optimizer = VectorOptimizer.of(kind, stacked, torch.tensor([[d] for d in decays]))
    gradients = vmap(grad(flat_loss(TINY)), in_dims=(0, None, None))
    for _ in range(4):
        optimizer.step(stacked, gradients(stacked, x, y), torch.tensor([[r] for r in rates]))
    for row, rate, decay, seed in zip(stacked, rates, decays, seeds, strict=True):
        torch.manual_seed(seed)
        model = TINY.build()
        alone: torch.optim.Optimizer
        if kind == "adamw":
            alone = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
        else:
            alone = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay, momentum=0.9)
        for _ in range(4):
            alone.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            alone.step()
        expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arch",
    [
        Arch(kind="convnet", widths=(4, 6), channels=1, size=8),
        Arch(kind="gpt2", dim=12, layers=2, heads=3, vocabulary=20, context=8),
        Arch(kind="llama", dim=16, layers=1, heads=4, kv_heads=2, vocabulary=20, context=8),
        Arch(kind="vit", dim=8, layers=1, heads=2, channels=1, size=8, patch=4),
    ],
    ids=lambda arch: arch.kind,
)
def test_muon_is_torch_s_for_hidden_matrices_and_adamw_for_the_rest(arch: Arch) -> None:
    """torch computes its iteration in bfloat16, hence the tolerance there."""
    generator = torch.Generator().manual_seed(1)
    stacked = initial_parameters(arch, [1, 2])
    decay, lr = torch.tensor([[0.1], [0.0]]), torch.tensor([[0.02], [0.05]])
    optimizer = VectorOptimizer.of("muon", stacked, decay, matrices=hidden_matrices(arch))
    gradients = [torch.randn(stacked.shape, generator=generator) for _ in range(3)]
    for gradient in gradients:
        optimizer.step(stacked, gradient, lr)
    for row in range(2):
        torch.manual_seed(row + 1)
        model = arch.build()
        names = zoo.hidden_matrices(model)
        named = dict(model.named_parameters())
        assert names
        for word in ("wte", "wpe", "embed_tokens", "pos_embedding", "class_token", "lm_head", "heads.head"):
            assert not any(word in name for name in names)
        flat = {n: torch.nn.Parameter(p.detach().reshape(len(p), -1).clone()) for n, p in named.items() if n in names}
        rest = {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items() if n not in names}
        one = torch.optim.Muon(flat.values(), lr=float(lr[row]), weight_decay=float(decay[row]))
        two = torch.optim.AdamW(rest.values(), lr=REST * float(lr[row]), weight_decay=float(decay[row]))
        sizes = [p.numel() for p in named.values()]
        for gradient in gradients:
            for (name, p), part in zip(named.items(), gradient[row].split(sizes), strict=True):
                where = flat[name] if name in names else rest[name]
                where.grad = part.view(p.shape).reshape(where.shape)
            one.step()
            two.step()
        for (name, p), part in zip(named.items(), stacked[row].split(sizes), strict=True):
            if name in names:
                moved, expected = part - p.detach().flatten(), (flat[name] - p.reshape(len(p), -1)).detach().flatten()
                assert (moved - expected).norm() < 0.1 * expected.norm()
            else:
                torch.testing.assert_close(part, rest[name].detach().flatten(), rtol=1e-4, atol=1e-6)


def test_schedules() -> None:
    assert [learning_rate("linear", s, 10, warmup=2) for s in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    assert [learning_rate("wsd", s, 100, warmup=4) for s in (1, 4, 80, 90)] == [0.5, 1.0, 1.0, 0.5]
    assert [learning_rate("constant", s, 10, warmup=2) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate("cosine", 0, 10) == 1.0
    assert learning_rate("cosine", 5, 10) == pytest.approx(0.5)
    assert learning_rate("cosine", 9, 10) < 0.03


def test_a_collection_is_deterministic_resumes_and_says_where_it_comes_from(tmp_path: Path) -> None:
    recipe = Recipe(groups=(tiny(), tiny(models=1, steps=24)), seed=3)
    whole = TrajectoryStore(tmp_path / "whole", create=True)
    collect(recipe, whole)
    # Interrupted after the first group: a new process opens the folder and does the rest.
    collect(Recipe(groups=recipe.groups[:1], seed=3), TrajectoryStore(tmp_path / "parts", create=True))
    parts = TrajectoryStore(tmp_path / "parts")
    assert len(collect(recipe, parts)) == 1
    assert [shard.sha256 for shard in parts] == [shard.sha256 for shard in whole]
    assert collect(recipe, parts) == []

    shard = whole.manifest.shards[0]
    array = whole.open(shard)
    assert array.shape == (2, 11, TINY.spec().numel)
    assert not np.array_equal(array[0, 0], array[1, 0])
    assert np.abs(array[:, -1] - array[:, 0]).max() > 1e-3
    assert shard.source_sha256 == load("digits").digest
    assert {t.seed for t in shard.trainings} != {None}
    other = TrajectoryStore(tmp_path / "other", create=True)
    collect(recipe.model_copy(update={"seed": 4}), other)
    assert other.digest() != whole.digest()


def test_a_changed_shard_is_found(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path, create=True)
    shard = collect(Recipe(groups=(tiny(),)), store)[0]
    store.verify()
    path = tmp_path / shard.file
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InvalidTrajectories, match="changed"):
        store.verify()


def test_the_disk_budget_holds(tmp_path: Path) -> None:
    size = 2 * 11 * TINY.spec().numel * 4
    store = TrajectoryStore(tmp_path, budget=2 * size, create=True)
    with pytest.raises(TooLarge, match="does not fit"):
        collect(Recipe(groups=(tiny(repeats=3),)), store)
    assert len(store) == 1  # headers take the second one over
    assert store.bytes_used <= 2 * size


def test_diverged_trainings_are_dropped(tmp_path: Path) -> None:
    """At these rates some networks end in huge losses or NaN and some do not; only the latter are kept."""
    group = tiny(models=6, optimizer="sgd", lr=(1e-2, 1e4), weight_decay=(0.0,), steps=60)
    shard = collect(Recipe(groups=(group,)), store := TrajectoryStore(tmp_path, create=True))[0]
    assert 0 < len(shard.trainings) < 6
    assert all(t.final_loss is not None and t.final_loss < 3.5 for t in shard.trainings)
    assert np.isfinite(store.open(shard)).all()
    store.verify()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_held_out(name: str) -> None:
    task = TASKS[name]
    assert why_held_out(task.arch, task.source) is not None
    if task.arch.is_text:  # its text is in no trajectory of any architecture
        assert why_held_out(Arch(kind="gpt2", layers=1, dim=4), task.source) is not None


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_no_recipe_holds_a_task(name: str) -> None:
    for group in read_recipe(name).groups:
        assert why_held_out(group.arch, group.source) is None
        group.arch.spec()


def test_held_out_groups_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    task = TASKS["digits-mlp"]
    store = TrajectoryStore(tmp_path, create=True)
    with pytest.raises(InvalidRecipe, match="held out"):
        collect(Recipe(groups=(tiny(), tiny(arch=task.arch))), store)
    assert len(store) == 0


def test_a_group_must_fit_its_data(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match=r"3 x 8 x 8.*expected images of 1 x 8 x 8"):
        collect(
            Recipe(groups=(tiny(arch=TINY.model_copy(update={"channels": 3})),)), TrajectoryStore(tmp_path, create=True)
        )
    with pytest.raises(InvalidRecipe, match="text"):
        collect(Recipe(groups=(tiny(arch=Arch(kind="gpt2", layers=1, dim=4)),)), TrajectoryStore(tmp_path, create=True))


def test_recipes_come_from_files_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(Recipe(groups=(tiny(),), seed=9).model_dump_json())
    assert read_recipe(str(path)) == Recipe(groups=(tiny(),), seed=9)
    path.write_text(json.dumps({"groups": [{"arch": {"kind": "rnn"}, "source": "digits"}]}))
    with pytest.raises(InvalidRecipe, match="is not a recipe"):
        read_recipe(str(path))
    with pytest.raises(InvalidRecipe, match="no recipe"):
        read_recipe("nothing")


def test_snapshots_somebody_saved_become_a_trajectory(tmp_path: Path) -> None:
    spec = TINY.spec()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    run = tmp_path / "run"
    run.mkdir()
    torch.manual_seed(0)
    states = [{p.name: torch.randn(p.shape) for p in spec.parameters} for _ in range(8)]
    for i, state in enumerate(states):
        # Not in the spec's order, and 1000 sorts before 200 as text.
        tensors = dict(reversed(state.items()))
        if i % 2:
            torch.save(tensors, run / f"step_{200 * (i + 1)}.pt")
        else:
            save_file(tensors, run / f"step_{200 * (i + 1)}.safetensors")
    store = TrajectoryStore(tmp_path / "store", create=True)
    (shard,) = import_snapshots(store, [run], tmp_path / "spec.json", every=200)
    assert import_snapshots(store, [run], tmp_path / "spec.json", every=200) == []
    expected = torch.stack([torch.cat([s[p.name].reshape(-1) for p in spec.parameters]) for s in states])
    np.testing.assert_array_equal(store.open(shard)[0], expected.numpy())

    torch.save({"fc.1.weight": torch.zeros(2)}, run / "step_1800.pt")
    with pytest.raises(InvalidSnapshot, match="lacks tensor"):
        import_snapshots(store, [run], tmp_path / "spec.json", every=200)
    assert len(TrajectoryStore(tmp_path / "store")) == 1
    (run / "step_1800.pt").rename(run / "step_1850.pt")
    with pytest.raises(InvalidTrajectories, match=r"gaps of \[200, 250\]"):
        ordered_files(run)


def test_a_damaged_manifest_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"shards": [{"key": 1}]}')
    with pytest.raises(InvalidTrajectories, match="damaged"):
        TrajectoryStore(tmp_path)
    with pytest.raises(InvalidTrajectories, match="collect first"):
        TrajectoryStore(tmp_path / "nowhere")


def test_nowcasts_move_the_trainings_and_no_slice_spans_one(tmp_path: Path) -> None:
    """Up to the first nowcast a training is what it would be without; every slice drawn lies between two."""
    nowcasts = Nowcasts(checkpoint="nowcast-h32", period=20, count=2)
    group = tiny(steps=120, nowcasts=nowcasts)
    plain = draw_and_train(tiny(steps=120))
    store = TrajectoryStore(tmp_path / "nowcast", create=True)
    trainings = draw_trainings(group, "same", 0)
    spec = TINY.spec()
    out = np.zeros((2, 61, spec.numel), np.float32)
    checkpoint = resolve_checkpoint("nowcast-h32")
    train_group(group, trainings, load("digits"), out, device=torch.device("cpu"), jump=nowcaster(spec, checkpoint))
    assert jumps(group) == (10, 20)
    np.testing.assert_array_equal(out[:, :11], plain[:, :11])
    moves = np.abs(np.diff(out, axis=1)).mean((0, 2))
    assert moves[10] > 2 * moves[8]
    assert moves[20] > 2 * moves[18]

    collect(Recipe(groups=(group,)), store)
    (shard,) = store
    assert shard.jumps == (10, 20)
    assert shard.nowcasts == checkpoint.digest
    sampler = Sampler(store, SamplerConfig(strides=(2, 10), min_future=3), torch.device("cpu"))
    for multiple in sampler.multiples(shard):
        for start in sampler.starts(shard, multiple):
            span = range(start, start + multiple * 7)
            assert not {10, 20} & set(span)
    # A future that would go on behind a nowcast is no target.
    assert set(sampler.starts(shard, 1)) == {0, 1, 2, 3, 11, 12, 13, *range(21, 54)}


def draw_and_train(group: Group) -> np.ndarray:
    out = np.zeros((2, group.steps // group.every + 1, TINY.spec().numel), np.float32)
    train_group(group, draw_trainings(group, "same", 0), load("digits"), out, device=torch.device("cpu"))
    return out


def test_nowcasts_must_fall_on_snapshots() -> None:
    with pytest.raises(ValidationError, match="every fifth"):
        tiny(nowcasts=Nowcasts(checkpoint="nowcast-h32", period=25))


def test_source_code_is_on_every_machine_and_no_two_bodies_are_one() -> None:
    texts = {name: load(name) for name in CODE}
    for name, text in texts.items():
        assert isinstance(text, Text)
        assert len(text.train) + len(text.test) == MUCH.get(name, CODE_BYTES)
    assert len({text.digest for text in texts.values()}) == len(CODE)
    words = load("headers:words128")
    assert isinstance(words, Text)
    assert words.vocabulary == 128
    assert int(words.train.max()) <= 127
    assert (words.train == 0).float().mean() < 0.2  # what is rarer than the most frequent 127 words
