"""Fine-tuning: every value is trained on labelled images, with cross-entropy against the (mixed, smoothed) labels.

Repairs what a structural pass broke, and trains a new head or a fresh network when it comes first.
Uses no teacher: see `distill` for that.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor, nn

from slim.contract import Context, Pass, Role
from slim.data import Augment, Batch
from slim.training import Training


class Finetune(Training, Augment, Pass):
    """Train every value on the training split."""

    name: ClassVar[str] = "finetune"
    role: ClassVar[Role] = "repair"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})

    @property
    def reads(self) -> frozenset[str]:
        """The labelled images."""
        return frozenset({"train"})

    @property
    def trains(self) -> bool:
        """Yes, the classifier as well."""
        return True

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
        """Train all values in place."""
        return context.train(model, label_loss, self, self)


def label_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy, mean over the batch, in fp32."""
    return {"label": F.cross_entropy(model(batch.images).float(), batch.target)}
