"""Elastic ranks and sides of the input: what is gated is what is cut out, and nothing of it stays."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slim import costs, store
from slim.artifact import Artifact
from slim.bench.decisions import decisions
from slim.bench.measure import TargetMeter
from slim.contract import Context, Loading
from slim.data import Data, open_data
from slim.errors import PassError
from slim.export.target import Target
from slim.passes.elastic import BestSubnet, Elastic
from slim.passes.elastic.discover import Wanted
from slim.passes.elastic.examine import Examiner
from slim.passes.elastic.extract import extract, fed
from slim.passes.elastic.gates import gated, resized
from slim.passes.elastic.overview import lines
from slim.passes.elastic.predictor import Predictor, singles
from slim.passes.elastic.ranks import directions
from slim.passes.elastic.search import greedy
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.subnets import from_json
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.prune.groups import groups_of
from tests.contract.zoo import BLIND, artifact
from tests.passes.elastic.families import MORE, SIZE, SMALL, drawn, images, network, off, space_of

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 1e-5
"""Of the largest output: layers add up in another order once they are two."""
SIDES = ("resnet", "seresnet", "mobilenetv2", "mobilenetv3", "efficientnet", "regnet")
"""Families that take images of another size."""


@cache
def family(name: str) -> tuple[nn.Module, Space]:
    built = network(name)
    return built, space_of(built, MORE)


@pytest.mark.parametrize("name", SMALL)
def test_open_is_the_network_bit_for_bit_and_gated_is_cut_out(name: str) -> None:
    model, space = family(name)
    assert len(space.ranks) > 2
    assert space.pixels == ((0, 24, 16) if name in SIDES else (0,))
    with torch.no_grad():
        whole, subnets = model(images()), drawn(space, 6)
        seen = [resized(images(), one.pixels) if one.pixels else images() for one in subnets]
        cut_out = [extract(model, space, one)(some) for one, some in zip(subnets, seen, strict=True)]
        with gated(model, space) as choose:
            assert torch.equal(model(images()), whole)
            for subnet, expected in zip(subnets, cut_out, strict=True):
                choose(subnet)
                assert off(model(images()), expected) <= SAME
            choose(space.largest)
            assert torch.equal(model(images()), whole)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_ranks_alone_change_what_is_computed() -> None:
    model, space = family("convnext")
    thin = replace(space.largest, ranks=space.smallest.ranks)
    assert space.factored(thin) == {one.layer: one.choices[-1] for one in space.ranks}
    with torch.no_grad():
        assert off(extract(model, space, thin)(images()), model(images())) > 0.01


def test_directions_are_the_best_and_smaller_ranks_lie_within_larger_ones() -> None:
    weight = torch.randn(24, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    more, fewer = directions(weight, 16), directions(weight, 8)
    assert (more @ more.T @ fewer - fewer).abs().max() < 1e-9
    matrix = weight.double().flatten(1)
    spectrum = torch.linalg.svdvals(matrix)
    for rank, first in ((16, more), (8, fewer)):
        lost = (matrix - first @ first.T @ matrix).square().sum()
        assert float(lost) == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-9)  # Eckart and Young


def test_a_rank_costs_what_its_share_says() -> None:
    model, space = family("vit")
    counted = costs.count(model, SIZE)["params"]
    for number, one in enumerate(space.ranks):
        for rank in one.choices[1:]:
            ranks = tuple(rank if n == number else 0 for n in range(len(space.ranks)))
            thin = replace(space.largest, ranks=ranks)
            saved = counted - costs.count(extract(model, space, thin), SIZE)["params"]
            assert saved == one.rows * one.columns - rank * (one.rows + one.columns)
            assert saved == pytest.approx((1 - space.share_of(number, thin)) * one.rows * one.columns)
            assert saved > 0


class Joined(nn.Module):
    """A layer that reads two groups of channels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 96, 3)
        self.joint, self.last, self.head = nn.Conv2d(128, 64, 1), nn.Conv2d(64, 64, 1), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.one(x).relu(), self.two(x).relu()], 1)
        out: torch.Tensor = self.head(self.last(self.joint(x).relu()).relu().mean((2, 3)))
        return out

    def get_classifier(self) -> nn.Module:
        return self.head


def test_no_pair_costs_more_than_its_layer_where_that_reads_two_widths() -> None:
    model = Joined().eval()
    space = space_of(model, replace(MORE, pixels=()))
    (number,) = (n for n, one in enumerate(space.ranks) if one.layer == "joint")
    assert {dim.group.name for dim in space.dims} >= {"one", "two"}
    for subnet in product(*space.axes):
        thin = space.canonical(space.of(subnet))
        if thin.ranks[number]:
            single = replace(thin, ranks=tuple(0 if n == number else rank for n, rank in enumerate(thin.ranks)))
            one, two = (costs.count(extract(model, space, net), SIZE)["params"] for net in (single, thin))
            layer: Any = extract(model, space, single).get_submodule("joint")
            assert one - two == pytest.approx((1 - space.share_of(number, thin)) * layer.weight.numel())
            assert two < one


def test_a_greedy_path_ends_where_nothing_saves_also_where_a_rank_does_not_pay() -> None:
    space = space_of(network("vit"), replace(MORE, widths=(1.0, 0.5)))
    cheap = {one: 90.0 - sum(rank > 0 for rank in one.ranks) for one in singles(space)}
    predictor = Predictor.of(space, cheap)

    def cost(one: Subnet) -> float:
        shares = sum(space.share_of(n, one) for n in range(len(space.ranks)))
        return sum(one.units) + 10 * sum(one.on) + shares

    path = greedy(space, predictor, cost)
    assert [cost(one) for one in path] == sorted((cost(one) for one in path), reverse=True)
    end = space.chosen(path[-1])
    for number, choices in enumerate(space.axes):
        for choice in choices:
            other = space.canonical(space.of((*end[:number], choice, *end[number + 1 :])))
            assert cost(other) >= cost(path[-1]) or not space.allows(other)


def test_a_layer_stays_one_where_its_widths_leave_two_nothing_to_save() -> None:
    model = network("vit")
    space = space_of(model, replace(MORE, widths=(1.0, 0.25)))
    number = next(n for n, one in enumerate(space.ranks) if one.layer == "blocks.0.mlp.fc1")
    one, largest = space.ranks[number], space.largest
    rank = one.choices[1]
    thin = replace(largest, ranks=tuple(rank if n == number else 0 for n in range(len(space.ranks))))
    narrow = replace(thin, units=space.smallest.units)
    rows = one.rows / 4
    assert rank * (one.rows + one.columns) < one.rows * one.columns
    assert rank * (rows + one.columns) >= rows * one.columns
    assert space.canonical(thin).ranks[number] == rank
    assert space.canonical(narrow) == replace(narrow, ranks=largest.ranks)
    assert isinstance(extract(model, space, narrow).get_submodule(one.layer), nn.Linear)


def test_a_rank_in_a_block_that_is_not_there_does_not_tell_networks_apart() -> None:
    _, space = family("vit")
    number = next(n for n, one in enumerate(space.ranks) if one.layer.startswith("blocks.3."))
    thin = tuple(one.choices[-1] if n == number else 0 for n, one in enumerate(space.ranks))
    without = Subnet(space.largest.units, (True, True, True, False), thin)
    assert space.rank_within(number) == 3
    assert space.canonical(without) == replace(without, ranks=space.largest.ranks)


def test_no_gradient_reaches_the_directions_that_are_left_out_and_new_weights_have_new_directions() -> None:
    model, space = network("resnet"), family("resnet")[1]
    name, rank = next((one.layer, one.choices[-1]) for one in space.ranks)
    thin = replace(space.largest, ranks=tuple(rank if one.layer == name else 0 for one in space.ranks))
    layer: Any = model.get_submodule(name)
    with gated(model, space) as choose:
        choose(thin)
        model(images()).square().sum().backward()
        first = directions(layer.weight, rank)
        gradient = layer.weight.grad.double().flatten(1)
        outside = gradient - first @ first.T @ gradient
        assert outside.norm() < 1e-5 * gradient.norm()
        with torch.no_grad():
            layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)))
            found = model(images())
    with torch.no_grad():
        assert off(found, extract(model, space, thin)(images())) <= SAME


def test_a_space_comes_back_from_its_plan() -> None:
    model, space = family("resnet")
    again = Space.from_plan(space.as_plan(), groups_of(model, SIZE)[0])
    assert (again.ranks, again.pixels) == (space.ranks, space.pixels)
    for subnet in drawn(space, 5):
        assert again.canonical(subnet) == space.canonical(subnet)
        assert space.of(space.chosen(subnet)) == subnet


def test_what_cannot_have_a_rank_is_named_with_its_reason() -> None:
    _, space = family("mobilenetv2")
    assert space.left["rank of classifier"] == "classifier"
    assert space.left["rank of conv_stem"] == "narrower than min_width 24"
    without = space_of(network("vit"), replace(MORE, skip=("blocks.0.*",)))
    assert without.left["rank of blocks.0.mlp.fc1"] == "in skip"
    assert not any(one.layer.startswith("blocks.0.") for one in without.ranks)
    grouped = space_of(network("regnet"), replace(MORE, min_width=8, widths=(1.0,)))
    assert grouped.left["rank of s4.b1.conv2.conv"] == "it has groups"


def test_a_vit_that_takes_any_size_is_fed_smaller_images() -> None:
    import timm

    _, kwargs = SMALL["vit"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, dynamic_img_size=True, **kwargs).eval()
    space = space_of(model, MORE)
    assert space.pixels == (0, 24, 16)
    smaller = replace(space.smallest, pixels=24)
    with torch.no_grad():
        expected = extract(model, space, smaller)(resized(images(), 24))
        with gated(model, space) as choose:
            choose(smaller)
            assert off(model(images()), expected) <= SAME


def test_a_network_of_one_size_alone_says_so() -> None:
    _, space = family("swin")
    assert space.left["24 pixels"].startswith("the network does not take them: Input height (24)")


@pytest.mark.parametrize(
    ("wanted", "size", "said"),
    [
        (replace(MORE, pixels=(40,)), SIZE, "pixels 40 is no smaller side than the input's 32; give smaller ones"),
        (replace(MORE, pixels=(0,)), SIZE, "pixels 0 is no smaller side"),
        (MORE, (3, 32, 48), "pixels are sides of square images, and the input is 32x48; leave it out"),
    ],
)
def test_sides_that_cannot_be_are_refused(wanted: Wanted, size: tuple[int, int, int], said: str) -> None:
    with pytest.raises(PassError, match=f"^elastic: {said}"):
        space_of(network("resnet"), wanted, size)


def test_every_choice_is_priced_alone_and_named() -> None:
    _, space = family("resnet")
    found = singles(space)
    ranks = sum(len(one.choices) - 1 for one in space.ranks)
    assert len(found) == 1 + sum(len(one.choices) - 1 for one in space.dims) + len(space.blocks) + ranks + 2
    measured = {one: 90.0 - sum(rank > 0 for rank in one.ranks) - one.pixels / 10 for one in found}
    predictor = Predictor.of(space, measured)
    assert predictor.table["pixels"] == {"24": 2.4, "16": 1.6}
    assert predictor.table[f"rank of {space.ranks[0].layer}"] == {str(one): 1.0 for one in space.ranks[0].choices[1:]}
    one = replace(space.largest, ranks=(space.ranks[0].choices[1], *space.largest.ranks[1:]), pixels=16)
    assert predictor.predict([one])[0] == pytest.approx(90 - 1 - 1.6)


def test_the_overview_names_everything_once() -> None:
    _, space = family("resnet")
    said = [*lines(space)]
    assert "input  24, 16 pixels too" in said
    assert {line.partition(" ")[0] for line in said} == {"width", "depth", "rank", "input", "whole"}
    assert sum(line.startswith("depth  0 to 1 of 1: layer1.1, layer2.1, layer3.1") for line in said) == 1
    assert any("channels are those of the residual stream" in line and "layer4.0.conv2" in line for line in said)


# The passes

ALONE: dict[str, Any] = {"epochs": 0, "widths": (1.0,), "depth": 1.0, "held_out": 48}


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=112, limit_val=32, calib=32)


@pytest.fixture(scope="module")
def context(digits: Data) -> Context:
    return Context(data=digits, loading=Loading(batch_size=16))


def plan_of(made: Artifact) -> Any:
    return made.history[-1].plan


@pytest.mark.parametrize("repair", ["none", "both"])
def test_of_ranks_alone_layers_become_two(repair: Any, context: Context, tmp_path: Path) -> None:
    step = Elastic(**ALONE, ranks=(1.0, 0.75, 0.5), min_width=16)
    given = step(artifact("vit"), context)
    after = BestSubnet(to="0.8x-macs", evaluations=4, proposals=40, repair=repair)(given, context)
    plan, model = plan_of(after), after.model()
    assert plan["ranks"]
    assert (plan["groups"], plan["skipped"], plan["pixels"]) == ({}, [], 0)
    for name, rank in plan["ranks"].items():
        pair: Any = model.get_submodule(name)
        assert pair[0].out_features == pair[1].in_features == rank
    assert after.costs["macs"] <= 0.8 * given.costs["macs"]
    space = step.space_of(given.model(), SIZE, given.history[-1].plan)
    whole, chosen = given.model(), from_json(plan["subnet"])
    with torch.no_grad(), gated(whole, space) as choose:
        choose(chosen)
        same = off(model(images()), whole(images())) <= SAME
    assert same == (repair == "none")
    loaded = store.load(store.save(after, tmp_path / "saved"), trust=True)
    assert loaded.digest == after.digest
    with torch.no_grad():
        assert torch.equal(loaded.model()(images()), model(images()))
    TargetMeter(Target.parse("ort:cpu,threads=1"), context.data, tmp_path).parity(after)  # raises where it is off
    layer, rank = next(iter(plan["ranks"].items()))
    said = {one.name: one for one in decisions(after.history, layer)}
    assert (said["subnet"].text, said["subnet"].changes) == (f"two layers of rank {rank}", True)
    assert said["elastic"].text.startswith("whole or rank ")
    # What is two already is not made four.
    with pytest.raises(PassError, match=r"every layer dense \(classifier; factored by a step before; narrower"):
        LowRank(ratio=0.5, align=2, min_width=16, **BLIND)(after, context)


def test_of_sides_alone_the_network_is_the_same_and_its_images_are_smaller(
    context: Context, digits: Data, tmp_path: Path
) -> None:
    given = Elastic(**ALONE, pixels=(24,))(artifact("resnet"), context)
    after = BestSubnet(to="0.7x-macs", evaluations=2, proposals=20)(given, context)
    plan = plan_of(after)
    assert plan["pixels"] == 24
    assert after.backbone.input == fed(given.backbone.input, 24)
    assert after.backbone.input.size == (3, 24, 24)
    assert after.costs["params"] == given.costs["params"]
    assert after.costs["macs"] <= 0.7 * given.costs["macs"]
    # Norms have the statistics of smaller images.
    seen, model = list[torch.Tensor](), after.model()
    train = digits.apart(48, 0)
    small = next(iter(train.eval_batches("train", after.backbone.input, batch_size=64)))[0]
    norm: Any = model.get_submodule("bn1")
    with norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        model(small)
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    loaded = store.load(store.save(after, tmp_path / "saved"), trust=True)
    assert (loaded.digest, loaded.backbone.input) == (after.digest, after.backbone.input)
    meter = TargetMeter(Target.parse("ort:cpu,threads=1"), digits, tmp_path)
    meter.parity(after)
    with torch.no_grad():
        right = [
            float(guess == label)
            for batch, labels in digits.eval_batches("val", after.backbone.input, batch_size=32)
            for guess, label in zip(model(batch).argmax(1).tolist(), labels.tolist(), strict=True)
        ]
    assert [*meter.accuracy(after).samples] == right
    tuned = Finetune(epochs=1, lr=1e-3, flip=0.0, precision="fp32")(after, context)
    assert tuned.backbone.input.size == (3, 24, 24)


def test_sides_are_those_of_the_input_it_was_made_elastic_at(context: Context) -> None:
    given = Elastic(**ALONE, pixels=(24,))(artifact("resnet"), context)
    small = given.backbone.model_copy(update={"input": fed(given.backbone.input, 16)})
    said = "^subnet: the network was made elastic at another input: 24 pixels are no smaller side of 16x16; give it"
    with pytest.raises(PassError, match=said):
        BestSubnet(to="0.7x-macs", evaluations=2, proposals=20)(replace(given, backbone=small), context)


def test_a_layer_computes_in_the_precision_that_it_was_computed_in() -> None:
    model, space = family("resnet")
    thin = replace(space.largest, ranks=space.smallest.ranks)
    kinds: dict[str, torch.dtype] = {}
    with gated(model, space) as choose, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hooks = [
            model.get_submodule(one.layer).register_forward_hook(
                lambda _m, _i, out, name=one.layer: kinds.update({name: out.dtype})
            )
            for one in space.ranks
        ]
        choose(thin)
        model(images())
    for hook in hooks:
        hook.remove()
    assert set(kinds.values()) == {torch.bfloat16}


def test_smaller_images_of_those_held_out_decide(context: Context, digits: Data) -> None:
    step = Elastic(**ALONE, pixels=(24,))
    given = step(artifact("resnet"), context)
    known = Context(data=digits.apart(48, 0), backbone=given.backbone, history=given.history)
    space = step.space_of(given.model(), given.backbone.input.size, given.history[-1].plan)
    examiner = Examiner.of(given.model(), space, known, "none")
    ((seen, labels),) = examiner.images.held(24)
    assert known.data is not None
    ((expected, _),) = known.data.eval_batches("held", fed(given.backbone.input, 24), batch_size=64)
    assert torch.equal(seen, expected)
    with torch.no_grad():
        right = (given.model()(seen).argmax(1) == labels).float().mean()
    assert examiner.accuracy(replace(space.largest, pixels=24)) == pytest.approx(100 * float(right))


def test_all_axes_train_together(context: Context) -> None:
    step = Elastic(epochs=1, lr=1e-3, held_out=48, align=2, floor=2, ranks=(1.0, 0.5), min_width=8, pixels=(24,))
    after = step(artifact("resnet"), context)
    assert {"ranks", "pixels"} <= plan_of(after).keys()
    assert after.state_dict().keys() == artifact("resnet").state_dict().keys()
    chosen = BestSubnet(to="0.3x-macs", evaluations=6, proposals=60)(after, context)
    assert chosen.costs["macs"] <= 0.3 * after.costs["macs"]


def test_a_plan_of_the_first_version_is_one_without_ranks_and_sides() -> None:
    plan: Any = {"dims": {}, "blocks": {}, "fewest": [], "left": {}}
    assert Elastic.migrate(1, {}, plan) == ({}, {**plan, "ranks": {}, "pixels": [0]})
    assert BestSubnet.migrate(1, {}, {"skipped": []}) == ({}, {"skipped": [], "ranks": {}, "pixels": 0})
    assert Elastic.migrate(3, {}, plan) is None
