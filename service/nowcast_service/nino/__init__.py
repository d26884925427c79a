"""The NiNo graph network: checkpoints, scaling, the horizon schedule, the exact engine and its reference twin."""
