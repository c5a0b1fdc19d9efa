"""A worker: one process that runs one side of a comparison, commanded by JSON lines over a pipe.

Two runtimes in one process disturb each other, and a session's speed depends on where its memory happened to land, so
each side has a process of its own and opens its session anew several times. Workers wait passively: a spinning thread
pool steals the core that the other side is being timed on. The child imports numpy and onnxruntime, nothing heavier.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import slim
from slim.errors import SlimError, UsageError

STDERR_TAIL = 400
"""Characters of a dead worker's last words that go into the error."""


@dataclass(frozen=True)
class Calls:
    """Timings of consecutive calls, in ms each."""

    wall_ms: list[float]
    cpu_ms: list[float]
    """Processor time of the worker, all its threads."""


class Worker:
    """The parent's end of a worker process. A context manager: leaving it ends the process, whatever happened."""

    def __init__(self, *, threads: int, cpus: Sequence[int] | None = None) -> None:
        """Start a worker whose calls use `threads` threads, on the cores `cpus` only if given.

        Raises:
            UsageError: cores this process may not use, or a system that cannot bind processes to cores.
        """
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        if cpus and not usable.issuperset(cpus):
            raise UsageError(
                f"cpus {list(cpus)}: usable here are {sorted(usable)}; choose among them, or leave cpus out"
            )
        self._threads = threads
        self._path: Path | None = None
        roots = [str(Path(slim.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A file, not a pipe: a pipe that nobody reads fills up and blocks the worker.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            # -P: a file numpy.py in the user's working directory must not be imported.
            [sys.executable, "-P", "-m", "slim.bench.worker", *map(str, cpus or ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ
            | {
                "OMP_WAIT_POLICY": "PASSIVE",
                "KMP_BLOCKTIME": "0",
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(roots),
            },
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing in a worker needs an orderly end, and a call in progress may take minutes.
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            try:
                if stream:
                    stream.close()
            except BrokenPipeError:
                pass  # a command still buffered for a worker that had died; its death has been reported

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def open(self, path: Path, *, batch: int, seed: int) -> None:
        """Open a session of the ONNX file at `path` and stage its inputs, standard normal from `seed`.

        A session already open is closed first.

        Raises:
            UsageError: no such file, or a graph that does not take this batch.
            SlimError: the runtime cannot open the file, or the worker died.
        """
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give an exported .onnx file")
        self._path = path
        self._ask(op="open", path=str(path), threads=self._threads, batch=batch, seed=seed)

    def run(self, calls: int, *, warm_up: int = 0) -> Calls:
        """`warm_up` calls that are not recorded, then `calls` that are."""
        reply = self._ask(op="run", calls=calls, warm_up=warm_up)
        return Calls(reply["wall_ms"], reply["cpu_ms"])

    def peak_memory_bytes(self) -> int | None:
        """Largest resident memory of the worker so far, its interpreter included; none where the system hides it."""
        found = self._ask(op="memory")["peak_bytes"]
        return None if found is None else int(found)

    def close(self) -> None:
        """Close the session and free its memory; the worker stays."""
        self._ask(op="close")

    def _ask(self, **command: Any) -> dict[str, Any]:
        commands, answers = self._process.stdin, self._process.stdout
        assert commands is not None, "opened as a pipe"
        assert answers is not None, "opened as a pipe"
        try:
            commands.write(json.dumps(command) + "\n")
            commands.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SlimError(self._obituary(command["op"]))
        reply: dict[str, Any] = json.loads(line)
        if "usage" in reply:
            raise UsageError(f"{self._path}: {reply['usage']}")
        if "error" in reply:
            raise SlimError(f"{self._path}: ONNX Runtime cannot {command['op']} it: {reply['error']}")
        return reply

    def _obituary(self, op: str) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        words = " ".join(self._stderr.read().decode(errors="replace").split())[-STDERR_TAIL:]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        remedy = (
            "out of memory? try a smaller batch" if code == -signal.SIGKILL else "try the file in onnxruntime alone"
        )
        return f"{self._path or 'bench'}: worker ended by {how} during {op!r}: {words or 'no message'}; {remedy}"


class _Unfit(Exception):
    """A graph that cannot be given inputs: the user's to mend, unlike a file that is broken."""


def _stage(session: Any, *, batch: int, seed: int) -> dict[str, Any]:
    """Inputs for every graph input, standard normal in the graph's type, `batch` in the first dimension."""
    import numpy as np

    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    generator = np.random.default_rng(seed)
    feeds = {}
    for value in session.get_inputs():
        if value.type not in types:
            raise _Unfit(f"input {value.name!r} is {value.type}; timing needs one of {', '.join(types)}")
        if not value.shape:
            raise _Unfit(f"input {value.name!r} is a scalar; the first dimension must be the batch")
        first, *rest = value.shape
        if isinstance(first, int) and first != batch:
            raise _Unfit(f"input {value.name!r} has batch {first}, the target {batch}; set batch={first} in the target")
        free = [dimension for dimension in rest if not isinstance(dimension, int)]
        if free:
            raise _Unfit(f"input {value.name!r} leaves {free[0]!r} open; export it with a fixed input size")
        feeds[value.name] = generator.standard_normal((batch, *rest)).astype(types[value.type])
    return feeds


def _peak_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next((int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM")), None)


class _Child:
    """The worker's own end: at most one open session, and the inputs staged for it."""

    session: Any = None
    feeds: dict[str, Any]
    outputs: list[str]

    def open(self, *, path: str, threads: int, batch: int, seed: int) -> dict[str, Any]:
        import onnxruntime

        self.close()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.feeds = _stage(session, batch=batch, seed=seed)
        self.outputs = [value.name for value in session.get_outputs()]
        self.session = session
        return {}

    def run(self, *, calls: int, warm_up: int) -> dict[str, Any]:
        call, outputs, feeds = self.session.run, self.outputs, self.feeds
        for _ in range(warm_up):
            call(outputs, feeds)
        wall_ms, cpu_ms = [], []
        for _ in range(calls):
            cpu, wall = time.process_time_ns(), time.perf_counter_ns()
            call(outputs, feeds)
            wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
            cpu_ms.append((time.process_time_ns() - cpu) / 1e6)
        return {"wall_ms": wall_ms, "cpu_ms": cpu_ms}

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": _peak_bytes()}

    def close(self) -> dict[str, Any]:
        self.session = None
        gc.collect()
        return {}


def main() -> None:
    """Read commands from standard input and answer on standard output until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and the parent ends its workers
    cpus = {int(word) for word in sys.argv[1:]}
    if cpus:
        os.sched_setaffinity(0, cpus)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    gc.disable()
    child = _Child()
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "open": child.open,
        "run": child.run,
        "memory": child.memory,
        "close": child.close,
    }
    for line in sys.stdin:
        words = json.loads(line)
        reply: dict[str, Any]
        try:
            reply = commands[words.pop("op")](**words)
        except _Unfit as error:
            reply = {"usage": str(error)}
        except Exception as error:  # the runtime's own exceptions share no base class
            reply = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
