"""Each loss against its formula in float64, then its limits, its reduction, its precision and where gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slim.passes.distill.logits import Divergence, decoupled, hard, label_loss, relational, soft_kl, standardized

pytestmark = pytest.mark.usefixtures("one_thread")

Loss = Callable[[Tensor, Tensor], Tensor]
KINDS: tuple[Divergence, ...] = get_args(Divergence)
B, K = 6, 10


def soft(kind: Divergence, temperature: float = 1.0) -> Loss:
    return lambda student, teacher: soft_kl(student, teacher, kind=kind, temperature=temperature)


def dkd(alpha: float, beta: float, target: Tensor | None = None, temperature: float = 1.0) -> Loss:
    return lambda s, t: decoupled(s, t, target, alpha=alpha, beta=beta, temperature=temperature)


DISTANCES: dict[str, Loss] = {
    **{kind: soft(kind) for kind in KINDS},
    **{f"{kind} at T=4": soft(kind, 4.0) for kind in KINDS},
    "decoupled": dkd(1.0, 2.0, temperature=4.0),
    "decoupled with labels": dkd(1.0, 2.0, torch.tensor([3, 1, 4, -1, 5, 9])),
    "relational": relational,
    "relational at T=4": lambda s, t: relational(s, t, temperature=4.0),
    "standardized": lambda s, t: soft_kl(standardized(s), standardized(t), kind="forward", temperature=2.0),
}
LOSSES: dict[str, Loss] = {**DISTANCES, "hard": hard}


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def pair(batch: int = B) -> tuple[Tensor, Tensor]:
    return logits(batch, K, seed=1), logits(batch, K, seed=2)


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher), student)[0]


def exact(z: Tensor, temperature: float = 1.0) -> Tensor:
    return (z.double() / temperature).softmax(1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of each row, (B,)."""
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_kl_is_its_formula(temperature: float) -> None:
    student, teacher = pair()
    ps, pt = exact(student, temperature), exact(teacher, temperature)
    middle = (ps + pt) / 2
    expected = {
        "forward": kl(pt, ps),
        "reverse": kl(ps, pt),
        "jeffreys": (kl(pt, ps) + kl(ps, pt)) / 2,
        "js": (kl(pt, middle) + kl(ps, middle)) / 2,
    }
    for kind in KINDS:
        value = temperature**2 * float(expected[kind].sum() / B)
        assert float(soft(kind, temperature)(student, teacher)) == pytest.approx(value, rel=1e-5), kind


def test_forward_is_batchmean_of_torch() -> None:
    student, teacher = pair()
    expected = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(soft("forward")(student, teacher), expected)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("classes", [10, 1000])
def test_equal_logits_have_no_distance(name: str, classes: int) -> None:
    z = logits(B, classes)
    assert abs(float(DISTANCES[name](z, z.clone()))) < 1e-6


def test_jeffreys_is_symmetric_and_js_too() -> None:
    student, teacher = pair()
    for kind in ("jeffreys", "js"):
        torch.testing.assert_close(soft(kind)(student, teacher), soft(kind)(teacher, student))
    assert float(soft("forward")(student, teacher)) != pytest.approx(float(soft("reverse")(student, teacher)), rel=0.01)


def test_js_is_bounded_and_jeffreys_is_not() -> None:
    sure = 1e4 * torch.eye(2)
    # Sure of different classes: nothing in common, which is the bound. Both KL are 1e4, the log of the other's class.
    assert float(soft("js")(sure, sure.flip(0))) == pytest.approx(math.log(2), abs=1e-6)
    assert float(soft("jeffreys")(sure, sure.flip(0))) == pytest.approx(1e4)
    for scale in (1.0, 10.0, 1e3, 1e4):
        student, teacher = logits(64, K, seed=1, scale=scale), logits(64, K, seed=2, scale=scale)
        assert float(soft("js")(student, teacher)) <= math.log(2) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_where_the_networks_agree(kind: Divergence) -> None:
    z = logits(B, K)
    assert gradient(soft(kind), z, z).abs().max() < 1e-7


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_student_alone(name: str) -> None:
    student, teacher = (z.requires_grad_() for z in pair())
    LOSSES[name](student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"decoupled with labels"}))
def test_the_same_images_twice_are_the_same_loss(name: str) -> None:
    student, teacher = pair()
    twice = LOSSES[name](student.repeat(2, 1), teacher.repeat(2, 1))
    torch.testing.assert_close(twice, LOSSES[name](student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_and_autocast_lose_nothing_but_the_rounding_of_the_inputs(name: str) -> None:
    student, teacher = (z.bfloat16() for z in pair())
    expected = LOSSES[name](student.float(), teacher.float())
    slope = gradient(LOSSES[name], student.float(), teacher.float())
    assert expected.dtype == torch.float32
    torch.testing.assert_close(LOSSES[name](student, teacher), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LOSSES[name](student, teacher), expected, rtol=0, atol=0)
        torch.testing.assert_close(gradient(LOSSES[name], student.float(), teacher.float()), slope, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_and_constant_logits_stay_finite(name: str, scale: float) -> None:
    for student, teacher in (pair(), [z.sign() for z in pair()], [z.sign()[:1].expand(B, K) for z in pair()]):
        for s, t in ((student * scale, teacher), (student, teacher * scale), (student * scale, teacher * scale)):
            assert LOSSES[name](s, t).isfinite()
            assert gradient(LOSSES[name], s, t).isfinite().all()


@pytest.mark.parametrize(
    ("loss", "share"),
    [(soft("forward", 1e3), 1.0), (soft("reverse", 1e3), 1.0), (soft("jeffreys", 1e3), 1.0), (soft("js", 1e3), 0.25)],
)
def test_at_high_temperature_the_gradient_is_the_difference_of_centred_logits(loss: Loss, share: float) -> None:
    student, teacher = pair()
    gap = student - teacher
    limit = share * (gap - gap.mean(1, keepdim=True)) / K / B
    # What is left out falls with z / T, about 1 % here.
    assert (gradient(loss, student, teacher) - limit).norm() < 0.02 * limit.norm()


def test_dkd_keeps_the_size_of_its_gradient_at_high_temperature() -> None:
    sizes = [gradient(dkd(1.0, 2.0, temperature=T), *pair()).norm() for T in (500.0, 1000.0)]
    assert float(sizes[0] / sizes[1]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_targets_part_and_the_others_weighed_by_their_mass(temperature: float) -> None:
    student, teacher = pair()
    for image, label in enumerate([3, 1, 4, 1, 5, 9]):
        s, t = student[image : image + 1], teacher[image : image + 1]
        mass = 1 - float(exact(t, temperature)[0, label])
        parts = dkd(1.0, mass, torch.tensor([label]), temperature)(s, t)
        torch.testing.assert_close(parts, soft("forward", temperature)(s, t), rtol=1e-5, atol=1e-6)


def test_dkd_is_its_formula_and_weights_its_terms() -> None:
    student, teacher = pair()
    label = torch.tensor([3, 1, 4, 1, 5, 9])
    own = F.one_hot(label, K).bool()
    ps, pt = exact(student), exact(teacher)
    of_target = kl(*(torch.stack([p[own], 1 - p[own]], 1) for p in (pt, ps)))
    of_others = kl(*((p[~own].view(B, K - 1) / (1 - p[own])[:, None]) for p in (pt, ps)))
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (1.0, 8.0)):
        expected = float((alpha * of_target + beta * of_others).mean())
        assert float(dkd(alpha, beta, label)(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_the_others_do_not_vanish_beside_a_sure_target() -> None:
    teacher = torch.tensor([[200.0, 0.0, 1.0, 2.0]])
    student = torch.tensor([[-200.0, 2.0, 1.0, 0.0]])
    expected = kl(exact(teacher[:, 1:]), exact(student[:, 1:]))
    # Their probability, e-198, is 0 in float32.
    assert float(dkd(0.0, 1.0)(student, teacher)) == pytest.approx(float(expected), rel=1e-6)
    slope = exact(student[:, 1:]) - exact(teacher[:, 1:])
    torch.testing.assert_close(gradient(dkd(0.0, 1.0), student, teacher)[:, 1:], slope.float())
    # The target's part of a student that is as sure of another class: log ps is -202 less ln(1 + 1/e + 1/e^2).
    surprise = 202 + math.log(1 + math.exp(-1) + math.exp(-2))
    assert float(dkd(1.0, 0.0)(student, teacher)) == pytest.approx(surprise, rel=1e-6)


def test_dkd_takes_the_largest_soft_label_and_the_teachers_class_where_there_is_none() -> None:
    student, teacher = pair(4)
    guess = teacher.argmax(1).tolist()
    label = [(guess[0] + 1) % K, guess[1], guess[2], (guess[3] + 2) % K]
    expected = dkd(1.0, 2.0, torch.tensor(label))(student, teacher)
    assert torch.equal(dkd(1.0, 2.0, torch.tensor([label[0], -1, -1, label[3]]))(student, teacher), expected)
    mixed = torch.zeros(4, K)
    mixed[0, label[0]], mixed[0, guess[0]] = 0.6, 0.4
    mixed[3, label[3]] = 1.0
    assert torch.equal(dkd(1.0, 2.0, mixed)(student, teacher), expected)
    unlabelled = dkd(1.0, 2.0, torch.tensor(guess))(student, teacher)
    assert not torch.equal(unlabelled, expected)
    for none in (None, torch.full((4,), -1), torch.zeros(4, K)):
        assert torch.equal(dkd(1.0, 2.0, none)(student, teacher), unlabelled)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_its_formula(temperature: float) -> None:
    student, teacher = pair()
    ps, pt = exact(student, temperature), exact(teacher, temperature)
    rows = [float(torch.corrcoef(torch.stack([ps[i], pt[i]]))[0, 1]) for i in range(B)]
    columns = [float(torch.corrcoef(torch.stack([ps[:, k], pt[:, k]]))[0, 1]) for k in range(K)]
    expected = (2 - sum(rows) / B - sum(columns) / K) * temperature**2
    assert float(relational(student, teacher, temperature=temperature)) == pytest.approx(expected, rel=1e-5)


def test_one_image_has_nothing_to_be_compared_with() -> None:
    student, teacher = pair(1)

    def rows_alone(s: Tensor, t: Tensor) -> Tensor:
        return 1 - torch.corrcoef(torch.cat([exact(s), exact(t)]))[0, 1]

    torch.testing.assert_close(relational(student, teacher), 1 + rows_alone(student, teacher).float())
    torch.testing.assert_close(
        gradient(relational, student, teacher), gradient(rows_alone, student, teacher), rtol=1e-4, atol=1e-7
    )


def test_standardized_is_the_z_score_whatever_scale_and_offset() -> None:
    torch.testing.assert_close(
        standardized(torch.tensor([[1.0, 2.0, 6.0]])), torch.tensor([[-2.0, -1.0, 3.0]]) / 7**0.5
    )
    z = logits(B, K)
    scale, offset = torch.tensor([[0.1], [1.0], [2.0], [10.0], [50.0], [100.0]]), torch.arange(B)[:, None] - 3.0
    torch.testing.assert_close(standardized(scale * z + offset), standardized(z), rtol=1e-5, atol=1e-5)


def test_hard_is_the_surprise_at_the_teachers_class() -> None:
    student, teacher = pair()
    expected = -exact(student).log()[torch.arange(B), teacher.argmax(1)].mean()
    torch.testing.assert_close(hard(student, teacher), expected.float())


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_label_loss_by_hand(form: Literal["hard", "soft"]) -> None:
    # Probabilities 3/4 and 1/4; the second image has no label, and still counts as one of the batch.
    student = torch.tensor([[math.log(3), 0.0], [5.0, -5.0], [math.log(3), 0.0]])
    target = torch.tensor([0, -1, 1]) if form == "hard" else torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    assert float(label_loss(student, target)) == pytest.approx((math.log(4 / 3) + math.log(4)) / 3)
    assert not gradient(label_loss, student, target)[1].any()
    none = torch.full((3,), -1) if form == "hard" else torch.zeros(3, 2)
    assert float(label_loss(student, none)) == 0
    assert not gradient(label_loss, student, none).any()


def test_label_loss_of_mixed_labels_and_of_low_precision() -> None:
    student = torch.tensor([[math.log(3), 0.0]])
    mixed = torch.tensor([[0.25, 0.75]])
    assert float(label_loss(student, mixed)) == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4))
    rounded = student.bfloat16()
    for target in (mixed, mixed.bfloat16(), mixed.double(), torch.tensor([1])):
        expected = label_loss(rounded.float(), target.float() if target.ndim == 2 else target)
        for lowered in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                torch.testing.assert_close(label_loss(rounded, target), expected, rtol=0, atol=0)


def test_label_loss_of_labelled_images_alone_is_the_usual_one() -> None:
    student = logits(B, K)
    target = torch.tensor([3, 1, 4, 1, 5, 9])
    torch.testing.assert_close(label_loss(student, target), F.cross_entropy(student, target))


def test_a_label_that_is_no_class_is_not_taken_for_an_unlabelled_image() -> None:
    with pytest.raises(IndexError):
        label_loss(logits(2, K), torch.tensor([K, 0]))
