"""The shipped checkpoint is what its card and manifest say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nowcast_service.metatrain.heldout import why_held_out
from nowcast_service.metatrain.recipes import Recipe, read_recipe
from nowcast_service.metatrain.refine import RefineConfig
from nowcast_service.metatrain.store import Manifest, TrajectoryStore
from nowcast_service.weights import resolve_checkpoint, shipped_path

MANIFEST = Path(__file__).parents[3] / "docs" / "results" / "nowcast-h32-trajectories.json"


def test_it_is_small_and_of_the_width_its_name_says() -> None:
    checkpoint = resolve_checkpoint("nowcast-h32")
    assert checkpoint.config.hidden == 32
    assert not checkpoint.config.token_positions
    assert shipped_path().stat().st_size < 4_000_000
    assert shipped_path().with_suffix(".md").read_text().startswith("# nowcast-h32\n")


def test_its_manifest_is_of_the_trajectories_it_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(MANIFEST.read_bytes())
    metadata = json.loads(resolve_checkpoint("nowcast-h32").metadata["start_metadata"])
    assert TrajectoryStore(tmp_path).digest(int(metadata["shards"])) == metadata["trajectories"]


def test_it_was_refined_with_the_recipe_of_the_package_and_nothing_held_out_in_it() -> None:
    metadata = resolve_checkpoint("nowcast-h32").metadata
    recipe = Recipe.model_validate_json(metadata["recipe"])
    assert recipe == read_recipe("refine")
    assert json.loads(metadata["config"]) == json.loads(json.dumps(dataclasses.asdict(RefineConfig())))
    assert int(metadata["step"]) == RefineConfig().updates
    for group in recipe.groups:
        assert why_held_out(group.arch, group.source) is None


def test_nothing_held_out_is_among_its_trajectories() -> None:
    shards = Manifest.model_validate_json(MANIFEST.read_bytes()).shards
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
