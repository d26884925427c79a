"""Graphs from explicit wirings: ties, tensors used twice, left tensors, vocabularies, the blocks a family gives."""

from __future__ import annotations

import json

import pytest
import torch
from nowcast_proto.errors import UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.wiring import ExplicitWiring
from nowcast_service.graph.blocks import EdgeType
from nowcast_service.graph.contract import contract
from nowcast_service.graph.pyg import token_positions
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.nino.checkpoint import save_checkpoint
from nowcast_service.predictors.base import ahead
from nowcast_service.predictors.nino import NiNo
from nowcast_service.predictors.options import Options
from safetensors.torch import load_file

from ..command import nowcast, write_case
from ..nino.made import checkpoint, history, update_error
from .specs import gpt2, llama, spec_of


def written_out(spec: ArchitectureSpec) -> ArchitectureSpec:
    """The same network with its faithful wiring block by block, as `contract` prints it."""
    document = contract(build_graph(spec.model_copy(update={"wiring": "faithful"})))
    ranges = [{key: r[key] for key in ("name", "size", "fixed", "ordered")} for r in document["ranges"]]
    graph = {"ranges": ranges, "blocks": document["blocks"], "left": document["left"]}
    return ArchitectureSpec(parameters=spec.parameters, graph=ExplicitWiring.model_validate(graph))


@pytest.mark.parametrize("spec", [gpt2(), llama(heads=6, kv_heads=2)], ids=["gpt2", "llama with shared heads"])
def test_a_family_written_out_gives_the_same_edges(spec):
    faithful = build_graph(spec.model_copy(update={"wiring": "faithful"}))
    explicit = build_graph(written_out(spec))

    def edges(graph):
        return [(b.edge_type, b.source, b.n_sources, b.target, b.n_targets, b.values, b.diagonal) for b in graph.blocks]

    assert edges(explicit) == edges(faithful)
    assert [(r.name, r.first, r.size, r.fixed, r.ordered) for r in explicit.ranges] == [
        (r.name, r.first, r.size, r.fixed, r.ordered) for r in faithful.ranges
    ]
    assert torch.equal(explicit.in_degree, faithful.in_degree)
    assert explicit.wiring == "faithful"
    assert {entry.rule for entry in explicit.coverage} == {"graph"}


def test_the_command_line_nowcasts_a_network_with_a_graph_of_its_own(tmp_path, capfd):
    """From files to files, and the same as by the family whose wiring it is."""
    family = spec_of("sequential", {"0.weight": (7, 5), "0.bias": (7,), "1.weight": (4, 7)}, wiring="faithful")
    spec = written_out(family)
    snapshots = write_case(tmp_path, spec, history(spec))
    made = checkpoint()
    save_checkpoint(tmp_path / "nino.safetensors", made)
    out = tmp_path / "out.safetensors"
    options = ["--spec", tmp_path / "spec.json", "--checkpoint", tmp_path / "nino.safetensors", "--k", 8, "--out", out]
    done = nowcast(capfd, "predict", *options, "--snapshots", *snapshots)
    assert (done.status, done.err) == (0, "")
    wanted, _ = ahead(NiNo(Options(made)), history(family), 8)
    assert update_error(load_file(out), wanted, history(family).snapshots[-1]) < 1e-6


def test_graph_prints_the_wiring_beside_sizes_and_coverage(tmp_path, capfd):
    spec = written_out(gpt2())
    (tmp_path / "spec.json").write_text(spec.canonical())
    done = nowcast(capfd, "graph", tmp_path / "spec.json", "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert (document["family"], document["wiring"], document["digest"]) == ("traced", "faithful", spec.digest())
    assert document["n_nodes"] == document["nodes"] == spec.graph.n_nodes
    assert [range_["name"] for range_ in document["ranges"]] == [range_.name for range_ in spec.graph.ranges]
    assert len(document["blocks"]) == len(spec.graph.blocks)
    assert document["left"] == {}
    done = nowcast(capfd, "graph", tmp_path / "spec.json", "-o", tmp_path / "drawing.png")
    assert done.status == 0, done.err
    assert (tmp_path / "drawing.png").stat().st_size > 10_000


def tied(**changes) -> ArchitectureSpec:
    """Tokens, a stream, a second vocabulary, a depthwise kernel between the stream and what reads it, an odd tensor."""
    shapes = {"words": (6, 4), "kinds": (3, 4), "deep": (4, 1, 7, 7), "out": (2, 4), "odd": (5,)}
    graph = {
        "ranges": [
            {"name": "pixels", "size": 2, "fixed": True},
            {"name": "tokens", "size": 6, "fixed": True},
            {"name": "x", "size": 4},
            {"name": "kinds", "size": 3, "fixed": True},
            {"name": "y", "size": 4},
        ],
        "blocks": [
            {"type": "token_embedding", "parameter": "words", "source": 2, "n_sources": 6, "target": 8, "n_targets": 4,
             "source_stride": 4, "target_stride": 1},
            {"type": "token_embedding", "parameter": "kinds", "source": 12, "n_sources": 3, "target": 8, "n_targets": 4,
             "source_stride": 4, "target_stride": 1},
            {"type": "conv", "parameter": "deep", "source": 8, "n_sources": 4, "target": 15, "n_targets": 4,
             "diagonal": True, "features": 49, "source_stride": 49},
            {"type": "linear", "parameter": "out", "source": 15, "n_sources": 4, "target": 0, "n_targets": 2,
             "source_stride": 1, "target_stride": 4},
            {"type": "linear", "parameter": "words", "source": 15, "n_sources": 4, "target": 2, "n_targets": 6,
             "source_stride": 1, "target_stride": 4},
        ],
        "left": {"odd": "an operation nobody knows"},
    }  # fmt: skip
    parameters = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    return ArchitectureSpec(parameters=parameters, graph=ExplicitWiring.model_validate(graph | changes))


def test_every_vocabulary_has_its_rows_numbered_wherever_it_lies():
    index = token_positions(build_graph(tied()))
    assert index.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("fields", [{}, {"token_positions": True, "vocab_size": 8}], ids=["plain", "token positions"])
def test_a_tensor_used_twice_is_predicted_once_and_the_engine_agrees_with_its_twin(fields):
    spec = tied()
    graph = build_graph(spec)
    uses = [block.writes for block, view in graph.weighted() if view.parameter == "words"]
    assert uses == [True, False]
    made, past = checkpoint(**fields), history(spec)
    found, _ = ahead(NiNo(Options(made)), past, 5)
    wanted, _ = ahead(NiNo(Options(made, reference=True)), past, 5)
    assert update_error(found, wanted, past.snapshots[-1]) < 1e-4
    assert torch.equal(found["odd"], past.snapshots[-1]["odd"])
    assert not torch.equal(found["words"], past.snapshots[-1]["words"])


def test_large_kernels_become_several_edges_of_all_their_positions():
    graph = build_graph(tied())
    parts = [(block, view) for block, view in graph.weighted() if view.parameter == "deep"]
    assert [view.features for _, view in parts] == [8, 8, 8, 8, 8, 9]
    flat = torch.arange(4 * 49)
    values = [view.of(flat, 4, 4, diagonal=True) for _, view in parts]
    assert torch.equal(torch.cat(values, dim=1), flat.view(4, 49))
    assert len({(block.source, block.target, block.diagonal) for block, _ in parts}) == 1
    assert graph.features == 9


def test_a_depthwise_kernel_that_is_left_out_still_ties_its_two_sides():
    graph = build_graph(tied(), large="left")
    assert {entry.parameter: entry.reason for entry in graph.coverage if entry.rule != "graph"} == {
        "deep": "49 kernel positions, the checkpoint takes 9",
        "odd": "an operation nobody knows",
    }
    ((source, target),) = [(b.source, b.target) for b in graph.blocks if b.edge_type is EdgeType.RESIDUAL]
    assert (source, target) == (8, 15)
    document = contract(graph)
    (left,) = [block for block in document["blocks"] if block["left"]]
    assert (left["parameter"], left["diagonal"], left["features"]) == ("deep", True, 49)
    assert document["left"] == {"odd": "an operation nobody knows"}


def test_what_is_left_goes_to_the_edge_wise_predictor_where_asked():
    spec = tied()
    past, edgewise = history(spec), checkpoint(gnn=False)
    found, _ = ahead(NiNo(Options(checkpoint(), uncovered="edgewise", edgewise=edgewise)), past, 5)
    assert not torch.equal(found["odd"], past.snapshots[-1]["odd"])


def test_a_graph_without_any_known_parameter_is_refused():
    names = ("words", "kinds", "deep", "out", "odd")
    with pytest.raises(UnsupportedArchitecture, match="no parameter of this network has a place"):
        build_graph(tied(blocks=[], left=dict.fromkeys(names, "?")))


@pytest.mark.parametrize("spec", [gpt2(), llama(), tied()], ids=["gpt2", "llama", "explicit"])
def test_every_element_in_the_contract_is_inside_its_parameter_and_every_parameter_is_named(spec):
    document = contract(build_graph(spec))
    numels = {parameter.name: parameter.numel for parameter in spec.parameters}
    seen = set(document["left"])
    for block in document["blocks"]:
        if block["parameter"] is not None:
            seen.add(block["parameter"])
            last = block["offset"] + (block["n_sources"] - 1) * block["source_stride"]
            last += (block["n_targets"] - 1) * block["target_stride"] + (block["features"] - 1) * block[
                "feature_stride"
            ]
            assert 0 <= last < numels[block["parameter"]]
    assert seen == set(numels)
