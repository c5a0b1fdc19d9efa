"""TensorRT and TensorRT-RTX: an ONNX file built into a plan, and a plan opened, through the API they have in common.

Precision stands in the graph alone: networks are strongly typed and the builder gets no precision flag, which TensorRT
11 no longer has. float32 layers may still be computed in TF32, the builder's own default.

What was run: builds of TensorRT-RTX, ahead of time and without a GPU. What was not: TensorRT itself, and `Session`. For
them the tests check every name used here against the public names of TensorRT 10.3, 10.7, 10.16 and 11.4.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from slim.errors import MissingExtra, SlimError, TargetError, UsageError, did_you_mean
from slim.export.session import Port

if TYPE_CHECKING:
    from torch import Tensor

RTX = "tensorrt_rtx"
APIS = {
    "tensorrt": ((10, 3), "it comes with JetPack or NVIDIA's packages, on the device that serves"),
    RTX: ((1, 7), "pip install 'slim[rtx]'"),
}
"""Module -> (oldest version with the API used here, how to get it)."""

ERRORS: list[str] = []
"""What the library called an error since the last build or session began."""

SHOWN = 3
"""Errors that are quoted, the first ones: a graph with one bad operator may hold it a hundred times."""

Progress = Callable[[str, int, int], object]
"""Called with the name of a phase of the build, steps done and steps in all; phases are nested. Raising ends the
build."""


class BuildOptions(BaseModel):
    """What the builder is told beside the graph."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch: tuple[int, int, int] = (1, 1, 1)
    """Smallest, usual and largest batch of every input that leaves it free; a fixed batch must be all three."""
    workspace_mib: int | None = Field(default=None, ge=1)
    """Scratch memory a layer may take, MiB; none leaves it to the builder, which takes what the device has."""
    optimization_level: int = Field(default=3, ge=0, le=5)
    """How long the builder searches, 0 to 5; 3 is its own default. TensorRT-RTX 1.7 builds the same with any."""
    compute_capability: tuple[int, int] | None = None
    """TensorRT-RTX only: the kind of GPU to build for, `(8, 6)`; none is any that TensorRT-RTX knows from 8.0 on."""

    @field_validator("batch")
    @classmethod
    def _ascend(cls, batch: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= batch[0] <= batch[1] <= batch[2]:
            raise ValueError(f"batch {batch} must be smallest <= usual <= largest, all at least 1")
        return batch


DEFAULTS = BuildOptions()

DEVICE = "cuda"
"""Where a session has its memory, as torch calls it."""


@dataclass(frozen=True)
class Engine:
    """A plan and how it came about."""

    plan: bytes = field(repr=False)
    """Serialised engine: opens only with the API, the version and the kind of GPU it was built for."""
    api: str
    version: str
    options: BuildOptions
    layers: list[Any] | None = field(repr=False)
    """What the inspector tells of each layer; none where the plan cannot be opened, as on a machine without a GPU."""
    timing_cache: bytes | None = field(repr=False)
    """The given cache and what this build added; for the same version and GPU only. None for TensorRT-RTX."""


def version(api: str) -> str:
    """Version of the module `api` (`tensorrt` or `tensorrt_rtx`) on this machine.

    Raises:
        UsageError: another module.
        MissingExtra: not installed, or it cannot be loaded.
        TargetError: too old.
    """
    return str(_module(api).__version__)


def build(
    api: str,
    model: Path,
    options: BuildOptions = DEFAULTS,
    *,
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Build the ONNX file `model` with `api`, `tensorrt` or `tensorrt_rtx`.

    TensorRT measures on the GPU of this machine, and `timing_cache` of an earlier engine saves it some of that.
    TensorRT-RTX needs no GPU, and for one batch gives the same bytes each time; for a range it names its temporary
    tensors anew.

    Raises:
        UsageError: no such file, or options that do not fit the graph or the API.
        SlimError: the parser or the builder refuses the graph; the message is theirs.
        TargetError: no builder on this machine, or the module is too old.
        MissingExtra: the module is not installed.
    """
    trt = _module(api)
    if not model.is_file():
        raise UsageError(f"{model}: no such file; give an exported .onnx file")
    ERRORS.clear()
    raised: list[BaseException] = []
    logger = _logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what the bindings make of a null pointer
        raise TargetError(
            f"{api} {trt.__version__}: no builder on this machine: {_reasons()}; build where the engine is served"
        ) from error
    # Required before 11, where it is the only kind of network and the flag is ignored.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)  # holds the weights: it must outlive the build
    if not parser.parse_from_file(str(model)):
        raise SlimError(
            f"{model}: {api} {trt.__version__} cannot read it: {_parse_errors(parser)}; "
            "keep that operation out of the network, or serve it with another runtime"
        )
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress, raised)
    _add_profile(builder, network, config, options, model)
    cache = None if api == RTX else _settle_classic(config, options, timing_cache)
    if api == RTX:
        _settle_rtx(trt, config, options, timing_cache)
    memory = builder.build_serialized_network(network, config)
    if raised:
        raise raised[0]
    if memory is None:
        raise SlimError(
            f"{model}: {api} {trt.__version__} cannot build it: {_reasons()}; "
            "try a smaller batch or more workspace, or serve it with another runtime"
        )
    plan = bytes(memory)
    return Engine(
        plan=plan,
        api=api,
        version=str(trt.__version__),
        options=options,
        layers=_layers(trt, plan),
        timing_cache=None if cache is None else bytes(cache.serialize()),
    )


class Session:
    """A plan opened on the GPU of this machine: an open file as in export/session.py. Memory there is torch's.

    Never executed: no machine with TensorRT and a GPU was at hand. The tests run it on a stand-in that has the names
    and signatures of the real API.
    """

    precision = "as built"
    """The plan holds it."""

    def __init__(self, api: str, plan: bytes) -> None:
        """Open `plan`, which `api` built. Take only plans you built or trust: they are programs.

        Raises:
            TargetError: no GPU here, a plan of another version or GPU, or one whose inputs or outputs are no floats.
            MissingExtra: the module is not installed.
        """
        import torch

        trt = _module(api)
        place = f"{api} {trt.__version__}"
        if not torch.cuda.is_available():
            raise TargetError(f"{place}: torch finds no GPU on this machine; open the plan where it is served")
        ERRORS.clear()
        engine = _open(trt, plan)
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            raise TargetError(
                f"{place}: cannot open the plan: {_reasons()}; a plan is for one version and one kind of GPU: "
                "build it again for these"
            )
        dtypes = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16"}
        ports: dict[bool, list[Port]] = {True: [], False: []}
        for name in [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]:
            dtype = engine.get_tensor_dtype(name)
            if dtype not in dtypes:
                raise TargetError(f"{place}: {name!r} of the plan is {dtype}; slim feeds and reads float32 and float16")
            shape = tuple("batch" if size == -1 else size for size in engine.get_tensor_shape(name))
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            ports[is_input].append(Port(name, dtypes[dtype], shape))
        self.inputs, self.outputs = tuple(ports[True]), tuple(ports[False])
        self._engine = engine  # the context needs it and does not keep it
        self._context = context
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._shapes: list[tuple[int, ...]] = []
        self._memory: dict[str, Tensor] = {}

    def call(self, feeds: list[Any]) -> list[Any]:
        """One call, copies to and from the GPU included: an array for each input, an array for each output.

        Raises:
            UsageError: an input of another type, or of a shape the plan was not built for.
            SlimError: the call failed.
        """
        import numpy as np
        import torch

        for port, feed in zip(self.inputs, feeds, strict=True):
            if feed.dtype.name != port.dtype:
                raise UsageError(f"plan: input {port.name!r} is {feed.dtype.name}, the plan takes {port.dtype}")
        with torch.cuda.stream(self._stream):
            shapes = [tuple(feed.shape) for feed in feeds]
            if shapes != self._shapes:
                self._bind(shapes)
            for port, feed in zip(self.inputs, feeds, strict=True):
                self._memory[port.name].copy_(torch.from_numpy(np.require(feed, requirements=("C", "W"))))
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise SlimError("plan: the call failed on the GPU; look at its memory and at its driver's log")
            return [self._memory[port.name].to("cpu", copy=True).numpy() for port in self.outputs]  # waits for the call

    def _bind(self, shapes: list[tuple[int, ...]]) -> None:
        """Memory for inputs of these shapes, and for the outputs that follow from them."""
        import torch

        self._shapes = []
        for port, shape in zip(self.inputs, shapes, strict=True):
            if not self._context.set_input_shape(port.name, shape):
                raise UsageError(
                    f"plan: input {port.name!r} is {shape}, the plan was built for {port.shape}; see its batches"
                )
        for port in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(port.name))
            self._memory[port.name] = torch.empty(shape, dtype=getattr(torch, port.dtype), device=DEVICE)
            self._context.set_tensor_address(port.name, self._memory[port.name].data_ptr())
        self._shapes = shapes


def _module(api: str) -> Any:
    if api not in APIS:
        raise UsageError(f"tensorrt: unknown API {api!r}{did_you_mean(api, APIS)}")
    oldest, remedy = APIS[api]
    try:
        trt = importlib.import_module(api)
    except ImportError as error:
        raise MissingExtra(f"{api} cannot be imported: {_line(error)}; {remedy}") from error
    found = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if found < oldest:
        raise TargetError(f"{api} {trt.__version__} is too old; slim needs {'.'.join(map(str, oldest))} or newer")
    return trt


def _add_profile(builder: Any, network: Any, config: Any, options: BuildOptions, model: Path) -> None:
    """One profile with the batches of `options` for all free inputs; a graph without any needs none."""
    profile = builder.create_optimization_profile()
    free = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        name, shape = tensor.name, tuple(tensor.shape)
        if -1 in shape[1:]:
            raise UsageError(f"{model}: input {name!r} is {shape}; only the batch may be free, fix the rest")
        if shape[:1] == (-1,):
            profile.set_shape(name, *((size, *shape[1:]) for size in options.batch))
            free = True
        elif shape[:1] * 3 != options.batch:
            raise UsageError(
                f"{model}: input {name!r} is {shape}, the batches {options.batch}; give the fixed one thrice"
            )
    if free and config.add_optimization_profile(profile) < 0:
        raise SlimError(f"{model}: the builder refuses batches {options.batch}; ask for fewer images")


def _settle_rtx(trt: Any, config: Any, options: BuildOptions, timing_cache: bytes | None) -> None:
    """Where TensorRT-RTX differs, all of it: it builds for a GPU by name, and never measures."""
    if timing_cache is not None:
        raise UsageError("tensorrt_rtx: a timing cache is TensorRT's; TensorRT-RTX measures nothing, leave it out")
    if options.compute_capability is None:
        return
    name = "SM{}{}".format(*options.compute_capability)
    known = trt.ComputeCapability.__members__
    if name not in known:
        words = ", ".join(word for word in known if word.startswith("SM"))
        raise UsageError(f"tensorrt_rtx: compute capability {options.compute_capability}: {name} is none of {words}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)


def _settle_classic(config: Any, options: BuildOptions, timing_cache: bytes | None) -> Any:
    """Timing cache of the build, to be kept until it is done."""
    if options.compute_capability is not None:
        raise UsageError("tensorrt: compute capability is TensorRT-RTX's; TensorRT builds for the GPU it runs on")
    cache = config.create_timing_cache(timing_cache or b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UsageError(
            "tensorrt: the timing cache is another version's or GPU's; leave it out, and keep one for each"
        )
    return cache


def _open(trt: Any, plan: bytes) -> Any:
    """The engine of `plan`, or none where this machine cannot open it."""
    try:
        runtime = trt.Runtime(_logger(trt))
    except TypeError:  # what the bindings make of a null pointer
        return None
    return runtime.deserialize_cuda_engine(plan)


def _layers(trt: Any, plan: bytes) -> list[Any] | None:
    engine = _open(trt, plan)
    if engine is None:
        return None
    told = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return list(json.loads(told)["Layers"])


def _parse_errors(parser: Any) -> str:
    lines = []
    for index in range(min(parser.num_errors, SHOWN)):
        error = parser.get_error(index)
        node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
        lines.append(node + _line(error.desc()))
    more = parser.num_errors - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


@cache
def _logger(trt: Any) -> Any:
    """The one logger of the process; it keeps errors and drops the rest, where the library's own would print.

    Never a second one: the library says so to it under a lock, and should Python just then collect a builder that an
    old exception still held, its destructor waits for that lock for ever (seen with TensorRT-RTX 1.7).
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                ERRORS.append(_line(msg))

    return Log()


def _monitor(trt: Any, progress: Progress, raised: list[BaseException]) -> Any:
    """A monitor that calls `progress`. What it raises ends the build and waits in `raised`: C++ cannot pass it on."""
    sizes: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            sizes[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return not raised

        def phase_finish(self, phase_name: str) -> None:
            self.tell(phase_name, sizes[phase_name])

        def tell(self, phase: str, done: int) -> None:
            if not raised:
                try:
                    progress(phase, done, sizes[phase])
                except BaseException as error:
                    raised.append(error)

    return Monitor()


def _reasons() -> str:
    return "; ".join(ERRORS[:SHOWN]) or "it gives no reason"


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]
