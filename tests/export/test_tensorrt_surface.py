"""The adapter against the public names of TensorRT 10.3, 10.7, 10.16 and 11.4, which cannot be installed here.

Two ways: its source is read, and each name, keyword and number of arguments it uses has to be in all of them; and it
runs, builds and calls on a stand-in for each, which has these names only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from slim.artifact import Preprocessing
from slim.errors import SlimError, TargetError, UsageError
from slim.export import tensorrt
from slim.export.onnx import export_onnx
from slim.export.tensorrt import BuildOptions, Session, build
from tests.export.read_tensorrt_surface import surface as read_surface
from tests.export.tensorrt_names import unknown
from tests.export.tensorrt_standin import CLASSIC, UNSUPPORTED, StandIn, Surface, read

SOURCE = Path(tensorrt.__file__).read_text()
RTX = read("tensorrt_rtx", "1.7")
SURFACES = {version: read("tensorrt", version) for version in CLASSIC}


@pytest.mark.parametrize("surface", [*SURFACES.values(), RTX], ids=lambda one: f"{one['api']}-{one['version']}")
def test_every_name_that_the_adapter_uses_is_in_every_surface(surface: Surface) -> None:
    assert unknown(SOURCE, surface) == []


AFTER = "    config = builder.create_builder_config()\n"
"""The line of `build` that the lines below are written after."""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),
        ("config.set_flag(trt.BuilderFlag.INT8)", "BuilderFlag.INT8"),
        ("config.int8_calibrator = None", "IBuilderConfig.int8_calibrator is no property"),
        ("trt.IInt8EntropyCalibrator2", "trt.IInt8EntropyCalibrator2"),
        ("if builder.platform_has_fast_fp16: pass", "Builder.platform_has_fast_fp16"),
        ("network.get_input(0).set_dynamic_range(-1, 1)", "ITensor.set_dynamic_range"),
        ("first = network.get_input(0); first.set_dynamic_range(-1, 1)", "ITensor.set_dynamic_range"),
        ("parser.supports_model(b'')", "OnnxParser.supports_model"),
        ("builder.build_engine(network, config)", "Builder.build_engine"),
        ("config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size is no property"),
        ("config.set_memory_pool_limit(trt.MemoryPoolType.SCRATCH, 1)", "MemoryPoolType.SCRATCH"),
        ("builder.create_network(0, 1)", "Builder.create_network takes flags="),
        ("config.set_timing_cache(None, ignore=True)", "IBuilderConfig.set_timing_cache takes cache, ignore_mismatch"),
        ("trt.IBuilderConfig()", "IBuilderConfig.__init__ takes nothing: it is not public"),
        ("tensors = [network.get_input(0)]", "ITensor goes into List, where it is not followed"),
        ("getattr(builder, 'platform_has_fast_fp16')", "Builder goes into getattr, where it is not followed"),
        ("one, two = network.get_input(0)", "ITensor is unpacked, where it is not followed"),
        ("_parse_errors(config)", "_parse_errors(parser) is given IBuilderConfig"),
    ],
)
def test_the_check_finds_a_name_that_one_version_lacks(line: str, told: str) -> None:
    assert SOURCE.count(AFTER) == 1
    source = SOURCE.replace(AFTER, f"{AFTER}    {line}\n")
    found = [text for surface in SURFACES.values() for text in unknown(source, surface)]
    assert any(told in text for text in found), found


def test_a_function_whose_objects_are_not_known_is_found() -> None:
    source = f"{SOURCE}\n\ndef _more(thing: Any) -> Any:\n    return thing.anything\n"
    assert [text.partition(": ")[2] for text in unknown(source, RTX)] == [
        "_more(thing): say in PARAMETERS what it is",
        "_more: say in RESULTS what it returns",
    ]


def test_fp16_was_a_flag_of_ten_and_is_none_of_eleven() -> None:
    has = {version: "FP16" in surface["enums"]["BuilderFlag"].split() for version, surface in SURFACES.items()}
    assert has == {"10.3": True, "10.7": True, "10.16": True, "11.4": False}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_committed_names_of_the_installed_version_are_those_the_reader_reads() -> None:
    import tensorrt_rtx

    if not tensorrt_rtx.__version__.startswith("1.7."):
        pytest.skip(f"tensorrt_rtx {tensorrt_rtx.__version__} is installed; the names of 1.7 are committed")
    assert read_surface(tensorrt_rtx, "tensorrt_rtx") | {"version": RTX["version"]} == RTX


# The adapter on a stand-in of each version.

SMALL = Preprocessing(size=(3, 8, 6))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 4, 5)).eval()


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx", SMALL).path


@pytest.fixture(params=CLASSIC)
def standin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return put(monkeypatch, StandIn(SURFACES[request.param]))


def put(monkeypatch: pytest.MonkeyPatch, standin: StandIn) -> StandIn:
    """`standin` is what `import tensorrt` gives, on a machine whose GPU has the memory of the processor."""
    monkeypatch.setitem(sys.modules, "tensorrt", standin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: standin.gpu)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(tensorrt, "DEVICE", "cpu")
    return standin


def images(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_the_builder_is_told_what_the_options_say_and_nothing_of_precision(standin: StandIn, path: Path) -> None:
    engine = build("tensorrt", path, BuildOptions(batch=(1, 4, 8), workspace_mib=64, optimization_level=2))
    strong = 1 << int(standin.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert standin.called("Builder.create_network") == [{"flags": strong}]
    assert standin.called("OnnxParser.parse_from_file") == [{"model": str(path)}]
    assert standin.called("IOptimizationProfile.set_shape") == [
        {"input": "image", "min": (1, 3, 8, 6), "opt": (4, 3, 8, 6), "max": (8, 3, 8, 6)}
    ]
    assert len(standin.called("IBuilderConfig.add_optimization_profile")) == 1
    assert standin.called("IBuilderConfig.set_memory_pool_limit") == [
        {"pool": standin.MemoryPoolType.WORKSPACE, "pool_size": 64 * 2**20}
    ]
    assert standin.called("IBuilderConfig.builder_optimization_level") == [{"value": 2}]
    assert standin.called("IBuilderConfig.profiling_verbosity") == [{"value": standin.ProfilingVerbosity.DETAILED}]
    assert standin.called("IBuilderConfig.set_flag") == []
    assert (engine.api, engine.version) == ("tensorrt", standin.__version__)
    nodes = [node.name for node in onnx.load(path).graph.node]
    assert engine.layers == [{"Name": name} for name in nodes]
    assert "plan" not in repr(engine)


def test_without_a_limit_the_workspace_is_the_builders_to_choose(standin: StandIn, path: Path) -> None:
    build("tensorrt", path)
    assert standin.called("IBuilderConfig.set_memory_pool_limit") == []


def test_a_timing_cache_grows_from_build_to_build_and_a_foreign_one_is_refused(standin: StandIn, path: Path) -> None:
    first = build("tensorrt", path).timing_cache
    second = build("tensorrt", path, timing_cache=first).timing_cache
    assert first is not None
    assert second == first + b" and this build"
    with pytest.raises(UsageError, match="the timing cache is another version's or GPU's; leave it out"):
        build("tensorrt", path, timing_cache=b"cache of 8.6")


def test_a_compute_capability_is_not_for_tensorrt(standin: StandIn, path: Path) -> None:
    with pytest.raises(UsageError, match="compute capability is TensorRT-RTX's; TensorRT builds for the GPU it runs"):
        build("tensorrt", path, BuildOptions(compute_capability=(8, 6)))


def test_without_a_gpu_there_is_no_builder_and_no_session(
    monkeypatch: pytest.MonkeyPatch, standin: StandIn, path: Path
) -> None:
    plan = build("tensorrt", path).plan
    standin.gpu = False
    with pytest.raises(TargetError, match=r"no builder on this machine: CUDA initialization failure with error: 35; b"):
        build("tensorrt", path)
    with pytest.raises(TargetError, match="torch finds no GPU on this machine; open the plan where it is served"):
        Session("tensorrt", plan)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_session_computes_what_the_network_computes(
    standin: StandIn, path: Path, model: nn.Module, batch: int
) -> None:
    session = Session("tensorrt", build("tensorrt", path, BuildOptions(batch=(1, 2, 4))).plan)
    assert [(port.name, port.dtype, port.shape) for port in (*session.inputs, *session.outputs)] == [
        ("image", "float32", ("batch", 3, 8, 6)),
        ("logits", "float32", ("batch", 5)),
    ]
    given = images(batch, 3, 8, 6)
    given.setflags(write=False)  # as bytes from another process are
    for feed in (given, -given, np.asfortranarray(given)):
        (logits,) = session.call([feed])
        with torch.no_grad():
            # A handful of float32 operations of order 1: a few units in the last place, 1e-7 each.
            np.testing.assert_allclose(logits, model(torch.from_numpy(feed.copy())).numpy(), atol=2e-6)
    assert len(standin.called("IExecutionContext.set_tensor_address")) == 2  # the memory of one shape is kept
    assert standin.called("IExecutionContext.execute_async_v3") == [{"stream_handle": 7}] * 3


def test_a_result_is_not_overwritten_by_the_next_call(standin: StandIn, path: Path) -> None:
    session = Session("tensorrt", build("tensorrt", path).plan)
    (first,) = session.call([images(1, 3, 8, 6)])
    kept = first.copy()
    session.call([-images(1, 3, 8, 6)])
    np.testing.assert_array_equal(first, kept)


def test_a_session_refuses_what_the_plan_was_not_built_for(standin: StandIn, path: Path) -> None:
    session = Session("tensorrt", build("tensorrt", path, BuildOptions(batch=(1, 2, 4))).plan)
    (before,) = session.call([images(1, 3, 8, 6)])
    for shape in ((1, 3, 6, 8), (5, 3, 8, 6)):
        with pytest.raises(UsageError, match=r"input 'image' is \(.*\), the plan was built for \('batch', 3, 8, 6\)"):
            session.call([images(*shape)])
    with pytest.raises(UsageError, match="input 'image' is float64, the plan takes float32"):
        session.call([images(1, 3, 8, 6).astype(np.float64)])
    np.testing.assert_array_equal(session.call([images(1, 3, 8, 6)])[0], before)
    standin.__dict__["out_of_memory"] = True
    with pytest.raises(SlimError, match="the call failed on the GPU"):
        session.call([images(1, 3, 8, 6)])


def test_a_plan_of_another_version_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    put(monkeypatch, StandIn(SURFACES["10.3"]))
    plan = build("tensorrt", path).plan
    put(monkeypatch, StandIn(SURFACES["11.4"]))
    with pytest.raises(TargetError, match=r"tensorrt 11\.4\.0\.106: cannot open the plan: Serial.* Version tag does n"):
        Session("tensorrt", plan)


def test_a_plan_without_floats_is_refused(standin: StandIn, tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, 2]) for name in ("ids", "same")]
    graph = helper.make_graph([helper.make_node("Identity", ["ids"], ["same"])], "g", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "i.onnx")
    with pytest.raises(TargetError, match=r"'ids' of the plan is DataType\.INT64; slim feeds and reads float32 and"):
        Session("tensorrt", build("tensorrt", tmp_path / "i.onnx").plan)


def test_the_parsers_errors_are_told_in_one_line(standin: StandIn, tmp_path: Path) -> None:
    nodes = [helper.make_node(UNSUPPORTED, ["x"], [f"y{index}"], name=f"fold_{index}") for index in range(5)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y4")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph), tmp_path / "bad.onnx")
    with pytest.raises(SlimError) as caught:
        build("tensorrt", tmp_path / "bad.onnx")
    told = [f"node 'fold_{index}' (Col2Im): creator && 'no importer for Col2Im'" for index in range(3)]
    assert "; ".join([*told, "and 2 more; keep that operation out"]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_progress_is_told_and_what_it_raises_ends_the_build(standin: StandIn, path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    build("tensorrt", path, progress=lambda *step: steps.append(step))
    assert steps == [("Building", 0, 2), ("Building", 1, 2), ("Building", 2, 2), ("Building", 2, 2)]

    def stop(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("tensorrt", path, progress=stop)
    assert standin.called("Builder.cancelled") == [{}]


def test_the_stand_in_has_nothing_that_the_surface_has_not() -> None:
    eleven = StandIn(SURFACES["11.4"])
    builder = eleven.Builder(eleven.ILogger())
    config = builder.create_builder_config()
    for wrong in (
        lambda: eleven.BuilderFlag.FP16,
        lambda: eleven.IInt8Calibrator,
        lambda: builder.platform_has_fast_fp16,
        lambda: setattr(config, "int8_calibrator", None),
        lambda: config.set_calibration_profile(None),
    ):
        with pytest.raises(AttributeError):
            wrong()
    calls: list[Callable[[], object]] = [
        lambda: builder.create_network(0, 1),
        lambda: eleven.IBuilderConfig(),
        lambda: builder.reset(1),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
