"""A pass may change what a network is fed: all that follows, and all that is measured, is of the new input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from pydantic import JsonValue
from torch import Tensor, nn

import slim
from slim import costs, passes, store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.bench import latency
from slim.bench.measure import TargetMeter
from slim.contract import Context, Fed, Loading, Pass, Plan, Role
from slim.data import Data, open_data
from slim.errors import VerifyError
from slim.export.target import Target
from slim.goal import parse_goal
from slim.passes.distill import Distill
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.reach import Unreachable, Words, reach
from slim.pipeline import Guard, Pipeline
from tests.contract.zoo import BLIND, artifact

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = Target.parse("ort:cpu,threads=1")
QUICK = latency.Protocol(sessions=3, rounds=6, calls=2, warm_up=1, max_rounds=24)
SMALLER = (3, 16, 16)
TRAINED: list[int] = []
"""Height of the images of every training step."""


class Wide(nn.Module):
    """Most of its time goes by pixel, so a quarter of the pixels shows on any machine; takes 8 x 8 and more."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 48, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(4), nn.Linear(48 * 16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            TRAINED.append(images.shape[2])
        elif not torch.compiler.is_exporting() and images.shape[2] < 8:
            raise ValueError(f"{images.shape[2]} pixels are too few")
        features = self.second(self.first(images).relu()).relu()
        logits: Tensor = self.head(self.pool(features).flatten(1))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


BACKBONE = Backbone(name=f"{__name__}:Wide", num_classes=10, input=Preprocessing(size=(3, 32, 32), crop=1.0))


class Halve(Pass):
    """Half the height, half the width."""

    name: ClassVar[str] = "halve"
    role: ClassVar[Role] = "structure"
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "macs"})

    def plan(self, model: nn.Module, context: Context) -> Plan:
        channels, height, width = sized(context)
        return {"size": [channels, height // 2, width // 2], "planned at": height}

    def feeds(self, given: Preprocessing, plan: Plan) -> Preprocessing:
        return given.model_copy(update={"size": tuple(cast(list[int], plan["size"]))})

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
        return {"fitted at": sized(context)[1]}


def sized(context: Context) -> tuple[int, int, int]:
    assert context.backbone is not None
    return context.backbone.input.size


@pytest.fixture(autouse=True, scope="module")
def _known() -> Iterator[None]:
    """Replay and recipes find the passes, as if the table listed them; comparisons are short."""
    compare, in_turn = latency.compare, latency.in_turn
    with pytest.MonkeyPatch.context() as patch:
        for pass_class in (Halve, Odd):
            patch.setitem(passes.PASSES, pass_class.name, (__name__, pass_class.__name__, ""))
        patch.setattr(latency, "compare", lambda *files, **options: compare(*files, **options | {"protocol": QUICK}))
        patch.setattr(latency, "in_turn", lambda *files, **options: in_turn(*files, **options | {"protocol": QUICK}))
        yield


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=50)


@pytest.fixture(scope="module")
def given() -> Artifact:
    return Artifact.of(BACKBONE.build(trust=True), BACKBONE, trust=True)


@pytest.fixture(scope="module")
def halved(given: Artifact) -> Artifact:
    return Halve()(given)


def torch_says(one: Artifact, data: Data) -> list[int]:
    """The class of every validation image, made as the artifact's own input says."""
    batches = data.eval_batches("val", one.backbone.input, batch_size=64)
    with torch.inference_mode():
        return torch.cat([one.model()(images) for images, _ in batches]).argmax(1).tolist()


# The artifact


def test_what_is_saved_is_fed_the_new_size_and_loads_again(given: Artifact, halved: Artifact, tmp_path: Path) -> None:
    assert (given.backbone.input.size, halved.backbone.input.size) == ((3, 32, 32), SMALLER)
    loaded = store.load(store.save(halved, tmp_path / "halved"), trust=True)
    assert loaded.backbone == halved.backbone
    assert loaded.digest == halved.digest == halved.history[-1].digests["output"] != given.digest
    images = torch.randn(2, *SMALLER, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.model()(images), halved.model()(images))


def test_all_but_the_size_stays_as_it_was(given: Artifact, halved: Artifact) -> None:
    fields = halved.backbone.input.model_dump()
    assert fields == given.backbone.input.model_dump() | {"size": SMALLER}
    assert halved.backbone == given.backbone.model_copy(update={"input": halved.backbone.input})


def test_costs_are_counted_at_the_size_that_is_fed(given: Artifact, halved: Artifact) -> None:
    assert halved.costs["params"] == given.costs["params"]
    # The convolutions have a quarter of the places, the classifier has what it had.
    by_pixel, head = 32 * 32 * (3 + 48) * 48 * 9, 48 * 16 * 10
    assert (given.costs["macs"], halved.costs["macs"]) == (by_pixel + head, by_pixel // 4 + head)


def test_it_is_planned_at_the_old_size_and_fitted_at_the_new_one(halved: Artifact) -> None:
    step = halved.history[-1]
    assert (step.plan["planned at"], step.metrics["fitted at"]) == (32, 16)


def test_a_history_before_and_after_it_is_replayed_and_counted_at_its_own_size(tmp_path: Path) -> None:
    first = LowRank(to="0.9x-macs", min_width=16, align=2, **BLIND)(artifact("resnet"))
    small = Halve()(first)
    again = LowRank(to="0.9x-macs", min_width=16, align=2, skip=("conv1",), **BLIND)(Halve()(artifact("resnet")))
    assert [step.name for step in small.history] == ["low-rank", "halve"]
    assert small.state.keys() == first.state.keys()
    budget: Any = again.history[-1].plan["budget"]
    halved = Halve()(artifact("resnet"))
    assert budget["before"] == halved.costs["macs"] < artifact("resnet").costs["macs"]
    assert again.costs["macs"] == budget["achieved"] <= 0.9 * halved.costs["macs"]
    for one in (small, again):
        assert store.load(store.save(one, tmp_path / one.digest), trust=True).digest == one.digest


# What is refused


class Odd(Halve):
    """Says what it is told to, as JSON has it."""

    name: ClassVar[str] = "odd"
    change: dict[str, Any]

    def feeds(self, given: Preprocessing, plan: Plan) -> Preprocessing:
        return given.model_copy(update=self.change)


GRAY = {"size": [1, 32, 32], "mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (GRAY, "feeds says 1 channels, 1 means and 1 deviations, the network was given 3 channels, 3 means and 3"),
        ({"mean": [0.5]}, "feeds says 3 channels, 1 means and 3 deviations, .*; change height, width or how they are"),
        (
            {"size": [3, 4, 4]},
            r".* fails at batch 1 of \(3, 4, 4\) \(4 pixels are too few\); .* or feeds says what it does",
        ),
        ({"size": [3, -8, 8]}, r".* fails at batch 1 of \(3, -8, 8\)"),
        ({"size": [3, 8.5, 8]}, "feeds says no preprocessing: .*integer"),
        ({"crop": 1.5}, "feeds says no preprocessing: .*less than or equal to 1"),
        ({"size": [3, 40, 32]}, "claims to shrink macs, grew it from "),
    ],
)
def test_an_input_that_cannot_be_is_refused(change: dict[str, Any], message: str, given: Artifact) -> None:
    with pytest.raises(VerifyError, match=f"^odd: {message}"):
        Odd(change=change)(given)


def test_other_channels_are_refused_before_anything_is_fitted(given: Artifact) -> None:
    class Fitted(Odd):
        def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
            raise AssertionError("hours later")

    with pytest.raises(VerifyError, match=r"^odd: feeds says 1 channels"):
        Fitted(change=GRAY)(given)


# What follows it


@pytest.mark.parametrize(
    "follows",
    [
        Finetune(epochs=1, precision="fp32"),
        Distill(epochs=1, precision="fp32"),
        Distill(epochs=1, precision="fp32", teacher=("dense",), method=("kd",)),
    ],
    ids=["finetune", "distill", "distill from dense"],
)
def test_what_trains_it_is_shown_the_new_size(follows: Pass, given: Artifact, digits: Data) -> None:
    TRAINED.clear()
    context = Context(data=digits, loading=Loading(16))
    done = Pipeline((Halve(), follows), Guard(on=False))(given, context)
    assert done.artifact.backbone.input.size == SMALLER
    assert set(TRAINED) == {16}
    assert done.dense.backbone.input.size == (3, 32, 32)
    assert done.artifact.weights != given.weights


# A budget that a smaller input reaches


class Sizes:
    """Choices for `reach`: heights of the input."""

    model = artifact("resnet").model()
    heights = (32, 24, 16)
    dense = costs.count(model, (3, 32, 32))["macs"]
    cheapest = 16

    def cost(self, choice: int) -> float:
        return costs.count(self.model, (3, choice, choice))["macs"]

    def within(self, budget: float) -> int:
        fitting = [one for one in self.heights if self.cost(one) <= budget]
        if not fitting:
            raise Unreachable(self.cost(self.cheapest))
        return fitting[0]

    def step_below(self, choice: int) -> float:
        return 0.0


def test_a_network_is_costed_as_it_would_be_fed() -> None:
    sizes, before = Sizes(), artifact("resnet").backbone.input
    fed = {one: before.model_copy(update={"size": (3, one, one)}) for one in sizes.heights}
    words = Words("halve", "inputs", "give up")
    chosen, figures = reach(
        parse_goal("0.6x-macs"),
        sizes,
        Fed(sizes.model, before),
        lambda one: Fed(sizes.model, fed[one]),
        Context(),
        words,
    )
    assert chosen == 24
    assert (figures["before"], figures["achieved"]) == (sizes.dense, sizes.cost(24))


# On the target


@pytest.fixture(scope="module")
def meter(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> TargetMeter:
    return TargetMeter(TARGET, digits, tmp_path_factory.mktemp("exported"))


def test_files_take_the_size_and_are_judged_on_images_of_it(
    given: Artifact, halved: Artifact, digits: Data, meter: TargetMeter
) -> None:
    for one in (given, halved):
        assert meter.export(one).inputs[0].shape[1:] == one.backbone.input.size
        assert meter.accuracy(one).details["predictions"] == torch_says(one, digits)
        meter.parity(one)
    lost = meter.drop(halved, given)
    assert lost.n == 50
    assert lost.value == pytest.approx(meter.accuracy(given).value - meter.accuracy(halved).value)
    assert meter.compare(halved, given).value < 0.7  # about a quarter; the margin is for a busy machine


@pytest.mark.parametrize(("min_gain", "outcome", "size"), [(2, "kept", SMALLER), (99, "rolled back", (3, 32, 32))])
def test_the_guard_judges_it(
    min_gain: float, outcome: str, size: tuple[int, ...], given: Artifact, digits: Data, meter: TargetMeter
) -> None:
    context = Context(data=digits, meter=meter)
    done = Pipeline((Halve(),), Guard(min_gain=min_gain, max_drop=100))(given, context)
    assert [record.outcome for record in done.records] == [outcome]
    assert done.artifact.backbone.input.size == size


# A run


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> slim.Run:
    return slim.run(
        model={"name": BACKBONE.name, "weights": "none", "input": {"size": (3, 32, 32), "crop": 1.0}},
        data={"source": "digits", "limit": {"train": 64, "val": 50}},
        passes=[
            Finetune(epochs=1, precision="fp32"),
            Halve(),
            Distill(epochs=1, precision="fp32"),
        ],
        guard=Guard(max_drop=100),
        target=str(TARGET),
        out=tmp_path_factory.mktemp("fed") / "run",
        threads=1,
        trust=True,
    )


def test_a_run_ships_the_new_size_and_says_so(ran: slim.Run, call: Any) -> None:
    report = ran.report
    ports, fed = (json.loads((ran.bundle / name).read_bytes()) for name in ("io.json", "preprocess.json"))
    assert [record.outcome for record in report.steps] == ["kept"] * 3
    assert ran.artifact.backbone.input.size == SMALLER
    assert ports["files"]["model.onnx"]["inputs"][0]["shape"][1:] == fed["size"] == [*SMALLER]
    assert report.dense_input is not None
    assert report.final_input == ran.artifact.backbone.input == report.dense_input.model_copy(update={"size": SMALLER})
    assert report.final["macs"].value < 0.3 * report.dense["macs"].value
    said = "input 3x32x32 -> 3x16x16"
    assert said in (ran.root / "report.html").read_text().replace("&gt;", ">")
    assert said in call("show", ran.root, "--trust").out.splitlines()


def test_every_figure_of_a_run_is_of_what_its_network_is_fed(ran: slim.Run) -> None:
    data = open_data("digits", limit_val=50)
    trained, final = (store.load(ran.root / "steps" / name, trust=True) for name in ("01-finetune", "03-distill"))
    for figures, one in ((ran.report.dense, trained), (ran.report.final, final)):
        assert figures["accuracy_top1"].details["predictions"] == torch_says(one, data)


def test_the_gate_and_eval_feed_both_files_their_own_size(ran: slim.Run, call: Any, tmp_path: Path) -> None:
    budgets = tmp_path / "budgets.yaml"
    wanted = "[{metric: top1_drop_points, max: 100}, {metric: macs, max: 1.0e+7}]"
    budgets.write_text(f"format: slim-budgets/1\ntarget: {TARGET}\nbudgets: {wanted}\n")
    measured = slim.gate(ran.root, budgets, trust=True)
    assert [one.outcome for one in measured] == ["pass", "pass"]
    for file, figures in ((ran.dense, ran.report.dense), (ran.bundle, ran.report.final)):
        said = call("eval", file, "--json", "--quiet", "--trust")
        (found,) = json.loads(said.out)
        assert found["measurement"]["value"] == figures["accuracy_top1"].value


def test_layers_before_compression_are_counted_at_the_size_they_had(ran: slim.Run, call: Any, tmp_path: Path) -> None:
    found = json.loads(call("explain", "--json", "--trust", ran.root, "--out", tmp_path / "layers.svg").out)
    assert sum(row["macs"] for row in found["layers"]) == ran.report.dense["macs"].value


def test_where_a_report_does_not_say_both_files_are_fed_alike(ran: slim.Run, tmp_path: Path) -> None:
    """As older reports do not."""
    older = slim.Run(tmp_path, trust=True)
    store.save(ran.artifact, older.final)
    assert older.dense_input == ran.artifact.backbone.input != ran.dense_input
    silent = ran.report.model_copy(update={"dense_input": None, "final_input": None})
    (tmp_path / "report.json").write_text(silent.model_dump_json())
    assert replace(older).dense_input == ran.artifact.backbone.input
