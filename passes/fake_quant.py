"""Fake quantisation: a float network computes what its INT8 file will, and gradients pass through the rounding.

Weights are int8, symmetric, one scale for each output channel; inputs of layers have one scale each and are uint8 with
a zero point (asymmetric) or int8 with zero point 0 (symmetric). Rounding has the straight-through gradient (Bengio et
al. 2013, arXiv:1308.3432): 1 within the range, 0 beyond. A scale has the gradient of LSQ (Esser et al. 2020,
arXiv:1902.08153), but is no value of its own: `quantize` will read ranges off images, so a range is a function of the
activations here too, and its gradient reaches the values at its ends.

A batch norm behind a layer needs no care. It is folded into the layer before that is quantised, and multiplies a row of
the weight by some g: the scale is multiplied by |g|, and what is rounded stays, so Q(g w) = g Q(w). Not simulated are
INT8 outputs, sums and products of two activations, which `u8` files have besides, rounded biases, and that others who
read a layer's input, such as a shortcut, read it rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

Scheme = Literal["asymmetric", "symmetric"]
"""uint8 with a zero point; int8 without."""
Part = Literal["weight", "input"]
Layers = Mapping[str, Iterable[Part]]
"""Name of a Linear layer or convolution -> what of it is in INT8."""
Ranges = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a layer -> least and largest value of its input, scalars."""
Grid = tuple[Tensor, Tensor, int, int]
"""Scale, zero point, least and largest integer."""

LARGEST = 127
"""Of symmetric scales: int8 reaches to -128, which would have no counterpart."""


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.ends = lowest, highest
        return ((x / scale).round() + zero_point).clamp(lowest, highest).sub(zero_point) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        exact = x / scale
        whole = exact.round() + zero_point
        clipped = whole.clamp(*ctx.ends)
        inside = whole == clipped
        of_scale = None
        if ctx.needs_input_grad[1]:
            change = clipped - zero_point - exact * inside
            of_scale = (change * gradient).sum_to_size(scale.shape)
        return gradient * inside, of_scale, None, None, None


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """`x` rounded to a grid, as QuantizeLinear and DequantizeLinear of ONNX do: half to even, what is beyond clipped.

    Gradients reach `x` and the scale.

    Args:
        x: float32, or float64; any shape.
        grid: tensors of it are as `x`, and broadcast against it.
    """
    scale, zero_point, lowest, highest = grid
    found: Tensor = _FakeQuantize.apply(x, scale, zero_point, lowest, highest)
    return found


def grid_of(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    """The grid of a range; 0 is on it, as it must be for padding.

    Args:
        low: least values, any shape.
        high: largest values, as `low`.
        scheme: of the integers.
    """
    if scheme == "symmetric":
        scale = _nonzero(torch.maximum(low.abs(), high.abs()) / LARGEST)
        return scale, torch.zeros_like(scale), -128, 127
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _nonzero((high - low) / 255)
    return scale, (-low / scale).round().detach(), 0, 255


def weight_in_int8(weight: Tensor) -> Tensor:
    """A weight as int8 holds it. Nothing is clipped and scales count as constants, so its gradient is the identity.

    weight: (out, ...) float. Returns the same.
    """
    most = weight.detach().flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
    return fake_quantize(weight, grid_of(-most, most, "symmetric"))


def input_in_int8(x: Tensor, scheme: Scheme, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Activations as INT8 holds them, in float32 whatever the arithmetic: bf16 has no more bits itself.

    x: any shape; `ends`: least and largest value; none takes those of `x`, with their gradients.
    """
    x = x.float()
    low, high = ends or (x.amin(), x.amax())
    return fake_quantize(x, grid_of(low, high, scheme))


def simulated(model: nn.Module, images: Tensor, layers: Layers, scheme: Scheme, ranges: Ranges | None = None) -> Tensor:
    """(B, K): what the network puts out with `layers` in INT8. It is itself again afterwards, whatever happens.

    Args:
        model: the float network; its weights get the gradients.
        images: (B, C, H, W).
        layers: what is in INT8. A weight that is used twice is so in both places.
        scheme: of inputs.
        ranges: of inputs; none takes those of this batch.
    """
    weights: dict[int, tuple[str, Tensor]] = {}
    with ExitStack() as hooks:
        for name, parts in layers.items():
            layer = model.get_submodule(name)
            if "weight" in parts:
                weight = layer.get_parameter("weight")
                weights.setdefault(id(weight), (f"{name}.weight", weight_in_int8(weight)))
            if "input" in parts:
                before = _before(scheme, ranges[name] if ranges is not None else None)
                hooks.enter_context(layer.register_forward_pre_hook(before))
        # The weights stand in for their parameters during this call, for networks too that read one without the layer.
        found: Tensor = functional_call(model, dict(weights.values()), (images,))
    return found


def ranges_of(model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]) -> Ranges:
    """Least and largest value that the inputs of the named layers have. batches: (B, C, H, W) each, on its device."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str, x: Tensor) -> None:
        low, high = x.float().aminmax()
        before = found.get(name, (low, high))
        found[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0])))
        for images in batches:
            model(images)
    return found


def _before(scheme: Scheme, ends: tuple[Tensor, Tensor] | None) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (input_in_int8(inputs[0], scheme, ends), *inputs[1:])

    return hook


def _nonzero(scale: Tensor) -> Tensor:
    """1 where all values are 0, as ONNX Runtime has it: they stay 0 with any scale, but not when divided by 0."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
