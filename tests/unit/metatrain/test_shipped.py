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


def refinements() -> list[dict[str, str]]:
    """Metadata of every refinement it went through, the last one first."""
    found = [dict(resolve_checkpoint("nowcast-h32").metadata)]
    while "start_metadata" in found[-1]:
        found.append(json.loads(found[-1]["start_metadata"]))
    return found[:-1]


def before_refining() -> dict[str, str]:
    """Metadata of what was trained on trajectories."""
    return json.loads(refinements()[-1]["start_metadata"])


def test_its_manifest_is_of_the_trajectories_it_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(MANIFEST.read_bytes())
    metadata = before_refining()
    assert TrajectoryStore(tmp_path).digest(int(metadata["shards"])) == metadata["trajectories"]


def test_it_was_refined_with_the_recipe_of_the_package_and_nothing_held_out_in_it() -> None:
    last, first = refinements()
    assert Recipe.model_validate_json(last["recipe"]) == read_recipe("refine")
    assert json.loads(last["config"]) == json.loads(json.dumps(dataclasses.asdict(RefineConfig())))
    for metadata in (last, first):
        assert int(metadata["step"]) == json.loads(metadata["config"])["updates"]
        for group in Recipe.model_validate_json(metadata["recipe"]).groups:
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
