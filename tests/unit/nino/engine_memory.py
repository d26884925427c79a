"""Prints by how much one prediction raises the peak memory of this process, and the size of its results, in bytes."""

from __future__ import annotations

import sys

from nowcast_service.nino.exact.engine import ExactEngine
from nowcast_service.runtime.memory import Peak

from .random_graphs import random_checkpoint, random_graph, random_history, random_positions


def main(budget: int) -> None:
    graph = random_graph(9, nodes=4000, largest=900, features=4, blocks=12)
    checkpoint = random_checkpoint(hidden=64, layers=4)
    history, positions = random_history(graph.spec), random_positions(graph)
    engine = ExactEngine(checkpoint, memory_budget=budget, threads=2)
    small = random_graph(1)
    engine.predict(small, random_history(small.spec), [1], positions=random_positions(small))  # load the libraries
    peak = Peak()
    with peak.measured():
        result = engine.predict(graph, history, [1], positions=positions)[0]
    sys.stdout.write(f"{peak.nbytes} {sum(t.numel() * 4 for t in result.values())}\n")
    sys.stderr.write(f"{graph.n_edges} edges\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
