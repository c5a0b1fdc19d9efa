"""The main job on the dataset that slim embeds: what `slim demo` runs."""

from __future__ import annotations

from typing import Any

from slim.recipe import Recipe, parse

DIGITS = {"flip": 0.0, "scale_low": 0.8}
"""Left and right mean something in a digit, and so does its size."""

RECIPE: dict[str, Any] = {
    "model": {
        "name": "convnext_atto",
        # A stem for 32 pixels, Linear layers that low-rank can factor, and blocks that count from the start: with
        # timm's layer scale of 1e-6 a net trained this briefly hardly uses them, and compressing them proves nothing.
        "args": {"patch_size": 2, "conv_mlp": False, "ls_init_value": None},
        "weights": "none",
        "input": {"size": [3, 32, 32], "crop": 1.0},
    },
    "data": {"source": "digits"},
    "target": "ort:cpu,threads=1",
    "passes": [
        {"name": "finetune", **DIGITS, "epochs": 8, "lr": 1e-3},
        {"name": "low-rank", "to": "0.5x-latency"},
        {"name": "distill", **DIGITS, "epochs": 2, "lr": 5e-4},
        # The narrow layers that are left: fewer parameters and MACs again, but hardly faster. The guard finds out.
        {"name": "low-rank", "ratio": 0.75, "min_width": 40},
    ],
    "export": {"format": "onnx"},
}
"""A network trained on real handwritten digits, compressed once so that it pays and learns from what it was,
and once more so that it does not pay."""

BUDGETS = """\
format: slim-budgets/1
target: ort:cpu,threads=1
budgets:
  - {metric: top1_drop_points, max: 1.0}
  - {metric: latency_ratio, max: 0.8}
"""


def recipe() -> Recipe:
    """The demo's recipe."""
    return parse(RECIPE, place="demo")
