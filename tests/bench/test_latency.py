from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import slim
from slim.bench import latency
from slim.bench.latency import Protocol
from slim.bench.worker import Worker
from slim.errors import SlimError, UsageError
from slim.export.session import staged
from slim.export.target import Target
from slim.measurement import Measurement

TARGET = Target(runtime="ort", device="cpu", threads=1)
SHORT = Protocol(sessions=3, rounds=4, calls=2, warm_up=1, max_rounds=24)


def network(path: Path, *, layers: int = 2, shape: tuple[str | int, ...] = ("batch", 64)) -> Path:
    """A chain of MatMuls from 64 to 64."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float32) / 8, f"w{number}")
        for number in range(layers)
    ]
    nodes = [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(layers)]
    given = helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "chain", [given], [result], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network(tmp_path_factory.mktemp("latency") / "network.onnx")


def ratio(low: float, high: float, *, fit: bool = True) -> Measurement:
    control = {"value": 1.0, "low": 0.99, "high": 1.01, "fit": fit}
    return Measurement(
        metric="latency_ratio", value=(low + high) / 2, unit="ratio", low=low, high=high, details={"control": control}
    )


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# What compare and latency hand back


def test_compare_holds_both_sides_the_control_and_the_conditions(file: Path) -> None:
    found = latency.compare(file, file, TARGET, seed=3, protocol=SHORT)
    assert (found.metric, found.unit, found.target) == ("latency_ratio", "ratio", str(TARGET))
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    sessions, rounds, calls = found.details["layout"]
    assert (rounds, calls) == (4, 2)
    assert len(found.samples) == sessions * rounds
    assert found.value == pytest.approx(float(np.median(found.samples)), rel=1e-3)
    for side in ("candidate", "reference"):
        wall = found.details[side]["samples_ms"]
        assert len(wall) == len(found.details[side]["samples_cpu_ms"]) == sessions * rounds * calls
        assert found.details[side]["p50_ms"]["value"] == pytest.approx(float(np.median(wall)), abs=1e-5)
        assert found.details[side]["peak_memory_bytes"] > 1e7
        assert "p95, which needs 59" in found.details[side]["p95_ms"]["refused"]
    control = found.details["control"]
    assert control["fit"] is not (control["low"] > 1.02 or control["high"] < 0.98)
    assert {"cpu_ratio", "steady", "threads", "cpus", "load_average", "steal_percent"} <= found.details.keys()
    assert found.environment["fingerprint"]
    assert Measurement.model_validate_json(found.model_dump_json()).value == found.value


def test_a_network_with_two_hundred_times_the_work_is_above_one(file: Path, tmp_path: Path) -> None:
    longer = network(tmp_path / "longer.onnx", layers=400)
    found = latency.compare(longer, file, TARGET, seed=0, protocol=SHORT)
    assert found.low is not None
    assert found.low > 2
    assert latency.differs(found)


def test_latency_gives_p50_and_p95_from_the_same_calls(file: Path) -> None:
    found = latency.latency(file, TARGET, seed=0, protocol=SHORT.model_copy(update={"calls": 5}))
    assert (found.metric, found.unit, found.statistic) == ("latency_p50_ms", "ms", "p50")
    assert found.value == pytest.approx(float(np.median(found.samples)), rel=1e-3)
    tail = latency.p95(found)
    assert (tail.metric, tail.statistic) == ("latency_p95_ms", "p95")
    assert tail.value == pytest.approx(float(np.quantile(found.samples, 0.95)), rel=1e-3)
    assert tail.low is not None
    assert tail.low <= tail.value
    assert found.details["peak_memory_bytes"] > 1e7


def test_a_side_of_a_comparison_is_a_figure_under_the_comparisons_control(file: Path) -> None:
    ratio = latency.compare(file, file, TARGET, seed=0, protocol=SHORT.model_copy(update={"calls": 5}))
    figures = latency.side_figures(ratio, "reference")
    assert figures.keys() == {"latency_p50_ms", "latency_p95_ms"}
    calls = ratio.details["reference"]["samples_ms"]
    assert figures["latency_p50_ms"].value == pytest.approx(float(np.median(calls)), rel=1e-3)
    assert figures["latency_p95_ms"].value == pytest.approx(float(np.quantile(calls, 0.95)), rel=1e-3)
    assert figures["latency_p50_ms"].details["control"]["fit"] == ratio.details["control"]["fit"]


def test_p95_of_too_few_calls_is_refused(file: Path) -> None:
    few = latency.latency(file, TARGET, seed=0, protocol=SHORT.model_copy(update={"rounds": 2, "max_rounds": 6}))
    with pytest.raises(SlimError, match=r"12 calls say nothing about p95, which needs 59; raise the rounds"):
        latency.p95(few)


def test_an_undecided_limit_doubles_the_rounds_up_to_the_cap(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "verdict", lambda found, limit: "inconclusive")
    found = latency.compare(file, file, TARGET, seed=0, protocol=SHORT, limit=1.0)
    # 3 sessions of 4 rounds, doubled once to 24 rounds, and 48 would be over the cap.
    assert found.details["layout"] == [6, 4, 2]


def test_a_slow_network_gets_fewer_rounds_never_under_four(file: Path) -> None:
    hurried = Protocol(sessions=3, rounds=50, calls=1, warm_up=1, aim_s=1e-6, max_rounds=12)
    assert latency.latency(file, TARGET, seed=0, protocol=hurried).details["layout"] == [3, 4, 1]


def test_progress_counts_sessions(file: Path) -> None:
    seen: list[object] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
        seen.append((title, total))
        yield lambda steps, note="": seen.append(steps)

    latency.latency(file, TARGET, seed=0, protocol=SHORT.model_copy(update={"max_rounds": 12}), progress=progress)
    assert seen == [("latency", 3), 1, 1, 1]


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "limit", "outcome"),
    [
        (0.70, 0.80, 0.80, "pass"),
        (0.70, 0.80, 0.79, "inconclusive"),
        (0.70, 0.80, 0.70, "inconclusive"),
        (0.70, 0.80, 0.69, "fail"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low: float, high: float, limit: float, outcome: str) -> None:
    assert latency.verdict(ratio(low, high), limit) == outcome
    mirrored = {"pass": "fail", "fail": "pass"}.get(outcome, outcome)
    if limit not in (low, high):  # the limit itself passes in both directions
        assert latency.verdict(ratio(low, high), limit, bound="min") == mirrored


@pytest.mark.parametrize("limit", [0.5, 0.75, 0.9])
def test_an_unfit_machine_gives_no_verdict(limit: float) -> None:
    assert latency.verdict(ratio(0.7, 0.8, fit=False), limit) == "inconclusive"


def test_a_counted_figure_is_its_own_interval() -> None:
    size = Measurement(metric="size_bytes", value=100, unit="bytes")
    assert latency.verdict(size, 100) == "pass"
    assert latency.verdict(size, 99) == "fail"
    assert latency.verdict(size, 100, bound="min") == "pass"


def test_differs_needs_the_whole_interval_outside_two_percent() -> None:
    assert latency.differs(ratio(1.021, 1.03))
    assert latency.differs(ratio(0.9, 0.979))
    assert not latency.differs(ratio(1.019, 1.03))
    assert not latency.differs(ratio(0.5, 1.5))


# Files and machines that do not fit


def test_a_missing_file_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.onnx: no such file; give an exported"):
        latency.compare(file, tmp_path / "absent.onnx", TARGET, seed=0, protocol=SHORT)


def test_a_broken_file_is_one_line_with_the_runtimes_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no graph")
    with pytest.raises(SlimError, match=r"^[^\n]*broken\.onnx: ort:cpu cannot open it: [^\n]+$"):
        latency.latency(broken, TARGET, seed=0, protocol=SHORT)


def test_a_fixed_batch_must_be_the_targets(tmp_path: Path) -> None:
    fixed = network(tmp_path / "fixed.onnx", shape=(1, 64))
    with pytest.raises(UsageError, match="'x0' has batch 1, the target 4; set batch=1"):
        latency.latency(fixed, TARGET.model_copy(update={"batch": 4}), seed=0, protocol=SHORT)


def test_an_open_size_cannot_be_given_an_input(tmp_path: Path) -> None:
    free = network(tmp_path / "free.onnx", shape=("batch", "height", 64))
    with pytest.raises(UsageError, match="leaves 'height' open; export it with a fixed input size"):
        latency.latency(free, TARGET, seed=0, protocol=SHORT)


def test_cores_that_are_not_there_are_refused(file: Path) -> None:
    with pytest.raises(UsageError, match=r"cpus \[4096\]: usable here are \[0"):
        latency.latency(file, TARGET, seed=0, protocol=SHORT.model_copy(update={"cpus": (4096,)}))


# Workers


def test_inputs_are_seeded_and_take_the_targets_batch(file: Path) -> None:
    session = TARGET.on.open(file, threads=1, precision="fp32")
    first, again, other = (staged(session, batch=3, seed=seed)[0] for seed in (1, 1, 2))
    assert first.shape == (3, 64)
    assert first.dtype == np.float32
    assert (first == again).all()
    assert (first != other).any()


def test_a_worker_is_told_its_threads_and_to_wait_passively_on_its_cores(file: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with Worker(TARGET.model_copy(update={"threads": 2}), cpus=[core]) as side:
        side.open(file, batch=1, seed=0)
        told = Path(f"/proc/{side.pid}/environ").read_text().split("\0")
        assert {"OMP_WAIT_POLICY=PASSIVE", "KMP_BLOCKTIME=0", "OMP_NUM_THREADS=2"} <= set(told)
        assert os.sched_getaffinity(side.pid) == {core}


def test_a_worker_that_is_killed_is_reported_and_not_waited_for(file: Path) -> None:
    with Worker(TARGET) as side:
        side.open(file, batch=1, seed=0)
        os.kill(side.pid, signal.SIGKILL)
        with pytest.raises(SlimError, match=r"network\.onnx: worker ended by signal SIGKILL during 'run'.*memory"):
            side.run(10**9)


def test_a_worker_that_cannot_start_leaves_its_last_words(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'libsomething is missing' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(SlimError, match="worker ended by exit code 3 during 'open': libsomething is missing"):
        latency.latency(file, TARGET, seed=0, protocol=SHORT)


def test_interrupted_no_worker_is_left(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    class Recorded(Worker):
        def __init__(self, target: Target, **options: Any) -> None:
            super().__init__(target, **options)
            pids.append(self.pid)

    @contextmanager
    def interrupt(title: str, total: int) -> Iterator[Callable[..., None]]:
        def advance(steps: int, note: str = "") -> None:
            assert all(is_running(pid) for pid in pids)
            raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(latency, "Worker", Recorded)
    with pytest.raises(KeyboardInterrupt):
        latency.compare(file, file, TARGET, seed=0, protocol=SHORT, progress=interrupt)
    assert len(pids) == 3
    assert not any(is_running(pid) for pid in pids)


def test_a_worker_ends_when_its_parent_is_killed(file: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from slim.bench.worker import Worker, Target\n"
        "side = Worker(Target.parse('ort')); side.open(Path(sys.argv[1]), batch=1, seed=0)\n"
        "print(side.pid, flush=True); sys.stdin.read()"
    )
    root = str(Path(slim.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", program, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_timing_loads_no_torch(file: Path) -> None:
    program = "import sys, json, slim.bench.worker; print(json.dumps(sorted(sys.modules)))"
    root = str(Path(slim.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert not {"torch", "timm"} & set(json.loads(done.stdout))


def test_files_taken_in_turn_come_back_in_their_order(file: Path, tmp_path: Path) -> None:
    slower = network(tmp_path / "slower.onnx", layers=40)
    first, second, third = latency.in_turn((slower, file, slower), TARGET, seed=0, protocol=SHORT)
    assert first.low is not None
    assert second.high is not None
    assert third.low is not None
    # Twenty times the layers: no noise of a machine that still runs the tests turns this round.
    assert second.high < first.low
    assert second.high < third.low
    assert [one.details["in_turn_with"] for one in (first, second, third)] == [2, 2, 2]
