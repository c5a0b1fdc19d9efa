"""Order, stages, guard and roll-back of a chain."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import JsonValue
from torch import nn

from slim import job, passes
from slim.artifact import Artifact, Backbone, Preprocessing, Step
from slim.contract import Context, Fed, Pass, Plan, Role
from slim.data import open_data
from slim.errors import DataError, OrderError, ParityError
from slim.measurement import Measurement
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.mask import Mask
from slim.pipeline import Guard, Pipeline, Result

DONE: list[str] = []
"""Labels of the passes that worked, in order."""


def toy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, num_classes))


BACKBONE = Backbone(name=f"{__name__}:toy", num_classes=10, input=Preprocessing(size=(3, 32, 32)))


class Toy(Pass):
    """Moves one value, and writes down what it was given."""

    label: str = "x"

    def plan(self, model: nn.Module, context: Context) -> Plan:
        return {"label": self.label}

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
        DONE.append(self.label)
        with torch.no_grad():
            model.get_parameter("2.bias")[0] += 1
        assert context.reference is not None
        return {"reference": context.reference.digest, "history": [step.config["label"] for step in context.history]}


class Cut(Toy):
    """Structure."""

    name: ClassVar[str] = "cut"
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})
    drops: ClassVar[frozenset[str]] = frozenset({"dense"})


class Dense(Cut):
    """A structure that needs what another ends."""

    name: ClassVar[str] = "dense"
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})


class Zeros(Cut):
    name: ClassVar[str] = "zeros"

    def caveat(self, figures: Mapping[str, Measurement]) -> str:
        return "zeros pay elsewhere"


class Int8(Toy):
    """A structure after which no value is trained."""

    name: ClassVar[str] = "int8"
    role: ClassVar[Role] = "structure"
    drops: ClassVar[frozenset[str]] = frozenset({"float"})


class Subnet(Toy):
    """A structure that needs what no pass here gives."""

    name: ClassVar[str] = "subnet"
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"supernet"})


class Ready(Toy):
    """Prepares."""

    name: ClassVar[str] = "ready"
    role: ClassVar[Role] = "prepare"


class Family(Ready):
    """Prepares what may be cut out later."""

    name: ClassVar[str] = "family"
    gives: ClassVar[frozenset[str]] = frozenset({"supernet"})


class Mend(Toy):
    """Repairs."""

    name: ClassVar[str] = "mend"
    role: ClassVar[Role] = "repair"


class Study(Toy):
    """Repairs, from images without labels."""

    name: ClassVar[str] = "study"
    role: ClassVar[Role] = "repair"
    reads: ClassVar[frozenset[str]] = frozenset({"unlabeled"})


TOYS = {pass_class.name: pass_class for pass_class in (Cut, Dense, Zeros, Int8, Subnet, Ready, Family, Mend, Study)}


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pass_class in TOYS.items():
        monkeypatch.setitem(passes.PASSES, name, (__name__, pass_class.__name__, ""))
    DONE.clear()


@pytest.fixture(scope="module")
def start() -> Artifact:
    return Artifact.of(BACKBONE.build(trust=True), BACKBONE, trust=True)


def chain(*labels: str, guard: Guard | None = None) -> Pipeline:
    """`cut:a` is the pass `cut` with the label `a`."""
    split = (label.partition(":") for label in labels)
    return Pipeline(tuple(TOYS[name](label=label or name) for name, _, label in split), guard or Guard())


def label_of(artifact: Artifact | Fed) -> str:
    assert isinstance(artifact, Artifact)
    return str(artifact.history[-1].config["label"]) if artifact.history else "start"


def ratio(value: float, spread: float = 0.01, *, fit: bool = True) -> Measurement:
    low, high = value - spread, value + spread
    return Measurement(
        metric="latency_ratio", value=value, unit="ratio", low=low, high=high, details={"control": {"fit": fit}}
    )


def drop(value: float) -> Measurement:
    return Measurement(metric="top1_drop_points", value=value, unit="points", n=500, low=value - 0.5, high=value + 0.5)


@dataclass
class Scripted:
    """A meter that answers by the label of the last pass, and writes down what it was asked."""

    ratios: dict[str, Measurement] = field(default_factory=dict)
    drops: dict[str, float] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()
    target: str = "ort:cpu,threads=1"
    asked: list[tuple[str, ...]] = field(default_factory=list)
    limits: list[float | None] = field(default_factory=list)

    def latency(self, model: Artifact | Fed) -> Measurement:
        return Measurement(metric="latency_p50_ms", value=1.0, unit="ms")

    def compare(
        self, candidate: Artifact | Fed, reference: Artifact | Fed, *, limit: float | None = None
    ) -> Measurement:
        self.asked.append(("compare", label_of(candidate), label_of(reference)))
        self.limits.append(limit)
        return self.ratios.get(label_of(candidate), ratio(0.5))

    def accuracy(self, model: Artifact | Fed) -> Measurement:
        self.asked.append(("accuracy", label_of(model)))
        return Measurement(metric="accuracy_top1", value=90.0, unit="percent")

    def drop(self, candidate: Artifact | Fed, reference: Artifact | Fed) -> Measurement:
        self.asked.append(("drop", label_of(candidate), label_of(reference)))
        return drop(self.drops.get(label_of(candidate), 0.1))

    def size(self, model: Artifact | Fed) -> Measurement:
        return Measurement(metric="size_bytes", value=100, unit="bytes")

    def parity(self, model: Artifact | Fed) -> Measurement:
        if label_of(model) in self.broken:
            raise ParityError("parity: the file differs")
        return Measurement(metric="parity_max_abs", value=0, unit="logits")


@pytest.fixture(scope="module")
def judged() -> Context:
    """With a validation split, so that accuracy is asked for."""
    return Context(data=open_data("digits", limit_train=8, limit_val=8))


def outcomes(result: Result) -> dict[str, str]:
    return {str(record.config["label"]): record.outcome for record in result.records}


# Order


@pytest.mark.parametrize(
    ("labels", "stages"),
    [
        ("mend", ["mend"]),
        ("mend mend cut", ["mend mend", "cut"]),
        ("ready cut mend", ["ready cut mend"]),
        ("cut cut", ["cut", "cut"]),
        ("mend ready cut mend mend cut", ["mend", "ready cut mend mend", "cut"]),
        ("ready ready cut ready cut", ["ready ready cut", "ready cut"]),
        ("", []),
    ],
)
def test_stages_are_preparation_structure_and_repair(labels: str, stages: list[str]) -> None:
    found = chain(*labels.split()).stages()
    assert [" ".join(step.name for _, step in stage) for stage in found] == stages
    assert [position for stage in found for position, _ in stage] == list(range(1, len(labels.split()) + 1))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("int8 mend cut", r"^step 3 'cut' needs a 'float' network, and step 1 'int8' ends that; put 'cut' before it$"),
        ("cut dense", r"^step 2 'dense' needs a 'dense' network, and step 1 'cut' ends that; put 'dense' before it$"),
        ("subnet", r"^step 1 'subnet' needs a 'supernet' network, which no pass before gives; add one that does$"),
        ("cut ready", r"^step 2 'ready' prepares a structural pass, but none follows; put one right after it$"),
        (
            "ready mend cut",
            r"^step 1 'ready' prepares a structural pass, but step 2 'mend' follows, which is none; put",
        ),
    ],
)
def test_an_order_that_cannot_work_names_both_steps_and_the_remedy(labels: str, says: str, start: Artifact) -> None:
    with pytest.raises(OrderError, match=says):
        chain(*labels.split())(start, Context())
    assert DONE == []


def test_a_family_may_end_a_chain_for_it_can_be_cut_later_but_no_repair_follows_it(start: Artifact) -> None:
    assert outcomes(chain("cut", "family")(start, Context())) == {"cut": "kept", "family": "kept"}
    with pytest.raises(OrderError, match=r"^step 1 'family' prepares .* but step 2 'mend' follows, which is none; put"):
        chain("family", "mend").check(start, Context())


def test_what_an_artifact_was_made_by_counts_for_the_order(start: Artifact) -> None:
    def step(name: str) -> Step:
        return Step(name=name, version=1, config={"label": "x"}, plan={"label": "x"}, seed=0)

    made = replace(start, history=(step("int8"), step("mend")))
    with pytest.raises(OrderError, match=r"and 'int8' in its history ended that; start from an artifact before it$"):
        chain("cut").check(made, Context())


def test_a_pass_without_its_split_is_refused(start: Artifact) -> None:
    with pytest.raises(
        DataError, match=r"^step 2 'finetune' reads the split 'train', which the data lacks; give --data"
    ):
        Pipeline((Mend(), Finetune())).check(start, Context())
    with pytest.raises(
        DataError, match=r"^step 1 'study' reads the split 'unlabeled', .*; give --unlabeled FOLDER or L"
    ):
        chain("study").check(start, Context(data=open_data("digits", limit_train=8, limit_val=8)))


@pytest.mark.parametrize(
    ("first", "says"),
    [((LowRank(), Finetune()), "and 'low-rank' does not; begin"), ((), "and there is none; begin with finetune")],
    ids=["structure first", "no pass"],
)
def test_a_fresh_head_has_to_be_trained_first(
    first: tuple[Pass, ...], says: str, start: Artifact, judged: Context
) -> None:
    with pytest.raises(DataError, match=f"^class-count mismatch: .*: the first pass must train it, {says}"):
        Pipeline(first).check(start, judged, fresh_head="class-count mismatch: 10, not 1000; a new head")
    Pipeline((Finetune(), LowRank())).check(start, judged, fresh_head="class-count mismatch")
    Pipeline(first).check(start, judged)
    Pipeline((LowRank(objective="plain", repair="none"),)).check(
        start, Context(), fresh_head="the network is fresh"
    )  # no data could train it


# The guard's decisions


@pytest.mark.parametrize(
    ("figure", "says"),
    [
        (ratio(0.5), None),
        (ratio(0.97), None),  # ends at the limit
        (ratio(1.2), r"^not faster: 1\.200x, 95 % 1\.190\.\.1\.210; at most 0\.980x pays$"),
        (ratio(0.995), r"^not faster: "),  # faster, but not by as much as is asked
        (ratio(0.97, 0.02), r"^latency inconclusive: 0\.970x, 95 % 0\.950\.\.0\.990; at most 0\.980x pays$"),
        (
            ratio(0.5, fit=False),
            r"^latency inconclusive: the machine was too noisy to compare a file with itself \(0\.500x",
        ),
        (ratio(1.5, fit=False), r"^latency inconclusive: the machine was too noisy"),
    ],
)
def test_latency_pays_only_when_the_whole_interval_does(figure: Measurement, says: str | None) -> None:
    refusal = Guard(min_gain=2.0).refuses_latency(figure)
    assert (refusal is None) == (says is None)
    if says is not None:
        assert re.search(says, str(refusal))


def test_min_gain_is_the_share_that_must_be_saved() -> None:
    assert Guard(min_gain=0).refuses_latency(ratio(0.99)) is None
    assert Guard(min_gain=30).refuses_latency(ratio(0.71)) is not None
    assert Guard(min_gain=30).refuses_latency(ratio(0.69)) is None


@pytest.mark.parametrize(("lost", "refused"), [(-3.0, False), (0.0, False), (1.0, False), (1.2, True)])
def test_accuracy_may_fall_by_max_drop(lost: float, refused: bool) -> None:
    refusal = Guard(max_drop=1.0).refuses_accuracy(drop(lost))
    assert refusal == ("lost 1.20 points (95 % 0.70..1.70, n=500), allowed 1" if refused else None)


# What the guard does to a chain


def test_a_stage_that_is_not_faster_is_rolled_back_before_its_repair(start: Artifact, judged: Context) -> None:
    meter = Scripted(ratios={"slow": ratio(1.1)})
    result = chain("cut:slow", "mend:late", "cut:quick", "mend:end")(start, replace(judged, meter=meter))
    assert outcomes(result) == {"slow": "rolled back", "late": "not run", "quick": "kept", "end": "kept"}
    assert DONE == ["slow", "quick", "end"]
    assert [step.config["label"] for step in result.artifact.history] == ["quick", "end"]
    assert ("accuracy", "late") not in meter.asked
    # The next stage starts from the last good artifact, and is judged against it.
    assert [asked for asked in meter.asked if asked[0] == "compare"] == [
        ("compare", "slow", "start"),
        ("compare", "quick", "start"),
    ]
    reasons = [record.reason for record in result.records]
    assert reasons[0].startswith("not faster: 1.100x")
    assert reasons[1:] == ["its stage was rolled back", "0.50x latency, -0.10 points", "-0.10 points"]
    assert [record.stage for record in result.records] == [1, 1, 2, 2]


def test_a_refusal_for_speed_says_the_caveat_of_the_pass_along(start: Artifact, judged: Context) -> None:
    meter = Scripted(ratios={"slow": ratio(1.1), "slow too": ratio(1.1)}, drops={"worse": 5.0})
    result = chain("zeros:slow", "cut:slow too", "zeros:worse")(start, replace(judged, meter=meter))
    reasons = [record.reason for record in result.records]
    assert reasons[0] == "not faster: 1.100x, 95 % 1.090..1.110; at most 0.980x pays; zeros pay elsewhere"
    assert reasons[1].endswith("at most 0.980x pays")
    assert reasons[2] == "lost 5.00 points (95 % 4.50..5.50, n=500), allowed 1"


def test_accuracy_is_judged_at_the_end_of_a_stage(start: Artifact, judged: Context) -> None:
    meter = Scripted(drops={"bad": 5.0, "repaired": 0.4, "worse": 5.0, "still bad": 3.0})
    pipeline = chain("cut:bad", "mend:repaired", "ready:first", "cut:worse", "mend:still bad", "cut:last")
    result = pipeline(start, replace(judged, meter=meter))
    assert outcomes(result) == {
        "bad": "kept",
        "repaired": "kept",
        "first": "rolled back",
        "worse": "rolled back",
        "still bad": "rolled back",
        "last": "kept",
    }
    assert {record.reason for record in result.records[2:5]} == {"lost 3.00 points (95 % 2.50..3.50, n=500), allowed 1"}
    assert [step.config["label"] for step in result.artifact.history] == ["bad", "repaired", "last"]
    assert ("drop", "still bad", "repaired") in meter.asked
    assert ("compare", "last", "repaired") in meter.asked


def test_a_leading_repair_is_judged_on_accuracy_alone(start: Artifact, judged: Context) -> None:
    meter = Scripted(drops={"harm": 4.0})
    result = chain("mend:harm")(start, replace(judged, meter=meter))
    assert outcomes(result) == {"harm": "rolled back"}
    assert result.artifact is start
    assert not [asked for asked in meter.asked if asked[0] == "compare"]


def test_without_the_guard_everything_is_kept_and_the_history_says_so(start: Artifact, judged: Context) -> None:
    meter = Scripted(ratios={"slow": ratio(1.1)}, drops={"slow": 9.0})
    result = chain("cut:slow", guard=Guard(on=False))(start, replace(judged, meter=meter))
    assert [(record.outcome, record.reason) for record in result.records] == [
        ("kept", "1.10x latency, -9.00 points (guard off)")
    ]
    assert [step.guard for step in result.artifact.history] == [False]
    assert meter.limits == [None]
    guarded = chain("cut:quick")(start, replace(judged, meter=Scripted()))
    assert [step.guard for step in guarded.artifact.history] == [True]


def test_without_a_meter_nothing_is_said_to_be_measured(start: Artifact) -> None:
    result = chain("cut:a", "mend:b")(start, Context())
    assert [(record.outcome, record.reason) for record in result.records] == [("kept", "not measured")] * 2
    assert set(result.records[0].figures) == {"params", "macs"}


def test_without_a_validation_split_latency_alone_is_judged(start: Artifact) -> None:
    result = chain("cut:a")(start, Context(meter=Scripted()))
    assert [(record.outcome, record.reason) for record in result.records] == [("kept", "0.50x latency")]


def test_latency_is_measured_until_the_limit_is_decided(start: Artifact) -> None:
    meter = Scripted()
    chain("cut:a", guard=Guard(min_gain=10))(start, Context(meter=meter))
    assert meter.limits == [pytest.approx(0.9)]


def test_a_file_that_is_not_the_network_ends_the_chain(start: Artifact) -> None:
    with pytest.raises(ParityError):
        chain("cut:a", "cut:b")(start, Context(meter=Scripted(broken=frozenset({"a"}))))
    assert DONE == ["a"]


def test_passes_see_the_artifact_before_their_stage_and_all_steps_before_them(start: Artifact) -> None:
    result = chain("mend:0", "ready:1", "cut:2", "mend:3", "cut:4")(start, Context())
    seen = [step.metrics for step in result.artifact.history]
    assert [found["history"] for found in seen] == [["0", "1", "2", "3"][:length] for length in range(5)]
    before_stage = [found["reference"] for found in seen]
    after = [step.digests["output"] for step in result.artifact.history]
    assert before_stage == [start.digest, after[0], after[0], after[0], after[3]]


@pytest.mark.parametrize(
    ("labels", "dense"),
    [("cut:a mend:b", "start"), ("mend:a mend:b cut:c", "b"), ("mend:a", "a"), ("ready:a cut:b", "start")],
)
def test_dense_is_what_lay_before_the_first_structural_stage(labels: str, dense: str, start: Artifact) -> None:
    assert label_of(chain(*labels.split())(start, Context()).dense) == dense


def test_dense_is_the_start_where_the_leading_repair_was_rolled_back(start: Artifact, judged: Context) -> None:
    meter = Scripted(drops={"harm": 4.0})
    assert chain("mend:harm", "cut:a")(start, replace(judged, meter=meter)).dense is start


def test_what_becomes_of_each_step_is_logged(start: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    meter = Scripted(ratios={"slow": ratio(1.1)})
    with caplog.at_level(logging.INFO, "slim"):
        chain("cut:slow", "mend:late")(start, Context(meter=meter))
    assert [line.split(":")[1].strip() for line in caplog.messages] == ["rolled back", "not run"]


def test_zeros_are_no_faster_on_a_runtime_without_kernels_for_them(tmp_path: Path) -> None:
    run = job.run(
        model={
            "name": "vit_tiny_patch16_224",
            "args": {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 192, "num_heads": 3},
            "weights": "none",
            "input": {"size": [3, 32, 32], "crop": 1.0},
        },
        target="ort:cpu,threads=1",
        passes=[Mask(pattern=pattern, criterion="magnitude", epochs=0) for pattern in ("2:4", "unstructured")],
        # The arithmetic is what it was: on a busy machine it may seem faster by 2 %, but not by a fifth.
        guard=Guard(min_gain=20),
        threads=1,
        device="cpu",
        out=tmp_path / "run",
    )
    by_four, anywhere = run.records()
    assert (by_four.outcome, anywhere.outcome) == ("rolled back", "rolled back")
    decided = "^(not faster|latency inconclusive): .*; "
    assert re.search(rf"{decided}2:4 zeros pay only on TensorRT and CUDA sparse kernels$", by_four.reason)
    assert re.search(rf"{decided}unstructured zeros give no latency gain on any runtime here: .*only$", anywhere.reason)
    assert run.artifact.history == ()


def test_a_chain_is_measured_and_judged_on_the_real_target(tmp_path: Path) -> None:
    run = job.run(
        model={
            "name": "vit_tiny_patch16_224",
            "args": {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 192, "num_heads": 3},
            "weights": "none",
            "input": {"size": [3, 32, 32], "crop": 1.0},
        },
        data={"source": "digits", "limit": {"train": 64, "val": 32}},
        target="ort:cpu,threads=1",
        passes=[Finetune(epochs=1, precision="fp32"), LowRank(ratio=0.25)],
        guard=Guard(max_drop=100),
        threads=1,
        device="cpu",
        out=tmp_path / "run",
    )
    finetune, low_rank = run.records()
    assert finetune.outcome == "kept"
    assert "latency_ratio" not in finetune.figures
    measured = low_rank.figures["latency_ratio"]
    assert measured.target == "ort:cpu,threads=1,batch=1,precision=fp32"
    assert measured.samples
    # A quarter of the values in all layers but the head: whatever this machine finds, the verdict follows its figure.
    assert low_rank.outcome == ("kept" if Guard(max_drop=100).refuses_latency(measured) is None else "rolled back")
    assert low_rank.figures["top1_drop_points"].value == pytest.approx(
        finetune.figures["accuracy_top1"].value - low_rank.figures["accuracy_top1"].value
    )
    assert low_rank.figures["params"].value < 0.4 * finetune.figures["params"].value
    assert set(low_rank.figures) >= {"parity_max_abs", "size_bytes", "latency_p50_ms", "accuracy_top1"}
