"""From a network to the file that is served: targets, ONNX, parity, the bundle.

`export_onnx` writes the file and `write_bundle` what lies around it, as `slim export` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim.export.bundle import write_bundle as write_bundle
    from slim.export.onnx import export_onnx as export_onnx
    from slim.export.target import Target as Target

_PUBLIC = {
    "Target": "slim.export.target",
    "export_onnx": "slim.export.onnx",
    "write_bundle": "slim.export.bundle",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'slim.export' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
