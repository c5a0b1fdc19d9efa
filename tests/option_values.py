"""A value other than the default for every field of every pass."""

from __future__ import annotations

from typing import Any

TRAINING: dict[str, Any] = {
    "flip": 0.0,
    "scale_low": 0.8,
    "color_jitter": 0.4,
    "auto": "rand-m9-mstd0.5",
    "mixup": 0.2,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "erase": 0.25,
    "epochs": 3,
    "lr": 2e-05,
    "optimizer": "sgd",
    "weight_decay": 0.0,
    "warmup": 0.2,
    "clip": 0.0,
    "ema": 0.999,
    "trainable": "head",
    "freeze_norms": True,
    "precision": "fp32",
}
CHOOSING: dict[str, Any] = {
    "criterion": "taylor",
    "ranking": "local",
    "scope": "all",
    "heads": "dims",
    "align": 16,
    "floor": 16,
    "skip": ("stages.0.*",),
}
VALUES: dict[str, dict[str, Any]] = {
    "distill": {
        **TRAINING,
        "teacher": ("runs/teacher", "resnet50"),
        "preset": "patient",
        "method": ("jeffreys", "dist=0.5"),
        "images": "all",
        "label_weight": 0.5,
        "temperature": 4.0,
        "standardize": True,
        "dkd_beta": 8.0,
        "scalekd_stem": "dw3",
        "scalekd_alt": False,
        "scalekd_perception": False,
        "scalekd_tail": 2,
        "scalekd_paper_scale": True,
        "cache": "runs/targets",
        "cache_mass": 0.99,
        "cache_check": 0,
    },
    "finetune": TRAINING,
    "low-rank": {
        "to": "0.7x-latency",
        "select": "uniform",
        "energy": 0.8,
        "ratio": 0.5,
        "objective": "activation",
        "conv": "spatial",
        "repair": "norms",
        "align": 16,
        "guard": 0.7,
        "min_width": 32,
        "skip": ("stages.0.*", "head"),
        "memory_gb": 0.5,
        "gate_epochs": 2,
        "gate_lr": 1e-3,
    },
    "mask": {
        **TRAINING,
        "pattern": "unstructured",
        "share": 0.75,
        "criterion": "magnitude",
        "skip": ("stages.0.*",),
        "memory_gb": 0.5,
    },
    "merge": {"fold_norms": False, "fold_scales": False, "pairs": False},
    "prune": {**CHOOSING, "to": "0.6x-latency", "ratio": 0.5, "repair": "norms", "memory_gb": 0.5},
    "sparsify": {
        **{name: value for name, value in TRAINING.items() if name != "ema"},
        **CHOOSING,
        "to": "0.5x-macs",
        "penalty": "lasso",
        "strength": 2.0,
        "attention": 0.01,
        "ema": 0.0,
    },
}
"""A value other than the default for every field of every pass."""
ONE_VALUE = {("sparsify", "ema")}
"""Fields that a pass has from another and takes no other value for."""
ALONG = {
    ("distill", "cache"): {"method": ("kd",)},
    ("distill", "trainable"): {"method": ("kd",)},
    ("low-rank", "select"): {"to": "0.5x-params"},
    ("mask", "share"): {"pattern": "unstructured"},
    **{("prune", name): {"ratio": 0.5} for name in (*CHOOSING, "repair", "memory_gb")},
    **{("sparsify", name): {"to": "0.5x-macs"} for name in VALUES["sparsify"] if name != "to"},
}
"""What a value needs beside it to make sense."""
