"""Half precision written by torch: the network's own modules are cast, so each operator's type is what it says.

The file takes and gives 32-bit floats. Modules that must not lose bits get their inputs and give their outputs cast.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slim.artifact import Preprocessing
from slim.export.ladder import copied, merged
from slim.export.onnx import OnnxFile, export_onnx


def export_half(model: nn.Module, floats: Collection[str], path: Path, preprocessing: Preprocessing) -> OnnxFile:
    """Write `model` to `path` in half precision, but for the modules named in `floats`; see `export_onnx`."""
    network, _ = merged(model, preprocessing.size)  # what timm merges it computes in 32 bits
    modules = dict(network.named_modules())
    file = export_onnx(in_half(network, [name for name in floats if name in modules]), path, preprocessing)
    return replace(file, scopes={node: _own(scope) for node, scope in file.scopes.items()})


def in_half(model: nn.Module, floats: Collection[str]) -> nn.Module:
    """A copy of `model` that computes in half precision on images (B, C, H, W) float32, and gives float32 logits."""
    half = copied(model).half()
    # Outer modules first: what lies within one that is cast as a whole needs no casts of its own.
    done: list[str] = []
    for name in sorted(floats):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        parent, _, child = name.rpartition(".")
        setattr(half.get_submodule(parent), child, _InFloat(half.get_submodule(name).float()))
        done.append(name)
    return _InHalf(half).eval()


class _InHalf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.cast_by_slim = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.cast_by_slim(images.half())
        return logits.float()


class _InFloat(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.cast_by_slim = inner

    def forward(self, *given: Any, **named: Any) -> Any:
        outputs = self.cast_by_slim(*map(_float, given), **{name: _float(value) for name, value in named.items()})
        return outputs.half() if isinstance(outputs, Tensor) else outputs


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _own(scope: str) -> str:
    """The name the module has in the network itself."""
    return ".".join(part for part in scope.split(".") if part != "cast_by_slim")
