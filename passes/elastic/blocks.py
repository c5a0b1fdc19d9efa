"""Residual blocks that can be left out: with nothing on its branch, such a block passes its input on.

Found by trying, not by name: where all values of a block are zero its branch is zero, and what comes out is what went
in. Behind an activation that holds too, for what went in came from one. Blocks that change the shape have no such way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim import surgery

SHAPE = "its output has another shape than its input"
NO_WAY = "its input has no way past it"
NEEDED = "the network does not run without it"
IN_SKIP = "in skip"


@dataclass(frozen=True)
class Block:
    """A residual block that may be left out."""

    name: str
    """Dotted name of the module."""
    stage: int
    """Blocks of one stage follow one another in one container."""


@dataclass(frozen=True)
class _Call:
    """The one call of a module: what it was given, and what it made of it."""

    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Tensor


def blocks_of(
    model: nn.Module, size: tuple[int, int, int], depth: float, skip: Container[str] = ()
) -> tuple[list[Block], list[int], dict[str, str]]:
    """Blocks that may be left out, how many of each stage's must stay, and why their neighbours may not.

    Args:
        model: in eval mode, on the CPU; it is copied.
        size: (C, H, W) of the network's input.
        depth: least share of a stage's blocks that stay, in (0, 1]; those that cannot be left out count.
        skip: names of blocks that stay.
    """
    tried = copy.deepcopy(model)
    calls = _calls(tried, size)
    passing = [name for name in calls if _passes_on(tried.get_submodule(name), calls[name])]
    found = _outermost(tried, passing)
    left = {name: IN_SKIP for name in found if name in skip}
    left |= {name: NEEDED for name in found if name not in left and not _runs_without(tried, [name], size)}
    stages: dict[str, list[str]] = {}
    for name in found:
        stages.setdefault(name.rpartition(".")[0], []).append(name)
    blocks: list[Block] = []
    fewest: list[int] = []
    for parent, there in stages.items():
        alike = _alike(tried, parent, there)
        names = [name for name in there if name not in left]
        stay = max(0, math.ceil(depth * len(alike) - 1e-9) - (len(alike) - len(names)))
        for name in alike:
            if name not in there and name in calls:
                given, made = calls[name].inputs[0], calls[name].output
                left[name] = SHAPE if given.shape != made.shape else NO_WAY
        if stay == len(names):
            left.update(dict.fromkeys(names, f"depth {depth:g} keeps all blocks of its stage"))
            continue
        blocks += [Block(name, len(fewest)) for name in names]
        fewest.append(stay)
    return blocks, fewest, left


def leave_out(model: nn.Module, blocks: Sequence[str]) -> None:
    """Put nothing in the place of the named blocks."""
    for name in blocks:
        surgery.swap(model, name, nn.Identity())


def _runs_without(model: nn.Module, blocks: Sequence[str], size: tuple[int, int, int]) -> bool:
    """Whether the network runs without them: some are called with more than a tensor."""
    without = copy.deepcopy(model)
    leave_out(without, blocks)
    try:
        with surgery.in_eval(without):
            without(torch.zeros(1, *size))
    except Exception:  # whatever a network can raise
        return False
    return True


def _calls(model: nn.Module, size: tuple[int, int, int]) -> dict[str, _Call]:
    """Every module with values that is called once, and turns a tensor into one."""
    seen: dict[str, list[_Call]] = {}

    def look(name: str, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            # Copied, as an activation may overwrite it.
            call = _Call((inputs[0].clone(), *inputs[1:]), named, output.clone())
            seen.setdefault(name, []).append(call)

    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    with ExitStack() as hooks, surgery.in_eval(model):
        for name, module in model.named_modules():
            if (
                name
                and not isinstance(module, nn.Sequential | nn.ModuleList)
                and any(True for _ in module.parameters())
            ):
                hook = module.register_forward_hook(
                    lambda _m, i, n, o, name=name: look(name, i, n, o), with_kwargs=True
                )
                hooks.enter_context(hook)
        model(images)
    return {name: calls[0] for name, calls in seen.items() if len(calls) == 1}


def _passes_on(module: nn.Module, call: _Call) -> bool:
    """Whether it passes its input on when all its values are zero; the values are put back."""
    given = call.inputs[0]
    if given.shape != call.output.shape:
        return False
    before = [value.detach().clone() for value in module.parameters()]
    with surgery.in_eval(module):
        for value in module.parameters():
            value.zero_()
        try:
            found = module(given.clone(), *call.inputs[1:], **call.named)
        finally:
            for value, was in zip(module.parameters(), before, strict=True):
                value.copy_(was)
    return isinstance(found, Tensor) and torch.equal(found, given)


def _outermost(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Of modules within one another the outermost, but not those that hold nothing besides others: they are stages."""

    def values(name: str) -> set[int]:
        return {id(value) for value in model.get_submodule(name).parameters()}

    def within(name: str) -> list[str]:
        return [other for other in names if other.startswith(f"{name}.")]

    alone = [name for name in names if not within(name) or values(name) - set().union(*map(values, within(name)))]
    return [name for name in alone if not any(name.startswith(f"{other}.") for other in alone)]


def _alike(model: nn.Module, parent: str, names: Sequence[str]) -> list[str]:
    """Children of `parent` that are built as the named ones are."""
    kinds = {type(model.get_submodule(name)) for name in names}
    prefix = f"{parent}." if parent else ""
    return [f"{prefix}{name}" for name, child in model.get_submodule(parent).named_children() if type(child) in kinds]
