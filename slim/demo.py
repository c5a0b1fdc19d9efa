"""The main job on the dataset that slim embeds: what `slim demo` runs."""

from __future__ import annotations

from typing import Any

from slim.recipe import Recipe, parse

RECIPE: dict[str, Any] = {
    # Digits are 32 pixels wide: a stem that keeps more of them, and Linear layers for low-rank to factor.
    "model": {
        "name": "convnext_atto",
        "args": {"patch_size": 2, "conv_mlp": False},
        "weights": "none",
        "input": {"size": [3, 32, 32], "crop": 1.0},
    },
    "data": {"source": "digits", "batch_size": 64},
    "target": "ort:cpu,threads=1",
    "passes": [
        {"name": "finetune", "epochs": 8, "lr": 2e-3, "flip": 0.0, "scale_low": 0.8},
        # Too much: rolled back. Then as much as pays.
        {"name": "low-rank", "ratio": 0.1},
        {"name": "low-rank", "ratio": 0.5},
        {"name": "finetune", "epochs": 2, "lr": 5e-4, "flip": 0.0, "scale_low": 0.8},
    ],
    "export": {"format": "onnx"},
}
"""A network trained on real handwritten digits, compressed twice: once too much, once so that it pays."""

BUDGETS = """\
format: slim-budgets/1
target: ort:cpu,threads=1
budgets:
  - {metric: params, max: 2500000}
  - {metric: top1_drop_points, max: 1.0}
  - {metric: latency_ratio, max: 0.9}
"""


def recipe() -> Recipe:
    """The demo's recipe."""
    return parse(RECIPE, place="demo")
