"""A served file, opened and called on a runtime: the one place where each runtime is spoken to.

One file that needs Python, numpy and the runtime, nothing of slim: run as a program it is the worker that is copied to
a device, and it commands and answers there as it does here. Commands are JSON, one a line, on standard input; answers
likewise on standard output. A line that says `bytes` is followed by so many bytes of an array.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np

FLOATS = ("float32", "float16", "float64")
"""Types of inputs that timing can make up values for; uint8 gets the whole range of a byte."""


@dataclass(frozen=True)
class Port:
    """An input or output of a served file."""

    name: str
    dtype: str
    """numpy's name: `float32`."""
    shape: tuple[int | str, ...]
    """A free dimension is a word."""


class Session(Protocol):
    """An open file. Calls are in the order of `inputs` and `outputs`."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: str
    """What the runtime computes in, as it says itself, where the file leaves it a choice."""

    def call(self, feeds: list[Any]) -> list[Any]:
        """One call: an array for each input, an array for each output."""


class Unfit(Exception):
    """A file that cannot be given inputs: the user's to mend, unlike a file that is broken."""


class _OnnxRuntime:
    """https://onnxruntime.ai: of `provider` alone, and of the CPU's where that leaves an operator to it."""

    precision = "fp32"

    def __init__(self, path: str, provider: str, *, threads: int, precision: str, mode: str) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # on a device; where slim is imported it has said so
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that wait by spinning take the cores from whatever else is running.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 4  # its errors come back as exceptions; printed as well they would be said twice
        self._session = onnxruntime.InferenceSession(path, options, providers=[provider])
        if (used := self._session.get_providers()[0]) != provider:
            raise RuntimeError(f"{provider} cannot be used here, onnxruntime took {used}")
        self.inputs, self.outputs = (
            tuple(Port(port.name, _numpy_name(port.type), _named(port.shape)) for port in ports)
            for ports in (self._session.get_inputs(), self._session.get_outputs())
        )
        self._names = [port.name for port in self.outputs]

    def call(self, feeds: list[Any]) -> list[Any]:
        named = {port.name: feed for port, feed in zip(self.inputs, feeds)}  # noqa: B905 - also for Python 3.9
        outputs: list[Any] = self._session.run(self._names, named)
        return outputs


def _onnxruntime(provider: str) -> Callable[..., Session]:
    return lambda path, **options: _OnnxRuntime(path, provider, **options)


HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""Words of `precision=` -> OpenVINO's."""


class _OpenVino:
    """https://docs.openvino.ai: an ONNX file compiled for `device` when it is opened."""

    def __init__(self, path: str, *, threads: int, precision: str, mode: str) -> None:
        import openvino

        model = openvino.Core().read_model(path)
        # Its own choice of arithmetic is bf16 where the processor has it, which the figures would not show.
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        compiled = openvino.Core().compile_model(model, "CPU", config)
        self.precision = {hint: word for word, hint in HINTS.items()}[
            compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        ]
        self._request = compiled.create_infer_request()
        self.inputs, self.outputs = (
            tuple(
                Port(port.any_name, port.element_type.to_dtype().name, _dynamic(port.partial_shape)) for port in ports
            )
            for ports in (compiled.inputs, compiled.outputs)
        )

    def call(self, feeds: list[Any]) -> list[Any]:
        found = self._request.infer(feeds, share_inputs=True)
        return [found[index] for index in range(len(self.outputs))]


class _Torch:
    """A program of torch.export: as it is (`eager`), through torch.compile, or compiled ahead of time (`aoti`)."""

    def __init__(self, path: str, device: str, *, threads: int, precision: str, mode: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch, self._device, self.precision = torch, torch.device(device), precision
        if mode == "aoti":
            self._program: Any = torch._inductor.aoti_load_package(path)
        else:
            program = torch.export.load(path).module().to(self._device)
            self._program = torch.compile(program, dynamic=False) if mode == "compiled" else program
        with open(path + ".json") as beside:
            described = json.load(beside)
        self.inputs, self.outputs = (
            tuple(Port(name, dtype, tuple(shape)) for name, dtype, shape in described[ports])
            for ports in ("inputs", "outputs")
        )

    def call(self, feeds: list[Any]) -> list[Any]:
        with self._torch.inference_mode():
            outputs = self._program(self._torch.from_numpy(feeds[0]).to(self._device))
            # Copying back waits for the device: without it a call would end when its kernels were queued.
            return [outputs.cpu().numpy()]


def _torch(device: str) -> Callable[..., Session]:
    return lambda path, **options: _Torch(path, device, **options)


OPENERS: dict[str, Callable[..., Session]] = {
    "ort:cpu": _onnxruntime("CPUExecutionProvider"),
    "ort:cuda": _onnxruntime("CUDAExecutionProvider"),
    "ort:tensorrt": _onnxruntime("TensorrtExecutionProvider"),
    "openvino:cpu": _OpenVino,
    "torch:cpu": _torch("cpu"),
    "torch:cuda": _torch("cuda"),
}
"""Runtime -> what opens a file on it: `opener(path, threads=N, precision=WORD, mode=WORD)`."""


def open_file(opener: str, path: str, *, threads: int, precision: str, mode: str) -> Session:
    """A session of the file at `path`. `opener`: a key of OPENERS, or the `module:function` of another package."""
    if opener in OPENERS:
        function = OPENERS[opener]
    else:
        module, _, name = opener.partition(":")
        function = getattr(importlib.import_module(module), name)
    return function(path, threads=threads, precision=precision, mode=mode)


def staged(session: Session, *, batch: int, seed: int) -> list[Any]:
    """An array for every input, `batch` in the first dimension: standard normal, or bytes where it takes bytes.

    Raises:
        Unfit: a type or a shape that nothing can be made up for.
    """
    generator = np.random.default_rng(seed)
    feeds: list[Any] = []
    for port in session.inputs:
        if port.dtype not in (*FLOATS, "uint8"):
            raise Unfit(f"input {port.name!r} is {port.dtype}; timing needs one of {', '.join(FLOATS)} or uint8")
        if not port.shape:
            raise Unfit(f"input {port.name!r} is a scalar; the first dimension must be the batch")
        first, *rest = port.shape
        if isinstance(first, int) and first != batch:
            raise Unfit(f"input {port.name!r} has batch {first}, the target {batch}; set batch={first} in the target")
        shape = [batch]
        for size in rest:
            if not isinstance(size, int):
                raise Unfit(f"input {port.name!r} leaves {size!r} open; export it with a fixed input size")
            shape.append(size)
        if port.dtype == "uint8":
            feeds.append(np.frombuffer(generator.bytes(math.prod(shape)), np.uint8).reshape(shape))
        else:
            feeds.append(generator.standard_normal(shape).astype(port.dtype))
    return feeds


def _numpy_name(onnx_type: str) -> str:
    """`float32` for ONNX Runtime's `tensor(float)`."""
    inner = onnx_type[len("tensor(") : -1] if onnx_type.startswith("tensor(") else onnx_type
    return {"float": "float32", "double": "float64"}.get(inner, inner)


def _named(shape: Iterable[Any]) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


def _dynamic(shape: Any) -> tuple[int | str, ...]:
    """OpenVINO drops the names of free dimensions."""
    return tuple("batch" if size.is_dynamic else size.get_length() for size in shape)


class _Worker:
    """At most one open session, and the inputs staged for it."""

    session: Session | None = None
    feeds: list[Any]

    def open(self, *, opener: str, path: str, batch: int, seed: int, **served: Any) -> dict[str, Any]:
        self.close()
        session = open_file(opener, path, **served)
        self.feeds = staged(session, batch=batch, seed=seed)
        self.session = session
        ports = {
            name: [[port.name, port.dtype, list(port.shape)] for port in found]
            for name, found in (("inputs", session.inputs), ("outputs", session.outputs))
        }
        return {"precision": session.precision, **ports}

    def run(self, *, calls: int, warm_up: int) -> dict[str, Any]:
        assert self.session is not None, "the parent opens a file first"
        call, feeds = self.session.call, self.feeds
        for _ in range(warm_up):
            call(feeds)
        wall_ms, cpu_ms = [], []
        for _ in range(calls):
            cpu, wall = time.process_time_ns(), time.perf_counter_ns()
            call(feeds)
            wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
            cpu_ms.append((time.process_time_ns() - cpu) / 1e6)
        return {"wall_ms": wall_ms, "cpu_ms": cpu_ms}

    def infer(self, *, dtype: str, shape: list[int], payload: bytes) -> dict[str, Any]:
        """The first output for given values of the only input."""
        assert self.session is not None, "the parent opens a file first"
        given = np.frombuffer(payload, dtype=dtype).reshape(shape)
        outputs = np.ascontiguousarray(self.session.call([given])[0])
        return {"dtype": outputs.dtype.name, "shape": list(outputs.shape), "payload": outputs.tobytes()}

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": _peak_bytes()}

    def close(self) -> dict[str, Any]:
        self.session = None
        gc.collect()
        return {}


def _peak_bytes() -> int | None:
    """Largest resident memory of this process so far; none where the system hides it."""
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), None)


def serve(commands: BinaryIO, answers: BinaryIO) -> None:
    """Answer each command until there are no more."""
    worker = _Worker()
    known: dict[str, Callable[..., dict[str, Any]]] = {
        "open": worker.open,
        "run": worker.run,
        "infer": worker.infer,
        "memory": worker.memory,
        "close": worker.close,
    }
    for line in commands:
        words = json.loads(line)
        if "bytes" in words:
            words["payload"] = commands.read(words.pop("bytes"))
        reply: dict[str, Any]
        try:
            reply = known[words.pop("op")](**words)
        except Unfit as error:
            reply = {"usage": str(error)}
        except ImportError as error:
            reply = {"missing": f"{error}; Python {platform.python_version()} at {sys.executable}"}
        except Exception as error:  # the runtimes' own exceptions share no base class
            reply = {"error": " ".join(str(error).split()) or type(error).__name__}
        payload = reply.pop("payload", None)
        if payload is not None:
            reply["bytes"] = len(payload)
        answers.write(json.dumps(reply).encode() + b"\n" + (payload or b""))
        answers.flush()


def main() -> None:
    """Serve on standard input and output, on the cores given as arguments only if any are."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and the parent ends its workers
    cpus = {int(word) for word in sys.argv[1:]}
    if cpus:
        os.sched_setaffinity(0, cpus)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    gc.disable()
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
