"""How to wire an architecture no family knows: a table of elements, as a JSON document that travels in the spec.

Each element names tensors and the ranges of neurons they connect; see `docs/families.md` for what each one means. A
document is data and nothing else: layers are found by names with ``*`` for a number, so no pattern of a client's runs
as a regular expression, and everything that is repeated has a cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nowcast_proto.errors import InvalidSpec, UnreadableFile

MAX_ELEMENTS = 512
"""Cap on the elements of one table, those inside stacks included."""
MAX_DEPTH = 4
MAX_COUNT = 65_536

Text = Annotated[str, Field(min_length=1, max_length=256)]
Range = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9_.-]|\{[a-z][a-z0-9_]{0,15}#?([+-][0-9]{1,4})?\})+$", max_length=128)
]
Variable = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,15}$")]
Layers = Annotated[str, Field(pattern=r"^[^{}|*]*(\*[^{}|*]+){1,4}$", max_length=256)]
Count = Literal["H", "K"] | Annotated[int, Field(ge=1, le=MAX_COUNT)]
EdgeKind = Literal["linear", "other", "conv", "norm", "token_embedding", "position_embedding", "query", "key", "value"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CutEntry(_Entry):
    """The part of a fused tensor that one element takes."""

    axis: Literal[0, 1]
    index: Annotated[int, Field(ge=0, le=15)]
    ratio: Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)] = (1, 1, 1)
    per_head: bool = False

    @model_validator(mode="after")
    def _inside(self) -> CutEntry:
        if self.index >= len(self.ratio):
            raise ValueError(f"index {self.index} is none of the {len(self.ratio)} parts of ratio")
        return self


class NeuronsEntry(_Entry):
    """Places ranges of neurons, after what feeds them."""

    kind: Literal["neurons"]
    ranges: Annotated[tuple[Range, ...], Field(min_length=1, max_length=16)]
    fed_by: Annotated[tuple[Range, ...], Field(max_length=16)] = ()


class SameEntry(_Entry):
    """``alias`` is another name of ``range``."""

    kind: Literal["same"]
    alias: Range
    range: Range
    when: Literal["always", "mha"] = "always"
    unless: Text | None = None


class WeightEntry(_Entry):
    """A tensor of two or more axes: every source neuron to every target neuron."""

    kind: Literal["weight"]
    tensor: Text
    type: EdgeKind
    source: Range
    target: Range
    stored: Literal["ts", "st"] = "ts"
    label: Text | None = None
    cut: CutEntry | None = None
    required: bool = True
    grouped: bool = False


class VectorEntry(_Entry):
    """A 1-D tensor: from a node of its own to every neuron of a range."""

    kind: Literal["vector"]
    tensor: Text
    type: EdgeKind
    target: Range
    label: Text | None = None
    cut: CutEntry | None = None
    reverse: bool = False
    required: bool = False


class DiagonalEntry(_Entry):
    """A 1-D tensor between neurons paired one to one."""

    kind: Literal["diagonal"]
    tensor: Text
    type: EdgeKind
    source: Range
    target: Range
    label: Text | None = None
    required: bool = False


class HeadsEntry(_Entry):
    """One node per attention head, linked to the neurons of its head."""

    kind: Literal["heads"]
    label: Text
    heads: Range
    target: Range
    count: Count = "H"
    ordered: bool = False


class ResidualEntry(_Entry):
    """Identity links between two ranges of equal size."""

    kind: Literal["residual"]
    label: Text
    source: Range
    target: Range
    unless: Text | None = None
    given: Text | None = None


class SpreadEntry(_Entry):
    """Identity links from each of few heads to the many that share it."""

    kind: Literal["spread"]
    label: Text
    source: Range
    target: Range
    few: Count = "K"
    many: Count = "H"
    fold: bool = False


class StackEntry(_Entry):
    """Elements repeated for every layer whose tensor names start as ``find`` says, ``*`` standing for a number."""

    kind: Literal["stack"]
    find: Layers
    elements: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=MAX_ELEMENTS)]
    var: Variable = "i"
    count: Variable = "n"
    relative: bool = True
    required: bool = True


Entry = Annotated[
    Union[  # noqa: UP007 - resolved by pydantic, which needs the forward reference inside
        NeuronsEntry,
        SameEntry,
        WeightEntry,
        VectorEntry,
        DiagonalEntry,
        HeadsEntry,
        ResidualEntry,
        SpreadEntry,
        StackEntry,
    ],
    Field(discriminator="kind"),
]


class DeclaredTable(_Entry):
    """How the tensors of one architecture connect its neurons.

    Attributes:
        family: What to call the architecture.
        roots: Prefixes that all tensor names may have in common (``transformer.``).
        elements: The table.
    """

    family: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    roots: Annotated[tuple[Text, ...], Field(max_length=8)] = ()
    elements: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=MAX_ELEMENTS)]

    @model_validator(mode="after")
    def _bounded(self) -> DeclaredTable:
        depths = [depth for _, depth in _walk(self.elements, 1)]
        if len(depths) > MAX_ELEMENTS:
            raise ValueError(f"{len(depths)} elements, stacks included; the cap is {MAX_ELEMENTS}")
        if max(depths) > MAX_DEPTH:
            raise ValueError(f"stacks are nested {max(depths)} deep; the cap is {MAX_DEPTH}")
        return self

    @property
    def size(self) -> int:
        """Elements, those inside stacks included."""
        return sum(1 for _ in _walk(self.elements, 1))

    @property
    def needs_heads(self) -> bool:
        """Whether an element speaks of attention heads."""
        for entry, _ in _walk(self.elements, 1):
            counts: tuple[object, ...] = ()
            if isinstance(entry, HeadsEntry):
                counts = (entry.count,)
            elif isinstance(entry, SpreadEntry):
                counts = (entry.few, entry.many)
            elif isinstance(entry, WeightEntry | VectorEntry) and entry.cut is not None:
                counts = (*entry.cut.ratio, *("H" for _ in range(entry.cut.per_head)))
            if any(isinstance(count, str) for count in counts):
                return True
        return False

    @classmethod
    def parse(cls, text: str | bytes, *, origin: str = "table") -> DeclaredTable:
        """Read a table from JSON text.

        Args:
            text: The JSON document.
            origin: What to call it in an error message.

        Raises:
            InvalidSpec: Not JSON, or an element is malformed.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise InvalidSpec(
                f"{origin}: {where}: {first['msg']}",
                expected='{"family": …, "elements": [{"kind": "weight", "tensor": …, "type": …, "source": …, '
                '"target": …}, …]}',
                remedy="correct the element named first",
            ) from exc

    @classmethod
    def read(cls, path: str | Path) -> DeclaredTable:
        """Read a table from a JSON file.

        Raises:
            UnreadableFile: The file is missing or cannot be read.
            InvalidSpec: As `parse`.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as exc:
            raise UnreadableFile(f"table {path} cannot be read: {exc.strerror}", remedy="check the path") from exc
        return cls.parse(text, origin=str(path))


def _walk(entries: tuple[Entry, ...], depth: int) -> Iterator[tuple[Entry, int]]:
    for entry in entries:
        yield entry, depth
        if isinstance(entry, StackEntry):
            yield from _walk(entry.elements, depth + 1)
