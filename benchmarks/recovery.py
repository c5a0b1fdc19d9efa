"""Recovery on a real ImageNet MobileNetV2 whose batch norms are folded: with their statistics kept, and re-estimated.

    SLIM_TEST_DATA=/path python -m benchmarks.recovery     # writes benchmarks/results/recovery.json

Low-rank, then four epochs without labels on one half of 500 images; what is reported is the other half. The images are
from the training split of ImageNet: figures compare networks and give no ImageNet accuracy.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import slim
from benchmarks.nets import mobilenetv2
from slim import environment
from slim.console import bars
from slim.passes.distill import Distill
from slim.passes.low_rank import LowRank
from slim.pipeline import Guard

RESULT = Path(__file__).parent / "results" / "recovery.json"
EPOCHS, ENERGY = 4, 0.95


def figures(found: Any) -> dict[str, Any]:
    return {
        name: found[name].model_dump(include={"value", "low", "high", "n"})
        for name in ("accuracy_top1", "params")
        if name in found
    }


def main() -> None:
    data = Path(os.environ["SLIM_TEST_DATA"])
    rows: list[dict[str, Any]] = []
    for freeze in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            run = slim.run(
                model=mobilenetv2(data),
                data={
                    "source": f"tar:{data / 'imagenet-sample.tar'}",
                    "split": "train=0.5,val=0.5",
                    "batch_size": 25,
                },
                target="ort:cpu,threads=1",
                passes=[
                    LowRank(energy=ENERGY, objective="plain", repair="none", conv="none"),
                    Distill(epochs=EPOCHS, freeze_norms=freeze),
                ],
                guard=Guard(on=False),
                out=Path(folder) / "run",
                progress=bars,
            )
            report = run.report
        if not rows:
            rows.append({"network": "dense", **figures(report.dense)})
            rows.append({"network": f"low-rank, energy {ENERGY}", **figures(report.steps[0].figures)})
        kept = "kept" if freeze else "re-estimated"
        rows.append({"network": f"... and recovery, norm statistics {kept}", **figures(report.final)})
    RESULT.write_text(
        json.dumps({"epochs": EPOCHS, "rows": rows, "environment": environment.describe()}, indent=1) + "\n"
    )
    for row in rows:
        print(f"{row['network']}: {row['accuracy_top1']['value']:.1f} %")


if __name__ == "__main__":
    main()
