"""Two layers in place of one, of every kind: what they compute, what they cost, and how they become one again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from slim import costs
from slim.passes.low_rank import factors, schemes
from slim.passes.low_rank.schemes import Layer, Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-10
"""Of fp64 sums of a hundred terms around 1, with room."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(layer: Any) -> Any:
    """The same layer in fp64, with weights and bias that no global generator chose."""
    layer = layer.double()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(*parameter.shape, seed=index))
    return layer


def pair_of(layer: Layer, scheme: Scheme, rank: int | None = None) -> nn.Sequential:
    """The best pair of `rank`, or the exact one."""
    rank = rank or schemes.full_rank(layer, scheme)
    pair = schemes.factored(layer, scheme, rank)
    schemes.fill(pair, *factors.factorize(schemes.matrices(layer, scheme)).pair(rank), layer.bias)
    return pair


def layers() -> Iterator[tuple[Layer, tuple[int, ...]]]:
    """One layer of each kind with the size of an input."""
    yield nn.Linear(12, 20), (4, 5, 12)
    yield nn.Linear(20, 12, bias=False), (4, 5, 20)
    yield nn.Conv2d(12, 8, 1, stride=(1, 2)), (12, 7, 9)
    yield nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 7, 10)
    yield nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(2, 0), dilation=(1, 2), bias=False), (6, 8, 11)
    yield nn.Conv2d(6, 8, 3, padding="same", dilation=2), (6, 7, 10)
    yield nn.Conv2d(6, 8, (1, 3), padding="valid"), (6, 7, 10)
    yield nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), (8, 7, 10)
    yield nn.Conv2d(8, 12, 1, groups=2, bias=False), (8, 7, 10)
    yield Conv2dSame(6, 8, 3, stride=2), (6, 7, 10)
    yield Conv2dSame(8, 12, 3, stride=2, groups=2, bias=False), (8, 8, 9)


def described(layer: Layer) -> str:
    return f"{type(layer).__name__}({layer.extra_repr().replace(' ', '')})"


def each_scheme() -> list[Any]:
    """Every kind of layer in every scheme it has."""
    return [
        pytest.param(with_values(layer), scheme, size, id=f"{described(layer)}-{scheme}")
        for layer, size in layers()
        for scheme in schemes.schemes_of(layer)
    ]


each = pytest.mark.parametrize(("layer", "scheme", "size"), each_scheme())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(20, 12), (12, 20), (9, 9)])
def test_a_linear_layer_at_full_rank_is_reproduced(outputs: int, inputs: int, bias: bool) -> None:
    layer = with_values(nn.Linear(inputs, outputs, bias=bias))
    tokens = random(2, 3, inputs, seed=9)
    torch.testing.assert_close(pair_of(layer, "channel")(tokens), layer(tokens), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        (kernel, stride, padding)
        for kernel in (1, 3, (3, 5), (2, 3), (1, 3), (3, 1))
        for stride in (1, 2, (1, 2))
        for padding in (0, 1, (2, 0), "same", "valid")
        # torch refuses strides with "same", and warns of even kernels.
        if padding != "same" or (stride == 1 and kernel != (2, 3))
    ],
)
def test_a_convolution_at_full_rank_is_reproduced(kernel: Any, stride: Any, padding: Any, dilation: int) -> None:
    compared = 0
    for groups in (1, 2, 4):
        for size in ((11, 12), (12, 13)):
            bias = size == (11, 12)
            layer = with_values(nn.Conv2d(8, 12, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias))
            images = random(2, 8, *size, seed=9)
            for scheme in schemes.schemes_of(layer):
                found = pair_of(layer, scheme)(images)
                torch.testing.assert_close(found, layer(images), rtol=0, atol=ROUNDING)
                compared += 1
    assert compared == (8 if kernel in (3, (3, 5), (2, 3)) else 6)


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (9, 12), (12, 9), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2), 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, (3, 5)])
def test_same_padding_by_size_at_full_rank_is_reproduced(kernel: Any, stride: Any, size: tuple[int, int]) -> None:
    for dilation, groups, bias in ((1, 1, True), (2, 1, False), (1, 2, True)):
        layer = with_values(Conv2dSame(4, 6, kernel, stride, dilation=dilation, groups=groups, bias=bias))
        images = random(2, 4, *size, seed=9)
        for scheme in schemes.schemes_of(layer):
            pair = pair_of(layer, scheme)
            torch.testing.assert_close(pair(images), layer(images), rtol=0, atol=ROUNDING)
            one = schemes.merged(pair)
            assert type(one) is Conv2dSame
            torch.testing.assert_close(one(images), layer(images), rtol=0, atol=ROUNDING)


def test_plain_layers_and_only_they_can_be_factored() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert all(schemes.is_layer(layer) for layer, _ in layers())
    assert schemes.is_layer(nn.Conv2d(1, 8, 3))  # one input channel, but one group: not depthwise
    refused: list[nn.Module] = [
        Doubled(4, 4),
        StdConv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 3, groups=8),
        Conv2dSame(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(8, 8, 3),
        nn.ConvTranspose2d(8, 8, 3),
        nn.Bilinear(4, 4, 4),
        nn.Identity(),
    ]
    for module in refused:
        assert not schemes.is_layer(module), module


def test_the_spatial_scheme_is_for_whole_kernels_in_one_group() -> None:
    assert schemes.schemes_of(nn.Linear(4, 4)) == ("channel",)
    for kernel, groups in ((1, 1), ((1, 3), 1), ((3, 1), 1), (3, 2)):
        assert schemes.schemes_of(nn.Conv2d(4, 4, kernel, groups=groups)) == ("channel",)
    for layer in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, (2, 5)), Conv2dSame(4, 4, 3)):
        assert schemes.schemes_of(layer) == ("channel", "spatial")


def test_full_rank_and_price_of_a_rank_by_hand() -> None:
    linear = nn.Linear(12, 20)
    assert schemes.full_rank(linear, "channel") == 12
    assert schemes.rank_params(linear, "channel") == 12 + 20
    assert schemes.break_even(linear, "channel") == 12 * 20 / 32
    conv = nn.Conv2d(6, 8, (3, 5))
    assert schemes.full_rank(conv, "channel") == min(8, 6 * 15)
    assert schemes.rank_params(conv, "channel") == 8 + 6 * 15
    assert schemes.full_rank(conv, "spatial") == min(8 * 5, 6 * 3)
    assert schemes.rank_params(conv, "spatial") == 8 * 5 + 6 * 3
    assert schemes.break_even(conv, "spatial") == 8 * 6 * 15 / 58
    grouped = nn.Conv2d(8, 12, 3, groups=4)
    assert schemes.full_rank(grouped, "channel") == min(12 // 4, 8 // 4 * 9)
    # 4 groups of a rank each: 3 outputs and 2 x 9 inputs.
    assert schemes.rank_params(grouped, "channel") == 4 * (3 + 18)


@each
def test_parameters_are_rank_times_its_price_and_a_bias(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    bias = 0 if layer.bias is None else layer.bias.numel()
    for rank in (1, 2):
        params = costs.count_params(schemes.factored(layer, scheme, rank))
        assert params == rank * schemes.rank_params(layer, scheme) + bias


@each
def test_multiply_accumulates_are_those_counted(layer: Layer, scheme: Scheme, size: tuple[int, int, int]) -> None:
    for rank in (1, 2):
        counted = costs.count_macs(schemes.factored(layer, scheme, rank), size)
        assert counted == rank * schemes.rank_macs(layer, scheme, size)


@each
def test_a_matrix_in_the_channel_layout_is_the_weight(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    found = schemes.in_channel_layout(schemes.matrices(layer, scheme), layer, scheme)
    assert torch.equal(found, schemes.matrices(layer, "channel"))
    assert torch.equal(found.reshape(layer.weight.shape), layer.weight)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_has_the_dtype_of_its_layer(
    layer: Layer, scheme: Scheme, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    cast_layer = schemes.merged(pair_of(layer, scheme)).to(dtype)
    pair = pair_of(cast_layer, scheme)
    assert {parameter.dtype for parameter in pair.parameters()} == {dtype}
    assert schemes.composed(pair).dtype == dtype


@each
def test_building_a_pair_draws_no_random_number(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    before = torch.random.get_rng_state()
    pair = schemes.factored(layer, scheme, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.any() for parameter in pair.parameters())


@each
def test_a_pair_knows_its_scheme(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    for rank in (1, schemes.full_rank(layer, scheme)):
        assert schemes.scheme_of(schemes.factored(layer, scheme, rank)) == scheme
    assert schemes.scheme_of(layer) is None


def spatial(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> nn.Sequential:
    """A spatial pair of 3 x 3, stride 2, padding 1; but for what is given."""
    down: dict[str, Any] = {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0), "bias": False}
    along: dict[str, Any] = {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1)}
    return nn.Sequential(nn.Conv2d(4, 2, **(down | (first or {}))), nn.Conv2d(2, 6, **(along | (second or {}))))


class Named(nn.Sequential):
    """A Sequential of two that may do more in its forward pass."""


def conv(*arguments: Any, **named: Any) -> nn.Conv2d:
    return nn.Conv2d(*arguments, **named)


LOOK_ALIKES: dict[str, nn.Module] = {
    "three layers": nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 6), nn.Linear(6, 6)),
    "one layer": nn.Sequential(nn.Linear(4, 2, bias=False)),
    "first with bias": nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 6)),
    "an activation between": nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(2, 6)),
    "an activation after": nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU()),
    "widths that differ": nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(3, 6)),
    "no plain Sequential": Named(nn.Linear(4, 2, bias=False), nn.Linear(2, 6)),
    "Linear, then a convolution": nn.Sequential(nn.Linear(4, 2, bias=False), conv(2, 6, 1)),
    "a convolution, then Linear": nn.Sequential(conv(4, 2, 1, bias=False), nn.Linear(2, 6)),
    "first convolution with bias": nn.Sequential(conv(4, 2, 3), conv(2, 6, 1)),
    "groups of the first alone": nn.Sequential(conv(4, 4, 3, groups=2, bias=False), conv(4, 6, 1)),
    "groups of the second alone": nn.Sequential(conv(4, 4, 3, bias=False), conv(4, 6, 1, groups=2)),
    "depthwise, then 1 x 1": nn.Sequential(conv(4, 4, 3, groups=4, bias=False), conv(4, 6, 1)),
    "depthwise, then 1 x 1 in groups": nn.Sequential(conv(4, 4, 3, groups=4, bias=False), conv(4, 4, 1, groups=4)),
    "a second of 3 x 3": nn.Sequential(conv(4, 2, 3, bias=False), conv(2, 6, 3)),
    "a strided second": nn.Sequential(conv(4, 2, 3, bias=False), conv(2, 6, 1, stride=2)),
    "a padded second": nn.Sequential(conv(4, 2, 3, bias=False), conv(2, 6, 1, padding=1)),
    "a second that pads by size": nn.Sequential(conv(4, 2, 3, bias=False), Conv2dSame(2, 6, 1)),
    "reflected borders": nn.Sequential(conv(4, 2, 3, padding=1, padding_mode="reflect", bias=False), conv(2, 6, 1)),
    "a standardised first": nn.Sequential(StdConv2d(4, 2, 3, bias=False), conv(2, 6, 1)),
    "spatial, first strided across": spatial({"stride": (2, 2)}),
    "spatial, first padded across": spatial({"padding": (1, 1)}),
    "spatial, first of two columns": spatial({"kernel_size": (3, 2)}),
    "spatial, second strided down": spatial(None, {"stride": (2, 2)}),
    "spatial, second padded down": spatial(None, {"padding": (1, 1)}),
    "spatial, second of two rows": spatial(None, {"kernel_size": (2, 3)}),
    "spatial, padding named in one": spatial({"stride": 1, "padding": "same"}),
    "spatial, padding named differently": spatial({"stride": 1, "padding": "same"}, {"padding": "valid"}),
    "spatial, in groups": spatial({"groups": 2}, {"groups": 2}),
    "spatial, the other way round": nn.Sequential(conv(4, 2, (1, 3), bias=False), conv(2, 6, (3, 1))),
    "spatial, of one row": nn.Sequential(conv(4, 2, 1, bias=False), conv(2, 6, (1, 3))),
    "spatial, of two types": nn.Sequential(Conv2dSame(4, 2, (3, 1), bias=False), conv(2, 6, (1, 3))),
}


def test_a_pair_written_by_hand_is_recognised() -> None:
    # What the look-alikes below differ from.
    assert schemes.scheme_of(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 6))) == "channel"
    assert schemes.scheme_of(nn.Sequential(conv(4, 2, 3, stride=2, bias=False), conv(2, 6, 1))) == "channel"
    assert schemes.scheme_of(spatial()) == "spatial"


@pytest.mark.parametrize("module", LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_what_only_looks_like_a_pair_is_refused(module: nn.Module) -> None:
    assert schemes.scheme_of(module) is None


@each
def test_one_layer_again_is_the_layer(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    one = schemes.merged(pair_of(layer, scheme))
    assert type(one) is type(layer)
    assert repr(one) == repr(layer)  # kernel, stride, padding, dilation, groups, bias
    torch.testing.assert_close(one.weight, layer.weight, rtol=0, atol=ROUNDING)
    images = random(2, *size, seed=9)
    torch.testing.assert_close(one(images), layer(images), rtol=0, atol=ROUNDING)


@each
def test_one_layer_again_in_single_precision(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    single = schemes.merged(pair_of(layer, scheme)).float()
    one = schemes.merged(pair_of(single, scheme))
    # Two roundings of 6e-8 per product, of a dozen products.
    assert (one.weight - single.weight).norm() <= 1e-6 * single.weight.norm()


@each
def test_the_composed_weight_computes_what_the_pair_does(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    pair = pair_of(layer, scheme, rank=2)
    one = schemes.merged(pair)
    assert torch.equal(schemes.composed(pair), one.weight)
    assert (one.weight - layer.weight).abs().max() > 0.01  # something was lost
    images = random(2, *size, seed=9)
    torch.testing.assert_close(one(images), pair(images), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("layer", "scheme"),
    [
        (nn.Linear(3, 4), "channel"),
        (nn.Conv2d(4, 6, 2, groups=2), "channel"),
        (nn.Conv2d(2, 3, 2), "spatial"),
    ],
)
def test_the_composed_weight_has_a_gradient(layer: Layer, scheme: Scheme) -> None:
    pair = pair_of(with_values(layer), scheme, rank=2)
    first, second = (cast(Tensor, part.weight) for part in pair)

    def composed(one: Tensor, two: Tensor) -> Tensor:
        changed = schemes.factored(layer, scheme, 2)
        for part, weight in zip(changed, (one, two), strict=True):
            del part.weight  # a parameter is a leaf; gradcheck follows the tensors it gives
            part.weight = weight
        return schemes.composed(changed)

    assert torch.autograd.gradcheck(composed, (first, second))


@each
def test_a_smaller_rank_is_a_part_of_a_larger(layer: Layer, scheme: Scheme, size: tuple[int, ...]) -> None:
    full = pair_of(layer, scheme)
    for rank in range(1, schemes.full_rank(layer, scheme) + 1):
        part, direct = schemes.truncated(full, rank), pair_of(layer, scheme, rank)
        assert repr(part) == repr(direct)
        for found, expected in zip(part.parameters(), direct.parameters(), strict=True):
            assert torch.equal(found, expected)
