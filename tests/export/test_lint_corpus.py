from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import pytest
import timm
import torch
from onnx import ModelProto, TensorProto, helper

from slim.artifact import Preprocessing
from slim.errors import SlimError, UsageError
from slim.export.lint import ONNXRUNTIME, OPENVINO, TENSORRT, Rule, lint, lint_file
from slim.export.lint_rules import OPENVINO_ADDS, OPENVINO_LACKS, ORT_LACKS_BFLOAT16
from slim.export.lint_tensorrt import TENSORRT_ADDS, TENSORRT_LACKS
from slim.export.onnx import export_onnx
from slim.export.tensorrt import BuildOptions, build
from tests.export import negative_corpus as corpus
from tests.export.negative_corpus import BIAS, BRAIN, IMAGE, STORED, STORED_WEIGHT, WEIGHT, conv, graph, qdq

ERRORS = dict(corpus.errors())
WARNINGS = dict(corpus.warnings())
ALL = {**ERRORS, **WARNINGS}
POSITIVES = dict(corpus.positives())

RTX = "1.7.1"
OPENVINO_VERSION = "2026.4.1"
NEWEST = onnx.defs.onnx_opset_version()
STANDARD = {schema.name: schema for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
SM86 = BuildOptions(compute_capability=(8, 6))

Ask = Callable[[ModelProto], str]
"""What a runtime says of a model it refuses; empty when it takes it."""


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'slim[rtx]'")


@pytest.fixture(scope="module")
def rtx(trt: Any, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    folder, told = tmp_path_factory.mktemp("rtx"), dict[bytes, str]()

    def ask(model: ModelProto) -> str:
        key = model.SerializeToString(deterministic=True)
        if key not in told:
            path = folder / "model.onnx"
            path.write_bytes(key)
            told[key] = refusal(path)
        return told[key]

    return ask


@pytest.fixture(scope="module")
def openvino() -> Ask:
    core = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slim[openvino]'").Core()

    def ask(model: ModelProto) -> str:
        try:
            core.compile_model(core.read_model(model.SerializeToString()), "CPU")
        except RuntimeError as error:
            return str(error)
        return ""

    return ask


def refusal(path: Path) -> str:
    try:
        build("tensorrt_rtx", path, SM86)
    except UsageError:  # options that do not fit the graph: a mistake of the corpus
        raise
    except SlimError as error:
        return str(error)
    return ""


def rules_broken(model: ModelProto, rules: tuple[Rule, ...]) -> set[str]:
    return {finding.rule for finding in lint(model, rules) if finding.severity == "error"}


@pytest.mark.parametrize("name", ERRORS)
def test_what_the_lint_calls_an_error_tensorrt_rtx_refuses_for_that_reason(name: str, rtx: Ask) -> None:
    assert rules_broken(ERRORS[name].broken, TENSORRT)
    assert ERRORS[name].says in rtx(ERRORS[name].broken) != ""


@pytest.mark.parametrize("name", WARNINGS)
def test_what_the_lint_only_warns_of_is_taken_or_is_deform_conv(name: str, rtx: Ask) -> None:
    said = rtx(WARNINGS[name].broken)
    assert bool(said) == (name == "deformed")
    assert WARNINGS[name].says in said


@pytest.mark.parametrize("name", ALL)
def test_twins_become_engines(name: str, rtx: Ask) -> None:
    assert rtx(ALL[name].twin) == ""


@pytest.mark.parametrize("name", POSITIVES)
def test_what_the_lint_passes_becomes_an_engine(name: str, rtx: Ask) -> None:
    assert rtx(POSITIVES[name]) == ""


def test_uint8_with_zero_point_0_is_taken_for_int8(trt: Any, rtx: Ask) -> None:
    for name, model in corpus.read_as_int8():
        assert rtx(model) == "", name
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(model.SerializeToString())
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        found = [layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.QUANTIZE]
        assert found == [trt.DataType.INT8], name


def test_a_model_without_its_second_file_is_refused(trt: Any, tmp_path: Path) -> None:
    path, data = tmp_path / "net.onnx", tmp_path / "net.data"
    onnx.save(conv(IMAGE, WEIGHT, BIAS), path, save_as_external_data=True, location=data.name, size_threshold=0)
    assert lint_file(path, TENSORRT) == ()
    assert refusal(path) == ""
    content = data.read_bytes()
    data.write_bytes(content[:100])
    assert [finding.rule for finding in lint_file(path, TENSORRT)] == ["external-data"]
    assert "import initializer" in refusal(path)
    data.unlink()
    assert [finding.rule for finding in lint_file(path, TENSORRT)] == ["external-data"]
    assert "import initializer" in refusal(path)


def test_the_table_of_operators_is_that_of_the_installed_parser(trt: Any) -> None:
    if not trt.__version__.startswith(RTX):
        pytest.skip(f"the table was read from TensorRT-RTX {RTX}, installed is {trt.__version__}")
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    contrib = {schema.name for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}
    assert {name for name in STANDARD if not parser.supports_operator(name)} == TENSORRT_LACKS
    assert {name for name in contrib - STANDARD.keys() if parser.supports_operator(name)} == TENSORRT_ADDS


# Forms of onnxruntime.quantization, as they come, and as they are legal: symmetric, biases left alone, only the inputs
# of Conv quantised.
SYMMETRIC = {"extra_options": {"ActivationSymmetric": True, "QuantizeBias": False}}
INPUTS_ONLY = {
    "op_types_to_quantize": ["Conv"],
    "extra_options": {
        **SYMMETRIC["extra_options"],
        "OpTypesToExcludeOutputQuantization": ["Conv", "Relu", "GlobalAveragePool"],
    },
}


@pytest.mark.parametrize(
    ("form", "kinds", "options", "broken"),
    [
        ("QDQ", ("QUInt8", "QInt8"), {}, {"zero-point", "quantised-type", "int32-bias"}),
        ("QDQ", ("QInt8", "QInt8"), {}, {"zero-point", "int32-bias"}),
        ("QDQ", ("QInt16", "QInt8"), SYMMETRIC, {"tensor-type"}),
        ("QOperator", ("QUInt8", "QInt8"), {}, {"operator", "custom-domain", "zero-point", "quantised-type"}),
        ("QDQ", ("QInt8", "QInt8"), INPUTS_ONLY, set()),
    ],
    ids=["uint8", "int8", "int16", "operators", "inputs only"],
)
def test_the_forms_of_onnx_runtimes_quantiser(
    form: str, kinds: tuple[str, str], options: dict[str, Any], broken: set[str], rtx: Ask, tmp_path: Path
) -> None:
    model = quantised(tmp_path, form, kinds, options)
    assert rules_broken(model, TENSORRT) >= broken
    assert bool(rules_broken(model, TENSORRT)) == bool(broken) == bool(rtx(model))


def quantised(folder: Path, form: str, kinds: tuple[str, str], options: dict[str, Any]) -> ModelProto:
    """Two convolutions through onnxruntime.quantization; `kinds` of activations and weights."""
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            generator = np.random.default_rng(0)
            self.images = iter([generator.normal(size=(2, 3, 16, 16)).astype(np.float32) for _ in range(4)])

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"x": image}

    nodes = "h = Conv(x, w, b) r = Relu(h) i = Conv(r, v, b) p = Relu(i) y = GlobalAveragePool(p)"
    text = f"(float[batch,3,16,16] x) => (float[batch,8,1,1] y) {{ {nodes} }}"
    second = np.random.default_rng(1).normal(size=(8, 8, 3, 3)).astype(np.float32)
    onnx.save(graph(text, opset=21, w=WEIGHT, v=second, b=BIAS), folder / "float.onnx")
    activation, weight = (getattr(quantization.QuantType, kind) for kind in kinds)
    quantization.quantize_static(
        folder / "float.onnx",
        folder / "int.onnx",
        Images(),
        quant_format=quantization.QuantFormat[form],
        activation_type=activation,
        weight_type=weight,
        **copy.deepcopy(options),
    )
    return onnx.load(folder / "int.onnx")


def one_of_each(inputs: dict[str, int], domain: str) -> ModelProto:
    """A node of each operator with that many inputs, all of them the image; hardly ever a valid one."""
    nodes = [helper.make_node(name, ["x"] * count, [name], domain=domain) for name, count in inputs.items()]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
    imports = [helper.make_opsetid("", NEWEST), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [image], outputs), ir_version=10, opset_imports=imports)


def test_the_tables_of_operators_are_those_of_the_installed_openvino(openvino: Ask) -> None:
    import openvino as package
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    if not package.__version__.startswith(OPENVINO_VERSION):
        pytest.skip(f"the tables were read from OpenVINO {OPENVINO_VERSION}, installed is {package.__version__}")
    contrib = {schema.name for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}
    standard = {name: max(1, schema.min_input) for name, schema in STANDARD.items()}
    # "No conversion rule found for operations: BitCast-28, ..., com.microsoft.CDist, ..., util::SequenceMark"
    missing = "No conversion rule found for operations: "
    models = (one_of_each(standard, ""), one_of_each(dict.fromkeys(contrib, 3), "com.microsoft"))
    ours, theirs = (openvino(model).partition(missing)[2].splitlines()[0].split(", ") for model in models)
    assert {name.rpartition("-")[0] for name in ours if "::" not in name} == OPENVINO_LACKS
    assert contrib - {name.rpartition(".")[2] for name in theirs} == OPENVINO_ADDS


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("resize", "grid"),
        ("training", "dropout"),
        ("training", "computed dropout"),
        ("mixed-types", "bfloat16 image"),
        ("mixed-types", "float bounds"),
        ("operator", "unknown operator"),
        ("operator", "deformed"),
    ],
)
def test_what_the_lint_calls_an_error_openvino_refuses(rule: str, name: str, openvino: Ask) -> None:
    assert rules_broken(ALL[name].broken, OPENVINO) == {rule}
    assert openvino(ALL[name].broken) != ""
    assert lint(ALL[name].twin, OPENVINO) == ()
    assert openvino(ALL[name].twin) == ""


def test_openvino_takes_some_operators_of_com_microsoft_and_none_of_other_domains(openvino: Ask) -> None:
    for domain, name, taken in (
        ("com.microsoft", "QuickGelu", True),
        ("com.microsoft", "CDist", False),
        ("com.example", "Relu", False),
    ):
        model = graph(f"{IMAGE} {{ y = {domain}.{name}(x) }}", domain=domain)
        assert rules_broken(model, OPENVINO) == (set() if taken else {"operator"})
        assert (openvino(model) == "") == taken


def test_openvino_refuses_functions_and_takes_what_they_do_when_it_is_inlined(openvino: Ask) -> None:
    model = corpus.in_function("b = Relu(a)")
    assert rules_broken(model, OPENVINO) == {"functions"}
    assert "local.f" in openvino(model)
    assert [finding.node for finding in lint(model, OPENVINO)][:1] == ["local.f"]
    inlined = onnx.inliner.inline_local_functions(model)
    assert lint(inlined, OPENVINO) == ()
    assert openvino(inlined) == ""


def test_what_openvino_takes_gives_no_error_though_tensorrt_refuses_it(openvino: Ask) -> None:
    for name in ("uint8", "asymmetric", "int32 bias", "reshaped weight", "attention", "dilated MaxPool", "antialias"):
        assert lint(ALL[name].broken, OPENVINO) == (), name
        assert openvino(ALL[name].broken) == "", name


def ort(model: ModelProto, optimised: Path | None = None) -> str:
    """What ONNX Runtime says of a model it refuses; the graph it runs goes to `optimised`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no base class
        return str(error)
    return ""


def test_the_newest_opset_and_ir_version_are_those_of_the_installed_onnx_runtime() -> None:
    verdicts = {opset: ort(conv(IMAGE, WEIGHT, BIAS, opset=opset)) for opset in range(13, NEWEST + 1)}
    assert "" in verdicts.values()
    for opset, said in verdicts.items():
        assert rules_broken(conv(IMAGE, WEIGHT, BIAS, opset=opset), ONNXRUNTIME) == ({"version"} if said else set())
    model = conv(IMAGE, WEIGHT, BIAS)
    model.ir_version = 99
    assert "IR version" in ort(model)
    assert rules_broken(model, ONNXRUNTIME) == {"version"}


# A node of each operator in the table that computes in bfloat16.
BFLOAT16 = {
    "Add": "(x, x)",
    "BatchNormalization": "(x, v, v, v, v)",
    "Conv": "(x, w)",
    "ConvTranspose": "(x, u)",
    "Gelu": "(x)",
    "Gemm": "(f, m)",
    "GlobalAveragePool": "(x)",
    "HardSwish": "(x)",
    "MatMul": "(x, m)",
    "MaxPool": "<kernel_shape=[2, 2]>(x)",
    "Mul": "(x, x)",
    "ReduceMean": "(x)",
    "Relu": "(x)",
    "Resize": '<mode="nearest">(x, , , n)',
    "Sigmoid": "(x)",
    "Softmax": "(x)",
}


@pytest.mark.parametrize("name", sorted(ORT_LACKS_BFLOAT16))
def test_onnx_runtime_has_no_bfloat16_kernel_for_what_the_table_says(name: str) -> None:
    weight, bias = BRAIN
    values = {
        "w": weight,
        "u": weight.transpose(1, 0, 2, 3),
        "v": bias[:3],
        "m": weight.reshape(-1)[:64].reshape(16, 4),
    }
    nodes = f"f = Reshape(x, r) y = {name}{BFLOAT16[name]}" if name == "Gemm" else f"y = {name}{BFLOAT16[name]}"
    sizes = {"n": np.array([1, 3, 32, 32]), "r": np.array([-1, 16])}
    constants: dict[str, Any]
    models = []
    for kind, dtype in (("bfloat16", bias.dtype), ("float", np.float32)):
        constants = {name: value.astype(dtype) for name, value in values.items()} | sizes
        models.append(graph(f"({kind}[batch,3,16,16] x) => ({kind}[] y) {{ {nodes} }}", opset=22, **constants))
    brain, single = models
    assert rules_broken(brain, ONNXRUNTIME) == {"bfloat16"}
    assert "NOT_IMPLEMENTED" in ort(brain)
    assert lint(single, ONNXRUNTIME) == ()
    assert ort(single) == ""


QUANTISE = "i = QuantizeLinear({0}, s, z) y = DequantizeLinear(i, s, z)"


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    "tail",
    ["y = Relu(c)", QUANTISE.format("c"), "r = Relu(c) " + QUANTISE.format("r")],
    ids=["float output", "quantised output", "quantised behind relu"],
)
def test_convolutions_onnx_runtime_does_not_compute_in_integers_are_told(kind: Any, tail: str, tmp_path: Path) -> None:
    model = qdq(f"{STORED_WEIGHT} c = Conv(d, k) {tail}", **STORED, z=kind(0))
    assert ort(model, tmp_path / "run.onnx") == ""
    run = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    found = lint(model, ONNXRUNTIME)
    assert bool(found) == ("QLinearConv" not in run)
    assert all((finding.rule, finding.severity) == ("integer-kernels", "warning") for finding in found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"zero_init_last": False}),
        ("mobilenetv3_small_100", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
    ],
)
def test_exported_backbones_keep_every_rule(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, **options).eval()
    file = export_onnx(model, tmp_path / "model.onnx", Preprocessing(size=(3, 64, 64)))
    for rules in (TENSORRT, OPENVINO, ONNXRUNTIME):
        assert lint_file(file.path, rules) == ()
