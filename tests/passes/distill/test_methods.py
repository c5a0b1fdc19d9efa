"""The table of methods, and the objective: what is learned, from whom, and which values it reaches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim import surgery
from slim.artifact import Artifact, state_digest
from slim.data import Batch, Data, open_data
from slim.errors import PassError
from slim.passes.distill import Distill, methods
from slim.passes.distill.embedding import EmbeddingTarget
from slim.passes.distill.hidden import Hidden, relative_distance
from slim.passes.distill.logits import hard, label_loss, soft_kl
from slim.passes.distill.method import Outputs
from slim.passes.distill.methods import BEYOND_LOGITS, RECOVER, TOKENS, WEIGHTS, Pair
from tests.passes.distill.classroom import (
    FACTOR,
    FAST,
    NETWORKS,
    RESNET,
    artifact,
    batches,
    named,
    noise,
    taught,
    written,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LABELLED = {"label_weight": 1.0}
DISTANCES = ("kd", "reverse-kl", "jeffreys", "js", "dist", "hidden", "recover", "cosine")


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=48, limit_val=16)


@pytest.fixture(scope="module")
def batch(digits: Data) -> Batch:
    return next(batches(digits, Distill(**FAST)))


def pair_of(student: Artifact, teacher: Artifact) -> Pair:
    sizes = student.backbone.input.size, teacher.backbone.input.size
    return Pair(student.model(), sizes[0], teacher.model(), sizes[1], teacher.state)


# The table


@pytest.mark.parametrize("name", [*WEIGHTS, RECOVER])
def test_every_word_of_the_table_is_made_and_learns(name: str, batch: Batch) -> None:
    """The table, its sets of names and what is made for each hold together."""
    student = FACTOR(artifact("vit")) if name.startswith("perturb") else artifact("deit")
    model, objective, _ = taught(student, artifact("vit"), method=name, label_weight=1.0)
    needs = [method.needs | {"map" for _ in method.student_maps} for method in objective.methods]
    assert any("logits" in one for one in needs) is (name not in BEYOND_LOGITS)
    assert any("token_logits" in one for one in needs) is (name in TOKENS)
    if name in TOKENS:
        model.set_distilled_training(True)  # type: ignore[operator]
    losses = objective(model.train(), batch)
    assert set(losses) > {"label"}
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        assert loss.isfinite()
    sum(losses.values(), torch.zeros(())).backward()
    assert all(value.grad is not None for value in objective.parameters())


def test_words_are_parsed_with_their_weights() -> None:
    assert methods.parse(("dist", "kd=0.5", "recover=2")) == [("dist", 2.0), ("kd", 0.5), ("recover", 2.0)]
    assert methods.parse(tuple(WEIGHTS)) == list(WEIGHTS.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("kdd",), r"'kdd' is unknown; did you mean 'kd'\?"),
        (("kd=0",), "'kd=0': the weight of a method is a number above 0, such as kd=0.5"),
        (("kd=-1",), "'kd=-1': the weight"),
        (("kd=nan",), "'kd=nan': the weight"),
        (("kd=inf",), "'kd=inf': the weight"),
        (("kd=",), "'kd=': the weight"),
        (("kd", "dist", "kd=2"), "'kd' is given twice; once is enough, with a weight"),
    ],
)
def test_words_that_cannot_be_say_why(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.parse(given)


PIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": [16, 16, 16], "depth": [1, 1, 1]}


@pytest.mark.parametrize(
    ("method", "student", "teacher", "message"),
    [
        ("token", "vit", "vit", "'token' needs a distillation token, which VisionTransformer has not"),
        ("token-soft", "pit", "vit", "'token-soft' needs a distillation token, which PoolingVisionTransformer has not"),
        ("hidden", "resnet", "vit", r"no hidden state has the teacher's shape \(0: 64x16x16, the teacher's 32x4x4\)"),
        ("scalekd", "vit", "resnet", "ResNet"),
    ],
)
def test_a_method_that_this_pair_has_no_place_for_is_refused(
    method: str, student: str, teacher: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It has `set_distilled_training`, and one classifier.
    monkeypatch.setitem(NETWORKS, "pit", ("pit_ti_224", {**PIT, "heads": [1, 1, 1], "mlp_ratio": 1}))
    pair = pair_of(artifact(student), artifact(teacher))
    before = state_digest(pair.student.state_dict()), pair.student.training
    with pytest.raises(PassError, match=message):
        methods.build(Distill(method=method, label_weight=1.0), pair, seed=0)
    assert (state_digest(pair.student.state_dict()), pair.student.training) == before


def test_what_is_trained_along_comes_from_the_seed_and_from_nothing_else() -> None:
    options, pair = Distill(method=("cosine", "scalekd")), pair_of(artifact("vit"), artifact("wide"))
    before = torch.default_generator.get_state()

    def drawn(seed: int) -> str:
        return state_digest(nn.ModuleList(one for one, _ in methods.build(options, pair, seed=seed)).state_dict())

    first = drawn(0)
    assert torch.equal(torch.default_generator.get_state(), before)
    torch.rand(1)
    assert drawn(0) == first != drawn(1)


def test_options_reach_their_method(batch: Batch) -> None:
    def loss(**options: Any) -> float:
        model, objective, _ = taught(artifact("vit"), artifact("wide"), **options)
        return sum(float(one.detach()) for one in objective(model, batch).values())

    for method, others in {
        "kd": ({"temperature": 3.0}, {"standardize": True}),
        "dist": ({"temperature": 3.0}, {"standardize": True}),
        "dkd": ({"temperature": 3.0}, {"dkd_beta": 0.5}),
        "scalekd": ({"scalekd_alt": False}, {"scalekd_perception": False}, {"scalekd_paper_scale": True}),
    }.items():
        plain = loss(method=method)
        assert all(loss(method=method, **options) != plain for options in others), method
    assert loss(method="kd=3") == pytest.approx(3 * loss(method="kd"), rel=1e-6)


# The objective


@pytest.mark.parametrize("name", DISTANCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str, batch: Batch) -> None:
    given = artifact("resnet")
    model, objective, _ = taught(given, given, method=name)
    losses = objective(model.eval(), batch)
    assert losses
    assert all(abs(float(loss.detach())) <= 1e-6 for loss in losses.values()), losses
    # And another one has.
    model, objective, _ = taught(artifact("resnet", seed=2), given, method=name)
    assert all(float(loss.detach()) > 1e-3 for loss in objective(model.eval(), batch).values())


@pytest.mark.parametrize("name", ["kd", "reverse-kl", "jeffreys", "js", "dkd", "dist", "cosine", "hidden"])
def test_losses_are_float32_under_bf16(name: str) -> None:
    """The networks may round their outputs; the loss of what they gave is that of float32."""
    shown = [noise(8, (1, 1, 10), seed=seed).flatten(1).bfloat16() for seed in (0, 1)]
    _, objective, _ = taught(artifact("vit"), artifact("vit", seed=2), method=name)
    method: Any = objective.methods[0]
    every = range(len(method.student_maps))
    rounded, exact = (
        [Outputs(logits=one, embedding=wide(one), maps={index: one for index in every}) for one in values]
        for values in (shown, [one.float() for one in shown])
    )
    target = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(*rounded, target)
    expected = method(*exact, target)
    for name_of, loss in found.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name_of], rtol=1e-6, atol=0)


def wide(logits: Tensor) -> Tensor:
    return logits.repeat(1, 4)[:, :32]  # as wide as the embedding


def test_the_loss_of_a_step_is_float32_where_the_forward_pass_is_bf16(batch: Batch) -> None:
    model, objective, _ = taught(artifact("vit"), artifact("vit", seed=2), method=("kd", "cosine"), label_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(model, batch)
    assert set(losses) == {"forward", "embedding", "label"}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("teacher", "method"),
    [("dropout", ("kd", "cosine")), ("densenet", ("kd", "cosine")), ("dropout", ("scalekd",))],
    ids=["dropout and drop path", "batch norm", "through its last stage"],
)
def test_three_steps_change_the_student_and_leave_the_teacher(
    teacher: str, method: tuple[str, ...], digits: Data
) -> None:
    model, objective, (found,) = taught(artifact("vit"), artifact(teacher, seed=2), method=method)
    # Else checkpoints, process groups and `train()` would reach it.
    assert {*found.modules()}.isdisjoint(objective.modules())
    objective.train()
    model.train()
    values = state_digest(found.model.state_dict())
    before = state_digest(model.state_dict())
    optimiser = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.01)
    for shown in batches(digits, Distill(**FAST)):
        optimiser.zero_grad()
        sum(objective(model, shown).values(), torch.zeros(())).backward()
        optimiser.step()
        assert not any(module.training for module in found.modules())
        assert all(value.grad is None for value in found.parameters())
    assert state_digest(found.model.state_dict()) == values
    assert state_digest(model.state_dict()) != before


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_says_whether_values_of_the_student_learn_nothing(name: str, batch: Batch) -> None:
    """What DDP has to be told: without it several processes wait for gradients that never come."""
    token = name in TOKENS
    given = LABELLED if token else {}
    if name == "hidden":
        model, objective, _ = taught(artifact("vit"), artifact("vit", seed=2), method=name)
    elif name.startswith("perturb"):
        model, objective, _ = taught(FACTOR(artifact("vit")), artifact("vit"), method=name)
    else:
        model, objective, _ = taught(artifact("deit" if token else "vit"), artifact("wide"), method=name, **given)
    if token:
        model.set_distilled_training(True)  # type: ignore[operator]
    sum(objective(model.train(), batch).values(), torch.zeros(())).backward()
    silent = [key for key, value in model.named_parameters() if value.grad is None]
    assert bool(silent) is objective.leaves_unused, silent


def test_several_teachers_count_as_their_mean(batch: Batch) -> None:
    student, teachers = artifact("vit"), [artifact("wide"), artifact("resnet")]
    options: dict[str, Any] = {"method": ("kd=2", "cosine"), "label_weight": 0.5}
    model, objective, _ = taught(student, *teachers, **options)
    together = objective(model, batch)
    alone = []
    for teacher in teachers:
        model, objective, _ = taught(student, teacher, **options)
        alone.append(objective(model, batch))
    assert together.keys() == alone[0].keys() == {"forward", "embedding", "label"}
    for name, loss in together.items():
        torch.testing.assert_close(loss, (alone[0][name] + alone[1][name]) / 2, rtol=1e-6, atol=0)
    # The labels are there once, however many teach.
    torch.testing.assert_close(together["label"], 0.5 * label_loss(model(batch.images), batch.target))


def test_images_without_label_add_nothing_to_the_label_term(digits: Data, tmp_path: Path) -> None:
    pool = open_data("digits", limit_train=48, unlabeled=str(written(digits, "val", tmp_path / "pool")))
    model, objective, _ = taught(artifact("vit"), artifact("wide"), method="kd", label_weight=1.0)
    for options in (FAST, {**FAST, "smoothing": 0.1}):
        shown = next(batches(pool, Distill(**options), splits=("train", "unlabeled")))
        known = (shown.target >= 0) if shown.target.ndim == 1 else shown.target.any(1)
        assert 0 < int(known.sum()) < len(known)
        labelled = shown._replace(images=shown.images[known], target=shown.target[known])
        both, alone = objective(model, shown), objective(model, labelled)
        # Of B images, labelled or not: a labelled one counts as much as it would among others that are.
        torch.testing.assert_close(both["label"], alone["label"] * known.sum() / len(known), rtol=1e-5, atol=0)
        assert not torch.isclose(both["forward"], alone["forward"] * known.sum() / len(known), rtol=1e-3)


def test_a_token_learns_from_the_teacher_and_the_other_from_the_labels(batch: Batch) -> None:
    model: Any = artifact("deit").model().train()
    for method in TOKENS:
        _, objective, _ = taught(artifact("deit"), artifact("vit"), method=method, label_weight=1.0)
        model.set_distilled_training(True)
        losses = objective(model, batch)
        for name, head, other in (("token", "head_dist", "head"), ("label", "head", "head_dist")):
            model.zero_grad()
            losses[name].backward(retain_graph=True)
            assert getattr(model, other).weight.grad is None
            assert getattr(model, head).weight.grad.any()
    for method, distance in (("token", hard), ("token-soft", partial(soft_kl, kind="forward"))):
        model, objective, (found,) = taught(artifact("deit"), artifact("vit"), method=f"{method}=3", label_weight=1.0)
        model.train().set_distilled_training(True)
        token, teacher = model(batch.images)[1], found.logits(batch.images)
        torch.testing.assert_close(objective(model, batch)["token"], 3 * distance(token, teacher))


# Hidden states


def test_relative_distance_by_hand() -> None:
    student = torch.tensor([[[[3.0, 0.0]]], [[[0.0, 1.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 2.0]]]], requires_grad=True)
    distance = relative_distance(student, teacher)
    assert float(distance.detach()) == pytest.approx((8 / 5 + 1 / 4) / 2)
    distance.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_map_of_zeros_gives_a_finite_distance() -> None:
    assert relative_distance(torch.ones(2, 3, 1, 1), torch.zeros(2, 3, 1, 1)).isfinite()


def test_maps_are_compared_where_their_shapes_are_equal_and_the_others_are_listed() -> None:
    thinner = artifact("resnet", kwargs={**RESNET, "channels": [8, 16, 20, 32]})
    given = artifact("resnet")
    ends = given.model(), (3, 32, 32)
    placed = Hidden.place(thinner.model(), (3, 32, 32), *ends)
    assert placed.student_maps == placed.teacher_maps == (0, 1, 2, 4)
    assert placed.unequal == ("3: 80x2x2, the teacher's 96x2x2",)
    shallow = artifact("vit", kwargs={**NETWORKS["vit"][1], "depth": 1})
    placed = Hidden.place(shallow.model(), (3, 32, 32), artifact("vit").model(), (3, 32, 32))
    assert (placed.student_maps, placed.unequal) == ((0,), ("1: none, the teacher's 32x4x4",))


class Bare(nn.Module):
    """A network of the user's own, which shows no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


def test_recovery_does_without_maps_and_says_why(batch: Batch) -> None:
    pair = Pair(Bare(), (3, 32, 32), Bare(), (3, 32, 32), {})
    with pytest.raises(PassError, match="Bare has no forward_intermediates"):
        methods.build(Distill(method="hidden"), pair, seed=0)
    (kd, _), (hidden, _), _ = methods.build(Distill(), pair, seed=0)
    assert isinstance(hidden, Hidden)
    assert hidden.student_maps == ()
    assert "has no forward_intermediates" in hidden.unequal[0]
    assert hidden(Outputs(), Outputs(), batch.target) == {}
    assert set(kd(Outputs(noise(2)[:, 0, 0]), Outputs(noise(2)[:, 0, 0]), batch.target)) == {"forward"}


def test_the_mean_of_the_maps_is_learned(batch: Batch) -> None:
    model, objective, (teacher,) = taught(artifact("vit"), artifact("vit", seed=2), method="hidden")
    with torch.no_grad():
        ours, theirs = (
            network.forward_intermediates(batch.images, indices=[0], intermediates_only=True)[0]
            for network in (model, teacher.model)
        )
        ends = [network.forward_features(batch.images)[:, 1:] for network in (model, teacher.model)]
    expected = (relative_distance(ours, theirs) + relative_distance(*ends)) / 2
    torch.testing.assert_close(objective(model, batch)["hidden"], expected, rtol=1e-5, atol=0)


def test_an_embedding_of_another_width_is_reached_through_a_map_that_is_trained_along() -> None:
    model, objective, _ = taught(artifact("vit"), artifact("wide"), method="cosine")
    assert sum(value.numel() for value in objective.parameters()) == 32 * 48 + 48
    assert named(objective, EmbeddingTarget).projector.weight.shape == (48, 32)
    assert surgery.classifiers(model) == {"head"}
