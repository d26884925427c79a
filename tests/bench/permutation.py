"""Which permutations of an attention layer's neurons does a graph network see? After NiNo paper, appendix A.6.

A permutation of neurons that keeps the layer's function should keep its graph embedding, one that breaks the function
should change it. The same network reads the layer twice: as Nowcast wires it (query and key neurons shared, a node per
head) and naively (query, key and value as three plain linear layers, no heads).

Positional encodings belong to neurons, so every neuron that moves takes its own along, as it would if the network's
neurons were only listed in another order; where whole heads move, so do their nodes. That gives a permutation its best
chance to look like nothing happened, and what differs then is the wiring. (Without any node input even our graph cannot
see neurons change heads: head nodes only send, so they are told apart by their encodings alone.)

Whether a graph network could learn to tell them apart is asked of a logistic regression, as there: from how far the
embedding has moved, over a thousand permutations, each predicted by one that has not seen its layer.

Run: python tests/bench/permutation.py [--checkpoint CKPT] [-o permutation.png] [--json] [--layers 125]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table.elements import Heads, Neurons, Vector, Weight
from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.graph.families import Family
from nowcast_service.graph.positional import positional_encoding
from nowcast_service.graph.pyg import to_pyg
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.nino.checkpoint import load_checkpoint
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.model import NiNoTwin
from torch import Tensor

WIDTH, HEADS = 12, 3
SIZE = WIDTH // HEADS
_OUT = (
    Neurons(("out",)),
    Weight("out.weight", "linear", "v", "out"),
    Vector("out.bias", "other", "out"),
)
OURS = Family(
    "attention",
    {
        "faithful": (
            Neurons(("x",)),
            Neurons(("q", "v"), fed_by=("heads",)),
            Weight("q.weight", "query", "x", "q"),
            Heads("q.head", "heads", "q"),
            Vector("q.bias", "other", "q"),
            Weight("k.weight", "key", "q", "x", "st"),
            Vector("k.bias", "other", "q", reverse=True),
            Weight("v.weight", "value", "x", "v"),
            Heads("v.head", "heads", "v"),
            Vector("v.bias", "other", "v"),
            *_OUT,
        )
    },
)
NAIVE = Family(
    "attention",
    {
        "faithful": (
            Neurons(("x",)),
            Neurons(("q", "k", "v")),
            *(
                link
                for name in "qkv"
                for link in (
                    Weight(f"{name}.weight", "linear", "x", name),
                    Vector(f"{name}.bias", "other", name),
                )
            ),
            *_OUT,
        )
    },
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """One permutation, measured.

    Attributes:
        kind: What was permuted.
        function: Largest change of the layer's output, relative to the output.
        ours: Distance of the graph embedding from that of the original, relative to its length.
        naive: The same under the naive graph.
    """

    kind: str
    function: float
    ours: float
    naive: float


def attention(tensors: Tensors, x: Tensor) -> Tensor:
    """(tokens, width) -> (tokens, width): multi-head self-attention."""
    q, k, v = (
        (x @ tensors[f"{name}.weight"].t() + tensors[f"{name}.bias"]).unflatten(1, (HEADS, SIZE)).transpose(0, 1)
        for name in "qkv"
    )
    mixed = torch.softmax(q @ k.transpose(1, 2) / SIZE**0.5, dim=-1) @ v
    return mixed.transpose(0, 1).flatten(1) @ tensors["out.weight"].t() + tensors["out.bias"]


@dataclass(frozen=True)
class Move:
    """New orders of query, key and value neurons, of the columns of the output, and of the head nodes."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    heads: Tensor

    def tensors(self, tensors: Tensors) -> Tensors:
        moved = {
            f"{name}.{part}": tensors[f"{name}.{part}"][getattr(self, name)]
            for name in "qkv"
            for part in ("weight", "bias")
        }
        return {**tensors, **moved, "out.weight": tensors["out.weight"][:, self.out]}

    def positions(self, graph: NeuralGraph, positions: Tensor) -> Tensor:
        moved = positions.clone()
        for range_ in graph.ranges:
            order = getattr(self, range_.name, None)
            if order is not None and range_.name != "out":
                moved[range_.first : range_.first + range_.size] = positions[range_.first + order]
        return moved


def permutations(generator: torch.Generator) -> dict[str, Move]:
    """Kind -> a permutation drawn at random; the first three keep the function, the others break it."""

    def shuffled(n: int) -> Tensor:
        order = torch.randperm(n, generator=generator)
        while torch.equal(order, torch.arange(n)):
            order = torch.randperm(n, generator=generator)
        return order

    same, still = torch.arange(WIDTH), torch.arange(HEADS)
    order = shuffled(HEADS)
    heads = (order[:, None] * SIZE + torch.arange(SIZE)).flatten()
    inside, inside_v = (torch.cat([head * SIZE + shuffled(SIZE) for head in range(HEADS)]) for _ in range(2))
    across = same.clone()
    across[torch.tensor([0, SIZE])] = across[torch.tensor([SIZE, 0])]  # one neuron of head 0 for one of head 1
    return {
        "whole heads": Move(heads, heads, heads, heads, order),
        "q and k inside heads": Move(inside, inside, same, same, still),
        "v inside heads": Move(same, same, inside_v, inside_v, still),
        "q without k": Move(inside, same, same, same, still),
        "v across heads": Move(same, same, across, across, still),
        "q and k across heads": Move(across, across, same, same, still),
        "all across heads": Move(across, across, across, across, still),
        "v of other heads": Move(same, same, heads, heads, still),
    }


def _network(checkpoint: str | None) -> NiNoTwin:
    if checkpoint is not None:
        return load_checkpoint(checkpoint).twin(dtype=torch.float64).eval()
    torch.manual_seed(0)
    network = NiNoTwin(NiNoConfig(hidden=32, token_positions=False))
    with torch.no_grad():  # wide enough that an untrained network responds to its inputs
        for parameter in network.parameters():
            parameter.normal_(std=1.5 / max(parameter.shape[-1], 1) ** 0.5)
    return network.double().eval()


def experiment(checkpoint: str | None = None, repeats: int = 5) -> list[Outcome]:
    """Measure every kind of permutation on random layers.

    Args:
        checkpoint: A graph network; a randomly initialised one where None.
        repeats: Random layers.
    """
    network = _network(checkpoint)
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{name}.{part}": (WIDTH, WIDTH)[: 2 - i] for name in ("q", "k", "v", "out")
              for i, part in enumerate(("weight", "bias"))}  # fmt: skip
    spec = ArchitectureSpec(
        family="attention",
        parameters=[{"name": name, "shape": shape} for name, shape in shapes.items()],
        num_heads=HEADS,
        wiring="faithful",
    )
    graphs = [build_graph(spec, family=family) for family in (OURS, NAIVE)]
    places = [positional_encoding(graph, network.config.lpe).double() for graph in graphs]

    def embedding(graph: NeuralGraph, tensors: Tensors, positions: Tensor) -> Tensor:
        snapshots, features = [tensors] * network.config.context, network.config.max_features
        with torch.no_grad():
            nodes, edges = network.embed(to_pyg(graph, snapshots, max_features=features, positions=positions))
        return torch.cat([nodes.mean(0), edges.mean(0)])

    outcomes = []
    for _ in range(repeats):
        tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        x = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64)
        before = attention(tensors, x)
        originals = [embedding(graph, tensors, place) for graph, place in zip(graphs, places, strict=True)]
        for kind, move in permutations(generator).items():
            moved = move.tensors(tensors)
            ours, naive = (
                float((embedding(graph, moved, move.positions(graph, place)) - original).norm() / original.norm())
                for graph, place, original in zip(graphs, places, originals, strict=True)
            )
            change = float((attention(moved, x) - before).abs().max() / before.abs().max())
            outcomes.append(Outcome(kind, change, ours, naive))
    return outcomes


def told_apart(outcomes: list[Outcome]) -> dict[str, float]:
    """Balanced accuracy with which a logistic regression on the distance tells if a permutation keeps the function.

    Args:
        outcomes: Of several layers, eight kinds each, layer after layer.

    Returns:
        ``ours`` and ``naive`` -> accuracy, 0.5 where it cannot tell.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    kept = [outcome.function < 1e-9 for outcome in outcomes]
    kinds = len({outcome.kind for outcome in outcomes})
    layers = [number // kinds for number in range(len(outcomes))]
    found = {}
    for name in ("ours", "naive"):
        distances = torch.tensor([[max(getattr(outcome, name), 1e-17)] for outcome in outcomes]).log10().numpy()
        folds = GroupKFold(min(5, max(layers) + 1))
        told = cross_val_predict(LogisticRegression(class_weight="balanced"), distances, kept, groups=layers, cv=folds)
        found[name] = float(balanced_accuracy_score(kept, told))
    return found


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Embedding distance of every permutation, ours beside naive, coloured by what happened to the function."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("ours", "our graph"), ("naive", "naive graph: three linear layers, no heads")
    for axes, (name, title) in zip(panels, titles, strict=True):
        for kept, colour, label in ((True, "#3b6fb6", "keeps the function"), (False, "#d1373f", "breaks the function")):
            chosen = [o for o in outcomes if (o.function < 1e-9) == kept]
            axes.scatter(
                [max(getattr(o, name), 1e-17) for o in chosen],
                [kinds.index(o.kind) for o in chosen],
                color=colour,
                label=label,
                s=36,
                alpha=0.7,
                edgecolors="white",
                linewidths=0.6,
            )
        axes.axvspan(1e-17, 1e-10, color="#eef1f5", zorder=0)
        axes.set_xscale("log")
        axes.set(xlim=(1e-17, 10), xlabel="distance of the graph embedding (grey: none but rounding)", title=title)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.grid(axis="y", color="#eef1f5")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[1].legend(loc="center right", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", help="a graph network's file; randomly initialised by default")
    parser.add_argument("-o", "--output", type=Path, help="where to plot to")
    parser.add_argument("--layers", type=int, default=125, help="random layers, eight permutations each (125)")
    parser.add_argument("--json", action="store_true", help="print every outcome as JSON")
    arguments = parser.parse_args()
    outcomes = experiment(arguments.checkpoint, arguments.layers)
    if arguments.output:
        plot(outcomes, arguments.output)
    if arguments.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
        return
    print(f"{'permutation':<24}{'function':>12}{'ours':>12}{'naive':>12}   (largest of {len(outcomes) // 8} layers)")
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        columns = (max(getattr(o, field) for o in of_kind) for field in ("function", "ours", "naive"))
        print(f"{kind:<24}" + "".join(f"{value:>12.1e}" for value in columns))
    apart = told_apart(outcomes)
    print(f"told apart by logistic regression, {len(outcomes)} permutations: "
          f"{apart['ours']:.3f} ours, {apart['naive']:.3f} naive (0.5: not at all)")  # fmt: skip


if __name__ == "__main__":
    main()
