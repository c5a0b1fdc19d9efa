"""Small networks of the families that can be elastic, and their spaces with an order drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from slim import surgery
from slim.passes.elastic.discover import Wanted, discover
from slim.passes.elastic.space import Dim, Space, Subnet

SIZE = (3, 32, 32)
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [2, 2, 2, 1], "channels": [16, 24, 32, 40], "stem_width": 16}),
    "seresnet": ("seresnet50", {"layers": [2, 1, 1, 1], "channels": [16, 16, 24, 32], "stem_width": 16}),
    "mobilenetv2": ("mobilenetv2_035", {"pad_type": "same"}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "efficientnet": ("efficientnet_b0", {}),
    "regnet": ("regnety_002", {}),
    "convnext": ("convnext_atto", {"depths": [1, 2, 2, 1], "dims": [16, 24, 32, 40], "patch_size": 2}),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "depths": (2, 2, 1, 1), "embed_dim": 12, "num_heads": (2, 2, 4, 4)},
    ),
}
ALL = Wanted(widths=(1.0, 0.75, 0.5), depth=0.5, heads="whole", align=8, floor=8, skip=())
MORE = replace(ALL, ranks=(1.0, 0.75, 0.5), min_width=24, pixels=(24, 16))
"""Ranks and sides of the input, too."""


def network(name: str) -> nn.Module:
    """Values that hide nothing: timm begins with layer scales and last norms at or near zero."""
    import timm

    called, kwargs = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = timm.create_model(called, num_classes=10, **kwargs)
    generator = torch.Generator().manual_seed(1)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -0.3), (module.running_var, 0.5)):
                assert value is not None
                value.copy_(low + torch.rand(value.shape, generator=generator))
    return surgery.audible(built.eval())


@cache
def family(name: str) -> tuple[nn.Module, Space]:
    """A network and its space; neither may be changed."""
    built = network(name)
    return built, space_of(built)


def space_of(model: nn.Module, wanted: Wanted = ALL, size: tuple[int, int, int] = SIZE) -> Space:
    found, generator = discover(model, size, wanted), torch.Generator().manual_seed(2)
    orders = [torch.randperm(group.units, generator=generator).tolist() for group in found.groups]
    dims = [
        Dim(group, choices, tuple(order))
        for group, choices, order in zip(found.groups, found.choices, orders, strict=True)
    ]
    return Space(tuple(dims), tuple(found.blocks), tuple(found.fewest), found.left, tuple(found.ranks), found.pixels)


def drawn(space: Space, count: int) -> list[Subnet]:
    """Networks of the family, the smallest first."""
    generator = torch.Generator().manual_seed(3)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    found = [space.smallest]
    for _ in range(count - 1):
        units = tuple(dim.choices[below(len(dim.choices))] for dim in space.dims)
        there = [sum(block.stage == stage for block in space.blocks) for stage in range(len(space.fewest))]
        counts = [least + below(all_of - least + 1) for all_of, least in zip(there, space.fewest, strict=True)]
        ranks = tuple(rank.choices[below(len(rank.choices))] for rank in space.ranks)
        found.append(Subnet(units, space.ladder(counts), ranks, space.pixels[below(len(space.pixels))]))
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def images(count: int = 2, size: Sequence[int] = SIZE) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(4))
