"""The ways to write each layer: which ranks pay, and what each would lose, read from spectra without a forward pass.

With the second moment G of a layer's inputs the loss of an approximation W' is its output error tr((W-W') G (W-W')^T);
without, it is the squared error of the weight. Both are shares of the layer's own energy. Between layers the square of
that share counts, times how much the prediction depends on the layer: by the share itself a budget would be met by
emptying two or three layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from slim.errors import PassError
from slim.passes.calibrate import Moments
from slim.passes.low_rank import factors, schemes
from slim.passes.low_rank.candidates import Candidate
from slim.passes.low_rank.factors import Factors, Objective
from slim.passes.low_rank.schemes import Scheme

Counted = Literal["params", "macs"]
"""Costs that are counted, not measured."""


@dataclass(frozen=True)
class Way:
    """One layer in one scheme."""

    candidate: Candidate
    scheme: Scheme
    factors: Factors
    losses: Tensor
    """(n + 1,) fp64: share of the layer's energy lost at rank 0, 1, ..., n."""
    importance: float = 1.0
    """Expected divergence of the prediction, in nats, if the layer lost all its energy; 1 where nothing is known."""

    def penalty(self, rank: int) -> float:
        """What a rank costs, comparable between layers.

        Chosen on a CIFAR-10 ResNet without training, on training images that were not calibrated with, at half of the
        MACs: 79.9 % with the squared share times importance, 79.7 % without importance, 79.6 % with the share itself;
        at a quarter of the parameters 79.3, 77.6 and 77.7 %.
        """
        return self.importance * float(self.losses[rank]) ** 2

    @property
    def break_even(self) -> float:
        """Rank at which the two factors have as many parameters as the layer."""
        return schemes.break_even(self.candidate.layer, self.scheme)

    @property
    def dense_params(self) -> int:
        """Weights of the layer, without its bias."""
        return self.candidate.layer.weight.numel()

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the layer for one image."""
        layer = self.candidate.layer
        return round(schemes.rank_macs(layer, "channel", self.candidate.size) * schemes.break_even(layer, "channel"))

    def params(self, rank: int) -> int:
        """Weights of both factors."""
        return rank * schemes.rank_params(self.candidate.layer, self.scheme)

    def macs(self, rank: int) -> int:
        """Multiply-accumulates of both factors for one image."""
        return rank * schemes.rank_macs(self.candidate.layer, self.scheme, self.candidate.size)

    def cost(self, metric: Counted, rank: int) -> int:
        """Of both factors in the whole network, where the layer may be called several times."""
        return self.params(rank) if metric == "params" else self.macs(rank) * self.candidate.calls

    def dense_cost(self, metric: Counted) -> int:
        """Of the layer as it is, in the whole network."""
        return self.dense_params if metric == "params" else self.dense_macs * self.candidate.calls

    def pays(self, rank: int, guard: float) -> bool:
        """Whether both factors are smaller by enough, at most `guard` of break-even and below it, and cost no more.

        Of a convolution with a stride the first of the spatial scheme still sees the full width.
        """
        smaller = rank <= guard * self.break_even and self.params(rank) < self.dense_params
        return smaller and self.macs(rank) < self.dense_macs

    def ranks(self, align: int, guard: float) -> tuple[int, ...]:
        """Multiples of `align` that pay, ascending."""
        most = min(int(guard * self.break_even), len(self.losses) - 1)
        return tuple(rank for rank in range(align, most + 1, align) if self.pays(rank, guard))


def ways_of(
    candidate: Candidate,
    objective: Objective,
    moments: Moments | None,
    allowed: Sequence[Scheme],
    *,
    sensitivity: float | None = None,
) -> list[Way]:
    """Every allowed way to write the layer, each with the spectrum of all its ranks.

    Args:
        candidate: the layer.
        objective: what the factors shall keep; `moments` are needed unless it is `plain`.
        moments: of the layer's inputs. They are centred where the layer has a bias, which then corrects the mean.
        allowed: schemes of convolutions with kernels beyond 1 x 1; other layers have one way.
        sensitivity: divergence of the prediction for each unit of the output's squared error, as from
            slim/passes/sensitivity.py; none: all layers count the same.

    Raises:
        PassError: the second moment is not finite.
    """
    layer = candidate.layer
    wanted = [
        scheme for scheme in schemes.schemes_of(layer) if scheme in allowed or len(schemes.schemes_of(layer)) == 1
    ]
    if moments is None:
        return [_plain(candidate, scheme) for scheme in wanted]
    moments = moments.expanded(layer.weight[0, 0].numel())
    inputs = moments.shrunk
    if layer.bias is None:
        inputs += moments.mean[:, :, None] * moments.mean[:, None, :]
    energy = factors.output_loss(schemes.matrices(layer, "channel"), inputs)
    if not energy > 0:
        raise PassError(f"low-rank: layer {candidate.name!r} puts out the same for every image; add it to skip")
    importance = 1.0 if sensitivity is None else sensitivity * energy
    return [replace(_weighed(candidate, one, objective, inputs, energy), importance=importance) for one in wanted]


def _plain(candidate: Candidate, scheme: Scheme) -> Way:
    found = factors.factorize(schemes.matrices(candidate.layer, scheme))
    tail = found.tail()
    return Way(candidate, scheme, found, tail / tail[0])


def _weighed(candidate: Candidate, scheme: Scheme, objective: Objective, inputs: Tensor, energy: float) -> Way:
    layer = candidate.layer
    matrices = schemes.matrices(layer, scheme)
    seen = inputs
    if scheme == "spatial":
        height, width = layer.weight.shape[2:]
        seen = factors.spatial_second_moment(inputs, layer.weight.shape[1], height, width)
    found = factors.factorize(matrices, factors.root_of(seen, objective))
    if scheme == "channel" and objective == "whitened":
        losses = found.tail()  # the spectrum is the output error itself
    else:
        most = min(int(schemes.break_even(layer, scheme)) + 1, found.spectrum.shape[-1])
        losses = output_losses(schemes.matrices(layer, "channel"), *found.pair(most), inputs)
    return Way(candidate, scheme, found, (losses / energy).clamp(0, 1))


def output_losses(weight: Tensor, a: Tensor, b: Tensor, second: Tensor) -> Tensor:
    """Output error of the first r components of a @ b, for every r, where the spectrum does not tell it.

    With the components P_i it is <W, W> - 2 sum <W, P_i> + sum <P_i, P_j>, products taken through the second moment.

    Args:
        weight: (g, o, c * k) fp64, columns (c, k); k is 1 in the channel scheme, the kernel's width in the spatial one.
        a: (g, o * k, n).
        b: (g, n, c).
        second: (g, c * k, c * k).

    Returns:
        (n + 1,) fp64, summed over the groups.
    """
    total = weight.new_zeros(b.shape[1] + 1)
    for w, left, right, moment in zip(weight, a, b, second, strict=True):
        count, columns = right.shape
        width = len(moment) // columns
        left = left.view(len(w), width, count)
        kept = (w @ moment).view(len(w), columns, width)
        moment = moment.view(columns, width, columns, width)
        gain = weight.new_zeros(count)
        cross = weight.new_zeros(count, count)
        for one in range(width):
            gain += ((left[:, one].T @ kept[:, :, one]) * right).sum(1)
            for other in range(width):
                cross += (left[:, one].T @ left[:, other]) * (right @ moment[:, one, :, other] @ right.T)
        total[0] += (kept.flatten(1) * w).sum()
        total[1:] += (kept.flatten(1) * w).sum() - 2 * gain.cumsum(0) + cross.cumsum(0).cumsum(1).diagonal()
    return total
