"""What a cut channel put out on average goes into the bias of the layers that read it.

A channel whose batch norm has no scale left puts out act(bias) everywhere, and without it the layers behind would be
off by a constant. Exact for channels that are constant and layers that do not pad, else right on average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from slim import surgery
from slim.passes.repair import Spread

CONSTANT = 1e-10
"""Variance over energy below which a channel is constant: its square root is beyond the rounding of fp32."""


def fold_means(
    model: nn.Module,
    gone: Mapping[str, Sequence[int]],
    batches: Iterable[Tensor],
    probe: Tensor,
    *,
    constants_only: bool = False,
) -> list[str]:
    """Add to the bias of layers, or to the mean of the batch norm behind, what some of their inputs give on average.

    Args:
        model: in eval mode, with all its channels; changed in place, as if those inputs were to be cut out.
        gone: layer -> inputs that will be cut out.
        batches: (B, C, H, W) each, on the model's device.
        probe: (B, C, H, W), by which the norms behind layers are found.
        constants_only: leave out channels that vary: for images that are noise.

    Returns:
        Layers that have neither a bias nor a batch norm of their own behind them, and stay as they were.
    """
    seen = {name: Spread() for name in gone}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        seen[name].add(x.reshape(-1, x.shape[-1], 1) if isinstance(layer, nn.Linear) else x)

    with ExitStack() as hooks, surgery.in_eval(model):
        for name in gone:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(lambda m, i, name=name: look(name, m, i)))
        for images in batches:
            model(images)
    norms = surgery.norms_of_layers(model, probe)
    left = []
    for name, places in gone.items():
        layer = cast(Any, model.get_submodule(name))
        if not seen[name].n:
            continue  # it is not called: its weight is read by another
        mean, index = seen[name].mean, torch.tensor(list(places), dtype=torch.long)
        if constants_only:
            varies = seen[name].variance > CONSTANT * (seen[name].variance + mean.square())
            mean = mean.masked_fill(varies, 0.0)
        weight = layer.weight.detach().double()
        shift = weight.reshape(*weight.shape[:2], -1).sum(2)[:, index] @ mean[index]
        with torch.no_grad():
            if layer.bias is not None:
                layer.bias.add_(shift)
            elif name in norms:
                cast(Any, model.get_submodule(norms[name])).running_mean.sub_(shift)
            else:
                left.append(name)
    return left
