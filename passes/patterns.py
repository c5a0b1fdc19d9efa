"""Which weights of a layer become zero, from its weight and the second moment of its inputs: plain functions in fp64.

Leaving weights out of one output row w changes that output by the sum of w_i x_i over them, whose mean square is the
sum of w_i G_ij w_j, with G = E[x x^T] (as in Optimal Brain Surgeon, Hassibi and Stork 1993). With G = I that is the
squared magnitude. Weights are (O, I) or (O, I, kh, kw) of one group; the zeros are named, True where one belongs.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 4
"""Consecutive inputs of which sparse kernels skip two; of a convolution, at one position of its kernel."""
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The ways to leave two of four out."""


def moments_of_fours(second: Tensor, inputs: int) -> Tensor:
    """(taps, I / 4, 4, 4): the moments of every four consecutive inputs at the same position of the kernel.

    second: (d, d), d counting (i, kh, kw); or the inputs alone, which are then the same at every position: taps is 1.
    """
    taps = len(second) // inputs
    same = second.view(inputs, taps, inputs, taps).diagonal(dim1=1, dim2=3)
    fours = same.reshape(inputs // GROUP, GROUP, inputs // GROUP, GROUP, taps)
    return fours.diagonal(dim1=0, dim2=2).permute(2, 3, 0, 1)


def two_of_four(weight: Tensor, second: Tensor | None = None) -> Tensor:
    """Zeros, as `weight`: of every four consecutive inputs the two that together cost the least.

    second: second moment of the inputs, see `moments_of_fours`; none takes the two of smallest magnitude.
    """
    outputs, inputs = weight.shape[:2]
    by_tap = weight.detach().double().reshape(outputs, inputs, -1).movedim(1, 2)
    fours = by_tap.reshape(outputs, -1, inputs // GROUP, GROUP)
    moments = torch.eye(GROUP, dtype=torch.double) if second is None else moments_of_fours(second, inputs)
    costs = [
        fours[..., a].square() * moments[..., a, a]
        + fours[..., b].square() * moments[..., b, b]
        + 2 * fours[..., a] * fours[..., b] * moments[..., a, b]
        for a, b in PAIRS
    ]
    pairs = torch.zeros(len(PAIRS), GROUP, dtype=torch.bool)
    for row, pair in zip(pairs, PAIRS, strict=True):
        row[list(pair)] = True
    zeros = pairs[torch.stack(costs).argmin(0)]
    return zeros.flatten(2).movedim(2, 1).reshape(weight.shape)


def cheapest(weight: Tensor, share: float, second: Tensor | None = None) -> Tensor:
    """Zeros, as `weight`: the rounded `share` of all its weights that cost the least one by one, first ones first.

    second: (d, d), d counting (i, kh, kw) or the inputs alone; none takes those of smallest magnitude.
    """
    costs = weight.detach().double().flatten(1).square()
    if second is not None:
        energy = second.diagonal()
        costs = costs * energy.repeat_interleave(costs.shape[1] // len(energy))
    zeros = torch.zeros(weight.numel(), dtype=torch.bool)
    zeros[costs.flatten().argsort(stable=True)[: round(share * weight.numel())]] = True
    return zeros.view(weight.shape)
