"""A latency table of a network that is not elastic: what `prune` and `low-rank` read off it, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from slim import costs, store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.bench import latency
from slim.bench.measure import TargetMeter
from slim.contract import Context, Loading, Pass
from slim.data import open_data
from slim.errors import PassError, RecipeError, StoreError
from slim.export.target import Target
from slim.goal import parse_goal
from slim.measurement import Measurement
from slim.passes.elastic import terms
from slim.passes.elastic.dense import Dense, structure
from slim.passes.elastic.latency import LatencyModel, Rates
from slim.passes.elastic.space import Subnet
from slim.passes.elastic.subnets import drawn
from slim.passes.elastic.table import Origin, as_table
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.low_rank.candidates import candidates
from slim.passes.low_rank.offers import TIMED_RANKS, offers, predicted
from slim.passes.low_rank.ways import Way, ways_of
from slim.passes.prune import Prune
from slim.passes.prune import prices as pricing
from slim.passes.prune.groups import groups_of
from slim.passes.prune.prices import Prices, Product, Side
from slim.passes.reach import TOLERANCE
from slim.recipe import build_pass
from slim.runs import step_key
from tests.contract.zoo import SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

NOWHERE = Origin("0123456789ab", "ort:cpu", "f" * 64)


def made(hidden: int = 128, values: int = 1) -> Artifact:
    """16 tokens through two layers of 64 and `hidden` units, and one that is too narrow to be two."""
    name, kwargs = "tests.passes.prune.toys:Wide", {"width": 64, "hidden": hidden, "out": 64}
    chosen = Backbone(name=name, kwargs=kwargs, num_classes=10, input=Preprocessing(size=SIZE, crop=1.0))
    return Artifact.of(chosen.build(seed=values, trust=True), chosen, trust=True)


def dense(given: Artifact) -> Dense:
    return Dense.of(given.model(), Context(backbone=given.backbone))


# By hand

STEM, UP, DOWN, HEAD = 16 * 64 * 3 * 64, 16 * 128 * 64, 16 * 64 * 128, 10 * 64
"""Multiply-accumulates of the layers of what is `made`."""
MACS = STEM + UP + DOWN + HEAD
TERMS = {
    **{"width stem": 0.5, "width up": 1.0, "width down": 0.25},
    **{"rank up": 0.3, "rank down": 0.2, "pairs": 0.1, "macs": 2.0, "constant": 0.7},
}
"""ms."""


def known(given: Artifact, theta: dict[str, float] | None = None) -> LatencyModel:
    """A model of what is `made` with these terms; none: the line of the multiply-accumulates, with 2.0 and 0.7."""
    one = dense(given)
    named = {f"width {dim.group.name}": one.terms.widths[dim.group.name] for dim in one.space.dims}
    named |= {f"rank {rank.layer}": one.terms.ranks[rank.layer] for rank in one.space.ranks}
    named |= {name: name for name in ("pairs", "macs", "constant")}
    assert sorted(named.values()) == sorted(one.terms.names)
    ms = {term: (theta or {"macs": 2.0, "constant": 0.7}).get(name, 0.0) for name, term in named.items()}
    form: Any = "terms" if theta else "macs"
    return LatencyModel(one.terms, tuple(ms[name] for name in one.terms.names), form, {}, (), NOWHERE)


def priced(rates: Rates, given: Artifact) -> Prices:
    model = given.model()
    groups, _ = groups_of(model, SIZE)
    assert [group.name for group in groups] == ["stem", "up", "down"]
    return pricing.predicted(rates, model, groups, SIZE)


def layers_of(model: nn.Module, min_width: int) -> list[Way]:
    found, _ = candidates(model, SIZE, min_width=min_width)
    return [way for one in found for way in ways_of(one, "plain", None, ("channel", "spatial"))]


def test_the_space_is_what_can_be_narrower_or_thinner_whatever_its_values() -> None:
    space = dense(made()).space
    assert [(dim.group.name, dim.choices) for dim in space.dims] == [
        ("stem", (64, 48, 32, 16)),
        ("up", (128, 96, 64, 32)),
        ("down", (64, 48, 32, 16)),
    ]
    # Two layers of rank 42.67 have as many weights as one of 64 times 128.
    assert [(rank.layer, rank.choices) for rank in space.ranks] == [("up", (0, 32, 16, 8)), ("down", (0, 32, 16, 8))]
    assert (space.blocks, space.pixels) == ((), (0,))


def test_the_rates_are_those_of_the_terms() -> None:
    rates = known(made(), TERMS).rates
    assert rates.whole == pytest.approx(0.5 + 1.0 + 0.25 + 0.3 + 0.2 + 2.0 + 0.7)
    assert rates.widths == {"stem": 0.5, "up": 1.0, "down": 0.25}
    assert rates.ranks == {"up": 0.3, "down": 0.2}
    assert (rates.pair, rates.mac) == (0.1, 2.0 / MACS)


def test_widths_cost_their_share_of_a_term_and_their_operations() -> None:
    given = made()
    found = priced(known(given, TERMS).rates, given)
    # 32, 64 and 48 units stay of 64, 128 and 64.
    macs = 16 * 32 * 3 * 64 + 16 * 64 * 32 + 16 * 48 * 64 + 10 * 48
    assert found.cost([32, 64, 16]) == pytest.approx(
        0.5 / 2 + 1.0 / 2 + 0.25 * 3 / 4 + 0.3 + 0.2 + 2.0 * macs / MACS + 0.7, rel=1e-12
    )
    assert found.fixed == pytest.approx(0.3 + 0.2 + 0.7, rel=1e-12)  # every layer has a width in it that may go
    assert Product((Side(128, {1: 1}),), 1.0 / 128) in found.parts
    assert len(found.parts) == 4 + 3


def test_by_a_line_of_the_operations_nothing_else_costs() -> None:
    given = made()
    rates = known(given).rates
    found = priced(rates, given)
    assert len(found.parts) == 4
    assert found.fixed == pytest.approx(0.7, rel=1e-12)
    macs = 16 * 32 * 3 * 64 + UP // 2 + DOWN + HEAD
    assert found.cost([32, 0, 0]) == pytest.approx(0.7 + 2.0 * macs / MACS, rel=1e-12)
    up = layers_of(given.model(), 64)[0]
    assert up.candidate.name == "up"
    assert predicted(rates, up) == pytest.approx(2.0 * UP / MACS, rel=1e-12)
    assert predicted(rates, up, 16) == pytest.approx(2.0 * 16 * 16 * (64 + 128) / MACS, rel=1e-12)


def test_a_group_that_is_no_width_of_the_table_costs_its_operations() -> None:
    given = made()
    rates = known(given, TERMS).rates
    found = priced(replace(rates, widths={"up": 1.0}), given)
    saved = found.cost([0, 0, 0]) - found.cost([0, 0, 32])
    assert saved == pytest.approx(2.0 * (DOWN + HEAD) / 2 / MACS, rel=1e-9)
    assert found.cost([0, 0, 0]) == pytest.approx(rates.whole, rel=1e-12)


def test_two_layers_cost_their_share_of_a_term_one_layer_more_and_their_operations() -> None:
    given = made()
    rates = known(given, TERMS).rates
    up, down = layers_of(given.model(), 64)
    share = 16 * (64 + 128) / (64 * 128)
    assert predicted(rates, up) == pytest.approx(0.3 + 2.0 * UP / MACS, rel=1e-12)
    assert predicted(rates, up, 16) == pytest.approx(0.3 * share + 0.1 + 2.0 * UP * share / MACS, rel=1e-12)
    assert predicted(rates, down, 16) == pytest.approx(0.2 * share + 0.1 + 2.0 * DOWN * share / MACS, rel=1e-12)
    # The head is no rank of the table.
    lost = replace(rates, ranks={"down": 0.2})
    assert predicted(lost, up, 16) == pytest.approx(2.0 * UP * share / MACS, rel=1e-12)
    assert predicted(lost, up) == pytest.approx(2.0 * UP / MACS, rel=1e-12)


def test_every_rank_is_offered_at_what_is_predicted_and_nothing_is_said_to_be_timed() -> None:
    given = made()
    rates = known(given, TERMS).rates
    ways = layers_of(given.model(), 64)
    found = offers(parse_goal("4ms"), [[way] for way in ways], rule="knapsack", align=2, guard=1.0, rates=rates)
    for way, picks, options in zip(ways, found.picks, found.options, strict=True):
        assert [one.rank for one in options] == [0, *range(2, 43, 2)]
        assert len(options) > 1 + TIMED_RANKS
        assert [one.cost for one in options] == [predicted(rates, way, one.rank) for one in options]
        assert all(pick is None or (pick.ms, pick.dense_ms) == (None, None) for pick in picks)


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext", "mixer"])
def test_narrower_and_thinner_networks_cost_what_the_model_predicts_of_them(name: str) -> None:
    given = artifact(name)
    one = dense(given)
    draw = Random(0)
    theta = tuple(draw.random() for _ in one.terms.names)
    model = LatencyModel(one.terms, theta, "terms", {}, (), NOWHERE)
    groups = [dim.group for dim in one.space.dims]
    found = pricing.predicted(model.rates, one.model, groups, SIZE)
    largest = one.space.largest
    for _ in range(5):
        subnet = replace(drawn(one.space, draw), ranks=largest.ranks)
        gone = [group.units - units for group, units in zip(groups, subnet.units, strict=True)]
        assert found.cost(gone) == pytest.approx(model.predict(subnet), rel=1e-9)


def test_ranks_cost_what_the_model_predicts_of_the_whole() -> None:
    given = made()
    model = known(given, TERMS)
    up, down = layers_of(given.model(), 64)
    for ranks in ((8, 0), (0, 32), (16, 8)):
        whole = model.predict(Subnet(model.terms.space.largest.units, (), ranks))
        saved = sum(
            predicted(model.rates, way) - predicted(model.rates, way, rank)
            for way, rank in zip((up, down), ranks, strict=True)
        )
        assert model.rates.whole - saved == pytest.approx(whole, rel=1e-9)


# What a table is of


def test_the_structure_is_the_same_whatever_the_values_and_another_where_anything_else_is() -> None:
    given = made()

    def of(one: Artifact) -> str:
        return structure(one.model(), one.backbone)

    assert of(given) == of(made(values=2)) == dense(given).digest
    smaller = given.backbone.model_copy(update={"input": Preprocessing(size=(3, 24, 24), crop=1.0)})
    others = {
        of(given),
        of(made(hidden=96)),
        structure(given.model(), smaller),
        structure(given.model().half(), given.backbone),
        of(LowRank(ratio=0.5, objective="plain", repair="none")(given)),
    }
    assert len(others) == 5


def test_a_network_of_which_nothing_can_be_smaller_has_no_table() -> None:
    chosen = Backbone(name="unused", num_classes=4, input=Preprocessing(size=SIZE))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval()
    with pytest.raises(PassError) as caught:
        Dense.of(model, Context(backbone=chosen))
    assert str(caught.value) == (
        "latency table: 0 widths and 0 ranks of 'unused' can be smaller, too few for a model of latency; give passes "
        "no table, and they time layers alone"
    )


@pytest.mark.parametrize(
    ("step", "settings", "said"),
    [
        (Prune, {"ratio": 0.5}, "table=t.json is of milliseconds, and ratio=0.5 is not; give --to 0.6x-latency"),
        (Prune, {"to": "0.5x-macs"}, "table=t.json is of milliseconds, and to=0.5x-macs is not"),
        (Prune, {"to": "sparsified"}, "table=t.json is of milliseconds, and to=sparsified is not"),
        (LowRank, {}, "table=t.json is of milliseconds, and there is no budget; give --to, as 0.7x-latency"),
        (LowRank, {"to": "0.5x-size"}, "table=t.json is of milliseconds, and the budget is not; give --to, as"),
    ],
)
def test_a_table_is_refused_where_no_milliseconds_are_asked_for(step: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError):
        step(**settings, table="t.json")
    with pytest.raises(RecipeError) as caught:
        build_pass(step, {**settings, "table": "t.json"})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# Measured


QUICK = latency.Protocol(sessions=3, rounds=6, calls=2, warm_up=1, max_rounds=24)
WHERE = "ort:cpu,threads=1,batch=8"
STEPS = {
    "prune": Prune(to="0.8x-latency", criterion="group-l2", repair="none"),
    "low-rank": LowRank(to="0.8x-latency", objective="plain", repair="none"),
}


class WholeOnly(TargetMeter):
    """A real meter that times no single layer."""

    def table(self, modules: Sequence[tuple[nn.Module, tuple[int, ...]]]) -> list[Measurement]:
        raise AssertionError(f"{len(modules)} single layers were timed")


@pytest.fixture(scope="module")
def given() -> Artifact:
    return made(hidden=1024)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Short measurements, of few networks."""
    real, once, turns = latency.compare, latency.latency, latency.beside
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "compare", lambda *files, **options: real(*files, **options, protocol=QUICK))
        patch.setattr(latency, "latency", lambda *files, **options: once(*files, **options, protocol=QUICK))
        patch.setattr(latency, "beside", lambda *files, **options: turns(*files, **options, protocol=QUICK))
        for name, value in (("LEAST_ROWS", 6), ("ROWS_PER_TERM", 0.0), ("HELD_OUT", 2)):
            patch.setattr(terms, name, value)
        yield


@pytest.fixture(scope="module")
def built(call: Any, quick: None, given: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The table that `slim table build` makes, and what it says."""
    folder = store.save(given, tmp_path_factory.mktemp("dense") / "artifact")
    out = folder.parent / "table.json"
    said = call("table", "build", folder, "--trust", "--target", WHERE, "--out", out)
    assert said.code == 0, said.err
    return out, said.out


@pytest.fixture(scope="module")
def context(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(meter=WholeOnly(Target.parse(WHERE), None, tmp_path_factory.mktemp("exported")))


@pytest.fixture(scope="module")
def trained(given: Artifact) -> Artifact:
    """What its table was not built with."""
    learning = Context(data=open_data("digits", limit_train=32, limit_val=16), loading=Loading(batch_size=16))
    after = Finetune(epochs=1, lr=1e-2, flip=0.0, precision="fp32")(given, learning)
    assert after.weights != given.weights
    return after


def with_table(name: str, path: Path, **settings: Any) -> Pass:
    return STEPS[name].model_copy(update={"table": str(path), **settings})


def test_the_command_builds_the_table_of_a_network_that_is_not_elastic(
    call: Any, built: tuple[Path, str], given: Artifact
) -> None:
    path, said = built
    data = json.loads(path.read_text())
    assert data["network"] == structure(given.model(), given.backbone)
    assert len(data["rows"]) == 8
    assert sum(row["held_out"] for row in data["rows"]) == 2
    assert {"widths", "ranks", "whole", "pair", "mac"} == data["rates"].keys()
    assert data["rates"]["widths"].keys() == {"stem", "up", "down"}
    assert said.startswith(f"measured  8 subnets on {data['target']}, ")
    again = call("table", "build", path.parent / "artifact", "--trust", "--target", WHERE, "--out", path)
    assert again.out.splitlines()[-1] == f"table     {path}, finished before and kept; --again measures again"


@pytest.mark.parametrize("name", STEPS)
def test_a_network_trained_since_reaches_its_budget_and_no_layer_is_timed_alone(
    name: str, built: tuple[Path, str], trained: Artifact, context: Context
) -> None:
    meter = context.meter
    assert meter is not None
    after = with_table(name, built[0])(trained, context)
    plan: Any = after.history[-1].plan
    budget = plan["budget"]
    assert (budget["unit"], budget["before"]) == ("ms", round(meter.latency(trained).value, 6))
    assert budget["limit"] == pytest.approx(0.8 * budget["before"], abs=1e-6)
    assert budget["low"] <= TOLERANCE * budget["limit"]
    assert after.costs["macs"] < trained.costs["macs"]
    # Another measurement of what was made; the margin is wide, the machine may be busy.
    assert meter.compare(after, trained).value < 0.95
    assert all("ms" not in entry for entry in plan.get("layers", {}).values())
    with pytest.raises(AssertionError, match="single layers were timed"):
        STEPS[name](trained, context)


@pytest.mark.parametrize("name", STEPS)
def test_the_table_of_something_else_is_refused_in_one_line(
    name: str, built: tuple[Path, str], given: Artifact, context: Context, tmp_path: Path
) -> None:
    data = json.loads(built[0].read_text())
    here = {key: data[key] for key in ("device", "target", "network")}
    other = tmp_path / "other.json"
    for what, there in (("device", "ba9876543210"), ("target", "ort:cpu,threads=2"), ("network", "0" * 64)):
        other.write_text(json.dumps({**data, what: there}))
        with pytest.raises(StoreError) as caught:
            with_table(name, other)(given, context)
        said = f"latency table: it was measured for {what} {there!r}, not {here[what]!r}; measure again"
        assert str(caught.value) == said
    narrower = made(hidden=512)
    with pytest.raises(StoreError, match=r"^latency table: it was measured for network '.*', not '.*'; measure again$"):
        with_table(name, built[0])(narrower, context)
    other.write_text(json.dumps(as_table(Origin(**here), ())))
    with pytest.raises(StoreError, match="it is not finished"):
        with_table(name, other)(given, context)
    with pytest.raises(StoreError, match=r"no\.json: no latency table \(.*\); make it by slim table build$"):
        with_table(name, tmp_path / "no.json")(given, context)
    with pytest.raises(PassError, match=rf"^{name}: --to 0\.8x-latency is measured on the exported file; give a tar"):
        with_table(name, built[0])(given, replace(context, meter=None))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_done_with_another_table_is_not_taken_for_this_one(
    name: str, built: tuple[Path, str], given: Artifact, context: Context, tmp_path: Path
) -> None:
    path, data = tmp_path / "table.json", json.loads(built[0].read_text())
    path.write_text(json.dumps(data))
    first = step_key(with_table(name, path), given, given, context)
    path.write_text(json.dumps(data, indent=1))
    assert step_key(with_table(name, path), given, given, context) == first
    path.write_text(json.dumps({**data, "rates": {**data["rates"], "pair": 1.0}}))
    assert step_key(with_table(name, path), given, given, context) != first
    assert "table" not in step_key(STEPS[name], given, given, context)


def test_the_rates_come_back_as_they_were_written(built: tuple[Path, str], given: Artifact) -> None:
    data = json.loads(built[0].read_text())
    origin = Origin(*(data[key] for key in ("device", "target", "network")))
    model = LatencyModel.from_json(data, dense(given).terms, origin)
    assert Rates.from_json(data, origin) == model.rates
    assert model.rates.whole == pytest.approx(model.predict(model.terms.space.largest))
    assert model.rates.mac * costs.count_macs(given.model(), SIZE) == pytest.approx(data["terms"]["macs"])
