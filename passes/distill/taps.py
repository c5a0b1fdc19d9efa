"""What is read off a network in one forward pass: logits, maps by index, prefix tokens, the pooled embedding.

Maps come from timm's `forward_intermediates`, whose arguments and layouts differ from file to file; what is common is
settled here. Maps are taken before any norm, but the last one as the network itself ends: after its closing norm.
Does not hook into networks: one without `forward_intermediates` gives logits alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slim.errors import PassError
from slim.passes.distill.method import Outputs
from slim.surgery import in_eval

Shape = tuple[int, int, int]
"""Channels, height, width."""


def outputs(
    model: nn.Module, images: Tensor, *, indices: tuple[int, ...] = (), embedding: bool = False, final: bool = False
) -> Outputs:
    """One forward pass, with what was asked for.

    Args:
        model: in the mode it is in; gradients flow.
        images: (B, channels, height, width), in the dtype and on the device of the model.
        indices: of the maps, as `forward_intermediates` counts them from 0.
        embedding: with the pooled features; dropout of the head, if it has any, is drawn anew for them.
        final: with what `forward_features` returns.

    Raises:
        PassError: the network does not give what was asked for.
    """
    if not (indices or embedding or final):
        return Outputs(*_logits(model, model(images)))
    network: Any = model
    maps: dict[int, Tensor] = {}
    prefix: dict[int, Tensor] = {}
    if indices:
        last, maps, prefix = _intermediates(model, images, sorted(set(indices)))
    else:
        last = _has(model, "forward_features")(images)
    logits, token_logits = _logits(model, _has(model, "forward_head")(last))
    pooled = None
    if embedding:
        with _statistics_kept(model):  # the head was called for the logits already
            pooled = network.forward_head(last, pre_logits=True).float()
    return Outputs(logits, token_logits, pooled, last if final else None, maps, prefix)


def maps_of(model: nn.Module, size: Shape) -> list[Shape]:
    """Shape of the map at every index, found by one forward pass in eval mode; the model is left as it was.

    Raises:
        PassError: the network has no maps.
    """
    network: Any = model
    _has(model, "forward_intermediates")
    with in_eval(model):
        maps = network.forward_intermediates(probe(model, size), intermediates_only=True, **_layout(model))
    if not maps or not all(isinstance(one, Tensor) and one.ndim == 4 for one in maps):
        raise PassError(
            f"distill: {_kind(model)} gives maps that are not (images, channels, height, width); "
            "take another network, or --method kd"
        )
    return [shape_of(one) for one in maps]


def shape_of(maps: Tensor) -> Shape:
    """(C, H, W) of maps (B, C, H, W)."""
    return maps.shape[1], maps.shape[2], maps.shape[3]


def last_two(shapes: list[Shape]) -> tuple[int, int]:
    """Indices of an early and a late map, as ScaleKD takes them.

    A network of stages: the last map of each of its last two grids. One whose maps share a grid (ViT, Mixer): the
    blocks at 3/4 of the depth and at its end, the 9th and 12th of 12.

    Raises:
        PassError: there is but one map.
    """
    depth = len(shapes)
    if depth < 2:
        raise PassError(f"distill: the network has {depth} map, two are read; take a deeper one, or --method kd")
    ends = [i for i, shape in enumerate(shapes) if i + 1 == depth or shapes[i + 1][1:] != shape[1:]]
    return (ends[-2], ends[-1]) if len(ends) > 1 else (depth * 3 // 4 - 1, depth - 1)


def check(model: nn.Module, size: Shape) -> None:
    """The features that maps are taken along give the logits of the model itself, in eval mode.

    Raises:
        PassError: they do not, so what is learned from the maps would not be what the model computes.
    """
    way_out = "take another network, or --method kd"
    dropped = next((name for name, m in model.named_modules() if type(m).__name__.startswith("PatchDropout")), None)
    if dropped is not None:
        raise PassError(f"distill: {dropped!r} of {_kind(model)} drops patches, so it has no maps; patch_drop_rate=0")
    with in_eval(model):
        images = probe(model, size)
        expected = _logits(model, model(images))[0]
        final, _, _ = _intermediates(model, images, [0])
        if not isinstance(final, Tensor):
            raise PassError(f"distill: {_kind(model)} gives several features at its end, not one; {way_out}")
        error = difference(_logits(model, _has(model, "forward_head")(final))[0], expected)
    if not error <= TOLERANCE:
        raise PassError(
            f"distill: the features of {_kind(model)} give other logits than the network, off by {error:.2g} of the "
            f"largest ({TOLERANCE:g} allowed); {way_out}"
        )


TOLERANCE = 1e-4
"""Two ways through a network that should be one may differ by this share of the largest value: order of additions."""


def difference(values: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite where the shapes differ."""
    if values.shape != expected.shape:
        return float("inf")
    largest = float(expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    return float((values - expected).abs().max()) / largest


def probe(model: nn.Module, size: Shape) -> Tensor:
    """Two random images (2, *size), always the same, in the dtype and on the device of the model."""
    values = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    parameter = next(model.parameters())
    return values.to(parameter.device, parameter.dtype)


def _intermediates(
    model: nn.Module, images: Tensor, indices: list[int]
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Final features, maps and prefix tokens by index."""
    network: Any = model
    forward = _has(model, "forward_intermediates")
    arguments = _layout(model)
    count = getattr(model, "num_prefix_tokens", 0)
    paired = bool(count) and "return_prefix_tokens" in inspect.signature(forward).parameters
    if paired:
        arguments["return_prefix_tokens"] = True
    # -1 along: an index more in the answer says that the highest asked for is not the last.
    final, given = network.forward_intermediates(images, indices=[*indices, -1], **arguments)
    ends = len(given) == len(indices)
    maps = {index: one[0] if paired else one for index, one in zip(indices, given, strict=False)}
    prefix = {index: one[1] for index, one in zip(indices, given, strict=False)} if paired else {}
    if ends and isinstance(final, Tensor):
        end = _as_map(model, final, maps[indices[-1]])
        if end is not None:
            maps[indices[-1]] = end
            if paired:
                prefix[indices[-1]] = final[:, :count]
    return final, maps, prefix


def _as_map(model: nn.Module, final: Tensor, like: Tensor) -> Tensor | None:
    """Final features in the layout of the last map (B, C, H, W); None where they are more than that map normed."""
    if final.ndim == 3:
        tokens = final[:, getattr(model, "num_prefix_tokens", 0) :]
        if tokens.shape[1:] != (like.shape[2] * like.shape[3], like.shape[1]):
            return None
        end = tokens.transpose(1, 2).reshape(like.shape)
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        end = final.permute(0, 3, 1, 2)
    else:
        end = final
    return end if end.shape == like.shape else None


def _layout(model: nn.Module) -> dict[str, Any]:
    known = inspect.signature(_has(model, "forward_intermediates")).parameters
    wanted: dict[str, Any] = {"norm": False, "output_fmt": "NCHW"}
    return {name: value for name, value in wanted.items() if name in known}


def _has(model: nn.Module, method: str) -> Any:
    found = getattr(model, method, None)
    if found is None:
        raise PassError(
            f"distill: {_kind(model)} has no {method}, by which features are read; "
            "take a timm network that has it, or --method kd"
        )
    return found


def _logits(model: nn.Module, given: Any) -> tuple[Tensor, Tensor | None]:
    """Logits and those of the distillation token, float32; a DeiT in distilled training gives both."""
    both = given if isinstance(given, tuple) else (given,)
    if len(both) > 2 or not all(isinstance(one, Tensor) and one.ndim == 2 for one in both):
        raise PassError(f"distill: {_kind(model)} gives no logits (images, classes); take a classifier")
    return both[0].float(), both[1].float() if len(both) == 2 else None


def _kind(model: nn.Module) -> str:
    return type(model).__name__


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """BatchNorm in training reads its batch, but does not count it a second time."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
