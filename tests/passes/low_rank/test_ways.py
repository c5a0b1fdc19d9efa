"""What a rank loses, read from spectra: compared with the output error of the truncated layer itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from slim import costs
from slim.errors import PassError
from slim.passes.calibrate import Moments, rows
from slim.passes.low_rank import factors, schemes
from slim.passes.low_rank.candidates import Candidate
from slim.passes.low_rank.factors import Objective, output_loss
from slim.passes.low_rank.schemes import Layer, Scheme
from slim.passes.low_rank.ways import Way, output_losses, ways_of

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH: tuple[Scheme, ...] = ("channel", "spatial")
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 9), (5, 12)),
    "linear, no bias": (nn.Linear(8, 14, bias=False), (8,)),
    "1x1": (nn.Conv2d(10, 8, 1, bias=False), (10, 6, 6)),
    "1x1, groups": (nn.Conv2d(12, 16, 1, groups=2), (12, 6, 6)),
    "3x3": (nn.Conv2d(6, 8, 3, padding=1), (6, 8, 8)),
    "3x3, stride": (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (6, 9, 8)),
    "3x5": (nn.Conv2d(5, 6, (3, 5), padding="same"), (5, 7, 8)),
    "3x3, groups": (nn.Conv2d(8, 12, 3, padding=1, groups=2), (8, 7, 7)),
    "timm's same": (Conv2dSame(4, 8, 3, stride=2), (4, 9, 9)),
}
CASES = [(name, scheme) for name, (layer, _) in LAYERS.items() for scheme in schemes.schemes_of(layer)]


def candidate(name: str) -> Candidate:
    layer, size = LAYERS[name]
    return Candidate(name, layer, size, calls=1)


def patches(name: str) -> Tensor:
    """(g, n, d): all that the layer multiplies when it is called with a few inputs that have a mean and a direction."""
    layer, size = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, *size, generator=generator)
    x = x + 0.8 * torch.randn(16, *[1] * len(size), generator=generator) + 0.5  # what all inputs of an image share
    return rows(layer, x, range(16), 10**6).double().movedim(1, 0)


def moments(x: Tensor) -> Moments:
    second, mean = x.mT @ x / x.shape[1], x.mean(1)
    return Moments(second=second, mean=mean, n=x.shape[1], taps=True, noise=torch.zeros(len(x), dtype=torch.double))


def seen_by(layer: Layer, found: Moments) -> Tensor:
    return found.second if layer.bias is None else found.covariance


def way(name: str, scheme: Scheme, objective: Objective) -> Way:
    found = None if objective == "plain" else moments(patches(name))
    (one,) = [way for way in ways_of(candidate(name), objective, found, BOTH) if way.scheme == scheme]
    return one


def change(one: Way, rank: int) -> Tensor:
    """W - W_r in the channel layout."""
    layer = one.candidate.layer
    a, b = one.factors.pair(rank)
    return schemes.in_channel_layout(schemes.matrices(layer, one.scheme) - a @ b, layer, one.scheme)


@pytest.mark.parametrize("objective", ["plain", "activation", "whitened"])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_error_of_every_rank_is_that_of_the_outputs_themselves(
    name: str, scheme: Scheme, objective: Objective
) -> None:
    one, x = way(name, scheme, objective), patches(name)
    layer, full = one.candidate.layer, schemes.full_rank(one.candidate.layer, scheme)
    found = output_losses(schemes.matrices(layer, "channel"), *one.factors.pair(full), moments(x).second)
    for rank in range(full + 1):
        outputs = x @ change(one, rank).mT  # what is missing, of every row that was seen
        # Of sums that cancel: 1e-12 of the whole.
        assert float(found[rank]) == pytest.approx(
            float(outputs.square().sum() / x.shape[1]), rel=1e-9, abs=1e-11 * float(found[0])
        )


@pytest.mark.parametrize("objective", ["activation", "whitened"])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_losses_of_a_way_are_shares_of_what_the_layer_puts_out(
    name: str, scheme: Scheme, objective: Objective
) -> None:
    one = way(name, scheme, objective)
    inputs = seen_by(one.candidate.layer, moments(patches(name)))
    energy = output_loss(schemes.matrices(one.candidate.layer, "channel"), inputs)
    assert float(one.losses[0]) == pytest.approx(1.0, rel=1e-6)
    for rank in range(len(one.losses)):
        # The ridge of the root is 1e-8 of the mean diagonal; where d patches are nearly dependent it counts more.
        assert float(one.losses[rank]) == pytest.approx(output_loss(change(one, rank), inputs) / energy, abs=1e-6)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_without_moments_losses_are_shares_of_the_weight(name: str, scheme: Scheme) -> None:
    one = way(name, scheme, "plain")
    whole = one.candidate.layer.weight.detach().double().square().sum()
    for rank, loss in enumerate(one.losses.tolist()):
        assert loss == pytest.approx(float(change(one, rank).square().sum() / whole), abs=1e-12)
    assert len(one.losses) == schemes.full_rank(one.candidate.layer, scheme) + 1


@pytest.mark.parametrize("name", LAYERS)
def test_whitened_channel_losses_are_the_tail_and_the_least_there_are(name: str) -> None:
    one = way(name, "channel", "whitened")
    tail = one.factors.tail()
    torch.testing.assert_close(one.losses, tail / tail[0], rtol=0, atol=1e-6)  # of the ridge
    inputs = seen_by(one.candidate.layer, moments(patches(name)))
    energy = output_loss(schemes.matrices(one.candidate.layer, "channel"), inputs)
    for objective in ("plain", "activation"):
        other = way(name, "channel", objective)
        for rank in range(len(one.losses)):
            assert float(one.losses[rank]) <= output_loss(change(other, rank), inputs) / energy + 1e-6


@pytest.mark.parametrize("objective", ["plain", "whitened"])
@pytest.mark.parametrize("name", LAYERS)
def test_losses_fall_from_everything_to_nothing(name: str, objective: Objective) -> None:
    losses = way(name, "channel", objective).losses.tolist()
    assert losses[0] == pytest.approx(1.0, rel=1e-6)
    assert losses[-1] == 0.0
    assert all(before >= after for before, after in pairwise(losses))


def test_with_a_bias_the_mean_of_the_inputs_plays_no_part_and_without_it_does() -> None:
    x = patches("linear")
    for bias in (True, False):
        layer = nn.Linear(12, 9, bias=bias)
        one, moved = (
            ways_of(Candidate("it", layer, (5, 12), 1), "whitened", moments(inputs), BOTH)[0] for inputs in (x, x + 3)
        )
        assert torch.allclose(one.losses, moved.losses, rtol=0, atol=1e-6) == bias


def test_a_layer_has_one_way_unless_its_kernel_and_what_is_allowed_leave_two() -> None:
    def found(name: str, *allowed: Scheme) -> list[str]:
        return [one.scheme for one in ways_of(candidate(name), "plain", None, allowed)]

    assert found("3x3", *BOTH) == ["channel", "spatial"]
    assert (found("3x3", "channel"), found("3x3", "spatial"), found("3x3")) == (["channel"], ["spatial"], [])
    for name in ("linear", "1x1", "3x3, groups"):
        assert found(name, "spatial") == found(name, *BOTH) == ["channel"]


def test_a_layer_that_puts_out_a_constant_is_an_error() -> None:
    x = torch.ones(1, 40, 12, dtype=torch.double)
    with pytest.raises(
        PassError, match=r"^low-rank: layer 'linear' puts out the same for every image; add it to skip$"
    ):
        ways_of(candidate("linear"), "whitened", moments(x), BOTH)
    dead = moments(torch.zeros(1, 40, 8, dtype=torch.double))
    with pytest.raises(PassError, match=r"layer 'linear, no bias' puts out the same"):
        ways_of(candidate("linear, no bias"), "activation", dead, BOTH)


@pytest.mark.parametrize("align", [1, 2, 3, 4])
@pytest.mark.parametrize("guard", [0.3, 0.75, 1.0])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_ranks_are_all_multiples_that_are_smaller_by_enough_and_cost_no_more(
    name: str, scheme: Scheme, guard: float, align: int
) -> None:
    layer, size = LAYERS[name]
    dense = sum(value.numel() for key, value in layer.named_parameters() if key == "weight")
    macs = costs.count_macs(layer, size)
    expected = []
    for rank in range(align, schemes.full_rank(layer, scheme) + 1, align):
        pair = schemes.factored(layer, scheme, rank)
        weights = sum(value.numel() for key, value in pair.named_parameters() if key.endswith("weight"))
        if weights <= guard * dense and weights < dense and costs.count_macs(pair, size) < macs:
            expected.append(rank)
    one = way(name, scheme, "whitened")
    assert one.ranks(align, guard) == tuple(expected)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_what_a_way_costs_is_what_its_layers_cost(name: str, scheme: Scheme) -> None:
    layer, size = LAYERS[name]
    one = way(name, scheme, "plain")
    pair = schemes.factored(layer, scheme, 3)
    assert one.dense_macs == costs.count_macs(layer, size)
    assert one.macs(3) == costs.count_macs(pair, size)
    assert one.dense_params == layer.weight.numel()
    assert one.params(3) == sum(value.numel() for key, value in pair.named_parameters() if key.endswith("weight"))
    assert one.params(1) * one.break_even == pytest.approx(one.dense_params, rel=1e-12)


def test_a_square_layer_never_pays_at_break_even() -> None:
    square = Candidate("square", nn.Linear(16, 16), (16,), 1)
    (one,) = ways_of(square, "plain", None, BOTH)
    assert one.break_even == 8
    assert one.ranks(4, 1.0) == (4,)
    assert one.ranks(1, 1.0)[-1] == 7


def test_the_spatial_scheme_of_a_strided_convolution_has_to_pay_in_operations_too() -> None:
    # 8 x 8 to 4 x 4. Rank r of 3 * 2 * 32 weights costs 4 * 8 * 96 r + 4 * 4 * 96 r operations of 4 * 4 * 9 * 32 * 32:
    # below r = 32, though as few weights are left below r = 48.
    strided = Candidate("strided", nn.Conv2d(32, 32, 3, stride=2, padding=1), (32, 8, 8), 1)
    (one,) = ways_of(strided, "plain", None, ("spatial",))
    assert one.break_even == 48
    assert one.ranks(1, 1.0)[-1] == 31


def test_moments_without_kernel_positions_will_do() -> None:
    layer, size = LAYERS["3x3"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 500, 6, generator=generator, dtype=torch.double) @ torch.diag(torch.arange(1.0, 7).double())
    seen = Moments(second=x.mT @ x / 500, mean=x.mean(1), n=500, taps=False, noise=torch.zeros(1, dtype=torch.double))
    one, *_ = ways_of(candidate("3x3"), "whitened", seen, ("channel",))
    # Each of 9 positions as the channel is, none with another: the columns of the weight scaled channel by channel.
    root = torch.linalg.cholesky(torch.kron(seen.covariance[0], torch.eye(9).double()))
    expected = torch.linalg.svdvals(layer.weight.detach().flatten(1).double() @ root)
    torch.testing.assert_close(one.factors.spectrum[0], expected, rtol=1e-6, atol=0)
    assert size == one.candidate.size


@pytest.mark.parametrize("scheme", BOTH)
def test_a_pair_filled_from_a_way_computes_the_truncated_weight(scheme: Scheme) -> None:
    one = way("3x3", scheme, "whitened")
    pair = schemes.factored(one.candidate.layer, scheme, 4)
    bias = one.candidate.layer.bias
    assert bias is not None
    schemes.fill(pair, *one.factors.pair(4), bias)
    expected = one.candidate.layer.weight.detach().double().flatten(1) - change(one, 4)[0]
    torch.testing.assert_close(schemes.composed(pair).detach().double().flatten(1), expected, rtol=1e-5, atol=1e-6)


def test_shifting_the_bias_makes_up_for_the_mean() -> None:
    one, x = way("linear", "channel", "whitened"), patches("linear")
    layer = one.candidate.layer
    assert layer.bias is not None
    bias = factors.shifted_bias(layer.bias.detach(), change(one, 3), moments(x).mean)
    missing = x[0] @ change(one, 3)[0].T + layer.bias.detach() - bias
    assert missing.mean(0).abs().max() < 1e-12
    assert missing.abs().max() > 0.01
