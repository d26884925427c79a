"""Placed ranges and blocks, from a family's table or an explicit graph, become a neural graph for one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table import PlacedBlock

from nowcast_service.graph.blocks import Block, Coverage, EdgeType, NeuralGraph, Range, View
from nowcast_service.graph.kernels import split_kernel

Uncovered = Literal["left", "edgewise"]

LINK_FEATURE = 1.0
"""Feature of residual and head links, set after scaling (NiNo paper, appendix A)."""
SELF_LOOP_FEATURE = 2.0


def assemble(
    spec: ArchitectureSpec,
    ranges: tuple[Range, ...],
    placed: Sequence[PlacedBlock],
    vocabularies: Sequence[tuple[int, int]],
    *,
    wiring: str,
    roles: Mapping[str, str],
    left: Mapping[str, str],
    max_features: int,
    uncovered: Uncovered,
    split: bool,
) -> NeuralGraph:
    """Put a neural graph together.

    Args:
        spec: The architecture.
        ranges: All neurons, in order.
        placed: All edges but self-loops.
        vocabularies: (first node, rows) of every vocabulary.
        wiring: ``published`` or ``faithful``.
        roles: Parameter -> the part it plays.
        left: Parameters of which not even the neurons are known, with the reason.
        max_features: Kernel positions the checkpoint takes per edge.
        uncovered: What the coverage says of parameters outside the graph.
        split: Split convolution kernels with more positions instead of leaving them out.
    """
    blocks: list[Block] = []
    beside: list[Block] = []
    inside: set[str] = set()
    reasons = dict(left)
    seen: set[object] = set()
    for one in placed:
        block = _block(one)
        if not isinstance(block.values, View):
            blocks.append(block)
            continue
        name, features = block.values.parameter, block.features
        large = features > max_features and not (split and block.edge_type is EdgeType.CONV)
        if one.block.left or large:
            beside.append(block)
            reasons.setdefault(
                name,
                "no edges" if one.block.left else f"{features} kernel positions, the checkpoint takes {max_features}",
            )
            if block.diagonal:  # its two sides are the same neurons, which the graph would not know without it
                blocks.append(replace(block, edge_type=EdgeType.RESIDUAL, values=LINK_FEATURE))
            continue
        inside.add(name)
        key = (name, one.block.elements())
        blocks.extend(split_kernel(replace(block, writes=key not in seen), max_features))
        seen.add(key)
    n_nodes = sum(range_.size for range_ in ranges)
    blocks.append(Block("self_loop", EdgeType.SELF_LOOP, 0, n_nodes, 0, n_nodes, SELF_LOOP_FEATURE, diagonal=True))
    coverage = tuple(
        Coverage(
            p.name, "graph" if p.name in inside else uncovered, roles.get(p.name), _reason(p.name, inside, reasons)
        )
        for p in spec.parameters
    )
    return NeuralGraph(
        spec, n_nodes, tuple(blocks), tuple(vocabularies), coverage, wiring, tuple(ranges), tuple(beside)
    )


def _reason(name: str, inside: set[str], reasons: Mapping[str, str]) -> str:
    return "" if name in inside else reasons.get(name, "it joins neurons that no other tensor reaches")


def _block(placed: PlacedBlock) -> Block:
    block = placed.block
    if block.parameter is None:
        kind = EdgeType.HEAD if block.type == "head" else EdgeType.RESIDUAL
        values: View | float = LINK_FEATURE
    else:
        kind = EdgeType[block.type.upper()]
        values = View(
            block.parameter,
            block.offset,
            block.source_stride,
            block.target_stride,
            block.feature_stride,
            block.features,
            placed.transposed,
        )
    ends = (block.source, block.n_sources, block.target, block.n_targets)
    return Block(placed.label, kind, *ends, values, diagonal=block.diagonal)
