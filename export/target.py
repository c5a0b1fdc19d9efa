"""Target: the runtime, device, threads and batch a network will be served with.

Written `runtime[:device][,threads=N,batch=N,precision=fp32]`.
"""

from __future__ import annotations

import re
from importlib import metadata, util
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slim.errors import MissingExtra, UsageError, did_you_mean

RUNTIMES = {"ort:cpu": ("onnxruntime", "pip install 'slim[cpu]'")}
"""`runtime:device` -> (module that runs it, how to get that module)."""

OPTIONS = {"threads": "threads=N", "batch": "batch=N", "precision": "precision=fp32"}
"""Option -> how it is written."""

DEFAULT_DEVICE = {"ort": "cpu"}


class Target(BaseModel):
    """Where a network is served; two measurements are comparable only if their targets are equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    runtime: str
    """`ort`."""
    device: str
    """`cpu`."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Threads one call may use. One by default: it repeats best, and what differs between machines is then stated."""
    batch: int = Field(default=1, ge=1, le=65536)
    """Images in one call."""
    precision: Literal["fp32"] = "fp32"
    """Arithmetic of the runtime; INT8 belongs to the model, not to the target."""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Target from the words of `--target`.

        Raises:
            UsageError: not of the form above, or a runtime slim does not know.
        """
        if "@" in text:
            raise UsageError(f"target {text!r}: remote hosts are not supported by this version; run slim on the device")
        head, *pairs = text.split(",")
        runtime, _, device = head.partition(":")
        device = device or DEFAULT_DEVICE.get(runtime, "")
        name = f"{runtime}:{device}" if device else runtime
        if name not in RUNTIMES:
            raise UsageError(f"target {text!r}: unknown runtime {name!r}{did_you_mean(name, RUNTIMES)}")
        fields: dict[str, str] = {}
        for pair in pairs:
            match = re.fullmatch(r"(\w+)=(\w+)", pair)
            if not match:
                raise UsageError(f"target {text!r}: {pair!r} is not {' or '.join(OPTIONS.values())}")
            if match[1] not in OPTIONS:
                raise UsageError(f"target {text!r}: unknown option {match[1]!r}{did_you_mean(match[1], OPTIONS)}")
            if match[1] in fields:
                raise UsageError(f"target {text!r}: {match[1]!r} is given twice; keep one")
            fields[match[1]] = match[2]
        try:
            return cls.model_validate({"runtime": runtime, "device": device, **fields})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"target {text!r}: {first['loc'][0]}={first['input']}: {first['msg']}") from error

    def __str__(self) -> str:
        return f"{self.runtime}:{self.device},threads={self.threads},batch={self.batch},precision={self.precision}"

    def probe(self) -> str:
        """Version of the runtime on this machine.

        Raises:
            MissingExtra: the runtime is not installed; the message says how to install it.
        """
        module, remedy = RUNTIMES[f"{self.runtime}:{self.device}"]
        if util.find_spec(module) is None:
            raise MissingExtra(f"target {self}: {module} is not installed; {remedy}")
        for distribution in (module, f"{module}-gpu"):
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return "unknown"
