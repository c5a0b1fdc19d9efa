"""The only file that edits modules, and the one that holds them still for a look."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and without gradients; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule `name` (dotted path) was, in the same training mode."""
    old = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    module.train(old.training)
    # nn.Sequential and nn.ModuleList index children by string, which setattr serves as well.
    setattr(model.get_submodule(parent), child, module)


def classifiers(model: nn.Module) -> frozenset[str]:
    """Dotted names of the classifier modules (timm's `get_classifier`); empty where the network has none to tell."""
    if not hasattr(model, "get_classifier"):
        return frozenset()
    found = cast(Any, model).get_classifier()
    heads = {id(head) for head in (found if isinstance(found, tuple | list) else (found,))}
    return frozenset(name for name, module in model.named_modules() if id(module) in heads)


def fold_batch_norms(model: nn.Module, images: Tensor) -> int:
    """Merge every batch norm that only scales and shifts a convolution's output into that convolution.

    In eval mode, for good: the network can no longer be trained as it was. Which pairs there are is seen in one forward
    pass of `images` (B, C, H, W), and kept only if the outputs for them are the same afterwards.

    Returns:
        How many were merged; 0 where merging would change what the network computes.
    """
    pairs = _norms_of_convolutions(model, images)
    folded = copy.deepcopy(model)
    for network in (folded, model):
        for convolution, norm in pairs.items():
            first, second = cast(Any, network.get_submodule(convolution)), cast(Any, network.get_submodule(norm))
            swap(network, convolution, fuse_conv_bn_eval(first, second))
            # timm's norms may end in an activation.
            rest = [part for part in (getattr(second, "drop", None), getattr(second, "act", None)) if part is not None]
            swap(network, norm, nn.Sequential(*rest) if rest else nn.Identity())
        if network is folded and not _same(model, folded, images):
            return 0
    return len(pairs)


def _norms_of_convolutions(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Convolution -> the batch norm that is called once, on what that convolution, called once, returned."""
    made: dict[int, str] = {}
    pairs: dict[str, str] = {}
    calls: Counter[str] = Counter()
    kept: list[Tensor] = []  # so that no two outputs share an id

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += 1
            kept.append(output)
            if isinstance(module, nn.Conv2d):
                made[id(output)] = name
            elif id(inputs[0]) in made:
                pairs[made[id(inputs[0])]] = name

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}


def _same(model: nn.Module, other: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        expected, found = model(images), other(images)
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())  # order of additions
