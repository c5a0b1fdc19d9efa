"""What every distillation method shares: what the two networks gave, and how a method turns it into named losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """What a network gave for B images; what no method asked for is left out."""

    logits: Tensor | None = None
    """(B, classes) float32, in the order of the student's classes."""
    token_logits: Tensor | None = None
    """(B, classes) float32, of a student's distillation token (DeiT)."""
    embedding: Tensor | None = None
    """(B, width) float32, the pooled features that the classifier reads."""
    final: Tensor | None = None
    """What `forward_features` returns, in the network's own layout."""
    maps: Mapping[int, Tensor] = field(default_factory=dict)
    """(B, channels, height, width) by index of timm's `forward_intermediates`."""
    prefix: Mapping[int, Tensor] = field(default_factory=dict)
    """(B, prefix tokens, width) by the same index, where the network has such tokens."""


class Method(nn.Module):
    """One way to learn from a teacher. Its parameters, if any, are trained along and thrown away afterwards."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    """Fields of `Outputs` it reads: `logits`, `token_logits`, `embedding`, `final`."""

    def __init__(self, *, student_maps: tuple[int, ...] = (), teacher_maps: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.student_maps, self.teacher_maps = student_maps, teacher_maps

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Named losses, each a float32 scalar: summed over classes or channels, mean over the batch.

        Args:
            student: of the network that learns; gradients flow.
            teacher: of the frozen network, for the same view of the same images.
            target: (B,) int64, or (B, classes) float32; -1 or a row of zeros where an image has no label.
        """
        raise NotImplementedError
