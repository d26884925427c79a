"""Whether differences could be chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import permutation_test

RESAMPLES = 99_999
"""Most sign flips that are tried; up to sixteen pairs all are."""


def sign_flip(gaps: Sequence[float]) -> float | None:
    """Two-sided test that paired differences are as often above zero as below, by as much.

    Exact for up to sixteen pairs, without assumptions on their distribution, and honest about few: three cannot show
    less than 0.25, five not less than 0.0625. None for fewer than two pairs, or where one is not finite.
    """
    found = np.asarray(gaps, dtype=np.float64)
    if found.size < 2 or not np.isfinite(found).all():
        return None
    if not found.any():
        return 1.0
    result = permutation_test(
        (found,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return float(result.pvalue)
