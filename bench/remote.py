"""A device that is measured over ssh.

One connection carries bench/janitor.py, which holds the lock of the device and a private folder there; programs are
started beside it. Whatever ends that connection ends the programs, removes the folder and gives the lock back. The
device needs an ssh server and Python >= 3.8; nothing is installed on it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import select
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self

import slim
from slim import environment
from slim.bench import janitor, ssh
from slim.bench.ssh import Ssh
from slim.errors import MissingExtra, StoreError, TargetError, UsageError

log = logging.getLogger("slim")

BEAT_S = 10.0
"""Between two signs of life to the device..."""
DEAD_S = 60
"""...which takes us for dead after so long without one."""
CHUNK = 1 << 16

RUNTIMES = ("openvino", "tensorrt", "tensorrt_rtx")
"""Packages whose version can change a figure on a device, besides those of slim/environment.py."""


class Host:
    """A device for as long as it is ours alone: a context manager that holds its lock.

    Entering and every method raise TargetError when the device cannot be reached or used, or the connection is lost.
    """

    python: str
    """The device's Python: its command; once connected, the path of that interpreter."""
    folder: PurePosixPath
    """Private folder on the device, gone afterwards; programs run in it."""

    def __init__(self, connection: Ssh, *, python: str = "python3", wait_s: float = 600) -> None:
        """The device at the other end of `connection`; others who measure there are waited for, `wait_s` at most."""
        self.python = python
        self._ssh, self._wait_s = connection, wait_s

    @classmethod
    def parse(cls, url: str, *, python: str = "python3", config: Path | None = None, wait_s: float = 600) -> Host:
        """Host from `ssh://[user@]host[:port]`; `config` is read instead of ~/.ssh/config.

        Raises:
            UsageError: not of that form.
        """
        return cls(Ssh(url, config=config), python=python, wait_s=wait_s)

    def __str__(self) -> str:
        return str(self._ssh)

    def __enter__(self) -> Self:
        source = Path(janitor.__file__).read_bytes()
        # One line with double quotes alone: a word that every shell takes as it is.
        code = f'import sys; SOURCE = sys.stdin.buffer.read({len(source)}); exec(compile(SOURCE, "janitor.py", "exec"))'
        owner = f"{socket.gethostname()}, process {os.getpid()}"
        request = _pack(owner=owner, wait_s=self._wait_s, silence_s=DEAD_S)
        doing = f"starting {self.python!r}, which must be Python 3.8 or newer"
        self._started: list[subprocess.Popen[bytes]] = []
        self._sent: set[PurePosixPath] = set()
        self._writing, self._over = threading.Lock(), threading.Event()
        with ExitStack() as stack:
            stack.enter_context(self._ssh)
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            argv = [self.python, "-IS", "-c", code, "session", request]
            self._janitor = self._ssh.start(argv, stderr=self._stderr, first=True)
            stack.callback(self._close)
            self._write([source], doing)
            threading.Thread(target=self._beat, daemon=True).start()
            found = self._turn(doing)
            self.python, self.folder = found["python"], PurePosixPath(found["folder"])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def push(self, path: Path) -> PurePosixPath:
        """Where the file at `path` lies on the device now; sent unless the same bytes were sent before.

        Its name there is its digest and, for programs that look at it, its ending.

        Raises:
            UsageError: `path` cannot be read.
        """
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                ending = path.suffix if re.fullmatch(r"\.\w{1,16}", path.suffix, re.ASCII) else ""
                remote = self.folder / (digest + ending)
                if remote in self._sent:
                    return remote
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                doing = f"sending {path} ({size} bytes)"
                self._write(_command(_parts(file, size), op="put", name=remote.name, size=size), doing)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}; give a file to send to {self}") from error
        arrived = self._answer(doing)["sha256"]
        if arrived != digest:
            raise TargetError(
                f"{self}: {doing}: sha256 {arrived[:12]} arrived instead of {digest[:12]}; the file changed meanwhile, "
                "or the disk there is failing: send it again"
            )
        self._sent.add(remote)
        return remote

    def pull(self, remote: PurePosixPath, path: Path) -> None:
        """Copy the file `remote` of the device, absolute or relative to `folder`, to `path`.

        Raises:
            StoreError: `path` cannot be written.
        """
        doing = f"fetching {str(remote)!r}"
        self._write(_command(op="get", path=str(remote)), doing)
        chunks = self._chunks(self._answer(doing)["size"], doing)
        try:
            with path.open("wb") as file:
                file.writelines(chunks)
        except OSError as error:
            for _ in chunks:
                pass  # the rest of a file that cannot be kept is no answer
            raise StoreError(f"{path}: cannot be written: {error.strerror}; give another place") from error

    def start(
        self, argv: Sequence[str], *, stderr: IO[bytes], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the program `argv` in `folder`: pipes for its input and output, the file `stderr` for its errors.

        No shell reads `argv`. `env` is added to the variables of the device. What is returned is the end here: killing
        it kills the program there and all that it started. Exit code 128 + N says that signal N ended the program.
        """
        request = _pack(folder=str(self.folder), argv=list(argv), env=dict(env or {}))
        leash = [self.python, "-IS", str(self.folder / "janitor.py"), "leash", request]
        process = self._ssh.start(leash, stderr=stderr)
        self._started.append(process)
        try:
            self._answer(f"starting {argv[0]!r}", process, stderr)
        except BaseException:
            ssh.end(process)
            raise
        return process

    def run(self, argv: Sequence[str], *, timeout_s: float) -> str:
        """What the program `argv` prints; it must end with exit code 0 within `timeout_s`."""
        with tempfile.TemporaryFile() as stderr, self.start(argv, stderr=stderr) as process:
            try:
                out, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise TargetError(
                    f"{self}: {argv[0]!r} took over {timeout_s:g} s and was ended; try it there"
                ) from None
            finally:
                process.kill()
            if process.returncode:
                raise self.failure(process, stderr=stderr, doing=f"running {argv[0]!r}")
        return out.decode(errors="replace")

    def failure(self, process: subprocess.Popen[bytes], *, stderr: IO[bytes], doing: str) -> TargetError:
        """Why `process`, whose output has ended while we were `doing` something, did not do it; for you to raise."""
        return self._ssh.failure(process, stderr=stderr, doing=doing)

    def probe(self, module: str, distributions: Sequence[str]) -> str:
        """Version of the runtime `module`, which one of the packages `distributions` brings, on the device.

        Raises:
            MissingExtra: the device's Python does not have it.
        """
        found: str | None = self._fact("probe", module=module, distributions=list(distributions))
        if found is None:
            raise MissingExtra(
                f"{self}: {module} is not installed for {self.python}; on the device: {self.python} -m pip install "
                f"{distributions[0]}"
            )
        return found

    def describe(self) -> dict[str, Any]:
        """The device in the words of `slim.environment.describe`, and in those that only a board or a GPU needs."""
        facts = self._fact("describe", distributions=[*environment.LIBRARIES, *RUNTIMES])
        device = environment.processor(
            cpuinfo=facts["cpuinfo"],
            name=facts["processor"],
            arch=facts["machine"],
            cores=facts["cores"],
            system=facts["system"],
            board=facts["board"] or "",
        )
        device |= {"power_mode": facts["power_mode"]} if facts["power_mode"] else {}
        return {
            "device": device,
            "fingerprint": environment.fingerprint(device),
            "versions": {"slim": slim.__version__, "python": facts["python"], **facts["versions"]},
            **{key: facts[key] for key in ("load_average", "governor", "cpu_khz", "gpu", "l4t")},
        }

    def _fact(self, mode: str, **words: Any) -> Any:
        """What the janitor finds as an ordinary program, which sees the packages that the user has installed."""
        argv = [self.python, str(self.folder / "janitor.py"), mode, _pack(**words)]
        return json.loads(self.run(argv, timeout_s=ssh.SILENCE_S))

    def _write(self, chunks: Iterable[bytes], doing: str) -> None:
        pipe = self._janitor.stdin
        assert pipe is not None, "opened as a pipe"
        with self._writing:
            try:
                for chunk in chunks:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[os.write(pipe.fileno(), rest) :]
            except BrokenPipeError:
                raise self.failure(self._janitor, stderr=self._stderr, doing=doing) from None
            except BaseException:
                self._janitor.kill()  # what followed half a command would be taken for its rest
                raise

    def _beat(self) -> None:
        """Show the device that we are alive, until it is over. Never blocks: whoever is writing is alive too."""
        pipe = self._janitor.stdin
        assert pipe is not None, "opened as a pipe"
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        while not self._over.wait(BEAT_S):
            if self._writing.acquire(blocking=False):
                try:
                    if not self._over.is_set() and poll.poll(0):
                        os.write(pipe.fileno(), b"\n")
                except BrokenPipeError:
                    return  # found out by whoever asks next
                finally:
                    self._writing.release()

    def _turn(self, doing: str) -> dict[str, Any]:
        """The answer that the device is ours now."""
        holder = None
        while "waiting" in (reply := self._answer(doing)):
            if reply["left_s"] <= 0:
                raise TargetError(
                    f"{self}: in use ({reply['waiting']}), still after {self._wait_s:g} s; two jobs at once would slow "
                    "each other: try again later"
                )
            if reply["waiting"] != holder:
                holder = reply["waiting"]
                log.info("%s: in use (%s); waiting %g s at most", self, holder, self._wait_s)
        return reply

    def _answer(
        self, doing: str, process: subprocess.Popen[bytes] | None = None, stderr: IO[bytes] | None = None
    ) -> dict[str, Any]:
        """Next answer of the janitor, or of the leash `process`; what start-up files of a shell print is left out."""
        process, stderr = process or self._janitor, stderr or self._stderr
        line = b""
        while not (line.startswith(janitor.MARK) and line.endswith(b"\n")):
            # Byte by byte: what follows an answer is somebody else's to read.
            line = line.rpartition(b"\n")[2] + self._ssh.read(process, 1, stderr=stderr, doing=doing)
        reply: dict[str, Any] = json.loads(line.removeprefix(janitor.MARK))
        if "error" in reply:
            raise TargetError(f"{self}: {doing}: {reply['error']}; mend that on the device")
        return reply

    def _chunks(self, size: int, doing: str) -> Iterator[bytes]:
        while size:
            chunk = self._ssh.read(self._janitor, min(size, CHUNK), stderr=self._stderr, doing=doing)
            size -= len(chunk)
            yield chunk

    def _close(self) -> None:
        """End what was started, and leave: the device clears up when its input ends."""
        self._over.set()
        for process in self._started:
            process.kill()
            process.wait()
        pipe = self._janitor.stdin
        assert pipe is not None, "opened as a pipe"
        with self._writing:
            pipe.close()
        try:
            self._janitor.wait(timeout=ssh.SILENCE_S)
        except subprocess.TimeoutExpired:
            log.warning("%s: does not say that it is cleared up; it does so within %d s", self, DEAD_S)
        ssh.end(self._janitor)


def _pack(**words: Any) -> str:
    """One word for a shell, whatever `words` hold."""
    return base64.b64encode(json.dumps(words).encode()).decode()


def _command(data: Iterable[bytes] = (), **words: Any) -> Iterator[bytes]:
    yield json.dumps(words).encode() + b"\n"
    yield from data


def _parts(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Exactly `size` bytes of `file`: one cut short meanwhile is filled up, and found out by its digest."""
    while size:
        part = file.read(min(size, CHUNK)) or bytes(min(size, CHUNK))
        size -= len(part)
        yield part
