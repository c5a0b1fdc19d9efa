"""slim: compression and deployment of vision backbones, judged in milliseconds on the runtime they will be served on.

Importing slim loads neither torch nor timm; each public name is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim.artifact import Artifact as Artifact
    from slim.artifact import Backbone as Backbone
    from slim.artifact import Step as Step
    from slim.contract import Context as Context
    from slim.contract import Pass as Pass
    from slim.measurement import Measurement as Measurement
    from slim.store import load as load
    from slim.store import save as save

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "slim.artifact",
    "Backbone": "slim.artifact",
    "Step": "slim.artifact",
    "Context": "slim.contract",
    "Pass": "slim.contract",
    "Measurement": "slim.measurement",
    "load": "slim.store",
    "save": "slim.store",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'slim' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
