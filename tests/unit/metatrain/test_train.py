"""Slices, their scaling, and the training loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_lab.metatrain.collect import collect
from nowcast_lab.metatrain.errors import InvalidTrajectories
from nowcast_lab.metatrain.recipes import Group, Recipe
from nowcast_lab.metatrain.sampler import Sampler, SamplerConfig, scale_item
from nowcast_lab.metatrain.store import TrajectoryStore
from nowcast_lab.metatrain.train import (
    STILL,
    TrainConfig,
    basis,
    errors,
    exported,
    initial_network,
    item_loss,
    train,
)
from nowcast_lab.metatrain.zoo import Arch
from nowcast_proto.errors import UnreadableFile
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint, load_checkpoint
from nowcast_service.nino.scaling import scale_snapshots, scales_of

SAMPLER = SamplerConfig(strides=(4, 16), trajectories=2, max_slices=2, horizons=6)
CONFIG = TrainConfig(hidden=8, steps=6, warmup=1, sampler=SAMPLER)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    folder = tmp_path_factory.mktemp("trajectories")
    groups = (
        Group(
            arch=Arch(kind="mlp", widths=(4,), channels=1, size=8),
            source="digits",
            models=3,
            steps=120,
            every=4,
            batch=8,
        ),
        Group(
            arch=Arch(kind="convnet", widths=(3,), channels=1, size=8),
            source="digits",
            models=2,
            steps=120,
            every=4,
            batch=8,
        ),
    )
    made = TrajectoryStore(folder, create=True)
    collect(Recipe(groups=groups), made)
    return made


def test_slices_are_scaled_as_inference_scales_them() -> None:
    spec = Arch(kind="mlp", widths=(3,), channels=1, size=4).spec()
    torch.manual_seed(0)
    snapshots = [{p.name: torch.randn(p.shape) + 2 for p in spec.parameters} for _ in range(5)]
    history = History.of(spec, snapshots)
    scaled = scale_snapshots(history, scales_of(history))
    seen = torch.stack([torch.cat([t.reshape(-1) for t in s.values()]) for s in snapshots])[None]
    ahead = seen[:, -1:] + 0.1
    inputs, displacement, mask = scale_item(seen, ahead, [p.numel for p in spec.parameters], clip=50)
    for n in range(5):
        expected = torch.cat([t.reshape(-1) for t in scaled[n].values()])
        torch.testing.assert_close(inputs[:-2, 0, n], expected, rtol=1e-4, atol=1e-5)
    assert inputs[-2:, 0].tolist() == [[1.0] * 5, [2.0] * 5]
    assert not mask[-2:].any()
    assert mask[:-2].all()
    start = 0
    for p in spec.parameters:
        std = scales_of(history)[p.name].std
        got = displacement[start : start + p.numel, 0, 0]
        torch.testing.assert_close(got, torch.full((p.numel,), 0.1 / std), rtol=1e-3, atol=1e-4)
        start += p.numel


def test_a_tensor_that_stood_still_has_no_target() -> None:
    """What makes the published recipe's loss NaN: the future of a tensor whose standard deviation is zero."""
    seen = torch.randn(1, 5, 6)
    seen[..., 3:] = 1.0
    ahead = seen[:, -1:] + torch.tensor([0.0, 0.0, 0.0, 1e-2, 1e-2, 1e-2])
    published = (ahead - 1.0) / (seen[..., 3:].std() + 1e-6)
    assert published.half()[..., 3:].abs().max() == 1e4  # ten thousand deviations, …
    assert ((ahead * 100 - 100) / 1e-6).half()[..., 3:].isinf().all()  # … and no number at all in half precision
    inputs, displacement, mask = scale_item(seen, ahead, (3, 3), clip=5.0)
    assert inputs.isfinite().all()
    assert not mask[3:6].any()
    assert (displacement[3:] == 0).all()
    assert mask[:3].all()


def test_displacements_are_clipped() -> None:
    seen = torch.randn(1, 5, 4)
    _, displacement, mask = scale_item(seen, seen[:, -1:] + 1e6, (4,), clip=5.0)
    assert (displacement[:4] == 5).all()
    assert mask[:4].all()


def test_horizons_beyond_the_end_are_masked(store: TrajectoryStore) -> None:
    """31 snapshots: with a context of 5 at stride 1, nothing lies more than 26 strides ahead."""
    sampler = Sampler(store, dataclasses.replace(SAMPLER, horizons=40, smooth=0.0, strides=(4, 4), min_future=26), CPU)
    item = sampler.item(0, np.random.default_rng(0), validation=False)
    assert item.ks == tuple(range(1, 41))
    reachable = item.mask[:-2].any(0)  # (slices, horizons)
    assert reachable[:, :26].all()
    assert not reachable[:, 26:].any()
    assert (item.displacement[..., 26:] == 0).all()
    # Nothing beyond enters the loss, whatever the network says of it.
    twin = initial_network(CONFIG)
    error, moved, count = errors(twin, item)
    assert float(error.detach()[:, :26].min()) > 0
    for sums in (error.detach(), moved, count):
        assert sums[:, 26:].abs().max() == 0


def test_smoothed_targets_are_averages_of_the_future(store: TrajectoryStore) -> None:
    shard, array = store.manifest.shards[0], store.open(store.manifest.shards[0])
    plain = dataclasses.replace(SAMPLER, horizons=40, strides=(4, 4), min_future=20, clip=1e9, max_slices=1)
    raw = Sampler(store, dataclasses.replace(plain, smooth=0.0), CPU).item(
        0, np.random.default_rng(1), validation=False
    )
    smooth = Sampler(store, dataclasses.replace(plain, smooth=0.25), CPU).item(
        0, np.random.default_rng(1), validation=False
    )
    torch.testing.assert_close(raw.inputs, smooth.inputs)
    eight = raw.ks.index(8)  # 6 … 10 strides ahead
    expected = raw.displacement[:-2, 0, eight - 2 : eight + 3].mean(-1)
    torch.testing.assert_close(smooth.displacement[:-2, 0, eight], expected, rtol=1e-3, atol=1e-4)
    assert array.shape[1] == shard.snapshots


def test_validation_trajectories_are_never_trained_on(store: TrajectoryStore) -> None:
    sampler = Sampler(store, SAMPLER, CPU)
    for index in range(len(store)):
        held, used = set(sampler.models(index, validation=True)), set(sampler.models(index, validation=False))
        assert not held & used
        assert held | used == set(range(len(store.manifest.shards[index].trainings)))
    assert sampler.validation()


def test_batches_depend_on_seed_and_step_alone(store: TrajectoryStore) -> None:
    one, other = Sampler(store, SAMPLER, CPU), Sampler(store, SAMPLER, CPU)
    other.batch(0)  # whatever was drawn before
    for a, b in zip(one.batch(5), other.batch(5), strict=True):
        assert a.ks == b.ks
        torch.testing.assert_close(a.inputs, b.inputs, rtol=0, atol=0)
        torch.testing.assert_close(a.encoding, b.encoding, rtol=0, atol=0)
    assert not torch.equal(one.batch(5)[0].encoding, one.batch(6)[0].encoding)


def test_too_short_trajectories_are_refused(store: TrajectoryStore) -> None:
    with pytest.raises(InvalidTrajectories, match="long enough"):
        Sampler(store, dataclasses.replace(SAMPLER, strides=(100, 200)), CPU)


def test_the_change_of_coordinates_folds_into_the_weights(store: TrajectoryStore) -> None:
    twin, change = initial_network(CONFIG), basis(5, CONFIG.magnify, CPU)
    item = Sampler(store, SAMPLER, CPU).item(1, np.random.default_rng(0), validation=False)
    plain = Checkpoint.of(twin.config, exported(twin, change)).twin()
    with torch.no_grad():
        for one, other in zip(errors(twin, item, change), errors(plain, item), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(errors(twin, item)[0], errors(plain, item)[0], rtol=1e-3)


def test_a_training_that_was_stopped_ends_where_one_that_was_not_does(store: TrajectoryStore, tmp_path: Path) -> None:
    train(store, CONFIG, tmp_path / "whole")
    train(store, CONFIG, tmp_path / "parts", stop_after=3)
    half = load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors")
    train(store, CONFIG, tmp_path / "parts")
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.digest == parts.digest != half.digest
    train(store, dataclasses.replace(CONFIG, seed=1), tmp_path / "other")
    assert load_checkpoint(tmp_path / "other" / "checkpoint.safetensors").digest != whole.digest
    with pytest.raises(InvalidTrajectories, match="other config"):
        train(store, dataclasses.replace(CONFIG, lr=1e-4), tmp_path / "whole")
    (tmp_path / "whole" / "state.pt").write_bytes(b"not a state")
    with pytest.raises(UnreadableFile, match="damaged"):
        train(store, CONFIG, tmp_path / "whole")


def test_training_lowers_the_loss(store: TrajectoryStore, tmp_path: Path) -> None:
    def losses(lr: float, out: Path) -> list[float]:
        found: list[float] = []
        config = dataclasses.replace(CONFIG, steps=60, lr=lr, warmup=4)
        train(store, config, out, on_step=lambda _, loss: found.append(loss))
        return found

    # Of the same items: those of another step can be twice as hard.
    still, trained = losses(1e-12, tmp_path / "still"), losses(1e-2, tmp_path / "trained")
    assert trained[0] == pytest.approx(still[0])
    assert sum(trained[-20:]) < 0.95 * sum(still[-20:])
    assert list((tmp_path / "trained" / "logs").glob("events*"))


@pytest.mark.parametrize("loss", ["relative", "l1"])
def test_losses_of_a_network_that_predicts_no_change(store: TrajectoryStore, loss: str) -> None:
    twin = initial_network(CONFIG)
    with torch.no_grad():
        for module in (twin.edge_out.fc[2],):
            module.weight.zero_()
            module.bias.zero_()
    item = Sampler(store, SAMPLER, CPU).item(0, np.random.default_rng(0), validation=False)
    value = float(item_loss(twin, item, loss).detach())
    moved, count = item.displacement.abs().sum((0, 2)), item.mask.sum((0, 2))  # per slice
    expected = moved.sum() / count.sum() if loss == "l1" else (moved / (moved + STILL * count)).mean()
    assert value == pytest.approx(float(expected), rel=1e-3)
