"""A checkpoint made ready for one device: fused weights, those of wide products at the precision asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from nowcast_service.graph.blocks import Block
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.exact.products import Precision, Products
from nowcast_service.nino.exact.weights import Weights

_LOG = logging.getLogger(__name__)


@cache
def compiled_kernel() -> Callable[..., None] | None:
    """The compiled kernel (see `kernels`), or None where it cannot be had: PyTorch does the same, slower."""
    try:
        from nowcast_service.nino.exact.kernels import add_silu
    except Exception as error:  # numba is missing, or does not compile here: it raises whatever its compiler does
        _LOG.debug("no compiled kernel, PyTorch is used instead: %s", error)
        return None
    return add_silu


@dataclass(frozen=True)
class Network:
    """What every pass of the exact engine reads.

    Attributes:
        config: The checkpoint's config.
        device: Where it computes.
        products: Wide products at the precision asked for.
        weights: All fused weights, float32.
        level_weights: Those of the levels, as `products` wants them; the first, which reads raw inputs, in float32.
        scale_weights: Those of the convolutions' scales, as `products` wants them.
        add_silu: The compiled element-wise kernel, where there is one.
        nothing: (1, d) zeros for it.
    """

    config: NiNoConfig
    device: torch.device
    products: Products
    weights: Weights
    level_weights: tuple[Tensor, ...]
    scale_weights: tuple[Tensor, ...]
    add_silu: Callable[..., None] | None
    nothing: Tensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device, precision: Precision) -> Network:
        """Fuse a graph network's checkpoint.

        Raises:
            InvalidRequest: Unknown precision.
        """
        config = checkpoint.config
        products = Products(device, precision)
        weights = Weights.fuse(config, checkpoint.state, device)
        # Raw inputs are multiplied in float32 always: they are few columns, and everything depends on them.
        levels = [level.weight if n == 0 else products.weight(level.weight) for n, level in enumerate(weights.levels)]
        return cls(
            config=config,
            device=device,
            products=products,
            weights=weights,
            level_weights=tuple(levels),
            scale_weights=tuple(products.weight(conv.scale) for conv in weights.convolutions),
            add_silu=compiled_kernel() if device.type == "cpu" and config.act == "silu" else None,
            nothing=torch.zeros(1, config.hidden),
        )

    def activate(self, x: Tensor) -> None:
        """Apply the activation in place."""
        if self.config.act == "silu":
            functional.silu(x, inplace=True)
        elif self.config.act == "relu":
            x.relu_()
        elif self.config.act == "tanh":
            x.tanh_()
        else:
            torch.ops.aten.gelu_(x)


def of_type(const: Tensor, block: Block) -> Tensor:
    """(d,) row of a constant that may depend on the edge type."""
    return const[0 if len(const) == 1 else int(block.edge_type)]
