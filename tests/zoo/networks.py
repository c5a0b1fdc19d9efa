"""Networks of timm with weights drawn at random, as the tests of families meet them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from slim import surgery
from slim.artifact import Artifact, Backbone, Preprocessing

Norm = nn.BatchNorm1d | nn.BatchNorm2d
CLASSES = 10


def built(family: str, kwargs: dict[str, Any], pixels: int) -> Artifact:
    """Random weights that hide nothing: none near zero, and batch norms that see what they expect.

    Behind a fresh classifier or layer scale every mistake would look exact; and with the statistics that batch norms
    begin with, what deep networks put out hardly depends on the image.
    """
    chosen = Backbone(
        name=family, kwargs=kwargs, num_classes=CLASSES, input=Preprocessing(size=(3, pixels, pixels), crop=1.0)
    )
    model = surgery.audible(chosen.build(seed=1)).train()
    momenta = {module: module.momentum for module in model.modules() if isinstance(module, Norm)}
    for norm in momenta:
        norm.momentum = 1.0  # the statistics of these images alone
    with torch.no_grad():
        model(torch.randn(16, 3, pixels, pixels, generator=torch.Generator().manual_seed(3)))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return Artifact.of(model, chosen)


def images_of(given: Artifact, n: int) -> Tensor:
    return torch.randn(n, *given.backbone.input.size, generator=torch.Generator().manual_seed(7))


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return cast(Tensor, model(images))
