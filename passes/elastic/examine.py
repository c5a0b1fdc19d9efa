"""What a subnet is worth: cut out, repaired as it will be when it ships, and asked about images it was not trained on.

Batch norms of the largest network fit none of its subnets: without re-estimating them every figure would be that of
noise. The largest itself is left as it is, for its statistics are of far more images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from slim import surgery
from slim.artifact import Preprocessing
from slim.contract import Context
from slim.passes import calibration, repair
from slim.passes.elastic.extract import extract, fed
from slim.passes.elastic.space import Space, Subnet
from slim.passes.prune.groups import positions

BATCH = 128
"""Images of one call when they are classified."""
STATISTICS = 512
"""Training images from which norms are re-estimated, at most."""
MEMORY_GB = 2.0
"""For one forward pass of them."""

Repair = Literal["both", "norms", "outputs", "none"]
Batches = Sequence[tuple[Tensor, Tensor]]
"""Images (B, C, H, W) and labels (B,) int64."""


@dataclass(frozen=True, eq=False)
class Images:
    """What subnets are looked at with, at each side of the input; read once, and kept decoded."""

    held: Callable[[int], Batches]
    """Side, 0 for the network's own -> training images that were held out."""
    train: Callable[[int], Tensor]
    """Side -> (n, C, H, W) for statistics and least squares, on the device."""

    @classmethod
    def of(cls, model: nn.Module, context: Context) -> Images:
        """Of the split `held` of the data (see `Data.apart`), and the first of train."""
        assert context.backbone is not None  # Pass.__call__ set it
        data, given = context.data, context.backbone.input
        assert data is not None  # the caller held images out of it
        count = statistics_count(model, given)

        @cache
        def held(pixels: int) -> Batches:
            return [*data.eval_batches("held", fed(given, pixels), batch_size=BATCH)]

        @cache
        def train(pixels: int) -> Tensor:
            return images_for_statistics(context, fed(given, pixels), count)

        return cls(held, train)


@dataclass(frozen=True, eq=False)
class Examiner:
    """One network, its family, and the images that decide."""

    model: nn.Module
    """The largest, on `device`."""
    space: Space
    images: Images
    repair: Repair
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, space: Space, context: Context, how: Repair) -> Examiner:
        """On a copy of `model`, with data that images were held out of (see `Data.apart`)."""
        images = Images.of(model, context)
        return cls(copy.deepcopy(model).to(context.device), space, images, how, context.device)

    def finished(self, subnet: Subnet) -> nn.Module:
        """The subnet as it would ship, on `device`."""
        smaller, kept = extract(self.model, self.space, subnet), self.space.kept(subnet)
        if self.space.canonical(subnet) != self.space.largest:
            stays = positions(self.model.state_dict(), kept)
            outputs = {key.rpartition(".")[0]: dims[0] for key, dims in stays.items() if 0 in dims}
            readers = [name for group, _ in kept for name in group.readers]
            pairs = self.space.factored(subnet)
            mend(smaller, self.model, outputs, readers, [*pairs], self.images.train, subnet.pixels, self.repair)
        return smaller

    def accuracy(self, subnet: Subnet) -> float:
        """Top-1 in percent on the images held out."""
        return top1(self.finished(subnet), self.images.held(subnet.pixels), self.device)


def statistics_count(model: nn.Module, given: Preprocessing) -> int:
    """How many images norms are re-estimated from."""
    return min(STATISTICS, repair.images_that_fit(model, given.size, MEMORY_GB))


def images_for_statistics(context: Context, given: Preprocessing, count: int) -> Tensor:
    """(n, C, H, W) on the device: the first training images, which are not among those held out."""
    assert context.data is not None  # the caller held images out of it
    return next(images for images, _ in context.data.eval_batches("train", given, batch_size=count)).to(context.device)


def mend(
    smaller: nn.Module,
    model: nn.Module,
    kept: Mapping[str, Sequence[int]],
    readers: Sequence[str],
    pairs: Sequence[str],
    images: Callable[[int], Tensor],
    pixels: int,
    how: Repair,
) -> dict[str, JsonValue]:
    """Re-estimate norms of a subnet, refit layers that lost something, or both, in place; see slim/passes/repair.py.

    With smaller images norms alone are re-estimated: what layers put out is then of another size.

    Args:
        smaller: the subnet.
        model: the largest; on the same device.
        kept: layer or norm -> channels of its output that it still has, where some are gone.
        readers: layers that lost inputs.
        pairs: layers that have become two.
        images: side of the input -> (n, C, H, W), on the same device.
        pixels: side of the subnet's input; 0 is the largest's.
        how: what is done.

    Returns:
        Figures of the repair; empty where there was nothing to do.
    """
    norms = how in ("both", "norms") and any(isinstance(module, repair.Norm) for module in smaller.modules())

    def now(name: str) -> str:
        return f"{name}.1" if name in pairs else name

    wanted = dict.fromkeys([*readers, *pairs]) if how in ("both", "outputs") and not pixels else {}
    refit = {now(name): name for name in wanted}
    if not refit and not norms:
        return {}
    return repair.repair(
        smaller,
        model,
        refit,
        images(pixels),
        as_dense_sees=images(0) if pixels else None,
        kept={now(name): channels for name, channels in kept.items()},
        norms=norms,
        batch_size=calibration.EVAL_BATCH,
    )


def top1(model: nn.Module, batches: Batches, device: torch.device) -> float:
    """Share of images, in percent, whose largest output is that of their label."""
    right = total = 0
    with surgery.in_eval(model):
        for images, labels in batches:
            right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return 100 * right / total
