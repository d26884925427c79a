"""Kernels with more positions than a checkpoint takes per edge.

Such a kernel becomes several edges between the same two neurons, each with a run of its positions in row-major order,
all runs about equally long. The checkpoint was never trained on parallel edges, so this is an approximation of what it
knows. ``tests/bench/large_kernels.py`` is why convolutions are cut so and dense layers that read many pixels of a
channel are not; the documentation of neural graphs has its figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from nowcast_service.graph.blocks import Block, View


def split_kernel(block: Block, most: int) -> Iterator[Block]:
    """Parts of a block with at most so many kernel positions each; the block itself where it has no more."""
    view = block.values
    if not isinstance(view, View) or view.features <= most:
        yield block
        return
    parts = math.ceil(view.features / most)
    first = 0
    for number in range(parts):
        end = view.features * (number + 1) // parts
        part = replace(view, offset=view.offset + first * view.feature_stride, features=end - first)
        yield replace(block, name=f"{block.name}[{first}:{end}]", values=part)
        first = end
