"""What several passes ask of a network's layers: which of them `skip` names, and how one forward pass calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from slim import surgery
from slim.errors import PassError

Call = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of the input and the output, for one image."""
Calls = Sequence[Call]
"""Of one layer, in order."""


def skipped(pass_name: str, patterns: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that a pattern of the setting `skip` matches as a whole.

    Raises:
        PassError: a pattern matches none.
    """
    names, found = tuple(names), set[str]()
    for pattern in patterns:
        matches = {name for name in names if fnmatch(name, pattern)}
        if not matches:
            such = f"; names are such as {names[0]!r}" if names else ""
            raise PassError(f"{pass_name}: skip {pattern!r} matches no layer{such}")
        found |= matches
    return frozenset(found)


def calls_of(model: nn.Module, names: Iterable[str], size: tuple[int, int, int]) -> dict[str, Calls]:
    """Every call of the named layers; none of one whose weight the network reads without calling it.

    Args:
        model: on the CPU; it is called once, in eval mode, with zeros of `size` (C, H, W).
        names: of Linear layers and convolutions.
        size: of the network's input.
    """
    seen: dict[str, list[Call]] = {name: [] for name in names}

    def look(name: str, inputs: tuple[Tensor, ...], named: Mapping[str, Any], output: Tensor) -> None:
        given = inputs[0] if inputs else named["input"]  # torch's name for it
        seen[name].append((tuple(given.shape), tuple(output.shape)))

    with ExitStack() as hooks, surgery.in_eval(model):
        for name in seen:
            layer = model.get_submodule(name)
            hooks.enter_context(
                layer.register_forward_hook(lambda _m, i, k, o, name=name: look(name, i, k, o), with_kwargs=True)
            )
        model(torch.zeros(1, *size))
    return {name: tuple(calls) for name, calls in seen.items()}


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a Linear layer or a convolution that computes with its weight as it is.

    Others standardise their weight, or hand it to another. timm's own is known by name: importing timm takes seconds.
    """
    return type(layer) in (nn.Linear, nn.Conv2d) or type(layer).__name__ == "Conv2dSame"
