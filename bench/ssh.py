"""The user's own `ssh` to one host, and what its complaints mean.

Keys, agents, jump hosts and aliases are ssh's business: nothing here reads ~/.ssh. Never asks: without a terminal, and
often without a user in front of it, a question would only hang.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from slim.errors import TargetError, UsageError

CONNECT_S = 10
"""Longest wait for an address to answer."""
ALIVE_S = 5
"""A connection that says nothing for three times as long is taken for dead."""
SILENCE_S = 60
"""Longest wait for a word of a program that is about to say one."""
SSH_FAILED = 255
"""Exit code of ssh itself; any other is the program's."""
TAIL = 400
"""Characters of a program's last words that go into an error."""
MAX_SOCKET_PATH = 80
"""Of the 104 bytes that the path of a socket may have on macOS; ssh appends 17 while it makes one."""

REFUSALS = {
    r"IDENTIFICATION HAS CHANGED": "its host key is not the one of ~/.ssh/known_hosts; if it was set up anew, remove "
    "the old key by `ssh-keygen -R`, else somebody may sit in between",
    r"Host key verification failed": "its host key is not known here; log in once by hand with `ssh` and compare it",
    r"Could not resolve": "no such host name; check its spelling, or write a `Host` entry into ~/.ssh/config",
    r"Permission denied": "it lets this user in only by a password, or not at all; set up a key (`ssh-copy-id`), and "
    "an agent (`ssh-add`) if the key has a passphrase",
    r"Connection refused": "nothing listens there; start its ssh server, or give the port: ssh://host:PORT",
    r"timed out|No route to host|unreachable": "it does not answer; is it switched on, and in reach from here?",
}
"""What ssh says -> what it means and what to do; the first that fits."""


class Ssh:
    """A host; while the context manager is open, all programs go through one connection where that is possible."""

    def __init__(self, url: str, *, config: Path | None = None) -> None:
        """The host `ssh://[user@]host[:port]`; `config` is read instead of ~/.ssh/config, as by `ssh -F`.

        Raises:
            UsageError: `url` is not of that form.
        """
        # None of these words can be an option or mean anything to a shell.
        match = re.fullmatch(r"ssh://(?:(\w[\w.-]*)@)?(\w[\w.-]*)(?::(\d{1,5}))?", url, re.ASCII)
        if not match or (match[3] and not 0 < int(match[3]) < 65536):
            raise UsageError(
                f"host {url!r}: not ssh://[user@]host[:port]; write what else ssh needs into a `Host` entry of "
                "~/.ssh/config, and give its name as the host"
            )
        self._url, self._name = url, match[2]
        # No questions, and nothing that is of no use here, whatever the configuration says.
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": ALIVE_S,
            "ServerAliveCountMax": 3,
            "ClearAllForwardings": "yes",
            "ForwardAgent": "no",
            "RemoteCommand": "none",
            "LogLevel": "ERROR",
        }
        self._options = ["-T", "-x", *(f"-o{key}={value}" for key, value in settings.items())]
        for option, value in (("-F", config), ("-p", match[3]), ("-l", match[1])):
            self._options += [option, str(value)] if value else []

    def __str__(self) -> str:
        return self._url

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="slim-ssh-")
        try:
            self._share = self._sharing(Path(self._folder.name, "ssh"))
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def _sharing(self, path: Path) -> list[str]:
        """Options that share the first connection by the socket at `path`.

        Raises:
            TargetError: ssh is missing here, or does not take its configuration.
        """
        argv = ["ssh", "-G", *self._options, "--", self._name]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise TargetError(f"{self}: ssh is not installed here; install the OpenSSH client") from error
        if done.returncode:
            raise TargetError(f"{self}: ssh refuses its configuration ({' '.join(done.stderr.split())}); mend it")
        if re.search(r"^controlpath (?!none$)", done.stdout, re.MULTILINE):
            return []  # the user shares connections already, perhaps one that took a password
        return [] if len(os.fsencode(path)) > MAX_SOCKET_PATH else [f"-oControlPath={path}", "-oControlPersist=no"]

    def start(self, argv: Sequence[str], *, stderr: IO[bytes], first: bool = False) -> subprocess.Popen[bytes]:
        """Start the program `argv` there, its words as they are; `first` opens the connection for the others."""
        share = [*self._share, f"-oControlMaster={'yes' if first else 'no'}"] if self._share else []
        return subprocess.Popen(
            ["ssh", *self._options, *share, "--", self._name, f"exec {shlex.join(argv)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is ours to pass on, by leaving in order
        )

    def read(self, process: subprocess.Popen[bytes], count: int, *, stderr: IO[bytes], doing: str) -> bytes:
        """1 to `count` bytes of what `process` prints, none of them read ahead.

        Raises:
            TargetError: it prints nothing for SILENCE_S, or has ended.
        """
        assert process.stdout is not None, "opened as a pipe"
        poll = select.poll()  # unlike select, for any number of open files
        poll.register(process.stdout, select.POLLIN)
        if not poll.poll(1000 * SILENCE_S):
            process.kill()
            raise TargetError(f"{self}: {doing}: no answer for {SILENCE_S} s; does `ssh` work there by hand?")
        found = os.read(process.stdout.fileno(), count)
        if not found:
            raise self.failure(process, stderr=stderr, doing=doing)
        return found

    def failure(self, process: subprocess.Popen[bytes], *, stderr: IO[bytes], doing: str) -> TargetError:
        """Why `process`, whose output has ended while we were `doing` something, did not do it; for you to raise."""
        try:
            code = process.wait(timeout=ALIVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        stderr.seek(0)
        said = " ".join(stderr.read().decode(errors="replace").split())
        words = said[-TAIL:] or "no message"
        if code >= 0 and code != SSH_FAILED:
            how = f"signal {signal.Signals(code - 128).name}" if 128 < code < 160 else f"exit code {code}"
            return TargetError(f"{self}: {doing}: ended there by {how} ({words}); try it there by hand")
        for pattern, meaning in REFUSALS.items():
            if re.search(pattern, said):
                return TargetError(f"{self}: {meaning} (ssh: {words})")
        return TargetError(f"{self}: {doing}: connection lost ({words}); what ran there is ended: start again")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` and close its pipes."""
    process.kill()
    with process:
        pass
