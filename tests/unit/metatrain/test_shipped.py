"""The shipped checkpoints are what their cards and manifest say."""

from __future__ import annotations

import dataclasses
import json
import lzma
from pathlib import Path

import pytest
from nowcast_lab.metatrain.episodes import RefineConfig
from nowcast_lab.metatrain.heldout import why_held_out
from nowcast_lab.metatrain.recipes import Recipe, read_recipe
from nowcast_lab.metatrain.store import Manifest, TrajectoryStore
from nowcast_service.weights.registry import DEFAULT, SHIPPED, resolve_checkpoint, shipped_path

MANIFEST = lzma.decompress(Path(__file__).with_name("nowcast-h32-trajectories.json.xz").read_bytes())


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_small_and_of_the_width_its_name_says(name: str) -> None:
    checkpoint = resolve_checkpoint(name)
    assert checkpoint.config.hidden == int(name.removeprefix("nowcast-h"))
    assert not checkpoint.config.token_positions
    assert shipped_path(name).stat().st_size < 4_000_000
    assert shipped_path(name).with_suffix(".md").read_text().startswith(f"# {name}\n")


def lineage(name: str) -> list[dict[str, str]]:
    """Metadata of all it went through, the last first: averaging, refinements, widening, training on trajectories."""
    found = [dict(resolve_checkpoint(name).metadata)]
    while "start_metadata" in found[-1]:
        found.append(json.loads(found[-1]["start_metadata"]))
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_its_manifest_is_of_the_trajectories_it_was_trained_on(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(MANIFEST)
    metadata = lineage(name)[-1]
    assert TrajectoryStore(tmp_path).digest(int(metadata["shards"])) == metadata["trajectories"]


def test_one_was_made_from_the_other() -> None:
    middle, refined, widened, *before = lineage("nowcast-h64")
    assert json.loads(middle["average_of"])[0] == refined["start"]
    assert widened["widened_from"] == resolve_checkpoint("nowcast-h32").digest
    assert before == lineage("nowcast-h32")


@pytest.mark.parametrize(("name", "updates"), [("nowcast-h64", [180, 360, 200]), ("nowcast-h32", [360, 200])])
def test_it_was_refined_as_often_as_its_card_says_and_on_nothing_held_out(name: str, updates: list[int]) -> None:
    refinements = [metadata for metadata in lineage(name) if "recipe" in metadata]
    assert [int(metadata["step"]) for metadata in refinements] == updates
    card = shipped_path(name).with_suffix(".md").read_text()
    for metadata in refinements:
        assert f"{int(metadata['step'])} updates" in card
        for group in Recipe.model_validate_json(metadata["recipe"]).groups:
            assert why_held_out(group.arch, group.source) is None


def test_the_default_was_refined_with_the_recipe_of_the_package() -> None:
    metadata = next(metadata for metadata in lineage(DEFAULT) if "recipe" in metadata)
    assert Recipe.model_validate_json(metadata["recipe"]) == read_recipe("refine")
    assert json.loads(metadata["config"]) == json.loads(json.dumps(dataclasses.asdict(RefineConfig())))


def test_nothing_held_out_is_among_its_trajectories() -> None:
    shards = Manifest.model_validate_json(MANIFEST).shards
    assert len(shards) == 29
    assert sum(len(shard.trainings) for shard in shards) == 198
    for shard in shards:
        assert shard.arch is not None
        assert why_held_out(shard.arch, shard.source) is None
        assert shard.spec == shard.arch.spec()
    # The recipe of the package still is the one it was made with.
    groups = read_recipe("cpu").groups
    assert [(group.arch, group.source, group.models) for group in groups] == [
        (shard.arch, shard.source, len(shard.trainings)) for shard in shards
    ]
