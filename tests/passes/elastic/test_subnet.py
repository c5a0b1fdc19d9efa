"""A subnet cut out under a budget: that it keeps to it, that nothing elastic is left of it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from slim import store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.bench import latency
from slim.bench.measure import TargetMeter
from slim.contract import Advance, Context, Loading
from slim.data import Data, open_data
from slim.errors import OrderError, PassError, RecipeError
from slim.export.target import Target
from slim.passes.elastic import BestSubnet, Elastic
from slim.passes.elastic.gates import gated
from slim.passes.elastic.space import Space
from slim.passes.elastic.subnets import from_json
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.prune import Prune
from slim.passes.reach import TOLERANCE
from slim.pipeline import Pipeline
from slim.recipe import build_pass
from tests.contract.zoo import BLIND, SIZE, WIDE, artifact
from tests.passes.elastic.families import images, off

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

UNTRAINED = Elastic(epochs=0, widths=(0.5,), align=2, floor=2, held_out=16, criterion="group-l2")
FEW: dict[str, Any] = {"evaluations": 4, "proposals": 40}


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=48, limit_val=16, calib=32)


@pytest.fixture(scope="module")
def context(digits: Data) -> Context:
    return Context(data=digits, loading=Loading(batch_size=16))


@pytest.fixture(scope="module")
def elastic(context: Context) -> dict[str, Artifact]:
    """Networks that can be cut, of which nothing was trained."""
    return {name: UNTRAINED(artifact(name), context) for name in ("resnet", "convnext", "vit", "mixer")}


def space_of(made: Artifact, step: Elastic = UNTRAINED) -> Space:
    (plan,) = (one.plan for one in made.history if one.name == "elastic")
    return step.space_of(made.model(), made.backbone.input.size, plan)


def plan_of(made: Artifact) -> Any:
    return made.history[-1].plan


# Budgets that are counted


@pytest.mark.parametrize(
    ("name", "to", "limit"),
    [
        ("resnet", "0.9x-params", 0.9),
        ("convnext", "400k-macs", 400e3),
        ("vit", "0.6x-params", 0.6),
        ("vit", "30k-params", 30e3),
        ("mixer", "0.8x-macs", 0.8),
    ],
)
def test_what_is_counted_is_predicted_exactly_and_never_above_the_limit(
    name: str, to: str, limit: float, elastic: dict[str, Artifact], context: Context
) -> None:
    given, metric = elastic[name], to.rpartition("-")[2]
    after = BestSubnet(to=to, **FEW)(given, context)
    limit = limit * given.costs[metric] if limit < 1 else limit
    budget = plan_of(after)["budget"]
    assert (budget["to"], budget["unit"], budget["over"]) == (to, metric, 0)
    assert (budget["before"], budget["limit"]) == (given.costs[metric], pytest.approx(limit))
    assert after.costs[metric] == budget["predicted"] == budget["achieved"] == budget["low"] == budget["high"]
    assert after.costs[metric] <= limit
    # Of all that were evaluated within the limit none is better.
    front, chosen = plan_of(after)["search"]["front"], plan_of(after)["subnet"]
    best = max((one for one in front if one["cost"] <= limit), key=lambda one: one["top1"])
    assert {key: best[key] for key in ("units", "on", "ranks", "pixels")} == chosen
    assert space_of(given).allows(from_json(chosen))


def test_a_budget_of_bytes_is_one_of_the_file(elastic: dict[str, Artifact], context: Context, tmp_path: Path) -> None:
    given = elastic["vit"]
    meter = TargetMeter(Target.parse("ort:cpu,threads=1"), context.data, tmp_path)
    after = BestSubnet(to="0.85x-size", **FEW)(given, replace(context, meter=meter))
    budget = plan_of(after)["budget"]
    assert (budget["unit"], budget["before"]) == ("bytes", meter.size(given).value)
    assert meter.size(after).value == budget["achieved"] <= budget["limit"]
    assert budget["limit"] == pytest.approx(0.85 * meter.size(given).value)
    meter.parity(after)  # raises where it lies outside the tolerance


@pytest.mark.parametrize("to", ["0.001x-macs", "10-params"])
def test_a_budget_below_the_smallest_subnet_is_an_error_that_says_what_can_be_reached(
    to: str, elastic: dict[str, Artifact], context: Context
) -> None:
    given, metric = elastic["vit"], to.rpartition("-")[2]
    cheapest = BestSubnet(to=f"0.9x-{metric}", **FEW)(given, context)
    space = space_of(given)
    assert from_json(plan_of(cheapest)["search"]["front"][0]) == space.canonical(space.smallest)
    least = plan_of(cheapest)["search"]["front"][0]["cost"]
    with pytest.raises(PassError) as caught:
        BestSubnet(to=to, **FEW)(given, context)
    limit = 0.001 * given.costs["macs"] if metric == "macs" else 10
    assert str(caught.value) == (
        f"subnet: --to {to} cannot be reached: the smallest subnets give {least:.4g} {metric} of "
        f"{given.costs[metric]:.4g}, asked were {limit:.4g}; raise it, or make more elastic: smaller widths, less depth"
    )


@pytest.mark.parametrize(("name", "to"), [("mixer", "1G-params"), ("vit", "1G-macs")])
def test_a_budget_that_the_whole_network_meets_is_an_error(
    name: str, to: str, elastic: dict[str, Artifact], context: Context
) -> None:
    with pytest.raises(PassError) as caught:
        BestSubnet(to=to, **FEW)(elastic[name], context)
    assert str(caught.value) == f"subnet: --to {to}: the whole network meets it; ask for less"


# Budgets that are measured


QUICK = latency.Protocol(sessions=3, rounds=6, calls=2, warm_up=1, max_rounds=24)


@pytest.fixture(scope="module")
def timed(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One elastic width, so that few networks are measured, and a context whose real meter is quick."""
    chosen = Backbone(name="tests.passes.prune.toys:Wide", num_classes=10, input=Preprocessing(size=SIZE, crop=1.0))
    step = UNTRAINED.model_copy(update={"widths": (0.75, 0.5, 0.25), "align": 8, "skip": ("stem", "down")})
    made = step(Artifact.of(chosen.build(seed=1, trust=True), chosen, trust=True), context)
    assert [dim.choices for dim in space_of(made, step).dims] == [(1024, 768, 512, 256)]
    real, once, turns = latency.compare, latency.latency, latency.beside
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "compare", lambda *files, **options: real(*files, **options, protocol=QUICK))
        patch.setattr(latency, "latency", lambda *files, **options: once(*files, **options, protocol=QUICK))
        patch.setattr(latency, "beside", lambda *files, **options: turns(*files, **options, protocol=QUICK))
        target = Target.parse("ort:cpu,threads=1,batch=8")
        meter = TargetMeter(target, None, tmp_path_factory.mktemp("exported"))
        yield made, replace(context, meter=meter)


def test_a_share_of_the_latency_is_reached_on_the_target(timed: tuple[Artifact, Context]) -> None:
    given, context = timed
    after = BestSubnet(to="0.8x-latency", evaluations=2, proposals=10)(given, context)
    budget, search = plan_of(after)["budget"], plan_of(after)["search"]
    meter = context.meter
    assert meter is not None
    assert (budget["unit"], budget["before"]) == ("ms", round(meter.latency(given).value, 6))
    assert budget["limit"] == pytest.approx(0.8 * budget["before"], abs=1e-6)
    assert budget["low"] <= TOLERANCE * budget["limit"]
    assert 1 <= len(budget["attempts"]) <= 5
    assert search["target"] == meter.target
    assert "% off on 1 networks held out" in search["latency"]
    # Another measurement of what was made; the margin is wide, the machine may be busy.
    assert meter.compare(after, given).value < 0.95
    assert after.model().get_submodule("up").out_features in (256, 512, 768)


def test_milliseconds_that_the_whole_network_keeps_to_are_an_error_before_any_subnet_is_timed(
    timed: tuple[Artifact, Context],
) -> None:
    given, context = timed
    begun: list[str] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Advance]:
        begun.append(title)
        yield lambda steps, note="": None

    with pytest.raises(PassError) as caught:
        BestSubnet(to="10000ms")(given, replace(context, progress=progress))
    assert str(caught.value) == "subnet: --to 10000ms: the whole network meets it; ask for less"
    assert begun == []


def test_a_share_far_too_small_is_an_error_that_names_the_way_out(timed: tuple[Artifact, Context]) -> None:
    given, context = timed
    with pytest.raises(PassError) as caught:
        BestSubnet(to="0.01x-latency", evaluations=2, proposals=10)(given, context)
    assert str(caught.value).startswith("subnet: --to 0.01x-latency cannot be reached: the smallest subnets give ")
    assert str(caught.value).endswith("; raise it, or make more elastic: smaller widths, less depth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", ["0.6x-latency", "4ms", "0.6x-size", "20kB"])
def test_what_is_measured_needs_a_target(to: str, elastic: dict[str, Artifact], context: Context) -> None:
    step = BestSubnet(to=to, **FEW)
    assert step.measures
    with pytest.raises(PassError, match=rf"^subnet: --to {to} is measured on the exported file; give a target, as ort"):
        step(elastic["vit"], context)


# What is cut out


@pytest.mark.parametrize("name", ["resnet", "convnext", "vit", "mixer"])
def test_what_is_cut_out_computes_what_the_gated_network_does_and_nothing_elastic_is_left(
    name: str, elastic: dict[str, Artifact], context: Context, tmp_path: Path
) -> None:
    given = elastic[name]
    after = BestSubnet(to="0.85x-macs", repair="none", **FEW)(given, context)
    space, chosen = space_of(given), from_json(plan_of(after)["subnet"])
    assert chosen != space.canonical(space.largest)
    model, whole = after.model(), given.model()
    with torch.no_grad(), gated(whole, space) as choose:
        choose(chosen)
        assert off(model(images()), whole(images())) <= 1e-5  # layers add up in another order once channels are gone
        choose(space.largest)
        assert off(model(images()), whole(images())) > 1e-3
    assert store.traits(after) == {"dense", "float"}
    kinds = {type(module) for module in given.model().modules()}
    for module in model.modules():
        assert type(module) in {*kinds, nn.Identity}
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert after.costs["params"] == sum(value.numel() for value in model.parameters()) < given.costs["params"]
    loaded = store.load(store.save(after, tmp_path / "saved"), trust=True)
    assert loaded.digest == after.digest
    with torch.no_grad():
        assert torch.equal(loaded.model()(images()), model(images()))


def test_the_exported_file_of_a_subnet_whose_norms_were_mended_computes_what_it_does(
    elastic: dict[str, Artifact], context: Context, tmp_path: Path
) -> None:
    after = BestSubnet(to="0.9x-macs", **FEW)(elastic["resnet"], context)
    assert int(str(after.history[-1].metrics["norms"])) == 17
    meter = TargetMeter(Target.parse("ort:cpu,threads=1"), context.data, tmp_path)
    meter.parity(after)  # raises where it lies outside the tolerance


def test_of_a_space_of_blocks_alone_blocks_alone_are_cut_out(context: Context) -> None:
    step = UNTRAINED.model_copy(update={"widths": (1.0,)})
    given = step(artifact("vit"), context)
    after = BestSubnet(to="0.8x-macs", **FEW)(given, context)
    plan = plan_of(after)
    (skipped,) = plan["skipped"]
    assert (plan["groups"], plan["keep"]) == ({}, {})
    assert isinstance(after.model().get_submodule(skipped), nn.Identity)
    kept = {key: value for key, value in given.state_dict().items() if not key.startswith(f"{skipped}.")}
    assert after.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[key]) for key, value in after.state_dict().items())


def test_the_same_seed_cuts_out_the_same_subnet(elastic: dict[str, Artifact], context: Context) -> None:
    step = BestSubnet(to="0.8x-macs", **FEW)
    first, again = (step(elastic["mixer"], replace(context, seed=3)) for _ in range(2))
    assert first.digest == again.digest
    assert first.history == again.history


def test_a_search_through_a_storage_is_not_done_twice(
    elastic: dict[str, Artifact], context: Context, tmp_path: Path
) -> None:
    step = BestSubnet(to="0.8x-macs", storage=f"sqlite:///{tmp_path / 'search.db'}", **FEW)
    kept, alone = step(elastic["vit"], context), BestSubnet(to="0.8x-macs", **FEW)(elastic["vit"], context)
    again = step(elastic["vit"], context)
    assert kept.weights == alone.weights == again.weights
    assert plan_of(kept)["search"] == plan_of(alone)["search"]
    assert plan_of(again)["search"]["front"] == plan_of(kept)["search"]["front"]


# Order


def test_without_a_supernet_there_is_nothing_to_cut(elastic: dict[str, Artifact], context: Context) -> None:
    step = BestSubnet(to="0.8x-macs", **FEW)
    with pytest.raises(OrderError, match="step 1 'subnet' needs a 'supernet' network, which no pass before gives; add"):
        Pipeline((step,)).check(artifact("vit"), context)
    with pytest.raises(OrderError, match="step 2 'subnet' needs a 'supernet' network, and step 1 'subnet' ends that"):
        Pipeline((step, step)).check(elastic["vit"], context)
    after = step(elastic["vit"], context)
    with pytest.raises(OrderError, match=r"and 'subnet' in its history ended that; start from an artifact before it$"):
        Pipeline((step,)).check(after, context)
    Pipeline((step, Finetune(), Prune(ratio=0.5))).check(elastic["vit"], context)


def test_another_structure_since_it_was_made_elastic_is_refused(elastic: dict[str, Artifact], context: Context) -> None:
    step = BestSubnet(to="0.8x-macs", **FEW)
    pairs = LowRank(ratio=0.5, align=2, min_width=WIDE, **BLIND)(elastic["vit"], context)
    with pytest.raises(PassError) as caught:
        step(pairs, context)
    assert str(caught.value).startswith("elastic: ")
    assert str(caught.value).endswith("; cut a subnet out before other passes change the structure")
    assert "\n" not in str(caught.value)


def test_other_images_than_were_held_out_are_told_of(
    elastic: dict[str, Artifact], context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    step = BestSubnet(to="0.8x-macs", **FEW)
    step(elastic["vit"], context)
    assert "held out" not in caplog.text
    step(elastic["vit"], replace(context, data=open_data("digits", limit_train=40, limit_val=16, calib=32)))
    assert "these are not the images that elastic held out" in caplog.text


def test_values_trained_since_are_those_of_the_subnet(elastic: dict[str, Artifact], context: Context) -> None:
    trained = Finetune(epochs=1, lr=1e-3, flip=0.0, precision="fp32")(elastic["vit"], context)
    after = BestSubnet(to="0.8x-macs", repair="none", **FEW)(trained, context)
    assert torch.equal(after.state_dict()["head.weight"], trained.state_dict()["head.weight"])
    assert not torch.equal(after.state_dict()["head.weight"], elastic["vit"].state_dict()["head.weight"])


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": "half"}, "'half' is no goal"),
        ({"to": "1.5x-macs"}, "between 0 and 1"),
        ({"to": "0.5x-macs", "evaluations": 0}, "greater than or equal to 1"),
        ({"to": "0.5x-macs", "proposals": 0}, "greater than or equal to 1"),
        ({"to": "0.5x-macs", "repair": "all"}, "'both', 'norms', 'outputs' or 'none'"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError):
        BestSubnet(**settings)
    with pytest.raises(RecipeError) as caught:
        build_pass(BestSubnet, settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
