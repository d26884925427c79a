"""Matrix products of the exact engine at a stated precision, always accumulated in float32.

``float32`` is the default everywhere. ``tf32`` rounds operands to 10 mantissa bits on CUDA devices that multiply so; a
CPU has no such mode, there it is float32. ``bf16`` rounds operands to 7 mantissa bits. A CPU without bfloat16
instructions multiplies the rounded operands in float32: the same error without the speed, so that it can be measured
anywhere. Only the wide products (hidden x hidden) are rounded; raw inputs, node updates and outputs stay float32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from nowcast_proto.errors import InvalidRequest
from torch import Tensor

Precision = Literal["float32", "tf32", "bf16"]


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public before torch has a public one
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


class Products:
    """Products of float32 tensors at one precision on one device."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        if precision not in get_args(Precision):
            raise InvalidRequest(f"precision {precision!r} is not known", expected=", ".join(get_args(Precision)))
        self.device = device
        self.precision = precision
        self._tf32 = precision == "tf32" and device.type == "cuda"
        self._bf16 = precision == "bf16"
        self._native = self._bf16 and (device.type == "cuda" or multiplies_bf16())
        self._out_dtype = self._native and device.type == "cuda"

    def weight(self, weight: Tensor) -> Tensor:
        """A weight in the form `into` wants it in."""
        if not self._bf16:
            return weight
        return weight.bfloat16() if self._native else weight.bfloat16().float()

    def into(self, a: Tensor, weight: Tensor, out: Tensor) -> None:
        """out = a @ weight, for a (R, K) float32 and a prepared weight (K, d)."""
        if self._bf16:
            self._half(a, weight, out)
        else:
            self._full(a, weight, out)

    def transposed(self, a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool, exact: bool) -> None:
        """out = a.T @ b, or out += a.T @ b, for a (I, M) and b (I, d), both float32; ``exact``: in float32 always."""
        if exact:
            if accumulate:
                out.addmm_(a.t(), b)
            else:
                torch.mm(a.t(), b, out=out)
        elif self._bf16:
            if accumulate:
                part = torch.empty_like(out)
                self._half(a.t(), self.weight(b), part)
                out.add_(part)
            else:
                self._half(a.t(), self.weight(b), out)
        elif accumulate:
            with _TF32 if self._tf32 else _AS_IT_IS:
                out.addmm_(a.t(), b)
        else:
            self._full(a.t(), b, out)

    def _full(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        with _TF32 if self._tf32 else _AS_IT_IS:
            torch.mm(a, b, out=out)

    def _half(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if self._out_dtype:  # float32 accumulators reach memory unrounded
            torch.mm(a.bfloat16(), b, out_dtype=torch.float32, out=out)
        elif self._native:  # CPU kernels accumulate in float32 and round the result once
            out.copy_(torch.mm(a.bfloat16(), b))
        else:
            torch.mm(a.bfloat16().float(), b, out=out)


class _Setting:
    """A precision of float32 products that holds while anybody is inside, and is put back by the last one out.

    Args:
        backend: Where torch keeps it for one kind of device.
        precision: ``ieee`` or ``tf32``.
    """

    def __init__(self, backend: Any, precision: str) -> None:
        self._backend = backend
        self._precision = precision
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._backend.fp32_precision
                self._backend.fp32_precision = self._precision
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._backend.fp32_precision = self._before


_TF32 = _Setting(torch.backends.cuda.matmul, "tf32")
_FULL = {
    "cuda": _Setting(torch.backends.cuda.matmul, "ieee"),
    "cpu": _Setting(torch.backends.mkldnn.matmul, "ieee"),  # type: ignore[attr-defined]  # made when it loads
}
_AS_IT_IS = nullcontext()


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Whatever the process or the caller has set, float32 is float32: no TF32, no bfloat16, no autocast."""
    with torch.autocast(device.type, enabled=False), _FULL.get(device.type, _AS_IT_IS):
        yield
