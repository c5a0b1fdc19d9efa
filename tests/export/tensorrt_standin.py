"""A module made from a surface: the names and signatures of one TensorRT version, and just enough behind them.

What is not in the surface raises AttributeError, a call with other arguments TypeError, as in the real bindings. A
plan is the ONNX file itself, and ONNX Runtime computes it from the memory it is given: so an adapter that mixes up
names, shapes, addresses or types gets other numbers.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

SURFACES = Path(__file__).parent / "tensorrt_surface"
CLASSIC = ("10.3", "10.7", "10.16", "11.4")
UNSUPPORTED = "Col2Im"
"""The operator that this parser refuses."""

Surface = dict[str, Any]


def read(api: str, version: str) -> Surface:
    surface: Surface = json.loads((SURFACES / f"{api}-{version}.json").read_text())
    return surface


def forms_of(signature: str) -> list[tuple[list[str], str]]:
    """Parameters and result of each overload; optional parameters end with `=`."""
    halves = [form.partition("->") for form in signature.split("|")]
    return [([name for name in given.strip().split(", ") if name], result.strip()) for given, _, result in halves]


def bind(signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Parameter -> value in the first overload that takes the arguments; none where no overload does."""
    for names, _ in forms_of(signature):
        plain = [name.rstrip("=") for name in names]
        bound = dict(zip(plain, args, strict=False)) | kwargs
        needed = {name for name in names if not name.endswith("=")}
        if len(args) <= len(names) and not {*plain[: len(args)]} & {*kwargs} and needed <= {*bound} <= {*plain}:
            return {name: bound[name] for name in plain if name in bound}
    return None


class StandIn(ModuleType):
    """The module. `calls`: what was called or set, in order, as (`Class.member`, arguments by name)."""

    def __init__(self, surface: Surface, *, gpu: bool = True) -> None:
        super().__init__(surface["api"])
        self.__version__ = surface["version"]
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.gpu = gpu
        for name in surface["names"].split():
            setattr(self, name, object())
        for path, members in surface["enums"].items():
            if "." not in path:
                setattr(self, path, enumeration(path, members))
        for name, members in surface["classes"].items():
            setattr(self, name, self._made(name, members))
        severity = enumeration("Severity", surface["enums"]["ILogger.Severity"])
        for owner in (self.ILogger, self.Logger):
            owner.Severity = severity
            for member in severity:
                setattr(owner, member.name, member)

    def called(self, path: str) -> list[dict[str, Any]]:
        """Arguments of each call of `Class.member`, or values of each assignment to it."""
        return [given for name, given in self.calls if name == path]

    def new(self, name: str, **state: Any) -> Any:
        """An object of a class that only the library itself makes."""
        made = getattr(self, name)
        instance = made.__new__(made)
        instance.__dict__.update(state)
        return instance

    def _made(self, name: str, members: dict[str, str]) -> type:
        behaviour = BEHAVIOUR.get(name, {})
        body: dict[str, Any] = {"_properties": {member for member, form in members.items() if form.startswith(":")}}
        for member, signature in members.items():
            if signature.startswith(":"):
                body[member] = self._property(name, member, behaviour.get(member))
            elif signature:
                body[member] = self._method(name, member, signature, behaviour.get(member))
        if "__init__" not in members:
            body["__init__"] = _no_constructor
        if name == "IHostMemory":
            body["__bytes__"] = lambda memory: memory._bytes  # the real one is a buffer
        return type(name, (Strict,), body)

    def _property(self, owner: str, member: str, behave: Callable[..., Any] | None) -> property:
        def get(instance: Any) -> Any:
            return behave(self, instance) if behave else instance.__dict__.get("_" + member)

        def put(instance: Any, value: Any) -> None:
            self.calls.append((f"{owner}.{member}", {"value": value}))
            instance.__dict__["_" + member] = value

        return property(get, put)

    def _method(self, owner: str, member: str, signature: str, behave: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(instance: Any, *args: Any, **kwargs: Any) -> Any:
            bound = bind(signature, args, kwargs)
            if bound is None:
                raise TypeError(f"{owner}.{member}({signature}): incompatible arguments {args} {kwargs}")
            self.calls.append((f"{owner}.{member}", bound))
            if behave:
                return behave(self, instance, *bound.values())
            result = forms_of(signature)[0][1]
            return self.new(result) if isinstance(getattr(self, result, None), type) else result == "bool" or None

        return call


class Strict:
    """An object that takes no other attributes than its properties, unless Python derived its class."""

    _properties: set[str]

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self).__module__ == __name__ and name not in self._properties:
            raise AttributeError(f"{type(self).__name__} object has no attribute {name!r}")
        super().__setattr__(name, value)


class Numbered(enum.Enum):
    """As pybind11 makes them: no integers, but turned into one."""

    def __int__(self) -> int:
        return int(self.value)


def enumeration(name: str, members: str) -> Any:
    return Numbered(name, [(member, index) for index, member in enumerate(members.split())])  # type: ignore[call-arg]


def _no_constructor(instance: Any, *_: Any) -> None:
    raise TypeError(f"{type(instance).__name__}: No constructor defined!")


# What is behind the names: function(module, object, arguments in their order).


def _register(trt: Any, logger: Any) -> None:
    assert isinstance(logger, trt.ILogger)
    assert trt.__dict__.setdefault("first_logger", logger) is logger, "the library keeps the logger it was first given"


def _builder(trt: Any, builder: Any, logger: Any) -> None:
    _register(trt, logger)
    if not trt.gpu:
        logger.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure\nwith error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    builder.__dict__["_logger"] = logger


def _create_network(trt: Any, builder: Any, flags: int = 0) -> Any:
    return trt.new("INetworkDefinition", _flags=flags, _inputs=[])


def _parser(trt: Any, parser: Any, network: Any, logger: Any) -> None:
    assert isinstance(network, trt.INetworkDefinition)
    parser.__dict__.update(_network=network, _found=[])


def _parse(trt: Any, parser: Any, model: str) -> bool:
    assert isinstance(model, str)
    graph = onnx.load(model)
    parser._network.__dict__.update(
        _model=graph.SerializeToString(),
        _inputs=[
            trt.new("ITensor", _name=value.name, _shape=tuple(dim.dim_value or -1 for dim in shape.dim))
            for value in graph.graph.input
            for shape in [value.type.tensor_type.shape]
        ],
    )
    parser.__dict__["_found"] = [
        trt.new("ParserError", _node=node) for node in graph.graph.node if node.op_type == UNSUPPORTED
    ]
    return not parser._found


def _build(trt: Any, builder: Any, network: Any, config: Any) -> Any:
    """None, and a reason in the log, where the real one refuses as well."""
    profile = config.__dict__.get("_profile")
    free = any(-1 in tensor._shape for tensor in network._inputs)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if (free and profile is None) or not network._flags & strong:
        builder._logger.log(trt.ILogger.Severity.ERROR, "Network has dynamic inputs, but no profile was defined")
        return None
    monitor = config.__dict__.get("_progress_monitor")
    if monitor is not None:
        monitor.phase_start("Building", None, 2)
        if not all([monitor.step_complete("Building", step) for step in range(2)]):
            trt.calls.append(("Builder.cancelled", {}))
            return None
        monitor.phase_finish("Building")
    if "_cache" in config.__dict__:
        config._cache.__dict__["_bytes"] += b" and this build"
    head = json.dumps({"version": trt.__version__, "profile": profile}).encode()
    return trt.new("IHostMemory", _bytes=head + b"\n" + network._model)


def _set_shape(trt: Any, profile: Any, name: str, *shapes: Any) -> None:
    profile.__dict__.setdefault("_shapes", {})[name] = [[*shape] for shape in shapes]


def _add_profile(trt: Any, config: Any, profile: Any) -> int:
    config.__dict__["_profile"] = profile._shapes
    return 0


def _create_cache(trt: Any, config: Any, data: bytes) -> Any:
    return trt.new("ITimingCache", _bytes=data or f"cache of {trt.__version__}".encode())


def _set_cache(trt: Any, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
    config.__dict__["_cache"] = cache
    return ignore_mismatch or cache._bytes.startswith(f"cache of {trt.__version__}".encode())


def _runtime(trt: Any, runtime: Any, logger: Any) -> None:
    _register(trt, logger)
    runtime.__dict__["_logger"] = logger


def _deserialize(trt: Any, runtime: Any, plan: bytes) -> Any:
    head, _, model = plan.partition(b"\n")
    if not head.startswith(b"{") or json.loads(head)["version"] != trt.__version__:
        runtime._logger.log(trt.ILogger.Severity.ERROR, "Serialization assertion failed.\nVersion tag does not match")
        return None
    graph = onnx.load_from_string(model).graph
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    ports = {value.name: value for value in (*graph.input, *graph.output)}
    return trt.new("ICudaEngine", _graph=graph, _ports=ports, _session=session, _profile=json.loads(head)["profile"])


def _dtype(trt: Any, engine: Any, name: str) -> Any:
    kinds = {1: trt.DataType.FLOAT, 10: trt.DataType.HALF, 7: trt.DataType.INT64}
    return kinds[engine._ports[name].type.tensor_type.elem_type]


def _context(trt: Any, engine: Any, strategy: Any = None) -> Any:
    return trt.new("IExecutionContext", _engine=engine, _sizes={}, _addresses={})


def _inspect(trt: Any, inspector: Any, form: Any) -> str:
    assert form is trt.LayerInformationFormat.JSON
    return json.dumps({"Layers": [{"Name": node.name} for node in inspector._engine._graph.node]})


def _shape_of(trt: Any, engine: Any, name: str) -> tuple[int, ...]:
    return tuple(dim.dim_value or -1 for dim in engine._ports[name].type.tensor_type.shape.dim)


def _set_input_shape(trt: Any, context: Any, name: str, shape: tuple[int, ...]) -> bool:
    known = _shape_of(trt, context._engine, name)
    low, _, high = (context._engine._profile or {}).get(name, [known] * 3)
    context._sizes[name] = shape
    return len(shape) == len(known) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def _shape_now(trt: Any, context: Any, name: str) -> tuple[int, ...]:
    batch = next(iter(context._sizes.values()))[0]
    fixed = _shape_of(trt, context._engine, name)
    return tuple(batch if size == -1 else size for size in fixed)


def _set_address(trt: Any, context: Any, name: str, memory: int) -> bool:
    context._addresses[name] = memory, _shape_now(trt, context, name)
    return True


def _execute(trt: Any, context: Any, stream: int) -> bool:
    """The graph, from and to the addresses given."""
    if trt.__dict__.get("out_of_memory"):
        return False
    arrays = {}
    for name, (address, shape) in context._addresses.items():
        assert shape == _shape_now(trt, context, name), f"{name}: the memory is that of another shape"
        dtype = np.float16 if _dtype(trt, context._engine, name) is trt.DataType.HALF else np.float32
        count = int(np.prod(shape))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address))
        arrays[name] = memory.view(dtype).reshape(shape)
    inputs = {value.name: arrays.pop(value.name) for value in context._engine._graph.input}
    for name, result in zip(arrays, context._engine._session.run([*arrays], inputs), strict=True):
        np.copyto(arrays[name], result)
    return True


BEHAVIOUR: dict[str, dict[str, Callable[..., Any]]] = {
    "Builder": {"__init__": _builder, "create_network": _create_network, "build_serialized_network": _build},
    "INetworkDefinition": {
        "num_inputs": lambda trt, network: len(network._inputs),
        "get_input": lambda trt, network, index: network._inputs[index],
    },
    "OnnxParser": {
        "__init__": _parser,
        "parse_from_file": _parse,
        "num_errors": lambda trt, parser: len(parser._found),
        "get_error": lambda trt, parser, index: parser._found[index],
    },
    "ParserError": {
        "desc": lambda trt, error: f"creator && 'no importer for\n{error._node.op_type}'",
        "node_name": lambda trt, error: error._node.name,
        "node_operator": lambda trt, error: error._node.op_type,
    },
    "IBuilderConfig": {
        "add_optimization_profile": _add_profile,
        "create_timing_cache": _create_cache,
        "set_timing_cache": _set_cache,
    },
    "IOptimizationProfile": {"set_shape": _set_shape},
    "ITimingCache": {"serialize": lambda trt, cache: trt.new("IHostMemory", _bytes=cache._bytes)},
    "Runtime": {
        "__init__": _runtime,
        "deserialize_cuda_engine": _deserialize,
    },
    "ICudaEngine": {
        "num_io_tensors": lambda trt, engine: len(engine._ports),
        "get_tensor_name": lambda trt, engine, index: [*engine._ports][index],
        "get_tensor_mode": lambda trt, engine, name: (
            trt.TensorIOMode.INPUT if name in {value.name for value in engine._graph.input} else trt.TensorIOMode.OUTPUT
        ),
        "get_tensor_dtype": _dtype,
        "get_tensor_shape": _shape_of,
        "create_execution_context": _context,
        "create_engine_inspector": lambda trt, engine: trt.new("EngineInspector", _engine=engine),
    },
    "EngineInspector": {"get_engine_information": _inspect},
    "IExecutionContext": {
        "set_input_shape": _set_input_shape,
        "get_tensor_shape": _shape_now,
        "set_tensor_address": _set_address,
        "execute_async_v3": _execute,
    },
    "ILogger": {"__init__": lambda trt, logger: None, "log": lambda trt, logger, severity, text: None},
    "IProgressMonitor": {"__init__": lambda trt, monitor: None},
}
