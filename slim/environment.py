"""What a figure depends on: the machine and the versions of everything that matters."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
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
    "openvino",
    "tensorrt-rtx",
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
    """The processor of this machine; see `processor`."""
    path = Path("/proc/cpuinfo")
    board = Path("/proc/device-tree/model")
    return processor(
        cpuinfo=path.read_text() if path.exists() else "",
        name=platform.processor(),
        arch=platform.machine(),
        cores=usable_cores(),
        system=f"{platform.system()} {platform.release()}",
        board=board.read_text(errors="replace").strip("\0\n ") if board.exists() else "",
    )


def processor(*, cpuinfo: str, name: str, arch: str, cores: int, system: str, board: str) -> dict[str, Any]:
    """A processor: model, architecture, usable cores, instruction sets that change latency, and the board it is on.

    cpuinfo: text of /proc/cpuinfo, empty where there is none. board: what the device tree calls it, empty on a PC; all
    that tells one ARM device from another.
    """
    first = cpuinfo.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in pairs}
    flags = set(known.get("flags", "").split())
    notable = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "cpu": known.get("model name", name or arch),
        "arch": arch,
        "cores": cores,
        "isa": [flag for flag in notable if flag in flags],
        "os": system,
        **({"board": board} if board else {}),
    }


def usable_cores() -> int:
    """Cores this process may run on, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(of: Mapping[str, Any] | None = None) -> str:
    """Twelve hex digits that are equal on machines whose latencies may be compared; of this one where none is given."""
    counted = {key: value for key, value in (of or device()).items() if key != "os"}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]


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
