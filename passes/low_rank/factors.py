"""Truncated SVD of a layer's matrices, plain or weighed by what the layer's inputs look like.

W R = U S V^T gives W' = U_r S_r V_r^T R^-1. With R R^T = G, the second moment of the inputs, W' has the least output
error of its rank, and that error is the tail of the spectrum (SVD-LLM, Wang et al. 2024, arXiv:2403.07378). A diagonal
R scales each input alone (ASVD, Yuan et al. 2023, arXiv:2312.05821). Without R, W' has the least error of the weight.
All work on stacks of g matrices, one per group of a convolution, in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slim.errors import PassError

Objective = Literal["plain", "activation", "whitened"]
"""What the factors keep: the weight, the weight scaled by the size of each input, or the output."""

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Shares of its mean diagonal, of which the first that suffices is added to a second moment: dead inputs and too few
samples leave it singular, and sums in low precision indefinite by less than the last."""


@dataclass(frozen=True)
class Factors:
    """Every rank of a layer at once: W = left @ diag(spectrum) @ right, n = min(rows, columns) components per group."""

    left: Tensor
    """(g, rows, n) fp64, orthonormal columns."""
    spectrum: Tensor
    """(g, n) fp64, singular values of W R, descending."""
    right: Tensor
    """(g, n, columns) fp64, V^T R^-1."""

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (g, rows, rank) and B (g, rank, columns): the first components, the same in every larger rank.

        Each component is split evenly: column of A and row of B have the same norm, whatever the units of R. Without R
        each takes the square root of the singular value. Equal ranges suit int8 and training best.
        """
        reach = torch.linalg.vector_norm(self.right, dim=2)  # 1 without R
        a = self.left * (self.spectrum * reach).sqrt()[:, None, :]
        b = self.right * (self.spectrum / reach).sqrt()[:, :, None]
        return a[:, :, :rank], b[:, :rank]

    def tail(self) -> Tensor:
        """(n + 1,) fp64: squared singular values beyond rank 0, 1, ..., n, summed over the groups; the last is 0."""
        beyond = self.spectrum.square().sum(0).flip(0).cumsum(0).flip(0)
        return torch.cat([beyond, beyond.new_zeros(1)])


def factorize(weight: Tensor, root: Tensor | None = None) -> Factors:
    """SVD of each matrix times its root.

    Args:
        weight: (g, rows, columns), any float type.
        root: lower triangular (g, columns, columns), or diagonal (g, columns), as from `root_of`; none: the identity.
    """
    weight = weight.double()
    if root is None:
        return Factors(*torch.linalg.svd(weight, full_matrices=False))
    if root.dim() == 2:
        left, spectrum, right = torch.linalg.svd(weight * root[:, None, :], full_matrices=False)
        return Factors(left, spectrum, right / root[:, None, :])
    left, spectrum, right = torch.linalg.svd(weight @ root, full_matrices=False)
    return Factors(left, spectrum, torch.linalg.solve_triangular(root, right, upper=False, left=False))


def root_of(second_moment: Tensor, objective: Objective) -> Tensor | None:
    """What `factorize` multiplies the weight by.

    Args:
        second_moment: (g, d, d) sum or mean of x x^T over the layer's inputs, centred or not.
        objective: `plain` gives none, `activation` (g, d), `whitened` (g, d, d) lower triangular with R R^T = G.

    Raises:
        PassError: the second moment is not finite, or too far from positive semidefinite to be one.
    """
    if objective == "plain":
        return None
    moment = second_moment.double()
    if not moment.isfinite().all():
        raise PassError("low-rank: the inputs of a layer are not finite; check the weights and the calibration images")
    diagonal = moment.diagonal(dim1=1, dim2=2)
    # One scale for all groups, so that a dead group weighs little; a dead layer is left with the ridge, which is plain.
    scale = max(float(diagonal.mean()), 0.0) or 1.0
    if objective == "activation":
        return diagonal.clamp(min=RIDGES[0] * scale) ** 0.25  # root mean square, to ASVD's power of one half
    identity = torch.eye(moment.shape[1], dtype=moment.dtype, device=moment.device)
    for ridge in RIDGES:
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(moment / scale + ridge * identity)
        if not failed.any():
            return root * math.sqrt(scale)
    raise PassError(
        f"low-rank: the second moment of a layer's inputs is not positive semidefinite, even with "
        f"{RIDGES[-1]:g} of its mean diagonal added; use objective plain or activation"
    )


def output_loss(change: Tensor, second_moment: Tensor) -> float:
    """Output error of a changed weight, summed over groups: trace(D G D^T); in the units of G, a sum or a mean.

    Args:
        change: D, (g, rows, columns) fp64, W - W'.
        second_moment: G, (g, columns, columns) fp64.
    """
    return float(((change @ second_moment) * change).sum())


def spatial_second_moment(second_moment: Tensor, inputs: int, kh: int, kw: int) -> Tensor:
    """Second moment of the (kh, 1) patches that the first layer of the spatial scheme sees, summed over the kw of them.

    The root of it weighs the columns (i, kh). The error across neighbouring columns of a patch is left out, so the tail
    of that spectrum is not the output error; `output_loss` of the change in the channel layout is.

    Args:
        second_moment: (1, inputs * kh * kw, inputs * kh * kw), of whole patches in the order of flatten(i, kh, kw).
        inputs: channels.
        kh: height of the kernel.
        kw: its width.

    Returns:
        (1, inputs * kh, inputs * kh).
    """
    blocks = second_moment.reshape(1, inputs * kh, kw, inputs * kh, kw)
    return blocks.diagonal(dim1=2, dim2=4).sum(-1)


def shifted_bias(bias: Tensor, change: Tensor, mean: Tensor) -> Tensor:
    """The bias b + (W - W') mean, with which the mean output is what it was.

    Args:
        bias: (O,).
        change: W - W', (g, rows, columns) fp64 in the channel layout.
        mean: of the inputs, (g, columns).

    Returns:
        (O,) fp64.
    """
    return bias.double() + (change @ mean.double()[:, :, None]).flatten()
