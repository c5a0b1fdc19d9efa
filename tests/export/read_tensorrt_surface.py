"""Print the public names of a TensorRT module as JSON: what the adapter may use, for checks without the library.

    python tests/export/read_tensorrt_surface.py tensorrt > tests/export/tensorrt_surface/tensorrt-11.4.json

The bindings of a version are an ordinary wheel (`pip download --no-deps tensorrt_cu13_bindings==11.4.*`, module
`tensorrt_bindings`). Without the libraries they load against three empty ones, which export the nine functions that
`nm -D --undefined-only tensorrt.so` lists. Only names are taken: of classes, members, parameters and results.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from types import ModuleType
from typing import Any

# fmt: off
CLASSES = (
    "Builder", "Dims", "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory",
    "ILogger", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache", "Logger",
    "OnnxParser", "ParserError", "Runtime",
)
"""What can be met on the way from an ONNX file to a call on the device."""
ENUMS = (
    "BuilderFlag", "ComputeCapability", "DataType", "HardwareCompatibilityLevel", "ILogger.Severity",
    "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "TensorIOMode",
)
# fmt: on
SKIPPED = re.compile(r"_(?!_init__$)|(add|are|get|mark|set|unmark)_\w*(debug|plugin|refittable|weights)|add_(?!optimi)")
"""Members left out: private ones, layers added by hand, debugging, plugins, refitting."""
PLACE = re.compile(r"\w*tensorrt\w*\.|\w+::")
RENAMED = {"IBuilder": "Builder", "IParserError": "ParserError"}
"""Classes that some signatures call by their name in C++."""


def surface(module: ModuleType, api: str) -> dict[str, Any]:
    """Names of `module` as JSON: everything at the top, members of CLASSES with their signatures, of ENUMS."""
    classes = {name: getattr(module, name) for name in CLASSES}
    return {
        "api": api,
        "version": module.__version__,
        "names": " ".join(name for name in dir(module) if not name.startswith("_")),
        "classes": {
            name: {
                member: signature
                for member in dir(found)
                if not SKIPPED.match(member)
                if (signature := _signature(getattr(found, member))) or member != "__init__"
            }
            for name, found in classes.items()
        },
        "enums": {
            path: " ".join(_at(module, path).__members__) for path in ENUMS if hasattr(module, path.partition(".")[0])
        },
    }


def _at(module: ModuleType, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _signature(member: Any) -> str:
    """`network, config -> IHostMemory`, optional parameters as `flags=`, overloads separated by `|`.

    A property is `: int`; what has no documented signature is empty.
    """
    if isinstance(member, property):
        found = re.findall(r"^\(.*?\) -> (.+)$", (member.fget and member.fget.__doc__) or "", re.MULTILINE)
        return f": {_type(found[0])}" if found else ":"
    if hasattr(member, "__members__") or not callable(member):
        return ""
    lines = re.findall(r"^(?:\d+\. )?\w+\(self: [\w.]+(?:, )?(.*)\) -> (.+)$", member.__doc__ or "", re.MULTILINE)
    forms = (f"{', '.join(_parameters(given))} -> {_type(result)}".strip() for given, result in lines)
    return " | ".join(dict.fromkeys(forms))


def _parameters(text: str) -> list[str]:
    """Names in `flags: int = 0, name: Callable[[int], str]`, each with `=` where it may be left out."""
    while text != (flat := re.sub(r"\[[^\[\]]*\]|<[^<>]*>|\([^()]*\)", "", text)):
        text = flat
    return [part.partition(":")[0].strip() + "=" * ("=" in part) for part in text.split(",") if part.strip()]


def _type(text: str) -> str:
    name = PLACE.sub("", text.strip())
    return RENAMED.get(name, name)


if __name__ == "__main__":
    imported = importlib.import_module(sys.argv[1])
    kind = "tensorrt_rtx" if "rtx" in sys.argv[1] else "tensorrt"
    print(json.dumps(surface(imported, kind), indent=0, sort_keys=True))
