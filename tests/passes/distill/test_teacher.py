"""The teacher: found by name, frozen for good, shown the student's view as it was trained, in the student's classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as transforms
from torch import Tensor

from slim.artifact import Artifact, Preprocessing, state_digest
from slim.contract import Context
from slim.errors import PassError, StoreError
from slim.passes.distill.teacher import Teacher, classes_of, find
from slim.sources import imagenet_names
from tests.passes.distill.classroom import CPU, INPUT, LABELS, VIT, artifact, noise, saved

pytestmark = pytest.mark.usefixtures("one_thread")
OTHER = Preprocessing(size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), crop=1.0)


def normalised(pixels: Tensor, spec: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (pixels - mean) / std


def teacher_of(given: Artifact, student: Preprocessing = INPUT, **fields: Any) -> Teacher:
    return Teacher(given, student, **{"device": CPU, "precision": "fp32", **fields})


# What it is shown


@pytest.mark.parametrize("autocast", [False, True])
def test_it_sees_its_own_normalisation_of_the_students_pixels(autocast: bool) -> None:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = teacher_of(artifact("vit", input=OTHER))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        view = teacher.view(normalised(pixels, INPUT))
    assert view.dtype == torch.float32
    torch.testing.assert_close(view, normalised(pixels, OTHER), rtol=0, atol=1e-5)


def test_with_equal_preprocessing_it_sees_the_very_values_of_the_student() -> None:
    images = noise()
    assert torch.equal(teacher_of(artifact("vit")).view(images), images)


def test_it_sees_images_of_its_own_size() -> None:
    large = OTHER.model_copy(update={"size": (3, 48, 48)})
    teacher = teacher_of(artifact("vit", kwargs={**VIT, "img_size": 48}, input=large))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Resized before it is normalised, as images are read; the order does not matter to an affine map.
    resized = transforms.resize(pixels, [48, 48], transforms.InterpolationMode.BICUBIC, antialias=True)
    view = teacher.view(normalised(pixels, INPUT))
    torch.testing.assert_close(view, normalised(resized, large), rtol=0, atol=1e-5)
    assert teacher.logits(normalised(pixels, INPUT)).shape == (2, 10)


def test_it_answers_what_its_network_answers_also_under_autocast() -> None:
    given, images = artifact("vit"), noise()
    with torch.no_grad():
        expected = given.model()(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher_of(given).logits(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_in_bf16_its_network_is_and_its_answer_is_not() -> None:
    teacher = teacher_of(artifact("vit"), precision="bf16")
    assert {value.dtype for value in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.logits(noise()).dtype == teacher.view(noise()).dtype == torch.float32


def test_a_teacher_of_grey_images_is_refused() -> None:
    grey = Preprocessing(size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    with pytest.raises(PassError, match="sees 1 channels, the network 3; give a teacher of as many"):
        teacher_of(artifact("vit", kwargs={**VIT, "in_chans": 1}, input=grey))


# Frozen


@pytest.mark.parametrize("name", ["dropout", "densenet"])
def test_it_cannot_be_put_into_training_mode(name: str) -> None:
    teacher, images = teacher_of(artifact(name)), noise()
    first, values = teacher.logits(images), state_digest(teacher.state_dict())
    teacher.train()
    assert not [part for part, module in teacher.named_modules() if module.training]
    assert torch.equal(teacher.logits(images), first), "dropout or batch statistics were at work"
    assert state_digest(teacher.state_dict()) == values


def test_none_of_its_values_wants_a_gradient_and_none_flows() -> None:
    teacher = teacher_of(artifact("vit"))
    assert not [name for name, value in teacher.named_parameters() if value.requires_grad]
    images = noise().requires_grad_()
    found = teacher(images, indices=(0, 1), embedding=True, final=True)
    shown: Any = [found.logits, found.embedding, found.final, *found.maps.values(), *found.prefix.values()]
    assert not any(value.requires_grad for value in shown)
    # Not from inference mode: what a student's loss saves for its backward pass may not come from there.
    assert not any(value.is_inference() for value in shown)


# In the student's classes


def test_equal_names_in_equal_order_are_taken_as_they_are() -> None:
    assert classes_of(artifact("vit"), LABELS, 10) is None


def test_names_in_another_order_are_put_in_the_students() -> None:
    given, mixed = artifact("vit"), tuple("3758019246")
    classes = classes_of(replace(given, labels=mixed), LABELS, 10)
    teacher, images = teacher_of(given, classes=classes), noise()
    with torch.no_grad():
        own = given.model()(images)
    found = teacher.logits(images)
    for output, label in enumerate(LABELS):
        assert torch.equal(found[:, output], own[:, mixed.index(label)])


def test_a_student_of_fewer_classes_takes_its_own() -> None:
    assert classes_of(artifact("vit"), ("7", "0"), 2) == (7, 0)


@pytest.mark.parametrize("described", [False, True])
def test_folders_with_wordnet_names_are_a_part_of_imagenet(described: bool) -> None:
    from timm.data import ImageNetInfo

    names = imagenet_names()
    labels = tuple(ImageNetInfo("imagenet-1k").label_descriptions()) if described else None
    given = artifact("vit", num_classes=1000, labels=labels)
    chosen = (names[207], names[3], names[999])
    classes = classes_of(given, chosen, 3)
    assert classes == (207, 3, 999)
    with torch.no_grad():
        expected = given.model()(noise())[:, [207, 3, 999]]
    torch.testing.assert_close(teacher_of(given, classes=classes).logits(noise()), expected)


def test_a_thousand_other_classes_are_not_taken_for_imagenet() -> None:
    given = artifact("vit", num_classes=1000, labels=tuple(f"part {number}" for number in range(1000)))
    with pytest.raises(PassError, match=f"it has no class '{imagenet_names()[5]}'"):
        classes_of(given, (imagenet_names()[5],), 1)


def test_without_names_equal_counts_are_the_same_classes() -> None:
    assert classes_of(artifact("vit", labels=None), LABELS, 10) is None
    assert classes_of(artifact("vit"), None, 10) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "count", "why"),
    [
        (LABELS, (*LABELS[:9], "x"), 10, "10 outputs, the network 10, and it has no class 'x'"),
        (None, LABELS[:3], 3, "10 outputs, the network 3, and their names do not say which is which"),
        (LABELS, None, 7, "10 outputs, the network 7, and their names do not say which is which"),
    ],
)
def test_classes_that_do_not_fit_are_named_with_a_way_out(theirs: Any, ours: Any, count: int, why: str) -> None:
    with pytest.raises(PassError) as caught:
        classes_of(artifact("vit", labels=theirs), ours, count)
    assert str(caught.value) == (
        f"distill: class-count mismatch: teacher vit_tiny_patch16_224 has {why}; give a teacher of these classes,"
        " or --method cosine"
    )


# Where it comes from


def test_stage_and_dense_are_the_network_itself() -> None:
    stage, dense = artifact("vit"), artifact("vit", seed=2)
    here = Context(reference=stage, dense=dense)
    assert find("stage", here) is stage
    assert find("dense", here) is dense


def test_a_folder_is_an_artifact_or_a_run(tmp_path: Path) -> None:
    given = artifact("wide")
    assert find(saved(given, tmp_path / "artifact"), Context()).digest == given.digest
    saved(given, tmp_path / "run" / "final")
    assert find(str(tmp_path / "run"), Context()).digest == given.digest


def test_a_folder_whose_artifact_was_replaced_is_read_again(tmp_path: Path) -> None:
    first, second = artifact("vit"), artifact("vit", seed=2)
    assert find(saved(first, tmp_path / "it"), Context()).digest == first.digest
    assert find(saved(second, tmp_path / "it"), Context()).digest == second.digest


def test_what_is_no_teacher_is_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no artifact and no run; give one that `slim run` wrote"):
        find(str(tmp_path), Context())
    with pytest.raises(PassError, match=r"--teacher runs/none: no such folder; give a run, an artifact or a timm name"):
        find("runs/none", Context())
    with pytest.raises(PassError, match=r"--teacher resnet5: model 'resnet5' is not a timm model; did you mean"):
        find("resnet5", Context())
