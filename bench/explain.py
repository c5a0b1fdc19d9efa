"""What became of each layer and why: the layers before compression, what each pass decided, what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from slim.artifact import Artifact
from slim.bench import filters
from slim.bench.decisions import Decision, decisions
from slim.bench.wording import printable
from slim.contract import Fed
from slim.surgery import in_eval

if TYPE_CHECKING:
    from rich.table import Table

Shape = tuple[int, ...]
Layer = nn.Linear | nn.Conv2d
FEWEST = 64
"""Kernels from which random ones have what the fit says: 1.02 times that of 64 (sd 0.01), but 1.3 times that of 8."""


class LayerRow(BaseModel):
    """A Linear layer or convolution of the network before compression, and what is left of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Dotted name."""
    type: str
    """`Linear` or `Conv2d`."""
    before: Shape
    """Shape of the weight."""
    after: tuple[Shape, ...]
    """Shapes of the weights in its place: two for a low-rank pair, none where it is part of another layer."""
    weights_before: int
    """Weights, without biases."""
    weights_after: int
    """Of all layers in its place."""
    macs: int
    """Multiply-accumulates before, for one image; 0 where the network reads the weight without calling the layer."""
    sparsity: float | None = None
    """Share of kernels that are nearly zero; none where the kernels are not known, here and below."""
    entropy: float | None = None
    """Variance entropy; none for 1 x 1 kernels."""
    entropy_ratio: float | None = None
    """To that of as many random kernels: above 1 as if never trained. Known for 64 or more kernels of 3 x 3."""
    orthogonality: float | None = None
    """1 for orthogonal filters, 0 for equal ones."""
    decisions: tuple[Decision, ...] = ()
    """In the order of the passes."""

    @property
    def kept(self) -> float:
        """Share of the weights that is left."""
        return self.weights_after / self.weights_before

    @property
    def kind(self) -> str:
        """The last pass that changed the layer; `untouched` where none did."""
        return next((one.name for one in reversed(self.decisions) if one.changes), "untouched")

    @property
    def why(self) -> str:
        """What was decided: by the passes that changed the layer, or, where none did, by all."""
        told = [one for one in self.decisions if one.changes] or self.decisions
        # A pass that left a layer twice for one reason says it once.
        return "; ".join(dict.fromkeys(f"{one.name}: {one.text}" for one in told))


def layers(artifact: Artifact, dense: Fed, *, valued: bool) -> list[LayerRow]:
    """A row for each layer of the network before compression, in its order.

    Args:
        artifact: the compressed network.
        dense: the network before compression, on the CPU, and what it was fed.
        valued: whether `dense` has the values it had then. Else kernels are described as they are in `artifact`, those
            of layers that still are one layer.
    """
    final = artifact.model()
    left = _layers_of(final)
    macs = _macs(dense.model, dense.input.size)
    rows = []
    for name, layer in _layers_of(dense.model).items():
        places = {place: one for place, one in left.items() if place == name or place.startswith(f"{name}.")}
        known = layer if valued else places.get(name)
        rows.append(
            LayerRow(
                name=name,
                type="Linear" if isinstance(layer, nn.Linear) else "Conv2d",
                before=tuple(layer.weight.shape),
                after=tuple(tuple(one.weight.shape) for one in places.values()),
                weights_before=layer.weight.numel(),
                weights_after=sum(one.weight.numel() for one in places.values()),
                macs=macs.get(name, 0),
                **(_measures(known.weight) if known is not None else {}),
                decisions=tuple(decisions(artifact.history, name)),
            )
        )
    return rows


def to_console(rows: Sequence[LayerRow]) -> Table:
    """The rows as a table, for `rich.console.Console.print`. MACs are shares of those of all layers before."""
    from rich.table import Table
    from rich.text import Text

    table = Table("layer", "weights", box=None, pad_edge=False)
    for heading in ("kept", "MACs", "sparse", "H/T", "orth."):
        table.add_column(heading, justify="right")
    table.add_column("decided", overflow="fold")
    macs = sum(row.macs for row in rows) or 1
    for row in rows:
        before, after = _shape(row.before), " + ".join(map(_shape, row.after)) or "none"
        table.add_row(
            Text(printable(row.name)),
            before if before == after else f"{before} -> {after}",
            f"{100 * row.kept:.0f} %",
            f"{100 * row.macs / macs:.1f} %",
            *("-" if one is None else f"{one:.2f}" for one in (row.sparsity, row.entropy_ratio, row.orthogonality)),
            Text(printable(row.why) or "-"),
        )
    return table


def _shape(weight: Shape) -> str:
    """`64x32x3x3`; `64x32` for a Linear layer, and for a 1 x 1 convolution, which is one at every position."""
    return "x".join(map(str, weight[:2] if weight[2:] == (1, 1) else weight))


def _layers_of(model: nn.Module) -> dict[str, Layer]:
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}


def _measures(weight: Tensor) -> dict[str, float]:
    found = {"sparsity": filters.sparsity(weight), "orthogonality": filters.orthogonality(weight)}
    if weight[0, 0].numel() > 1:
        found["entropy"] = filters.variance_entropy(weight)
        kernels = weight.shape[0] * weight.shape[1]
        if weight.shape[2:] == (3, 3) and kernels >= FEWEST:
            found["entropy_ratio"] = found["entropy"] / filters.random_entropy(kernels)
    return found


def _macs(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-accumulates of every layer that is called, for one image of zeros."""
    found: dict[str, int] = {}

    def count(name: str, layer: Layer, output: Tensor) -> None:
        channels = len(layer.weight)
        found[name] = found.get(name, 0) + output.numel() // channels * layer.weight.numel()

    with ExitStack() as hooks, in_eval(model):
        for name, layer in _layers_of(model).items():
            hooks.enter_context(layer.register_forward_hook(lambda m, _, out, name=name: count(name, m, out)))
        model(torch.zeros(1, *size))
    return found
