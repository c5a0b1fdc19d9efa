"""What the kernels of a layer are like: how many are nearly zero, how varied they are, how far apart its filters lie.

The measures of CNN Filter DB (Gavrikov & Keuper 2022, arXiv:2203.15331). They describe a layer and decide nothing: many
small kernels or little variance hint at channels to cut or ranks to lower, variance as of random kernels at a layer
that was hardly trained or is larger than it need be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 0.01
"""A kernel is nearly zero when its largest weight is under this share of the layer's largest."""
ROUNDING = 1e-24
"""Variance below this share of the mean square is rounding: fp32 kernels that differ at all have 1e-15."""
ROWS = 1024
"""Filters compared with all others at a time, so that a classifier of 21k classes needs megabytes."""


def sparsity(weight: Tensor) -> float:
    """Share of kernels whose largest weight is under EPS of the layer's largest; 1 for a layer of zeros.

    weight: (O, I, kh, kw), or (O, I), where each weight is a kernel.
    """
    largest = _kernels(weight).abs().amax(dim=1)
    return float(((largest < EPS * largest.max()) | (largest == 0)).double().mean())


def variance_entropy(weight: Tensor) -> float:
    """Entropy, to base 10, of how the kernels' variance is shared among their principal components.

    weight: (O, I, kh, kw). From 0, where all kernels are multiples of one around their mean, or equal, to
    log10(kh * kw), where no direction is preferred: 0.954 for 3 x 3.
    """
    kernels = _kernels(weight).double()
    centred = kernels - kernels.mean(dim=0)
    # Squared singular values of the kernels, from a matrix that is as small as a kernel.
    variances = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    if variances.sum() <= ROUNDING * kernels.square().sum():
        return 0.0
    shares = variances / variances.sum()
    return float(-torch.special.xlogy(shares, shares).sum() / math.log(10))


def random_entropy(kernels: int) -> float:
    """Variance entropy that so many random 3 x 3 kernels have, as fitted in the paper: too low for fewer than 64."""
    return 1.2618 / (1 + math.exp(-0.8877 * (math.log2(kernels) - 2.3044))) - 0.3105


def orthogonality(weight: Tensor) -> float:
    """1 less the mean absolute cosine between two filters: 1 for orthogonal ones, and for one alone; 0 for equal ones.

    weight: (O, I, kh, kw) or (O, I), of O filters. A filter of zeros counts as equal to every other: it adds nothing.
    """
    filters = weight.detach().flatten(1).float()
    count = len(filters)
    if count == 1:
        return 1.0
    # Scaled by the largest weight first, so that tiny filters do not vanish in their squares.
    filters = filters / filters.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    units = torch.nn.functional.normalize(filters, dim=1)
    parts = torch.split(units, ROWS)
    total = sum(float((rows @ units.T).abs().sum(dtype=torch.double)) for rows in parts)
    alive = int(units.any(dim=1).sum())
    alike = total - alive + count * (count - 1) - alive * (alive - 1)
    return min(1.0, max(0.0, 1 - alike / (count * (count - 1))))


def _kernels(weight: Tensor) -> Tensor:
    """(O * I, kh * kw)."""
    return weight.detach().reshape(weight.shape[0] * weight.shape[1], -1)
