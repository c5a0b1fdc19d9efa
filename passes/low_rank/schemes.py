"""Two ways to write one layer as two: which layers have them, as which matrices, and what a unit of rank costs.

- `channel` (Zhang et al. 2015, arXiv:1411.4229): W as (O, I * kh * kw), one matrix per group; r filters of the layer's
  own kernel, then 1 x 1. A Linear layer is two Linear layers.
- `spatial` (Jaderberg et al. 2014, arXiv:1405.3866): W as (O * kw, I * kh); r filters of kh x 1, then 1 x kw. Each of
  the two keeps stride, padding and dilation along its own axis, which is exact for every stride and size.

The first layer has no bias, the second the layer's. Depthwise convolutions have no rank to lose and are left out.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d
Scheme = Literal["channel", "spatial"]


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether the module can be written as two: a plain Linear layer or convolution, not depthwise."""
    return _is_plain(module) and not (isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1)


def schemes_of(layer: Layer) -> tuple[Scheme, ...]:
    """The ways there are to write `layer` as two."""
    split = isinstance(layer, nn.Conv2d) and layer.groups == 1 and min(layer.kernel_size) > 1
    return ("channel", "spatial") if split else ("channel",)


def matrices(layer: Layer, scheme: Scheme) -> Tensor:
    """The weight as (g, rows, columns) fp64, detached; columns in the order of (i, kh, kw) or (i, kh)."""
    weight = layer.weight.detach().double()
    if scheme == "channel":
        return weight.reshape(_groups(layer), -1, weight[0].numel())
    outputs, inputs, kh, kw = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(1, outputs * kw, inputs * kh)


def in_channel_layout(matrix: Tensor, layer: Layer, scheme: Scheme) -> Tensor:
    """A matrix of `scheme` in the layout of `channel`, (g, O / g, I / g * kh * kw), whose columns are input patches."""
    weight = _as_weight(matrix, layer.weight.shape, scheme)
    return weight.reshape(_groups(layer), -1, weight[0].numel())


def full_rank(layer: Layer, scheme: Scheme) -> int:
    """Least rank, per group, that loses nothing."""
    return min(_rows_columns(layer, scheme))


def rank_params(layer: Layer, scheme: Scheme) -> int:
    """Parameters of one unit of rank, in all groups."""
    return _groups(layer) * sum(_rows_columns(layer, scheme))


def rank_macs(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> int:
    """Multiply-accumulates of one unit of rank, in all groups, for one image.

    `size`: of the layer's input without the batch, (..., I) for a Linear layer and (I, H, W) for a convolution.
    """
    if isinstance(layer, nn.Linear):
        return math.prod(size[:-1]) * rank_params(layer, scheme)
    height, width = _output_length(layer, 0, size[1]), _output_length(layer, 1, size[2])
    if scheme == "channel":
        return height * width * rank_params(layer, scheme)
    rows, columns = _rows_columns(layer, scheme)
    return height * (size[2] * columns + width * rows)  # the width is strided only by the second


def break_even(layer: Layer, scheme: Scheme) -> float:
    """Rank at which the pair has as many weights as the layer."""
    return layer.weight.numel() / rank_params(layer, scheme)


def factored(layer: Layer, scheme: Scheme, rank: int) -> nn.Sequential:
    """Two layers in place of one, of `rank` per group; same device and dtype, values left at zero."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first: Layer = _unset(layer, nn.Linear, layer.in_features, rank, bias=False)
        return nn.Sequential(first, _unset(layer, nn.Linear, rank, layer.out_features, bias=bias))
    inputs, middle, outputs, groups = layer.in_channels, layer.groups * rank, layer.out_channels, layer.groups
    if scheme == "channel":
        first = _unset(layer, type(layer), inputs, middle, bias=False, groups=groups, **_geometry(layer))
        return nn.Sequential(first, _unset(layer, nn.Conv2d, middle, outputs, bias=bias, groups=groups, kernel_size=1))
    # timm's Conv2dSame pads each axis by that axis alone, so the two pad as the one did.
    first = _unset(layer, type(layer), inputs, middle, bias=False, **_geometry(layer, (0,)))
    return nn.Sequential(first, _unset(layer, type(layer), middle, outputs, bias=bias, **_geometry(layer, (1,))))


def fill(pair: nn.Sequential, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """Set the values of what `factored` made.

    Args:
        pair: of rank r.
        a: (g, rows, r).
        b: (g, r, columns).
        bias: (O,), given exactly where the pair has one.
    """
    first, second = cast(Layer, pair[0]), cast(Layer, pair[1])
    scheme = scheme_of(pair)
    assert scheme is not None
    assert (bias is None) == (second.bias is None)
    rank = b.shape[1]
    assert (a.shape[2], len(b) * rank) == (rank, len(first.weight))
    if scheme == "spatial":
        a = a.reshape(len(second.weight), -1, rank).mT
    with torch.no_grad():
        first.weight.copy_(b.reshape(first.weight.shape))
        second.weight.copy_(a.reshape(second.weight.shape))
        if bias is not None and second.bias is not None:
            second.bias.copy_(bias)


def scheme_of(module: nn.Module) -> Scheme | None:
    """The scheme of a pair as `factored` makes it; none for anything else. With a 1 x 1 kernel it is `channel`."""
    if type(module) is not nn.Sequential or len(module) != 2:
        return None
    first, second = module
    if not is_layer(first) or not _is_plain(second):
        return None
    bias: Tensor | None = first.bias
    if bias is not None:
        return None
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return "channel" if first.out_features == second.in_features else None
    if not (isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)):
        return None
    if first.out_channels != second.in_channels or first.groups != second.groups:
        return None
    if type(second) is nn.Conv2d and _geometry(second) == _geometry(second, ()):
        return "channel"
    split = _geometry(first) == _geometry(first, (0,)) and _geometry(second) == _geometry(second, (1,))
    named = isinstance(first.padding, str) or isinstance(second.padding, str)
    alike = type(first) is type(second) and (not named or first.padding == second.padding)
    both = first.groups == 1 and min(first.kernel_size[0], second.kernel_size[1]) > 1
    return "spatial" if split and alike and both else None


def composed(pair: nn.Sequential) -> Tensor:
    """Weight of the one layer that computes the same, in its shape; differentiable, in the pair's dtype."""
    a, b = _values(pair)
    outer, inner = cast(Layer, pair[1]).weight.shape, cast(Layer, pair[0]).weight.shape
    if scheme_of(pair) == "spatial":
        return _as_weight(a @ b, torch.Size((outer[0], *inner[1:3], outer[3])), "spatial")
    return _as_weight(a @ b, torch.Size((outer[0], *inner[1:])), "channel")


def truncated(pair: nn.Sequential, rank: int) -> nn.Sequential:
    """The first `rank` components of each group, with their values."""
    a, b = _values(pair)
    smaller = factored(_one(pair), cast(Scheme, scheme_of(pair)), rank)
    fill(smaller, a[:, :, :rank], b[:, :rank], cast(Layer, pair[1]).bias)
    return smaller


def merged(pair: nn.Sequential) -> Layer:
    """One layer in place of the two, with values."""
    layer, bias = _one(pair), cast(Layer, pair[1]).bias
    with torch.no_grad():
        layer.weight.copy_(composed(pair))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    return layer


def _is_plain(module: nn.Module) -> TypeGuard[Layer]:
    # The weight of other subclasses, standardised for one, is not what they compute with.
    if isinstance(module, nn.Conv2d):
        # timm's own, by name: importing timm takes seconds.
        return (type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame") and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def _groups(layer: Layer) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _rows_columns(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    shape = layer.weight.shape
    if scheme == "channel":
        return shape[0] // _groups(layer), shape[1:].numel()
    return shape[0] * shape[3], shape[1] * shape[2]


def _output_length(layer: nn.Conv2d, axis: int, length: int) -> int:
    stride, padding = layer.stride[axis], layer.padding
    if type(layer) is not nn.Conv2d:
        return math.ceil(length / stride)  # Conv2dSame
    if padding == "same":
        return length
    pad = 0 if isinstance(padding, str) else padding[axis]
    return (length + 2 * pad - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1) // stride + 1


def _geometry(layer: nn.Conv2d, axes: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Arguments of a convolution that does along `axes` what `layer` does, and nothing along the others."""

    def kept(values: tuple[int, ...], nothing: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else nothing for axis, value in enumerate(values))

    return {
        "kernel_size": kept(layer.kernel_size, 1),
        "stride": kept(layer.stride, 1),
        "padding": layer.padding if isinstance(layer.padding, str) else kept(layer.padding, 0),
        "dilation": kept(layer.dilation, 1),
    }


def _unset(like: Layer, kind: type[nn.Module], inputs: int, outputs: int, **arguments: Any) -> Any:
    """A layer of zeros: built without drawing random numbers, and without the odd values of fresh memory."""
    layer = kind(inputs, outputs, **arguments, device="meta", dtype=like.weight.dtype)
    layer = layer.to_empty(device=like.weight.device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _one(pair: nn.Sequential) -> Layer:
    """The layer that `factored` would make into this pair, values left at zero."""
    first, second = cast(Layer, pair[0]), cast(Layer, pair[1])
    bias = second.bias is not None
    if isinstance(first, nn.Linear) or isinstance(second, nn.Linear):
        return cast(Layer, _unset(first, nn.Linear, first.weight.shape[1], second.weight.shape[0], bias=bias))
    along = _geometry(first)
    if scheme_of(pair) == "spatial":
        across = _geometry(second)
        along = {k: v if isinstance(v, str) else (v[0], across[k][1]) for k, v in along.items()}
    inputs, outputs = first.in_channels, second.out_channels
    return cast(Layer, _unset(first, type(first), inputs, outputs, bias=bias, groups=first.groups, **along))


def _as_weight(matrix: Tensor, shape: torch.Size, scheme: Scheme) -> Tensor:
    """(g, rows, columns) in the shape of the layer's weight."""
    if scheme == "channel":
        return matrix.reshape(shape)
    outputs, inputs, kh, kw = shape
    return matrix.reshape(outputs, kw, inputs, kh).permute(0, 2, 3, 1)


def _values(pair: nn.Sequential) -> tuple[Tensor, Tensor]:
    """A (g, rows, r) and B (g, r, columns) of a pair, differentiable."""
    first, second = cast(Layer, pair[0]), cast(Layer, pair[1])
    b = first.weight.reshape(_groups(first), -1, first.weight[0].numel())
    if scheme_of(pair) == "spatial":
        return second.weight.flatten(2).mT.reshape(1, -1, b.shape[1]), b
    return second.weight.reshape(len(b), -1, b.shape[1]), b
