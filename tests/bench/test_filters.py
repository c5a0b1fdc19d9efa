"""The measures of kernels, on banks for which they are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slim.bench import filters


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def test_sparsity_is_the_share_of_kernels_far_below_the_largest_weight() -> None:
    weight = normal(8, 6, 3, 3)
    assert filters.sparsity(weight) == 0
    weight[:4] = 0
    assert filters.sparsity(weight) == 0.5
    # One weight is enough for a kernel to count, and one just under a hundredth of the largest is not.
    one = torch.zeros(4, 1, 3, 3)
    one[0, 0, 0, 0], one[1, 0, 2, 2], one[2, 0, 1, 1] = 1.0, 0.0101, 0.0099
    assert filters.sparsity(one) == 0.5


def test_of_a_linear_layer_each_weight_is_a_kernel() -> None:
    assert filters.sparsity(torch.eye(4)) == 0.75


def test_a_layer_of_zeros_is_all_sparse_without_variety_and_not_orthogonal() -> None:
    nothing = torch.zeros(64, 3, 3, 3)
    found = (filters.sparsity(nothing), filters.variance_entropy(nothing), filters.orthogonality(nothing))
    assert found == (1, 0, 0)


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-6])
def test_equal_kernels_have_no_variety(value: float) -> None:
    kernel = value * normal(3, 3).float()
    assert filters.variance_entropy(kernel.expand(64, 32, 3, 3)) == 0


def test_one_kernel_has_no_variety() -> None:
    assert filters.variance_entropy(normal(1, 1, 3, 3)) == 0


@pytest.mark.parametrize("size", [3, 5])
def test_variance_shared_equally_by_some_directions_has_their_logarithm(size: int) -> None:
    # Kernels that are plus and minus the first k unit vectors: k components of one variance, the others without.
    for directions in (1, 2, size * size):
        units = torch.eye(size * size)[:directions]
        bank = torch.cat([units, -units]).view(-1, 1, size, size)
        assert filters.variance_entropy(bank) == pytest.approx(math.log10(directions), abs=1e-12)


def test_variance_entropy_is_that_of_the_singular_values() -> None:
    weight = normal(16, 4, 3, 3) * torch.arange(1, 10).view(3, 3)
    rows = weight.view(64, 9)
    shares = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
    shares = shares / shares.sum()
    assert filters.variance_entropy(weight) == pytest.approx(float(-(shares * shares.log10()).sum()), abs=1e-12)
    assert filters.variance_entropy(1000 * weight + 5) == pytest.approx(filters.variance_entropy(weight), abs=1e-9)


def test_random_kernels_have_the_random_entropy() -> None:
    # Nine equal variances, seen in so many kernels, are log10(9) = 0.9542; the fit has 0.9513: a ratio of 1.003.
    ratio = filters.variance_entropy(normal(256, 256, 3, 3)) / filters.random_entropy(65536)
    assert ratio == pytest.approx(1.003, abs=0.005)
    # By expansion 64 kernels have log10(9) - 9 / (2 * 64 * ln 10) = 0.924; the fit has 0.906, a ratio of 1.02, sd 0.01.
    assert filters.variance_entropy(normal(64, 1, 3, 3)) / filters.random_entropy(64) == pytest.approx(1.02, abs=0.04)


def test_random_entropy_is_the_formula() -> None:
    assert filters.random_entropy(64) == pytest.approx(0.906, abs=5e-4)
    assert filters.random_entropy(1024) == pytest.approx(0.950, abs=5e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_orthogonal_filters_give_1_and_equal_ones_0(scale: float) -> None:
    rows = torch.linalg.qr(normal(36, 36))[0][:16] * torch.arange(1, 17)[:, None]
    # fp32: each of the 240 cosines is off by rounding, 1e-7 or less.
    assert filters.orthogonality(scale * rows.view(16, 4, 3, 3)) == pytest.approx(1, abs=1e-6)
    same = normal(1, 4, 3, 3) * torch.arange(1, 17).view(16, 1, 1, 1)
    assert filters.orthogonality(scale * same) == pytest.approx(0, abs=1e-6)
    assert filters.orthogonality(-scale * same) == pytest.approx(0, abs=1e-6)


def test_orthogonality_is_the_formula_and_does_not_depend_on_the_parts_it_is_taken_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = normal(30, 2, 3, 3)
    rows = torch.nn.functional.normalize(weight.flatten(1), dim=1)
    expected = 1 - float((rows @ rows.T - torch.eye(30)).abs().sum()) / (30 * 29)
    assert filters.orthogonality(weight) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(filters, "ROWS", 7)
    assert filters.orthogonality(weight) == pytest.approx(expected, abs=1e-6)


def test_a_filter_of_zeros_counts_as_equal_to_every_other() -> None:
    rows = torch.eye(4)
    rows[3] = 0
    # Of 12 ordered pairs the 6 with the empty filter are alike, the other 6 are orthogonal.
    assert filters.orthogonality(rows) == pytest.approx(0.5, abs=1e-6)


def test_one_filter_alone_is_orthogonal() -> None:
    assert filters.orthogonality(normal(1, 8, 3, 3)) == 1
