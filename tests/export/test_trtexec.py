from __future__ import annotations

import itertools
import json
import statistics
import subprocess
from pathlib import Path, PurePath, PurePosixPath

import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from slim.errors import SlimError, StoreError, TargetError, UsageError
from slim.export.engine import PlanVersion, sniff_version
from slim.export.trtexec import (
    Protocol,
    build_command,
    parse_layers,
    parse_times,
    parse_version,
    time_command,
    verify_protocol,
)
from tests.export import fake_trtexec

VERSIONS = [(10, 3, 0, 26), (10, 16, 0, 72), (11, 0, 0, 114), (11, 4, 1, 9)]
MAJORS = [10, 11]
PROTOCOLS = [
    Protocol(transfers=transfers, cuda_graph=graph, spin_wait=spin)
    for transfers, graph, spin in itertools.product([False, True], repeat=3)
]
SETTINGS = ("transfers", "cuda_graph", "spin_wait")

# What decides precision in 10, and is gone from 11.
PRECISION = {"best", "bf16", "calib", "fp16", "fp8", "int4", "int8", "layerOutputTypes", "layerPrecisions"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose name a shell would take apart."""
    folder = tmp_path / "my nets, v=1; $(rm x)"
    folder.mkdir()
    return folder


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def network(path: Path, batch: int | str = "batch") -> Path:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3, 8, 8])
    nodes = [
        helper.make_node("Relu", ["image"], ["x"], name="first"),
        helper.make_node("Abs", ["x"], ["logits"], name="last"),
    ]
    graph = helper.make_graph(nodes, "tiny", [image], [logits])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def built(place: Path, version: tuple[int, ...]) -> tuple[str, Path]:
    """The trtexec of `version` and an engine it built for batches of 1 to 8 images (3, 8, 8)."""
    trtexec, engine = str(fake_trtexec.install(place, version)), place / "net.plan"
    command = build_command(trtexec, version[0], network(place / "net.onnx"), engine, batch=(1, 4, 8), size=(3, 8, 8))
    ended = run(command)
    assert ended.returncode == 0, ended.stderr
    return trtexec, engine


def words(major: int, protocol: Protocol, *, layers: PurePath | None = None) -> list[str]:
    command = time_command(
        "trtexec", major, PurePath("a.plan"), protocol, times=PurePath("t.json"), layers=layers, shapes=None
    )
    return command[1:]


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_an_engine_is_built_timed_and_read_back_on_every_version(place: Path, version: tuple[int, ...]) -> None:
    trtexec, engine = built(place, version)
    assert sniff_version(engine.read_bytes()) == PlanVersion("tensorrt", version)
    times, layers = place / "times.json", place / "layers.json"
    protocol = Protocol(duration_s=1)
    command = time_command(
        trtexec, version[0], engine, protocol, times=times, layers=layers, shapes={"image": (4, 3, 8, 8)}
    )
    ended = run(command)
    assert ended.returncode == 0, ended.stderr
    verify_protocol(ended.stdout, protocol, place="log")

    samples = parse_times(times.read_text(), place=str(times))
    # Made up: 2 ms for each of 4 images, 0.5 ms to launch, up to 0.01 ms of noise: 8.505 ms. The warm-up takes 24 calls
    # (204.1 ms), and 117.1 more reach 1.2 s.
    assert len(samples) == 118
    assert {sample.h2d_ms + sample.d2h_ms for sample in samples} == {0}
    assert statistics.median(sample.compute_ms for sample in samples) == pytest.approx(8.505, abs=0.005)
    assert samples[0].start_enqueue_ms >= protocol.warm_up_ms
    assert samples[0].end_enqueue_ms - samples[0].start_enqueue_ms == pytest.approx(0.6, abs=1e-3)
    profile = parse_layers(layers.read_text(), place=str(layers))
    assert [layer.name for layer in profile] == ["first", "last"]
    assert sum(layer.average_ms for layer in profile) == pytest.approx(8.505, abs=0.005)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_one_protocol_means_the_same_to_10_and_to_11(protocol: Protocol) -> None:
    layers = PurePath("l.json")
    ten, eleven = (fake_trtexec.in_force(major, words(major, protocol, layers=layers)) for major in MAJORS)
    assert ten == eleven == {**protocol.model_dump(), "separate_profile": True}


def test_one_command_line_for_both_would_mean_something_else_to_each(place: Path) -> None:
    naive = ["--warmUp=200", "--duration=3", "--iterations=10"]
    ten, eleven = (fake_trtexec.in_force(major, naive) for major in MAJORS)
    assert [ten[name] for name in SETTINGS] == [True, False, False]
    assert [eleven[name] for name in SETTINGS] == [False, True, True]
    # The line for 10 runs on 11 without an error, and does not mean there what it means on 10.
    asked = Protocol(transfers=True)
    assert fake_trtexec.in_force(10, words(10, asked))["transfers"]
    assert not fake_trtexec.in_force(11, words(10, asked))["transfers"]
    trtexec, engine = built(place, (11, 0, 0, 114))
    command = [trtexec, f"--loadEngine={engine}", *words(10, asked)[1:-1]]
    log = run(command).stdout
    with pytest.raises(
        SlimError, match=r"log: trtexec says transfers=False, cuda_graph=True, asked was transfers=True"
    ):
        verify_protocol(log, asked, place="log")


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_the_same_protocol_gives_the_same_times_on_10_and_11(tmp_path: Path, protocol: Protocol) -> None:
    seen = []
    for major in MAJORS:
        times = tmp_path / f"{major}.json"
        fake_trtexec.export_times(times, fake_trtexec.calls(fake_trtexec.in_force(major, words(major, protocol)), 1))
        seen.append(parse_times(times.read_text(), place="times"))
    assert seen[0] == seen[1]
    assert all((sample.h2d_ms > 0) == (sample.d2h_ms > 0) == protocol.transfers for sample in seen[0])


@pytest.mark.parametrize("major", MAJORS)
def test_every_setting_of_the_protocol_changes_what_is_in_force(major: int) -> None:
    plain = Protocol()
    changed = [
        plain.model_copy(update={name: not value if isinstance(value, bool) else value + 1})
        for name, value in plain.model_dump().items()
    ]
    meanings = [fake_trtexec.in_force(major, words(major, protocol)) for protocol in (plain, *changed)]
    assert all(a != b for a, b in itertools.combinations(meanings, 2))


def test_layers_do_not_cost_10_its_times(place: Path) -> None:
    trtexec, engine = built(place, (10, 3, 0, 26))
    times, shapes = place / "times.json", {"image": (1, 3, 8, 8)}
    command = time_command(
        trtexec, 10, engine, Protocol(duration_s=0), times=times, layers=place / "layers.json", shapes=shapes
    )
    assert run([word for word in command if word != "--separateProfileRun"]).returncode == 0
    assert not times.exists()
    assert run(command).returncode == 0
    assert parse_times(times.read_text(), place="times")


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("layers", [None, PurePath("l.json")])
def test_no_command_sets_a_precision_or_a_flag_of_another_version(major: int, layers: PurePath | None) -> None:
    build = build_command("trtexec", major, PurePath("a.onnx"), PurePath("a.plan"), batch=(1, 8, 64))
    for command in [build[1:], *(words(major, protocol, layers=layers) for protocol in PROTOCOLS)]:
        assert not fake_trtexec.parse(major, command).keys() & PRECISION


def test_the_stand_in_refuses_a_precision_on_11_only_and_what_no_version_knows_on_both() -> None:
    assert "fp16" in fake_trtexec.parse(10, ["--fp16"])
    for major, word in [(11, "--fp16"), (10, "--noCudaGraph"), (10, "--explicitBatch"), (11, "--explicitBatch")]:
        with pytest.raises(fake_trtexec.RefusedError, match="Unknown option"):
            fake_trtexec.parse(major, [word])


@pytest.mark.parametrize("major", MAJORS)
def test_the_graph_alone_decides_precision(place: Path, major: int) -> None:
    _trtexec, engine = built(place, (major, 3, 0, 1))
    assert json.loads(engine.read_bytes()[28:])["typed"] is True


def test_a_batch_becomes_a_profile_of_three_shapes() -> None:
    command = build_command(
        "/opt/trt exec", 10, PurePosixPath("/a b/net.onnx"), PurePosixPath("/a b/net.plan"),
        batch=(1, 8, 64), input_name="input:0", size=(3, 32, 24), timing_cache=PurePosixPath("/c d/tactics"),
    )  # fmt: skip
    assert command == [
        "/opt/trt exec",
        "--onnx=/a b/net.onnx",
        "--saveEngine=/a b/net.plan",
        "--stronglyTyped",
        "--skipInference",
        "--profilingVerbosity=detailed",
        "--minShapes=input:0:1x3x32x24",
        "--optShapes=input:0:8x3x32x24",
        "--maxShapes=input:0:64x3x32x24",
        "--timingCacheFile=/c d/tactics",
    ]


def test_a_file_with_a_fixed_batch_is_built_and_timed_without_shapes(place: Path) -> None:
    trtexec, model, engine = str(fake_trtexec.install(place, (11, 1, 0, 106))), place / "net.onnx", place / "net.plan"
    network(model, batch=2)
    ended = run(build_command(trtexec, 11, model, engine, batch=(1, 4, 8), size=(3, 8, 8)))
    assert "Static model does not take explicit shapes" in ended.stderr
    cache = place / "tactics"
    assert run(build_command(trtexec, 11, model, engine, batch=None, timing_cache=cache)).returncode == 0
    assert cache.exists()
    times = place / "times.json"
    command = time_command(trtexec, 11, engine, Protocol(duration_s=0), times=times, layers=None, shapes=None)
    assert run(command).returncode == 0
    assert parse_times(times.read_text(), place="times")[0].compute_ms == pytest.approx(4.505, abs=0.005)


def test_an_engine_of_another_version_is_refused(place: Path) -> None:
    _trtexec, engine = built(place, (10, 3, 0, 26))
    other = str(fake_trtexec.install(place / "newer", (11, 0, 0, 114)))
    times = place / "times.json"
    ended = run(time_command(other, 11, engine, Protocol(), times=times, layers=None, shapes={"image": (1, 3, 8, 8)}))
    assert (ended.returncode, times.exists()) == (1, False)
    assert "not compatible with this version" in ended.stderr


def test_commands_that_cannot_work_are_refused_before_they_run() -> None:
    model, engine = PurePath("a.onnx"), PurePath("a.plan")
    with pytest.raises(TargetError, match=r"trtexec: TensorRT 8 is not known here, 10 and 11 are; install one of them"):
        build_command("trtexec", 8, model, engine, batch=None)
    with pytest.raises(TargetError, match=r"TensorRT 12 is not known here"):
        words(12, Protocol())
    for batch in [(0, 1, 2), (1, 9, 8), (2, 1, 8)]:
        with pytest.raises(UsageError, match=r"must be smallest, usual, largest, from 1 up; put them in order"):
            build_command("trtexec", 10, model, engine, batch=batch)
    for name in ["", "a,b", "it's"]:
        with pytest.raises(UsageError, match=r"cannot be named on its command line; rename it"):
            build_command("trtexec", 10, model, engine, batch=(1, 1, 1), input_name=name)


@pytest.mark.parametrize("version", [(10, 3, 0, 26), (10, 16, 1, 72), (11, 4, 1, 9)], ids=str)
def test_the_version_is_read_from_the_first_line_it_prints(place: Path, version: tuple[int, ...]) -> None:
    log = run([str(fake_trtexec.install(place, version)), "--help"]).stdout
    assert parse_version(log) == (version if version != (10, 3, 0, 26) else version[:3])


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --help", (10, 3, 0)),
        ("[I] &&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9] # trtexec", (10, 13, 3, 9)),
        ("Welcome!\n&&&& RUNNING TensorRT.trtexec [TensorRT v110401] [b9] # [TensorRT v8601]\n", (11, 4, 1, 9)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec", (8, 6, 1)),
    ],
)
def test_a_version_has_two_digits_a_part_from_10_on(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "\n\n", "bash: trtexec: command not found\n", "TensorRT v100300"])
def test_words_of_another_program_are_no_version(text: str) -> None:
    with pytest.raises(TargetError, match=r"names no TensorRT version; give the path of trtexec") as caught:
        parse_version(text)
    assert "\n" not in str(caught.value)


CALL = {"startEnqMs": 200.1, "endEnqMs": 200.2, "h2dMs": 0.25, "computeMs": 2, "d2hMs": 0.5, "latencyMs": 2.75}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the file: Invalid JSON: EOF"),
        ("[\n]\n", r"times.json: no call after the warm-up; time the engine for longer"),
        (json.dumps([CALL])[:-9], r"the file: Invalid JSON: EOF"),
        (json.dumps([CALL, CALL])[:-1], r"the file: Invalid JSON: EOF"),
        ("{}", r"the file: Input should be a valid array"),
        (json.dumps([CALL, 3]), r"1: Input should be an object"),
        (json.dumps([{"latencyMs": 2}]), r"0.computeMs: Field required"),
        (json.dumps([CALL]).replace("2.75", "nan"), r"the file: Invalid JSON"),
        (json.dumps([CALL, CALL | {"computeMs": float("nan")}]), r"1.computeMs: Input should be a finite number"),
        (json.dumps([CALL | {"latencyMs": float("inf")}]), r"0.latencyMs: Input should be a finite number"),
        (json.dumps([CALL | {"h2dMs": "0.25"}]), r"0.h2dMs: Input should be a valid number"),
        (json.dumps([CALL | {"d2hMs": -0.5}]), r"0.d2hMs: Input should be greater than or equal to 0"),
        (json.dumps([CALL | {"computeMs": 0}]), r"0.computeMs: Input should be greater than 0"),
        (json.dumps([CALL | {"latencyMs": 3}]), r"0.latencyMs is 3, its parts are 2.75 together; .* trtexec 10 or 11"),
    ],
)
def test_times_that_cannot_be_read_are_a_store_error_in_one_line(text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        parse_times(text, place="times.json")
    assert str(caught.value).startswith("times.json: ")
    assert "\n" not in str(caught.value)


def test_times_are_read_as_they_stand() -> None:
    (sample,) = parse_times(json.dumps([CALL | {"startH2dMs": 200.15}]), place="times.json")
    assert (sample.h2d_ms, sample.compute_ms, sample.d2h_ms, sample.latency_ms) == (0.25, 2, 0.5, 2.75)


LAYER = {"name": "conv1 + relu", "timeMs": 30, "averageMs": 3, "medianMs": 2.5, "percentage": 100}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the file: Invalid JSON"),
        ("[]", r"not a count of calls and then the layers"),
        (json.dumps([{"count": 10}]), r"not a count of calls and then the layers; profile the engine again"),
        (json.dumps([LAYER, LAYER]), r"not a count of calls and then the layers"),
        (json.dumps([{"count": 10}, LAYER])[:-1], r"the file: Invalid JSON: EOF"),
        (json.dumps([{"count": 10}, LAYER]).replace("conv1", 'conv"1'), r"the file: Invalid JSON"),
        (json.dumps([{"count": 10}, LAYER]).replace("100", "-nan"), r"the file: Invalid JSON"),
        (json.dumps([{"count": 10}, LAYER | {"medianMs": float("nan")}]), r"0.medianMs: Input should be a finite"),
        (json.dumps([{"count": 10}, {"name": "conv1"}]), r"0.averageMs: Field required"),
        (json.dumps({"count": 10}), r"the file: Input should be a valid array"),
    ],
)
def test_layers_that_cannot_be_read_are_a_store_error_in_one_line(text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        parse_layers(text, place="layers.json")
    assert str(caught.value).startswith("layers.json: ")
    assert "\n" not in str(caught.value)


def log_of(protocol: Protocol, capsys: pytest.CaptureFixture[str], *, captured: bool = True) -> str:
    fake_trtexec.log_options(fake_trtexec.in_force(11, words(11, protocol)), 11)
    if captured:
        fake_trtexec.log("Successfully captured CUDA graph for the current execution context")
    return capsys.readouterr().out


def test_what_was_in_force_is_read_from_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    for protocol, other in itertools.product(PROTOCOLS, repeat=2):
        log = log_of(protocol, capsys)
        if protocol == other:
            verify_protocol(log, protocol, place="log")
        else:
            with pytest.raises(SlimError, match=r"log: trtexec says .*; the times mean something else, do not use"):
                verify_protocol(log, other, place="log")


@pytest.mark.parametrize("change", [{"warm_up_ms": 100}, {"duration_s": 4}, {"iterations": 11}])
def test_another_length_is_another_protocol(change: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = change
    with pytest.raises(SlimError, match=rf"trtexec says {name}="):
        verify_protocol(log_of(Protocol(), capsys), Protocol().model_copy(update=change), place="log")


def test_a_graph_that_could_not_be_captured_was_not_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    protocol = Protocol(cuda_graph=True)
    with pytest.raises(SlimError, match=r"trtexec says cuda_graph=False, asked was cuda_graph=True"):
        verify_protocol(log_of(protocol, capsys, captured=False), protocol, place="log")


def test_a_log_that_does_not_say_what_was_in_force_proves_nothing() -> None:
    with pytest.raises(SlimError, match=r"trtexec says warm_up_ms=None, .*spin_wait=None, asked was warm_up_ms=200, "):
        verify_protocol("", Protocol(), place="log")


def test_a_protocol_is_recorded_whole_and_read_back_equal() -> None:
    protocol = Protocol(warm_up_ms=0, duration_s=7, iterations=299, transfers=True, cuda_graph=True, spin_wait=False)
    assert Protocol.model_validate_json(protocol.model_dump_json()) == protocol
    assert all(field.description for field in Protocol.model_fields.values())
    with pytest.raises(ValidationError):
        Protocol.model_validate({"threads": 2})
    for wrong in [{"warm_up_ms": -1}, {"duration_s": -1}, {"iterations": 0}]:
        with pytest.raises(ValidationError):
            Protocol.model_validate(wrong)
