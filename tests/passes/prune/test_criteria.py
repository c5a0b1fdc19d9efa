"""Scores of units: by hand on toys, and against what cutting really changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from slim import surgery
from slim.errors import PassError
from slim.passes.prune.criteria import Criterion, Ranked, ranked, share_lost
from slim.passes.prune.cut import pruned, silenced
from slim.passes.prune.groups import Group, Member, groups_of
from slim.passes.prune.scores import energy as unit_energy
from tests.contract.zoo import SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY: tuple[Criterion, ...] = ("gram", "group-l2", "taylor", "bn", "random")
TOY = (3, 4, 4)


def shown(count: int, size: tuple[int, int, int] = SIZE, *, seed: int = 0) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed)) + 0.3


def feed(images: Tensor, *sizes: int) -> Callable[[], Iterable[Tensor]]:
    return lambda: torch.split(images, list(sizes or [len(images)]))


def rank(model: nn.Module, group: Group, criterion: Criterion, images: Tensor, **options: Any) -> Ranked:
    """Of one group that can be ranked."""
    found, left = ranked(model, [group], criterion, feed(images), images=len(images), **{"seed": 0, **options})
    assert not left
    return found[0]


def group_of(name: str, group: str, **options: Any) -> tuple[nn.Module, Group]:
    model = artifact(name).model()
    found, _ = groups_of(model, SIZE, **options)
    return model, next(one for one in found if one.name == group)


class Forked(nn.Module):
    """Hidden channels that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.one, self.two = nn.Linear(48, 5), nn.Linear(5, 6), nn.Linear(5, 6, bias=False)
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5)

    def hidden(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.first(images.flatten(1))).relu()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images)
        return cast(Tensor, self.one(hidden) + self.two(hidden))

    def group(self, *readers: str) -> Group:
        units = torch.arange(5)[:, None]
        made = (Member("first.weight", 0, units), Member("first.bias", 0, units))
        read = tuple(Member(f"{name}.weight", 1, units, reads=True) for name in readers)
        return Group("first", "channels", 5, 1, made + read, inner=True)


def outputs(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """(rows, channels) fp64: what a layer puts out, one row for each position."""
    found: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: found.append(output))
    with hook, torch.no_grad():
        model(images)
    output = found[0] if isinstance(model.get_submodule(layer), nn.Linear) else found[0].movedim(1, -1)
    return output.flatten(0, -2).double()


def energy(rows: Tensor, *, centred: bool) -> Tensor:
    return (rows - rows.mean(0) if centred else rows).square().sum(1).mean()


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("resnet", "layer2.0.conv1"),  # its reader is 3 x 3 with a stride, and has no bias
        ("vit", "blocks.0.mlp.fc1"),
        ("vit", "blocks.0.attn.qkv:heads"),
        ("mixer", "blocks.0.mlp_tokens.fc1"),
    ],
)
def test_gram_is_what_the_reader_loses_with_the_unit_after_its_bias_has_made_up_for_the_mean(
    name: str, group: str
) -> None:
    model, one = group_of(name, group)
    images = shown(10)
    (reader,) = one.readers
    scores = rank(model, one, "gram", images).scores
    whole = outputs(model, reader, images)
    biased = model.get_submodule(reader).bias is not None
    for unit in range(0, one.units, 7 if one.units > 7 else 1):
        kept = [other for other in range(one.units) if other != unit]
        change = whole - outputs(silenced(model, [(one, kept)]), reader, images)
        # Both are differences of fp32 values of size 1, the change a tenth of them or less.
        torch.testing.assert_close(scores[unit], energy(change, centred=biased), rtol=1e-4, atol=1e-9)


def test_gram_counts_every_place_to_which_a_channel_is_spread() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    groups, _ = groups_of(model, TOY)
    one, images = next(group for group in groups if group.name == "0"), shown(20, TOY)
    scores = rank(model, one, "gram", images).scores
    gone = silenced(model, [(one, [0, 1, 3])])
    change = outputs(model, "3", images) - outputs(gone, "3", images)
    torch.testing.assert_close(scores[2], energy(change, centred=True), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("criterion", ["gram", "taylor"])
def test_a_dead_channel_scores_zero_and_a_doubled_one_four_times_as_much(criterion: Criterion) -> None:
    model = Forked()
    with torch.no_grad():
        model.first.weight[0], model.first.bias[0] = 0.0, -1.0
        model.first.weight[2], model.first.bias[2] = 2 * model.first.weight[1], 2 * model.first.bias[1]
        model.one.weight[:, 2], model.two.weight[:, 2] = model.one.weight[:, 1], model.two.weight[:, 1]
    scores = rank(model, model.group("one", "two"), criterion, shown(20, TOY)).scores
    assert scores[0] == 0
    # The square of two; products of fp32.
    torch.testing.assert_close(scores[2], 4 * scores[1], rtol=1e-5, atol=0.0)


def test_channels_that_never_change_cost_a_reader_with_a_bias_nothing() -> None:
    model, values = Forked(), torch.tensor([0.1, 0.3, 0.7, 1.1, 2.3])
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.copy_(values)
    images = shown(19, TOY)
    scores = rank(model, model.group("one"), "gram", images).scores
    assert (scores < 1e-12).all()  # the variance of a constant is rounding of fp64
    free = rank(model, model.group("two"), "gram", images).scores
    expected = (values * model.two.weight.detach()).double().square().sum(0)
    torch.testing.assert_close(free, expected, rtol=1e-6, atol=0.0)


def test_no_score_is_below_zero_where_rounding_leaves_less_than_the_mean_explains() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.double)
    assert float(unit_energy(one, one, one[0] + 1e-15)) == 0.0


def test_gram_counts_several_readers_by_shares_of_what_each_puts_out() -> None:
    model, images = Forked(), shown(20, TOY)
    with torch.no_grad():
        model.two.weight.mul_(3)
    apart = {name: rank(model, model.group(name), "gram", images).scores for name in ("one", "two")}
    both = rank(model, model.group("one", "two"), "gram", images).scores
    whole = {}
    for name in apart:
        reader = model.get_submodule(name)
        whole[name] = float(energy(outputs(model, name, images), centred=reader.bias is not None))
    torch.testing.assert_close(both, apart["one"] / whole["one"] + apart["two"] / whole["two"])


def test_taylor_is_the_squared_first_order_change_of_the_likelihood_through_each_reader() -> None:
    model, images = Forked(), shown(8, TOY)
    scores = rank(model, model.group("one", "two"), "taylor", images, seed=3).scores
    with torch.no_grad():
        likely, a = model(images).softmax(1), model.hidden(images).double()
        drawn = torch.multinomial(likely, 1, generator=torch.Generator().manual_seed(3))[:, 0]
        # d log p(y) / d logits = e_y - p, and either reader adds to the logits.
        slope = (nn.functional.one_hot(drawn, 6) - likely).double()
        ways = [(a * (slope @ layer.weight.double())).square().mean(0) for layer in (model.one, model.two)]
    torch.testing.assert_close(scores, ways[0] + ways[1], rtol=1e-4, atol=1e-9)
    assert rank(model, model.group("one", "two"), "taylor", images, seed=4).scores.ne(scores).any()


@pytest.mark.parametrize(("name", "group"), [("resnet", "layer2.0.conv1"), ("vit", "blocks.0.attn.qkv:heads")])
def test_taylor_is_the_squared_slope_of_a_gate_on_all_that_a_unit_brings(name: str, group: str) -> None:
    model, one = group_of(name, group)
    images, (reader,) = shown(8), one.readers
    index = next(member.index for member in one.members if member.reads)
    gates = torch.ones(8, one.width, requires_grad=True)

    def gate(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        shape = (8, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (8, 1, -1)
        return inputs[0] * gates.view(shape)

    with model.get_submodule(reader).register_forward_pre_hook(gate):
        likely = model(images).log_softmax(1)
    drawn = torch.multinomial(likely.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(likely.gather(1, drawn).sum(), gates)
    expected = slope.double()[:, index].sum(2).square().mean(0)
    # Sums over positions in fp32, whose terms cancel in part.
    torch.testing.assert_close(
        rank(model, one, "taylor", images).scores, expected, rtol=1e-3, atol=1e-4 * float(expected.max())
    )


def test_group_l2_sums_squares_in_units_of_each_tensors_mean_square() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    units = torch.arange(2)[:, None]
    keys = [("0.weight", 0, False), ("0.bias", 0, False), ("1.weight", 0, False), ("2.weight", 1, True)]
    group = Group("0", "channels", 2, 1, tuple(Member(key, dim, units, reads) for key, dim, reads in keys), inner=True)
    with torch.no_grad():
        model.load_state_dict(
            {
                "0.weight": torch.tensor([[1.0, 1.0], [3.0, 1.0]]),  # squares 2 and 10, mean 3
                "0.bias": torch.tensor([7.0, 9.0]),  # does not count
                "1.weight": torch.tensor([0.0, 2.0]),  # 0 and 4, mean 2
                "1.bias": torch.tensor([5.0, 5.0]),
                "2.weight": torch.tensor([[300.0, 100.0]]),  # 9e4 and 1e4, mean 5e4
                "2.bias": torch.tensor([0.0]),
            }
        )
    found, _ = ranked(model, [group], "group-l2", None, images=0, seed=0)
    expected = [2 / 3 + 0 / 2 + 9 / 5, 10 / 3 + 4 / 2 + 1 / 5]
    torch.testing.assert_close(found[0].scores, torch.tensor(expected, dtype=torch.double))


def test_group_l2_finds_no_difference_where_all_weights_are_zero() -> None:
    model = Forked()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    found, _ = ranked(model, [model.group("one")], "group-l2", None, images=0, seed=0)
    assert not found[0].scores.any()


def test_bn_is_the_squared_weight_where_running_statistics_are_true() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    model.append(nn.Flatten())
    images, norm = shown(20, TOY), cast(nn.BatchNorm2d, model[1])
    group = next(one for one in groups_of(model, TOY)[0] if one.name == "0")
    variance = outputs(model, "0", images).var(0, correction=0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 0.0, 1.0]))
        cast(Tensor, norm.running_var).copy_(variance)
    scores = rank(model, group, "bn", images).scores
    expected = norm.weight.detach().double().square() * variance / (variance + norm.eps)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0.0)


def test_bn_ranks_a_folded_norm_as_it_ranked_the_norm_before() -> None:
    model, group = group_of("resnet", "layer2.0.conv1")
    folded = copy.deepcopy(model)
    conv, norm = (cast(Any, folded.get_submodule(f"layer2.0.{name}")) for name in ("conv1", "bn1"))
    with torch.no_grad():
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        conv.weight.mul_(slope[:, None, None, None])
        norm.running_mean.mul_(slope)
        norm.weight.fill_(1.0)
        norm.running_var.fill_(1.0 - norm.eps)
    images = shown(10)
    before, after = (rank(one, group, "bn", images).scores for one in (model, folded))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0.0)
    assert before.std() > 0.1 * before.mean()


def test_random_scores_follow_the_seed_and_the_place_of_the_group() -> None:
    model = artifact("vit").model()
    groups = [one for one in groups_of(model, SIZE)[0] if one.name.endswith("fc1")]

    def draw(seed: int) -> list[Tensor]:
        return [one.scores for one in ranked(model, groups, "random", None, images=0, seed=seed)[0]]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert all(one.ne(two).any() for one in first for two in other)
    assert all(((one >= 0) & (one < 1)).all() for one in first)


@pytest.mark.parametrize("criterion", ["gram", "group-l2", "taylor", "random"])
def test_dimensions_of_heads_are_reordered_each_once_and_what_is_cut_is_what_is_silenced(criterion: Criterion) -> None:
    model, group = group_of("vit", "blocks.1.attn.qkv:dims", heads="dims")
    images = shown(8)
    found = rank(model, group, criterion, images)
    heads, width = group.unit, group.units
    index = {member.key.rpartition("attn.")[2]: member.index for member in found.group.members}
    made, read = index["qkv.weight"].view(width, 3, heads), index["proj.weight"]
    assert torch.equal(made.flatten().sort().values, torch.arange(3 * heads * width))
    assert torch.equal(index["qkv.bias"], index["qkv.weight"])
    # In its own third, and there in its own head: what is left over is the dimension.
    dimension = made - torch.arange(3)[:, None] * heads * width - torch.arange(heads) * width
    assert ((dimension >= 0) & (dimension < width)).all()
    assert torch.equal(dimension[:, 0], dimension[:, 1])
    assert torch.equal(made[:, 2] - 2 * heads * width, read)
    assert found.scores.diff().le(0).all()
    # A share of queries and keys and a share of values, in every head.
    assert float(found.scores.sum()) == pytest.approx(2 * heads)
    kept = [(found.group, range(width // 2))]
    with torch.no_grad():
        assert surgery.close(pruned(model, kept)(images), silenced(model, kept)(images))


def test_dimensions_are_ordered_by_the_energy_of_the_logits_and_by_that_of_the_output() -> None:
    model, group = group_of("vit", "blocks.1.attn.qkv:dims", heads="dims")
    images = shown(8)
    found = rank(model, group, "gram", images)
    index = {member.key.rpartition("attn.")[2]: member.index for member in found.group.members}
    heads, width = group.unit, group.units
    squares = outputs(model, "blocks.1.attn.qkv", images).square().mean(0)
    logits = squares[: heads * width] * squares[heads * width : 2 * heads * width]
    queries = index["qkv.weight"].view(width, 3, heads)[:, 0]
    assert logits[queries].diff(dim=0).le(0).all()
    seen: list[Tensor] = []
    proj = cast(nn.Linear, model.get_submodule("blocks.1.attn.proj"))
    with proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0])), torch.no_grad():
        model(images)
    carried = seen[0].double().flatten(0, -2).var(0, correction=0) * proj.weight.detach().double().square().sum(0)
    values = index["proj.weight"]
    assert carried[values].diff(dim=0).le(0).all()
    shares = logits[queries] / logits[queries].sum(0) + carried[values] / carried[values].sum(0)
    torch.testing.assert_close(found.scores, shares.sum(1), rtol=1e-4, atol=0.0)


def test_a_head_that_does_nothing_has_no_share() -> None:
    model, group = group_of("vit", "blocks.1.attn.qkv:dims", heads="dims")
    with torch.no_grad():
        for value in cast(nn.Linear, model.get_submodule("blocks.1.attn.qkv")).parameters():
            value[: group.units] = 0.0  # queries of the first head
    found = rank(model, group, "taylor", shown(8))
    assert float(found.scores.sum()) == pytest.approx(2 * group.unit - 1)


@pytest.mark.parametrize("name", ["mobilenet", "vit"])
@pytest.mark.parametrize("criterion", EVERY)
def test_nothing_depends_on_how_images_are_cut_into_batches(name: str, criterion: Criterion) -> None:
    model, images = artifact(name).model(), shown(37)
    groups, _ = groups_of(model, SIZE, heads="dims")
    whole, left = ranked(model, groups, criterion, feed(images), images=37, seed=0)
    for sizes in ((5, 1, 31), (16, 16, 5)):
        cut, other = ranked(model, groups, criterion, feed(images, *sizes), images=37, seed=0)
        assert other == left
        assert all(torch.equal(one.scores, two.scores) for one, two in zip(cut, whole, strict=True))


@pytest.mark.parametrize("criterion", EVERY)
def test_the_network_is_left_as_it_was_and_scores_are_finite(criterion: Criterion) -> None:
    model, images = artifact("resnet").model().train(), shown(4)
    model.requires_grad_(False)
    groups, _ = groups_of(copy.deepcopy(model).eval(), SIZE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, left = ranked(model, groups, criterion, feed(images), images=4, seed=0)
    assert not left
    assert [one.group for one in found] == groups
    for one in found:
        assert one.scores.shape == (one.group.units,)
        assert one.scores.dtype == torch.double
        assert one.scores.isfinite().all()
        assert (one.scores >= 0).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert not images.requires_grad


def test_what_cannot_be_ranked_says_why() -> None:
    model, images = Forked(), shown(4, TOY)
    model.spare = nn.Linear(5, 2)

    def why(group: Group, criterion: Criterion, **options: Any) -> str:
        found, left = ranked(model, [group], criterion, feed(images), images=4, seed=0, **options)
        assert not found
        return left["first"]

    assert why(model.group("one"), "bn") == "no batch norm among its members"
    for criterion in ("gram", "taylor"):
        assert why(model.group(), criterion) == "no layer reads its channels"
        assert why(model.group("one", "spare"), criterion) == "no image reaches layer 'spare'"
    assert ranked(model, [model.group()], "group-l2", feed(images), images=4, seed=0)[0]


def test_with_labels_it_is_their_likelihood_that_is_lost() -> None:
    model, images = Forked(), shown(7, TOY)
    labels = torch.tensor([0, 5, 2, 2, 1, 4, 3])
    once, twice = (model.hidden(images).detach().requires_grad_(True) for _ in range(2))
    loss = nn.functional.cross_entropy(model.one(once) + model.two(twice), labels, reduction="sum")
    slopes = torch.autograd.grad(loss, (once, twice))
    expected = sum((once * slope).square().mean(0).detach().double() for slope in slopes)
    found = rank(model, model.group("one", "two"), "taylor-labels", images, labels=labels).scores
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    other = rank(model, model.group("one", "two"), "taylor-labels", images, labels=labels.flip(0)).scores
    assert not torch.allclose(found, other, rtol=0.01)
    drawn = rank(model, model.group("one", "two"), "taylor", images, labels=labels).scores
    assert torch.equal(drawn, rank(model, model.group("one", "two"), "taylor", images).scores)


@pytest.mark.parametrize("criterion", ["gram", "taylor", "bn"])
def test_criteria_that_look_at_images_ask_for_some(criterion: Criterion) -> None:
    model = Forked()
    way_out = f"prune: criterion {criterion} looks at images and there are none; give data with a training split"
    with pytest.raises(PassError, match=way_out):
        ranked(model, [model.group("one")], criterion, None, images=0, seed=0)


def test_a_table_that_passes_through_layers_is_no_group_that_could_go_for_nothing() -> None:
    class Tabled(Forked):
        def forward(self, images: Tensor) -> Tensor:
            table = self.two(self.first(torch.ones(3, 48)).relu())
            return cast(Tensor, self.one(images.flatten(1)[:, :5]) + table.mean(0))

    model, images = Tabled(), shown(6, TOY)
    looking: tuple[Criterion, ...] = ("gram", "taylor")
    for criterion in looking:
        found, left = ranked(model, [model.group("two")], criterion, feed(images), images=6, seed=0)
        assert not found
        assert left == {"first": "no image reaches layer 'two'"}


def test_values_that_are_not_finite_are_an_error() -> None:
    model, images = Forked(), shown(4, TOY)
    group = model.group("one")
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(PassError, match="prune: layer 'one' sees values that are not finite; check weights and images"):
        rank(model, group, "gram", images)
    with pytest.raises(PassError, match="prune: the network's output is not finite; check weights and images"):
        rank(model, group, "taylor", images)
    with torch.no_grad():
        model.first.weight[0, 0] = torch.inf
    with pytest.raises(PassError, match="prune: scores of 'first' are not finite; start from weights that are"):
        ranked(model, [group], "group-l2", None, images=0, seed=0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.0, 3.0], [1.0, 0.25, 0.0, 0.0]),
        ([0.0, 0.0], [1.0, 0.0, 0.0]),
        ([2.0], [1.0, 0.0]),
        ([1e308, 1e308, 1e308, 1e308], [1.0, 0.75, 0.5, 0.25, 0.0]),
        ([5e-324, 0.0], [1.0, 0.0, 0.0]),
    ],
)
def test_the_share_lost_is_that_of_the_units_that_are_gone(scores: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(
        share_lost(torch.tensor(scores, dtype=torch.double)), torch.tensor(expected, dtype=torch.double)
    )


def test_a_group_is_handed_on_as_it_is_unless_its_heads_are_reordered() -> None:
    model = Forked()
    group = replace(model.group("one"), name="one")
    assert rank(model, group, "gram", shown(4, TOY)).group is group
