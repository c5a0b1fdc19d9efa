from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from slim.errors import SlimError, StoreError, TargetError
from slim.export.engine import ARCH, OS, PLAN, SIDECAR, PlanVersion, Sidecar, read_engine, read_sidecar, sniff_version
from slim.export.engine import write_engine as write
from slim.store import content_digest

WANTED: dict[str, Any] = {
    "onnx_sha256": "0" * 64,
    "api": "trtexec",
    "version": "10.3.0",
    "gpu": "Orin",
    "compute_capability": "8.7",
    "options": {"batch": [1, 8, 64], "strongly_typed": True},
}


def plan_of(tag: bytes, *version: int, layout: int = 0) -> bytes:
    """A header as trtexec's own sources read it, and something behind."""
    return tag + layout.to_bytes(4, "little") + bytes(16) + bytes(version) + b"layers" * 20


CLASSIC = plan_of(b"ftrt", 10, 3, 0, 26)


def sidecar_of(plan: bytes, **fields: Any) -> Sidecar:
    unasked = {"driver": "540.4.0", "os": OS, "arch": ARCH, "timing_cache_sha256": None, "executed": False}
    identity = {"plan_sha256": hashlib.sha256(plan).hexdigest(), "size_bytes": len(plan)}
    return Sidecar.model_validate(WANTED | unasked | identity | fields)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = tmp_path / "engines" / "tensorrt orin-1"
    assert write(folder, CLASSIC, sidecar_of(CLASSIC)) == folder / PLAN
    return folder


@pytest.fixture(scope="module")
def rtx_plan() -> bytes:
    """A convolution as an engine, built by the real TensorRT-RTX."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed: pip install tensorrt-rtx")
    import tensorrt_rtx

    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight"], ["logits"])],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4, 6, 6])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert tensorrt_rtx.OnnxParser(network, logger).parse(model.SerializeToString())
    return bytes(builder.build_serialized_network(network, builder.create_builder_config()))


def rtx_version() -> str:
    import tensorrt_rtx

    return str(tensorrt_rtx.__version__)


def forge(folder: Path, **fields: Any) -> None:
    """Rewrite the sidecar with a digest that fits, as somebody who knows the format would."""
    path = folder / SIDECAR
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(content | {"digest": content_digest(content)}))


def refused(kind: type[SlimError], message: str, folder: Path, **changes: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_engine(folder, **WANTED | changes)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_an_engine_comes_back_as_the_very_bytes_with_its_sidecar(engine: Path) -> None:
    assert read_engine(engine, **WANTED) == CLASSIC
    assert read_sidecar(engine) == sidecar_of(CLASSIC)
    assert sorted(path.name for path in engine.iterdir()) == [SIDECAR, PLAN]


def test_a_sidecar_holds_no_path(engine: Path, tmp_path: Path) -> None:
    assert not {name for name in Sidecar.model_fields if "path" in name or "file" in name}
    assert str(tmp_path) not in (engine / SIDECAR).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"api": "tensorrt"}, r"engine.json: api is 'trtexec', wanted is 'tensorrt'; .* build it again here"),
        ({"version": "10.3.1"}, r"version is '10.3.0', wanted is '10.3.1'"),
        ({"gpu": "Thor"}, r"gpu is 'Orin', wanted is 'Thor'"),
        ({"gpu": None}, r"gpu is 'Orin', wanted is None"),
        ({"compute_capability": "8.6"}, r"compute_capability is '8.7', wanted is '8.6'"),
        ({"os": "Windows"}, r"os is '\w+', wanted is 'Windows'"),
        ({"arch": "riscv64"}, r"arch is '\w+', wanted is 'riscv64'"),
    ],
)
def test_an_engine_for_another_device_is_a_target_error(engine: Path, change: dict[str, Any], message: str) -> None:
    refused(TargetError, message, engine, **change)
    assert TargetError.exit_code == 5


def test_an_engine_from_another_machine_is_refused_unless_it_is_read_for_that_machine(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    write(folder, CLASSIC, sidecar_of(CLASSIC, os="QNX", arch="riscv64"))
    refused(TargetError, r"os is 'QNX', wanted is ", folder)
    assert read_engine(folder, **WANTED, os="QNX", arch="riscv64") == CLASSIC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"onnx_sha256": "f" * 64}, r"built from the file 000000000000, wanted is ffffffffffff; .* from this file"),
        ({"options": {"batch": [1, 8, 32], "strongly_typed": True}}, r"batch=\[1, 8, 64\], wanted is \[1, 8, 32\]; "),
        ({"options": {"batch": [1, 8, 64], "strongly_typed": 1}}, r"strongly_typed=true, wanted is 1;"),
        ({"options": {"batch": [1, 8, 64]}}, r"strongly_typed=true, wanted is absent;"),
        ({"options": WANTED["options"] | {"refit": None}}, r"refit=absent, wanted is null;"),
    ],
)
def test_an_engine_of_another_file_or_other_options_is_refused(
    engine: Path, change: dict[str, Any], message: str
) -> None:
    refused(StoreError, message, engine, **change)


def test_options_are_compared_as_they_are_stored(engine: Path) -> None:
    options = {"strongly_typed": True, "batch": (1, 8, 64)}
    assert read_engine(engine, **WANTED | {"options": options}) == CLASSIC


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plan: plan[:-1], r"engine.plan: 147 bytes, 148 in engine.json; not the whole plan, build it again"),
        (lambda plan: plan + b"\0", r"149 bytes, 148 in engine.json"),
        (lambda plan: b"", r"0 bytes, 148 in engine.json"),
        (lambda plan: plan[:40] + b"X" + plan[41:], r"sha256 \w{12} is not \w{12} of engine.json; .* never load it"),
        (lambda plan: plan[:25] + b"\4" + plan[26:], r"sha256 \w{12} is not \w{12}"),
    ],
    ids=["truncated", "longer", "empty", "edited", "edited header"],
)
def test_a_plan_that_is_not_the_one_written_is_refused(engine: Path, damage: Any, message: str) -> None:
    (engine / PLAN).write_bytes(damage(CLASSIC))
    refused(StoreError, message, engine)


@pytest.mark.parametrize("name", [PLAN, SIDECAR])
def test_a_missing_file_is_refused(engine: Path, name: str) -> None:
    (engine / name).unlink()
    refused(StoreError, rf"{name}: cannot be read: No such file or directory; build the engine again", engine)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", r"engine.json: not an engine's sidecar \(JSONDecodeError"),
        (lambda text: text[:-20], r"not an engine's sidecar \(JSONDecodeError"),
        (lambda text: "[]", r"not an engine's sidecar \(TypeError"),
        (lambda text: "{}", r"not an engine's sidecar \(KeyError\('format'\)\)"),
        (lambda text: text.replace("slim-engine/1", "slim-engine/2"), r"format 'slim-engine/2' is not 'slim-engine/1'"),
        (lambda text: text.replace("Orin", "Thor"), r"does not have its recorded digest, so it was edited"),
        (lambda text: text.replace('"executed": false', '"executed": true'), r"so it was edited"),
    ],
    ids=["empty", "truncated", "no object", "no format", "newer format", "other gpu", "executed"],
)
def test_a_sidecar_that_is_not_the_one_written_is_refused(engine: Path, damage: Any, message: str) -> None:
    path = engine / SIDECAR
    path.write_text(damage(path.read_text()))
    refused(StoreError, message, engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"plan": "../../other.plan"}, r"engine.json: plan: Extra inputs are not permitted; use the slim that wrote"),
        ({"executed": 1}, r"executed: Input should be a valid boolean"),
        ({"onnx_sha256": "short"}, r"onnx_sha256: String should match pattern"),
        ({"size_bytes": 0}, r"size_bytes: Input should be greater than or equal to 1"),
    ],
)
def test_a_sidecar_of_another_shape_is_refused_though_its_digest_fits(
    engine: Path, fields: dict[str, Any], message: str
) -> None:
    forge(engine, **fields)
    refused(StoreError, message, engine)


def test_that_a_plan_never_ran_stays_written_down_however_often_it_is_read(engine: Path) -> None:
    before = (engine / SIDECAR).read_bytes()
    for _ in range(2):
        read_engine(engine, **WANTED)
        assert read_sidecar(engine).executed is False
    assert (engine / SIDECAR).read_bytes() == before
    with pytest.raises(ValidationError):
        setattr(read_sidecar(engine), "executed", True)  # noqa: B010 - mypy knows that it cannot be assigned


def test_a_plan_that_ran_is_written_anew_over_the_old_one(engine: Path) -> None:
    write(engine, CLASSIC, read_sidecar(engine).model_copy(update={"executed": True}))
    assert read_sidecar(engine).executed is True
    assert read_engine(engine, **WANTED) == CLASSIC


def test_a_folder_that_is_no_engine_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"sea")
    with pytest.raises(StoreError, match=r"exists and is not an engine; choose another place"):
        write(tmp_path, CLASSIC, sidecar_of(CLASSIC))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize(
    ("plan", "fields", "kind"),
    [
        (CLASSIC + b"\0", {}, StoreError),
        (CLASSIC.replace(b"layers", b"LAYERS"), {}, StoreError),
        (CLASSIC, {"version": "10.7.0"}, TargetError),
        (CLASSIC, {"version": "10.3.0.27"}, TargetError),
        (CLASSIC, {"api": "tensorrt_rtx"}, TargetError),
    ],
)
def test_a_plan_its_sidecar_does_not_describe_is_not_written(
    tmp_path: Path, plan: bytes, fields: dict[str, Any], kind: type[SlimError]
) -> None:
    with pytest.raises(kind):
        write(tmp_path / "engine", plan, sidecar_of(CLASSIC, **fields))
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("version", ["10.3", "10.3.0", "10.3.0.26", "10.3.0.26.post1", "10.3.0.282"])
def test_a_version_may_leave_the_build_out_which_the_header_keeps_in_one_byte(tmp_path: Path, version: str) -> None:
    # 282 = 256 + 26
    write(tmp_path / "engine", CLASSIC, sidecar_of(CLASSIC, version=version))
    assert read_engine(tmp_path / "engine", **WANTED | {"version": version}) == CLASSIC


@pytest.mark.parametrize(
    "plan",
    [b"", b"ftrt", CLASSIC[:27], plan_of(b"ftrt", 10, 3, 0, 26, layout=1), plan_of(b"gguf", 10, 3, 0, 26)],
    ids=["empty", "tag only", "cut in the version", "layout 1", "other tag"],
)
def test_a_layout_that_is_not_known_is_unknown_and_not_wrong(tmp_path: Path, plan: bytes) -> None:
    assert sniff_version(plan) is None
    if plan:
        write(tmp_path / "engine", plan, sidecar_of(plan, version="11.4.1"))
        assert read_engine(tmp_path / "engine", **WANTED | {"version": "11.4.1"}) == plan


def test_a_classic_plan_names_its_version() -> None:
    assert sniff_version(CLASSIC) == PlanVersion("tensorrt", (10, 3, 0, 26))


def test_a_real_tensorrt_rtx_plan_names_the_version_that_built_it(rtx_plan: bytes) -> None:
    expected = tuple(int(part) for part in rtx_version().split("."))
    assert sniff_version(rtx_plan) == PlanVersion("tensorrt_rtx", expected)


def test_a_real_plan_is_read_again_and_a_foreign_one_refused(rtx_plan: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    built: dict[str, Any] = {"api": "tensorrt_rtx", "version": rtx_version(), "gpu": None}
    write(folder, rtx_plan, sidecar_of(rtx_plan, **built))
    assert read_engine(folder, **WANTED | built) == rtx_plan

    # The plan of another release, with a sidecar and a hash that fit: only its own header gives it away.
    foreign = rtx_plan[:25] + bytes([rtx_plan[25] + 1]) + rtx_plan[26:]
    (folder / PLAN).write_bytes(foreign)
    forge(folder, plan_sha256=hashlib.sha256(foreign).hexdigest())
    refused(TargetError, r"engine.plan: a plan of tensorrt_rtx \d+\.\d+\.\d+\.\d+, engine.json says ", folder, **built)

    (folder / PLAN).write_bytes(rtx_plan)
    forge(folder, plan_sha256=hashlib.sha256(rtx_plan).hexdigest(), api="tensorrt")
    refused(TargetError, r"a plan of tensorrt_rtx .*, tensorrt cannot run it", folder, **built | {"api": "tensorrt"})
