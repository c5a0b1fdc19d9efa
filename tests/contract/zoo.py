"""Backbones of every kind that a pass meets, each small enough to build and run in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slim.artifact import Artifact, Backbone, Preprocessing

SIZE = (3, 32, 32)
CLASSES = 10
WIDE = 16
"""What `min_width` has to be for low-rank to find layers in these networks."""
BLIND: dict[str, Any] = {"objective": "plain", "repair": "none"}
"""Low-rank that looks at no image."""

ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    "resnet": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8}, "layer4.*"),
    "mobilenet": ("mobilenetv2_035", {"pad_type": "same"}, "blocks.[0-4].*"),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 40], "patch_size": 2}, "stages.3.*"),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        "blocks.1.*",
    ),
    # By its constructor, which is how a network that timm does not list is named; needs trust.
    "mixer": (
        "timm.models.mlp_mixer:MlpMixer",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2},
        "*.mlp_channels.*",
    ),
    # Its attention reads `qkv.weight` itself, so that layer cannot be replaced by two.
    "beit": (
        "beit_base_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": None},
        "blocks.1.*",
    ),
}
"""Name -> timm model, its arguments, and layers that a first low-rank can leave to a second."""


def backbone(name: str) -> Backbone:
    model, kwargs, _ = ZOO[name]
    return Backbone(name=model, kwargs=kwargs, num_classes=CLASSES, input=Preprocessing(size=SIZE, crop=1.0))


def artifact(name: str) -> Artifact:
    """The network with values that hide nothing: some begin with zeros, such as the mixer's classifier."""
    chosen = backbone(name)
    model = chosen.build(trust=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    return Artifact.of(model, chosen, trust=True)


class Tied(nn.Module):
    """A network of the user's own, with one matrix used in two layers."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).mean((2, 3))
        output: Tensor = self.head(self.second(self.first(features).relu()).relu())
        return output


def tied(num_classes: int, width: int = 16) -> nn.Module:
    return Tied(num_classes, width)
