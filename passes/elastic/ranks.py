"""Elastic ranks: a layer that computes as two thinner ones would, while its weight stays what it is.

What a layer puts out is projected on its first directions, the left singular vectors of its weight as it is now, so
that smaller ranks lie within larger ones and nothing besides the weight has to be kept. Cut out, the projection
becomes two layers: the weight's share in these directions, and the directions. No gradient goes through the directions;
training turns the weight so that less is lost behind the first of them (as nested dropout of ranks does, Rippel et al.
2014, arXiv:1402.0915).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim import surgery
from slim.passes.low_rank import schemes
from slim.passes.low_rank.schemes import Layer


def directions(weight: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of a weight (O, ...), as (O, rank) in fp64, the first last."""
    matrix = weight.detach().double().flatten(1)
    # Of the small Gram matrix, whose eigenvalues come ascending: any basis of the same subspace is as good.
    found: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return found[:, -rank:]


class Projection:
    """One layer: what its rank is."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.rank = layer, 0
        """0: as it is."""
        self._kept: tuple[int, Tensor] | None = None

    def choose(self, rank: int) -> None:
        """Set the rank. Directions are kept from one rank to another until the layer is whole, as after every step."""
        self.rank = rank
        if not rank:
            self._kept = None

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A forward hook: what two layers would put out."""
        if not self.rank:
            return None
        onto, bias = self._onto(output), self.layer.bias
        if isinstance(self.layer, nn.Linear):
            found = output @ onto if bias is None else (output - bias) @ onto + bias
        elif bias is None:
            found = F.conv2d(output, onto[:, :, None, None])
        else:
            bias = bias[:, None, None]
            found = F.conv2d(output - bias, onto[:, :, None, None]) + bias
        return found.to(output.dtype)  # autocast leaves biases in fp32

    def _onto(self, output: Tensor) -> Tensor:
        """(O, O), symmetric; directions are found anew where the weight is known to have changed."""
        weight = self.layer.weight
        if self._kept is None or self._kept[0] != weight._version:
            self._kept = weight._version, directions(weight, len(weight))
        first = self._kept[1][:, -self.rank :]
        return (first @ first.T).to(output)


def projected(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Have layers compute with these ranks, in place and for good: for a look at a copy."""
    for name, rank in ranks.items():
        gate = Projection(cast(Layer, model.get_submodule(name)))
        gate.choose(rank)
        model.get_submodule(name).register_forward_hook(gate.after)


def split(model: nn.Module, ranks: Mapping[str, int]) -> Callable[[nn.Module, surgery.Positions], None]:
    """Look at layers before anything is cut out of `model`; then call the result with the network that is left.

    The result puts two layers in the place of each, in place. `stays` are the positions kept of every tensor; what is
    not named there is whole.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, rank in ranks.items():
        weight = cast(Layer, model.get_submodule(name)).weight.detach().double()
        first = directions(weight, rank)
        pairs[name] = (first.T @ weight.flatten(1)).reshape(rank, *weight.shape[1:]), first

    def put(smaller: nn.Module, stays: surgery.Positions) -> None:
        for name, (down, up) in pairs.items():
            layer, kept = cast(Layer, smaller.get_submodule(name)), stays.get(f"{name}.weight", {})
            pair = schemes.factored(layer, "channel", ranks[name])
            down, up = _some(down, 1, kept.get(1)), _some(up, 0, kept.get(0))
            bias = None if layer.bias is None else layer.bias.detach()
            schemes.fill(pair, up[None], down.flatten(1)[None], bias)
            surgery.swap(smaller, name, pair)

    return put


def _some(values: Tensor, dim: int, places: Sequence[int] | None) -> Tensor:
    return values if places is None else values.index_select(dim, torch.tensor(places, device=values.device))
