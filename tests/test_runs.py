"""A run on disk: what is found again, what is done again, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from slim import environment, passes, store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context, Fed, Loading, Pass, Plan, Role
from slim.data import Data, open_data
from slim.errors import ParityError, PassError, StoreError, UsageError
from slim.measurement import Measurement
from slim.pipeline import Guard, Pipeline, Result
from slim.runs import Record, Run, open_run, step_key

DONE: list[str] = []
"""Passes that worked, in order."""


def toy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, num_classes))


BACKBONE = Backbone(name=f"{__name__}:toy", num_classes=10, input=Preprocessing(size=(3, 32, 32)))


class Shift(Pass):
    """Moves one value by `by`."""

    name: ClassVar[str] = "shift"
    role: ClassVar[Role] = "structure"
    by: float = 1.0

    def plan(self, model: nn.Module, context: Context) -> Plan:
        if self.by == 0:
            raise PassError("shift: by 0 changes nothing")
        return {"by": self.by}

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        DONE.append(f"{self.name} {self.by:g}")
        with torch.no_grad():
            model.get_parameter("2.bias")[0] += self.by


class Tune(Shift):
    """As Shift, from images."""

    name: ClassVar[str] = "tune"
    role: ClassVar[Role] = "repair"
    reads: ClassVar[frozenset[str]] = frozenset({"train"})


class Newer(Tune):
    """As Tune, in the next version."""

    version: ClassVar[int] = 2


class Study(Tune):
    """As Tune, from images without labels."""

    name: ClassVar[str] = "study"
    reads: ClassVar[frozenset[str]] = frozenset({"unlabeled"})


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for pass_class in (Shift, Tune):
        monkeypatch.setitem(passes.PASSES, pass_class.name, (__name__, pass_class.__name__, ""))
    DONE.clear()


@pytest.fixture(scope="module")
def start() -> Artifact:
    return Artifact.of(BACKBONE.build(trust=True), BACKBONE, trust=True)


@dataclass
class Scripted:
    """A meter that counts, and says what it is told to."""

    target: str = "ort:cpu"
    ratio: float = 0.5
    broken: bool = False
    asked: list[str] = field(default_factory=list)

    def latency(self, model: Artifact | Fed) -> Measurement:
        return Measurement(metric="latency_p50_ms", value=1.0, unit="ms")

    def compare(
        self, candidate: Artifact | Fed, reference: Artifact | Fed, *, limit: float | None = None
    ) -> Measurement:
        self.asked.append("compare")
        return Measurement(metric="latency_ratio", value=self.ratio, unit="ratio", low=self.ratio, high=self.ratio)

    def accuracy(self, model: Artifact | Fed) -> Measurement:
        return Measurement(metric="accuracy_top1", value=90.0, unit="percent")

    def drop(self, candidate: Artifact | Fed, reference: Artifact | Fed) -> Measurement:
        return Measurement(metric="top1_drop_points", value=0, unit="points", low=0, high=0)

    def size(self, model: Artifact | Fed) -> Measurement:
        return Measurement(metric="size_bytes", value=100, unit="bytes")

    def parity(self, model: Artifact | Fed) -> Measurement:
        if self.broken:
            raise ParityError("parity: the file differs")
        return Measurement(metric="parity_max_abs", value=0, unit="logits")


RECIPE: dict[str, Any] = {
    "model": {"name": "toy"},
    "seed": 0,
    "data": {"source": "digits", "workers": 0, "limit": {"train": None}},
    "guard": {"max_drop": 1.0},
    "passes": [],
}


def opened(root: Path, recipe: dict[str, Any] = RECIPE) -> Run:
    return Run.open(root, recipe, resume=root.exists())


def chain(*by: float, guard: Guard | None = None) -> Pipeline:
    return Pipeline(tuple(Shift(by=value) for value in by), guard or Guard())


def folders(run: Run) -> list[str]:
    return sorted(path.name for path in (run.root / "steps").iterdir())


# What is found again


def test_a_finished_chain_is_not_done_again(start: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = chain(1, 2)(start, Context(), opened(tmp_path / "run"))
    written = (tmp_path / "run" / "steps.jsonl").read_bytes()
    DONE.clear()
    with caplog.at_level(logging.INFO, "slim"):
        again = chain(1, 2)(start, Context(), opened(tmp_path / "run"))
    assert DONE == []
    assert again.artifact.digest == first.artifact.digest
    assert again.artifact.history == first.artifact.history
    assert again.records == first.records
    assert (tmp_path / "run" / "steps.jsonl").read_bytes() == written
    assert "1 shift: found finished in steps/01-shift" in caplog.text


def test_a_changed_step_is_done_again_with_all_after_it_and_the_old_stay_whole(
    start: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = opened(tmp_path / "run")
    old = chain(1, 2, 3)(start, Context(), run)
    DONE.clear()
    with caplog.at_level(logging.INFO, "slim"):
        new = chain(1, 5, 3)(start, Context(), opened(run.root))
    assert DONE == ["shift 5", "shift 3"]
    assert "2 shift: done again, it differs in: config" in caplog.text
    assert "3 shift: done again, it differs in: input, reference" in caplog.text
    assert [step.config["by"] for step in new.artifact.history] == [1, 5, 3]
    assert len(folders(run)) == 5
    before = [store.load(run.root / str(record.folder), trust=True) for record in old.records]
    assert before[-1].digest == old.artifact.digest

    DONE.clear()
    back = chain(1, 2, 3)(start, Context(), opened(run.root))
    assert DONE == []
    assert back.artifact.digest == old.artifact.digest
    assert [record.folder for record in back.records] == [record.folder for record in old.records]


def test_a_chain_goes_on_after_the_step_it_was_stopped_at(start: Artifact, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(PassError, match="by 0"):
        chain(1, 0, 3)(start, Context(), run)
    # What failed is not kept, what was finished is.
    assert [(record.position, record.folder) for record in run.records()] == [(1, "steps/01-shift")]
    assert folders(run) == ["01-shift"]
    DONE.clear()
    with pytest.raises(PassError, match="by 0"):
        chain(1, 0, 3)(start, Context(), opened(run.root))
    chain(1, 2, 3)(start, Context(), opened(run.root))
    assert DONE == ["shift 2", "shift 3"]


def test_a_step_whose_measurement_failed_is_measured_again_and_not_done_again(start: Artifact, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(ParityError):
        chain(1)(start, Context(meter=Scripted(broken=True)), run)
    DONE.clear()
    meter = Scripted()
    result = chain(1)(start, Context(meter=meter), opened(run.root))
    assert DONE == []
    assert meter.asked == ["compare"]
    assert result.records[0].outcome == "kept"
    assert len(run.records()) == 1


def test_a_step_that_was_rolled_back_is_kept_with_its_verdict(start: Artifact, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    pipeline = Pipeline((Shift(by=1), Tune(by=2)))
    data = open_data("digits", limit_train=8)
    slow = Context(meter=Scripted(ratio=1.5), data=data)
    first = pipeline(start, slow, run)
    assert [record.outcome for record in run.records()] == ["rolled back", "not run"]
    assert run.records()[0].reason.startswith("not faster: 1.500x")
    assert store.load(run.root / "steps/01-shift", trust=True).history[-1].config == {"by": 1.0}
    DONE.clear()
    meter = Scripted(ratio=1.5)
    again = pipeline(start, replace(slow, meter=meter), opened(run.root))
    assert (DONE, meter.asked) == ([], [])
    assert again.records == first.records
    assert len(run.records()) == 2


def test_a_verdict_is_judged_anew_when_the_guard_changed(start: Artifact, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    meter = Scripted(ratio=0.9)
    refused = chain(1, guard=Guard(min_gain=20))(start, Context(meter=meter), run)
    kept = chain(1, guard=Guard(min_gain=5))(start, Context(meter=meter), opened(run.root))
    assert [refused.records[0].outcome, kept.records[0].outcome] == ["rolled back", "kept"]
    assert (DONE, meter.asked) == (["shift 1"], ["compare"])
    assert [record.outcome for record in run.records()] == ["kept"]


@pytest.mark.parametrize(
    ("target", "device", "measured"),
    [("ort:cpu", None, 1), ("ort:cpu,threads=4", None, 2), ("ort:cpu", "another processor", 2)],
    ids=["same", "target", "device"],
)
def test_figures_are_those_of_the_same_target_and_device(
    target: str, device: str | None, measured: int, start: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, meter = opened(tmp_path / "run"), Scripted()
    chain(1)(start, Context(meter=meter), run)
    if device:
        monkeypatch.setattr(environment, "fingerprint", lambda: device)
    again = replace(meter, target=target)  # shares what was asked
    chain(1)(start, Context(meter=again), opened(run.root))
    assert DONE == ["shift 1"]
    assert len(meter.asked) == measured


def test_a_damaged_step_is_not_taken_for_whole(start: Artifact, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    chain(1)(start, Context(), run)
    weights = run.root / "steps/01-shift" / store.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(StoreError, match=r"weights\.safetensors: digest"):
        chain(1)(start, Context(), opened(run.root))


# What a step's result depends on


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Data]:
    """Two classes of two images each; the number is the grey of one pixel, and of the images without labels."""

    def made(grey: int) -> Data:
        root = tmp_path_factory.mktemp("data")
        for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/2", "val/b/2", "plain/3"):
            path = root / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("L", (8, 8))
            image.putpixel((0, 0), grey)
            image.save(path)
        return open_data(f"folder:{root}", unlabeled=str(root / "plain"))

    return made


@pytest.mark.parametrize(
    ("element", "change"),
    [
        ("config", lambda given: given | {"step": Tune(by=2)}),
        ("pass", lambda given: given | {"step": Newer()}),
        ("input", lambda given: given | {"given": moved(given["given"])}),
        ("reference", lambda given: given | {"reference": moved(given["given"])}),
        ("data", lambda given: given | {"context": replace(given["context"], data=given["pictures"](2))}),
        ("seed", lambda given: given | {"context": replace(given["context"], seed=1)}),
        ("guard", lambda given: given | {"context": replace(given["context"], guard=False)}),
        ("batch", lambda given: given | {"context": replace(given["context"], loading=Loading(batch_size=8))}),
        ("libraries", lambda given: given | {"torch": "9.9"}),
        ("preprocessing,input", lambda given: given | {"given": fed(given["given"], crop=0.5)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_key_of_a_step_changes_with(
    element: str,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    start: Artifact,
    pictures: Callable[[int], Data],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key(given: dict[str, Any]) -> dict[str, str]:
        versions = {**VERSIONS, "torch": given["torch"]}
        monkeypatch.setattr(environment, "versions", lambda: versions)
        return step_key(given["step"], given["given"], given["reference"], given["context"])

    before = {
        "step": Tune(),
        "given": start,
        "reference": start,
        "context": Context(data=pictures(1)),
        "pictures": pictures,
        "torch": "1.0",
    }
    old, same, new = key(before), key(before), key(change(before))
    assert old == same
    assert {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} == set(element.split(","))


VERSIONS = dict(environment.versions())


def moved(artifact: Artifact) -> Artifact:
    return replace(artifact, state={key: value + 1 for key, value in artifact.state.items()})


def fed(artifact: Artifact, **fields: Any) -> Artifact:
    backbone = artifact.backbone
    return replace(artifact, backbone=backbone.model_copy(update={"input": backbone.input.model_copy(update=fields)}))


@pytest.mark.parametrize(
    ("limits", "same"),
    [({"limit_train": 9}, False), ({"limit_val": 4}, True), ({"seed": 1}, False)],
    ids=["fewer training images", "fewer validation images", "others of them"],
)
def test_the_key_knows_which_images_are_read(limits: dict[str, int], same: bool, start: Artifact) -> None:
    one = open_data("digits", limit_train=10, limit_val=8)
    other = open_data("digits", **{"limit_train": 10, "limit_val": 8, **limits})  # type: ignore[arg-type]
    keys = [step_key(Tune(), start, start, Context(data=data)) for data in (one, other)]
    assert (keys[0] == keys[1]) is same
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} <= {"split"}


def test_the_key_knows_the_content_of_images_without_labels(start: Artifact, pictures: Callable[[int], Data]) -> None:
    keys = [step_key(Study(), start, start, Context(data=pictures(grey))) for grey in (1, 2)]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"data", "unlabeled"}


def test_the_key_of_a_step_that_reads_no_images_does_not_know_them(start: Artifact) -> None:
    data = open_data("digits", limit_train=10)
    assert step_key(Shift(), start, start, Context(data=data)) == step_key(Shift(), start, start, Context())


# What a folder may hold


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, r"its run has seed 0, not 1; choose another place$"),
        ({"model": {"name": "other"}}, r"its run has model\.name toy, not other;"),
        ({"data": {**RECIPE["data"], "limit": {"train": 5}}}, r"its run has data\.limit\.train None, not 5;"),
        ({"data": None}, r"its run has data \{.*\}, not None;"),
        ({"target": "ort:cpu"}, r"its run has target None, not ort:cpu;"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_key_old_and_new(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    opened(tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(UsageError, match=says):
        opened(tmp_path / "run", {**RECIPE, **change})
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"passes": [{"name": "x"}]}, {"guard": {"max_drop": 2.0}}, {"data": {**RECIPE["data"], "workers": 4}}]
)
def test_what_changes_no_finished_step_may_change(change: dict[str, Any], tmp_path: Path) -> None:
    opened(tmp_path / "run")
    run = opened(tmp_path / "run", {**RECIPE, **change})
    key, value = next(iter(change.items()))
    assert yaml.safe_load(run.recipe_path.read_text())[key] == value


def test_a_run_is_not_gone_on_with_unless_asked(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds a run already; add --resume to go on, or choose another place$"):
        Run.open(tmp_path / "run", RECIPE, resume=False)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("resume", [False, True])
def test_something_else_is_never_written_into(kind: str, resume: bool, tmp_path: Path) -> None:
    place = tmp_path / "thesis"
    if kind == "file":
        place.write_text("chapter 1")
    else:
        place.mkdir()
        (place / "chapter-1.txt").touch()
    with pytest.raises(UsageError, match=r"thesis: exists and is not a run; choose another place$"):
        Run.open(place, RECIPE, resume=resume)


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert Run.open(tmp_path, RECIPE, resume=False).recipe_path.is_file()


def test_a_folder_that_is_no_run_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run; give the --out of a `slim run`"):
        open_run(tmp_path)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00"])
def test_a_damaged_recipe_is_said_to_be_damaged(text: str, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.recipe_path.write_text(text)
    with pytest.raises(StoreError, match=r"recipe\.yaml: is damaged.*; choose another --out$"):
        opened(run.root)


@pytest.mark.parametrize("line", [b'{"position": 1, "na', b"{}\n", b"\xff\xfe\n", b"[]\n"])
def test_a_damaged_line_is_named(line: bytes, start: Artifact, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    chain(1)(start, Context(), run)
    with (run.root / "steps.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(
        StoreError, match=r"steps\.jsonl: line 2 is not a step record; delete the line to redo the step$"
    ):
        run.records()


def test_records_come_back_as_they_were_written(start: Artifact, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    result: Result = chain(1, 2)(start, Context(meter=Scripted()), run)
    assert tuple(run.records()) == result.records
    lines = (run.root / "steps.jsonl").read_text().splitlines()
    assert [Record.model_validate(json.loads(line)) for line in lines] == list(result.records)
