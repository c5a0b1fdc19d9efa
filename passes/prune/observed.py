"""What channels carry and what the prediction makes of them, seen on a few unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.contract import Progress, no_progress
from slim.errors import PassError
from slim.passes.calibrate import Layer, rows, thinned
from slim.passes.repair import Spread
from slim.passes.sensitivity import BATCH, drawn_loss
from slim.surgery import in_eval

EVAL_BATCH = 32
"""Images of one call without gradients."""
ROWS_PER_IMAGE = 256
"""Rows read of each image. Those of one image are alike, so that more would tell little; 16 images then give a head
of 64 columns the 64 rows for each input that calibrate takes as enough, and a single channel far more."""


@dataclass(frozen=True)
class Calibration:
    """The images, and how to go through them."""

    batches: Callable[[], Iterable[Tensor]]
    """(B, C, H, W) each, the same images at every call."""
    images: int
    """How many they hold together."""
    seed: int
    """Of the classes drawn."""
    device: torch.device
    """Where the network lies."""
    progress: Progress
    labels: Tensor | None = None
    """(images,) int64; none: classes are drawn from the prediction."""

    def cut(self, size: int) -> Iterator[Tensor]:
        """The images in batches of `size`, whatever batches they come in: what is found then depends on no cut."""
        left: Tensor | None = None
        for images in self.batches():
            left = images if left is None else torch.cat([left, images])
            while len(left) >= size:
                yield left[:size].to(self.device)
                left = left[size:]
        if left is not None and len(left):
            yield left.to(self.device)


@dataclass(frozen=True, eq=False)
class Spot:
    """Where the channels of a group pass by: the input of a layer that reads them, or the output of one."""

    layer: str
    index: Tensor
    """(units, m) int64: their positions there."""
    output: bool = False


@dataclass(frozen=True, eq=False)
class Seen:
    """Moments of what each unit brings to one spot: its channels, b = m times the kernel positions of the reader."""

    second: Tensor
    """(units, b, b) fp64: mean of x x^T over rows, not centred."""
    mean: Tensor
    """(units, b) fp64."""
    energy: float
    """Mean squared length of what the reader makes of all units, about its mean where it has a bias; 0 at an output."""


def look(model: nn.Module, spots: Sequence[Spot], given: Calibration) -> dict[Spot, Seen]:
    """Moments at every spot, all of which images reach.

    Raises:
        PassError: a layer sees or puts out values that are not finite.
    """
    found = [_Sums(spot, cast(Layer, model.get_submodule(spot.layer))) for spot in spots]
    batch = range(0)

    def adding(sums: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: sums.add(output if sums.spot.output else inputs[0], batch)

    with ExitStack() as hooks, in_eval(model), given.progress("prune: inputs", given.images) as advance:
        for sums in found:
            hooks.enter_context(sums.layer.register_forward_hook(adding(sums)))
        for images in given.cut(EVAL_BATCH):
            batch = range(batch.stop, batch.stop + len(images))
            model(images)
            advance(len(images))
    return {sums.spot: sums.seen() for sums in found}


def reached(model: nn.Module, spots: Sequence[Spot], given: Calibration) -> frozenset[Spot]:
    """Spots on the way from an image to the prediction.

    The others have a layer that is not called, or that is called with a table of the network's own.
    """
    first = replace(given, batches=lambda: [next(given.cut(1))], images=1, progress=no_progress, labels=None)
    return frozenset(slopes(model, spots, first))


def slopes(model: nn.Module, spots: Sequence[Spot], given: Calibration) -> dict[Spot, Tensor]:
    """(units,) fp64 at every spot: mean over images of (sum of a dL/da over positions and the unit's channels) ** 2.

    To first order a dL/da is what the log-likelihood L loses with a (Molchanov et al. 2019, arXiv:1906.10771). L is
    that of a class drawn from the prediction itself, as in slim/passes/sensitivity.py, or of the image's label where
    labels are given. Of a tensor that several layers read, each has its own part of the gradient. Spots that it does
    not reach are missing.

    Raises:
        PassError: the prediction of an image is not finite.
    """
    squares: dict[Spot, Tensor] = {}
    generator = torch.Generator().manual_seed(given.seed)
    done, count = 0, 0
    sums: dict[Spot, Tensor] = {}

    def watch(spot: Spot, layer: nn.Module, a: Tensor) -> None:
        channel = 1 if isinstance(layer, nn.Conv2d) else -1

        def add(gradient: Tensor) -> None:
            # A layer needs its input for its own gradient, so `a` is what it was when it was read.
            each = (a.detach() * gradient).movedim(channel, -1).reshape(count, -1, a.shape[channel])
            unit = each.sum(1, dtype=torch.double)[:, spot.index.to(a.device)].sum(2)
            sums[spot] = sums[spot] + unit if spot in sums else unit

        if a.requires_grad:
            a.register_hook(add)  # type: ignore[no-untyped-call]

    def before(spot: Spot) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            own = inputs[0].view_as(inputs[0])
            watch(spot, layer, own)
            return own, *inputs[1:]

        return hook

    def after(spot: Spot) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, _, output: watch(spot, layer, output)

    title = "prune: gradients"
    with ExitStack() as hooks, in_eval(model), torch.enable_grad(), given.progress(title, given.images) as advance:
        for spot in spots:
            layer = model.get_submodule(spot.layer)
            if spot.output:
                hooks.enter_context(layer.register_forward_hook(after(spot)))
            else:
                hooks.enter_context(layer.register_forward_pre_hook(before(spot)))
        for images in given.cut(BATCH):
            count = len(images)
            shown = images.clone().requires_grad_(True)
            logits = model(shown)
            if given.labels is None:
                loss = drawn_loss(logits, generator, "prune")
            else:
                labels = given.labels[done : done + count].to(logits.device)
                loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            torch.autograd.grad(loss, shown)
            for spot, unit in sums.items():
                here = unit.square().sum(0).cpu()
                squares[spot] = squares[spot] + here if spot in squares else here
            sums.clear()
            done += count
            advance(count)
    return {spot: found / done for spot, found in squares.items()}


def variances(model: nn.Module, norms: Sequence[str], given: Calibration) -> dict[str, Tensor]:
    """(C,) fp64: variance of what each of the named norms is fed; those that are not called are missing."""
    found = {name: Spread() for name in norms}

    def adding(spread: Spread) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: spread.add(inputs[0])

    with ExitStack() as hooks, in_eval(model), given.progress("prune: norms", given.images) as advance:
        for name, spread in found.items():
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(adding(spread)))
        for images in given.cut(EVAL_BATCH):
            model(images)
            advance(len(images))
    return {name: spread.variance.cpu() for name, spread in found.items() if spread.n}


def columns(layer: Layer, index: Tensor) -> Tensor:
    """(o, units, b): the columns of the weight that read each unit, kernel positions last. index: (units, m)."""
    weight = layer.weight.detach()
    return weight.reshape(*weight.shape[:2], -1)[:, index.to(weight.device)].flatten(2)


class _Sums:
    """Of one spot, over as many calls as there are."""

    def __init__(self, spot: Spot, layer: Layer) -> None:
        self.spot, self.layer, self.n = spot, layer, 0
        self.weight = None if spot.output else columns(layer, spot.index).flatten(1)
        self.second = self.mean = self.made = self.energy = torch.zeros((), dtype=torch.double)

    def add(self, x: Tensor, batch: range) -> None:
        if not x.isfinite().all():
            name = self.spot.layer
            raise PassError(f"prune: layer {name!r} sees values that are not finite; check weights and images")
        if self.weight is None:
            found = thinned(x, batch, ROWS_PER_IMAGE)[:, :, None]
        else:
            found = rows(self.layer, x, batch, ROWS_PER_IMAGE).view(-1, self.layer.weight.shape[1], self._taps)
        units = found[:, self.spot.index.to(x.device)].flatten(2)
        if self.weight is not None:
            made = units.flatten(1) @ self.weight.T
            self.energy = self.energy + made.square().sum(dtype=torch.double).cpu()
            self.made = self.made + made.sum(0, dtype=torch.double).cpu()
        each = units.double().movedim(0, 1)
        self.second, self.mean = self.second + (each.mT @ each).cpu(), self.mean + each.sum(1).cpu()
        self.n += len(units)

    def seen(self) -> Seen:
        energy = self.energy / self.n
        if self.layer.bias is not None:
            energy = energy - (self.made / self.n).square().sum()
        return Seen(self.second / self.n, self.mean / self.n, max(float(energy), 0.0))

    @property
    def _taps(self) -> int:
        return self.layer.weight[0, 0].numel()
