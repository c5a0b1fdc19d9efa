"""What distillation gives a small network on CIFAR-10 (JPEG): the same number of image views in every arm.

    SLIM_TEST_DATA=/path python -m benchmarks.distillation            # every arm that has no result yet
    SLIM_TEST_DATA=/path python -m benchmarks.distillation kd-1 ...   # these alone

Each arm writes benchmarks/results/distillation/ARM-SEED.json and is taken up where it was stopped. The student is a
thin ResNet-18, the teacher a small Swin trained here on all 50,000 training images. Students see 5,000 of them with
labels, 20 times; the arm with an unlabeled pool sees those and 5,000 others, 10 times. Nothing was chosen on the test
images: every setting was fixed before the first arm ran. A seed moves the subset, the order, the augmentation and the
first values.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import slim
from slim import environment
from slim.bench.accuracy import accuracy, agreement
from slim.console import bars
from slim.contract import Pass
from slim.data import Data, open_data
from slim.export.target import Target
from slim.passes.distill import Distill
from slim.passes.finetune import Finetune
from slim.pipeline import Guard

RESULTS = Path(__file__).parent / "results" / "distillation"
WORK = Path("runs/benchmarks/distillation")
TEACHER = WORK / "teacher"
LABELLED, POOL, EPOCHS = 5_000, 5_000, 20
TRAINING: dict[str, Any] = {"lr": 2e-3, "epochs": EPOCHS}
INPUT = {"size": [3, 32, 32], "mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262], "crop": 1.0}
TARGET = "ort:cpu,threads=1"

ARMS: dict[str, Pass] = {
    "alone": Finetune(**TRAINING),
    "kd": Distill(teacher=(str(TEACHER),), method=("kd",), label_weight=1.0, **TRAINING),
    "jeffreys": Distill(teacher=(str(TEACHER),), method=("jeffreys",), **TRAINING),
    "jeffreys-pool": Distill(
        teacher=(str(TEACHER),), method=("jeffreys",), images="all", **{**TRAINING, "epochs": EPOCHS // 2}
    ),
    "dist": Distill(teacher=(str(TEACHER),), method=("dist",), label_weight=1.0, **TRAINING),
    "scalekd": Distill(
        teacher=(str(TEACHER),), method=("scalekd", "kd=0.5"), label_weight=0.5, **{**TRAINING, "clip": 5.0}
    ),
}
SEEDS = {"alone": (0, 1, 2), "kd": (0, 1, 2), "scalekd": (0, 1, 2)}
"""Of the arms whose gain is claimed; every other has seed 0."""


def data_spec(**fields: Any) -> dict[str, Any]:
    return {"source": f"tar:{Path(os.environ['SLIM_TEST_DATA']) / 'cifar10-jpeg.tar.xz'}", "batch_size": 128, **fields}


def pool(seed: int) -> Path:
    """A folder of links to the images that come after the labelled ones in the order of the seed."""
    folder = WORK / f"pool-{seed}"
    train: Data = open_data(data_spec()["source"], seed=seed)
    split = train.split("train")
    folder.mkdir(parents=True, exist_ok=True)
    for position in split.hash_order(seed)[LABELLED : LABELLED + POOL]:
        name = split.names[position]
        link = folder / name.replace("/", "-")
        if not link.is_symlink():
            link.symlink_to(split.images.place(name))
    return folder


def ensure_teacher() -> None:
    if (TEACHER / "final").is_dir():
        return
    slim.run(
        model={"name": "benchmarks.nets:swin_small", "weights": "none", "input": INPUT},
        data=data_spec(),
        target=TARGET,
        passes=[Finetune(epochs=10, lr=2e-3)],
        export=None,
        out=TEACHER,
        resume=True,
        trust=True,
        progress=bars,
    )


def run(arm: str, seed: int) -> dict[str, Any]:
    step = ARMS[arm]
    fields: dict[str, Any] = {"limit": {"train": LABELLED}}
    if "unlabeled" in step.reads:
        fields["unlabeled"] = str(pool(seed))
    started = time.time()
    done = slim.run(
        model={"name": "benchmarks.nets:resnet18_thin", "weights": "none", "input": INPUT},
        data=data_spec(**fields),
        target=TARGET,
        passes=[step],
        guard=Guard(on=False),
        export=None,
        seed=seed,
        threads=1,
        out=WORK / f"{arm}-{seed}",
        resume=True,
        trust=True,
        progress=bars,
    )
    step_done = done.artifact.history[-1]
    test = open_data(data_spec()["source"])
    files = {"student": done.root / "dense.onnx", "teacher": TEACHER / "dense.onnx"}
    spec = done.artifact.backbone.input
    found = {
        name: accuracy(file, Target.parse(TARGET), test.eval_batches("val", spec, batch_size=250))
        for name, file in files.items()
    }
    return {
        "arm": arm,
        "seed": seed,
        "pass": {"name": step.name, **step.model_dump(mode="json", exclude_defaults=True)},
        "top1": {"value": found["student"].value, "low": found["student"].low, "high": found["student"].high},
        "agreement": agreement(found["student"], found["teacher"]).value,
        "teacher_top1": found["teacher"].value,
        "test_images": found["student"].n,
        "views": step_done.metrics["images"],
        "steps": step_done.metrics["steps"],
        "loss": step_done.metrics["loss"],
        "losses": step_done.metrics.get("losses", {}),
        "latency_p50_ms": done.report.final["latency_p50_ms"].value,
        "seconds": round(time.time() - started, 1),
        "environment": environment.describe(),
    }


def main() -> None:
    names = [f"{arm}-{seed}" for arm in ARMS for seed in SEEDS.get(arm, (0,))]
    ensure_teacher()
    for name in sys.argv[1:] or names:
        file = RESULTS / f"{name}.json"
        if file.exists():
            continue
        arm, _, seed = name.rpartition("-")
        result = run(arm, int(seed))
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: top-1 {result['top1']['value']:.2f} %, agreement {result['agreement']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
