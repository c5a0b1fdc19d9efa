"""Every runtime that runs here, opened and called; and the worker as a device runs it, without slim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slim.artifact import Preprocessing
from slim.bench.worker import Worker
from slim.errors import MissingExtra, StoreError, TargetError, UsageError
from slim.export import runtime, session
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.parity import parity
from slim.export.runtime import GROUP, Runtime, runtimes
from slim.export.session import Port, Session
from slim.export.target import Target

SMALL = Preprocessing(size=(3, 16, 16))
HERE = ["ort:cpu", "openvino:cpu", "torch:cpu", "torch:cpu,mode=compiled", "torch:cpu,mode=aoti"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export_onnx(network, tmp_path_factory.mktemp("session") / "network.onnx", SMALL)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def ready(text: str) -> Target:
    target = Target.parse(text)
    if util.find_spec(target.on.module) is None:
        pytest.skip(f"{target.on.module} is not installed: {target.on.remedy}")
    return target


@pytest.mark.parametrize("text", HERE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compilers, about Python's own ast
def test_every_runtime_computes_what_the_network_does(
    text: str, network: nn.Module, file: OnnxFile, tmp_path: Path
) -> None:
    target = ready(text)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    served = target.on.build(file, lambda: network, tmp_path, target)
    found = parity(network, served, images(5), target=target)
    assert (found.n, found.target) == (5, str(target))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    with Worker(target) as worker:
        assert worker.open(served, batch=1, seed=0) == "fp32"
        assert worker.inputs[0].name == "image"
        assert worker.inputs[0].shape[1:] == (3, 16, 16)
        assert len(worker.run(3).wall_ms) == 3
        one = images(1)
        given = worker.infer(one.numpy())
    assert np.abs(given - network(one).detach().numpy()).max() < 1e-5


@pytest.mark.parametrize("text", ["openvino:cpu,precision=bf16", "torch:cpu,precision=bf16"])
def test_fewer_bits_of_the_runtime_are_said_and_seen(
    text: str, network: nn.Module, file: OnnxFile, tmp_path: Path
) -> None:
    target = ready(text)
    served = target.on.build(file, lambda: network, tmp_path, target)
    opened = target.on.open(served, threads=1, precision="bf16", mode=target.mode)
    assert opened.precision == "bf16"
    found = parity(network, served, images(8), target=target)
    assert found.details["gate"]["cosine"] == 0.99


def test_openvino_computes_in_32_bits_unless_told_otherwise(file: OnnxFile) -> None:
    target = ready("openvino")
    assert target.on.open(file.path, threads=1, precision="fp32").precision == "fp32"


def test_the_worker_needs_nothing_of_slim(file: OnnxFile, tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_bytes(Path(session.__file__).read_bytes())
    command = {"op": "open", "opener": "ort:cpu", "path": str(file.path), "batch": 1, "seed": 0}
    command |= {"threads": 1, "precision": "fp32", "mode": ""}
    script = (
        f"import sys, runpy; sys.argv = ['worker.py']; runpy.run_path({str(program)!r}, run_name='__main__');"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    untold = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        input=json.dumps(command) + "\n",
        capture_output=True,
        text=True,
        check=True,
        env=untold | {"TMPDIR": str(tmp_path)},
    )
    assert json.loads(done.stdout)["inputs"] == [["image", "float32", ["batch", 3, 16, 16]]]
    assert not (tmp_path / ".ses").exists()  # of ONNX Runtime's telemetry
    loaded = set(eval(done.stderr.strip().splitlines()[-1]))
    assert {"numpy", "onnxruntime"} <= loaded
    assert not {"slim", "torch", "pydantic", "openvino"} & loaded


def test_the_worker_runs_on_old_pythons() -> None:
    compile(Path(session.__file__).read_text(), "session.py", "exec")
    import ast

    ast.parse(Path(session.__file__).read_text(), feature_version=(3, 8))


def test_a_runtime_that_is_not_on_the_worker_s_python_is_a_missing_extra(
    file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libsomething.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        Worker(Target.parse("ort")) as worker,
        pytest.raises(MissingExtra, match=r"libsomething.*pip install") as caught,
    ):
        worker.open(file.path, batch=1, seed=0)
    assert caught.value.exit_code == 5


def test_a_provider_that_falls_back_to_another_is_refused(file: OnnxFile) -> None:
    with pytest.raises(StoreError, match=r"ort:cuda cannot load it: .*CUDAExecutionProvider"):
        runtimes()["ort:cuda"].open(file.path, threads=1, precision="fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["ort:cuda", "ort:tensorrt", "torch:cuda"])
def test_runtimes_of_a_gpu_say_that_there_is_none_and_what_to_do(name: str) -> None:
    state = runtimes()[name].probe()
    assert state.level == "missing"
    assert state.remedy
    with pytest.raises(MissingExtra, match="target "):
        Target.parse(name).probe()


class Elsewhere(Runtime):
    """A runtime of another package."""

    name = "elsewhere"
    about = "ONNX Runtime by another name"
    module = "onnxruntime"
    distributions = ("onnxruntime",)
    remedy = "pip install elsewhere"
    opener = f"{__name__}:open_elsewhere"


class _Constant:
    inputs = (Port("image", "float32", ("batch", 3, 16, 16)),)
    outputs = (Port("logits", "float32", ("batch", 5)),)
    precision = "fp32"

    def call(self, feeds: list[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros((len(feeds[0]), 5), np.float32)]


def open_elsewhere(path: str, *, threads: int, precision: str, mode: str) -> Session:
    return _Constant()


@pytest.fixture
def entry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    name, value = request.param
    found = metadata.EntryPoint(name, value, GROUP)
    monkeypatch.setattr(runtime.metadata, "entry_points", lambda group: [found] if group == GROUP else [])
    runtimes.cache_clear()
    yield
    runtimes.cache_clear()


@pytest.mark.parametrize("entry", [("elsewhere", f"{__name__}:Elsewhere")], indirect=True)
@pytest.mark.usefixtures("entry")
def test_another_package_adds_a_runtime_by_an_entry_point(file: OnnxFile) -> None:
    target = Target.parse("elsewhere,threads=2")
    assert target.probe() == metadata.version("onnxruntime")
    opened = target.on.open(file.path, threads=1, precision="fp32")
    assert opened.call([images(3).numpy()])[0].shape == (3, 5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("ort:cpu", f"{__name__}:Elsewhere"), "target 'ort:cpu' of .*the name is (taken|not the name)"),
        (("nowhere", f"{__name__}:Elsewhere"), "is not the name it has itself, 'elsewhere'"),
        (("elsewhere", f"{__name__}:open_elsewhere"), "is no subclass of slim.export.Runtime"),
    ],
    indirect=["entry"],
)
@pytest.mark.usefixtures("entry")
def test_an_entry_point_that_is_no_runtime_is_named(message: str) -> None:
    with pytest.raises(TargetError, match=message):
        runtimes()


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    for name in ("ort:cpu", "openvino:cpu", "torch:cpu"):
        with pytest.raises(UsageError, match="no such file"):
            runtimes()[name].open(tmp_path / "none.onnx", threads=1, precision="fp32")
