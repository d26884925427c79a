"""The explicit wiring: what is let in, and what a spec with one promises."""

from __future__ import annotations

import json

import pytest
from nowcast_proto.errors import InvalidSpec
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.wiring import MAX_BLOCKS, MAX_USES, WiringBlock

PARAMETERS = [{"name": "w", "shape": [4, 3]}, {"name": "b", "shape": [4]}, {"name": "odd", "shape": [2]}]


def document(**changes) -> dict:
    """A layer of three inputs and four outputs with a bias, and a tensor nobody knows."""
    graph = {
        "ranges": [{"name": "x", "size": 3, "fixed": True}, {"name": "#b", "size": 1}, {"name": "y", "size": 4}],
        "blocks": [weight(), bias()],
        "left": {"odd": "an unknown operation"},
    }
    return {"parameters": PARAMETERS, "graph": graph} | changes


def weight(**changes) -> dict:
    return {
        "type": "linear", "parameter": "w", "source": 0, "n_sources": 3, "target": 4, "n_targets": 4,
        "source_stride": 1, "target_stride": 3,
    } | changes  # fmt: skip


def bias(**changes) -> dict:
    return {
        "type": "other", "parameter": "b", "source": 3, "n_sources": 1, "target": 4, "n_targets": 4, "target_stride": 1,
    } | changes  # fmt: skip


def link(**changes) -> dict:
    return {"type": "tie", "source": 0, "n_sources": 3, "target": 4, "n_targets": 3, "diagonal": True} | changes


def with_blocks(*blocks: dict, **graph) -> dict:
    made = document()
    made["graph"] = made["graph"] | {"blocks": list(blocks)} | graph
    return made


def parse(made: dict) -> ArchitectureSpec:
    return ArchitectureSpec.parse(json.dumps(made))


def test_a_graph_takes_the_place_of_a_family():
    spec = parse(document())
    assert spec.graph is not None
    assert (spec.family, spec.kind, spec.graph.n_nodes, spec.graph.firsts()) == (None, "traced", 8, [0, 3, 4])
    assert ArchitectureSpec.parse(spec.canonical()) == spec
    assert ArchitectureSpec.parse(spec.canonical()).digest() == spec.digest()
    assert parse(document(wiring="faithful")).graph == spec.graph


def test_edges_of_every_kind_are_let_in():
    blocks = [
        weight(n_targets=2, left=True),
        weight(target=6, n_targets=2, offset=6),
        bias(),
        link(),
        link(type="residual"),
        link(type="head", source=3, n_sources=1, target=4, n_targets=4, diagonal=False),
    ]
    assert [b.type for b in parse(with_blocks(*blocks)).graph.blocks][2:] == ["other", "tie", "residual", "head"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (document(family="gpt2"), "exactly one"),
        ({"parameters": PARAMETERS}, "exactly one"),
        (document(wiring="published"), "no published wiring"),
        (document(parameters=PARAMETERS[:2]), "'odd', which is not listed"),
        (document(parameters=[*PARAMETERS, {"name": "more", "shape": []}]), "'more' is in no block"),
        (with_blocks(weight(), bias(), left={"odd": "?", "b": "?"}), "'b' is in block 1 and in left"),
        (with_blocks(weight(), bias(parameter="c")), "'c', which is not listed"),
        (with_blocks(weight(), bias(offset=1)), "reaches element 4 of the 4"),
        (with_blocks(weight(), bias(features=2, feature_stride=4)), "reaches element 7 of the 4"),
        (with_blocks(weight(), bias(target=5)), "reaches node 8"),
        (with_blocks(weight(target_stride=2), bias()), "one element to two edges"),
        (with_blocks(weight(), bias(target_stride=0)), "one element to two edges"),
        (with_blocks(weight(), bias(), link(n_targets=2)), "diagonal between 3 sources and 2 targets"),
        (with_blocks(weight(), bias(), link(diagonal=False)), "not diagonal"),
        (with_blocks(weight(), bias(), link(parameter="w")), "names a parameter"),
        (with_blocks(weight(), bias(), link(offset=1)), "where elements lie"),
        (with_blocks(weight(), bias(), link(type="head")), "one node per head"),
        (with_blocks(weight(), bias(parameter=None)), "names no parameter"),
        (with_blocks(weight(), bias(type="self_loop")), "type"),
        (with_blocks(weight(), *[bias()] * (MAX_USES + 1)), "the cap is"),
        (with_blocks(weight(), bias(), *[link()] * (MAX_USES * 8 // 3 + 1)), "the cap is"),
        (with_blocks(weight(), bias(), ranges=[{"name": "x", "size": 10**6}]), "neurons for 18 elements"),
        (with_blocks(weight(), bias(), ranges=[{"name": "x", "size": 4}] * 2), "listed more than once"),
    ],
)
def test_what_is_no_graph_of_the_network_is_named(made, said):
    with pytest.raises(InvalidSpec, match=said):
        parse(made)


def test_blocks_with_the_same_elements_are_known_whichever_end_is_called_source():
    forward, backward = weight(), weight(source=4, n_sources=4, target=0, n_targets=3, source_stride=3, target_stride=1)
    assert WiringBlock(**forward).elements() == WiringBlock(**backward).elements()
    assert WiringBlock(**weight(n_targets=2)).elements() != WiringBlock(**forward).elements()


def test_a_graph_at_the_cap_is_let_in_and_one_over_is_not():
    def chain(count: int) -> dict:
        edge = {"type": "other", "parameter": "b", "n_sources": 1, "n_targets": 1}
        return {
            "parameters": [{"name": "b", "shape": [count]}],
            "graph": {
                "ranges": [{"name": "all", "size": count + 1}],
                "blocks": [edge | {"source": i, "target": i + 1, "offset": i} for i in range(count)],
            },
        }

    assert len(parse(chain(MAX_BLOCKS)).graph.blocks) == MAX_BLOCKS
    with pytest.raises(InvalidSpec, match=rf"at most {MAX_BLOCKS}"):
        parse(chain(MAX_BLOCKS + 1))
