"""Fake quantisation: the numbers are ONNX Runtime's, the gradients are those of the rounding left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.layers import Conv2dSame
from torch import Tensor, nn

from slim import surgery
from slim.artifact import Preprocessing
from slim.export.onnx import export_onnx
from slim.export.quantized import write
from slim.export.ranges import ranges, structure
from slim.export.target import Target
from slim.passes.fake_quant import (
    Layers,
    Scheme,
    fake_quantize,
    grid_of,
    input_in_int8,
    ranges_of,
    simulated,
    weight_in_int8,
)
from slim.quantization import Quantization
from tests.contract.zoo import artifact, tied

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEMES: tuple[Scheme, ...] = ("asymmetric", "symmetric")
TARGET = Target.parse("ort:cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def in_onnx_runtime(x: Tensor, scale: Tensor, zero_point: Tensor, kind: Any, axis: int = 0) -> Tensor:
    """What QuantizeLinear and DequantizeLinear make of `x`."""
    constants = [
        numpy_helper.from_array(scale.numpy(), "scale"),
        numpy_helper.from_array(zero_point.numpy().astype(kind), "zero"),
    ]
    nodes = [
        helper.make_node(op, [given, "scale", "zero"], [made], axis=axis)
        for op, given, made in (("QuantizeLinear", "x", "q"), ("DequantizeLinear", "q", "y"))
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def layers_of(model: nn.Module) -> Layers:
    """Everything in INT8."""
    return {
        name: ("weight", "input") for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def seen(images: int = 4) -> Tensor:
    return noise(images, 3, 32, 32).float()


# Numbers


@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_are_rounded_as_onnx_runtime_rounds_them(scheme: Scheme) -> None:
    kind = np.uint8 if scheme == "asymmetric" else np.int8
    for low, high in ((-1.0, 3.0), (0.0, 6.0), (-5.0, -0.5), (0.25, 0.5), (-2.0, 2.0), (-1e-30, 3e4)):
        x = torch.linspace(2 * low - 1, 2 * high + 1, 4001)  # what is beyond the range is clipped
        grid = grid_of(torch.tensor(low), torch.tensor(high), scheme)
        assert torch.equal(fake_quantize(x, grid), in_onnx_runtime(x, grid[0], grid[1], kind)), (low, high)


def test_weights_are_rounded_as_onnx_runtime_rounds_them_for_each_output_channel() -> None:
    weight = noise(6, 5, 3, 3).float() * torch.logspace(-3, 3, 6).view(6, 1, 1, 1)
    scale = weight.flatten(1).abs().amax(1) / 127
    expected = in_onnx_runtime(weight, scale, torch.zeros(6), np.int8)
    assert torch.equal(weight_in_int8(weight), expected)
    # Each channel has its own grid: of 45 values hardly two are on the same point.
    assert torch.unique(expected).numel() > 6 * 30


def test_a_half_goes_to_the_even_neighbour_as_numpy_has_it() -> None:
    x = torch.arange(-140, 141) / 2.0  # with scale 1 every second one lies in the middle
    grid = (torch.tensor(1.0), torch.tensor(0.0), -128, 127)
    expected = np.clip(np.rint(x.numpy()), -128, 127)
    assert np.array_equal(fake_quantize(x, grid).numpy(), expected)
    assert fake_quantize(torch.tensor([0.5, 1.5, 2.5, -0.5]), grid).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 6.0), (-6.0, -0.5), (-2.0, 2.0)])
def test_zero_is_on_the_grid_and_no_value_of_the_range_moves_by_more_than_a_step(
    scheme: Scheme, low: float, high: float
) -> None:
    grid = grid_of(torch.tensor(low), torch.tensor(high), scheme)
    width = max(high, 0) - min(low, 0)
    step = width / 255 if scheme == "asymmetric" else max(abs(low), abs(high)) / 127
    assert float(grid[0]) == pytest.approx(step, rel=1e-6)
    x = torch.linspace(low, high, 1001)
    # Half a step by rounding; the zero point is rounded too, which clips half a step at one end.
    assert float((fake_quantize(x, grid) - x).abs().max()) <= step * 1.001
    assert float(fake_quantize(torch.zeros(1), grid)) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_that_are_all_zero_stay_zero_and_have_finite_gradients(scheme: Scheme) -> None:
    x, weight = torch.zeros(4, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    (input_in_int8(x, scheme).sum() + weight_in_int8(weight).sum()).backward()  # type: ignore[no-untyped-call]
    assert not input_in_int8(x, scheme).any()
    assert not weight_in_int8(weight).any()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(weight.grad, torch.ones(2, 3))  # type: ignore[arg-type]


# Gradients


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    x = torch.tensor([-9.0, -1.2, -0.2, 0.0, 0.7, 3.0, 3.4, 9.0], requires_grad=True)
    grid = grid_of(torch.tensor(-1.0), torch.tensor(3.0), "asymmetric")
    fake_quantize(x, grid).backward(torch.arange(1.0, 9))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


def test_the_gradient_of_a_weight_is_the_identity() -> None:
    weight, given = noise(4, 3, 2, 2).requires_grad_(), noise(4, 3, 2, 2, seed=1)
    weight_in_int8(weight).backward(given)  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, given)  # type: ignore[arg-type]


def slope(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Derivatives of a number by each element, from differences."""
    found = torch.zeros_like(at)
    for place in range(at.numel()):
        by = torch.zeros_like(at).view(-1)
        by[place] = 1e-6
        by = by.view_as(at)
        found.view(-1)[place] = (value(at + by) - value(at - by)) / 2e-6
    return found


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gradient_of_a_scale_is_the_slope_while_rounding_errors_are_held(per_channel: bool) -> None:
    x, weights = noise(3, 40) * 2, noise(3, 40, seed=1)
    scale = torch.tensor([[0.5], [0.02], [0.01]]) if per_channel else torch.tensor(0.02)
    scale = scale.double()
    zero, (low, high) = torch.tensor(10.0).double(), (-128, 127)
    whole = (x / scale).round() + zero
    clipped = whole.clamp(low, high)
    held = (x / scale).round() - x / scale
    inside = whole == clipped
    assert 10 < int(inside.sum()) < 110  # both kinds

    def value(scale: Tensor) -> Tensor:
        return (weights * torch.where(inside, (x / scale + held) * scale, (clipped - zero) * scale)).sum()

    leaf = scale.clone().requires_grad_()
    found = fake_quantize(x, (leaf, zero, low, high))
    torch.testing.assert_close((weights * found).sum().detach(), value(scale))
    (weights * found).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, slope(value, scale), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_ends_of_a_batch_have_the_gradient_of_its_range(scheme: Scheme) -> None:
    x, weights = noise(50).clamp(-1.5, 1.5).float(), noise(50, seed=1).float()
    x[7], x[11] = 6.0, -2.0
    leaf = x.clone().requires_grad_()
    (weights * input_in_int8(leaf, scheme)).sum().backward()  # type: ignore[no-untyped-call]
    high, low = torch.tensor(6.0).double(), torch.tensor(-2.0).double()
    scale = grid_of(low, high, scheme)[0]
    held = (x.double() / scale).round() - x.double() / scale
    by_scale = (weights * held).sum()  # d/d scale of the sum of w * (x + scale * held)
    expected = weights.double().clone()
    if scheme == "symmetric":
        expected[7] += by_scale / 127
    else:
        expected[7] += by_scale / 255
        expected[11] -= by_scale / 255
    torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-4)  # sums of 50 in float32


# Batch norms


@pytest.mark.parametrize("sign", [1, -1])
def test_a_factor_for_each_row_commutes_with_rounding(sign: int) -> None:
    weight = noise(16, 8, 3, 3)
    factor = sign * torch.logspace(-4, 4, 16).double().view(16, 1, 1, 1)
    torch.testing.assert_close(weight_in_int8(weight * factor), factor * weight_in_int8(weight), rtol=1e-12, atol=0)
    # It does not for one scale of the whole weight, nor for a factor of each column.
    columns = torch.logspace(-1, 1, 8).double().view(1, 8, 1, 1)
    apart = (weight_in_int8(weight * columns) - columns * weight_in_int8(weight)).abs()
    assert float((apart / (weight * columns).abs()).median()) > 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_network_simulated_with_batch_norms_computes_as_with_folded_ones(scheme: Scheme) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)
    ).double()  # in float32 one value in a hundred thousand lies on the other side of a half
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()  # type: ignore[operator]
        norm.running_var.uniform_(0.01, 9)  # type: ignore[operator]
        norm.weight.data.normal_()  # type: ignore[operator]
    model.eval()
    images = noise(4, 3, 12, 12)
    folded = copy.deepcopy(model)
    for name, behind in (("0", "1"), ("3", "4")):
        surgery.fold_norm(folded, name, behind)
    weights: Layers = {"0": ("weight",), "3": ("weight",)}
    with torch.no_grad():
        exact = model(images)
        ours, theirs = (simulated(one, images, weights, scheme) for one in (model, folded))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert float((ours - exact).abs().max()) > 1e-3


# Networks


class Mixed(nn.Module):
    """Padding, depthwise and plain convolutions with batch norms, LayerNorm and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv2dSame(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.SiLU())
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.depth(self.stem(image)).flatten(2).mT
        query, key, value = self.qkv(self.norm(x)).chunk(3, 2)
        x = x + self.proj((query @ key.mT).softmax(2) @ value)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def test_what_is_simulated_is_what_a_file_computes(tmp_path: Path) -> None:
    """`s8` has INT8 on the inputs of layers; the file has its norms folded, and the runtime its own kernels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = Mixed().train(), noise(16, 3, 16, 16).float()
        model(images)  # for batch norms that do something
    model.eval()
    layers = layers_of(model)
    file = export_onnx(model, tmp_path / "float.onnx", Preprocessing(size=(3, 16, 16)))
    found = ranges(file, [images], "minmax", TARGET, 1)
    setting = Quantization(graph=structure(file), method="minmax", ranges=found)
    path = write(file, setting, "s8", tmp_path / "s8.onnx").path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    with torch.no_grad():
        exact = model(images)
        ours = simulated(model, images, layers, "symmetric", ranges_of(model, layers, [images]))
    # The order of sums puts a value of some images on the other side of a half; those are off by as much as INT8 is.
    apart, int8 = ((one - theirs).abs().amax(1) for one in (ours, exact))
    assert float(apart.median()) < 1e-4 * float(int8.median())
    assert float(apart.mean()) < 0.5 * float(int8.mean())


def test_ranges_are_those_of_all_batches() -> None:
    model = artifact("vit").model()
    inputs: list[Tensor] = []
    handle = model.get_submodule("blocks.1.mlp.fc2").register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    low, high = ranges_of(model, ["blocks.1.mlp.fc2"], torch.split(seen(12), 5))["blocks.1.mlp.fc2"]
    handle.remove()
    assert len(inputs) == 3
    assert (low, high) == (min(x.min() for x in inputs), max(x.max() for x in inputs))


def test_a_batch_beyond_the_given_ranges_is_clipped_and_without_them_is_not() -> None:
    model = artifact("vit").model()
    layers: Layers = {"patch_embed.proj": ("input",)}
    found = ranges_of(model, layers, [seen()])
    with torch.no_grad():
        one, other = (simulated(model, 9 * seen(), layers, "symmetric", given) for given in (found, None))
        clipped = model(9 * seen().clamp(-seen().abs().max() / 9, seen().abs().max() / 9))
    assert float((one - clipped).abs().max()) < 0.1 * float((other - clipped).abs().max())


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit", "convnext", "mixer", "beit"])
def test_a_network_is_itself_afterwards_and_every_weight_has_a_gradient(name: str) -> None:
    model = artifact(name).model()
    layers = layers_of(model)
    before, values = model(seen()), {key: value.clone() for key, value in model.state_dict().items()}
    ours = simulated(model, seen(), layers, "asymmetric")
    assert not torch.equal(ours, before)
    assert torch.equal(model(seen()), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(isinstance(model.get_submodule(layer).weight, nn.Parameter) for layer in layers)
    assert values.keys() == model.state_dict().keys()
    ours.square().sum().backward()  # type: ignore[no-untyped-call]
    for layer in layers:
        gradient = model.get_submodule(layer).get_parameter("weight").grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any(), layer


def test_a_weight_that_is_read_without_its_layer_is_in_int8_too() -> None:
    model = artifact("beit").model()
    layer = "blocks.0.attn.qkv"
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        weight = by_hand.get_submodule(layer).get_parameter("weight")
        weight.copy_(weight_in_int8(weight))
        assert torch.equal(simulated(model, seen(), {layer: ("weight",)}, "symmetric"), by_hand(seen()))
        assert not torch.equal(by_hand(seen()), model(seen()))


def test_a_weight_that_two_layers_share_is_in_int8_in_both() -> None:
    model = tied(10).eval()
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        weight = by_hand.get_submodule("first").get_parameter("weight")
        weight.copy_(weight_in_int8(weight))
        both: Layers = {"first": ("weight",), "second": ("weight",)}
        assert torch.equal(simulated(model, seen(), both, "symmetric"), by_hand(seen()))


def test_an_error_in_the_network_leaves_it_as_it_was() -> None:
    model = artifact("vit").model()
    layers, weight = layers_of(model), model.get_submodule("blocks.0.attn.qkv").weight
    with pytest.raises(RuntimeError):
        simulated(model, seen()[:, :2], layers, "symmetric")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.get_submodule("blocks.0.attn.qkv").weight is weight


def test_under_autocast_ranges_and_rounding_are_in_float32() -> None:
    x = noise(2000).float()
    assert input_in_int8(x.bfloat16(), "symmetric").dtype == torch.float32
    model = artifact("vit").model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, exact = simulated(model, seen(), layers_of(model), "symmetric"), model(seen())
    assert float((ours - exact).abs().max()) < 0.1 * float(exact.abs().max())  # seen: 0.02
