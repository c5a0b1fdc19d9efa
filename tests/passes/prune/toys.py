"""Networks small enough to cut by hand, and what a network puts out before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slim.artifact import Artifact
from slim.data import Data

SWIN: dict[str, Any] = {
    "img_size": 64,
    "window_size": 2,
    "depths": (1, 1, 1, 1),
    "embed_dim": 12,
    "num_heads": (2, 2, 4, 4),
}
"""One block in each stage, for timm's `swin_tiny_patch4_window7_224`."""


class Chain(nn.Module):
    """Layers one after the other, then a mean over positions and a classifier."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x).mean((2, 3)))
        return out

    def get_classifier(self) -> nn.Module:
        return self.head


class Wide(nn.Module):
    """16 tokens through layers large enough for their widths to show in the time."""

    def __init__(self, num_classes: int, width: int = 128, hidden: int = 1024, out: int = 512) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, out)
        self.head = nn.Linear(out, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).mT
        tokens = self.down(self.up(tokens).relu()).relu()
        logits: Tensor = self.head(tokens.mean(1))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def images_of(data: Data, given: Artifact) -> Tensor:
    """The first 64 images of calibration, as the network takes them."""
    batches = data.eval_batches("calib", given.backbone.input, batch_size=64)
    return next(images for images, _ in batches)


def outputs(given: Artifact, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = given.model()(images)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found - expected).norm() / expected.norm())
