"""A worker: one process that runs one side of a comparison, commanded by JSON lines over a pipe.

Two runtimes in one process disturb each other, and a session's speed depends on where its memory happened to land, so
each side has a process of its own and opens its session anew several times. Workers wait passively: a spinning thread
pool steals the core that the other side is being timed on. The child is export/session.py, run as a program, here or on
a device: it imports numpy and the runtime, nothing heavier.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from slim.bench.remote import Host
from slim.errors import MissingExtra, SlimError, TargetError, UsageError
from slim.export import session
from slim.export.session import Port, Session, staged
from slim.export.target import Target

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

    def __init__(self, target: Target, *, host: Host | None = None, cpus: Sequence[int] | None = None) -> None:
        """Start a worker that serves files as `target` says, on the cores `cpus` only if given; on `host` if given.

        Raises:
            UsageError: cores this process may not use, or a system that cannot bind processes to cores.
            TargetError: the host cannot run it.
        """
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        if cpus and not host and not usable.issuperset(cpus):
            raise UsageError(
                f"cpus {list(cpus)}: usable here are {sorted(usable)}; choose among them, or leave cpus out"
            )
        self.target, self.host = target, host
        self._path: Path | None = None
        # A file, not a pipe: a pipe that nobody reads fills up and blocks the worker.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        program, words, passive = Path(session.__file__), [*map(str, cpus or ())], waiting_passively(target.threads)
        if host is not None:
            argv = [host.python, str(host.push(program)), *words]
            # Runtimes leave files in the temporary folder, which are to go with ours.
            self._process = host.start(argv, stderr=self._stderr, env=passive | {"TMPDIR": str(host.folder)})
            return
        self._process = subprocess.Popen(
            # -P: a file numpy.py beside the program or in the user's working directory must not be imported.
            [sys.executable, "-P", str(program), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | passive,
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

    def open(self, path: Path, *, batch: int, seed: int) -> str:
        """Open a session of the file at `path` and stage its inputs, standard normal from `seed`.

        A session already open is closed first. Returns what the runtime computes in.

        Raises:
            UsageError: no such file, or a graph that does not take this batch.
            SlimError: the runtime cannot open the file, or the worker died.
        """
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give an exported .onnx file")
        self._path = path
        on = self.target
        served: dict[str, Any] = {"threads": on.threads, "precision": on.precision, "mode": on.mode}
        place = str(self.host.push(path) if self.host else path)
        reply = self._ask(op="open", opener=on.on.opener, path=place, batch=batch, seed=seed, **served)
        self.inputs, self.outputs = (
            tuple(Port(name, dtype, tuple(shape)) for name, dtype, shape in reply[ports])
            for ports in ("inputs", "outputs")
        )
        return str(reply["precision"])

    def run(self, calls: int, *, warm_up: int = 0) -> Calls:
        """`warm_up` calls that are not recorded, then `calls` that are."""
        reply = self._ask(op="run", calls=calls, warm_up=warm_up)
        return Calls(reply["wall_ms"], reply["cpu_ms"])

    def infer(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The first output of the open file for `values` of its only input."""
        given = np.ascontiguousarray(values)
        reply = self._ask(given.tobytes(), op="infer", dtype=given.dtype.name, shape=list(given.shape))
        return np.frombuffer(reply["payload"], dtype=reply["dtype"]).reshape(reply["shape"])

    def peak_memory_bytes(self) -> int | None:
        """Largest resident memory of the worker so far, its interpreter included; none where the system hides it."""
        found = self._ask(op="memory")["peak_bytes"]
        return None if found is None else int(found)

    def close(self) -> None:
        """Close the session and free its memory; the worker stays."""
        self._ask(op="close")

    def _ask(self, payload: bytes = b"", **command: Any) -> dict[str, Any]:
        commands, answers = self._process.stdin, self._process.stdout
        assert commands is not None, "opened as a pipe"
        assert answers is not None, "opened as a pipe"
        counted = {"bytes": len(payload)} if payload else {}
        try:
            commands.write(json.dumps(command | counted).encode() + b"\n" + payload)
            commands.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = b""
        if not line and self.host is not None:
            doing = f"{command['op']} {self._path or ''}".strip()
            raise self.host.failure(self._process, stderr=self._stderr, doing=doing)
        if not line:
            raise SlimError(self._obituary(command["op"]))
        reply: dict[str, Any] = json.loads(line)
        if "bytes" in reply:
            reply["payload"] = answers.read(reply["bytes"])
        place = self._path or "bench"
        if "usage" in reply:
            raise UsageError(f"{place}: {reply['usage']}")
        if "missing" in reply:
            raise MissingExtra(f"target {self.target}: {reply['missing']}; {self.target.on.remedy}")
        if "error" in reply:
            raise SlimError(f"{place}: {self.target.name} cannot {command['op']} it: {reply['error']}")
        return reply

    def _obituary(self, op: str) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        words = " ".join(self._stderr.read().decode(errors="replace").split())[-STDERR_TAIL:]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        remedy = (
            "out of memory? try a smaller batch" if code == -signal.SIGKILL else "try the file in the runtime alone"
        )
        return f"{self._path or 'bench'}: worker ended by {how} during {op!r}: {words or 'no message'}; {remedy}"


@contextmanager
def device(target: Target) -> Iterator[Host | None]:
    """The host of `target`, ours alone meanwhile, where it has its runtime; none for this machine, where it has it.

    Raises:
        TargetError: the runtime is missing, or the host cannot be reached.
    """
    if not target.host:
        target.probe()
        yield None
        return
    if not target.on.remote:
        raise TargetError(f"target {target}: {target.name} is not served over ssh; run slim on the device")
    address, _, python = target.host.removeprefix("ssh://").partition("/")
    with Host.parse(f"ssh://{address}", python=f"/{python}" if python else "python3") as host:
        host.probe(target.on.module, target.on.distributions)
        yield host


@contextmanager
def serving(path: Path, target: Target, *, threads: int | None = None) -> Iterator[Session]:
    """The file at `path`, open on `target`: in this process, or in a worker on its host.

    `threads` instead of the target's, where only the outputs matter.

    Raises:
        UsageError, StoreError, TargetError: see `open_session` and `device`.
    """
    if not target.host:
        from slim.export.parity import open_session  # loads torch, which timing does not need

        yield open_session(path, target, threads=threads)
        return
    with device(target) as host, Worker(target, host=host) as worker:
        worker.open(path, batch=1, seed=0)
        yield _Remote(worker)


def golden(worker: Worker, path: Path, *, seed: int) -> None:
    """Compare what the file at `path`, open in a `worker` elsewhere, computes with what it computes here.

    Raises:
        ParityError: it is something else; the figures of such a file would mean nothing.
        StoreError, MissingExtra: it cannot be opened by ONNX Runtime here.
    """
    import onnx
    import torch

    from slim.export.parity import GATES, difference

    here = Target.parse("ort:cpu")
    here.probe()
    session = here.on.open(path, threads=worker.target.threads, precision="fp32")
    feeds = staged(session, batch=worker.target.batch, seed=seed)
    wanted, given = torch.tensor(session.call(feeds)[0]), torch.tensor(worker.infer(feeds[0]))
    operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    gate = GATES["int8" if "QuantizeLinear" in operators else worker.target.precision]
    difference(wanted, given, place=f"{path} on {worker.target}", against="the same file here", gate=gate)


class _Remote:
    """The session of a worker."""

    def __init__(self, worker: Worker) -> None:
        self.inputs, self.outputs, self.precision = worker.inputs, worker.outputs, worker.target.precision
        self._worker = worker

    def call(self, feeds: list[Any]) -> list[Any]:
        return [self._worker.infer(feeds[0])]


def waiting_passively(threads: int) -> dict[str, str]:
    """Environment in which OpenMP uses so many threads, and lets them sleep while they wait."""
    return {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": str(threads)}
