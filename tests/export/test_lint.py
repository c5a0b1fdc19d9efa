from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from slim.errors import MissingExtra, StoreError
from slim.export.lint import ONNXRUNTIME, OPENVINO, TENSORRT, Finding, Rule, lint, lint_file
from slim.export.lint_graph import SMALL, Graph
from tests.export import negative_corpus as corpus
from tests.export.negative_corpus import BIAS, IMAGE, NET, STORED, WEIGHT, Pair, conv, graph, in_function, qdq, stored

ERRORS = dict(corpus.errors())
WARNINGS = dict(corpus.warnings())
ALL = {**ERRORS, **WARNINGS}
POSITIVES = dict(corpus.positives())


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A convolution with all its values, the zero point of 1 for a channel too, in a second file."""
    model, path = stored(n=np.eye(8, dtype=np.int8)[7]), tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert all(
        tensor.data_location == tensor.EXTERNAL
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    )
    return path


def severities(pair: Pair) -> set[str]:
    return {finding.severity for finding in lint(pair.broken, TENSORRT) if finding.rule == pair.rule}


@pytest.mark.parametrize("name", ERRORS)
def test_what_tensorrt_refuses_is_an_error_of_its_rule(name: str) -> None:
    assert severities(ERRORS[name]) == {"error"}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_only_worth_a_word_is_no_error(name: str) -> None:
    assert severities(WARNINGS[name]) == {"warning"}
    assert all(finding.severity == "warning" for finding in lint(WARNINGS[name].broken, TENSORRT))


@pytest.mark.parametrize("name", ALL)
def test_a_twin_that_keeps_the_rule_gives_no_finding_at_all(name: str) -> None:
    assert lint(ALL[name].twin, TENSORRT) == ()


@pytest.mark.parametrize("name", POSITIVES)
def test_what_tensorrt_takes_gives_no_finding(name: str) -> None:
    assert lint(POSITIVES[name], TENSORRT) == ()


def test_uint8_that_would_be_read_as_int8_is_an_error() -> None:
    for _, model in corpus.read_as_int8():
        assert [(found.rule, found.severity) for found in lint(model, TENSORRT)] == [("quantised-type", "error")]


def test_every_rule_of_tensorrt_has_a_graph_that_breaks_it() -> None:
    assert {pair.rule for pair in ALL.values()} | {"external-data"} == {rule.name for rule in TENSORRT}


@pytest.mark.parametrize("rules", [TENSORRT, OPENVINO, ONNXRUNTIME], ids=["tensorrt", "openvino", "onnxruntime"])
def test_rules_have_names_of_their_own_and_one_line_each(rules: tuple[Rule, ...]) -> None:
    assert len({rule.name for rule in rules}) == len(rules)
    assert all(rule.about.endswith(".") and "\n" not in rule.about for rule in rules)


@pytest.mark.parametrize("name", ALL)
def test_a_finding_is_one_line_with_the_place_the_reason_and_the_way_out(name: str) -> None:
    for finding in lint(ALL[name].broken, TENSORRT):
        assert str(finding) == f"{finding.severity}: {finding.rule}: {finding.node!r}: {finding.what}; {finding.fix}"
        assert "\n" not in str(finding)
        assert finding.what
        assert finding.fix


def test_the_text_of_a_finding() -> None:
    (finding,) = lint(qdq("y = Relu(d)", s=np.float32(-0.5)), TENSORRT)[:1]
    assert finding == Finding(
        "scale", "error", "q", "scale 's' holds -0.5", "give channels of zeros any positive scale"
    )
    assert str(finding) == "error: scale: 'q': scale 's' holds -0.5; give channels of zeros any positive scale"


def test_findings_name_the_node_where_it_has_a_name() -> None:
    model = graph(f"{IMAGE} {{ y = Frobnicate(x) }}")
    assert [finding.node for finding in lint(model, TENSORRT)] == ["y"]
    model.graph.node[0].name = "node_7"
    assert [finding.node for finding in lint(model, TENSORRT)] == ["node_7"]


def test_the_model_is_left_as_it_was() -> None:
    for pair in ALL.values():
        before = pair.broken.SerializeToString(deterministic=True)
        lint(pair.broken, TENSORRT)
        assert pair.broken.SerializeToString(deterministic=True) == before


def test_weights_too_large_for_a_shape_are_still_constants_with_a_type_and_a_value() -> None:
    shift = np.zeros(SMALL + 1, np.int8)
    shift[-1] = 5
    text = f"(float[batch,{SMALL + 1}] x) => (float[] y) {{ k = DequantizeLinear<axis=0>(w, t, n) y = Mul(x, k) }}"
    model = graph(text, w=np.ones_like(shift), t=np.ones(SMALL + 1, np.float32), n=shift)
    assert [(found.rule, found.what) for found in lint(model, TENSORRT)] == [
        ("zero-point", "zero point 'n' holds 5, not 0")
    ]
    text = f"(float16[batch,{SMALL + 1}] x) => (float[] y) {{ y = Mul(x, w) }}"
    assert [found.rule for found in lint(graph(text, w=np.ones(SMALL + 1, np.float32)), TENSORRT)] == ["mixed-types"]


def test_types_are_inferred_through_a_shape_that_is_a_constant() -> None:
    text = "(float[batch,16] x) => (float[] y) { h = Reshape(x, n) c = Cast<to=10>(h) y = Mul(c, h) }"
    index = Graph(graph(text, n=np.array([-1, 4, 4])))
    assert {name: index.types[name] for name in "hc"} == {"h": 1, "c": 10}


def test_values_in_a_second_file_are_read_where_it_lies(outside: Path) -> None:
    assert [(finding.rule, finding.node) for finding in lint_file(outside, TENSORRT)] == [("zero-point", "k")]


def test_a_file_without_its_second_file_is_an_error_in_every_runtime(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "net.data").rename(tmp_path / "other.data")
    for rules in (TENSORRT, OPENVINO, ONNXRUNTIME):
        (finding,) = lint_file(outside, rules)
        assert (finding.rule, finding.severity, finding.node) == ("external-data", "error", "net.data")
        assert finding.what == "values of 'w' lie in a second file, which is not there"


def test_a_second_file_that_is_too_short_is_an_error(outside: Path, tmp_path: Path) -> None:
    data = tmp_path / "net.data"
    data.write_bytes(data.read_bytes()[:100])
    (finding,) = [found for found in lint_file(outside, TENSORRT) if found.rule == "external-data"]
    # The weight is 8 * 3 * 3 * 3 bytes and lies first.
    assert finding.what == "values of 'w' lie in a second file, which has 100 bytes, 216 are needed"


def test_a_second_file_elsewhere_is_never_looked_for(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "net.onnx"
    onnx.save(conv(IMAGE, WEIGHT, BIAS), path, save_as_external_data=True, location="net.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    (tmp_path / "inner" / "net.data").rename(tmp_path / "net.data")
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../net.data"
    (finding,) = lint(model, TENSORRT, folder=path.parent)
    assert "'../net.data' is not a file of the folder" in finding.what


def test_values_outside_a_model_that_comes_without_a_folder_are_an_error(outside: Path) -> None:
    (finding,) = lint(onnx.load(outside, load_external_data=False), TENSORRT)
    assert (finding.rule, finding.what) == (
        "external-data",
        "values of 'w' lie in a second file, which is in no folder that was given",
    )


def test_a_file_that_is_no_whole_onnx_file_is_one_line(tmp_path: Path) -> None:
    torn = NET.SerializeToString()[:-100]
    contents = {"torn": torn, "text": b"hello", "empty": b"", "archive": b"PK\x03\x04slim"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "none"):
        with pytest.raises(StoreError, match=rf"{name}: not .* ONNX file.*; export it again") as caught:
            lint_file(tmp_path / name, TENSORRT)
        assert "\n" not in str(caught.value)


def test_a_graph_onnx_itself_cannot_read_is_one_line() -> None:
    without_opset, of_no_domain = graph(f"{IMAGE} {{ y = Relu(x) }}"), graph(f"{IMAGE} {{ y = com.example.Op(x) }}")
    del without_opset.opset_import[:]
    one_input_too_many = in_function("b = Relu(a)")
    one_input_too_many.graph.node[0].input.append("x")
    for model in (without_opset, of_no_domain, one_input_too_many):
        with pytest.raises(StoreError, match=r"graph 'g': not valid ONNX: .*; export it again") as caught:
            lint(model, TENSORRT)
        assert "\n" not in str(caught.value)


def test_the_rules_of_onnx_runtime_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"onnxruntime is not installed; pip install 'slim\[cpu\]'"):
        lint(NET, ONNXRUNTIME)
    assert lint(NET, TENSORRT) == lint(NET, OPENVINO) == ()


def test_several_breaches_are_all_told() -> None:
    model = qdq("k = DequantizeLinear<axis=0>(w, t, n) c = Conv(d, k) y = Frobnicate(c)", **STORED, z=np.int8(1))
    assert {(found.rule, found.node) for found in lint(model, TENSORRT)} == {
        ("operator", "y"),
        ("zero-point", "q"),
        ("zero-point", "d"),
    }


def test_strange_types_are_told_once_each() -> None:
    text = f"{IMAGE} {{ a = Cast<to=5>(x) b = Identity(a) c = Cast<to=4>(b) y = Cast<to=1>(c) }}"
    found = [(finding.node, finding.what) for finding in lint(graph(text), TENSORRT)]
    assert found == [
        ("a", "is int16, which TensorRT has not, as are 1 more"),
        ("c", "is uint16, which TensorRT has not"),
    ]


def test_a_zero_point_of_a_contrib_operator_counts_too() -> None:
    nodes = "q = com.microsoft.QuantizeLinear(x, s, z) y = com.microsoft.DequantizeLinear(q, s, z)"
    model = graph(f"{IMAGE} {{ {nodes} }}", domain="com.microsoft", s=np.float32(1), z=np.uint8(128))
    assert {(found.rule, found.severity) for found in lint(model, TENSORRT)} == {
        ("custom-domain", "warning"),
        ("zero-point", "error"),
        ("quantised-type", "error"),
    }


def test_a_scale_that_is_computed_is_left_alone() -> None:
    model = graph(
        f"{IMAGE} {{ m = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, m, z) y = DequantizeLinear(q, m, z) }}",
        z=np.int8(0),
    )
    assert lint(model, TENSORRT) == ()
