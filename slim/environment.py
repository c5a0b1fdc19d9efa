"""What a figure depends on: the machine and the versions of everything that matters."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import slim

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
)
"""Libraries whose version can change a result."""


@cache
def versions() -> dict[str, str]:
    """Version of slim, Python and each library of LIBRARIES that is installed; imports none of them."""
    found = {"slim": slim.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def device() -> dict[str, Any]:
    """The processor of this machine: model, architecture, usable cores, instruction sets that change latency."""
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", "").split())
    notable = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "cpu": cpuinfo.get("model name", platform.processor() or platform.machine()),
        "arch": platform.machine(),
        "cores": usable_cores(),
        "isa": [flag for flag in notable if flag in flags],
        "os": f"{platform.system()} {platform.release()}",
    }


def usable_cores() -> int:
    """Cores this process may run on, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint() -> str:
    """Twelve hex digits that are equal on machines whose latencies may be compared."""
    here = {key: value for key, value in device().items() if key != "os"}
    return hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]


def describe() -> dict[str, Any]:
    """Everything above in one JSON value, with the load and the clock governor of this moment."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "device": device(),
        "fingerprint": fingerprint(),
        "versions": versions(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "governor": governor.read_text().strip() if governor.exists() else None,
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
