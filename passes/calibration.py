"""The calibration images of a run, as the compression passes read them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slim.contract import Context
from slim.errors import PassError

EVAL_BATCH = 32
"""Images of one call while statistics are taken; it changes none."""


def count(context: Context, name: str, blind: str) -> int:
    """How many calibration images there are.

    Args:
        context: of the pass.
        name: of the pass, for the error.
        blind: settings with which it looks at no image.

    Raises:
        PassError: there are none.
    """
    if context.data is None or not context.data.has("calib"):
        raise PassError(
            f"{name}: there are no calibration images; give data with a training split, or {blind}, which look at no"
            " image"
        )
    return len(context.data.split("calib"))


def labels(context: Context, name: str) -> Tensor:
    """(n,) int64: labels of the calibration images, in order.

    Raises:
        PassError: an image has none.
    """
    assert context.data is not None  # `count` saw to it
    assert context.backbone is not None  # Pass.__call__ set it
    # With the images, for one that cannot be read is left out.
    batches = context.data.eval_batches("calib", context.backbone.input, batch_size=EVAL_BATCH)
    found = torch.cat([labels for _, labels in batches])
    if (found < 0).any():
        raise PassError(f"{name}: criterion taylor-labels needs labelled calibration images; criterion taylor does not")
    return found


def images(context: Context, batch_size: int = EVAL_BATCH) -> Iterator[Tensor]:
    """Calibration images (B, C, H, W), in order."""
    assert context.data is not None  # `count` saw to it
    assert context.backbone is not None  # Pass.__call__ set it
    batches = context.data.eval_batches("calib", context.backbone.input, batch_size=batch_size)
    return (images for images, _ in batches)
