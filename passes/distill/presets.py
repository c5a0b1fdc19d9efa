"""Named recipes of distillation. A preset fills in what was not given, and nothing else.

Rates are for batches of 256 images. Sources: `patient` Beyer et al. 2022 (arXiv:2106.05237); `ssld*` Cui et al. 2021
(arXiv:2103.05959); `semi` Chen et al. 2020 (arXiv:2006.10029); `scalekd` Fan et al. 2024 (arXiv:2411.06786).
"""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["fast", "patient", "recover", "scalekd", "semi", "ssld", "ssld-refine", "ssld-head"]

PRESETS: dict[str, dict[str, Any]] = {
    # Plain soft targets, short enough to be read from a cache.
    "fast": {"method": ("kd",), "epochs": 100},
    # Function matching: no label, the same mixed view for both, and patience.
    "patient": {"method": ("kd",), "epochs": 300, "mixup": 1.0, "weight_decay": 3e-4, "scale_low": 0.08},
    # After a structural pass: the network learns to be again what it was, at a tenth of the usual rate. Its norms have
    # the statistics it had then; where they were folded, those of a batch destroy it (see docs/results.md).
    "recover": {"method": ("recover",), "epochs": 10, "lr": 1e-4, "freeze_norms": True},
    "scalekd": {
        "method": ("scalekd", "kd=0.5"),
        "label_weight": 0.5,
        "epochs": 300,
        "clip": 5.0,
        "auto": "rand-m9-mstd0.5",
        "erase": 0.25,
        "smoothing": 0.1,
        "scale_low": 0.08,
    },
    # SimCLRv2's third step: a fine-tuned large network labels images that nobody labelled; light augmentation.
    "semi": {"method": ("kd",), "images": "unlabeled", "epochs": 100, "scale_low": 0.08},
    # Stage 1 on everything, stage 2 on the labelled images' pixels at a hundredth of the rate, then the head alone.
    "ssld": {
        "method": ("jeffreys",),
        "images": "all",
        "epochs": 360,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 4e-5,
        "warmup": 0.014,
        "clip": 0.0,
        "scale_low": 0.08,
    },
    "ssld-refine": {
        "method": ("jeffreys",),
        "epochs": 30,
        "optimizer": "sgd",
        "lr": 0.001,
        "weight_decay": 4e-5,
        "warmup": 0.0,
        "clip": 0.0,
        "scale_low": 0.08,
    },
    "ssld-head": {
        "method": ("jeffreys",),
        "trainable": "head",
        "epochs": 10,
        "optimizer": "sgd",
        "lr": 0.001,
        "weight_decay": 4e-5,
        "warmup": 0.0,
        "clip": 0.0,
        "scale_low": 1.0,
    },
}
