"""Fewer bits: ranges and exceptions in the plan, files in each target's form, and what cannot be served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from slim import store
from slim.artifact import Artifact, Step
from slim.bench.measure import TargetMeter
from slim.contract import Context, Fed
from slim.data import Data, open_data
from slim.errors import OrderError, ParityError, PassError, StoreError, UsageError
from slim.export.half import in_half
from slim.export.target import Target
from slim.measurement import Measurement
from slim.passes.finetune import Finetune
from slim.passes.quantize import Quantize
from slim.pipeline import Pipeline
from slim.quantization import METHODS, Quantization, module_of, quantization_of
from tests.contract.zoo import artifact

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", limit_train=64, limit_val=32)


@pytest.fixture(scope="module")
def meter_on(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TargetMeter]:
    """One meter for each target, so that a network is exported once in this file."""
    meters: dict[str, TargetMeter] = {}

    def meter(text: str) -> TargetMeter:
        if text not in meters:
            target = Target.parse(text)
            if target.on.probe().level != "ready":
                pytest.skip(f"{target}: {target.on.probe()}")
            meters[text] = TargetMeter(target, data, tmp_path_factory.mktemp("meter"))
        return meters[text]

    return meter


@pytest.fixture(scope="module")
def quantized(data: Data, meter_on: Callable[[str], TargetMeter]) -> Artifact:
    context = Context(data=data, meter=meter_on("ort:cpu"))
    return Quantize(methods=METHODS, agreement=0.0)(artifact("resnet"), context)


@pytest.fixture(scope="module")
def undecided(data: Data) -> Artifact:
    """A network whose classes lie close together: the mean logits of the images are taken off by its classifier."""
    given = artifact("resnet")
    model = given.model()
    images = torch.cat([batch for batch, _ in data.eval_batches("calib", given.backbone.input, batch_size=16)])
    with torch.no_grad():
        model.state_dict()["fc.bias"].sub_(model(images).mean(0))
    return Artifact.of(model, given.backbone)


def served(found: Artifact) -> Quantization:
    setting = quantization_of(found.history)
    assert setting is not None
    return setting


def initialisers(path: Path) -> dict[str, int]:
    return {value.name: value.data_type for value in onnx.load(path).graph.initializer}


def test_the_network_stays_as_it_is_and_the_plan_holds_every_range(quantized: Artifact) -> None:
    before = artifact("resnet")
    assert quantized.weights == before.weights
    assert quantized.digest != before.digest
    setting = served(quantized)
    tried: Any = quantized.history[-1].plan["candidates"]
    assert [one["method"] for one in tried] == list(METHODS)
    assert setting.method == max(tried, key=lambda one: (one["agreement"], -one["mse"]))["method"]
    modules = {module_of(key) for key in setting.ranges}
    layers = {name for name, module in before.model().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers <= modules
    assert all(low <= high for low, high in setting.ranges.values())


def test_a_saved_artifact_writes_the_same_file_without_any_image(
    quantized: Artifact, meter_on: Callable[[str], TargetMeter], tmp_path: Path
) -> None:
    loaded = store.load(store.save(quantized, tmp_path / "artifact"))
    blind = TargetMeter(Target.parse("ort:cpu"), None, tmp_path)
    assert blind.export(loaded).sha256 == meter_on("ort:cpu").export(quantized).sha256


def test_each_target_gets_the_form_it_takes(quantized: Artifact, meter_on: Callable[[str], TargetMeter]) -> None:
    unsigned, signed = (meter_on(name).export(quantized).path for name in ("ort:cpu", "openvino:cpu"))
    kinds = []
    for path in (unsigned, signed):
        graph = onnx.load(path).graph
        values = {value.name: value for value in graph.initializer}
        zeros = [values[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
        kinds.append({zero.data_type for zero in zeros})
        if path == signed:
            assert all(not numpy_helper.to_array(zero).any() for zero in zeros)
    assert kinds == [{TensorProto.UINT8}, {TensorProto.INT8}]


@pytest.mark.parametrize("name", ["ort:cpu", "openvino:cpu"])
def test_fewer_bits_make_a_smaller_file_that_keeps_the_classes(
    name: str, quantized: Artifact, meter_on: Callable[[str], TargetMeter]
) -> None:
    meter = meter_on(name)
    assert meter.size(quantized).value < 0.6 * meter.size(artifact("resnet")).value  # a quarter, and a larger graph
    found = meter.parity(quantized)
    assert found.details["gate"]["relative"] is None
    assert 0.98 <= found.details["cosine"] < 1


def test_coverage_counts_what_is_computed_in_int8(quantized: Artifact, meter_on: Callable[[str], TargetMeter]) -> None:
    model = artifact("resnet").model()
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    setting = served(quantized)
    one_less = setting.model_copy(update={"floats": _layers(quantized, meter_on)[:1]})
    spared = replace(quantized, history=(_with(quantized.history[-1], one_less),))
    for name in ("ort:cpu", "openvino:cpu"):  # whose files differ, and so do the ways in which they are asked
        found, less = (meter_on(name).coverage(one) for one in (quantized, spared))
        assert found is not None
        assert less is not None
        assert (found.n, found.value) == (layers, 100)
        assert less.value == pytest.approx(100 * (layers - 1) / layers)
        assert len(less.details["float"]) == 1


def _layers(given: Artifact, meter_on: Callable[[str], TargetMeter]) -> tuple[str, ...]:
    return meter_on("ort:cpu").layers(Fed(given.model(), given.backbone.input))


def _with(step: Step, setting: Quantization) -> Step:
    return step.model_copy(update={"plan": {**step.plan, "quantization": setting.model_dump(mode="json")}})


def test_layers_are_spared_up_to_the_share_when_too_few_images_keep_their_class(
    undecided: Artifact, data: Data, meter_on: Callable[[str], TargetMeter]
) -> None:
    given, meter = undecided, meter_on("ort:cpu")
    layers = _layers(given, meter_on)
    chosen = Quantize(methods=("percentile-99.9",), agreement=100.0, most_float=0.25)
    after = chosen(given, Context(data=data, meter=meter))
    rows: Any = after.history[-1].plan["candidates"]
    assert rows[0]["agreement"] < 100, "this network must lose something in INT8, or the test says nothing"
    counts = [one["float_layers"] for one in rows]
    assert counts == sorted(counts)
    assert counts[1] == 1
    assert max(counts) <= 0.25 * len(layers)
    best = max(rows, key=lambda one: (one["agreement"], -one["mse"]))
    assert len(served(after).floats) == best["float_layers"]
    assert set(served(after).floats) <= set(layers)


def test_named_layers_stay_in_float(data: Data, meter_on: Callable[[str], TargetMeter]) -> None:
    chosen = Quantize(methods=("minmax",), agreement=0.0, skip=("layer4.*",))
    after = chosen(artifact("resnet"), Context(data=data, meter=meter_on("ort:cpu")))
    modules = {module_of(key) for key in served(after).floats}
    assert modules
    assert all(module.startswith("layer4.") for module in modules)
    with pytest.raises(PassError, match=r"quantize: skip leaves all \d+ layers in float; skip less, or drop the pass"):
        Quantize(methods=("minmax",), skip=("*",))(artifact("resnet"), Context(data=data, meter=meter_on("ort:cpu")))


def test_half_precision_keeps_norms_and_loud_layers_in_32_bits(
    data: Data, meter_on: Callable[[str], TargetMeter]
) -> None:
    given = artifact("vit")
    model = given.model()
    with torch.no_grad():
        model.state_dict()["blocks.0.mlp.fc1.weight"].mul_(1e4)  # its activations come near 65504
        model.state_dict()["blocks.0.mlp.fc2.weight"].mul_(1e-4)
    loud = Artifact.of(model, given.backbone)
    after = Quantize(precision="fp16")(loud, Context(data=data, meter=meter_on("ort:cpu")))
    floats = served(after).floats
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms <= set(floats)
    assert "blocks.0.mlp.fc1" in floats
    assert "blocks.1.mlp.fc1" not in floats
    meter = meter_on("ort:cpu")
    assert meter.parity(after).details["cosine"] > 0.999
    kinds = initialisers(meter.export(after).path)
    assert {TensorProto.FLOAT, TensorProto.FLOAT16} <= set(kinds.values())
    scopes = set(meter.export(after).scopes.values())
    assert "blocks.1.mlp.fc1" in scopes  # wrappers leave no trace in names
    assert meter.size(after).value < 0.7 * meter.size(loud).value


def test_the_network_that_is_cast_is_a_copy() -> None:
    model = artifact("vit").model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    in_half(model, ("norm",))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("after", [Quantize(), Finetune(epochs=1)], ids=lambda step: step.name)
def test_nothing_comes_after_it(after: Quantize | Finetune, data: Data) -> None:
    with pytest.raises(OrderError, match=rf"step 2 '{after.name}' needs a 'float' network, and step 1 'quantize' ends"):
        Pipeline((Quantize(), after)).check(artifact("resnet"), Context(data=data))


def test_a_target_without_int8_refuses_the_file(quantized: Artifact, meter_on: Callable[[str], TargetMeter]) -> None:
    with pytest.raises(UsageError, match=r"torch:cpu.* serves no INT8 file; leave out quantize, or choose another"):
        meter_on("torch:cpu").export(quantized)


def test_ranges_of_another_graph_are_refused(quantized: Artifact, meter_on: Callable[[str], TargetMeter]) -> None:
    other = artifact("mobilenet")
    foreign = replace(other, history=(quantized.history[-1],))
    with pytest.raises(StoreError, match="quantize"):
        meter_on("ort:cpu").export(foreign)


def test_a_plan_that_cannot_be_read_names_the_step(quantized: Artifact) -> None:
    step = quantized.history[-1]
    broken = step.model_copy(update={"plan": {"quantization": {"precision": "int3"}}})
    with pytest.raises(StoreError, match="step 'quantize': its plan is no quantization"):
        quantization_of((broken,))


def test_wrong_ranges_fail_parity_and_the_node_is_named(
    undecided: Artifact, data: Data, meter_on: Callable[[str], TargetMeter]
) -> None:
    chosen = Quantize(methods=("minmax",), agreement=0.0)
    quantized = chosen(undecided, Context(data=data, meter=meter_on("ort:cpu")))
    setting = served(quantized)
    target = next(key for key in setting.ranges if key.startswith("layer2.0.act1"))
    low, high = setting.ranges[target]
    # Everything above a hundredth of the range is cut off there.
    broken = setting.model_copy(update={"ranges": {**setting.ranges, target: (low / 100, high / 100)}})
    wrong = replace(quantized, history=(_with(quantized.history[-1], broken),))
    with pytest.raises(ParityError, match=r"cosine .*, at least 0\.98.*; .*apart at .*layer2\.0") as caught:
        meter_on("ort:cpu").parity(wrong)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(("value", "said"), [(50.0, "50 % of 8 layers are computed in INT8"), (100.0, "")])
def test_a_refusal_for_speed_says_how_much_ran_in_int8(value: float, said: str) -> None:
    figure = Measurement(metric="int8_coverage", value=value, unit="percent", n=8)
    assert Quantize().caveat({"int8_coverage": figure}) == said


def test_agreement_and_mse_are_those_of_the_files(
    quantized: Artifact, data: Data, meter_on: Callable[[str], TargetMeter]
) -> None:
    meter = meter_on("ort:cpu")
    given = artifact("resnet")
    fed = Fed(given.model(), given.backbone.input)
    found = meter.fidelity(replace(fed, quantization=served(quantized)), fed)
    images = torch.cat([batch for batch, _ in data.eval_batches("calib", given.backbone.input, batch_size=16)])
    runtime = meter.on.on
    ours, theirs = (
        runtime.open(path, threads=1, precision="fp32").call([images.numpy()])[0]
        for path in (meter.export(quantized).path, meter.export(given).path)
    )
    assert found.n == len(images)
    assert found.value == pytest.approx(100 * np.mean(ours.argmax(1) == theirs.argmax(1)))
    assert found.details["mse"] == pytest.approx(np.square(ours.astype(np.float64) - theirs).mean(), rel=1e-4)
