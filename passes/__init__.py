"""The table of passes. Files name a pass by its word here, never by a path to import."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from slim.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from slim.contract import Pass

PASSES: dict[str, tuple[str, str, str]] = {
    "distill": ("slim.passes.distill", "Distill", "Learn from a teacher, without labels."),
    "elastic": ("slim.passes.elastic", "Elastic", "Train a network together with its subnets."),
    "finetune": ("slim.passes.finetune", "Finetune", "Train every value on labelled images."),
    "low-rank": ("slim.passes.low_rank", "LowRank", "Write layers as two thinner ones, with ranks for a budget."),
    "mask": ("slim.passes.mask", "Mask", "Set two of four weights to zero; pays on sparse kernels alone."),
    "merge": (
        "slim.passes.merge",
        "Merge",
        "Fold norms, scales and branches into layers; changes no output.",
    ),
    "prune": ("slim.passes.prune", "Prune", "Cut channels, hidden units and attention heads out, for a budget."),
    "qat": ("slim.passes.qat", "Qat", "Train the network so that INT8 changes less of it."),
    "quantize": ("slim.passes.quantize", "Quantize", "Serve in INT8 or half precision, where that is faster."),
    "sparsify": ("slim.passes.sparsify", "Sparsify", "Train the channels that prune will cut towards zero."),
    "subnet": ("slim.passes.elastic.subnet", "BestSubnet", "Cut the best subnet for a budget out of an elastic one."),
}
"""Word -> (module, class, one line of help). A literal, so that `slim --help` imports no pass."""


def resolve(name: str) -> type[Pass]:
    """The class of the pass called `name`.

    Raises:
        RecipeError: no such pass.
    """
    if name not in PASSES:
        raise RecipeError(f"pass {name!r} is unknown{did_you_mean(name, PASSES)}")
    module, class_name, _ = PASSES[name]
    pass_class: type[Pass] = getattr(importlib.import_module(module), class_name)
    return pass_class
