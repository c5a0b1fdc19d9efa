"""Tiny teachers and students of every kind ScaleKD meets, with values that hide nothing."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

SMALL = (3, 32, 32)
LARGE = (3, 64, 64)
"""For convolutional students, whose last map is 2 x 2 at this size; a teacher may see another size."""
CLASSES = 10

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SWIN: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "num_heads": (1, 2, 2), "window_size": 4}

TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "depths": (1, 1, 2)}),
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "beit": ("beit_base_patch16_224", VIT),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 2], "dims": [16, 24, 32, 64], "patch_size": 2}),
}

STUDENTS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "resnet": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8}, LARGE),
    "mobilenet": ("mobilenetv2_035", {}, LARGE),
    "vit": ("vit_tiny_patch16_224", {**VIT, "embed_dim": 32, "num_heads": 2, "depth": 4}, SMALL),
    "mixer": ("mixer", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 4}, SMALL),
}


def network(name: str, **arguments: Any) -> nn.Module:
    """A timm network in eval mode; noise takes the place of zeros and ones that would let a wrong order pass."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if name == "mixer":
            model: nn.Module = MlpMixer(num_classes=CLASSES, **arguments)
        else:
            model = timm.create_model(name, num_classes=CLASSES, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    return model.eval()


def teacher(name: str) -> nn.Module:
    model, arguments = TEACHERS[name]
    return network(model, **arguments)


def student(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    model, arguments, size = STUDENTS[name]
    return network(model, **arguments), size


def images(size: tuple[int, int, int], count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))
