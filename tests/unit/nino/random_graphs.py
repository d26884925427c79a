"""Random neural graphs and checkpoints that go beyond what any family builds."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.graph.blocks import Block, EdgeType, NeuralGraph, View
from nowcast_service.graph.pyg import scatter, to_pyg
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint, expected_shapes
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.scaling import scales_of
from torch import Tensor


def random_graph(seed: int, *, nodes: int = 400, blocks: int = 6, features: int = 9, largest: int = 120) -> NeuralGraph:
    """Blocks between random, overlapping ranges of neurons.

    Weighted blocks are stored source-major or target-major, whole or as a part of a fused tensor, with one to nine
    kernel positions; there is an embedding in the order of its transpose, a bias, a norm, a residual link, a head and
    every neuron's self-loop.
    """
    rng = random.Random(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    made: list[Block] = []
    tokens = rng.randint(20, 60)

    def weighted(n_sources: int, n_targets: int, source: int, target: int, n_features: int, kind: EdgeType) -> None:
        name = f"weight{len(shapes)}"
        order = rng.choice(("source", "target", "fused"))
        if order == "source":
            shapes[name] = (n_sources, n_targets, n_features)
            view = View(name, 0, n_targets * n_features, n_features, 1, n_features)
        elif order == "target":
            shapes[name] = (n_targets, n_sources, n_features)
            view = View(name, 0, n_features, n_sources * n_features, 1, n_features)
        else:  # the first part of a fused tensor goes the other way, target to source
            shapes[name] = (n_sources, 2 * n_targets, n_features)
            row = 2 * n_targets * n_features
            back = View(name, 0, n_features, row, 1, n_features)
            made.append(Block(f"{name}.back", EdgeType.KEY, target, n_targets, source, n_sources, back))
            view = View(name, n_targets * n_features, row, n_features, 1, n_features)
        made.append(Block(name, kind, source, n_sources, target, n_targets, view))

    for number in range(blocks):
        n_sources, n_targets = rng.randint(2, largest), rng.randint(2, largest)
        kind = rng.choice((EdgeType.LINEAR, EdgeType.CONV, EdgeType.QUERY, EdgeType.VALUE))
        positions = rng.choice((1, 1, 4, features)) if number else features
        weighted(
            n_sources, n_targets, rng.randrange(nodes - n_sources), rng.randrange(nodes - n_targets), positions, kind
        )
    width = rng.randint(32, 64)
    shapes["embedding"] = (tokens, width)
    view = View("embedding", 0, width, 1, transposed=(tokens, width))
    made.append(Block("embedding", EdgeType.TOKEN_EMBEDDING, 0, tokens, tokens, width, view))
    shapes |= {"bias": (width,), "norm": (width,), "still": (width,), "left": (3, 2)}
    made.append(Block("bias", EdgeType.OTHER, nodes - 1, 1, tokens, width, View("bias", 0, 1, 1)))
    made.append(Block("norm", EdgeType.NORM, 0, width, tokens, width, View("norm", 0, 1, 0), diagonal=True))
    made.append(Block("still", EdgeType.OTHER, nodes - 2, 1, tokens, width, View("still", 0, 1, 1)))
    made.append(Block("res", EdgeType.RESIDUAL, 7, 90, 3, 90, 1.0, diagonal=True))
    made.append(Block("head", EdgeType.HEAD, nodes - 1, 1, 2, 40, 1.0))
    made.append(Block("wide", EdgeType.HEAD, 20, 50, 90, 40, 1.0))  # an auxiliary link large enough for tiles
    made.append(Block("self", EdgeType.SELF_LOOP, 0, nodes, 0, nodes, 2.0, diagonal=True))
    spec = ArchitectureSpec(family="random", parameters=[{"name": n, "shape": s} for n, s in shapes.items()])
    return NeuralGraph(spec, nodes, tuple(made), vocabularies=((0, tokens),) if tokens else ())


def random_history(spec: ArchitectureSpec, seed: int = 0, *, length: int = 5) -> History:
    """Snapshots that drift; ``norm`` is close to 1 everywhere, ``still`` exactly 0."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {name: 0.1 * drawn(shape) for name, shape in spec.shapes().items()}
    if "norm" in weights:
        weights["norm"] = 1 + 1e-4 * weights["norm"]
    snapshots = []
    for _ in range(length):
        weights = {
            name: torch.zeros_like(w) if name == "still" else w + (1e-5 if name == "norm" else 1e-2) * drawn(w.shape)
            for name, w in weights.items()
        }
        snapshots.append(weights)
    return History.of(spec, snapshots)


def random_checkpoint(seed: int = 0, **fields: object) -> Checkpoint:
    """Weights large enough for every node and edge to matter."""
    config = replace(NiNoConfig(hidden=16, vocab_size=64, seq_len=12), **fields)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(shape, generator=generator) / (shape[-1] if len(shape) > 1 else 4) ** 0.5
        for name, shape in expected_shapes(config).items()
    }
    return Checkpoint.of(config, state)


def random_positions(graph: NeuralGraph, seed: int = 0) -> Tensor:
    """(n_nodes, 8)."""
    return torch.randn(graph.n_nodes, 8, generator=torch.Generator().manual_seed(seed))


def by_twin(
    checkpoint: Checkpoint, graph: NeuralGraph, history: History, ks: list[int], positions: Tensor
) -> list[dict[str, Tensor]]:
    """What the reference twin predicts, in float64."""
    scales = scales_of(history)
    double = [{n: t.double() for n, t in snapshot.items()} for snapshot in history.snapshots]
    scaled = [{n: scales[n].apply(t) for n, t in snapshot.items()} for snapshot in double]
    data = to_pyg(graph, scaled, max_features=checkpoint.config.max_features, positions=positions.double())
    with torch.no_grad():
        outputs = checkpoint.twin(dtype=torch.float64)(data, ks)  # (E, features, horizons)
    results = []
    for number in range(len(ks)):
        values = {n: scales[n].invert(t) for n, t in scatter(graph, outputs[..., number]).items()}
        results.append({**double[-1], **values})
    return results


def relative_error(result: dict[str, Tensor], expected: dict[str, Tensor], history: History) -> float:
    """Norm of the difference against the norm of the expected update, the worst over the parameters that move.

    What float32 cannot tell apart (one unit in the last place of the parameter, 1e-7 of a norm's 1.0) does not count.
    """
    worst = 0.0
    for name, tensor in expected.items():
        update = float((tensor.double() - history.newest(name).double()).norm())
        difference = (result[name].double() - tensor.double()).abs()
        if not update:
            worst = max(worst, float("inf") if bool(difference.any()) else 0.0)
            continue
        unit = torch.finfo(torch.float32).eps * tensor.double().abs()
        worst = max(worst, float((difference - unit).clamp(min=0).norm()) / update)
    return worst
