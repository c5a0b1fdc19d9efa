"""The maths of low rank on plain tensors: what a rank loses is what the spectrum says, measured on real inputs."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slim.errors import PassError
from slim.passes.low_rank import factors, schemes
from slim.passes.low_rank.factors import Objective
from slim.passes.low_rank.schemes import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVES: tuple[Objective, ...] = ("plain", "activation", "whitened")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(groups: int, samples: int, inputs: int, seed: int = 1) -> Tensor:
    """Inputs (g, samples, d) of different sizes that go together, with a mean: where the weight alone misleads."""
    mixed = random(groups, samples, inputs, seed=seed) @ random(groups, inputs, inputs, seed=seed + 1)
    return mixed * torch.logspace(-1, 1, inputs, dtype=torch.float64) + random(groups, 1, inputs, seed=seed + 2)


def moment_of(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs


def output_error(change: Tensor, inputs: Tensor) -> float:
    """The squared outputs of `change` for (g, samples, d) inputs, one by one."""
    return float((inputs @ change.mT).square().sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(1, 12, 7), (1, 7, 12), (3, 9, 9)])
def test_full_rank_reproduces_the_matrix(shape: tuple[int, int, int], objective: Objective) -> None:
    weight = random(*shape)
    found = factors.factorize(weight, factors.root_of(moment_of(skewed(shape[0], 50, shape[2])), objective))
    a, b = found.pair(min(shape[1:]))
    assert a.dtype == b.dtype == torch.float64
    assert (a @ b - weight).abs().max() < 1e-10


def test_components_are_orthonormal_and_in_order() -> None:
    found = factors.factorize(random(2, 20, 15).float(), factors.root_of(moment_of(skewed(2, 50, 15)), "whitened"))
    assert found.left.dtype == found.spectrum.dtype == found.right.dtype == torch.float64
    assert (found.left.shape, found.spectrum.shape, found.right.shape) == ((2, 20, 15), (2, 15), (2, 15, 15))
    torch.testing.assert_close(found.left.mT @ found.left, torch.eye(15).double().expand(2, 15, 15), rtol=0, atol=1e-12)
    assert all((found.spectrum[:, i] >= found.spectrum[:, i + 1]).all() for i in range(14))


def test_without_a_root_the_error_of_the_weight_is_the_tail() -> None:
    weight = random(2, 20, 15)
    found = factors.factorize(weight)
    tail = found.tail()
    assert tail.shape == (16,)
    for rank in range(1, 16):
        a, b = found.pair(rank)
        assert float((weight - a @ b).square().sum()) == pytest.approx(float(tail[rank]), rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_tail_falls_from_everything_to_exactly_nothing(objective: Objective) -> None:
    found = factors.factorize(random(3, 8, 6), factors.root_of(moment_of(skewed(3, 50, 6)), objective))
    tail = found.tail()
    assert float(tail[0]) == pytest.approx(float(found.spectrum.square().sum()), rel=1e-12)
    assert float(tail[-1]) == 0.0
    assert all(before >= after for before, after in pairwise(tail.tolist()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_component_is_shared_evenly_whatever_the_units_of_the_inputs(objective: Objective) -> None:
    weight, inputs = random(2, 20, 15), skewed(2, 50, 15)
    for unit in (1.0, 1e3):
        a, b = factors.factorize(weight, factors.root_of(moment_of(unit * inputs), objective)).pair(6)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=2), rtol=1e-12, atol=0)


def test_without_a_root_each_factor_has_the_root_of_the_singular_value() -> None:
    found = factors.factorize(random(1, 20, 15))
    a, _ = found.pair(6)
    torch.testing.assert_close(a.norm(dim=1), found.spectrum[:, :6].sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_smaller_rank_is_a_part_of_a_larger(objective: Objective) -> None:
    found = factors.factorize(random(2, 20, 15), factors.root_of(moment_of(skewed(2, 50, 15)), objective))
    (a, b), (large_a, large_b) = found.pair(4), found.pair(9)
    assert torch.equal(a, large_a[:, :, :4])
    assert torch.equal(b, large_b[:, :4])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_whitened_the_discarded_part_of_the_spectrum_is_the_output_error(groups: int, centred: bool) -> None:
    weight, inputs = random(groups, 12, 10), skewed(groups, 200, 10)
    if centred:
        inputs = inputs - inputs.mean(1, keepdim=True)
    second_moment = moment_of(inputs)
    found = factors.factorize(weight, factors.root_of(second_moment, "whitened"))
    tail = found.tail()
    for rank in range(10):
        a, b = found.pair(rank)
        measured = output_error(weight - a @ b, inputs)
        # What the ridge adds, 1e-8 of the mean input for each weight, is all that the spectrum is above the measured.
        ridge = 1e-8 * float(second_moment.diagonal(dim1=1, dim2=2).mean() * (weight - a @ b).square().sum())
        assert float(tail[rank]) == pytest.approx(measured + ridge, rel=1e-9)
        assert factors.output_loss(weight - a @ b, second_moment) == pytest.approx(measured, rel=1e-9)


def test_a_mean_instead_of_a_sum_scales_the_loss_and_changes_no_factor() -> None:
    weight, second_moment = random(1, 12, 10), moment_of(skewed(1, 200, 10))
    of_sum, of_mean = (
        factors.factorize(weight, factors.root_of(moment, "whitened"))
        for moment in (second_moment, second_moment / 200)
    )
    torch.testing.assert_close(of_mean.tail(), of_sum.tail() / 200, rtol=1e-9, atol=0)
    (a, b), (other_a, other_b) = of_sum.pair(5), of_mean.pair(5)
    torch.testing.assert_close(other_a @ other_b, a @ b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_whitened_loses_least_output_at_every_rank(centred: bool) -> None:
    for groups, rows, columns in ((1, 16, 12), (1, 12, 16), (2, 8, 8)):
        weight, inputs = random(groups, rows, columns), skewed(groups, 200, columns)
        if centred:
            inputs = inputs - inputs.mean(1, keepdim=True)
        second_moment = moment_of(inputs)
        found = {one: factors.factorize(weight, factors.root_of(second_moment, one)) for one in OBJECTIVES}
        lost: dict[Objective, list[float]] = {one: [] for one in OBJECTIVES}
        for rank in range(1, min(rows, columns)):
            for one in OBJECTIVES:
                a, b = found[one].pair(rank)
                lost[one].append(output_error(weight - a @ b, inputs))
        for other in ("plain", "activation"):
            assert all(w <= o * (1 + 1e-6) for w, o in zip(lost["whitened"], lost[other], strict=True))
            assert lost["whitened"][2] < 0.9 * lost[other][2]  # and it is no tie


def test_the_root_of_activations_is_their_root_mean_square_to_the_half() -> None:
    inputs = skewed(2, 200, 10)
    root = factors.root_of(moment_of(inputs) / 200, "activation")
    assert root is not None
    torch.testing.assert_close(root, inputs.square().mean(1).sqrt().sqrt(), rtol=1e-12, atol=0)


def test_the_whitened_root_is_a_triangular_root() -> None:
    second_moment = moment_of(skewed(2, 200, 10))
    root = factors.root_of(second_moment, "whitened")
    assert root is not None
    assert torch.equal(root, root.tril())
    gap = (root @ root.mT - second_moment).abs().max()
    assert gap <= 1.01e-8 * second_moment.diagonal(dim1=1, dim2=2).mean()  # the ridge
    assert factors.root_of(second_moment, "plain") is None


@pytest.mark.parametrize("objective", ["activation", "whitened"])
@pytest.mark.parametrize("case", ["dead inputs", "dead group", "all dead", "few samples", "constant inputs"])
def test_a_singular_second_moment_gives_finite_factors(objective: Objective, case: str) -> None:
    inputs = skewed(2, 5 if case == "few samples" else 200, 10)
    if case == "dead inputs":
        inputs[:, :, 3:7] = 0
    elif case == "dead group":
        inputs[1] = 0
    elif case == "all dead":
        inputs[:] = 0
    elif case == "constant inputs":
        inputs[:, :, 4] = inputs[:, :, 5]
    weight = random(2, 12, 10)
    found = factors.factorize(weight, factors.root_of(moment_of(inputs), objective))
    a, b = found.pair(10)
    assert a.isfinite().all()
    assert b.isfinite().all()
    assert found.tail().isfinite().all()
    assert (a @ b - weight).abs().max() < 1e-8  # dead inputs are kept at full rank; they weigh 1e-4 of the others
    if case == "dead inputs" and objective == "whitened":
        a, b = found.pair(6)  # as many as are alive
        assert output_error(weight - a @ b, inputs) < 1e-6 * output_error(weight, inputs)


def test_a_second_moment_summed_in_single_precision_will_do() -> None:
    inputs = skewed(1, 30, 40).float()  # singular, and its rounding makes it indefinite
    second_moment = moment_of(inputs)
    assert torch.linalg.eigvalsh(second_moment.double())[0, 0] < 0
    found = factors.factorize(random(1, 12, 40), factors.root_of(second_moment, "whitened"))
    assert found.right.isfinite().all()


def test_the_ridge_is_no_larger_than_it_has_to_be() -> None:
    # A mean diagonal of 0.75, so 6.7e-6 of it is missing: 1e-6 is too little, 1e-5 enough.
    second_moment = torch.diag(torch.tensor([1.0, 1.0, 1.0, -5e-6], dtype=torch.float64))[None]
    root = factors.root_of(second_moment, "whitened")
    assert root is not None
    added = (root @ root.mT - second_moment).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(added, torch.full_like(added, 0.75e-5), rtol=1e-4, atol=0)


def test_what_is_no_second_moment_is_refused() -> None:
    second_moment = moment_of(skewed(1, 50, 6))
    broken = second_moment.clone()
    broken[0, 2, 2] = torch.nan
    for objective in ("activation", "whitened"):
        with pytest.raises(PassError, match=r"not finite; check the weights and the calibration images"):
            factors.root_of(broken, cast(Objective, objective))
    with pytest.raises(PassError, match=r"not positive semidefinite, even with 0\.01 of its mean diagonal"):
        factors.root_of(torch.diag(torch.tensor([1.0, 1.0, -0.5]))[None], "whitened")


def patches(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """What each output position of each group sees, (g, samples, I / g * kh * kw)."""
    padding, stride, dilation = (cast(tuple[int, int], v) for v in (layer.padding, layer.stride, layer.dilation))
    columns = F.unfold(images, cast(tuple[int, int], layer.kernel_size), dilation, padding, stride)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (2, 2, 2)])
def test_the_spectrum_tells_the_error_of_a_convolution(stride: int, padding: int, dilation: int, groups: int) -> None:
    layer = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation, groups=groups, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(random(*layer.weight.shape))
    images = random(4, 4, 11, 10, seed=3)
    second_moment = moment_of(patches(images, layer))
    found = factors.factorize(schemes.matrices(layer, "channel"), factors.root_of(second_moment, "whitened"))
    tail = found.tail()
    for rank in range(1, schemes.full_rank(layer, "channel")):
        pair = schemes.factored(layer, "channel", rank)
        schemes.fill(pair, *found.pair(rank))
        measured = float((layer(images) - pair(images)).detach().square().sum())
        assert float(tail[rank]) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), ((1, 2), 0, 2), (2, 1, 1)])
def test_the_output_loss_is_exact_in_both_schemes(
    scheme: Scheme, stride: int | tuple[int, int], padding: int, dilation: int
) -> None:
    layer = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(random(*layer.weight.shape))
    images = random(4, 4, 11, 10, seed=3)
    second_moment = moment_of(patches(images, layer))
    seen = second_moment if scheme == "channel" else factors.spatial_second_moment(second_moment, 4, 3, 2)
    weight = schemes.matrices(layer, scheme)
    for objective in OBJECTIVES:
        found = factors.factorize(weight, factors.root_of(seen, objective))
        for rank in (1, 3, 5):
            a, b = found.pair(rank)
            pair = schemes.factored(layer, scheme, rank)
            schemes.fill(pair, a, b)
            measured = float((layer(images) - pair(images)).detach().square().sum())
            change = schemes.in_channel_layout(weight - a @ b, layer, scheme)
            assert factors.output_loss(change, second_moment) == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_spatial_second_moment_is_that_of_the_columns_of_each_patch(stride: int, dilation: int) -> None:
    layer = nn.Conv2d(4, 6, (3, 2), stride, dilation=dilation, bias=False).double()
    images = random(4, 4, 11, 10, seed=3)
    whole = moment_of(patches(images, layer))
    expected = torch.zeros(1, 12, 12, dtype=torch.float64)
    positions = (10 - dilation - 1) // stride + 1
    for column in range(2):  # what the (3, 1) filters see where the first, then the second column of a kernel lies
        seen = images[..., column * dilation :: stride][..., :positions]
        tall = F.unfold(seen, (3, 1), (dilation, 1), 0, (stride, 1)).mT.reshape(1, -1, 12)
        expected += moment_of(tall)
    torch.testing.assert_close(factors.spatial_second_moment(whole, 4, 3, 2), expected, rtol=1e-12, atol=1e-10)


def test_the_spatial_second_moment_chooses_better_factors_than_none() -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(random(*layer.weight.shape))
    # Smooth along the height, and channels of different sizes.
    images = random(8, 4, 20, 12, seed=3).cumsum(2) * torch.tensor([0.1, 0.5, 1.0, 3.0]).double()[:, None, None]
    second_moment = moment_of(patches(images, layer))
    weight = schemes.matrices(layer, "spatial")
    lost = {}
    for objective in ("plain", "whitened"):
        seen = factors.spatial_second_moment(second_moment, 4, 3, 3)
        a, b = factors.factorize(weight, factors.root_of(seen, cast(Objective, objective))).pair(4)
        change = schemes.in_channel_layout(weight - a @ b, layer, "spatial")
        lost[objective] = factors.output_loss(change, second_moment)
    assert lost["whitened"] < 0.5 * lost["plain"]


@pytest.mark.parametrize("groups", [1, 3])
def test_the_shifted_bias_leaves_no_error_on_average(groups: int) -> None:
    weight, inputs, bias = random(groups, 6, 10), skewed(groups, 200, 10), random(groups * 6, seed=7)
    mean = inputs.mean(1)
    a, b = factors.factorize(weight).pair(3)
    shifted = factors.shifted_bias(bias, weight - a @ b, mean)
    expected = (inputs @ weight.mT).mean(1).flatten() + bias
    before = (inputs @ (a @ b).mT).mean(1).flatten()
    torch.testing.assert_close(before + shifted, expected, rtol=0, atol=1e-10)
    assert (before + bias - expected).abs().max() > 0.1  # there was an error to correct


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_the_shifted_bias_puts_out_the_same_mean(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(*parameter.shape))
    assert layer.bias is not None
    images = random(4, 4, 11, 10, seed=3) + 2
    weight = schemes.matrices(layer, "channel")
    a, b = factors.factorize(weight).pair(1)
    pair = schemes.factored(layer, "channel", 1)
    mean = patches(images, layer).mean(1)
    schemes.fill(pair, a, b, factors.shifted_bias(layer.bias.detach(), weight - a @ b, mean))
    gap = (pair(images) - layer(images)).mean((0, 2, 3)).abs().max()
    assert gap < 1e-10
