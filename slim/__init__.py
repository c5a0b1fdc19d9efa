"""slim: compression and deployment of vision backbones, judged in milliseconds on the runtime they will be served on.

Importing slim loads neither torch nor timm; each public name is loaded when first used. `slim.run` and `slim.gate` are
the commands of these names; what `slim bench` and `slim export` do is in the packages of these names, as
`slim.bench.compare` and `slim.export.export_onnx`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim.artifact import Artifact as Artifact
    from slim.artifact import Backbone as Backbone
    from slim.artifact import Step as Step
    from slim.bench.gate import gate as gate
    from slim.contract import Context as Context
    from slim.contract import Pass as Pass
    from slim.errors import SlimError as SlimError
    from slim.export.target import Target as Target
    from slim.job import run as run
    from slim.measurement import Measurement as Measurement
    from slim.pipeline import Guard as Guard
    from slim.pipeline import Pipeline as Pipeline
    from slim.recipe import Recipe as Recipe
    from slim.runs import Run as Run
    from slim.store import load as load
    from slim.store import save as save

# From 1.29 on ONNX Runtime sends names and digests of models to its maker unless told not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.6.0"

_PUBLIC = {
    "Artifact": "slim.artifact",
    "Backbone": "slim.artifact",
    "Context": "slim.contract",
    "Guard": "slim.pipeline",
    "Measurement": "slim.measurement",
    "Pass": "slim.contract",
    "Pipeline": "slim.pipeline",
    "Recipe": "slim.recipe",
    "Run": "slim.runs",
    "SlimError": "slim.errors",
    "Step": "slim.artifact",
    "Target": "slim.export.target",
    "gate": "slim.bench.gate",
    "load": "slim.store",
    "run": "slim.job",
    "save": "slim.store",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'slim' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
