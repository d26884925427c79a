"""What each operation does to the axes of its tensors: a table, one rule a kind of operation."""

from nowcast_client.network.tracing.rules import contractions, indexing, layout, norms, pointwise, reductions, spatial
from nowcast_client.network.tracing.rules.base import RULES, Call, Rule, Tensor

__all__ = [
    "RULES",
    "Call",
    "Rule",
    "Tensor",
    "contractions",
    "indexing",
    "layout",
    "norms",
    "pointwise",
    "reductions",
    "spatial",
]
