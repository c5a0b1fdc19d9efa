"""Merging: what follows a layer and is linear in eval mode becomes part of it, and the network computes what it did.

Branches of RepVGG, MobileOne, FastViT and others become one convolution (Ding et al. 2021, arXiv:2101.03697); a batch
norm or a layer scale goes into the rows of the layer before it; two layers with nothing between become one where that
has no more weights, such as a low-rank pair above break-even. Exact in eval mode alone: a batch norm that is folded can
no longer normalise by its batch. Does not fold norms into the layer behind them, nor scales that a block applies in its
own code (CaiT, BEiT).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from slim import surgery
from slim.contract import Context, Pass, Plan, Role
from slim.errors import PassError
from slim.passes.low_rank import schemes

Found = dict[str, str]
"""Layer -> what is merged with it; or the name of something -> why it is left."""
LAYERS = (nn.Linear, nn.Conv2d)
NO_LAYER = "what it reads is not what one layer put out"
CHANGES = "without it the network would compute something else, or fail"


class Merge(Pass):
    """Fold norms and scales into layers, and merge layers with nothing between."""

    name: ClassVar[str] = "merge"
    role: ClassVar[Role] = "repair"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})

    fold_norms: bool = True
    """Merge re-parameterisable branches, and fold batch norms into the layer before them."""
    fold_scales: bool = True
    """Fold layer scales into the layer before them."""
    pairs: bool = True
    """Merge two layers with nothing between where one has no more weights, as a low-rank pair above break-even."""

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """What is merged, by layer, and why the rest is left; seen and checked on random images."""
        assert context.backbone is not None  # Pass.__call__ set it
        trial = _Trial(model, context.backbone.input.size)
        plan: Plan = {"reparameterized": self.fold_norms and trial.reparameterize()}
        for kind, wanted in (("norms", self.fold_norms), ("scales", self.fold_scales), ("pairs", self.pairs)):
            plan[kind] = cast(JsonValue, trial.merge(kind) if wanted else {})
        if not any(plan.values()):
            reasons = sorted(set(trial.left.values())) or ["nothing that it looks for follows a layer"]
            raise PassError(f"merge: nothing to merge ({'; '.join(reasons)}); leave the pass out")
        return {**plan, "left": cast(JsonValue, trial.left)}

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Merge what was planned. Layers take their values along, so that nothing is left to fit."""
        if plan["reparameterized"]:
            model = reparameterized(model)
        for kind, (_, merge) in KINDS.items():
            for layer, other in cast(Found, plan[kind]).items():
                merge(model, layer, other)
        return model


class _Trial:
    """Copies of the network, merged kind by kind as long as they compute what they did."""

    def __init__(self, model: nn.Module, size: tuple[int, int, int]) -> None:
        self.images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        self.networks = [copy.deepcopy(model), surgery.audible(model)]
        with torch.no_grad():
            self.expected = [network(self.images) for network in self.networks]
        self.left: Found = {}

    def reparameterize(self) -> bool:
        """Whether there were branches to merge."""
        try:
            changed = [reparameterized(copy.deepcopy(network)) for network in self.networks]
        except Exception as error:  # whatever timm's blocks can raise
            self.left["branches"] = f"timm fails to merge them: {' '.join(str(error).split())[:100]}"
            return False
        if changed[0].state_dict().keys() == self.networks[0].state_dict().keys():
            return False
        if not self._same(changed):
            self.left["branches"] = CHANGES
            return False
        self.networks = changed
        return True

    def merge(self, kind: str) -> Found:
        """What of a kind was merged."""
        find, merge = KINDS[kind]
        candidates = [*find(self.networks[0], self.images, self.left).items()]

        def merged(some: Sequence[tuple[str, str]]) -> list[nn.Module]:
            networks = copy.deepcopy(self.networks)
            for network in networks:
                for layer, other in some:
                    merge(network, layer, other)
            return networks

        def kept(some: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
            """All of them where that works, else what works of either half."""
            if self._same(merged(some)):
                yield from some
            elif len(some) == 1:
                self.left[some[0][1]] = CHANGES
            else:
                yield from kept(some[: len(some) // 2])
                yield from kept(some[len(some) // 2 :])

        chosen = [*kept(candidates)] if candidates else []
        self.networks = merged(chosen)
        return dict(chosen)

    def _same(self, networks: Sequence[nn.Module]) -> bool:
        try:
            with torch.no_grad():
                found = [network(self.images) for network in networks]
        except Exception:  # whatever a network can raise that reads an attribute of what is gone
            return False
        return all(map(surgery.close, found, self.expected))


def reparameterized(model: nn.Module) -> nn.Module:
    """The network, its branches merged where timm's blocks know how."""
    from timm.utils.model import reparameterize_model

    with torch.random.fork_rng(devices=[]):  # new layers draw values before they get theirs
        return reparameterize_model(model, inplace=True).train(model.training)  # type: ignore[no-any-return]


def merge_pair(model: nn.Module, first: str, second: str) -> None:
    """One layer in place of two: a low-rank pair becomes the layer it was, others stand where the second was."""
    pair = _pair(model, first, second)
    assert pair is not None  # it was planned
    layer, bias = schemes.merged(pair), cast(Any, model.get_submodule(first)).bias
    if bias is not None:
        through = pair[1](bias.detach().view(1, -1, *[1] * (layer.weight.ndim - 2)))
        layer.bias = nn.Parameter(through.detach().flatten())
    parent = first.rpartition(".")[0]
    if parent == second.rpartition(".")[0] and schemes.scheme_of(model.get_submodule(parent)) is not None:
        surgery.swap(model, parent, layer)
    else:
        surgery.swap(model, first, nn.Identity())
        surgery.swap(model, second, layer)


def _pair(model: nn.Module, first: str, second: str) -> nn.Sequential | None:
    """Both layers, the first without its bias; none where they are not one linear map."""
    before = copy.deepcopy(cast(Any, model.get_submodule(first)))
    biased, before.bias = before.bias is not None, None
    pair = nn.Sequential(before, model.get_submodule(second))
    scheme = schemes.scheme_of(pair)
    # Where the second pads, the first's bias is missing at the borders.
    return None if scheme is None or (biased and scheme == "spatial") else pair


def _find_norms(model: nn.Module, images: Tensor, left: Found) -> Found:
    found = surgery.norms_of_layers(model, images)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and name not in found.values():
            left[name] = NO_LAYER if module.running_mean is not None else "it normalises by the batch at all times"
    return found


def _find_scales(model: nn.Module, images: Tensor, left: Found) -> Found:
    from timm.models.convnext import ConvNeXtBlock

    modules = dict(model.named_modules())
    found = surgery.followers(model, images, LAYERS, tuple({type(m) for m in modules.values() if surgery.is_scale(m)}))
    for name, module in modules.items():
        if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            last = f"{name}.mlp.fc2"
            found[last if isinstance(modules[last], LAYERS) else f"{last}.1"] = name
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if re.fullmatch(r"gamma_?\d?", leaf) and owner not in found.values():
            left[name] = NO_LAYER if surgery.is_scale(modules[owner]) else "the block multiplies by it in its own code"
    return found


def _find_pairs(model: nn.Module, images: Tensor, left: Found) -> Found:
    found: Found = {}
    for first, second in surgery.followers(model, images, LAYERS, LAYERS).items():
        pair = _pair(model, first, second)
        if pair is None:
            continue
        before, after = (cast(Tensor, layer.weight) for layer in pair)
        two, one = before.numel() + after.numel(), len(after) * before[0].numel() * after[0, 0].numel()
        if one > two:
            left[second] = f"one layer with {first} would have {one} weights, the two have {two}"
        elif first in found.values():
            left[second] = f"{first} is merged with the layer before it; merge again"
        else:
            found[first] = second
    return found


Find = Callable[[nn.Module, Tensor, Found], Found]
KINDS: dict[str, tuple[Find, Callable[[nn.Module, str, str], None]]] = {
    "norms": (_find_norms, surgery.fold_norm),
    "scales": (_find_scales, surgery.fold_scale),
    "pairs": (_find_pairs, merge_pair),
}
"""In the order they are merged: how they are found, adding to what is left, and how one is merged."""
