"""How a live network is wired, with the proof of it: traced, proven, and held against the family its names say."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nowcast_proto.errors import NowcastError
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from nowcast_proto.wiring import ExplicitWiring

from nowcast_client.network.agreement import agrees
from nowcast_client.network.modules import Module, plain_name, tensors_of, unwrapped
from nowcast_client.network.named import named_spec
from nowcast_client.network.trace import Trace, trace

if TYPE_CHECKING:
    from nowcast_client.network.prove import Proof

log = logging.getLogger("nowcast")

PUBLISHED = frozenset({"sequential", "gpt2", "llama", "qwen3", "bert", "vit", "vit_clip"})
"""Families whose published wiring trained weights know; all other networks are wired as traced."""


@dataclass(frozen=True)
class Wired:
    """A network's spec and what it rests on.

    Attributes:
        spec: What the service is told.
        trace: What one forward pass said.
        proof: What came of trying it.
        differs: What the network has that the family its names say has not; empty where it is of that family, or of
            none.
    """

    spec: ArchitectureSpec
    trace: Trace
    proof: Proof
    differs: str = ""

    def lines(self) -> str:
        """What was traced and proven, in a few lines for a log."""
        proof, out = self.proof, []
        how = "on fake tensors" if self.trace.faked else "for real"
        out.append(f"wired as {self.spec.kind} from {self.trace.operations} operations, run {how}")
        if self.differs:
            out.append(f"  it is called like a known family and is not wired like it: {self.differs}")
        if not proof.proven:
            out.append(f"  not proven: {proof.note}")
        else:
            share = 100 * proof.share
            out.append(
                f"  proven in {proof.forwards} forward passes, {proof.seconds:.1f} s, {proof.note}: "
                f"{share:.1f} % of the elements move under its symmetries and the outputs stay"
            )
        out += [
            f"  {name}: permuting these neurons changes the outputs by {change:.1e}; they are known by place now"
            for name, change in list(proof.demoted.items())[:8]
        ]
        if proof.blind:
            out.append(f"  of {len(proof.blind)} tensors the outputs see no order (first: {proof.blind[0]})")
        out += [
            f"  operation {name} is not known ({count} times): the neurons it meets are known by place; "
            "give a table of your own if they are alike"
            for name, count in list(self.trace.unknown.items())[:8]
        ]
        return "\n".join(out)


def wire(
    model: Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, include_frozen: bool = False
) -> Wired:
    """Trace a network, prove what the trace says, and make the spec of it.

    Args:
        model: A ``torch.nn.Module``; wrappers around it are looked through.
        args: Positional inputs of one forward pass.
        kwargs: Keyword inputs.
        include_frozen: List parameters that do not train where a family wires the network; a traced graph has all.

    Raises:
        UnsupportedArchitecture: The forward pass fails on these inputs, or there are no parameters.
    """
    from nowcast_client.network.prove import prove

    bare = unwrapped(model)
    shapes, _, ties = tensors_of(bare)
    found = trace(bare, args, kwargs)
    proof = prove(bare, found.wiring, args, kwargs)
    differs = ""
    known = _by_name(model, include_frozen)
    if known is not None and known.family in PUBLISHED:
        differs = agrees(known.family, proof.wiring)
        if not differs and not proof.demoted:
            return Wired(known, found, proof)
    spec = ArchitectureSpec(
        parameters=tuple(ParameterSpec(name=name, shape=shape) for name, shape in shapes.items()),
        ties={alias: name for alias, name in ties.items() if name in shapes},
        graph=_renamed(proof.wiring),
    )
    return Wired(spec, found, proof, differs)


def _by_name(model: Module, include_frozen: bool) -> ArchitectureSpec | None:
    try:
        return named_spec(model, include_frozen=include_frozen)
    except NowcastError as error:
        log.debug("no family by name: %s", error)
        return None


def _renamed(wiring: ExplicitWiring) -> ExplicitWiring:
    """The wiring with names that wrappers inside the network (checkpointing, compilation) add nothing to."""
    blocks = tuple(
        block if block.parameter is None else block.model_copy(update={"parameter": plain_name(block.parameter)})
        for block in wiring.blocks
    )
    left = {plain_name(name): why for name, why in wiring.left.items()}
    return ExplicitWiring(ranges=wiring.ranges, blocks=blocks, left=left)
