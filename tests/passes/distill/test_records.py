"""The record of a view, on plain tensors: what goes in, what comes out, and how far from the teacher that may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slim.passes.distill.records import (
    NOISE,
    agrees,
    least_k,
    log_probs,
    packed,
    record_dtype,
    retained,
    softened,
    tolerance,
    top_k,
    unpacked,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mass", "k"), [(0.1, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.9, 3), (1.0, 4)])
def test_least_k_by_hand(mass: float, k: int) -> None:
    assert least_k(torch.tensor([0.5, 0.75, 0.9375, 1.0], dtype=torch.float64), mass) == k
    # Rounding may leave all the mass a little under 1.
    assert least_k(torch.tensor([0.5, 0.75, 0.9375, 1 - 1e-9], dtype=torch.float64), mass) == k


def test_retained_mass_by_hand() -> None:
    found = retained(torch.tensor([[0.2, 0.5, 0.3]]).log() * 4, 4.0)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.8, 1.0]], dtype=torch.float64))


def test_what_the_top_k_leave_is_spread_evenly() -> None:
    found = log_probs(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]]), 6).exp()
    torch.testing.assert_close(found, torch.tensor([[0.0625, 0.25, 0.0625, 0.5, 0.0625, 0.0625]]))


TEACHERS = {"one-hot": 1000.0, "peaked": 8.0, "soft": 2.0, "flat": 0.01}


@pytest.mark.parametrize("scale", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("k", [1, 2, 10, 1000])
def test_lookups_are_finite_and_sum_to_one(scale: float, classes: int, k: int) -> None:
    found = log_probs(*top_k(random(64, classes) * scale, 1.0, min(k, classes)), classes)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    # A float32 logarithm of at most 18 is off by 2^-20 at most, and so are the probabilities, relatively.
    torch.testing.assert_close(found.double().exp().sum(1), torch.ones(64, dtype=torch.float64), rtol=0, atol=2**-20)


def test_the_top_class_stays_the_top_class_and_no_class_gets_more_than_a_stored_one() -> None:
    index, prob = top_k(random(256, 100), 1.0, 4)
    found = log_probs(index, prob, 100)
    assert torch.equal(found.argmax(1), index[:, 0])
    assert (found.scatter(1, index, -torch.inf).amax(1) < found.gather(1, index).amin(1)).all()


def test_every_class_stored_is_a_round_trip_within_float16() -> None:
    logits = random(64, 50) * 4
    exact, found = softened(logits, 1.0).double(), log_probs(*top_k(logits, 1.0, 50), 50).double().exp()
    # Stored to 2^-11 of itself, or 2^-25 where that is more; the sum they are scaled by is off by no more than they.
    bound = exact * 2**-11 + 2**-25
    assert ((found - exact).abs() <= bound + exact * bound.sum(1, keepdim=True)).all()


def test_a_record_holds_every_class_a_uint16_numbers_in_4_bytes_a_class() -> None:
    index, prob = torch.tensor([[65_535, 0, 40_000]]), torch.tensor([[0.5, 0.25, 0.125]]).half()
    records = packed(index, prob)
    assert records.tobytes() == bytes.fromhex("ffff0000409c003800340030")
    assert records.dtype == record_dtype(3)
    assert [part.tolist() for part in unpacked(records)] == [index.tolist(), prob.tolist()]
    assert [part.dtype for part in unpacked(records)] == [torch.int64, torch.float32]


def kl(p: Tensor, log_p: Tensor, log_s: Tensor) -> Tensor:
    return torch.where(p > 0, p * (log_p - log_s), 0.0).sum(1)


@pytest.mark.parametrize("scale", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (2, 2), (5, 4), (1000, 1), (1000, 10), (1000, 50), (1000, 1000)])
@pytest.mark.parametrize("student", [0.1, 3.0])
def test_cached_and_live_kl_differ_by_no_more_than_the_tolerance(
    scale: float, classes: int, k: int, student: float
) -> None:
    logits = random(128, classes) * scale
    log_s, log_p = torch.log_softmax(random(128, classes, seed=1).double() * student, 1), logits.double().log_softmax(1)
    log_c = log_probs(*top_k(logits, 1.0, k), classes).double()
    gap = kl(log_p.exp(), log_p, log_s) - kl(log_c.exp(), log_c, log_s)
    mass, spread = retained(logits, 1.0)[:, k - 1], log_s.amax(1) - log_s.amin(1)
    limits = [
        tolerance(min(float(m), 1.0), classes=classes, k=k, spread=float(s)) for m, s in zip(mass, spread, strict=True)
    ]
    assert (gap.abs() <= torch.tensor(limits)).all()
    whole = tolerance(min(float(mass.mean()), 1.0), classes=classes, k=k, spread=float(spread.max()))
    assert abs(float(gap.mean())) <= whole


def test_the_tolerance_is_nearly_reached_so_it_is_not_idle() -> None:
    # All that is cut lies on one class, to which the student gives e^-10 of what it gives the others.
    teacher, ours = torch.full((1, 1000), -torch.inf).double(), torch.zeros(1, 1000).double()
    teacher[0, :2], ours[0, 1] = torch.tensor([0.75, 0.25]).log(), -10.0
    log_s, log_c = torch.log_softmax(ours, 1), log_probs(torch.tensor([[0]]), torch.tensor([[0.75]]), 1000).double()
    gap = kl(teacher.exp(), teacher, log_s) - kl(log_c.exp(), log_c, log_s)
    limit = tolerance(0.75, classes=1000, k=1, spread=10.0)
    assert 0.99 * limit < float(gap) <= limit


def test_the_tolerance_covers_the_kl_that_soft_teachers_lose() -> None:
    # Of 1000 classes: k = 10 keeps 96 % and loses 0.13 nat, k = 50 keeps 99.8 % and loses 0.006.
    assert tolerance(0.96, classes=1000, k=10, spread=0.0) > 0.13
    assert tolerance(0.998, classes=1000, k=50, spread=0.0) > 0.006


def test_any_logits_within_the_noise_agree_and_others_do_not() -> None:
    logits = random(500, 40) * 6
    index, prob = top_k(logits, 2.0, 10)
    most = logits.abs().amax(1, keepdim=True)
    # The bound is on the logits of today, whose largest may be NOISE smaller than that of the record.
    moved = logits + most * (NOISE / (1 + NOISE)) * random(500, 40, seed=1).sign()
    assert agrees(index, prob, logits, 2.0).all()
    assert agrees(index, prob, moved, 2.0).all()
    assert not agrees(index, prob, random(500, 40, seed=2) * 6, 2.0).any()
    assert not agrees(index, prob, logits, 1.0).all()


def test_a_class_that_was_not_stored_may_not_lead() -> None:
    # Class 0 has the probability that is stored for it; class 1 did not exist for the record.
    logits = torch.tensor([[0.3, 0.6, 0.05, 0.05]]).log()
    index, prob = torch.tensor([[0]]), torch.tensor([[0.3]])
    assert not agrees(index, prob, logits, 1.0)
    assert agrees(index, prob, torch.tensor([[0.3, 0.28, 0.21, 0.21]]).log(), 1.0)
