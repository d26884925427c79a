"""What a network is, without its weights: the architecture spec.

A spec lists the parameters in the network's own order and what a graph builder cannot read off the shapes (attention
heads, tied tensors). It is what a client derives from a live model, what travels once per session, and what the
service builds the neural graph from. Two specs with the same canonical form have the same digest, so graphs and
positional encodings can be cached by it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from nowcast_proto.errors import InvalidSpec, UnreadableFile
from nowcast_proto.wiring import ExplicitWiring

MAX_PARAMETERS = 100_000
"""Cap on the number of tensors in one spec (a 1 T-parameter mixture of experts has some tens of thousands)."""
MAX_DIMENSIONS = 8
MAX_NAME = 512

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Wiring = Literal["published", "faithful"]


class ParameterSpec(BaseModel):
    """One named tensor: its name in the network and its shape, as the network stores it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    shape: Annotated[tuple[int, ...], Field(max_length=MAX_DIMENSIONS)]

    @field_validator("shape")
    @classmethod
    def _sizes(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in shape) or math.prod(shape) >= 2**48:
            raise ValueError(f"every size must be at least 1 and the product below 2**48, got {list(shape)}")
        return shape

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


class ArchitectureSpec(BaseModel):
    """Family or explicit wiring, ordered parameters, heads and ties of one network.

    Attributes:
        family: Name of the family whose rules wire the parameters (``gpt2``, ``llama``, ``sequential``, …). Which
            families exist is the service's business; the spec only carries the name. None where ``graph`` wires them.
        parameters: Every tensor in the order of ``named_parameters()``; tied tensors once, under their first name.
        num_heads: Query heads per attention layer.
        num_kv_heads: Key and value heads per attention layer; ``num_heads`` when absent.
        head_dim: Size of a head where it is not hidden size / heads.
        ties: Alias -> the listed name that holds its storage (``lm_head.weight`` -> ``wte.weight``).
        wiring: ``published`` keeps the node layout trained weights know, ``faithful`` keeps the network's own
            symmetries; the family's default when absent.
        graph: The wiring itself, block by block, in place of a family.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")] | None = None
    parameters: Annotated[tuple[ParameterSpec, ...], Field(min_length=1, max_length=MAX_PARAMETERS)]
    num_heads: PositiveInt | None = None
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    ties: dict[Name, Name] = Field(default_factory=dict)
    wiring: Wiring | None = None
    graph: ExplicitWiring | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ArchitectureSpec:
        twice = [name for name, count in Counter(p.name for p in self.parameters).items() if count > 1]
        if twice:
            raise ValueError(f"parameter {twice[0]!r} is listed more than once")
        names = {p.name for p in self.parameters}
        for alias, name in self.ties.items():
            if alias in names:
                raise ValueError(f"tied name {alias!r} is also listed as a parameter of its own")
            if name not in names:
                raise ValueError(f"tied name {alias!r} points to {name!r}, which is not listed")
        if (self.family is None) == (self.graph is None):
            both = "comes with a graph as well" if self.graph else "is missing, and so is a graph"
            raise ValueError(f"family {both}: a spec has exactly one of the two")
        if self.graph is not None:
            if self.wiring == "published":
                raise ValueError("an explicit graph is wired as it says; there is no published wiring of it")
            self.graph.fits({parameter.name: parameter.numel for parameter in self.parameters})
        if self.num_kv_heads is not None:
            if self.num_heads is None:
                raise ValueError("num_kv_heads is given without num_heads")
            if self.num_heads % self.num_kv_heads:
                raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        return self

    @property
    def kv_heads(self) -> int | None:
        """Key and value heads, falling back to ``num_heads``."""
        return self.num_kv_heads or self.num_heads

    @cached_property
    def numel(self) -> int:
        """Elements of all parameters together."""
        return sum(p.numel for p in self.parameters)

    @property
    def entries(self) -> int:
        """Parameters, ranges and blocks: what the spec's own size goes by."""
        wiring = (len(self.graph.ranges) + len(self.graph.blocks)) if self.graph is not None else 0
        return len(self.parameters) + wiring

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in order."""
        return {p.name: p.shape for p in self.parameters}

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, absent fields left out. Parameter order is kept, it has meaning."""
        parts = _texts(self, "parameters", "graph")
        parts["parameters"] = _list(self.parameters)
        if self.graph is not None:
            inner = _texts(self.graph, "ranges", "blocks")
            inner["ranges"] = _list(self.graph.ranges)
            if self.graph.blocks:
                inner["blocks"] = _list(self.graph.blocks)
            parts["graph"] = _object(inner)
        return _object(parts)

    def digest(self) -> str:
        """BLAKE2b-128 of the canonical form, 32 hex digits."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.blake2b(self.canonical().encode(), digest_size=16).hexdigest()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's; the copy has a digest of its own."""
        copy = super().model_copy(update=update, deep=deep)
        for kept in ("_digest", "numel"):
            copy.__dict__.pop(kept, None)
        return copy

    @property
    def kind(self) -> str:
        """The family's name, or ``traced`` for a graph of the network's own."""
        return self.family or "traced"

    @classmethod
    def parse(cls, text: str | bytes, *, origin: str = "spec") -> ArchitectureSpec:
        """Read a spec from JSON text.

        Args:
            text: The JSON document.
            origin: What to call it in an error message.

        Raises:
            InvalidSpec: Not JSON, or a field is missing, unknown or contradictory.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise InvalidSpec(
                f"{origin}: {where}: {first['msg']}",
                expected='{"family": …, "parameters": [{"name": …, "shape": […]}, …], "num_heads": …}',
                remedy="correct the field named first",
            ) from exc

    @classmethod
    def read(cls, path: str | Path) -> ArchitectureSpec:
        """Read a spec from a JSON file.

        Raises:
            UnreadableFile: The file is missing or cannot be read.
            InvalidSpec: As `parse`.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as exc:
            raise UnreadableFile(f"spec {path} cannot be read: {exc.strerror}", remedy="check the path") from exc
        return cls.parse(text, origin=str(path))


# A long spec is written out piece by piece: serialising it in one go would keep the interpreter from all else.

_PIECE = 256


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _texts(model: BaseModel, *but: str) -> dict[str, str]:
    """Field -> JSON, of those that are not at their defaults."""
    fields = model.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude=set(but))
    return {name: _text(value) for name, value in fields.items()}


def _list(models: Sequence[BaseModel]) -> str:
    pieces = (models[at : at + _PIECE] for at in range(0, len(models), _PIECE))
    dumped = ([m.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for m in piece] for piece in pieces)
    return "[" + ",".join(_text(piece)[1:-1] for piece in dumped) + "]"


def _object(parts: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{_text(name)}:{parts[name]}" for name in sorted(parts)) + "}"
