"""Targets on a device: files are timed, compared and judged there, through a real ssh server on the loopback."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from slim import environment
from slim.artifact import Preprocessing
from slim.bench import accuracy, latency
from slim.bench.latency import Protocol
from slim.bench.worker import Worker, device, golden
from slim.cli import main
from slim.errors import MissingExtra, ParityError, TargetError
from slim.export.onnx import export_onnx
from slim.export.target import Target
from tests.bench.sshd import Sshd

SMALL = Preprocessing(size=(3, 8, 8))
SHORT = Protocol(sessions=3, rounds=4, calls=2, warm_up=1, max_rounds=12)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("device")) as running:
        yield running


@pytest.fixture
def remote(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """`ssh` as a user has it who has the device in their configuration."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F "{server.config}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return Target.parse(f"ort:cpu@ssh://device{sys.executable}")


def network(seed: int, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
        )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(network(0), tmp_path_factory.mktemp("remote") / "small.onnx", SMALL).path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(network(1, 512), tmp_path_factory.mktemp("remote") / "wide.onnx", SMALL).path


def test_two_files_are_compared_on_the_device(remote: Target, server: Sshd, file: Path, wide: Path) -> None:
    found = latency.compare(file, wide, remote, seed=0, protocol=SHORT)
    assert found.target == str(remote)
    assert found.high is not None
    assert found.high < 1  # 64 times fewer products
    assert len(found.details["candidate"]["samples_ms"]) == 3 * 4 * 2
    # The loopback is this machine, so what it says of itself must be what we know.
    assert found.environment["fingerprint"] == environment.fingerprint()
    assert found.environment["versions"]["onnxruntime"] == environment.versions()["onnxruntime"]
    assert not list(server.place.iterdir())


def test_accuracy_is_that_of_the_device(remote: Target, file: Path) -> None:
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    here = Target.parse("ort:cpu")
    ours, theirs = (accuracy.accuracy(file, target, [(images, labels)]) for target in (here, remote))
    assert ours.details["predictions"] == theirs.details["predictions"]
    assert theirs.target == str(remote)


def test_a_device_that_computes_something_else_is_not_timed(remote: Target, file: Path, tmp_path: Path) -> None:
    other = export_onnx(network(2), tmp_path / "other.onnx", SMALL).path
    with device(remote) as host, Worker(remote, host=host) as worker:
        worker.open(file, batch=1, seed=0)
        golden(worker, file, seed=0)
        with pytest.raises(ParityError, match=r"other\.onnx on ort:cpu.* differs from the same file here"):
            golden(worker, other, seed=0)


def test_a_runtime_missing_on_the_device_says_what_to_install_there(remote: Target, file: Path) -> None:
    bare = remote.model_copy(update={"host": "ssh://device/usr/bin/python3"})
    with pytest.raises(MissingExtra, match=r"onnxruntime is not installed for .*on the device: .* -m pip install"):
        latency.latency(file, bare, seed=0, protocol=SHORT)


def test_what_only_this_machine_can_serve_is_refused(file: Path) -> None:
    with pytest.raises(TargetError, match="torch:cpu is not served over ssh; run slim on the device"):
        latency.latency(file, Target.parse("torch@ssh://device"), seed=0, protocol=SHORT)


@pytest.mark.usefixtures("remote")
def test_the_command_line_measures_there(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"ort:cpu@ssh://device{sys.executable}"
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(file), "--target", target, "--json"])
    assert ended.value.code == 0
    (figure,) = json.loads(capsys.readouterr().out)
    assert figure["measurement"]["target"].endswith(f"@ssh://device{sys.executable}")


@pytest.mark.usefixtures("remote")
def test_a_host_that_is_not_there_ends_with_5(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(file), "--target", "ort:cpu@ssh://127.0.0.1:1"])
    assert ended.value.code == 5
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
