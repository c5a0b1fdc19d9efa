"""A network as one ONNX file: traced with a free batch, optimised, checked, stripped of the building machine.

The file is the same to the last byte each time the same network is exported. It is traced by torch.export; where that
fails, or the file computes something else, with attention written out; and where that fails, by TorchScript.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor, nn

from slim.artifact import Preprocessing
from slim.errors import ParityError, SlimError, StoreError, TargetError, UsageError
from slim.export.ladder import SCOPES_KEY, SCRIPT_OPSET, copied, merged, script, unfused
from slim.export.parity import expected, parity
from slim.export.target import Target
from slim.measurement import Measurement
from slim.store import write_bytes
from slim.surgery import in_eval

OPSET = 20
"""Newest opset whose attention still builds everywhere: from 23 on it is one op that TensorRT refuses in fp32."""

MAX_BYTES = 1_900_000_000
"""A protobuf message ends at 2 GiB; beyond it the values would need a second file, which gets lost on the way."""

TRACED_BATCH = 2
"""Never 1: a dimension of 1 is taken for a constant."""

NOISY = ("torch", "onnxscript", "onnx_ir")
"""Loggers that tell of the exporter's inner life."""

RULES_KEY = "pkg.onnxscript.rewriter.rule_name"


@dataclass(frozen=True)
class Port:
    """An input or output of the graph."""

    name: str
    dtype: str
    """numpy's name: `float32`."""
    shape: tuple[int | str, ...]
    """A free dimension is a word: `("batch", 3, 224, 224)`."""


@dataclass(frozen=True)
class OnnxFile:
    """An exported file and what was read back from it."""

    path: Path
    sha256: str
    size_bytes: int
    opset: int
    ir_version: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    batch_range: tuple[int, int]
    """Smallest and largest batch the network was traced for."""
    nodes: int
    scopes: dict[str, str]
    """Node name -> name of the torch module it came from, as in `named_modules`; empty for the network itself."""
    route: str
    """How it was traced: `dynamo`, `dynamo, attention not fused` or `torchscript`."""
    branches: str
    """`merged` where timm merged branches and norms of the network before, so that `scopes` names what they became, or
    `merged, but for ...`; why they were left, where they were; empty where there are none."""
    parity: Measurement | None
    """Against torch, on the images that were given."""


def export_onnx(
    model: nn.Module,
    path: Path,
    preprocessing: Preprocessing,
    *,
    batch_range: tuple[int, int] = (1, 64),
    images: Tensor | None = None,
) -> OnnxFile:
    """Write `model` to `path`: input `image` (batch, C, H, W) float32, output `logits` (batch, classes).

    `model` takes the size of `preprocessing` and returns one tensor; it is left as it was. An existing file is replaced
    only when the new one is whole, and computes in ONNX Runtime what `model` computes on `images` (B, C, H, W) float32,
    where these are given.

    Raises:
        SlimError: the network cannot be traced, fixes its batch, is too large for one file, or got another opset.
        ParityError: what could be traced computes something else, or the network's own logits are not finite.
        StoreError: the file cannot be written.
        UsageError: `batch_range` does not hold the traced batch, or `images` are not of the size that `model` takes.
        MissingExtra: there are images, but no ONNX Runtime.
    """
    name = type(model).__name__
    low, high = batch_range
    if not 1 <= low <= TRACED_BATCH < high:
        raise UsageError(f"export: batch range {low}..{high} must start at 1 or {TRACED_BATCH} and end above it")
    _fit(name, sum(value.numel() * value.element_size() for value in model.state_dict().values()))
    with quiet():
        network, branches = merged(model, preprocessing.size)
    failures: dict[str, SlimError] = {}
    for route, opset, traced in _routes(network, preprocessing.size, batch_range):
        try:
            with quiet():
                proto = traced()
                scopes = {node.name: _scope(node) for node in proto.graph.node}
                _strip(proto)
                onnx.checker.check_model(proto, full_check=True)
        except Exception as error:  # the exporter raises what any operator in the network raises
            failures[route] = error if type(error) is SlimError else SlimError(reason(error))
            continue
        inputs, outputs = _ports(proto.graph.input), _ports(proto.graph.output)
        if fixed := _check(name, proto, inputs, outputs, opset):
            failures[route] = SlimError(fixed)
            continue
        data = proto.SerializeToString(deterministic=True)
        found = _written(model, path, data, images)
        if isinstance(found, SlimError):
            failures[route] = found
            continue
        return OnnxFile(
            path=path,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            opset=opset,
            ir_version=proto.ir_version,
            inputs=inputs,
            outputs=outputs,
            batch_range=batch_range,
            nodes=len(proto.graph.node),
            scopes=scopes,
            route=route,
            branches=branches,
            parity=found,
        )
    raise _failed(name, failures)


Route = tuple[str, int, Callable[[], onnx.ModelProto]]
"""Its name, the opset it must give, and what traces a copy of the network."""


def _routes(model: nn.Module, size: tuple[int, ...], batch_range: tuple[int, int]) -> Iterator[Route]:
    def dynamo(copy: nn.Module | None) -> onnx.ModelProto:
        if copy is None:
            raise SlimError("no module of it fuses attention")
        with in_eval(copy):
            return trace(copy, size, batch_range)

    yield "dynamo", OPSET, lambda: dynamo(copied(model))
    yield "dynamo, attention not fused", OPSET, lambda: dynamo(unfused(model))
    yield "torchscript", SCRIPT_OPSET, lambda: script(unfused(model) or model, size)


def _failed(name: str, failures: dict[str, SlimError]) -> SlimError:
    reasons = "; ".join(f"{route}: {error}" for route, error in failures.items())
    *_, last = failures.values()
    way_out = "make `forward` one that torch.export can trace, and that computes the same while it is traced"
    kind = ParityError if isinstance(last, ParityError) else SlimError
    return kind(f"export: {name} cannot be written as ONNX: {reasons}; {way_out}")


def _fit(name: str, size_bytes: int) -> None:
    if size_bytes > MAX_BYTES:
        raise SlimError(
            f"export: {name} holds {size_bytes / 1e9:.3g} GB of values, one ONNX file holds at most "
            f"{MAX_BYTES / 1e9:.3g} GB; compress the network first or take a smaller backbone"
        )


def _written(model: nn.Module, path: Path, data: bytes, images: Tensor | None) -> Measurement | SlimError | None:
    """Put `data` at `path` and return its parity, if it is to be asked; or why the file is not what it should be."""
    if images is None:
        write_bytes(path, data)
        return None
    candidate = path.with_name(f".{path.stem}.{os.getpid()}.onnx")
    try:
        write_bytes(candidate, data)
        found = _parity(copied(model), candidate, images)
        if isinstance(found, SlimError):
            return _about(path, candidate, found)
        candidate.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}; nothing was replaced") from error
    except SlimError as error:
        raise _about(path, candidate, error) from error
    finally:
        candidate.unlink(missing_ok=True)
    return found


def _parity(model: nn.Module, path: Path, images: Tensor) -> Measurement | SlimError:
    try:
        return parity(model, path, images, target=Target.parse("ort:cpu"))
    except (UsageError, TargetError):  # of the images or this machine: no other trace would help
        raise
    except SlimError as error:
        expected(model, images)  # raises where the network's own logits are not finite, which no other trace mends
        return type(error)(str(error).partition(", so the file")[0])


def _about(path: Path, candidate: Path, error: SlimError) -> SlimError:
    return type(error)(str(error).replace(str(candidate), str(path)))


def read_ports(path: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of the file at `path`. Raises StoreError when it is not a whole ONNX file."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise StoreError(f"{path}: not a whole ONNX file ({error}); export it again") from error
    return _ports(graph.input), _ports(graph.output)


def trace(model: nn.Module, size: tuple[int, ...], batch_range: tuple[int, int]) -> onnx.ModelProto:
    """The graph of `model` for inputs (batch, *size), optimised; with the exporter's notes still in it."""
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    batch = torch.export.Dim("batch", min=batch_range[0], max=batch_range[1])
    # Without a file name the graph stays in memory, with its values: nothing is written before it was checked.
    program = torch.onnx.export(
        model,
        (torch.zeros(TRACED_BATCH, *size, device=device),),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        opset_version=OPSET,
        optimize=True,
        input_names=["image"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None  # only the old exporter returns nothing
    proto: onnx.ModelProto = program.model_proto
    return proto


def _check(
    name: str, proto: onnx.ModelProto, inputs: tuple[Port, ...], outputs: tuple[Port, ...], opset: int
) -> str | None:
    """How the batch is fixed, where it is: by the trace, and another may leave it free. Raises for the rest."""
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        found = ", ".join(str(port.shape) for port in outputs)
        raise SlimError(f"export: {name} returns {found}; a backbone returns one tensor (batch, classes)")
    if (obtained := _opset(proto)) != opset:
        raise SlimError(
            f"export: {name} came out with opset {obtained}, asked was {opset}; this torch cannot write it, "
            "update torch"
        )
    _fit(name, proto.ByteSize())
    for port in (*inputs, *outputs):
        if port.shape[0] != "batch":
            return (
                f"it fixes its batch: {port.name!r} came out as {port.shape}; "
                "reshape with -1 for the batch, as in x.flatten(1)"
            )
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed, logged or warned: what matters of it is the reason in the error."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            # torch.export warns about its own internals (deprecated pytree calls, attributes a network caches); where
            # the user's filter makes errors of warnings, they would end an export that works.
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def reason(error: BaseException) -> str:
    """Type and first line of the innermost cause; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.;')[:300]}" if lines else type(error).__name__


def _scope(node: onnx.NodeProto) -> str:
    notes = {entry.key: entry.value for entry in node.metadata_props}
    # A folded batch norm leaves its own name on the convolution; the weight still has the convolution's.
    if "FuseBatchNorm" in notes.get(RULES_KEY, "") and len(node.input) > 1 and "." in node.input[1]:
        return str(node.input[1]).rpartition(".")[0]
    *modules, _operation = ast.literal_eval(notes.get(SCOPES_KEY, "[]")) or [""]
    return str(modules[-1]) if modules and not modules[-1].startswith("_empty_nn_module_stack") else ""


def _strip(message: Any) -> None:
    """Remove notes at every depth: stack traces with this machine's paths, the text of the traced program."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _opset(proto: onnx.ModelProto) -> int:
    return next((int(entry.version) for entry in proto.opset_import if entry.domain == ""), 0)


def _ports(values: Iterable[onnx.ValueInfoProto]) -> tuple[Port, ...]:
    ports = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or int(dim.dim_value) for dim in tensor.shape.dim)
        ports.append(Port(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape))
    return tuple(ports)
