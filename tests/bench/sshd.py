"""A real ssh server on the loopback: throw-away keys, and a client's configuration as a user would write it."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


class Sshd:
    """A device at `ssh://device` for those who read `config`. Its users' temporary folder is `place`."""

    def __init__(self, folder: Path, *, settings: str = "", place: Path | None = None) -> None:
        if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
            pytest.skip("OpenSSH is not installed with its server: no device on the loopback")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where a server run by root must be able to go
        folder.mkdir(exist_ok=True)
        self.folder, self.config = folder, folder / "config"
        self.place = place or folder / "device"
        self.place.mkdir(exist_ok=True)
        self.host_key, self.user_key = self.new_key("host"), self.new_key("user")
        (folder / "authorized").write_text(self.user_key.with_suffix(".pub").read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.host_key}\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nSetEnv TMPDIR={self.place}\n"
            f"{settings}\n"
        )
        self.known(self.host_key)
        self.configure()

    def new_key(self, name: str) -> Path:
        key = self.folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        return key

    def known(self, key: Path | None) -> None:
        """Have the client know the server by `key`, or not at all."""
        public = " ".join(key.with_suffix(".pub").read_text().split()[:2]) if key else ""
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}\n" if key else "")

    def configure(self, *, key: Path | None = None, extra: str = "") -> None:
        self.config.write_text(
            f"Host device\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {key or self.user_key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n{extra}"
        )

    def __enter__(self) -> Self:
        assert SSHD is not None, "or skipped above"
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", self.folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert self.process.stderr is not None, "opened as a pipe"  # which holds a few connections' worth of log
        line = self.process.stderr.readline().decode()
        if "listening" not in line:
            pytest.skip(f"sshd does not start here: {line.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None, "opened as a pipe"
        self.process.stderr.close()

    def cut(self) -> None:
        """End every connection at once, as a pulled plug would."""
        for pid in self.connections():
            os.kill(pid, signal.SIGKILL)

    def connections(self) -> list[int]:
        """The processes of the server that hold connections."""
        return [pid for pid in descendants(self.process.pid) if command(pid).startswith("sshd")]

    def janitor(self) -> int:
        """The one process of bench/janitor.py that holds a session."""
        (pid,) = (pid for pid in descendants(self.process.pid) if " session " in command(pid, "cmdline"))
        return pid


def descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in descendants(child)]


def command(pid: int, name: str = "comm") -> str:
    """`comm` or `cmdline` of a process; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ")
    except OSError:
        return ""
