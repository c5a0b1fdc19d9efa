"""The rules of the pass one by one: what is cut, what stays and why, and what the errors say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slim import costs, store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context, Loading
from slim.data import Data, open_data
from slim.errors import DataError, OrderError, PassError, RecipeError
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.prune import Prune
from slim.passes.prune.choose import numbers, ranges
from slim.pipeline import Pipeline
from slim.recipe import build_pass
from tests.contract.zoo import BLIND, CLASSES, SIZE, WIDE, artifact
from tests.passes.prune.toys import error, images_of, outputs

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"align": 2, "floor": 2}
UNSEEING: dict[str, Any] = {"criterion": "group-l2", "repair": "none"}


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=16, calib=64)


def plan_of(after: Artifact) -> Any:
    return after.history[-1].plan


def cut(given: Artifact, data: Data | None = None, **settings: Any) -> tuple[Artifact, Any]:
    """Pruned without images, unless there are some, and its plan."""
    step = Prune(**{**SMALL, **({} if data else UNSEEING), **settings})
    after = step(given, Context(data=data))
    return after, plan_of(after)


class Net(nn.Module):
    """Hidden layers of several widths, one behind another."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (40, 12, 6, 44)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        ends = [16, *widths]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(ends, widths, strict=False))
        self.head = nn.Linear(ends[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).mean((2, 3))
        for layer in self.layers:
            features = layer(features).relu()
        logits: Tensor = self.head(features)
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def net() -> Artifact:
    place = "tests.passes.prune.test_prune:Net"
    chosen = Backbone(name=place, num_classes=CLASSES, input=Preprocessing(size=SIZE, crop=1.0))
    return Artifact.of(chosen.build(seed=1, trust=True), chosen, trust=True)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "neither is given; give one: to, as 0.6x-latency, or ratio"),
        ({"to": "0.5x-macs", "ratio": 0.5}, "to=0.5x-macs and ratio=0.5 are given; give one"),
        ({"ratio": 0.5, "ranking": "global"}, "ratio keeps one share everywhere, and ranking=global shares a budget"),
        ({"ratio": 0.0}, "greater than 0"),
        ({"ratio": 1.0}, "less than 1"),
        ({"to": "half"}, "'half' is no goal"),
        ({"to": "1.5x-macs"}, "between 0 and 1"),
        ({"to": "sparsified", "criterion": "bn", "skip": ["a"]}, "chose, so criterion, skip must be set there"),
        ({"ratio": 0.5, "align": 0}, "greater than or equal to 1"),
        ({"ratio": 0.5, "floor": 0}, "greater than or equal to 1"),
        ({"ratio": 0.5, "criterion": "l1"}, "'gram', 'group-l2', 'taylor', 'taylor-labels', 'bn' or 'random'"),
        ({"ratio": 0.5, "heads": "some"}, "'whole', 'dims' or 'none'"),
        ({"ratio": 0.5, "memory_gb": 0}, "greater than 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError):
        Prune(**settings)
    with pytest.raises(RecipeError) as caught:
        build_pass(Prune, settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_return_from_json() -> None:
    for step in (Prune(ratio=0.5, skip=("a.*",)), Prune(to="0.6x-latency", ranking="erk"), Prune(to="sparsified")):
        assert Prune(**json.loads(step.model_dump_json())) == step


@pytest.mark.parametrize(
    ("settings", "reads", "measures"),
    [
        ({"ratio": 0.5}, True, False),
        ({"ratio": 0.5, **UNSEEING}, False, False),
        ({"ratio": 0.5, "criterion": "random", "repair": "none"}, False, False),
        ({"ratio": 0.5, "criterion": "random", "repair": "norms"}, True, False),
        ({"ratio": 0.5, "criterion": "bn", "repair": "none"}, True, False),
        ({"to": "sparsified"}, True, False),
        ({"to": "sparsified", "repair": "none"}, False, False),
        ({"to": "0.5x-macs"}, True, False),
        ({"to": "0.5x-size"}, True, True),
        ({"to": "4ms"}, True, True),
    ],
)
def test_the_pass_says_what_it_reads_and_whether_it_measures(
    settings: dict[str, Any], reads: bool, measures: bool
) -> None:
    step = Prune(**settings)
    assert step.reads == (frozenset({"calib"}) if reads else frozenset())
    assert step.measures == measures


@pytest.mark.parametrize("settings", [{}, {"criterion": "group-l2"}, {"repair": "none"}])
def test_without_images_the_error_comes_before_the_work_and_says_which_settings_need_none(
    settings: dict[str, Any],
) -> None:
    with pytest.raises(PassError, match=r"^prune: there are no calibration images; give data .*criterion group-l2"):
        Prune(ratio=0.5, **SMALL, **settings)(artifact("vit"))


# Widths


@pytest.mark.parametrize(
    ("ratio", "widths", "whole"),
    [
        # 30 of 40 and 33 of 44 are nearest to 32 where rounding down gives 24 of 40; 12 of 16 are as near to 16.
        (0.75, {"layers.0": 32, "layers.1": 8, "layers.3": 32}, ["stem"]),
        (0.5, {"stem": 8, "layers.0": 24, "layers.1": 8, "layers.3": 24}, []),
        (0.1, {"stem": 8, "layers.0": 8, "layers.1": 8, "layers.3": 8}, []),
        (0.97, {}, ["stem", "layers.0", "layers.1", "layers.3"]),
    ],
)
def test_widths_are_the_nearest_multiples_and_what_stays_whole_says_why(
    ratio: float, widths: dict[str, int], whole: list[str]
) -> None:
    given = net()
    if not widths:
        with pytest.raises(PassError) as caught:
            cut(given, ratio=ratio, align=8, floor=8)
        assert str(caught.value) == (
            "prune: ratio 0.97 cuts nothing (classifier; its width closest to the ratio is all it has; no narrower "
            "multiple of 8 from 8 up); ask for less"
        )
        return
    after, plan = cut(given, ratio=ratio, align=8, floor=8)
    assert {name: group["kept"] for name, group in plan["groups"].items()} == widths
    assert plan["left"] == {
        "head": "classifier",
        "layers.2": "no narrower multiple of 8 from 8 up",
        **dict.fromkeys(whole, "its width closest to the ratio is all it has"),
    }
    model = after.model()
    assert {name: len(cast(Any, model.get_submodule(name)).weight) for name in widths} == widths


@pytest.mark.parametrize(("align", "floor"), [(1, 1), (4, 4), (8, 20), (16, 8)])
def test_widths_under_a_budget_are_multiples_from_the_floor_up(align: int, floor: int) -> None:
    _, plan = cut(net(), to="0.8x-params", align=align, floor=floor)
    assert plan["groups"]
    for group in plan["groups"].values():
        assert group["kept"] % align == 0
        assert floor <= group["kept"] < group["width"]


def test_a_network_that_keeps_everything_cannot_be_a_result() -> None:
    given = net()
    with pytest.raises(PassError, match=r"^prune: to 1G-macs cuts nothing \(.*less loss elsewhere.*\); ask for less"):
        cut(given, to="1G-macs")
    for rule in ({"ratio": 0.5}, {"to": "0.5x-params"}):
        with pytest.raises(PassError) as caught:
            cut(given, skip=("*",), **rule)
        assert str(caught.value) == (
            "prune: no channels can go (classifier; in skip); skip less, lower floor, or try scope all"
        )


def test_a_budget_below_the_fewest_channels_is_an_error_that_names_the_way_out() -> None:
    given = net()
    least = sum(inputs * outputs for inputs, outputs in [(48, 2), (2, 2), (2, 2), (2, 2), (2, 2), (2, 10)])
    least += 5 * 2 + 10  # biases
    with pytest.raises(PassError) as caught:
        cut(given, to="0.01x-params")
    assert str(caught.value) == (
        f"prune: --to 0.01x-params cannot be reached: the smallest widths give {least:.4g} params of "
        f"{given.costs['params']:.4g}, asked were {0.01 * given.costs['params']:.4g}; raise it, or lower floor, skip "
        "less, or try scope all"
    )


# Which groups


def test_the_residual_stream_stays_unless_the_scope_is_all() -> None:
    given = artifact("resnet")
    dense = given.model()
    after, plan = cut(given, ratio=0.5)
    assert all(group["internal"] for group in plan["groups"].values())
    assert set(plan["left"].values()) == {"its channels leave the block; scope all cuts them too", "classifier"}
    model = after.model()
    for name, module in dense.named_modules():
        if name.endswith(("conv3", "bn3", "downsample.0", "downsample.1")):
            assert len(cast(Any, module).weight) == len(cast(Any, model.get_submodule(name)).weight)
    _, everything = cut(given, ratio=0.5, scope="all")
    assert set(plan["groups"]) < set(everything["groups"])
    assert everything["left"] == {"fc": "classifier"}
    assert not all(group["internal"] for group in everything["groups"].values())


@pytest.mark.parametrize(("heads", "kept", "width"), [("whole", 2, 16), ("dims", 3, 8), ("none", 3, 16)])
def test_attention_loses_heads_or_their_dimensions_or_nothing(heads: Any, kept: int, width: int) -> None:
    after, plan = cut(artifact("vit"), ratio=0.5, heads=heads)
    for block in cast(Any, after.model()).blocks:
        assert (block.attn.num_heads, block.attn.head_dim) == (kept, width)
        assert block.attn.qkv.out_features == 3 * kept * width == 3 * block.attn.proj.in_features
        assert block.mlp.fc1.out_features == 96
    named = [name for name in plan["groups"] if ".attn." in name]
    assert named == (
        []
        if heads == "none"
        else [f"blocks.{block}.attn.qkv:{'heads' if heads == 'whole' else 'dims'}" for block in (0, 1)]
    )
    if heads == "none":
        assert {plan["left"][f"blocks.{block}.attn.qkv"] for block in (0, 1)} == {"heads is none"}


@pytest.mark.parametrize(
    ("skip", "stays"),
    [
        (("blocks.0.*",), {"blocks.0.mlp.fc1", "blocks.0.attn.qkv:heads"}),
        (("*.fc1",), {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}),
        (("*:heads",), {"blocks.0.attn.qkv:heads", "blocks.1.attn.qkv:heads"}),
        (("blocks.1.attn.qkv", "blocks.0.mlp.fc1"), {"blocks.1.attn.qkv:heads", "blocks.0.mlp.fc1"}),
        (("head",), set()),
    ],
)
def test_what_is_in_skip_stays(skip: tuple[str, ...], stays: set[str]) -> None:
    _, plan = cut(artifact("vit"), ratio=0.5, skip=skip)
    assert {name for name, reason in plan["left"].items() if reason == "in skip"} == stays
    assert {
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc1",
        "blocks.0.attn.qkv:heads",
        "blocks.1.attn.qkv:heads",
    } == stays | set(plan["groups"])


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PassError) as caught:
        cut(artifact("vit"), ratio=0.5, skip=("block.*",))
    assert str(caught.value) == ("prune: skip 'block.*' matches no layer; names are such as 'patch_embed.proj'")


def test_weights_that_two_layers_share_stay() -> None:
    chosen = Backbone(name="tests.contract.zoo:tied", num_classes=CLASSES, input=Preprocessing(size=SIZE, crop=1.0))
    given = Artifact.of(chosen.build(seed=1, trust=True), chosen, trust=True)
    with pytest.raises(PassError, match=r"^prune: no channels can go \(.*share a weight there\)"):
        cut(given, ratio=0.5)


# What a plan is


def test_ranges_return() -> None:
    for some in ([], [3], [0, 1, 2], [0, 2, 3, 7], [*range(100), 200]):
        assert numbers(ranges(some)) == some
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_the_best_units_stay_and_the_plan_says_what_is_lost() -> None:
    _, plan = cut(net(), ratio=0.5, floor=2, align=2)
    model: Any = net().model()
    made, read = model.layers[0], model.layers[1]
    first, second = made.weight.detach().double().square(), read.weight.detach().double().square()
    # group-l2, biases apart; every tensor over its mean.
    scores = first.sum(1) / first.mean() + second.sum(0) / second.mean()
    best = sorted(scores.argsort(descending=True)[:20].tolist())
    group = plan["groups"]["layers.0"]
    assert numbers(group["units"]) == best
    assert group["lost"] == pytest.approx(1 - float(scores[best].sum() / scores.sum()), abs=1e-6)
    assert (group["kind"], group["width"], group["kept"], group["unit"]) == ("channels", 40, 20, 1)
    assert group["layers"] == {"makes": ["layers.0"], "reads": ["layers.1"]}


def test_a_group_of_zeros_loses_nothing() -> None:
    given = net()
    model: Any = given.model()
    with torch.no_grad():
        model.layers[0].weight.zero_()
        model.layers[1].weight.zero_()
    _, plan = cut(Artifact.of(model, given.backbone, trust=True), ratio=0.5)
    assert plan["groups"]["layers.0"]["lost"] == 0


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_two_calls_give_one_network_and_batches_play_no_part(
    name: str, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = artifact(name)
    step = Prune(to="0.6x-macs", criterion="taylor", **SMALL)

    def done(seed: int = 0) -> Artifact:
        return step(given, Context(data=digits, seed=seed))

    first, second = done(), done()
    assert first.history == second.history
    assert first.digest == second.digest
    monkeypatch.setattr("slim.passes.calibration.EVAL_BATCH", 24)
    split = done()
    assert plan_of(split) == plan_of(first)
    # Repair takes the images of a batch apart into halves, which are others then.
    assert error(outputs(split, images_of(digits, given)), outputs(first, images_of(digits, given))) < 5e-3


def test_random_channels_are_others_with_another_seed() -> None:
    given, step = artifact("resnet"), Prune(ratio=0.5, criterion="random", repair="none", **SMALL)
    plans = [plan_of(step(given, Context(seed=seed)))["groups"] for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_what_was_pruned_loads_without_torch_pruning_and_its_plan_is_small(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after, plan = cut(artifact(name), ratio=0.5, heads="dims", scope="all")
    place = store.save(after, tmp_path / "saved")
    for known in [one for one in sys.modules if one.startswith("torch_pruning")]:
        monkeypatch.setitem(sys.modules, known, None)  # importing it is an error from here on
    with pytest.raises(ImportError):
        cut(artifact(name), ratio=0.5)
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    loaded = store.load(place, trust=True)
    assert loaded.digest == after.digest
    assert torch.equal(outputs(loaded, images), outputs(after, images))
    assert len(json.dumps(plan)) < 20_000


# Other steps


def test_after_low_rank_is_an_order_that_cannot_work(digits: Data) -> None:
    factored = LowRank(ratio=0.5, align=2, min_width=WIDE, **BLIND)
    with pytest.raises(OrderError, match="step 2 'prune' needs a 'dense' network, and step 1 'low-rank' ends that"):
        Pipeline((factored, Prune(ratio=0.5))).check(artifact("vit"), Context(data=digits))
    with pytest.raises(DataError, match=r"'prune'.*calib"):
        Pipeline((Prune(ratio=0.5),)).check(artifact("vit"), Context())


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_pruning_twice_goes_on_where_the_first_ended(name: str, digits: Data, tmp_path: Path) -> None:
    once, first = cut(artifact(name), digits, ratio=0.75, heads="dims")
    twice, second = cut(once, digits, to="0.7x-macs", heads="whole")
    assert 0 < twice.costs["macs"] <= 0.7 * once.costs["macs"]
    for group in set(first["groups"]) & set(second["groups"]):
        assert second["groups"][group]["width"] == first["groups"][group]["kept"]
    assert store.load(store.save(twice, tmp_path / "saved"), trust=True).digest == twice.digest


@pytest.mark.parametrize("ranking", ["erk", "synflow", "proxy"])
def test_a_fresh_network_is_pruned_before_it_is_trained(ranking: Any, digits: Data) -> None:
    backbone = artifact("resnet").backbone
    given = Artifact.of(backbone.build(seed=3), backbone)
    step = Prune(to="0.5x-params", ranking=ranking, criterion="random", repair="none", scope="all", **SMALL)
    train = Finetune(epochs=1, lr=1e-3, flip=0.0, precision="fp32")
    context = Context(data=digits, loading=Loading(32))
    Pipeline((step, train)).check(given, context)
    result = Pipeline((step, train))(given, context)
    assert [done.name for done in result.artifact.history] == ["prune", "finetune"]
    assert result.artifact.costs["params"] <= 0.5 * given.costs["params"]


# Values


def test_what_is_constant_goes_into_the_layer_behind_without_any_image() -> None:
    given = net()
    model: Any = given.model()
    with torch.no_grad():
        for number, width in enumerate((40, 12, 6, 44)):
            model.layers[number].weight[: width // 2] = 0.0  # what is left of them is their bias
            model.layers[number].bias[: width // 2] = 0.3
            if number < 3:
                model.layers[number + 1].weight[:, : width // 2] *= 0.01  # so that they are the ones that go
        model.head.weight[:, :22] *= 0.01
    start = Artifact.of(model, given.backbone, trust=True)
    after, plan = cut(start, ratio=0.5, skip=("stem",))
    assert all(
        set(numbers(group["units"])) >= set(range(group["width"] // 2, group["width"]))
        for group in plan["groups"].values()
    )
    images = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(3))
    assert error(outputs(after, images), outputs(start, images)) < 1e-5
    assert costs.count(after.model(), SIZE)["params"] < 0.6 * start.costs["params"]
