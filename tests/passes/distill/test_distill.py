"""The pass on real digits: what it leaves alone, what it reads, what recovery gives, and what cannot work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim import contract, loaders, pretrained, recipe, training
from slim.artifact import Artifact, Preprocessing
from slim.data import Data, open_data
from slim.errors import DivergedError, OrderError, PassError, RecipeError, StoreError
from slim.export.onnx import export_onnx
from slim.passes.distill import Distill, objective, taps
from slim.passes.distill.presets import PRESETS
from slim.passes.distill.targets import bytes_needed, tolerance
from slim.passes.distill.teacher import Teacher
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.pipeline import Pipeline
from slim.recipe import Recipe
from slim.runs import Run, step_key
from tests.conftest import Call
from tests.passes.distill.classroom import FAST, INPUT, NETWORKS, VIT, artifact, context, saved, written

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")
FACTOR = LowRank(ratio=0.3, min_width=16, align=1)
STILL: dict[str, Any] = {"optimizer": "sgd", "lr": 1e-12, "weight_decay": 0.0}
"""Training that changes nothing, so that its loss is that of the start."""


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=32)


def kd(**fields: Any) -> Distill:
    """Soft targets alone, on each image once, from whatever the context has for the stage's reference."""
    return Distill(**{**FAST, "method": "kd", **fields})


def after(options: Distill, student: Artifact, teacher: Artifact, data: Data, **fields: Any) -> Artifact:
    return options(student, context(data, teacher=teacher, **fields))


def said(result: Artifact) -> Any:
    return result.history[-1].metrics


# What it leaves alone


class Spy:
    """What a training was given, seen on its way there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.optimised: list[Tensor] = []
        self.teachers: list[Teacher] = []
        self.shown: list[tuple[nn.Module, Tensor]] = []
        self.taught: list[str] = []
        self.learning = False
        make, begin, look, train = (
            training_optimiser(),
            Teacher.__init__,
            taps.outputs,
            contract.Context.train,
        )
        ask = Teacher.forward

        def optimiser(model: nn.Module, **fields: Any) -> Any:
            made = make(model, **fields)
            self.optimised += [value for group in made.param_groups for value in group["params"]]
            return made

        def teacher(this: Teacher, *args: Any, **fields: Any) -> None:
            begin(this, *args, **fields)
            self.teachers.append(this)

        def outputs(model: nn.Module, images: Tensor, **fields: Any) -> Any:
            if self.learning:
                self.shown.append((model, images))
            return look(model, images, **fields)

        def answer(this: Teacher, images: Tensor, **fields: Any) -> Any:
            self.taught += ["in training" if self.learning else "before"] * len(images)
            return ask(this, images, **fields)

        def learn(*args: Any) -> Any:
            self.learning = True
            try:
                return train(*args)
            finally:
                self.learning = False

        monkeypatch.setattr("timm.optim.create_optimizer_v2", optimiser)
        monkeypatch.setattr(Teacher, "__init__", teacher)
        monkeypatch.setattr(Teacher, "forward", answer)
        monkeypatch.setattr(objective.taps, "outputs", outputs)
        monkeypatch.setattr(contract.Context, "train", learn)


def training_optimiser() -> Callable[..., torch.optim.Optimizer]:
    from timm.optim import create_optimizer_v2

    made: Callable[..., torch.optim.Optimizer] = create_optimizer_v2
    return made


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize(("method", "beside"), [("kd", 0), ("cosine", 32 * 48 + 48), ("scalekd", None)])
def test_the_optimiser_has_the_student_and_what_is_trained_along_and_no_teacher(
    method: str, beside: int | None, digits: Data, spy: Spy
) -> None:
    student, options = artifact("vit"), kd(method=method)
    here = context(digits, teacher=artifact("wide"))
    declared = options.forecast(student, replace(here, backbone=student.backbone))["auxiliary_params"]
    assert declared == beside or (beside is None and isinstance(declared, int) and declared > 10_000)
    options(student, here)
    assert sum(value.numel() for value in spy.optimised) == student.costs["params"] + declared
    theirs = {id(value) for teacher in spy.teachers for value in teacher.parameters()}
    assert theirs.isdisjoint(map(id, spy.optimised))


def operators(given: Artifact, folder: Path) -> Counter[str]:
    file = export_onnx(given.model(), folder / f"{given.digest[:8]}.onnx", given.backbone.input)
    return Counter(node.op_type for node in onnx.load(file.path).graph.node)


def test_what_is_shipped_is_the_network_as_it_was(digits: Data, tmp_path: Path, spy: Spy) -> None:
    student = artifact("vit")
    before = operators(student, tmp_path)
    result = after(kd(method=("recover", "scalekd", "cosine")), student, artifact("vit", seed=2), digits)
    assert set(said(result)["losses"]) > {"forward", "hidden", "proxy_ori", "embedding"}
    assert {key: value.shape for key, value in result.state.items()} == {
        key: value.shape for key, value in student.state.items()
    }
    assert operators(result, tmp_path) == before
    for teacher in spy.teachers:
        assert not any(value.requires_grad or value.grad is not None for value in teacher.parameters())
        assert not any(module.training for module in teacher.modules())


def test_a_teacher_that_changes_is_found_out(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Teacher.forward

    def learning(this: Teacher, images: Tensor, **fields: Any) -> Any:
        this.model.train()
        return forward(this, images, **fields)

    monkeypatch.setattr(Teacher, "forward", learning)
    with pytest.raises(PassError, match="the teacher changed while it taught, which it must not"):
        after(kd(), artifact("vit"), artifact("densenet"), digits)


# What it reads


def shuffled(data: Data) -> Data:
    train = data.split("train")
    labels = tuple((label + 1 + index % 3) % 10 for index, label in enumerate(train.labels))
    return replace(data, splits={**data.splits, "train": replace(train, labels=labels)})


def test_labels_are_not_read(digits: Data, tmp_path: Path) -> None:
    student, teacher = artifact("vit"), artifact("wide")
    options = kd(method="jeffreys", mixup=0.2, smoothing=0.1)
    first = after(options, student, teacher, digits)
    assert after(options, student, teacher, shuffled(digits)).digest == first.digest
    # The same images where nothing has a label.
    pool = open_data("digits", limit_train=64, unlabeled=str(written(digits, "train", tmp_path / "pool")))
    assert set(pool.split("unlabeled").labels) == {-1}
    unlabelled = after(options.model_copy(update={"images": "unlabeled"}), student, teacher, pool)
    assert unlabelled.digest == first.digest
    assert set(said(first)) == set(said(unlabelled)) == {"loss", "steps", "images", "precision", "teachers"}


def test_labels_are_read_where_they_have_a_weight(digits: Data) -> None:
    student, teacher, options = artifact("vit"), artifact("wide"), kd(label_weight=0.5)
    first = after(options, student, teacher, digits)
    assert after(options, student, teacher, shuffled(digits)).digest != first.digest
    assert set(said(first)["losses"]) == {"forward", "label"}


def views(spy: Spy) -> list[tuple[Tensor, Tensor]]:
    """What the student and the teacher saw in each step."""
    pairs = list(zip(spy.shown[::2], spy.shown[1::2], strict=True))
    students, teachers = {id(one[0]) for one, _ in pairs}, {id(one[0]) for _, one in pairs}
    assert (len(students), len(teachers)) == (1, 1)
    spy.shown.clear()
    return [(ours, theirs) for (_, ours), (_, theirs) in pairs]


def test_the_teacher_sees_what_the_student_sees_mixed_or_not(
    digits: Data, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(**fields: Any) -> list[tuple[Tensor, Tensor]]:
        after(kd(**fields), artifact("vit"), artifact("wide"), digits)
        return views(spy)

    plain, mixed = seen(), seen(mixup=1.0)
    monkeypatch.setattr(loaders.TrainSamples, "_partner", lambda self, index: (index + 1) % len(self.split))
    with_others = seen(mixup=1.0)
    assert len(plain) == len(mixed) == 4
    for ours, theirs in (*plain, *mixed, *with_others):
        assert torch.equal(ours, theirs)
    for one, two, three in zip(plain, mixed, with_others, strict=True):
        for whose in (0, 1):
            assert not torch.equal(one[whose], two[whose])
            assert not torch.equal(two[whose], three[whose])


def test_all_images_are_the_labelled_and_the_pool(digits: Data, tmp_path: Path) -> None:
    pool = open_data("digits", limit_train=64, unlabeled=str(written(digits, "val", tmp_path / "pool")))
    options = kd(images="all", label_weight=1.0)
    assert options.reads == {"train", "unlabeled"}
    result = after(options, artifact("vit"), artifact("wide"), pool)
    assert (said(result)["steps"], said(result)["images"]) == (6, 96)
    assert 0 < said(result)["losses"]["label"][0] < said(after(kd(label_weight=1.0), artifact("vit"),
        artifact("wide"), pool))["losses"]["label"][0]  # fmt: skip


def test_a_pool_alone_is_enough(digits: Data, tmp_path: Path) -> None:
    root = tmp_path / "data"
    written(digits, "val", root / "val", by_class=True)
    pool = open_data(f"folder:{root}", unlabeled=str(written(digits, "train", tmp_path / "pool")))
    assert set(pool.splits) == {"val", "unlabeled"}
    chain = Pipeline((kd(teacher=saved(artifact("wide"), tmp_path / "teacher"), images="unlabeled"),))
    chain.check(artifact("vit"), context(pool), fresh_head="new")
    result = chain(artifact("vit"), context(pool))
    assert said(result.artifact)["images"] == 64


# Recovery


@pytest.fixture(scope="module")
def able() -> tuple[Artifact, Data]:
    """A network that has learned the digits, and more of them."""
    data = open_data("digits", limit_train=320, limit_val=200)
    learn = Finetune(epochs=8, lr=3e-3, flip=0.0, scale_low=0.9, precision="fp32")
    return learn(artifact("vit"), context(data)), data


def compared(one: Artifact, other: Artifact, data: Data) -> tuple[float, float]:
    """KL(other || one) on the validation images, and the share of them on which both agree."""
    divergence = agreement = images = 0.0
    with torch.no_grad():
        for shown, _ in data.eval_batches("val", INPUT, batch_size=100):
            ours, theirs = one.model()(shown), other.model()(shown)
            divergence += float(
                F.kl_div(F.log_softmax(ours, 1), F.log_softmax(theirs, 1), reduction="sum", log_target=True)
            )
            agreement += float((ours.argmax(1) == theirs.argmax(1)).sum())
            images += len(shown)
    return divergence / images, agreement / images


def test_behind_a_structural_pass_the_network_learns_to_be_what_it_was(able: tuple[Artifact, Data]) -> None:
    given, data = able
    recover = Distill(epochs=4, flip=0.0, scale_low=0.9, precision="fp32")
    assert (recover.teacher, recover.method, recover.preset, recover.lr) == (("stage",), ("recover",), "recover", 1e-4)
    chain = Pipeline((FACTOR, recover.model_copy(update={"lr": 1e-3})))
    result = chain(given, context(data))
    _, factored, last = result.artifact.history
    assert last.digests["teacher"] == last.digests["reference"] == factored.digests["input"] == given.digest
    assert said(result.artifact)["teachers"] == [
        {"network": f"vit_tiny_patch16_224 {given.digest[:12]}", "hidden": [0, 1], "not_compared": []}
    ]
    assert set(said(result.artifact)["losses"]) == {"forward", "hidden"}
    before, now = (compared(one, given, data) for one in (FACTOR(given), result.artifact))
    # Seen: 0.056 to 0.0035 nat, and 66 % to 91 % of the images.
    assert now[0] < before[0] / 4
    assert now[1] > before[1] + 0.1


def test_a_bare_recovery_has_the_rate_of_its_preset(able: tuple[Artifact, Data]) -> None:
    given, _ = able
    few = open_data("digits", limit_train=32, limit_val=8)
    result = Pipeline((FACTOR, Distill(epochs=1)))(given, context(few)).artifact
    config = result.history[-1].config
    assert {name: config[name] for name in ("preset", "method", "teacher", "lr", "epochs", "label_weight")} == {
        "preset": "recover", "method": ["recover"], "teacher": ["stage"], "lr": 1e-4, "epochs": 1, "label_weight": 0.0,
    }  # fmt: skip


def test_dense_is_the_network_before_any_compression_in_every_stage(digits: Data) -> None:
    first = FACTOR.model_copy(update={"skip": ("blocks.1.*",)})
    learn = Finetune(**FAST)
    chain = Pipeline((learn, first, kd(), FACTOR, kd(teacher="dense"), kd(teacher="stage")))
    _, factored, one, again, dense, stage = chain(artifact("vit"), context(digits)).artifact.history
    assert one.digests["teacher"] == dense.digests["teacher"] == factored.digests["input"]
    assert stage.digests["teacher"] == again.digests["input"] == one.digests["output"]


@pytest.mark.parametrize("teacher", ["stage", "dense", "both"])
def test_recovery_before_any_structure_is_an_error_of_order(
    teacher: str, call: Call, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    words = [saved(artifact("vit"), tmp_path / "teacher"), "stage"] if teacher == "both" else [teacher]
    options = [word for one in words for word in ("--teacher", one)]
    ended = call("run", *tiny, "--dry-run", "distill", *options, "low-rank")
    assert ended.code == OrderError.exit_code == 2
    assert ended.error == (
        "step 1 'distill' learns from the network before its stage, but no structural pass comes before it;"
        " give --teacher NAME or PATH, or put it behind one"
    )


def test_a_teacher_that_was_taught_teaches_on(digits: Data, tmp_path: Path) -> None:
    """A teacher assistant: the run of a first distillation is the teacher of a second."""
    large = saved(artifact("resnet"), tmp_path / "large")
    run = Run.open(tmp_path / "run", {}, resume=False)
    assistant = Pipeline((kd(teacher=large),))(artifact("wide"), context(digits), run).artifact
    saved(assistant, run.final)
    result = Pipeline((kd(teacher=str(run.root)),))(artifact("vit"), context(digits)).artifact
    assert result.history[-1].digests["teacher"] == assistant.digest
    assert assistant.history[-1].digests["teacher"] == artifact("resnet").digest


def test_several_teachers_are_named(digits: Data, tmp_path: Path) -> None:
    names = [saved(artifact(name), tmp_path / name) for name in ("wide", "resnet")]
    result = Pipeline((kd(teacher=names),))(artifact("vit"), context(digits)).artifact
    digests = [artifact(name).digest for name in ("wide", "resnet")]
    assert result.history[-1].digests["teacher"] == "+".join(digests)
    assert [one["network"].split()[1] for one in said(result)["teachers"]] == [digest[:12] for digest in digests]
    alone = [Pipeline((kd(teacher=name),))(artifact("vit"), context(digits)).artifact for name in names]
    assert len({result.digest, *(one.digest for one in alone)}) == 3


def test_another_teacher_is_other_work(digits: Data, tmp_path: Path) -> None:
    given, options = artifact("vit"), kd(teacher=saved(artifact("wide"), tmp_path / "teacher"))
    keys = []
    for teacher in (artifact("wide"), artifact("wide", seed=2)):
        saved(teacher, tmp_path / "teacher")
        keys.append(step_key(options, given, given, context(digits)))
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["teacher"]


def test_classes_are_put_in_order_by_their_names(able: tuple[Artifact, Data], digits: Data, tmp_path: Path) -> None:
    given, _ = able
    order = torch.tensor([3, 7, 5, 8, 0, 1, 9, 2, 4, 6])
    state = {key: value[order] if key.startswith("head.") else value for key, value in given.state.items()}

    def loss(**fields: Any) -> float:
        teacher = saved(replace(given, state=state, **fields), tmp_path / "teacher")
        result = Pipeline((kd(teacher=teacher, **STILL),))(given, context(digits)).artifact
        return float(said(result)["loss"][0])

    assert loss(labels=tuple("3758019246")) <= 1e-6
    assert loss(labels=None) > 0.5, "the order makes no difference"


# Options and presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_what_is_not_given_and_nothing_else(name: str) -> None:
    found, plain = Distill(preset=name), Distill(method="kd")
    for field in Distill.model_fields:
        expected = {"preset": name, **PRESETS[name]}.get(field, getattr(plain, field))
        assert getattr(found, field) == expected, field
    # A value that happens to be the usual one is one that was given.
    given = {field: Distill.model_fields[field].default for field in PRESETS[name] if field != "method"}
    overruled = Distill(preset=name, method="kd", **given)
    assert all(getattr(overruled, field) == value for field, value in given.items())
    assert overruled.method == ("kd",)


def test_without_a_preset_the_teacher_decides() -> None:
    assert Distill().preset == Distill(teacher="dense").preset == "recover"
    for other in (Distill(teacher="runs/x"), Distill(method="kd"), Distill(teacher=("stage", "runs/x"))):
        assert (other.preset, other.method, other.lr) == (None, ("kd",), Distill.model_fields["lr"].default)
    # An empty list is no teacher and no method.
    assert Distill(teacher=(), method=()).model_dump() == Distill().model_dump()


@pytest.fixture
def emitted(call: Call) -> Callable[..., Recipe]:
    """The recipe that a command line comes to, through the YAML it prints."""

    def emit(*words: str) -> Recipe:
        done = call("run", "--emit-yaml", "--model", "resnet18", *words)
        assert (done.code, done.err) == (0, "")
        return recipe.parse(recipe.plain_yaml(done.out), place="test")

    return emit


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preset": "ssld", "lr": 1e-3},
        {"method": ["dist=2", "kd"], "teacher": ["a/b", "dense"]},
        {"teacher": ["runs/large"], "label_weight": 0.5, "trainable": "head"},
    ],
)
def test_a_distillation_is_the_same_on_all_three_roads(fields: dict[str, Any], emitted: Callable[..., Recipe]) -> None:
    python = Distill(**fields)
    words = [str(word) for name, value in fields.items() for one in (value if isinstance(value, list) else [value])
             for word in (f"--{name.replace('_', '-')}", one)]  # fmt: skip
    (on_the_line,) = emitted("distill", *words).passes
    (in_a_file,) = recipe.parse({"model": "x", "passes": [{"name": "distill", **fields}]}, place="test").passes
    assert python == on_the_line == in_a_file


def test_a_preset_set_afterwards_is_followed(emitted: Callable[..., Recipe]) -> None:
    (found,) = emitted("--set", "passes.0.preset=ssld", "distill", "--preset", "recover", "--epochs", "3").passes
    assert found == Distill(preset="ssld", epochs=3)
    (found,) = emitted("--set", "passes.0.teacher=runs/x", "distill").passes
    assert found == Distill(teacher="runs/x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "kdd"}, r"method: 'kdd' is unknown; did you mean 'kd'\?"),
        ({"method": "kd=0"}, "method: 'kd=0': the weight of a method is a number above 0"),
        ({"method": ["kd", "kd"]}, "method: 'kd' is given twice"),
        ({"preset": "fst"}, "preset: 'fst' should be "),
        ({"teacher": 5}, "teacher: 5 should be "),
        ({"method": "hidden", "cache": "c"}, "cache: method 'hidden' reads more of the teacher than its logits; drop"),
        ({"cache": "c"}, "cache: method 'recover' reads more of the teacher than its logits"),
        ({"method": "kd", "cache": "c", "teacher": ["a", "b"]}, "cache: it holds one teacher's targets, not 2"),
        ({"method": "kd", "cache": "c", "standardize": True}, "cache: standardize reads all logits, of which"),
        ({"method": "hidden", "trainable": "head"}, "trainable head: method 'hidden' leaves the classifier alone; use"),
        ({"method": "token", "label_weight": 1, "trainable": "head"}, "trainable head: method 'token' needs both"),
        (
            {"method": ["token", "hidden"]},
            "method 'token' teaches the second classifier alone, and the network answers",
        ),
    ],
)
def test_options_that_cannot_be_say_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^distill: {message}"):
        recipe.build_pass(Distill, fields)


def test_a_wrong_option_ends_with_2_and_one_line(call: Call) -> None:
    ended = call("run", "--emit-yaml", "--model", "resnet18", "distill", "--method", "hiden")
    assert (ended.code, ended.error) == (2, "distill: method: 'hiden' is unknown; did you mean 'hidden'?")


# The cache


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return saved(artifact("wide"), tmp_path / "teacher")


def test_a_cache_gives_the_losses_of_its_teacher(able: tuple[Artifact, Data], digits: Data, tmp_path: Path) -> None:
    """The student stands still, so that nothing but the targets differs."""
    given, student = able[0], artifact("vit", seed=3)
    still = {**STILL, "epochs": 2}
    live = said(after(kd(**still), student, given, digits))
    spread = 0.0
    with torch.no_grad():
        for epoch in (0, 1):
            shown = digits.views(INPUT, kd(), range(64), seed=0, epoch=epoch, batch_size=64, num_classes=10)
            logits = student.model()(next(shown).images)
            spread = max(spread, float((logits.amax(1) - logits.amin(1)).max()))
    for mass in (0.9, 0.999):
        place = tmp_path / str(mass)
        cached = said(after(kd(**still, cache=str(place), cache_mass=mass, cache_check=128), student, given, digits))
        index = json.loads((place / "index.json").read_text())
        allowed = tolerance(cached["cache"]["mass"], classes=10, k=index["k"], spread=spread)
        for expected, found in zip(live["loss"], cached["loss"], strict=True):
            assert abs(found - expected) <= allowed
        assert allowed < live["loss"][0] / 2, "nothing is told apart"
        assert cached["cache"]["records"] == 128
        assert cached["cache"]["mass"] >= mass - 0.05  # k was chosen by the first epoch alone


def test_with_every_class_stored_a_training_is_that_of_the_teacher(digits: Data, teacher: str, tmp_path: Path) -> None:
    options = {"teacher": teacher, "epochs": 3, "optimizer": "sgd", "lr": 0.05, "temperature": 2.0}
    live = kd(**options)(artifact("vit"), context(digits))
    cached = kd(**options, cache=str(tmp_path / "cache"), cache_mass=1.0)(artifact("vit"), context(digits))
    assert said(live)["loss"][-1] < said(live)["loss"][0] * 0.9, "nothing was learned, so nothing is compared"
    # float16 moves a probability by 2^-11 of itself, so a loss of n nat by about so much of n and its logarithm.
    assert said(cached)["loss"] == pytest.approx(said(live)["loss"], rel=5e-3)


def test_a_cached_teacher_is_not_asked_in_training_and_the_next_time_for_the_check_alone(
    digits: Data, teacher: str, tmp_path: Path, spy: Spy
) -> None:
    def asked(**fields: Any) -> Counter[str]:
        spy.taught.clear()
        kd(teacher=teacher, epochs=2, cache=str(tmp_path / "cache"), **fields)(artifact("vit"), context(digits))
        return Counter(spy.taught)

    filling = asked()
    assert filling == {"before": 64 + 128 + 64}  # to choose k, every view, and the check
    assert asked() == {"before": 64}
    assert asked(cache_check=10, lr=1e-4, label_weight=1.0) == {"before": 10}
    assert asked(cache_check=0) == {}
    spy.taught.clear()
    kd(teacher=teacher, epochs=2)(artifact("vit"), context(digits))
    assert Counter(spy.taught) == {"in training": 128}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"flip": 0.5}, "augmentation"),
        ({"mixup": 0.2}, "augmentation"),
        ({"temperature": 2.0}, "temperature 1.0, not 2.0"),
        ({"precision": "bf16"}, "precision torch.float32, not torch.bfloat16"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"teacher": artifact("wide", seed=2)}, "teacher "),
        ({"images": 63}, "images"),
        ({"input": Preprocessing(size=(3, 32, 32), mean=(0.0, 0.0, 0.0), crop=1.0)}, "input "),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_cache_of_other_targets_is_refused_before_any_work(
    change: dict[str, Any], named: str, digits: Data, teacher: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"teacher": teacher, "cache": str(tmp_path / "cache")}
    kd(**fields)(artifact("vit"), context(digits))
    student, data, seed = artifact("vit"), digits, change.get("seed", 0)
    if "teacher" in change:
        saved(change["teacher"], Path(teacher))
    elif "images" in change:
        data = open_data("digits", limit_train=change["images"])
    elif "input" in change:
        student = replace(student, backbone=student.backbone.model_copy(update=change))
    elif "seed" not in change:
        fields |= change
    here = context(data, seed=seed)
    with pytest.raises(StoreError, match=rf"cache: its targets have .*{named}.*; give another folder"):
        Pipeline((kd(**fields),)).forecast(student, here)
    with pytest.raises(StoreError, match=named):
        kd(**fields)(student, here)


def test_smoothed_labels_and_another_batch_size_need_no_other_targets(
    digits: Data, teacher: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"teacher": teacher, "cache": str(tmp_path / "cache"), "label_weight": 1.0}
    kd(**fields)(artifact("vit"), context(digits))
    kd(**fields, smoothing=0.1)(artifact("vit"), replace(context(digits), loading=contract.Loading(batch_size=32)))


def test_targets_that_the_teacher_no_longer_gives_are_found_out(
    digits: Data, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = kd(teacher=teacher, cache=str(tmp_path / "cache"))
    options(artifact("vit"), context(digits))
    logits = Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda this, images: logits(this, images).flip(1))
    with pytest.raises(StoreError, match=r"stored is class .* beyond rounding; fill another folder"):
        options(artifact("vit"), context(digits))


# A distillation token


@pytest.mark.parametrize("method", ["token", "token-soft"])
def test_a_token_learns_and_the_network_answers_with_one_tensor_again(method: str, digits: Data) -> None:
    given = artifact("deit")
    model: Any = given.model()
    options = kd(method=method, label_weight=1.0)
    here = replace(context(digits, teacher=artifact("wide")), backbone=given.backbone)
    figures: Any = options.fit(model, given.model(), here)
    assert set(figures["losses"]) == {"token", "label"}
    assert not torch.equal(model.head_dist.weight, given.state["head_dist.weight"])
    assert model.distilled_training is False
    assert isinstance(model.train()(torch.zeros(1, 3, 32, 32)), Tensor)


def test_it_does_so_too_where_training_fails(digits: Data) -> None:
    given = artifact("deit")
    model: Any = given.model()
    options = kd(method="token", label_weight=1.0, optimizer="sgd", lr=1e30, clip=0.0, warmup=0.0)
    with pytest.raises(DivergedError):
        options.fit(model, given.model(), replace(context(digits, teacher=artifact("wide")), backbone=given.backbone))
    assert model.distilled_training is False


# The classifier alone


def test_the_head_alone_is_trained_and_norms_keep_their_statistics(digits: Data) -> None:
    given = artifact("resnet")
    result = after(kd(trainable="head", lr=0.01), given, artifact("wide"), digits)
    changed = {key for key, value in result.state.items() if not torch.equal(value, given.state[key])}
    assert changed == {"fc.weight", "fc.bias"}
    assert [key for key in given.state if key.endswith("running_mean")], "there are statistics to keep"


def test_the_head_can_be_trained_at_another_size_by_a_run_of_its_own(digits: Data, tmp_path: Path) -> None:
    """SSLD's last stage: the network at a larger input is another run that starts from its weights."""
    saved(artifact("resnet"), tmp_path / "first")
    (file,) = (tmp_path / "first").glob("*.safetensors")
    name, kwargs = NETWORKS["resnet"]
    spec = recipe.ModelSpec.model_validate(
        {"name": name, "args": kwargs, "weights": str(file), "input": {"size": (3, 48, 48), "crop": 1.0}}
    )
    begin = pretrained.start(spec, digits, seed=0)
    assert begin.fresh_head == ""
    teacher = saved(artifact("wide"), tmp_path / "teacher")
    options = Distill(preset="ssld-head", teacher=teacher, epochs=1, precision="fp32")
    result = Pipeline((options,))(begin.artifact, context(digits)).artifact
    assert result.backbone.input.size == (3, 48, 48)
    first = artifact("resnet").state
    assert {key for key in first if not torch.equal(first[key], result.state[key])} == {"fc.weight", "fc.bias"}


# Taken up after a kill


def test_a_killed_run_ends_with_the_values_it_would_have_had(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With values that are trained along: they are in the checkpoint, and so is what the optimiser knows of them."""
    teacher = saved(artifact("wide"), tmp_path / "teacher")
    chain = Pipeline((Distill(**{**FAST, "teacher": teacher, "method": ("cosine", "kd"), "epochs": 3, "lr": 0.01}),))
    whole = chain(artifact("dropout"), context(digits)).artifact
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 3)
    run = Run.open(tmp_path / "run", {}, resume=False)
    forward, calls = objective.Distillation.forward, iter(range(100))

    def killed(*args: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(objective.Distillation, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            chain(artifact("dropout"), context(digits), run)
    with caplog.at_level("INFO", "slim"):
        again = chain(artifact("dropout"), context(digits), Run.open(tmp_path / "run", {}, resume=True)).artifact
    assert "training goes on from step 6 of 12" in caplog.text
    assert again.weights == whole.weights
    assert said(again) == said(whole)


# What is said before any work


def test_a_forecast_says_what_a_distillation_will_cost(digits: Data, teacher: str, tmp_path: Path) -> None:
    student, here = artifact("vit"), context(digits)
    cache = tmp_path / "cache"
    (found,) = Pipeline((kd(teacher=teacher, epochs=5, cache=str(cache)),)).forecast(student, here)
    # By hand, tokens = 17: patches, four products of each block, attention, and the classifier.
    assert found == {
        "teacher": "vit_tiny_patch16_224",
        "teacher_macs": vit_macs(48),
        "student_macs": vit_macs(32),
        "auxiliary_params": 0,
        "steps": 5 * 4,
        "cache_bytes": 5 * (64 * 10 * 4 + 32),
    }
    assert not cache.exists()
    kd(teacher=teacher, epochs=5, cache=str(cache))(student, here)
    stored = sum(file.stat().st_size for file in cache.glob("*.bin"))
    (again,) = Pipeline((kd(teacher=teacher, epochs=5, cache=str(cache)),)).forecast(student, here)
    assert again["cache_bytes"] == stored
    (two,) = Pipeline((kd(teacher=(teacher, teacher), method=("kd", "cosine")),)).forecast(student, here)
    assert (two["teacher"], two["teacher_macs"]) == ("vit_tiny_patch16_224, vit_tiny_patch16_224", 2 * vit_macs(48))
    assert two["auxiliary_params"] == 2 * (32 * 48 + 48)
    assert "cache_bytes" not in two


def vit_macs(width: int, depth: int = VIT["depth"]) -> int:
    tokens, patches, patch = 17, 16, 3 * 8 * 8
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    return patches * patch * width + depth * block + width * 10


def test_before_its_stage_is_known_a_cache_is_estimated(digits: Data, tmp_path: Path) -> None:
    chain = Pipeline((FACTOR, kd(cache=str(tmp_path), epochs=2)))
    assert chain.forecast(artifact("vit"), context(digits))[1]["cache_bytes"] == bytes_needed(64, 2, 10)


def test_a_dry_run_prints_the_forecast(call: Call, tiny: tuple[str, ...], teacher: str) -> None:
    chain = (
        "--batch-size",
        "50",
        "--dry-run",
        "distill",
        "--teacher",
        teacher,
        "--epochs",
        "3",
        "--method",
        "cosine",
        "--method",
        "kd",
    )
    ended = call("run", *tiny, *chain)
    assert ended.code == 0, ended.err
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.startswith("stage 1 1 distill (repair)"))
    assert lines[at + 1 : at + 6] == [
        "teacher vit_tiny_patch16_224",
        f"teacher macs {vit_macs(48) / 1e6:.2f} M",
        f"student macs {vit_macs(64, depth=1) / 1e6:.2f} M",
        f"auxiliary params {(64 * 48 + 48) / 1e3:.2f} k",
        "steps 12",
    ]
    as_json = json.loads(call("run", *tiny, "--json", *chain).out)["forecasts"]
    assert as_json[0]["steps"] == 3 * 200 // 50
