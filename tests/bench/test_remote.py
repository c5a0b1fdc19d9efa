from __future__ import annotations

import ast
import hashlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from slim import environment
from slim.bench import janitor, remote, ssh
from slim.bench.remote import Host
from slim.errors import MissingExtra, StoreError, TargetError, UsageError
from tests.bench.sshd import Sshd

HOSTILE = ["a b", "'", '"', "$(touch x)", "`touch x`", ";touch x", "-rf", "a\nb", "\\", "", "*", "~", "!!", "ü&|<>#"]
HERE = sys.executable
"""The device is this machine: its Python is the one that runs the tests, by its path."""


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def device(sshd: Sshd) -> Iterator[Sshd]:
    """The server as a user would set it up; the test must leave nothing behind on it."""
    sshd.known(sshd.host_key)
    sshd.configure()
    yield sshd
    assert soon(lambda: not list(sshd.place.iterdir())), list(sshd.place.iterdir())
    quiet = soon(lambda: not sshd.connections())
    sshd.cut()
    assert quiet


def host(device: Sshd, *, python: str = HERE, wait_s: float = 30) -> Host:
    return Host.parse("ssh://device", python=python, config=device.config, wait_s=wait_s)


def soon(claim: Callable[[], bool], *, within_s: float = 10) -> bool:
    """Whether the claim comes true in time."""
    deadline = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# What is said by the URL


@pytest.mark.parametrize("url", ["ssh://orin", "ssh://me@orin.local", "ssh://me@10.0.0.7:2222", "ssh://_my-board"])
def test_a_host_prints_itself_as_it_was_written(url: str) -> None:
    assert str(Host.parse(url)) == url


@pytest.mark.parametrize(
    "url",
    ["ssh://" + rest for rest in ("", "-oProxyCommand=x", "-l@b", "a b", "a:0", "a:70000", "a/b", "$(id)", "a@b@c")]
    + ["orin", "http://orin", "ssh://orin\n", "ssh://ö"],
)
def test_anything_else_is_refused_with_one_line(url: str) -> None:
    with pytest.raises(UsageError, match=r"not ssh://\[user@\]host\[:port\]; write .* ~/.ssh/config") as refused:
        Host.parse(url)
    assert "\n" not in str(refused.value)


# Files


def test_files_with_hostile_names_go_there_and_back(
    device: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # so that a name may begin with a dash
    names = ["a b.onnx", "-rf", "$(touch x).py", "it's.json", 'say "x"; id', "a:b", "new\nline", "ü.engine"]
    with host(device) as there:
        for number, name in enumerate(names):
            Path(name).write_bytes(content := os.urandom(100_000 * number))
            pushed = there.push(Path(name))
            assert pushed.parent == there.folder
            assert pushed.stem == hashlib.sha256(content).hexdigest()
            assert pushed.suffix in {Path(name).suffix, ""}
            there.pull(pushed, Path("back-" + name))
            assert Path("back-" + name).read_bytes() == content
        # A program there may choose a name as well.
        there.run(["sh", "-c", 'for name; do printf %s "$name" > "$name"; done', "sh", *names], timeout_s=10)
        for name in names:
            there.pull(PurePosixPath(name), Path("-back"))
            assert Path("-back").read_bytes() == name.encode()
    assert not list(tmp_path.glob("x"))


def test_a_file_is_sent_once(device: Sshd, tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first.bin", "second.bin", "other.bin"))
    for path, content in ((first, b"same"), (second, b"same"), (other, b"other")):
        path.write_bytes(content)
    with host(device) as there:
        place = Path(there.push(first))
        born = place.stat().st_mtime_ns
        assert there.push(second) == PurePosixPath(place)
        assert place.stat().st_mtime_ns == born
        assert there.push(other) != PurePosixPath(place)
        assert place.parent.stat().st_mode & 0o777 == 0o700


def test_a_file_that_changes_while_it_is_sent_is_an_error(device: Sshd, tmp_path: Path) -> None:
    path, done = tmp_path / "model.onnx", threading.Event()
    path.write_bytes(bytes(8 << 20))

    def keep_changing() -> None:
        with path.open("r+b") as file:
            while not done.is_set():
                os.pwrite(file.fileno(), time.monotonic_ns().to_bytes(8), (8 << 20) - 8)

    changer = threading.Thread(target=keep_changing)
    changer.start()
    try:
        with host(device) as there, pytest.raises(TargetError, match=r"model.onnx .*changed meanwhile.*send it again"):
            there.push(path)
    finally:
        done.set()
        changer.join()


def test_files_that_are_missing_or_have_no_place_say_so_and_do_not_end_the_session(
    device: Sshd, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    with host(device) as there:
        with pytest.raises(UsageError, match=r"nothing.onnx: cannot be read: No such file"):
            there.push(tmp_path / "nothing.onnx")
        with pytest.raises(TargetError, match="fetching 'nothing': No such file"):
            there.pull(PurePosixPath("nothing"), tmp_path / "back")
        pushed = there.push(tmp_path / "file")
        with pytest.raises(StoreError, match="no/place: cannot be written: No such file"):
            there.pull(pushed, tmp_path / "no" / "place")
        assert there.run(["cat", str(pushed)], timeout_s=10) == "\0" * (1 << 20)


def test_a_full_disk_there_is_one_clear_line(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted: no disk that is small enough to be full")
    (tmp_path / "large").write_bytes(bytes(4 << 20))
    (tmp_path / "little").write_bytes(b"little")
    try:
        with Sshd(tmp_path / "sshd", place=place) as device, host(device) as there:
            with pytest.raises(TargetError, match=r"sending .*large \(4194304 bytes\): No space left on device; mend"):
                there.push(tmp_path / "large")
            assert Path(there.push(tmp_path / "little")).read_bytes() == b"little"
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", str(place)], check=True)


# Programs


def test_the_words_of_a_program_are_literal(device: Sshd) -> None:
    with host(device) as there:
        assert eval(there.run([HERE, "-c", "import sys; print(sys.argv[1:])", *HOSTILE], timeout_s=10)) == HOSTILE
        assert not list(Path(there.folder).glob("x"))
    assert not Path("~/x").expanduser().exists()


def test_a_conversation_with_a_program(device: Sshd) -> None:
    program = "import os, sys\nfor line in sys.stdin: print(os.environ['WORD'] + line, end='', flush=True)\nos.abort()"
    with host(device) as there, tempfile.TemporaryFile() as stderr:
        argv = ["sh", "-c", 'echo "$WORD" >&2; exec "$0" -c "$1"', HERE, program]
        with there.start(argv, stderr=stderr, env={"WORD": "$x 'y' "}) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for word in (b"one\n", b"two\n"):
                process.stdin.write(word)
                process.stdin.flush()
                assert process.stdout.readline() == b"$x 'y' " + word
            process.stdin.close()
            assert process.stdout.read() == b""
            failure = str(there.failure(process, stderr=stderr, doing="talking"))
        assert failure.startswith("ssh://device: talking: ended there by signal SIGABRT ($x 'y'); try")


def test_a_program_that_is_killed_here_or_takes_too_long_is_ended_there(device: Sshd) -> None:
    program = ["sh", "-c", "sleep 1000 & echo $! > pid; wait"]
    with host(device) as there, tempfile.TemporaryFile() as stderr:
        with pytest.raises(TargetError, match="'sh' took over 1 s and was ended"):
            there.run(program, timeout_s=1)
        sleeper = int(Path(there.folder, "pid").read_text())
        assert soon(lambda: not is_running(sleeper))
        Path(there.folder, "pid").unlink()
        with there.start(program, stderr=stderr) as process:
            assert soon(lambda: Path(there.folder, "pid").exists() and Path(there.folder, "pid").read_text() != "")
            sleeper = int(Path(there.folder, "pid").read_text())
            assert is_running(sleeper)
            process.kill()
            assert soon(lambda: not is_running(sleeper))


def test_a_program_that_fails_or_is_missing_says_so(device: Sshd) -> None:
    with host(device) as there:
        with pytest.raises(TargetError, match=r"ssh://device: running 'sh': ended there by exit code 7 \(oh\)"):
            there.run(["sh", "-c", "echo oh >&2; exit 7"], timeout_s=10)
        with pytest.raises(TargetError, match="starting 'trtexec-nope': no program 'trtexec-nope'"):
            there.run(["trtexec-nope"], timeout_s=10)


# The device


def test_the_device_is_described_as_this_machine_is(device: Sshd) -> None:
    with host(device) as there:
        found = there.describe()
        assert {key: found["device"][key] for key in environment.device()} == environment.device()
        if found["device"].keys() == environment.device().keys():  # a board is described by more
            assert found["fingerprint"] == environment.fingerprint()
        ours = environment.versions()
        assert found["versions"].items() >= ours.items()
        assert there.probe("numpy", ["no-such-numpy", "numpy"]) == ours["numpy"]
        with pytest.raises(
            MissingExtra, match=rf"nosuch is not installed for .*; on the device: {HERE} -m pip install no"
        ):
            there.probe("nosuch", ["no-such", "neither"])


def test_the_janitor_is_written_for_python_3_8_and_needs_nothing_else() -> None:
    tree = ast.parse(Path(janitor.__file__).read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(("python", "words"), [("python-9", "not found"), ("false", "exit code 1")])
def test_a_device_without_python_is_an_error(device: Sshd, python: str, words: str) -> None:
    with pytest.raises(TargetError, match=rf"{python}', which must be Python 3.8 or newer: ended .*{words}"):
        host(device, python=python).__enter__()


def test_what_a_login_prints_is_no_answer_and_the_default_python_is_found(tmp_path: Path) -> None:
    noisy = 'ForceCommand printf "Welcome!\\nslim"; exec sh -c "$SSH_ORIGINAL_COMMAND"'
    with Sshd(tmp_path / "sshd", settings=noisy) as device, host(device, python="python3") as there:
        assert Path(there.python).is_absolute()
        assert there.run(["echo", "a"], timeout_s=10) == "a\n"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with Sshd(tmp_path / "sshd") as device:
        device.place.rmdir()
        with pytest.raises(TargetError, match=rf"No such file or directory: {device.place}.*; mend that on the device"):
            host(device).__enter__()


# Connections


def test_a_connection_is_shared(device: Sshd) -> None:
    with host(device) as there, tempfile.TemporaryFile() as stderr, there.start(["cat"], stderr=stderr) as process:
        assert len(device.connections()) == len({os.getsid(pid) for pid in device.connections()}) == 1
        process.kill()


@pytest.mark.parametrize("reason", ["one session", "long path"])
def test_a_connection_that_cannot_be_shared_is_not(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "long path":
        (long := tmp_path / ("x" * ssh.MAX_SOCKET_PATH)).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
    settings = "MaxSessions 1" if reason == "one session" else ""
    with Sshd(tmp_path / "sshd", settings=settings) as device, host(device) as there:
        assert there.run(["echo", "a"], timeout_s=10) == "a\n"


def test_the_sharing_that_the_user_has_set_up_is_used(device: Sshd) -> None:
    with tempfile.TemporaryDirectory() as folder:
        device.configure(extra=f"  ControlMaster auto\n  ControlPath {folder}/own\n")
        with host(device) as there:
            assert Path(folder, "own").is_socket()
            assert there.run(["echo", "a"], timeout_s=10) == "a\n"


def fails(there: Host) -> str:
    """The one line of entering."""
    with pytest.raises(TargetError) as refused:
        there.__enter__()
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 5
    return str(refused.value)


def test_each_refusal_has_its_own_words(device: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    device.known(None)
    assert re.match(r"ssh://device: its host key is not known here; log in once .*", fails(host(device)))
    device.known(device.user_key)
    assert re.match(r"ssh://device: its host key is not the one of .*ssh-keygen -R", fails(host(device)))
    device.known(device.host_key)
    device.configure(key=device.host_key)
    assert re.match(r"ssh://device: .* only by a password.*ssh-copy-id.*Permission denied", fails(host(device)))
    device.configure(extra="  Nonsense yes\n")
    assert re.match(r"ssh://device: ssh refuses its configuration .*nonsense.*mend it", fails(host(device)), re.I)
    unknown = Host.parse("ssh://no-such-host.invalid", config=device.config)
    device.configure()
    assert re.match(r"ssh://no-such-host.invalid: no such host name; .*Could not resolve", fails(unknown))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(ssh, "CONNECT_S", 1)
        assert re.match(r".*:\d+: it does not answer.*timed out", fails(Host.parse(f"ssh://127.0.0.1:{port}")))
    assert re.match(r".*:\d+: nothing listens there; .*refused", fails(Host.parse(f"ssh://127.0.0.1:{port}")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert fails(host(device)) == "ssh://device: ssh is not installed here; install the OpenSSH client"


def test_a_connection_that_is_cut_is_noticed_and_the_device_clears_up(device: Sshd, tmp_path: Path) -> None:
    with host(device) as there, tempfile.TemporaryFile() as stderr:
        with there.start([HERE, "-c", "import time; print(flush=True); time.sleep(1000)"], stderr=stderr) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            device.cut()
            assert process.stdout.readline() == b""
            failure = there.failure(process, stderr=stderr, doing="timing")
            assert re.match(r"ssh://device: timing: connection lost \(.*start again", str(failure))
        (tmp_path / "file").write_bytes(bytes(1 << 20))
        with pytest.raises(TargetError, match=r"sending .*: connection lost"):
            there.push(tmp_path / "file")
        assert soon(lambda: not list(device.place.iterdir()))


def test_a_connection_that_falls_silent_is_noticed(device: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "ALIVE_S", 1)
    with host(device) as there:
        for pid in device.connections():
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TargetError, match="fetching 'x': connection lost"):
            there.pull(PurePosixPath("x"), Path("x"))
        device.cut()


def test_a_device_that_hears_nothing_of_us_clears_up(device: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DEAD_S", 1)
    monkeypatch.setattr(remote, "BEAT_S", 0.2)
    with host(device) as there:
        time.sleep(1.5)
        assert there.run(["echo", "a"], timeout_s=10) == "a\n"
    monkeypatch.setattr(remote, "BEAT_S", 1000)
    with host(device) as there:
        assert soon(lambda: not list(device.place.iterdir()), within_s=5)
        with pytest.raises(TargetError, match=r"fetching 'x': ended there by exit code 1 .*SIGALRM"):
            there.pull(PurePosixPath("x"), Path("x"))


# One at a time, and nothing left behind

HOLD = """
import sys, tempfile
from pathlib import Path
from slim.bench.remote import Host
with Host.parse("ssh://device", python=sys.argv[2], config=Path(sys.argv[1])) as there:
    with tempfile.TemporaryFile() as stderr:
        with there.start(["sh", "-c", "sleep 1000 & echo $!; exec sleep 1000"], stderr=stderr) as process:
            print(process.stdout.readline().decode(), end="", flush=True)
            sys.stdin.read()
            process.kill()
"""


@pytest.fixture
def holder(device: Sshd) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that has the device, and a process that it started there."""
    argv = [HERE, "-c", HOLD, str(device.config), HERE]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def test_nothing_is_left_of_a_slim_that_was_killed(device: Sshd, holder: tuple[subprocess.Popen[str], int]) -> None:
    process, sleeper = holder
    assert is_running(sleeper)
    assert list(device.place.glob("slim-session-*"))
    process.kill()
    assert soon(lambda: not is_running(sleeper))
    assert soon(lambda: not list(device.place.iterdir()))
    with host(device, wait_s=0):
        pass


def test_two_jobs_never_have_the_device_at_once(
    device: Sshd, holder: tuple[subprocess.Popen[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    process, sleeper = holder
    holds = (
        rf"ssh://device: in use \({socket.gethostname()}, process {process.pid} since [\d:]+ of the device's clock\)"
    )
    assert re.match(holds + r", still after 0 s; .*try again later", fails(host(device, wait_s=0)))
    assert process.stdin is not None
    end_of_work = process.stdin.close
    when_waited_for = threading.Thread(target=lambda: soon(lambda: bool(caplog.messages)) and end_of_work())
    when_waited_for.start()
    with caplog.at_level(logging.INFO, "slim"), host(device, wait_s=30):
        assert not is_running(sleeper)
    when_waited_for.join()
    assert [re.fullmatch(holds + "; waiting 30 s at most", said) is not None for said in caplog.messages] == [True]


def test_a_janitor_that_was_killed_is_cleared_up_after(device: Sshd, holder: tuple[subprocess.Popen[str], int]) -> None:
    _, sleeper = holder
    (old,) = device.place.glob("slim-session-*")
    os.kill(device.janitor(), signal.SIGKILL)
    assert soon(lambda: not is_running(sleeper))
    assert old.exists()
    with host(device, wait_s=0) as there:
        assert [PurePosixPath(path) for path in device.place.glob("slim-session-*")] == [there.folder]


def test_one_who_waits_and_is_killed_takes_nothing(device: Sshd, holder: tuple[subprocess.Popen[str], int]) -> None:
    argv = [HERE, "-c", HOLD, str(device.config), HERE]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as second:
        assert soon(lambda: len(device.connections()) == 2)
        second.kill()
    assert soon(lambda: len(device.connections()) == 1)
    assert is_running(holder[1])
