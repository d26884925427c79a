"""The exact engine: NiNo on a neural graph of any size, without a hidden vector per edge.

The published implementation forms several vectors of size d for every edge. Here edges exist only inside a tile that
fits a cache. The network is evaluated in streaming passes over the snapshots, one per convolution and one for the
output (NiNo paper, section 3; notation in `weights`):

* A convolution needs, for target j, the sum over sources i of ``scale(e_ij) * (A x_j + B x_i + b) + shift(e_ij)`` with
  scale and shift affine in the feature f_ij below. All but one term need ``sum_i f_ij`` only. The cross term
  ``sum_i (Q f_ij) * (B x_i)`` is, component by component, ``sum_c Q_kc (sum_i f_ijc (B x_i)_k)``: one product
  ``f_j^T @ (B X)`` per target, contracted with Q once. For the first convolution f is the raw input, and no hidden
  vector is formed at all.
* Every pass recomputes the features it needs from the raw inputs. Keeping them instead would take 4 d bytes per edge
  (57 GB for 111 M edges at d = 128) to save d^2 multiply-adds and d activations per level and pass: a tenth of the
  work of the published three layers, half of it only from six layers on, which no published checkpoint has. So
  nothing is kept.

Work is linear in the edges: per edge of a three-layer network 3 d^2 multiply-adds and 4 d activations. Memory is two
vectors per node (one more per layer beyond three) plus tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nowcast_proto.errors import HorizonOutOfRange, InvalidCheckpoint, InvalidRequest, InvalidSnapshot
from torch import Tensor

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.exact.network import Network
from nowcast_service.nino.exact.plan import AHEAD, ON_CPU, ON_DEVICE, Plan
from nowcast_service.nino.exact.products import Precision, plain_arithmetic
from nowcast_service.nino.exact.run import Progress, Run
from nowcast_service.nino.exact.workers import Workers

DEFAULT_BUDGET = 1 << 30


class ExactEngine:
    """Evaluates one checkpoint exactly, on CPU or CUDA, within a stated amount of memory.

    Args:
        checkpoint: A graph network's checkpoint.
        device: Where to compute. Snapshots and results may be elsewhere; they are streamed in tiles.
        precision: Of the wide matrix products: ``float32``, ``tf32`` (CUDA; on a CPU it is float32) or ``bf16``.
        memory_budget: Bytes for everything the engine allocates during a prediction on top of snapshots, fused
            weights and returned parameters: node vectors, listed edges and tiles.
        threads: CPU threads while predicting; torch's setting when None.

    Raises:
        InvalidCheckpoint: The checkpoint is not one the engine can evaluate.
        InvalidRequest: Unknown precision, or a budget or number of threads that is not positive.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
        memory_budget: int = DEFAULT_BUDGET,
        threads: int | None = None,
    ) -> None:
        lacking = self.supports(checkpoint.config)
        if lacking is not None:
            raise InvalidCheckpoint(
                f"the exact engine cannot evaluate {checkpoint.source}: {lacking}",
                expected="a checkpoint of a graph network",
                remedy="use the edge-wise predictor",
            )
        if memory_budget < 1:
            raise InvalidRequest(f"memory budget of {memory_budget} bytes", expected="a positive number of bytes")
        if threads is not None and threads < 1:
            raise InvalidRequest(f"{threads} threads", expected="at least 1")
        self.config: NiNoConfig = checkpoint.config
        self.device = torch.device(device)
        self.memory_budget = memory_budget
        self._threads = threads
        with torch.no_grad(), plain_arithmetic(self.device):
            self.network = Network.of(checkpoint, self.device, precision)

    @staticmethod
    def supports(config: NiNoConfig) -> str | None:
        """What the engine lacks for a checkpoint of this config; None where it lacks nothing."""
        return None if config.gnn else "it is an edge-wise network, which has no graph"

    def plan(self, graph: NeuralGraph, horizons: int = 1) -> Plan:
        """Tiles for a graph.

        Raises:
            TooLarge: The memory budget is too small for it.
        """
        on_cpu = self.device.type == "cpu"
        return Plan.make(
            graph,
            width=self.config.hidden,
            context=self.config.context,
            node_vectors=max(2, len(self.network.weights.convolutions)),
            levels=len(self.network.weights.levels),
            horizons=horizons,
            workers=(self._threads or torch.get_num_threads()) if on_cpu else 1,
            tiling=ON_CPU if on_cpu else ON_DEVICE,
            budget=self.memory_budget,
        )

    def predict(
        self,
        graph: NeuralGraph,
        history: History,
        ks: Sequence[int],
        *,
        positions: Tensor | None = None,
        update_scale: float = 1.0,
        progress: Progress | None = None,
        timings: dict[str, float] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Future parameters at several horizons, from one evaluation of the network.

        Args:
            graph: Neural graph of the history's architecture.
            history: As many snapshots as the checkpoint reads.
            ks: Horizons in strides.
            positions: (n_nodes, >= lpe) positional encoding to use instead of the graph's own.
            update_scale: Factor on the predicted change, on top of the checkpoint's own.
            progress: Called with edges done and edges in all; edges count once per pass.
            timings: Filled with seconds per phase.

        Returns:
            Per horizon: name -> float32 tensor of every parameter, un-scaled, on the device of the newest snapshot.
            Parameters the graph does not cover, and those without variance, are the newest snapshot's.

        Raises:
            HorizonOutOfRange: A horizon the checkpoint does not predict.
            InvalidSnapshot: The history is not of the graph's architecture or of the wrong length.
            InvalidCheckpoint: The checkpoint has too few kernel positions or token positions for the graph.
            InvalidRequest: ``positions`` has the wrong shape.
            TooLarge: The memory budget is too small.
        """
        self._check(graph, history, ks)
        plan = self.plan(graph, len(ks))
        workers = Workers(plan.workers, ahead=AHEAD, inline=self.device.type != "cpu")
        with torch.no_grad(), plain_arithmetic(self.device), workers:
            seconds = {} if timings is None else timings
            run = Run(self.network, graph, history, plan, tuple(ks), workers, progress, seconds)
            return run.predict(positions, self.config.update_scale * update_scale)

    def _check(self, graph: NeuralGraph, history: History, ks: Sequence[int]) -> None:
        config = self.config
        if not ks:
            raise HorizonOutOfRange("no horizon was asked for", expected=f"1 to {config.seq_len} strides")
        for k in ks:
            if not 1 <= k <= config.seq_len:
                raise HorizonOutOfRange(f"horizon k={k}", expected=f"1 to {config.seq_len} strides")
        if len(history) != config.context:
            raise InvalidSnapshot(
                f"{len(history)} snapshots", expected=f"{config.context}, what the checkpoint was trained on"
            )
        if history.spec.shapes() != graph.spec.shapes():
            raise InvalidSnapshot("the snapshots are not of the architecture the graph was built from")
        if graph.features > config.max_features:
            raise InvalidCheckpoint(
                f"the graph has edges with {graph.features} kernel positions",
                expected=f"at most {config.max_features}, what the checkpoint was trained on",
                remedy="leave such kernels out of the graph",
            )
        if config.token_positions and graph.n_tokens > config.vocab_size:
            raise InvalidCheckpoint(
                f"the checkpoint has token-position embeddings for {config.vocab_size} tokens",
                expected=f"at least {graph.n_tokens}, the vocabulary of the model",
                remedy="use a checkpoint without token-position embeddings",
            )
