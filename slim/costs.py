"""What a network costs before it is measured: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slim.measurement import Measurement


def count_params(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image of `size` (C, H, W)."""
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    parameter = next(model.parameters())
    with counter, torch.inference_mode():
        model(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    model.train(was_training)
    return int(counter.get_total_flops()) // 2


def count(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """Every cost a pass can claim to shrink, by metric name."""
    return {"params": count_params(model), "macs": count_macs(model, size)}


def figures(counted: Mapping[str, int]) -> dict[str, Measurement]:
    """What `count` found, as measurements by metric name."""
    return {cost: Measurement(metric=cost, value=value, unit=cost) for cost, value in counted.items()}
