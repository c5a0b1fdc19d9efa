"""What slim keeps on a device while it measures there: sent over ssh, run by the device's Python >= 3.8, alone.

`session` holds the lock of the device and a folder of its own, keeps the files it is sent, and answers JSON lines. When
its input ends or stays silent - a closed, killed or unreachable slim - the children end and the folder and the lock go.
`leash` runs one program as a child of the session: it ends with its connection and with the session, whoever ended it.
`describe` and `probe` print what figures depend on. The first two wait, blocked, while a program is timed.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

MARK = b"slim: "
"""Begins the line of an answer; those that a shell's start-up files print begin otherwise."""
PREFIX = "slim-session-"
POLL_S = 2.0
"""Between two looks at a lock that is held; often would disturb the one who holds it and measures."""
CHUNK = 1 << 16


def say(**words: Any) -> None:
    """One answer."""
    os.write(1, b"\n" + MARK + json.dumps(words).encode() + b"\n")


def session(source: bytes, *, owner: str, wait_s: float, silence_s: int) -> None:
    """Wait for the device, then keep files and answer until the input ends or says nothing for `silence_s`."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(f"{signal.Signals(number).name}: ended, or nothing heard for {silence_s} s")

    for number in (signal.SIGALRM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    os.umask(0o077)
    # On disk where /tmp may be memory, which the measured program needs.
    place = os.environ.get("TMPDIR") or "/var/tmp"
    lock = acquire(os.path.join(place, "slim.lock"), owner=owner, wait_s=wait_s, silence_s=silence_s)
    try:
        # Whoever made these held the lock that is ours now: it is dead, and could not clear up.
        for folder in glob.glob(os.path.join(glob.escape(place), PREFIX + "*")):
            if os.lstat(folder).st_uid == os.getuid():
                clear(folder)
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        try:
            with open(os.path.join(folder, "alive"), "w") as alive:
                fcntl.flock(alive, fcntl.LOCK_EX)
                with open(os.path.join(folder, "janitor.py"), "wb") as own:
                    own.write(source)
                say(folder=folder, python=sys.executable)
                serve(folder, silence_s=silence_s)
        finally:
            for number in (signal.SIGALRM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            clear(folder)
    finally:
        with contextlib.suppress(OSError):  # another user's file in a sticky folder stays, and says nobody
            os.ftruncate(lock, 0)
            os.unlink(os.path.join(place, "slim.lock"))
        os.close(lock)


def acquire(path: str, *, owner: str, wait_s: float, silence_s: int) -> int:
    """Descriptor of the locked file at `path`. The kernel unlocks it when we die, so there is no stale lock."""
    deadline = time.monotonic() + wait_s
    signal.alarm(silence_s)
    while True:
        before = os.umask(0)  # for every user of the device
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            try:
                lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue  # given back this moment
        finally:
            os.umask(before)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="replace")
            os.close(lock)
            left = deadline - time.monotonic()
            say(waiting="".join(letter for letter in holder if letter.isprintable()), left_s=left)
            if left <= 0:
                raise SystemExit("waited long enough") from None
            if select.select([0], [], [], min(POLL_S, left))[0]:
                if not os.read(0, CHUNK):
                    raise SystemExit("nobody waits any more") from None
                signal.alarm(silence_s)
            continue
        try:
            ours = os.path.samestat(os.fstat(lock), os.stat(path))
        except FileNotFoundError:
            ours = False
        if ours:
            os.ftruncate(lock, 0)
            os.write(lock, f"{owner} since {time.strftime('%H:%M:%S')} of the device's clock".encode())
            return lock
        os.close(lock)  # given back and removed between opening and locking


def clear(folder: str) -> None:
    """Remove the folder of a session that is over, when its children are ended."""
    for _ in range(50):
        if all(is_free(path) for path in glob.glob(os.path.join(glob.escape(folder), "leash-*"))):
            shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.1)
    shutil.rmtree(folder)


def is_free(path: str) -> bool:
    """Whether nobody has locked the file at `path`."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def serve(folder: str, *, silence_s: int) -> None:
    """Answer commands until there are no more. Empty lines only show that the other end is alive."""
    commands: dict[str, Callable[..., None]] = {"put": put, "get": get}
    while True:
        signal.alarm(silence_s)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        if line.strip():
            words = json.loads(line)
            try:
                commands[words.pop("op")](folder, silence_s=silence_s, **words)
            except OSError as error:
                if error.errno == errno.EPIPE:
                    return
                say(error=error.strerror)


def put(folder: str, *, name: str, size: int, silence_s: int) -> None:
    """Keep the `size` bytes that follow, and answer the digest of what is on the disk then."""
    path = os.path.join(folder, name)
    chunks = received(size, silence_s)
    try:
        with open(path, "wb") as file:
            for number, chunk in enumerate(chunks, 1):
                file.write(chunk)
                # To the disk now, not while something is timed, and by parts: a slow card must not look dead.
                if number % 256 == 0:
                    file.flush()
                    os.fsync(file.fileno())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        for _ in chunks:
            pass  # the rest of a file that cannot be kept is no command
        raise
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    say(sha256=digest.hexdigest())


def received(size: int, silence_s: int) -> Iterator[bytes]:
    """The next `size` bytes of the input."""
    while size:
        signal.alarm(silence_s)
        chunk = sys.stdin.buffer.read(min(size, CHUNK))
        if not chunk:
            raise SystemExit("the connection ended within a file")
        size -= len(chunk)
        yield chunk


def get(folder: str, *, path: str, silence_s: int) -> None:
    """Answer the size of the file at `path`, and its bytes."""
    with open(os.path.join(folder, path), "rb") as file:
        left = os.fstat(file.fileno()).st_size
        say(size=left)
        while left:
            signal.alarm(silence_s)
            chunk = file.read(min(left, CHUNK))
            if not chunk:
                raise SystemExit(f"{path} shrank while it was sent")
            left -= len(chunk)
            while chunk:
                chunk = chunk[os.write(1, chunk) :]


def leash(folder: str, *, argv: list[str], env: dict[str, str]) -> int:
    """Exit code of the program `argv`, which is run in the folder and killed with its group when nobody needs it."""
    os.chdir(folder)
    variables = dict(os.environ, **env)
    program = shutil.which(argv[0], path=variables.get("PATH"))
    if program is None:
        say(error=f"no program {argv[0]!r}")
        return 127
    with open("alive") as alive, open(f"leash-{os.getpid()}", "w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        say()
        child = subprocess.Popen([program, *argv[1:]], env=variables, start_new_session=True)

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        def when_the_session_is_over() -> None:
            fcntl.flock(alive, fcntl.LOCK_SH)
            kill()

        def when_nobody_listens() -> None:
            listener = select.poll()
            listener.register(1, 0)
            listener.poll()
            kill()

        for watch in (when_the_session_is_over, when_nobody_listens):
            threading.Thread(target=watch, daemon=True).start()
        code = child.wait()
        kill()  # what it started and left
    sys.stdout.flush()
    return code if code >= 0 else 128 - code


def describe(*, distributions: list[str]) -> dict[str, Any]:
    """Facts as they are found here, and the versions of those `distributions` that are installed."""
    return {
        "cpuinfo": (read("/proc/cpuinfo") or "").split("\n\n", 1)[0],
        "machine": platform.machine(),
        "processor": platform.processor(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "load_average": round(os.getloadavg()[0], 2),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "python": platform.python_version(),
        "versions": versions(distributions),
        "gpu": output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "board": read("/proc/device-tree/model"),
        "l4t": read("/etc/nv_tegra_release"),
        "power_mode": output("nvpmodel", "-q"),
        # jetson_clocks raises the least clock to the highest; to ask it itself takes root.
        "cpu_khz": [read(f"/sys/devices/system/cpu/cpu0/cpufreq/scaling_{name}_freq") for name in ("min", "max")],
    }


def versions(distributions: list[str]) -> dict[str, str]:
    """Those of `distributions` that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def probe(*, module: str, distributions: list[str]) -> str | None:
    """Version of `module`, which one of `distributions` has brought; none where there is no such module."""
    if importlib.util.find_spec(module) is None:
        return None
    return next(iter(versions(distributions).values()), "unknown")


def read(path: str) -> str | None:
    """Text of a file of the system; none where it has no such file."""
    try:
        with open(path, errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return None


def output(*argv: str) -> str | None:
    """What a program of the system says; none where it does not work."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    """Be what the command line says: a mode, and its arguments as one word."""
    mode, request = sys.argv[1:]
    words = json.loads(base64.b64decode(request))
    if mode == "session":
        try:
            session(globals()["SOURCE"], **words)
        except OSError as error:
            say(error=f"{error.strerror}: {error.filename or 'the connection'}")
    elif mode == "leash":
        sys.exit(leash(**words))
    elif mode == "describe":
        print(json.dumps(describe(**words)))
    else:
        print(json.dumps(probe(**words)))


if __name__ == "__main__":
    main()
