"""Layer densities and the widths they come to: hand values, optimality, and budgets of whole networks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, LayerScale2d, RmsNorm2d
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.prune.cut import pruned, trusted
from slim.passes.prune.densities import Density, Sides, densities, log_widths, sides_of, synflow_scores, water_filling
from slim.passes.prune.groups import Group, groups_of

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: tuple[Density, ...] = get_args(Density)
SIZE = (3, 6, 6)


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator)
    return model.eval()


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def exact(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weight_of(model: nn.Module, layer: str) -> Tensor:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def counts_of(model: nn.Module) -> dict[str, int]:
    return {layer: weight_of(model, layer).numel() for layer in layers_of(model)}


def chain(between: Callable[[int], nn.Module] = lambda _: nn.ReLU(), *, bias: bool = False) -> nn.Module:
    """Three layers for images of `SIZE`; weights are 135, 180 and 64."""
    first, second = nn.Conv2d(3, 5, 3, bias=bias), nn.Conv2d(5, 4, 3, bias=bias)
    last = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=bias))
    return seeded(nn.Sequential(first, between(5), second, between(4), *last))


def all_kept(model: nn.Module) -> dict[str, Tensor]:
    return {layer: torch.ones_like(weight_of(model, layer), dtype=torch.bool) for layer in layers_of(model)}


def pair(first: Sequence[float], second: Sequence[float]) -> nn.Module:
    """Two layers whose weights are the numbers given."""
    layers = nn.Linear(1, len(first)), nn.Linear(len(first), len(second) // len(first))
    for layer, values in zip(layers, (first, second), strict=True):
        layer.weight.data = torch.tensor(values).view(layer.weight.shape)
    return nn.Sequential(*layers)


# SynFlow


def noisy_batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean, norm.running_var = torch.randn(channels), torch.rand(channels) + 0.5
    return norm


@pytest.mark.parametrize(
    "between",
    [
        lambda _: nn.ReLU(),
        noisy_batch_norm,
        lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
        lambda channels: nn.GroupNorm(1, channels),
        lambda channels: BatchNormAct2d(channels),
        lambda channels: RmsNorm2d(channels),
        lambda channels: LayerScale2d(channels, 1e-6),
    ],
    ids=["relu", "batch norm", "batch norm without statistics", "group norm", "norm and act", "rms norm", "scale"],
)
def test_every_layer_of_a_chain_has_one_sum_of_scores(between: Callable[[int], nn.Module]) -> None:
    # Every path from input to output goes through one weight of each layer: the sum is that over all paths.
    model = chain(between)
    flow = torch.ones(1, *SIZE).double()
    for layer in layers_of(model):
        weight = weight_of(model, layer).double().abs()
        flow = flow.flatten(1) @ weight.T if weight.ndim == 2 else torch.nn.functional.conv2d(flow, weight)
    for layer, scores in synflow_scores(model, layers_of(model), SIZE, all_kept(model)).items():
        assert scores.shape == weight_of(model, layer).shape
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores.sum(), flow.sum())


def test_masked_weights_carry_nothing_and_the_sums_stay_one() -> None:
    model = chain()
    generator = torch.Generator().manual_seed(4)
    masks = {layer: torch.rand(mask.shape, generator=generator) < 0.5 for layer, mask in all_kept(model).items()}
    scores = synflow_scores(model, layers_of(model), SIZE, masks)
    assert all(not scores[layer][~mask].any() and scores[layer][mask].any() for layer, mask in masks.items())
    first, *rest = (score.sum() for score in scores.values())
    for other in rest:
        torch.testing.assert_close(other, first)


def test_an_activation_within_a_norm_stays() -> None:
    with_norm, without = chain(lambda width: BatchNormAct2d(width, act_layer=nn.Tanh)), chain(lambda _: nn.Tanh())
    without.load_state_dict({key: with_norm.state_dict()[key] for key in without.state_dict()})
    layers, masks = layers_of(without), all_kept(without)
    found, expected = (synflow_scores(model, layers, SIZE, masks) for model in (with_norm, without))
    assert all(torch.equal(found[layer], expected[layer]) for layer in layers)


def test_constants_of_the_network_keep_their_sign() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) + self.get_buffer("shift")).relu()

    model = Shifted(6, 2)
    model.register_buffer("shift", torch.tensor([0.0, -1e9]))
    scores = synflow_scores(nn.Sequential(model), ["0"], SIZE, {"0": torch.ones(2, 6).bool()})["0"]
    assert (scores[0] > 0).all()
    assert not scores[1].any()


def test_synflow_sees_no_scale_of_a_layer_but_magnitude_does() -> None:
    model, scaled = chain(), chain()
    weight_of(scaled, "2").mul_(1000)
    layers = layers_of(model)
    assert densities(scaled, layers, SIZE, 0.3, "synflow") == densities(model, layers, SIZE, 0.3, "synflow")
    assert (
        densities(scaled, layers, SIZE, 0.3, "magnitude")["2"] > densities(model, layers, SIZE, 0.3, "magnitude")["2"]
    )


@pytest.mark.parametrize("kind", ["synflow", "magnitude"])
@pytest.mark.parametrize(("share", "count"), [(1.0, 41_000), (0.3, 12_300), (0.001, 41), (1e-6, 3)])
def test_the_count_is_exact_and_no_layer_is_emptied(kind: Density, share: float, count: int) -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2)))
    found = densities(model, layers_of(model), (1, 1, 3), share, kind)
    kept = [found[layer] * numel for layer, numel in counts_of(model).items()]
    assert sum(kept) == pytest.approx(count, rel=1e-12)
    assert min(kept) >= 1 - 1e-12
    # Scores of a layer have one sum, so a large one loses most at first and then has the largest: after all rounds 41
    # weights lie nearly evenly. One round would leave one weight, one and 39; magnitude keeps what is large.
    assert (kind, count) != ("synflow", 41) or min(kept) > 41 / 5


@pytest.mark.parametrize("kind", ["synflow", "magnitude"])
def test_a_network_of_zeros_is_refused(kind: Density) -> None:
    model = chain()
    for value in model.parameters():
        value.data.zero_()
    with pytest.raises(PassError, match=rf"{kind} scores of the weights are all zero, .*; take erk densities"):
        densities(model, layers_of(model), SIZE, 0.5, kind)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    # The product of nine layers of 1e38 lies beyond fp64.
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    for weight in model.parameters():
        weight.data.fill_(value)
    with pytest.raises(PassError, match=r"synflow scores of the weights are not finite, .*; take erk densities"):
        densities(model, layers_of(model), (1, 1, 2), 0.5, "synflow")


# ERK and magnitude


@pytest.mark.parametrize(
    ("share", "conv", "linear"),
    [
        # 12 / 72 and 10 / 24 times the scale: at a quarter of 96 weights it is 24 / (12 + 10).
        (0.25, 2 / 11, 5 / 11),
        # 72 / 22 * 10 / 24 is above 1: the layer stays whole, and 48 of 72 weights are left for the other.
        (0.75, 2 / 3, 1.0),
        (1.0, 1.0, 1.0),
    ],
)
def test_erk_is_as_by_hand(share: float, conv: float, linear: float) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3), "linear": nn.Linear(4, 6)})
    found = densities(model, ["conv", "linear"], SIZE, share, "erk")
    assert found == pytest.approx({"conv": conv, "linear": linear}, abs=1e-12)


SMALL = ([1.0, -2.0, 3.0, -4.0], [3.5, -10.0, 0.1, 0.2, 0.3, -0.4, 0.5, 0.0])


@pytest.mark.parametrize(
    ("weights", "share", "expected"),
    [
        # 10, 4, 3.5, 3, 2, 1 are the largest six of twelve.
        (SMALL, 6 / 12, (4 / 4, 2 / 8)),
        (SMALL, 4 / 12, (2 / 4, 2 / 8)),
        # The best of the second layer stays, though it is the least of all.
        (([5.0, 6.0, 7.0, 8.0], [0.2] * 8), 3 / 12, (2 / 4, 1 / 8)),
    ],
)
def test_magnitude_is_as_by_hand(
    weights: tuple[list[float], list[float]], share: float, expected: tuple[float, float]
) -> None:
    found = densities(pair(*weights), ["0", "1"], (1, 1, 1), share, "magnitude")
    assert (found["0"], found["1"]) == expected


def test_equals_are_shared_out_over_the_layers() -> None:
    found = densities(pair([1.0] * 40, [1.0] * 80), ["0", "1"], (1, 1, 1), 0.5, "magnitude")
    # Up to the best of each layer, which stays in any case, and one that the even steps fall on or miss.
    assert found == pytest.approx({"0": 0.5, "1": 0.5}, abs=2 / 40)


# Water filling


def assert_optimal(costs: Tensor, budgets: Tensor, found: Tensor) -> int:
    """The conditions of Karush, Kuhn and Tucker, which suffice as the problem is convex. Returns how many bind."""
    used = costs @ found
    assert (found > 0).all()
    assert (found <= 1).all()
    assert (used <= budgets * (1 + 1e-9)).all()
    free, binding = found < 1 - 1e-9, used > budgets * (1 - 1e-9)
    if not free.any():
        return 0
    # 1 / p is the sum of costs times multipliers where p is free; a budget with slack has none.
    multipliers = torch.zeros(len(budgets), dtype=torch.float64)
    multipliers[binding] = torch.linalg.lstsq(costs[binding][:, free].T, 1 / found[free][:, None]).solution[:, 0]
    assert (multipliers * budgets >= -1e-6).all()
    price = multipliers @ costs
    torch.testing.assert_close(price[free], 1 / found[free], rtol=1e-6, atol=0)
    assert (price[~free] <= 1 + 1e-6).all()
    return int(binding.sum())


def test_under_one_budget_every_layer_below_one_spends_the_same() -> None:
    # 10 and 4 are less than an equal spending, which is then (40 - 14) / 2 for the others.
    costs, budget = exact(10, 20, 70, 4)[None], exact(40)
    found = water_filling(costs, budget)
    torch.testing.assert_close(found, exact(1, 13 / 20, 13 / 70, 1), rtol=0, atol=1e-14)
    assert assert_optimal(costs, budget, found) == 1


def test_what_all_can_afford_is_everything() -> None:
    costs = torch.stack([exact(10, 20), exact(5, 3)])
    for plenty in (1, 2):
        torch.testing.assert_close(water_filling(costs, plenty * costs.sum(1)), exact(1, 1), rtol=0, atol=1e-14)


def test_water_filling_is_optimal_under_two_budgets() -> None:
    generator = torch.Generator().manual_seed(0)
    binding = set()
    for _ in range(60):
        costs = torch.rand(2, 12, generator=generator, dtype=torch.float64).mul(8).exp()
        budgets = costs.sum(1) * (torch.rand(2, generator=generator, dtype=torch.float64) * 0.9 + 0.05)
        binding.add(assert_optimal(costs, budgets, water_filling(costs, budgets)))
    assert binding == {1, 2}


def test_the_proxy_counts_weights_and_macs() -> None:
    model = chain(bias=True)
    weights = exact(135, 180, 64)
    # Maps of 4 x 4 and 2 x 2 come out of the convolutions.
    costs = torch.stack([weights, weights * exact(16, 4, 1)])
    for share in (0.2, 0.5, 0.8):
        found = exact(*densities(model, layers_of(model), SIZE, share, "proxy").values())
        assert assert_optimal(costs, share * costs.sum(1), found) >= 1


def test_a_layer_without_macs_is_held_by_the_weights_alone() -> None:
    class Partial(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self[1](self[0](x))
            return output

    model = Partial(nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(8, 8))
    # Equal spending of the 92 weights, half of 184, would leave 61.3 of 120 to the two that are called: more than half
    # of the MACs, so these bind as well and leave 30 to each of the two and 32 to the third.
    assert densities(model, layers_of(model), SIZE, 0.5, "proxy") == pytest.approx({"0": 0.5, "1": 0.5, "2": 0.5})


# Widths


def ratios(found: Mapping[str, float]) -> dict[str, float]:
    return {group: math.exp(value) for group, value in found.items()}


def test_widths_that_explain_all_densities_are_found() -> None:
    kept = {"a": 0.9, "b": 0.5, "c": 0.07}
    sides: dict[str, Sides] = {
        "first": (None, "a"),
        "second": ("a", "b"),
        "depthwise": (None, "b"),
        "third": ("b", "c"),
        "residual": ("c", "c"),
        "shortcut": ("a", "c"),
        "head": ("c", None),
        "alone": (None, None),
    }
    given = {layer: math.prod(kept[group] for group in pair if group) for layer, pair in sides.items()}
    given["alone"] = 0.3
    weights = {layer: 10.0 ** (number - 1) for number, layer in enumerate(sides)}
    # The ridge is 1e-9 of the mean weight, the lightest layer 1e-7 of it, and not one group hangs on that layer alone.
    assert ratios(log_widths(given, sides, weights)) == pytest.approx(kept, rel=1e-6)


def test_a_group_on_both_sides_counts_twice() -> None:
    assert ratios(log_widths({"layer": 0.25}, {"layer": ("s", "s")}, {"layer": 7.0})) == pytest.approx({"s": 0.5})


def test_no_group_grows_and_the_others_make_the_best_of_it() -> None:
    # b would have to be 2; at 1 the other is the weighted mean of what its two layers ask for.
    sides: dict[str, Sides] = {"first": (None, "a"), "second": ("a", "b")}
    found = log_widths({"first": 0.25, "second": 0.5}, sides, {"first": 3.0, "second": 1.0})
    assert found["b"] == 0.0
    assert found["a"] == pytest.approx((3 * math.log(0.25) + math.log(0.5)) / 4, abs=1e-8)


@pytest.mark.parametrize(
    ("sides", "density", "ratio"),
    [
        ({"one": ("a", "b")}, 0.81, 0.9),
        # The least norm would give the middle two thirds of the log.
        ({"one": ("a", "b"), "two": ("b", "c")}, 0.25, 0.5),
        ({"one": ("a", "b"), "two": ("b", "a")}, 0.25, 0.5),
    ],
)
def test_what_densities_leave_open_is_shared_equally(sides: dict[str, Sides], density: float, ratio: float) -> None:
    found = log_widths(dict.fromkeys(sides, density), sides, dict.fromkeys(sides, 1000.0))
    assert ratios(found) == pytest.approx(dict.fromkeys(found, ratio), rel=1e-6)


def test_widths_are_the_least_squares_under_the_bound() -> None:
    draw = random.Random(0)
    at_bound = 0
    for _ in range(40):
        groups = [f"group {number}" for number in range(draw.randint(2, 30))]
        names = [f"layer {number}" for number in range(draw.randint(2, 60))]
        sides: dict[str, Sides] = {name: (draw.choice([None, *groups]), draw.choice(groups)) for name in names}
        given = {name: math.exp(-draw.expovariate(0.7)) for name in names}
        weights = {name: 10 ** draw.uniform(2, 6) for name in names}
        found = log_widths(given, sides, weights)
        slopes = dict.fromkeys(found, 0.0)
        for name, pair in sides.items():
            present = [group for group in pair if group]
            for group in present:
                slopes[group] += weights[name] * (sum(found[one] for one in present) - math.log(given[name]))
        # The ridge pulls by 1e-9 of the mean weight, times logs of some ten.
        slack = 1e-7 * sum(weights.values()) / len(names)
        assert max(slopes.values()) <= slack  # no group would gain by shrinking...
        assert min(slopes[group] for group, value in found.items() if value < 0) >= -slack  # ...nor by growing
        at_bound += sum(value == 0 for value in found.values())
    assert at_bound > 0


def test_without_groups_there_are_no_widths() -> None:
    assert log_widths({"layer": 0.5}, {"layer": (None, None)}, {"layer": 1.0}) == {}


def groups_in(model: nn.Module, size: tuple[int, int, int]) -> list[Group]:
    return trusted(model, groups_of(model, size)[0], size)[0]


def tiny_vit() -> nn.Module:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return seeded(timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape))


def test_a_transformers_layers_lie_between_the_stream_and_their_own_groups() -> None:
    model = tiny_vit()
    sides = sides_of(model, groups_in(model, (3, 32, 32)))
    stream, heads, hidden = "patch_embed.proj", "blocks.1.attn.qkv:heads", "blocks.1.mlp.fc1"
    assert next(iter(sides)) == stream
    assert sides["patch_embed.proj"] == (None, stream)
    assert sides["blocks.1.attn.qkv"] == (stream, heads)
    assert sides["blocks.1.attn.proj"] == (heads, stream)
    assert sides["blocks.1.mlp.fc1"] == (stream, hidden)
    assert sides["blocks.1.mlp.fc2"] == (hidden, stream)
    assert sides["head"] == (stream, None)
    assert set(sides) == set(layers_of(model))


def test_depthwise_has_one_side_and_a_concatenation_the_wider() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 12, 1)
            self.depthwise, self.reader = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(16, 8, 1)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.narrow(x)[..., 1:-1, 1:-1].relu(), self.depthwise(self.wide(x)).relu()], 1)
            output: Tensor = self.head(self.reader(both).relu().mean((2, 3)))
            return output

    model = seeded(Branches())
    assert sides_of(model, groups_in(model, (3, 8, 8))) == {
        "narrow": (None, "narrow"),
        "wide": (None, "wide"),
        "depthwise": (None, "wide"),
        "reader": ("wide", "reader"),
        "head": ("reader", None),
    }


# Whole networks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["vit", "convnext"])
def test_every_kind_gives_densities_and_leaves_the_network_as_it_is(network: str, kind: Density) -> None:
    model = tiny_vit() if network == "vit" else timm.create_model("convnext_atto", depths=[1] * 4, dims=[8, 16, 16, 24])
    model.train().requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counts = counts_of(model)
    with torch.no_grad():
        found = densities(model, layers_of(model), (3, 32, 32), 0.4, kind)
    assert list(found) == layers_of(model)
    assert all(0 < value <= 1 for value in found.values())
    kept = sum(found[layer] * count for layer, count in counts.items())
    # The proxy may meet its share of the MACs with less; the others are exact to half a weight.
    assert kept <= 0.4 * sum(counts.values()) + 0.5
    assert kind == "proxy" or kept >= 0.4 * sum(counts.values()) - 0.5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(value.requires_grad for value in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def params(model: nn.Module, groups: Sequence[Group], widths: Mapping[str, float]) -> float:
    """Of all parameters, when each group has so many units; in between whole numbers it is linear in each."""
    shares: dict[str, dict[int, float]] = {}
    shapes = {key: value.shape for key, value in model.named_parameters()}
    for group in groups:
        for member in group.members:
            if member.key in shapes:
                gone = member.index.numel() / shapes[member.key][member.dim] * (1 - widths[group.name] / group.units)
                dims = shares.setdefault(member.key, {})
                dims[member.dim] = dims.get(member.dim, 1.0) - gone
    return sum(shape.numel() * math.prod(shares.get(key, {}).values()) for key, shape in shapes.items())


def narrow_resnet(**options: Any) -> nn.Module:
    """resnet18 with a quarter of its channels, so that a hundred rounds take seconds."""
    model: nn.Module = ResNet(BasicBlock, [2, 2, 2, 2], channels=(16, 32, 64, 128), stem_width=16, **options)
    return model


@pytest.mark.parametrize(
    ("build", "size", "kind"),
    [
        (timm.models.resnet18, 64, "erk"),
        (timm.models.resnet18, 64, "magnitude"),
        (timm.models.resnet18, 64, "proxy"),
        (narrow_resnet, 32, "synflow"),
    ],
)
def test_widths_rounded_to_eight_meet_the_budget(build: Callable[..., nn.Module], size: int, kind: Density) -> None:
    torch.manual_seed(0)
    model, images = build(num_classes=10).eval(), (3, size, size)
    groups = groups_in(model, images)
    sides = sides_of(model, groups)
    counts = {layer: weight_of(model, layer).numel() for layer in sides}
    logs = log_widths(densities(model, list(sides), images, 0.5, kind), sides, counts)
    assert set(logs) == {group.name for group in groups}

    def widths(shift: float) -> dict[str, float]:
        return {group.name: group.units * min(1.0, math.exp(logs[group.name] + shift)) for group in groups}

    budget = 0.5 * sum(value.numel() for value in model.parameters())
    low, high = -10.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if params(model, groups, widths(middle)) <= budget else (low, middle)
    wanted = widths(low)
    assert params(model, groups, wanted) == pytest.approx(budget, rel=1e-9)
    rounded = {name: 8 * round(width / 8) for name, width in wanted.items()}
    assert min(rounded.values()) >= 8
    kept = [(group, range(rounded[group.name])) for group in groups]
    smaller = pruned(model, kept)
    left = sum(value.numel() for value in smaller.parameters())
    assert left == pytest.approx(params(model, groups, rounded), rel=1e-12)
    # Rounding moves every group by half a step at most, and params rise with every width.
    less, more = (params(model, groups, {name: wanted[name] + step for name in wanted}) for step in (-4, 4))
    assert less <= left <= more
    with torch.no_grad():
        assert smaller(torch.zeros(2, *images)).shape == (2, 10)
