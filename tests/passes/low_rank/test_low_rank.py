"""The rules of the pass one by one, on networks small enough to follow: what is factored, what stays dense and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slim import costs, surgery
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context
from slim.data import Data, open_data
from slim.errors import DataError, PassError, RecipeError
from slim.passes.low_rank import LowRank, schemes
from slim.pipeline import Pipeline
from slim.recipe import build_pass
from tests.contract.zoo import BLIND, CLASSES, SIZE, WIDE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=64, calib=64)


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


def test_energy_and_ratio_do_not_go_together_but_the_default_is_not_given() -> None:
    assert LowRank(ratio=0.5, **BLIND).energy == LowRank(**BLIND).energy


@pytest.mark.parametrize(
    ("field", "value"),
    [("energy", 0.0), ("energy", 1.5), ("ratio", 0.0), ("ratio", 1.0), ("align", 0), ("guard", 1.1), ("min_width", 0)],
)
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        LowRank(**{field: value})


# Rules, and what is said of them


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"energy": 0.8, "ratio": 0.5}, "energy=0.8 and ratio=0.5 both choose the ranks; give one of them"),
        ({"to": "0.5x-params", "ratio": 0.5}, "to=0.5x-params and ratio=0.5 both choose the ranks; give one of them"),
        ({"to": "0.5x-params", "energy": 0.8}, "to=0.5x-params and energy=0.8 both choose the ranks; give one of them"),
        ({"select": "greedy"}, "select=greedy shares a budget, and there is none; give --to, as 0.7x-latency"),
        ({"to": "half"}, "'half' is no goal; give the share kept, as in 0.6x-latency"),
        ({"to": "1.5x-macs"}, "'1.5x-macs': the share kept must lie between 0 and 1; 0.5x-macs leaves half of it"),
    ],
)
def test_rules_that_contradict_each_other_are_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_pass(LowRank, fields)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        LowRank(),
        LowRank(energy=0.8, conv="none", skip=("stages.*", "head")),
        LowRank(ratio=0.5, objective="activation", repair="norms", conv="spatial", align=1, guard=1.0),
        LowRank(to="2.5MB", select="gated", gate_epochs=2, gate_lr=0.1, memory_gb=0.5),
    ],
)
def test_a_configuration_comes_back_from_json(step: LowRank) -> None:
    assert LowRank(**json.loads(json.dumps(step.model_dump(mode="json")))) == step


@pytest.mark.parametrize(
    ("step", "reads"),
    [
        (LowRank(), True),
        (LowRank(**BLIND), False),
        (LowRank(objective="plain"), True),
        (LowRank(repair="none"), True),
        (LowRank(to="0.5x-params", select="gated", **BLIND), True),
        (LowRank(to="0.5x-params", select="energy", **BLIND), False),
    ],
)
def test_calibration_images_are_read_by_whatever_looks_at_them(step: LowRank, reads: bool) -> None:
    assert step.reads == ({"calib"} if reads else set())
    if reads:
        with pytest.raises(DataError, match=r"^step 1 'low-rank' reads the split 'calib', which the data lacks; give"):
            Pipeline((step,)).check(artifact("vit"), Context())
    else:
        Pipeline((step,)).check(artifact("vit"), Context())


@pytest.mark.parametrize("fields", [{}, {"objective": "plain"}, {"repair": "none"}, {"repair": "outputs"}])
def test_without_calibration_images_the_error_says_what_needs_none(fields: dict[str, Any]) -> None:
    said = "there are no calibration images; give data with a training split, or objective plain and repair none, which"
    with pytest.raises(PassError, match=f"^low-rank: {said} look at no image$"):
        LowRank(ratio=0.5, align=2, min_width=WIDE, **fields)(artifact("vit"))


def test_energy_that_no_rank_that_pays_reaches_leaves_a_layer_dense(digits: Data) -> None:
    # Losses of this objective are worked out up to break-even only; 0.999 lies far beyond it for random weights.
    step = LowRank(energy=0.999, objective="activation", repair="none", align=8, min_width=WIDE)
    with pytest.raises(PassError, match="its rank would not pay"):
        step(artifact("vit"), Context(data=digits))


# Convolutions


@pytest.mark.parametrize("conv", ["best", "channel", "spatial", "none"])
def test_conv_says_how_convolutions_become_two(conv: Any, digits: Data) -> None:
    given = artifact("resnet")
    step = LowRank(ratio=0.5, align=2, min_width=WIDE, conv=conv, repair="none")
    after = step(given, Context(data=digits))
    plan: Any = after.history[-1].plan
    model = given.model()
    kernels = {
        name: chosen
        for name, chosen in plan["layers"].items()
        if isinstance(layer := model.get_submodule(name), nn.Conv2d) and layer.kernel_size != (1, 1)
    }
    assert {chosen["scheme"] for name, chosen in plan["layers"].items() if name not in kernels} == {"channel"}
    if conv == "none":
        assert not kernels
        assert plan["dense"]["layer3.0.conv2"] == "conv is none"
    elif conv == "best":
        assert {chosen["scheme"] for chosen in kernels.values()} <= {"channel", "spatial"}
    else:
        assert {chosen["scheme"] for chosen in kernels.values()} == {conv}


def test_the_best_scheme_loses_no_more_than_either(digits: Data) -> None:
    def losses(conv: Any) -> dict[str, float]:
        step = LowRank(ratio=0.5, align=2, min_width=WIDE, conv=conv, repair="none")
        plan: Any = step(artifact("resnet"), Context(data=digits)).history[-1].plan
        return {name: chosen["loss"] for name, chosen in plan["layers"].items()}

    best, channel, spatial = losses("best"), losses("channel"), losses("spatial")
    assert best == {name: min(channel[name], spatial[name]) for name in best}
    assert any(best[name] < channel[name] for name in best)


def test_conv_none_leaves_grouped_kernels_too() -> None:
    class Grouped(Net):
        def __init__(self, num_classes: int) -> None:
            super().__init__(num_classes)
            self.grouped = nn.Conv2d(96, 96, 3, padding=1, groups=2)

    chosen = Backbone(name="unused", num_classes=64, input=Preprocessing(size=SIZE))
    step = LowRank(ratio=0.5, min_width=48, conv="none", **BLIND)
    plan: Any = step.plan(Grouped(10).eval(), Context(backbone=chosen))
    assert plan["dense"]["grouped"] == "conv is none"


# What is kept, with calibration images


def factored_with(digits: Data, **fields: Any) -> Artifact:
    return LowRank(ratio=0.5, align=2, min_width=WIDE, **fields)(artifact("vit"), Context(data=digits))


def layer_errors(after: Artifact, digits: Data) -> dict[str, Tensor]:
    """Of every factored layer: its outputs less those of the dense layer, for the inputs of the dense network."""
    given = artifact("vit")
    model, dense = after.model(), given.model()
    plan: Any = after.history[-1].plan
    inputs: dict[str, Tensor] = {}
    hooks = [
        dense.get_submodule(name).register_forward_pre_hook(lambda _m, x, name=name: inputs.update({name: x[0]}))
        for name in plan["layers"]
    ]
    images = torch.cat([images for images, _ in digits.eval_batches("calib", given.backbone.input, batch_size=32)])
    with torch.inference_mode():
        dense(images)
        for hook in hooks:
            hook.remove()
        return {
            name: (model.get_submodule(name)(x) - dense.get_submodule(name)(x)).double().flatten(0, -2)
            for name, x in inputs.items()
        }


def test_weighing_by_the_inputs_loses_less_of_every_output_than_the_plain_svd(digits: Data) -> None:
    whitened, plain = (
        layer_errors(factored_with(digits, repair="none", objective=objective), digits)
        for objective in ("whitened", "plain")
    )
    assert len(whitened) == 8
    for name, error in whitened.items():
        # At the same rank, all centred, as the bias can be set.
        other = plain[name] - plain[name].mean(0)
        assert error.square().sum() < other.square().sum(), name


def test_the_bias_makes_up_for_what_is_lost_on_average(digits: Data) -> None:
    for name, error in layer_errors(factored_with(digits, repair="none"), digits).items():
        # fp32 sums of about a hundred products.
        assert error.mean(0).abs().max() < 1e-5 * max(1.0, float(error.abs().max())), name
        assert error.abs().max() > 0.01, name


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_repair_brings_the_outputs_nearer_on_images_it_has_not_seen(network: str, digits: Data) -> None:
    given = artifact(network)
    images, _ = next(digits.eval_batches("val", given.backbone.input, batch_size=64))

    def distance(repair: Any) -> float:
        step = LowRank(ratio=0.5, align=2, min_width=WIDE, repair=repair)
        with torch.inference_mode():
            outputs = step(given, Context(data=digits)).model()(images) - given.model()(images)
        return float(outputs.square().mean())

    unrepaired = distance("none")
    assert distance("both") < unrepaired
    assert distance("outputs") < unrepaired
    if network == "resnet":
        assert distance("norms") < unrepaired


def test_repair_is_written_into_the_history(digits: Data) -> None:
    figures: Any = factored_with(digits).history[-1].metrics
    assert (figures["refit"], figures["norms"], figures["images"]) == (8, 0, 64)
    assert figures["error_after"] < figures["error_before"]
    assert factored_with(digits, repair="none").history[-1].metrics == {}
    assert factored_with(digits, repair="norms").history[-1].metrics["refit"] == 0


@pytest.mark.parametrize("objective", ["plain", "activation", "whitened"])
def test_smaller_ranks_are_the_first_components_of_larger_ones(objective: Any, digits: Data) -> None:
    """So that one saved artifact holds all smaller ranks of each layer."""
    context = Context(data=digits)
    large, small = (
        LowRank(ratio=ratio, align=2, min_width=WIDE, objective=objective, repair="none")(artifact("vit"), context)
        for ratio in (0.8, 0.4)
    )
    plan: Any = small.history[-1].plan
    one, other = large.model(), small.model()
    for name, chosen in plan["layers"].items():
        pair, expected = (cast(nn.Sequential, model.get_submodule(name)) for model in (one, other))
        found = schemes.truncated(pair, chosen["rank"])
        for part in (0, 1):
            assert torch.equal(found[part].weight, expected[part].weight)  # type: ignore[arg-type]
        # The bias makes up for what this rank leaves out, where the images were looked at.
        assert torch.equal(found[1].bias, expected[1].bias) == (objective == "plain")  # type: ignore[arg-type]


SCRIPT = """\
import sys
from slim.contract import Context
from slim.data import open_data
from slim.distributed import join, rank
from slim.passes.low_rank import LowRank
from tests.contract.zoo import WIDE, artifact
import torch

context = Context(data=open_data("digits", limit_train=64, limit_val=64, calib=64))
after = LowRank(ratio=0.5, align=2, min_width=WIDE)(artifact("vit"), context)
open(sys.argv[1] + f"/{rank()}", "w").write(after.digest)
"""


def test_two_processes_make_what_one_makes(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    said = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert said.returncode == 0, said.stderr
    assert {(tmp_path / place).read_text() for place in "01"} == {factored_with(digits).digest}


def test_version_1_is_read_as_what_it_was() -> None:
    config, plan = {"ratio": 0.5, "min_width": 64}, {"layers": {"wide": {"rank": 8}}, "dense": {"head": "classifier"}}
    found = LowRank.migrate(1, config, plan)  # type: ignore[arg-type]
    assert found is not None
    assert LowRank(**found[0]) == LowRank(ratio=0.5, min_width=64, conv="none", **BLIND)
    assert found[1] == {"layers": {"wide": {"rank": 8, "scheme": "channel"}}, "dense": {"head": "classifier"}}
    assert LowRank.migrate(0, config, plan) is None  # type: ignore[arg-type]
