"""From an exported file to figures: latency, accuracy, budgets, the report.

`compare(candidate, reference, target, seed=0)` is what `slim bench` does to two files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim.bench.latency import compare as compare
    from slim.bench.latency import differs as differs
    from slim.bench.measure import measure_accuracy as measure_accuracy

_PUBLIC = {
    "compare": "slim.bench.latency",
    "differs": "slim.bench.latency",
    "measure_accuracy": "slim.bench.measure",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'slim.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
