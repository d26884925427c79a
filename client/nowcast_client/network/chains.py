"""Whether a module is really one plain chain of layers, which is all the ``sequential`` family can wire.

Names say nothing about such networks, so the layers' kinds and widths are followed in their order of registration, and
the module is traced (`torch.fx`) to see that data flows in that order: a skip connection or a branch between layers of
equal widths would otherwise be wired as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

_LAYERS = {"Linear", "Conv1d", "Conv2d", "Conv3d"}
_NORMS = {"_BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm"}


@dataclass(frozen=True)
class Chain:
    """The verdict: what is in the way, or which wiring has a place for all of the layers."""

    problem: str = ""
    wiring: Literal["published", "faithful"] | None = None


def chain_of(bare: Any, names: Iterable[str], plain_name: Callable[[str], str]) -> Chain:
    """Judge a module.

    Args:
        bare: The module, without wrappers around it.
        names: Its parameters' plain names.
        plain_name: Takes what wrappers add off a name.
    """
    width: int | None = None
    previous = ""
    order: list[str] = []
    seen: set[str] = set()
    wiring: Literal["faithful"] | None = None
    for raw, module in bare.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if not own:
            continue
        kinds = {base.__name__ for base in type(module).__mro__}
        path = plain_name(f"{raw}.") if raw else ""
        label = path.rstrip(".") or type(module).__name__
        seen.update(path + name for name in own)
        order.append(raw)
        if kinds & _LAYERS:
            shape = tuple(module.weight.shape)
            groups = getattr(module, "groups", 1)
            sources = shape[1] * groups
            flattened = width is not None and sources != width and previous == "conv" and sources % width == 0
            if width is not None and sources != width and not (flattened and len(shape) == 2):
                return Chain(f"{label} takes {sources} inputs but the layer before it gives {width}")
            if flattened or groups > 1:  # published wiring would leave such a layer out of the graph
                wiring = "faithful"
            width, previous = shape[0], "conv" if len(shape) > 2 else "linear"
        elif kinds & _NORMS:
            size = tuple(module.weight.shape)
            if width is not None and size != (width,):
                return Chain(f"{label} normalises {list(size)} values but the layer before it gives {width}")
        else:
            return Chain(f"{label} is a {type(module).__name__}")
    rest = [name for name in names if name not in seen]
    if rest:
        return Chain(f"parameter {rest[0]!r} belongs to no layer of a chain")
    if width is None:
        return Chain("it has no linear or convolution layer")
    problem = "" if _is_sequential(bare) else _flow(bare, order)
    return Chain(problem) if problem else Chain(wiring=wiring)


def _is_sequential(module: Any) -> bool:
    """Nothing but `torch.nn.Sequential`, nested or not, around the layers: it needs no tracing."""
    children = [child for _, child in module.named_children()]
    # By its forward, not its class: FSDP2 makes a class of its own of every module's.
    plain = getattr(type(module).forward, "__qualname__", "") == "Sequential.forward"
    return not children or (plain and all(map(_is_sequential, children)))


def _flow(bare: Any, order: list[str]) -> str:
    """What keeps data from flowing through the layers one after another; empty where nothing does."""
    from torch import fx

    from nowcast_client.network.tracing.restoring import untouched

    try:
        with untouched(bare):
            trace = fx.symbolic_trace(bare)
    except Exception as error:  # whatever a forward of somebody else's raises when its input is no tensor
        return f"its forward cannot be traced ({type(error).__name__}), so what lies between its layers is not known"
    layers = set(order)
    called: list[str] = []
    latest: dict[fx.Node, frozenset[str]] = {}  # node -> layers its value comes from most directly
    for node in trace.graph.nodes:
        came = frozenset[str]().union(*(latest[source] for source in node.all_input_nodes))
        if node.op in ("call_function", "call_method", "call_module") and len(came) > 1:
            return f"values of {' and '.join(sorted(came)[:2])} meet in {node.name!r}: it branches or skips"
        if node.op == "call_module" and str(node.target) in layers:
            called.append(str(node.target))
            latest[node] = frozenset({str(node.target)})
        elif node.op == "placeholder":
            latest[node] = frozenset({"the input"})
        else:
            latest[node] = came
        if node.op == "output" and came != {order[-1]}:
            return f"its output comes from {' and '.join(sorted(came))}, not from {order[-1]} alone"
    if called != order:
        return f"its layers run in the order {', '.join(called[:6])}, not as registered"
    return ""
