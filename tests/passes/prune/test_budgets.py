"""Budgets: what is counted is met exactly, what is measured is measured on the exported network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slim.artifact import Artifact, Backbone, Preprocessing
from slim.bench import latency
from slim.bench.measure import TargetMeter
from slim.contract import Context
from slim.errors import PassError
from slim.export.target import Target
from slim.passes.prune import Prune
from slim.passes.reach import CLOSE, TOLERANCE
from tests.contract.zoo import SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")

UNSEEING: dict[str, Any] = {"criterion": "group-l2", "repair": "none"}
SMALL: dict[str, Any] = {"align": 2, "floor": 2, **UNSEEING}


def reached(given: Artifact, step: Prune, context: Context | None = None) -> tuple[Artifact, dict[str, Any], Any]:
    """The finished artifact, the figures of its budget, and its plan."""
    after = step(given, context)
    plan: Any = after.history[-1].plan
    return after, plan["budget"], plan


@pytest.mark.parametrize("ranking", [None, "local", "isomorphic", "erk", "magnitude"])
@pytest.mark.parametrize("to", ["0.7x-params", "0.7x-macs", "45k-params", "800k-macs"])
def test_what_is_counted_is_predicted_exactly_and_never_above_the_limit(to: str, ranking: Any) -> None:
    given = artifact("vit")
    metric = to.rpartition("-")[2]
    after, budget, _ = reached(given, Prune(to=to, ranking=ranking, **SMALL))
    limit = {"0.7x": 0.7 * given.costs[metric], "45k": 45e3, "800k": 800e3}[to.partition("-")[0]]
    assert (budget["to"], budget["ranking"], budget["unit"]) == (to, ranking or "global", metric)
    assert (budget["before"], budget["limit"]) == (given.costs[metric], pytest.approx(limit))
    assert after.costs[metric] == budget["predicted"] == budget["achieved"] == budget["low"] == budget["high"]
    assert 0.9 * limit < after.costs[metric] <= limit
    assert budget["over"] == 0


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "convnext", "mixer"])
def test_all_networks_keep_to_a_budget_of_their_operations(name: str) -> None:
    given = artifact(name)
    after, budget, _ = reached(given, Prune(to="0.6x-macs", scope="all", **SMALL))
    assert after.costs["macs"] == budget["predicted"] <= 0.6 * given.costs["macs"]


@pytest.mark.parametrize("to", ["0.6x-latency", "4ms", "0.6x-size", "20kB"])
def test_what_is_measured_needs_a_target(to: str) -> None:
    step = Prune(to=to, **SMALL)
    assert step.measures
    with pytest.raises(PassError, match=rf"^prune: --to {to} is measured on the exported file; give a target, as ort"):
        step(artifact("vit"))


# Measured on the exported file


@pytest.fixture(scope="module")
def wide() -> Artifact:
    place = "tests.passes.prune.toys:Wide"
    chosen = Backbone(name=place, num_classes=10, input=Preprocessing(size=SIZE, crop=1.0))
    return Artifact.of(chosen.build(seed=1, trust=True), chosen, trust=True)


QUICK = latency.Protocol(sessions=3, rounds=6, calls=2, warm_up=1, max_rounds=24)


@pytest.fixture(scope="module")
def meter(wide: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real one, whose comparisons are short."""
    real, once = latency.compare, latency.latency
    target = Target.parse("ort:cpu,threads=1,batch=8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "compare", lambda *files, **options: real(*files, **options, protocol=QUICK))
        patch.setattr(latency, "latency", lambda *files, **options: once(*files, **options, protocol=QUICK))
        yield TargetMeter(target, None, tmp_path_factory.mktemp("exported"))


TIMED: dict[str, Any] = {"skip": ("stem", "down"), **UNSEEING}
"""One group, so that few layers are timed."""


def test_a_budget_of_bytes_is_one_of_the_file(wide: Artifact, meter: TargetMeter) -> None:
    after, budget, _ = reached(wide, Prune(to="0.6x-size", **UNSEEING), Context(meter=meter))
    assert (budget["unit"], budget["before"]) == ("bytes", meter.size(wide).value)
    assert budget["limit"] == pytest.approx(0.6 * meter.size(wide).value)
    assert meter.size(after).value == budget["achieved"] <= budget["limit"]
    # The layers weigh 4 bytes a value; what else is in the file does not depend on their widths.
    assert budget["achieved"] == pytest.approx(budget["predicted"], rel=0.01)
    assert budget["achieved"] > CLOSE * budget["limit"]


def test_a_share_of_the_latency_is_reached_on_the_target(wide: Artifact, meter: TargetMeter) -> None:
    after, budget, plan = reached(wide, Prune(to="0.7x-latency", **TIMED), Context(meter=meter))
    assert (budget["unit"], budget["before"]) == ("ms", round(meter.latency(wide).value, 6))
    assert budget["limit"] == pytest.approx(0.7 * budget["before"], abs=1e-6)
    assert budget["low"] <= budget["achieved"] <= budget["high"]
    assert budget["low"] <= TOLERANCE * budget["limit"]
    assert budget["predicted"] > 0
    assert budget["step"] >= 0
    assert 1 <= len(budget["attempts"]) <= 5
    assert {name: budget[name] for name in ("predicted", "achieved", "low", "high")} in budget["attempts"]
    assert [(name, group["kept"] % 8) for name, group in plan["groups"].items()] == [("up", 0)]
    # Another measurement of what was made; the margin is wide, the machine may be busy.
    assert meter.compare(after, wide).value < 0.9


def test_milliseconds_are_milliseconds(wide: Artifact, meter: TargetMeter) -> None:
    limit = 0.8 * meter.latency(wide).value
    _, budget, _ = reached(wide, Prune(to=f"{limit:.4f}ms", ranking="local", **TIMED), Context(meter=meter))
    assert budget["ranking"] == "local"
    assert budget["limit"] == pytest.approx(limit, abs=1e-4)
    assert budget["low"] <= TOLERANCE * budget["limit"]


def test_a_share_that_is_far_too_small_is_an_error_that_names_the_way_out(wide: Artifact, meter: TargetMeter) -> None:
    step = Prune(to="0.02x-latency", **TIMED)
    with pytest.raises(PassError) as caught:
        step(wide, Context(meter=meter))
    assert str(caught.value).startswith("prune: --to 0.02x-latency cannot be reached: the smallest widths give ")
    assert str(caught.value).endswith("; raise it, or lower floor, skip less, or try scope all")
    assert "\n" not in str(caught.value)


def test_what_sparsify_chose_needs_one_before() -> None:
    with pytest.raises(PassError, match=r"^prune: --to sparsified cuts what sparsify chose, but nothing is before it"):
        Prune(to="sparsified", repair="none")(artifact("vit"))
    once = Prune(ratio=0.5, **SMALL)(artifact("vit"))
    with pytest.raises(PassError, match=r"but 'prune' is before it; put it there"):
        Prune(to="sparsified", repair="none")(once)


def test_the_network_that_was_given_is_left_alone(wide: Artifact, meter: TargetMeter) -> None:
    before = {key: value.clone() for key, value in wide.model().state_dict().items()}
    reached(wide, Prune(to="0.6x-size", **UNSEEING), Context(meter=meter))
    after = wide.model().state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
