"""All predictors by name: those of this package, and those that other installed packages offer.

A package offers a predictor under the entry-point group ``nowcast.predictors``; the name of the entry point is the
predictor's name, and what it points to is an `Entry`::

    [project.entry-points."nowcast.predictors"]
    halfway = "my_package:HALFWAY"

    HALFWAY = Entry("halfway", lambda options: Halfway(), needs_checkpoint=False)

Nothing is imported before its predictor is asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from nowcast_proto.errors import InvalidRequest

from nowcast_service.predictors.options import Options

if TYPE_CHECKING:
    from nowcast_service.predictors.base import Predictor

GROUP = "nowcast.predictors"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One predictor.

    Attributes:
        name: What requests call it by: lower-case letters, digits, ``_``, ``+`` and ``-``.
        make: Makes it.
        needs_checkpoint: Whether it cannot be without a trained network.
    """

    name: str
    make: Callable[[Options], Predictor]
    needs_checkpoint: bool = True


def _nino(options: Options) -> Predictor:
    from nowcast_service.predictors.nino import NiNo

    return NiNo(options)


def _wnn(options: Options) -> Predictor:
    from nowcast_service.predictors.wnn import Wnn

    return Wnn(options)


def _baseline(name: str) -> Callable[[Options], Predictor]:
    def make(options: Options) -> Predictor:
        from nowcast_service.predictors import baselines

        found: Predictor = getattr(baselines, name)()
        return found

    return make


_OWN = (
    Entry("nino", _nino),
    Entry("wnn", _wnn),
    Entry("linear", _baseline("Linear"), needs_checkpoint=False),
    Entry("lawa", _baseline("Lawa"), needs_checkpoint=False),
    Entry("snoo", _baseline("Snoo"), needs_checkpoint=False),
    Entry("identity", _baseline("Identity"), needs_checkpoint=False),
)


@functools.cache
def _known() -> dict[str, Entry | EntryPoint]:
    known: dict[str, Entry | EntryPoint] = {entry.name: entry for entry in _OWN}
    for point in entry_points(group=GROUP):
        if known.setdefault(point.name, point) is not point:
            log.warning("predictor %r of %s is left out: there is one of that name", point.name, point.value)
    return known


def names() -> tuple[str, ...]:
    """Names of all predictors."""
    return tuple(_known())


@functools.cache
def entry(name: str) -> Entry:
    """The predictor of a name.

    Raises:
        InvalidRequest: There is none, or its package cannot be used.
    """
    found = _known().get(name)
    if found is None:
        raise InvalidRequest(f"predictor {name!r} is not known", expected="one of " + ", ".join(names()))
    if isinstance(found, Entry):
        return found
    try:
        loaded = found.load()
    except Exception as exc:  # whatever a stranger's module raises while it is imported
        raise InvalidRequest(
            f"predictor {name!r} cannot be loaded from {found.value}: {type(exc).__name__}: {exc}",
            remedy="repair or remove that package",
        ) from exc
    if not isinstance(loaded, Entry) or loaded.name != name:
        raise InvalidRequest(
            f"{found.value} is no entry of predictor {name!r}",
            expected="a nowcast_service.predictors.registry.Entry of that name",
        )
    return loaded


def weightless() -> tuple[str, ...]:
    """Names of the predictors that need no checkpoint; one that cannot be loaded is left out, and the log says so."""
    found = []
    for name in names():
        try:
            if not entry(name).needs_checkpoint:
                found.append(name)
        except InvalidRequest as exc:
            log.warning("%s", exc)
    return tuple(found)
