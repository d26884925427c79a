"""The published implementation's graphs, where they are at hand."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nowcast_proto.spec import ArchitectureSpec

_SHARED = Path(os.environ.get("NOWCAST_SHARED", Path(__file__).parents[3] / ".." / "shared"))
GOLDEN = sorted((_SHARED / "golden").glob("*.npz"))


@dataclass
class Golden:
    arrays: Any
    meta: dict[str, Any]
    spec: ArchitectureSpec


def load(path: Path) -> Golden:
    arrays = np.load(path)
    meta = json.loads(str(arrays["meta"]))
    spec = ArchitectureSpec(
        family=meta["family"],
        parameters=[{"name": name, "shape": shape} for name, shape in meta["params"]],
        num_heads=meta["kwargs"].get("num_heads"),
        num_kv_heads=meta["kwargs"].get("num_key_value_heads"),
    )
    return Golden(arrays, meta, spec)
