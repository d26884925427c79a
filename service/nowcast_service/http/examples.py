"""Examples for the OpenAPI document: one small model, used throughout."""

from __future__ import annotations

from typing import Any

SPEC: dict[str, Any] = {
    "family": "sequential",
    "parameters": [
        {"name": "0.weight", "shape": [16, 8]},
        {"name": "0.bias", "shape": [16]},
        {"name": "2.weight", "shape": [4, 16]},
        {"name": "2.bias", "shape": [4]},
    ],
}
SESSION = {"spec": SPEC, "keep": 5, "dtype": "float32"}
JOB = {
    "nowcast": "step-1000",
    "steps": [200, 400, 600, 800, 1000],
    "k": 40,
    "reply": "delta",
    "reply_dtype": "float32",
    "deadline": 60.0,
}
VERDICT = {"nowcast": "step-1000", "outcome": "rolled_back", "reason": "loss above trend", "step": 1050}
REPORT = {
    "step": 1060,
    "name": "digits",
    "loss_steps": [1058, 1059],
    "losses": [0.52, 0.49],
    "events": [{"kind": "kept", "step": 1050, "reason": "the loss is back on trend"}],
}
