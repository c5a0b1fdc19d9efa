"""Target: the runtime, device, threads and batch a network will be served with.

Written `runtime[:device][,threads=N,batch=N,precision=fp32][@ssh://[user@]host[:port][/path/of/python]]`.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slim.errors import MissingExtra, TargetError, UsageError, did_you_mean
from slim.export.runtime import Runtime, runtimes

OPTIONS = {"threads": "threads=N", "batch": "batch=N", "precision": "precision=fp32", "mode": "mode=compiled"}
"""Option -> how it is written."""

DEFAULT_DEVICE = {"ort": "cpu", "openvino": "cpu", "torch": "cpu"}


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
    precision: str = "fp32"
    """Arithmetic of the runtime where the file leaves it a choice; INT8 belongs to the model, not to the target."""
    mode: str = ""
    """How a runtime with several ways executes a file; empty where it has one."""
    host: str = ""
    """`ssh://user@host` where it runs on another machine; a path behind it is the Python there that has the runtime."""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Target from the words of `--target`.

        Raises:
            UsageError: not of the form above, or a runtime slim does not know.
        """
        words, _, host = text.partition("@")
        if host and not host.startswith("ssh://"):
            raise UsageError(f"target {text!r}: {host!r} is not ssh://[user@]host[:port][/path/of/python]")
        head, *pairs = words.split(",")
        runtime, _, device = head.partition(":")
        device = device or DEFAULT_DEVICE.get(runtime, "")
        name = f"{runtime}:{device}" if device else runtime
        if name not in runtimes():
            raise UsageError(f"target {text!r}: unknown runtime {name!r}{did_you_mean(name, runtimes())}")
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
        on = runtimes()[name]
        for option, allowed in (("precision", on.precisions), ("mode", on.modes or ("",))):
            if (word := fields.setdefault(option, allowed[0])) not in allowed:
                rule = f"takes {' or '.join(allowed)}" if any(allowed) else f"has no {option}"
                raise UsageError(f"target {text!r}: {option}={word}: {name} {rule}")
        try:
            return cls.model_validate({"runtime": runtime, "device": device, "host": host, **fields})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"target {text!r}: {first['loc'][0]}={first['input']}: {first['msg']}") from error

    def __str__(self) -> str:
        options = f"threads={self.threads},batch={self.batch},precision={self.precision}"
        options += f",mode={self.mode}" if self.mode else ""
        return f"{self.name},{options}" + (f"@{self.host}" if self.host else "")

    @property
    def name(self) -> str:
        """`runtime:device`."""
        return f"{self.runtime}:{self.device}" if self.device else self.runtime

    @property
    def on(self) -> Runtime:
        """What serves it."""
        return runtimes()[self.name]

    def probe(self) -> str:
        """Version of the runtime on this machine, once it is known to run files; of a remote one the device tells.

        Raises:
            MissingExtra: the runtime is not installed; the message says how to install it.
            TargetError: it can build or emit files here, not run them.
        """
        if self.host:
            return "on the device"
        state = self.on.probe()
        if state.level == "missing":
            raise MissingExtra(f"target {self}: {state.reason}; {state.remedy}")
        if state.level != "ready":
            raise TargetError(f"target {self}: {state.level} here: {state.reason}; {state.remedy}")
        return state.version or "unknown"
