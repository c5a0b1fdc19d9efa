"""The pass on real digits: what it leaves alone, what it reads, and what it leaves behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from slim import loaders, pretrained, recipe, training
from slim.artifact import Artifact
from slim.data import Data, open_data
from slim.errors import DivergedError, PassError
from slim.export.onnx import export_onnx
from slim.passes.distill import Distill, objective
from slim.passes.distill.teacher import Teacher
from slim.pipeline import Pipeline
from slim.runs import Run
from tests.passes.distill.classroom import (
    FAST,
    NETWORKS,
    Spy,
    after,
    artifact,
    context,
    kd,
    said,
    saved,
    written,
)

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")


# What it leaves alone


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
