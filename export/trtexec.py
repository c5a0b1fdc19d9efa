"""`trtexec`, the program NVIDIA ships with TensorRT: its command lines for versions 10 and 11, and its results.

From 10 to 11 the same command line changed its meaning: copies to and from the device went from timed to left out, CUDA
graphs and spinning from off to on. So each setting of a `Protocol` is written out for the version at hand, and
`verify_protocol` reads back from the log what was in force. Nothing is run here: the argument lists, which need no
shell, serve this machine and a remote one alike.

Flags, formats and defaults: github.com/NVIDIA/TensorRT, samples/common, releases 10.3, 10.16, 11.0 and 11.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from slim.errors import SlimError, StoreError, TargetError, UsageError

SWITCHES: dict[int, dict[str, tuple[str, str]]] = {
    10: {
        "transfers": ("", "--noDataTransfers"),
        "cuda_graph": ("--useCudaGraph", ""),
        "spin_wait": ("--useSpinWait", ""),
    },
    11: {
        "transfers": ("--includeDataTransfers", ""),
        "cuda_graph": ("", "--noCudaGraph"),
        "spin_wait": ("", "--noSpinWait"),
    },
}
"""Major version -> setting -> flag that turns it on, flag that turns it off; no flag where that is the default."""

STRONGLY_TYPED: dict[int, list[str]] = {10: ["--stronglyTyped"], 11: []}
"""The graph alone decides precision: asked for in 10, always so in 11."""

SEPARATE_PROFILE: dict[int, list[str]] = {10: ["--separateProfileRun"], 11: []}
"""Layers are timed in a run of their own: asked for in 10, which writes no times otherwise; always so in 11."""

LOGGED = {"transfers": "Data transfers", "cuda_graph": "CUDA Graph", "spin_wait": "Spin-wait"}
"""Setting -> its name in the log."""

ROUNDING = 1e-3
"""Largest difference of a latency from the sum of its parts, as a share: each is printed with six digits."""


class Protocol(BaseModel):
    """How an engine is timed; times are comparable only if their protocols are equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    warm_up_ms: int = Field(default=200, ge=0)
    """Time run and thrown away before timing, milliseconds, 0 or more."""
    duration_s: int = Field(default=3, ge=0)
    """Least time to measure for, seconds, 0 or more."""
    iterations: int = Field(default=10, ge=1)
    """Least number of timed calls, 1 or more."""
    transfers: bool = False
    """Time the copies to and from the device as well; left out, as they depend on the server and not on the network."""
    cuda_graph: bool = False
    """Launch all kernels as one CUDA graph; off, as a plain call of the engine pays for each launch."""
    spin_wait: bool = True
    """Wait for the device by spinning; on, as a thread that must wake up first adds noise to short calls."""


class Sample(BaseModel):
    """One timed call."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    compute_ms: float = Field(alias="computeMs", gt=0)
    """On the device, from the first kernel to the last."""
    h2d_ms: float = Field(alias="h2dMs", ge=0)
    """Copy of the input to the device; 0 without transfers."""
    d2h_ms: float = Field(alias="d2hMs", ge=0)
    """Copy of the output from the device; 0 without transfers."""
    latency_ms: float = Field(alias="latencyMs", gt=0)
    """The sum of the three."""
    start_enqueue_ms: float = Field(alias="startEnqMs")
    """When the host began to hand over the call, since the run began."""
    end_enqueue_ms: float = Field(alias="endEnqMs")
    """When it had done so. Where that takes as long as `compute_ms`, the host is what was timed."""


class LayerTime(BaseModel):
    """One layer of the engine over all profiled calls; fusion makes one layer of many modules."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    name: str
    average_ms: float = Field(alias="averageMs", ge=0)
    """Mean time of one call."""
    median_ms: float = Field(alias="medianMs", ge=0)
    """Median time of one call."""
    percent: float = Field(alias="percentage", ge=0)
    """Share of all layers' time, in percent."""


_SAMPLES = TypeAdapter(list[Sample])
_ROWS = TypeAdapter(list[dict[str, Any]])
_LAYERS = TypeAdapter(list[LayerTime])


def build_command(
    trtexec: str,
    major: int,
    model: PurePath,
    engine: PurePath,
    *,
    batch: tuple[int, int, int] | None,
    input_name: str = "image",
    size: tuple[int, ...] = (3, 224, 224),
    timing_cache: PurePath | None = None,
) -> list[str]:
    """Arguments that build `engine` from the ONNX file `model` and run nothing. No flag sets a precision.

    `batch`: smallest, usual and largest batch of an input (batch, *size); none where the file fixes its batch.

    Raises:
        TargetError: a major version without an entry here.
        UsageError: batches out of order, or a name the command line cannot hold.
    """
    _check_major(major)
    shapes = []
    if batch is not None:
        smallest, usual, largest = batch
        if not 1 <= smallest <= usual <= largest:
            raise UsageError(f"trtexec: batches {batch} must be smallest, usual, largest, from 1 up; put them in order")
        named = {"min": smallest, "opt": usual, "max": largest}
        shapes = [f"--{word}Shapes={_shape(input_name, (images, *size))}" for word, images in named.items()]
    return [
        trtexec,
        f"--onnx={model}",
        f"--saveEngine={engine}",
        *STRONGLY_TYPED[major],
        "--skipInference",
        # Layer times name the ONNX nodes of each layer, which lead back to the modules of the network.
        "--profilingVerbosity=detailed",
        *shapes,
        *([f"--timingCacheFile={timing_cache}"] if timing_cache else []),
    ]


def time_command(
    trtexec: str,
    major: int,
    engine: PurePath,
    protocol: Protocol,
    *,
    times: PurePath,
    layers: PurePath | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> list[str]:
    """Arguments that time `engine` and write JSON: every call to `times`, every layer to `layers`.

    `shapes`: input name -> shape; none where the file fixes its batch. An engine with a free batch that is not told
    one is timed at 1 without a word.

    Raises:
        TargetError: a major version without an entry here.
        UsageError: a name the command line cannot hold.
    """
    _check_major(major)
    switches = [flags[0] if getattr(protocol, name) else flags[1] for name, flags in SWITCHES[major].items()]
    return [
        trtexec,
        f"--loadEngine={engine}",
        *([f"--shapes={','.join(_shape(name, shape) for name, shape in shapes.items())}"] if shapes else []),
        f"--warmUp={protocol.warm_up_ms}",
        f"--duration={protocol.duration_s}",
        f"--iterations={protocol.iterations}",
        *filter(None, switches),
        f"--exportTimes={times}",
        *([*SEPARATE_PROFILE[major], f"--exportProfile={layers}"] if layers else []),
    ]


def parse_times(text: str, *, place: str) -> list[Sample]:
    """The calls of `--exportTimes`, in the order they were made; those of the warm-up are not in the file.

    Raises:
        StoreError: not such a file, cut short, without a call, or with values that are no times. It names `place`.
    """
    with _reading(place):
        samples = _SAMPLES.validate_json(text)
    if not samples:
        raise StoreError(f"{place}: no call after the warm-up; time the engine for longer")
    for number, sample in enumerate(samples):
        parts_ms = sample.h2d_ms + sample.compute_ms + sample.d2h_ms
        if abs(sample.latency_ms - parts_ms) > ROUNDING * parts_ms:
            raise StoreError(
                f"{place}: {number}.latencyMs is {sample.latency_ms:g}, its parts are {parts_ms:g} together; "
                "this version means something else by it, use trtexec 10 or 11"
            )
    return samples


def parse_layers(text: str, *, place: str) -> list[LayerTime]:
    """The layers of `--exportProfile`, in the order they run.

    Raises:
        StoreError: not such a file, cut short, without a layer, or with values that are no times. It names `place`.
    """
    with _reading(place):
        rows = _ROWS.validate_json(text)
        layers = _LAYERS.validate_python(rows[1:])
    if not layers or "count" not in rows[0]:
        raise StoreError(f"{place}: not a count of calls and then the layers; profile the engine again")
    return layers


def parse_version(text: str) -> tuple[int, ...]:
    """Major, minor, patch and, from 10.4 on, build number, of whatever trtexec printed; `--help` is enough.

    Raises:
        TargetError: no trtexec printed this.
    """
    found = re.search(r"TensorRT\.trtexec \[TensorRT v(\d+)\](?: \[b(\d+)\])?", text)
    if not found:
        first = next((line.strip()[:100] for line in text.splitlines() if line.strip()), "")
        raise TargetError(
            f"trtexec: {first!r} names no TensorRT version; give the path of trtexec, often /usr/src/tensorrt/bin"
        )
    number = int(found[1])
    # Two digits each for minor and patch; before 10 the minor had one.
    thousands, minor = (10_000, number // 100 % 100) if number >= 100_000 else (1_000, number // 100 % 10)
    return (number // thousands, minor, number % 100, *([int(found[2])] if found[2] else []))


def verify_protocol(log: str, protocol: Protocol, *, place: str) -> None:
    """Compare what trtexec says it did, in `log`, with what was asked.

    Raises:
        SlimError: something else was in force, or the log does not say. It names `place`.
    """
    asked: dict[str, float] = {name: getattr(protocol, name) for name in type(protocol).model_fields}
    found: dict[str, float] = {}
    for name, word in LOGGED.items():
        if match := re.search(rf"\b{word}: (Enabled|Disabled)$", log, re.MULTILINE):
            found[name] = match[1] == "Enabled"
    if match := re.search(r"\bIterations: (\d+)$", log, re.MULTILINE):
        found["iterations"] = int(match[1])
    if match := re.search(r"\bDuration: (\S+)s \(\+ (\S+)ms warm up\)$", log, re.MULTILINE):
        found |= {"duration_s": float(match[1]), "warm_up_ms": float(match[2])}
    # An engine whose kernels cannot be captured is timed without a graph, after a warning.
    if found.get("cuda_graph") and "Successfully captured CUDA graph" not in log:
        found["cuda_graph"] = False
    wrong = [name for name in asked if asked[name] != found.get(name)]
    if wrong:
        raise SlimError(
            f"{place}: trtexec says {', '.join(f'{name}={found.get(name)}' for name in wrong)}, asked was "
            f"{', '.join(f'{name}={asked[name]}' for name in wrong)}; the times mean something else, do not use them"
        )


def _check_major(major: int) -> None:
    if major not in SWITCHES:
        raise TargetError(
            f"trtexec: TensorRT {major} is not known here, {' and '.join(map(str, SWITCHES))} are; install one of them"
        )


def _shape(name: str, shape: tuple[int, ...]) -> str:
    if not name or set(name) & set(",'"):
        raise UsageError(f"trtexec: input {name!r} cannot be named on its command line; rename it, without , and '")
    return f"{name}:{'x'.join(map(str, shape))}"


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        spot = ".".join(map(str, first["loc"])) or "the file"
        raise StoreError(f"{place}: not what trtexec writes: {spot}: {first['msg']}; time the engine again") from error
