"""Which layers can be written as two, and why the others stay as they are: found in one forward pass.

Left out by rule: classifiers, depthwise convolutions, the two layers of a squeeze-and-excitation, narrow layers (stems
and patch embeddings among them), layers factored before, those that share their weight, which would be two pairs, and
those whose weight the network reads without calling them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from slim import surgery
from slim.errors import PassError
from slim.passes.layers import calls_of, skipped
from slim.passes.low_rank import schemes
from slim.passes.low_rank.schemes import Layer

SQUEEZES = ("SqueezeExcite", "SEModule", "EffectiveSEModule", "SqueezeExciteCl")
"""timm's squeeze-and-excitation: its two layers see one position of each image, and cost next to no time."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may be factored."""

    name: str
    layer: Layer
    size: tuple[int, ...]
    """Shape of its input without the batch: (I, H, W) for a convolution, (..., I) for a Linear layer."""
    calls: int
    """How often one forward pass calls it."""


def candidates(
    model: nn.Module,
    size: tuple[int, int, int],
    *,
    min_width: int,
    skip: Sequence[str] = (),
    factored: frozenset[str] = frozenset(),
) -> tuple[list[Candidate], dict[str, str]]:
    """What may be factored, and for every other layer why not.

    Args:
        model: in eval mode; it is called once with zeros of `size` (C, H, W).
        size: of the network's input.
        min_width: a layer with fewer inputs or outputs, of one group, stays.
        skip: patterns of dotted names that stay.
        factored: names of the pairs that an earlier step made.

    Raises:
        PassError: a pattern of `skip` matches no layer.
    """
    layers = {name: module for name, module in model.named_modules() if schemes.is_layer(module)}
    unwanted = skipped("low-rank", skip if layers else (), layers)
    heads, calls = surgery.classifiers(model), calls_of(model, layers, size)
    owners = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    found: list[Candidate] = []
    dense: dict[str, str] = {}
    for name, layer in layers.items():
        rows, inputs = layer.weight.shape[:2]
        outputs = rows // (layer.groups if isinstance(layer, nn.Conv2d) else 1)
        parent = name.rpartition(".")[0]
        if name in heads:
            dense[name] = "classifier"
        elif parent in factored:
            dense[name] = "factored by a step before"
        elif name in unwanted:
            dense[name] = "in skip"
        elif type(model.get_submodule(parent)).__name__ in SQUEEZES:
            dense[name] = "squeeze-and-excitation"
        elif min(outputs, inputs) < min_width:
            dense[name] = f"narrower than min_width {min_width}"
        elif owners[id(layer.weight)] > 1:
            dense[name] = "its weight is shared"
        elif not calls[name]:  # some timm attention reads qkv.weight itself, which a pair does not have
            dense[name] = "its weight is read directly, not called"
        elif not layer.weight.isfinite().all():
            raise PassError(f"low-rank: layer {name!r} holds values that are not finite; start from weights that are")
        elif not layer.weight.any():
            dense[name] = "its weight is zero"
        else:
            shape, _ = calls[name][-1]
            found.append(Candidate(name, layer, shape[1:], len(calls[name])))
    return found, dense
