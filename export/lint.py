"""Lint: does a graph keep what a runtime demands? Told from the graph alone, where no such runtime is installed.

A graph without errors may still be refused by the runtime; one with an error is refused, or computes something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from slim.errors import StoreError
from slim.export import lint_rules, lint_tensorrt
from slim.export.lint_graph import Finding as Finding
from slim.export.lint_graph import Graph
from slim.export.lint_graph import Rule as Rule

TENSORRT: tuple[Rule, ...] = (
    lint_tensorrt.tensorrt_operator,
    lint_tensorrt.tensorrt_domain,
    lint_tensorrt.tensorrt_opset,
    lint_tensorrt.tensorrt_types,
    lint_tensorrt.tensorrt_mixed,
    lint_rules.external_data,
    lint_tensorrt.zero_point,
    lint_tensorrt.quantised_type,
    lint_tensorrt.scale,
    lint_tensorrt.int32_bias,
    lint_tensorrt.quantised_constant,
    lint_tensorrt.fused_activation,
    lint_tensorrt.attention_fp32,
    lint_tensorrt.pool_dilation,
    lint_tensorrt.extra_output,
    lint_tensorrt.tensorrt_resize,
    lint_tensorrt.reduce_axes,
    lint_tensorrt.tensorrt_training,
    lint_tensorrt.scatter_reduction,
)
"""TensorRT 10 and 11, and TensorRT-RTX."""

OPENVINO: tuple[Rule, ...] = (
    lint_rules.openvino_operator,
    lint_rules.openvino_functions,
    lint_rules.openvino_mixed,
    lint_rules.external_data,
    lint_rules.openvino_resize,
    lint_rules.openvino_training,
)
"""OpenVINO's reader and CPU plugin."""

ONNXRUNTIME: tuple[Rule, ...] = (
    lint_rules.ort_version,
    lint_rules.ort_bfloat16,
    lint_rules.ort_integers,
    lint_rules.external_data,
)
"""ONNX Runtime's CPU provider, the one that is installed."""


def lint(model: onnx.ModelProto, rules: Sequence[Rule], *, folder: Path | None = None) -> tuple[Finding, ...]:
    """What `model` breaks of `rules`, in their order. Values outside the model are looked for in `folder`.

    Raises:
        StoreError: ONNX itself cannot make sense of the graph.
        MissingExtra: a rule of ONNXRUNTIME, and it is not installed.
    """
    try:
        graph = Graph(model, folder)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StoreError(f"graph {model.graph.name!r}: not valid ONNX: {reason}; export it again") from error
    return tuple(finding for rule in rules for finding in rule.check(graph))


def lint_file(path: Path, rules: Sequence[Rule]) -> tuple[Finding, ...]:
    """What the file at `path` breaks of `rules`; see `lint`.

    Raises:
        StoreError: not an ONNX file, not a whole one, or one that ONNX itself cannot make sense of.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise StoreError(f"{path}: not a whole ONNX file ({error}); export it again") from error
    if not model.graph.node:
        raise StoreError(f"{path}: not an ONNX file, or one without a graph; export it again")
    return lint(model, rules, folder=path.parent)
