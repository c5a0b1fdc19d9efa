"""Ranks found by training: each component of each layer gets a gate, and a cost-weighted soft threshold closes gates.

After CoDyRA (Lu et al. 2024, arXiv:2412.01004) and its dense-then-sparse schedule, with two differences. The components
stay as the spectrum gave them and only the gates learn, so no gate can be dodged by growing what it multiplies. And the
threshold is in proportion to what a unit of rank costs. Learns from the network itself, without labels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor, nn

from slim import surgery
from slim.contract import Context
from slim.costs import count
from slim.data import Augment, Batch
from slim.distributed import world
from slim.errors import PassError
from slim.passes.low_rank import schemes
from slim.passes.low_rank.factors import Factors
from slim.passes.low_rank.ways import Counted, Way
from slim.training import Training

DENSE_SHARE = 0.5
"""Share of the steps before the threshold begins to rise."""


class Gate(nn.Module):
    """One factor for each component, between the two layers of a pair."""

    def __init__(self, values: Tensor, *, last: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(values.float())
        self.last = last
        """Channels are the last dimension, as a Linear layer has them, not the second."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, ..., r) or (B, r, H, W)."""
        return features * (self.values if self.last else self.values[:, None, None])


class Closing(nn.Module):
    """How far the outputs are from the dense network's, and the threshold on every gate."""

    closed: Tensor
    """Sum of the thresholds so far."""

    def __init__(self, dense: nn.Module, gates: Sequence[Gate], weights: Sequence[float], threshold: float) -> None:
        super().__init__()
        self._frozen = (dense, tuple(gates))  # a tuple, so that neither is registered, trained or saved here
        self._weights = tuple(weights)
        self._threshold = threshold
        # A buffer, so that a run taken up from a checkpoint does not shrink every gate a second time.
        self.register_buffer("closed", torch.zeros((), dtype=torch.double))

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Kullback-Leibler divergence to the dense network, mean over the batch."""
        with torch.no_grad():
            expected = self._frozen[0](batch.images).float().log_softmax(1)
        found = model(batch.images).float().log_softmax(1)
        return {"dense": F.kl_div(found, expected, log_target=True, reduction="batchmean")}

    def after_step(self, done: float) -> None:
        """Shrink every gate; the sum of all thresholds rises with the square of the share of closing steps `done`."""
        due = self._threshold * max(0.0, (done - DENSE_SHARE) / (1 - DENSE_SHARE)) ** 2
        with torch.no_grad():
            for gate, weight in zip(self._frozen[1], self._weights, strict=True):
                values = gate.values
                values.copy_(values.sign() * (values.abs() - (due - float(self.closed)) * weight).clamp(min=0))
            self.closed.fill_(due)


def close_gates(
    model: nn.Module,
    ladders: Sequence[Sequence[Way]],
    share: float,
    training: Training,
    context: Context,
    *,
    metric: Counted,
) -> tuple[list[Way], dict[str, JsonValue]]:
    """Train gates on the calibration images until those still open are within the budget.

    Args:
        model: the network as it is.
        ladders: the ways of each layer, of which the one that loses least at half its break-even rank takes part.
        share: of the cost of the whole network that may be left, in (0, 1).
        training: epochs and rate.
        context: with calibration images.
        metric: what a unit of rank costs.

    Returns:
        One way for each layer, its components in the order of the gates; and the figures of the training.

    Raises:
        PassError: several processes, of which only one plans.
    """
    if world() > 1:
        raise PassError("low-rank: select gated trains while it plans, in one process; run it without torchrun")
    assert context.backbone is not None  # Pass.__call__ set it
    ways = [min(ladder, key=lambda way: float(way.losses[int(way.break_even / 2)])) for ladder in ladders]
    # Of one gate; a rank is one in every group.
    costs = [way.cost(metric, 1) / len(way.factors.spectrum) for way in ways]
    dense = sum(way.dense_cost(metric) for way in ways)
    whole = count(model, context.backbone.input.size)[metric]
    limit = max(whole * share - (whole - dense), 0.0)

    gated = copy.deepcopy(model).requires_grad_(False)
    frozen = copy.deepcopy(model).requires_grad_(False).eval().to(context.device)
    weights = [cost * len(costs) / sum(costs) for cost in costs]
    gates = [_install(gated, way) for way in ways]
    start = [gate.values.detach().clone() for gate in gates]
    # More than what closes enough gates if training resists none.
    objective = Closing(frozen, gates, weights, 1.2 * threshold(start, weights, costs, limit))
    figures = context.train(gated, objective, training, Augment(), ("calib",))
    found = [gate.values.detach().double() for gate in gates]
    return [_ordered(way, values) for way, values in zip(ways, found, strict=True)], {
        **figures,
        "open": [int((values != 0).sum()) for values in found],
    }


def _install(model: nn.Module, way: Way) -> Gate:
    """Put the layer of `way`, factored at full rank, with a gate between, into `model`."""
    layer, found = way.candidate.layer, way.factors
    rank = found.spectrum.shape[-1]
    pair = schemes.factored(layer, way.scheme, rank).requires_grad_(False)
    scale = found.spectrum.square().sum().sqrt()
    # Gates are shares of the layer's energy, so that one threshold serves all layers.
    gate = Gate((found.spectrum / scale).reshape(-1), last=isinstance(layer, nn.Linear))
    schemes.fill(pair, found.left * scale, found.right, layer.bias)
    surgery.swap(model, way.candidate.name, nn.Sequential(pair[0], gate, pair[1]))
    return gate


def threshold(gates: Sequence[Tensor], weights: Sequence[float], costs: Sequence[float], limit: float) -> float:
    """Least threshold at which the gates above threshold * weight cost no more than `limit`."""
    places = torch.cat([gate.double().abs() / weight for gate, weight in zip(gates, weights, strict=True)])
    prices = torch.cat(
        [torch.full_like(gate, cost, dtype=torch.float64) for gate, cost in zip(gates, costs, strict=True)]
    )
    order = places.argsort(descending=True)
    within = int((prices[order].cumsum(0) <= limit).sum())
    return 0.0 if within == len(order) else float(places[order[within]])


def _ordered(way: Way, gates: Tensor) -> Way:
    """The way with its components in the order of their gates, and what each rank leaves out of these as its losses.

    Gates say what to leave out, and values stay those of the spectrum. With shrunk gates for values the prediction of a
    small ViT on digits diverged by 0.061 nats in place of 0.0025 at 0.6 of its parameters, by 0.0052 once repaired.
    """
    found = way.factors
    gates = gates.view(found.spectrum.shape).abs()
    order = gates.argsort(dim=1, descending=True, stable=True)
    left = found.left.gather(2, order[:, None, :].expand_as(found.left))
    right = found.right.gather(1, order[:, :, None].expand_as(found.right))
    tail = Factors(left, gates.gather(1, order), right).tail()
    # Where every gate has closed nothing is lost at any rank.
    losses = tail / tail[0].clamp(min=torch.finfo(tail.dtype).tiny)
    return replace(way, factors=Factors(left, found.spectrum.gather(1, order), right), losses=losses)
