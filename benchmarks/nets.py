"""The networks that several benchmarks share.

Those for 32x32 images are made of timm's own classes, as timm lists none this small, and are used with --trust.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def resnet18_thin(num_classes: int, width: int = 16) -> nn.Module:
    """ResNet-18 with a 3x3 stem and `width` channels in its first stage: 0.70 M parameters, 35 M MACs at width 16."""
    model = ResNet(
        BasicBlock,
        [2, 2, 2, 2],
        num_classes=num_classes,
        channels=[width, 2 * width, 4 * width, 8 * width],
        stem_type="deep",  # the only stem whose width can be given; replaced below
        stem_width=width // 2,
    )
    model.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def swin_small(num_classes: int, width: int = 64, depths: tuple[int, ...] = (1, 2, 2)) -> nn.Module:
    """Swin on 16x16 tokens, three stages, 2.2 M parameters, 75 M MACs.

    Its patches come from two convolutions (Xiao et al. 2021, arXiv:2106.14881): it learns little from few images
    otherwise.
    """
    heads = tuple(width * 2**stage // 32 for stage in range(len(depths)))
    model = SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        num_classes=num_classes,
    )
    model.patch_embed.proj = nn.Sequential(
        nn.Conv2d(3, width // 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(width // 2),
        nn.GELU(),
        nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.GELU(),
        nn.Conv2d(width, width, 1),
    )
    return model


def vit_small(num_classes: int, width: int = 128, depth: int = 4) -> nn.Module:
    """ViT on 8x8 tokens, averaged, without a class token: 0.86 M parameters, 62 M MACs; patches as in `swin_small`."""
    model = VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=width,
        depth=depth,
        num_heads=width // 32,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
    )
    model.patch_embed.proj = nn.Sequential(
        nn.Conv2d(3, width // 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width // 4),
        nn.GELU(),
        nn.Conv2d(width // 4, width // 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(width // 2),
        nn.GELU(),
        nn.Conv2d(width // 2, width, 2, stride=2),
    )
    return model


def mobilenetv2(data: Path) -> dict[str, Any]:
    """The `model` of a recipe for the real ImageNet MobileNetV2 1.0 whose weights lie in the folder `data`."""
    return {
        "name": "mobilenetv2_100",
        "args": {"pad_type": "same"},
        "weights": str(data / "mobilenetv2_100.safetensors"),
        "input": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop": 0.875, "interpolation": "bicubic"},
    }
