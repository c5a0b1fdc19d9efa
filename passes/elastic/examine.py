"""What a subnet is worth: cut out, repaired as it will be when it ships, and asked about images it was not trained on.

Batch norms of the largest network fit none of its subnets: without re-estimating them every figure would be that of
noise. The largest itself is left as it is, for its statistics are of far more images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from slim import surgery
from slim.contract import Context
from slim.passes import calibration, repair
from slim.passes.elastic.extract import extract
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
class Examiner:
    """One network, its family, and the images that decide."""

    model: nn.Module
    """The largest, on `device`."""
    space: Space
    held: Batches
    """Training images that were held out."""
    images: Tensor
    """(n, C, H, W) for statistics and least squares, on `device`."""
    repair: Repair
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, space: Space, context: Context, how: Repair) -> Examiner:
        """On a copy of `model`, with the split `held` of the data (see `Data.apart`), statistics on the first of train.

        All images stay in memory, decoded.
        """
        assert context.data is not None  # the caller held images out of it
        assert context.backbone is not None  # Pass.__call__ set it
        held = [*context.data.eval_batches("held", context.backbone.input, batch_size=BATCH)]
        images = images_for_statistics(model, context).to(context.device)
        return cls(copy.deepcopy(model).to(context.device), space, held, images, how, context.device)

    def finished(self, subnet: Subnet) -> nn.Module:
        """The subnet as it would ship, on `device`."""
        smaller, kept = extract(self.model, self.space, subnet), self.space.kept(subnet)
        if kept or self.space.skipped(subnet):
            stays = positions(self.model.state_dict(), kept)
            outputs = {key.rpartition(".")[0]: dims[0] for key, dims in stays.items() if 0 in dims}
            readers = [name for group, _ in kept for name in group.readers]
            mend(smaller, self.model, outputs, readers, self.images, self.repair)
        return smaller

    def accuracy(self, subnet: Subnet) -> float:
        """Top-1 in percent on the images held out."""
        return top1(self.finished(subnet), self.held, self.device)


def images_for_statistics(model: nn.Module, context: Context) -> Tensor:
    """(n, C, H, W): the first training images, which are not among those held out."""
    assert context.data is not None  # the caller held images out of it
    assert context.backbone is not None  # Pass.__call__ set it
    most = repair.images_that_fit(model, context.backbone.input.size, MEMORY_GB)
    batches = context.data.eval_batches("train", context.backbone.input, batch_size=min(STATISTICS, most))
    return next(images for images, _ in batches)


def mend(
    smaller: nn.Module,
    model: nn.Module,
    kept: Mapping[str, Sequence[int]],
    readers: Sequence[str],
    images: Tensor,
    how: Repair,
) -> dict[str, JsonValue]:
    """Re-estimate norms of a subnet, refit layers that lost inputs, or both, in place; see slim/passes/repair.py.

    Args:
        smaller: the subnet.
        model: the largest; on the same device.
        kept: layer or norm -> channels of its output that it still has, where some are gone.
        readers: layers that lost inputs.
        images: (n, C, H, W), on the same device.
        how: what is done.

    Returns:
        Figures of the repair; empty where there was nothing to do.
    """
    norms = how in ("both", "norms") and any(isinstance(module, repair.Norm) for module in smaller.modules())
    refit = {name: name for name in readers} if how in ("both", "outputs") else {}
    if not refit and not norms:
        return {}
    return repair.repair(smaller, model, refit, images, kept=kept, norms=norms, batch_size=calibration.EVAL_BATCH)


def top1(model: nn.Module, batches: Batches, device: torch.device) -> float:
    """Share of images, in percent, whose largest output is that of their label."""
    right = total = 0
    with surgery.in_eval(model):
        for images, labels in batches:
            right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return 100 * right / total
