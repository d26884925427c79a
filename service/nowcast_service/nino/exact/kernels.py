"""The element-wise part of an edge update on a CPU, in one pass: f <- silu(f + x_i + x_j).

PyTorch takes a pass for each addition and one for the activation. Compiled by numba at first use, for the processor at
hand, and kept on disk where numba finds a folder it may write to (NUMBA_CACHE_DIR, beside this file, the user's cache).
Importing this module compiles, or raises where numba is missing or does not work here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config, float32, njit, void

if config.DISABLE_JIT:  # type: ignore[attr-defined]  # set when numba loads
    # A loop over elements in Python would take hours.
    raise ImportError("numba is told not to compile")

# exp(-x) = 2^n (1 + r q(r)) with n + r = -x log2(e), n whole, |r| <= 1/2. q fits 2^r to a relative 1.1e-7.
_LOG2 = np.float32(-1.4426950408889634)
_Q1, _Q2, _Q3, _Q4, _Q5 = map(np.float32, (0.69314686, 0.24022238, 0.05550893, 0.0096717, 0.00132187))
_ONE = np.float32(1)
_ROUND = np.float32(1.5 * 2**23)  # added to a float32 it leaves n in the lowest bits
_LEAST, _MOST = np.float32(-126), np.float32(126)  # where 2^n is a normal number

# Sums may be contracted and zeros lose their sign; nothing is assumed about NaN and infinity.
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}


@njit(**_OPTIONS)
def _silu(x):  # type: ignore[no-untyped-def]
    """x / (1 + exp(-x)) without a branch or a call, so that it compiles to vector instructions."""
    y = x * _LOG2
    y = y if y > _LEAST else _LEAST
    y = y if y < _MOST else _MOST
    shifted = np.float32(y + _ROUND)
    r = y - (shifted - _ROUND)
    r2 = r * r
    power = np.float32((_ONE + _Q1 * r) + r2 * ((_Q2 + _Q3 * r) + r2 * (_Q4 + _Q5 * r)))
    bits = np.int32(np.float32(power).view(np.int32) + (np.float32(shifted).view(np.int32) << 23))  # times 2^n
    return x / (_ONE + np.int32(bits).view(np.float32))


def _add_silu(f, s, t):  # type: ignore[no-untyped-def]
    """f <- silu(f + s_i + t_j) in place.

    Args:
        f: (I, J, d).
        s: (I, d), or (1, d) where it is the same for all i.
        t: (J, d), or (1, d) where it is the same for all j.
    """
    width = f.shape[2]
    half = width // 2
    for i in range(f.shape[0]):
        a = i if s.shape[0] > 1 else 0
        for j in range(f.shape[1]):
            b = j if t.shape[0] > 1 else 0
            for c in range(half):  # two at a time, so that one is computed while the other waits
                low = _silu(f[i, j, c] + s[a, c] + t[b, c])
                high = _silu(f[i, j, c + half] + s[a, c + half] + t[b, c + half])
                f[i, j, c] = low
                f[i, j, c + half] = high
            for c in range(2 * half, width):
                f[i, j, c] = _silu(f[i, j, c] + s[a, c] + t[b, c])


_SIGNATURE = void(float32[:, :, ::1], float32[:, ::1], float32[:, ::1])
try:
    add_silu = njit(_SIGNATURE, cache=True, **_OPTIONS)(_add_silu)
except Exception:  # no folder to keep it in, a full disk, a file that cannot be read: compile for this process alone
    add_silu = njit(_SIGNATURE, **_OPTIONS)(_add_silu)
