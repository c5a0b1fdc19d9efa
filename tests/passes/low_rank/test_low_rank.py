"""The rules of the pass one by one, on networks small enough to follow: what is factored, what stays dense and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slim import costs, surgery
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context
from slim.errors import PassError, RecipeError
from slim.passes.low_rank import LowRank
from slim.recipe import build_pass
from tests.contract.zoo import BLIND, CLASSES, SIZE, WIDE, artifact


class Net(nn.Module):
    """Layers of every kind the pass has to tell apart."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, stride=4)  # three inputs: never
        self.point = nn.Conv2d(64, 96, 1, stride=2, bias=False)
        self.grouped = nn.Conv2d(96, 96, 1, groups=2)  # 48 to 48 in each group
        self.padded = nn.Conv2d(96, 64, 1, padding=1)
        self.wide = nn.Linear(64, 128)
        self.narrow = nn.Linear(128, 32)
        self.back = nn.Linear(32, 64)
        self.read = nn.Linear(64, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.padded(self.grouped(self.point(self.stem(images)).relu())).mean((2, 3))
        features = self.back(self.narrow(self.wide(features).relu()).relu())
        logits: Tensor = self.head(nn.functional.linear(features, self.read.weight))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def net() -> Artifact:
    chosen = Backbone(name="tests.passes.low_rank.test_low_rank:Net", num_classes=64, input=Preprocessing(size=SIZE))
    return Artifact.of(chosen.build(trust=True), chosen, trust=True)


def planned(given: Artifact, step: LowRank) -> tuple[dict[str, int], dict[str, str]]:
    """Rank of each factored layer, and why each other one is dense."""
    plan: Any = step(given).history[-1].plan
    return {name: chosen["rank"] for name, chosen in plan["layers"].items()}, plan["dense"]


def test_each_layer_that_stays_dense_says_why() -> None:
    # ratio 0.5: half of 64 * 96 / 160 = 38.4 and of 64 * 128 / 192 = 42.67, in eights.
    assert planned(net(), LowRank(ratio=0.5, **BLIND)) == (
        {"point": 16, "padded": 16, "wide": 16},
        {
            "stem": "narrower than min_width 64",
            "grouped": "narrower than min_width 64",
            "narrow": "narrower than min_width 64",
            "back": "narrower than min_width 64",
            "read": "its weight is read directly, not called",
            "head": "classifier",
        },
    )


def test_align_rounds_down() -> None:
    assert planned(net(), LowRank(ratio=0.5, align=1, **BLIND))[0] == {"point": 19, "padded": 19, "wide": 21}
    assert planned(net(), LowRank(ratio=0.5, align=4, **BLIND))[0] == {"point": 16, "padded": 16, "wide": 20}
    ranks, dense = planned(net(), LowRank(ratio=0.5, align=20, **BLIND))
    assert ranks == {"wide": 20}
    assert dense["point"] == "rank below one tile of 20"


def test_min_width_lets_narrow_layers_in() -> None:
    # 48 * 48 / 96 = 24 in each group, 32 * 128 / 160 = 25.6 and 32 * 64 / 96 = 21.3, halved, in eights.
    ranks = planned(net(), LowRank(ratio=0.5, min_width=32, **BLIND))[0]
    assert ranks == {"point": 16, "grouped": 8, "padded": 16, "wide": 16, "narrow": 8, "back": 8}


def test_guard_is_a_share_of_break_even() -> None:
    # 0.76 of 38.4 and of 42.67 in fours: ranks 28 and 32, which are 0.73 and 0.75 of break-even.
    ranks, dense = planned(net(), LowRank(ratio=0.76, align=4, guard=0.74, **BLIND))
    assert ranks == {"point": 28, "padded": 28}
    assert dense["wide"] == "its rank would not pay"
    assert planned(net(), LowRank(ratio=0.76, align=4, guard=0.76, **BLIND))[0] == {
        "point": 28,
        "padded": 28,
        "wide": 32,
    }


def test_skip_takes_patterns() -> None:
    ranks, dense = planned(net(), LowRank(ratio=0.5, skip=("w*", "head"), **BLIND))
    assert ranks == {"point": 16, "padded": 16}
    assert (dense["wide"], dense["head"]) == ("in skip", "classifier")


def test_a_skip_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PassError, match=r"low-rank: skip 'stages\.\*' matches no layer; names are such as 'stem'"):
        LowRank(ratio=0.5, skip=("stages.*",), **BLIND)(net())


@pytest.mark.parametrize(
    "step", [LowRank(energy=1.0, guard=1.0, **BLIND), LowRank(ratio=0.95, align=1, **BLIND)], ids=["energy", "ratio"]
)
def test_nothing_to_gain_is_an_error_that_says_why(step: LowRank) -> None:
    rule = "ratio 0.95" if step.ratio else "energy 1.0"
    reasons = "classifier; its rank would not pay; its weight is read directly, not called; narrower than min_width 64"
    with pytest.raises(PassError) as caught:
        step(net())
    assert str(caught.value) == f"low-rank: {rule} leaves every layer dense ({reasons}); lower it or min_width"


def test_a_network_without_such_layers_is_an_error() -> None:
    small = Backbone(name="resnet18", kwargs={"layers": [1, 0, 0, 0]}, num_classes=2, input=Preprocessing(size=SIZE))
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3))
    with pytest.raises(PassError, match=r"leaves every layer dense \(no Linear layer or convolution\)"):
        LowRank(**BLIND).plan(model, Context(backbone=small))


def test_never_at_or_over_break_even() -> None:
    square = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        for key, rank in (("0.weight", 32), ("1.weight", 31)):
            square.get_parameter(key).copy_(torch.diag(torch.arange(64) < rank))
    flat = Backbone(name="unused", num_classes=64, input=Preprocessing(size=(3, 8, 64)))
    plan: Any = LowRank(energy=1.0, guard=1.0, align=1, **BLIND).plan(square, Context(backbone=flat))
    assert plan["layers"] == {"1": {"scheme": "channel", "rank": 31, "full": 64, "break_even": 32.0, "loss": 0.0}}
    assert plan["dense"] == {"0": "its rank would not pay"}


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.7, 0.89])
def test_ratio_is_kept_by_every_layer(ratio: float) -> None:
    given = artifact("vit")
    step = LowRank(ratio=ratio, align=1, min_width=WIDE, **BLIND)
    before, after = given.model(), step(given)
    plan: Any = after.history[-1].plan
    matrices = {name for name, module in before.named_modules() if isinstance(module, nn.Linear)}
    assert set(plan["layers"]) | set(plan["dense"]) == {*matrices, "patch_embed.proj"}
    for name, chosen in plan["layers"].items():
        outputs, inputs = before.get_parameter(f"{name}.weight").shape
        kept = chosen["rank"] * (outputs + inputs) / (outputs * inputs)
        assert kept <= ratio
        assert kept > ratio - (outputs + inputs) / (outputs * inputs)  # one rank more would be over it


def test_energy_is_reached_by_every_layer_and_by_no_smaller_rank() -> None:
    given = artifact("vit")
    plan: Any = LowRank(energy=0.4, align=1, min_width=WIDE, **BLIND)(given).history[-1].plan
    assert len(plan["layers"]) == 8
    for name, chosen in plan["layers"].items():
        spectrum = torch.linalg.svdvals(given.state[f"{name}.weight"].double()) ** 2
        shares = spectrum.cumsum(0) / spectrum.sum()
        assert shares[chosen["rank"] - 2] < 0.4 <= shares[chosen["rank"] - 1]
        assert chosen["loss"] == pytest.approx(1 - float(shares[chosen["rank"] - 1]), abs=1e-6)


def test_what_is_measured_shrinks_as_planned() -> None:
    given = artifact("mobilenet")
    after = LowRank(ratio=0.5, align=2, min_width=WIDE, **BLIND)(given)
    before, now = (costs.count(network.model(), SIZE) for network in (given, after))
    plan: Any = after.history[-1].plan
    saved = 0
    for name, chosen in plan["layers"].items():
        outputs, inputs = given.state[f"{name}.weight"].shape[:2]
        saved += outputs * inputs - chosen["rank"] * (outputs + inputs)
    assert before["params"] - now["params"] == saved
    assert now["macs"] < before["macs"]


def test_the_classifier_is_never_factored() -> None:
    for name in ("resnet", "mobilenet", "convnext", "mixer", "beit"):
        model = artifact(name).model()
        _, dense = planned(artifact(name), LowRank(ratio=0.5, align=1, min_width=CLASSES, **BLIND))
        assert {dense[head] for head in surgery.classifiers(model)} == {"classifier"}


def test_attention_that_reads_its_weight_stays_correct() -> None:
    given = artifact("beit")
    factors = LowRank(ratio=0.8, align=1, min_width=WIDE, **BLIND)(given)
    assert isinstance(factors.model().get_submodule("blocks.0.attn.qkv"), nn.Linear)
    assert torch.equal(factors.state["blocks.0.attn.qkv.weight"], given.state["blocks.0.attn.qkv.weight"])


def test_a_network_whose_every_layer_is_read_is_left_alone() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(96, 96)

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.linear(images.flatten(1)[:, :96], self.read.weight)

    chosen = Backbone(name="unused", num_classes=96, input=Preprocessing(size=SIZE))
    with pytest.raises(PassError, match="its weight is read directly, not called"):
        LowRank(ratio=0.5, **BLIND).plan(Reader(), Context(backbone=chosen))


def test_planning_leaves_no_hook() -> None:
    model = artifact("vit").model()
    LowRank(ratio=0.5, min_width=WIDE, **BLIND).plan(model, Context(backbone=artifact("vit").backbone))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_of_zeros_stays_dense_and_one_of_nan_is_an_error() -> None:
    state = net().state_dict()
    state["wide.weight"].zero_()
    given = Artifact(net().backbone, state, trust=True)
    assert planned(given, LowRank(ratio=0.5, align=1, **BLIND))[1]["wide"] == "its weight is zero"
    state["wide.weight"][0, 0] = torch.nan
    with pytest.raises(PassError, match="layer 'wide' holds values that are not finite; start from weights that are"):
        LowRank(ratio=0.5, **BLIND)(Artifact(net().backbone, state, trust=True))


def test_the_plan_is_plain_json() -> None:
    plan = LowRank(ratio=0.5, **BLIND)(net()).history[0].plan
    assert json.loads(json.dumps(plan)) == plan
    assert set(plan) == {"layers", "dense"}


def test_energy_and_ratio_do_not_go_together() -> None:
    with pytest.raises(RecipeError, match=r"energy=0\.8 and ratio=0\.5 both choose the ranks; give one of them"):
        build_pass(LowRank, {"energy": 0.8, "ratio": 0.5})
    assert LowRank(ratio=0.5, **BLIND).energy == LowRank(**BLIND).energy


@pytest.mark.parametrize(
    ("field", "value"),
    [("energy", 0.0), ("energy", 1.5), ("ratio", 0.0), ("ratio", 1.0), ("align", 0), ("guard", 1.1), ("min_width", 0)],
)
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        LowRank(**{field: value})
