"""Matrix products of the exact engine at a stated precision, always accumulated in float32.

``float32`` is the default everywhere. ``tf32`` rounds operands to 10 mantissa bits on CUDA devices that multiply so; a
CPU has no such mode, there it is float32. ``bf16`` rounds operands to 7 mantissa bits. A CPU without bfloat16
instructions multiplies the rounded operands in float32: the same error without the speed, so that it can be measured
anywhere. Only the wide products (hidden x hidden) are rounded; raw inputs, node updates and outputs stay float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, get_args

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


class _Tf32:
    """Allow TF32 within a block, and put the process's own setting back; a GPU is driven by one thread."""

    def __init__(self) -> None:
        self._before = False

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before


_TF32 = _Tf32()
_AS_IT_IS = nullcontext()
