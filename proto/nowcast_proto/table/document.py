"""A table of one's own, as a JSON document: how an architecture no family knows is wired.

See `docs/families.md` for what each element means. A document is data and nothing else, and everything that is repeated
has a cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nowcast_proto.errors import InvalidSpec, UnreadableFile
from nowcast_proto.table.elements import MAX_ELEMENTS, Diagonal, Element, Heads, Spread, Stack, Text, Vector, Weight

MAX_DEPTH = 4


class DeclaredTable(BaseModel):
    """How the tensors of one architecture connect its neurons.

    Attributes:
        family: What to call the architecture.
        roots: Prefixes that all tensor names may have in common (``transformer.``).
        elements: The table.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    roots: Annotated[tuple[Text, ...], Field(max_length=8)] = ()
    elements: Annotated[tuple[Element, ...], Field(min_length=1, max_length=MAX_ELEMENTS)]

    @model_validator(mode="after")
    def _bounded(self) -> DeclaredTable:
        depths = [depth for _, depth in _walk(self.elements, 1)]
        if len(depths) > MAX_ELEMENTS:
            raise ValueError(f"{len(depths)} elements, stacks included; the cap is {MAX_ELEMENTS}")
        if max(depths) > MAX_DEPTH:
            raise ValueError(f"stacks are nested {max(depths)} deep; the cap is {MAX_DEPTH}")
        for element, _ in _walk(self.elements, 1):
            if isinstance(element, Weight) and element.transposed:
                raise ValueError(f"tensor {element.tensor!r} is transposed, which published families alone may be")
            if isinstance(element, Weight | Diagonal | Heads):
                ends = (element.heads,) if isinstance(element, Heads) else (element.source, element.target)
                if part := next((end for end in ends if ":" in end), None):
                    raise ValueError(f"end {part!r} is a part of a range, which published families alone may have")
        return self

    @property
    def needs_heads(self) -> bool:
        """Whether an element speaks of attention heads."""
        for element, _ in _walk(self.elements, 1):
            counts: tuple[object, ...] = ()
            if isinstance(element, Heads):
                counts = (element.count,)
            elif isinstance(element, Spread):
                counts = (element.few, element.many)
            elif isinstance(element, Weight | Vector) and element.cut is not None:
                counts = (*element.cut.ratio, *("H" for _ in range(element.cut.per_head)))
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


def _walk(elements: tuple[Element, ...], depth: int) -> Iterator[tuple[Element, int]]:
    for element in elements:
        yield element, depth
        if isinstance(element, Stack):
            yield from _walk(element.elements, depth + 1)
