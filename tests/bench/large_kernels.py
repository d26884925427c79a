"""What becomes of kernels with more positions than the checkpoint takes: left alone, or cut into several edges?

Small networks with 5 x 5 kernels are trained on CIFAR-10 with a nowcast every tenth of the run, under the horizon
schedule of the paper. Arms: ``alone`` (no nowcasts), ``left`` (such kernels keep their newest values), ``split`` (edges
of at most nine positions each), ``kernels`` (split convolutions, and dense layers that read many pixels left),
``single`` (an edge for each position).

Run: python tests/bench/large_kernels.py [--networks lenet conv5] [--seeds 1 2 3] [--steps 1000]
One line of JSON per run goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from nowcast_lab.metatrain.data import Images, load
from nowcast_proto.rules.horizon import horizon_schedule
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.graph.kernels import split_kernel
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.history import History
from nowcast_service.nino.exact.engine import ExactEngine
from nowcast_service.weights.registry import resolve_checkpoint
from torch import Tensor, nn

ARMS = ("alone", "left", "kernels", "split", "single")
ANY = 1 << 20
PERIODS = 10


def lenet(classes: int = 10) -> nn.Sequential:
    """LeNet-5 for images of 32 x 32: the first dense layer reads 25 pixels of each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def conv5(classes: int = 10) -> nn.Sequential:
    """Three convolutions of 5 x 5 and a linear layer on the mean over pixels, for images of 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"lenet": lenet, "conv5": conv5}


@dataclass(frozen=True)
class Run:
    """What came of one training."""

    network: str
    arm: str
    seed: int
    covered: float  # share of the elements in the graph
    accuracy: dict[int, float]  # step -> per cent on the test images
    loss: dict[int, float]


def graph_of(model: nn.Module, arm: str) -> NeuralGraph:
    """The neural graph an arm nowcasts with."""
    parameters = tuple(ParameterSpec(name=name, shape=tuple(p.shape)) for name, p in model.named_parameters())
    spec = ArchitectureSpec(family="sequential", parameters=parameters, wiring="faithful")
    if arm in ("left", "kernels"):
        return build_graph(spec, large="left" if arm == "left" else "split")
    whole = build_graph(spec, max_features=ANY)
    most = {"split": 9, "single": 1}[arm]
    small = 9  # kernels the checkpoint takes stay whole
    blocks = (part for block in whole.blocks for part in split_kernel(block, most if block.features > small else small))
    return replace(whole, blocks=tuple(blocks))


def train(network: str, arm: str, seed: int, *, images: Images, engine: ExactEngine, steps: int, rate: float) -> Run:
    """Train once; batches and initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    graph = None if arm == "alone" else graph_of(model, arm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    batches = torch.Generator().manual_seed(seed)
    period = steps // PERIODS
    stride = period // engine.config.context
    horizons = horizon_schedule(steps, period)
    snapshots: list[dict[str, Tensor]] = []
    accuracy: dict[int, float] = {}
    losses: dict[int, float] = {}
    recent: list[float] = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images.train_y), (128,), generator=batches)
        loss = nn.functional.cross_entropy(model(images.train_x[chosen]), images.train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(float(loss.detach()))
        if step % stride == 0 and graph is not None:
            snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if step % period == 0:
            accuracy[step], losses[step] = measure(model, images), sum(recent[-50:]) / len(recent[-50:])
            if graph is not None and step < steps:
                history = History.of(graph.spec, snapshots[-engine.config.context :])
                future = engine.predict(graph, history, [horizons[step // period - 1]])[0]
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(future[name])
    covered = 0.0
    if graph is not None:
        inside = {view.parameter for _, view in graph.weighted()}
        covered = sum(p.numel for p in graph.spec.parameters if p.name in inside) / graph.spec.numel
    return Run(network, arm, seed, round(covered, 4), accuracy, losses)


@torch.no_grad()
def measure(model: nn.Module, images: Images) -> float:
    """Per cent of the first 4,000 test images that are named rightly."""
    return 100 * float((model(images.test_x[:4000]).argmax(1) == images.test_y[:4000]).float().mean())


def main(arguments: list[str] | None = None) -> None:
    """Run every arm of every network for every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--checkpoint", default="nowcast-h64")
    parser.add_argument("--source", default="cifar10@32")
    given = parser.parse_args(arguments)
    images = load(given.source)
    if not isinstance(images, Images):
        parser.error(f"{given.source} is no source of images")
    engine = ExactEngine(resolve_checkpoint(given.checkpoint), threads=1)
    for seed in given.seeds:
        for network in given.networks:
            for arm in given.arms:
                run = train(network, arm, seed, images=images, engine=engine, steps=given.steps, rate=given.rate)
                sys.stdout.write(json.dumps(asdict(run)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
