"""Widths from layer densities: how much of each layer's weight stays, and the channels that come to that.

PreCrop and PreConfig (Cai et al. 2022, arXiv:2203.02549): what a network that is pruned before training reaches depends
on the share of weights that each layer keeps, not on which weights or whole channels those are. So densities come from
a proxy that needs no data, and widths from the densities by least squares. For fresh and for trained networks. Which
channels stay, the shift that meets a budget and the rounding are decided elsewhere.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slim import surgery
from slim.errors import PassError
from slim.passes.prune.groups import Group

Density = Literal["synflow", "erk", "magnitude", "proxy"]
Sides = tuple[str | None, str | None]
"""Group that a layer reads, and group that it makes; none: that side cannot be pruned."""

ROUNDS = 100
"""Of scoring in `synflow`, as in the paper: in one round alone the largest layers would go first, as a whole."""
HALVINGS = 60
"""Of the interval of the second multiplier in `water_filling`: down to the rounding of fp64."""
RIDGE = 1e-9
"""Weight of equal ratios in `log_widths`, in mean weights of a layer: it moves nothing that the densities determine."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
TIMM_NORMS = ("RmsNorm", "SimpleNorm", "FrozenBatchNorm")
"""How timm's classes begin that are norms and none of `NORMS`."""


def densities(
    model: nn.Module, layers: Sequence[str], size: tuple[int, int, int], share: float, kind: Density
) -> dict[str, float]:
    """Linear layer or convolution -> share of its weights that stays, in (0, 1].

    Weighted by the layers' weights they come to `share`: to the weight in `synflow` and `magnitude`, unless there are
    more layers than weights to stay; to rounding in `erk`. In `proxy` neither weights nor MACs exceed their share, and
    one of the two meets it.

    - `synflow` (Tanaka et al. 2020, arXiv:2006.05467): weights that carry most from input to output; see
      `synflow_scores`. Costs 100 backward passes of one image in fp64.
    - `erk` (Evci et al. 2020, arXiv:1911.11134): in proportion to (I + O + kh + kw) / (I O kh kw), up to 1.
    - `magnitude`: largest absolute values of all layers. For trained networks.
    - `proxy`: largest product of densities for so many weights and MACs; see `water_filling`.

    No layer loses its last weight: its best one stays in `synflow` and `magnitude`, the others leave every layer some.

    Args:
        model: on the CPU; left as it is.
        layers: dotted names.
        size: (C, H, W) of the network's input.
        share: in (0, 1].
        kind: one of the above.

    Raises:
        PassError: the scores of `synflow` or `magnitude` are not finite, or all zero.
    """
    weights = {name: _weight(model, name).detach() for name in layers}
    counts = torch.tensor([weight.numel() for weight in weights.values()], dtype=torch.float64)
    if kind == "erk":
        sides = torch.tensor([sum(weight.shape) for weight in weights.values()], dtype=torch.float64)
        return _named(layers, _scaled(sides / counts, counts, share * float(counts.sum())))
    if kind == "proxy":
        costs = torch.stack([counts, counts * _positions(model, layers, size)])
        return _named(layers, water_filling(costs, share * costs.sum(1)))
    if kind == "magnitude":
        masks = _largest({name: weight.abs() for name, weight in weights.items()}, share, kind)
    else:
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        network = _positive(model)
        for done in range(1, ROUNDS + 1):
            masks = _largest(_flow(network, layers, size, masks), share ** (done / ROUNDS), kind)
    return {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}


def synflow_scores(
    model: nn.Module, layers: Sequence[str], size: tuple[int, int, int], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What each weight carries from an input of ones to the sum of outputs: |w dR/dw|, fp64, of the weight's shape.

    In eval mode with all parameters positive and without norms, whose statistics would undo any scale. In a chain of
    layers without biases whose activations are linear for positive inputs the scores of every layer have one sum.
    Gates are saturated by such inputs and carry nothing, so squeeze-and-excitation comes out nearly empty.

    Args:
        model: on the CPU; left as it is.
        layers: dotted names.
        size: (C, H, W) of the network's input.
        masks: layer -> bool of its weight's shape; the others of its weights are zero.
    """
    return _flow(_positive(model), layers, size, masks)


def water_filling(costs: Tensor, budgets: Tensor) -> Tensor:
    """Densities (layers,) with the largest product, at most 1 each, that keep to every budget.

    p = min(1, 1 / (lambda a + mu b)): under one budget every layer below 1 spends the same. For a given proportion of
    two multipliers that holds for the sum of both costs, weighted by them; it gives more to a cost whose multiplier is
    too small, so the proportion is found by halving, and is 0 or 1 where one budget alone binds.

    Args:
        costs: (k, layers) fp64, k 1 or 2, what each layer costs in full; the first row above 0, the second 0 or more.
        budgets: (k,) above 0.
    """
    needs = costs / budgets[:, None]

    def under(proportion: float) -> Tensor:
        need = (1 - proportion) * needs[0] + proportion * needs[-1]
        return _scaled(1 / need, need, 1.0)

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        used = needs @ under(middle)
        low, high = (low, middle) if used[0] > used[-1] else (middle, high)
    return under(low)


def log_widths(
    densities: Mapping[str, float], sides: Mapping[str, Sides], weights: Mapping[str, float]
) -> dict[str, float]:
    """Group -> log of the share of its channels that stays, 0 at most.

    A layer keeps the product of the shares of both its sides, so the logs x minimise the sum over layers of
    weight (x_in + x_out - log density)^2. Where several solutions fit equally, as for a layer alone between two groups,
    the one with the most equal shares is taken: its sides keep the root of its density each.

    Args:
        densities: layer -> in (0, 1], of all layers in `sides`.
        sides: layer -> its groups. The residual stream on both sides counts twice; a depthwise convolution has the one
            group on its second side alone.
        weights: layer -> what its density counts, above 0, of all layers in `sides`.
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # half a second that nothing else here needs

    groups = list(dict.fromkeys(group for pair in sides.values() for group in pair if group is not None))
    used = [layer for layer, pair in sides.items() if pair != (None, None)]
    if not used:
        return {}
    # The last unknown is the share that all would have if they were equal.
    rows = torch.zeros(len(used) + len(groups), len(groups) + 1, dtype=torch.float64)
    aims = torch.zeros(len(rows), dtype=torch.float64)
    for row, layer in enumerate(used):
        root = math.sqrt(weights[layer])
        for group in sides[layer]:
            if group is not None:
                rows[row, groups.index(group)] += root
        aims[row] = root * math.log(densities[layer])
    pull = math.sqrt(RIDGE * sum(weights[layer] for layer in used) / len(used))
    rows[len(used) :] = pull * torch.cat([torch.eye(len(groups)), -torch.ones(len(groups), 1)], 1)
    # Solved for -x, which is 0 or more.
    found, _ = nnls(-rows.numpy(), aims.numpy(), maxiter=100 * rows.shape[1])
    return {group: min(0.0, -value) for group, value in zip(groups, found.tolist(), strict=False)}


def sides_of(model: nn.Module, groups: Sequence[Group]) -> dict[str, Sides]:
    """Linear layer or convolution with a member in a group -> the group it reads and the group it makes.

    Of several on one side, as behind a concatenation, the one with most channels there.
    """
    channels: dict[str, tuple[Counter[str], Counter[str]]] = {}
    for group in groups:
        for member in group.members:
            module = model.get_submodule(member.layer)
            if isinstance(module, nn.Linear | nn.Conv2d) and member.key == f"{member.layer}.weight":
                side = 0 if member.reads else 1
                channels.setdefault(member.layer, (Counter(), Counter()))[side][group.name] += member.index.numel()

    def most(side: Counter[str]) -> str | None:
        return side.most_common(1)[0][0] if side else None

    return {layer: (most(read), most(made)) for layer, (read, made) in channels.items()}


def _weight(model: nn.Module, layer: str) -> Tensor:
    return cast(Tensor, model.get_submodule(layer).weight)


def _positive(model: nn.Module) -> nn.Module:
    """A copy for `synflow_scores`."""
    network = copy.deepcopy(model).eval().double().requires_grad_(False)
    for name, module in list(network.named_modules()):
        if isinstance(module, NORMS) or type(module).__name__.startswith(TIMM_NORMS):
            # timm's norms may end in an activation.
            rest = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
            surgery.swap(network, name, nn.Sequential(*rest))
    # Not the buffers: without norms they are constants, such as the mask of shifted windows.
    for name, value in network.named_parameters():
        # Layer scale is no weight of a layer either; at 1e-6, where it starts, every block would be emptied.
        if name.rpartition(".")[2].startswith("gamma"):
            value.fill_(1.0)
        value.abs_()
    return network


def _flow(
    network: nn.Module, layers: Sequence[str], size: tuple[int, int, int], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scores of `synflow_scores`; in `network` what is masked is zero from then on."""
    weights = [_weight(network, name) for name in layers]
    for name, weight in zip(layers, weights, strict=True):
        weight.requires_grad_(False).mul_(masks[name]).requires_grad_(True)
    with torch.enable_grad():
        total = network(torch.ones(1, *size, dtype=torch.float64)).sum()
        slopes = torch.autograd.grad(total, weights, materialize_grads=True)
    return {
        name: slope.mul_(weight.detach()).abs_() for name, weight, slope in zip(layers, weights, slopes, strict=True)
    }


def _named(layers: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(layers, values.tolist(), strict=True))


def _scaled(raw: Tensor, costs: Tensor, budget: float) -> Tensor:
    """min(1, s raw) for the one s at which it costs the budget; 1 where that is enough for all, or costs nothing."""
    full = costs == 0
    while True:
        scale = (budget - costs[full].sum()) / (raw * costs)[~full].sum()
        over = ~full & (scale * raw > 1)
        if not over.any():  # nor with all of them full, where the scale means nothing
            return torch.where(full, 1.0, scale * raw)
        full |= over


def _largest(scores: Mapping[str, Tensor], share: float, kind: Density) -> dict[str, Tensor]:
    """Masks of the largest scores of all layers, with the best of every layer among them."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    best = float(flat.max())
    if not (math.isfinite(best) and best > 0):
        state = "all zero" if best == 0 else "not finite"
        raise PassError(f"prune: {kind} scores of the weights are {state}, which ranks nothing; take erk densities")
    parts = torch.split(flat, lengths := [score.numel() for score in scores.values()])
    for part in parts:
        part[part.argmax()] = math.inf
    count = max(round(share * len(flat)), len(scores))
    least = flat.kthvalue(len(flat) - count + 1).values
    kept = flat > least
    # Equals are taken evenly over all layers, not from the first on.
    equals, left = (flat == least).nonzero()[:, 0], count - int(kept.sum())
    kept[equals[torch.arange(left) * len(equals) // left]] = True
    parts = torch.split(kept, lengths)
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _positions(model: nn.Module, layers: Sequence[str], size: tuple[int, int, int]) -> Tensor:
    """(layers,): at how many positions of one image each layer applies its weight; 0 where it is never called."""
    seen: Counter[str] = Counter()

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] += output.numel() // len(_weight(model, name))

        return hook

    with ExitStack() as hooks, surgery.in_eval(model):
        for name in layers:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(watch(name)))
        model(torch.zeros(1, *size))
    return torch.tensor([seen[name] for name in layers], dtype=torch.float64)
