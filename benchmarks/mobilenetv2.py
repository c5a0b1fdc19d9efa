"""The main job on a real ImageNet MobileNetV2 and 500 real images: plain low-rank, no training.

    SLIM_TEST_DATA=/path python -m benchmarks.mobilenetv2     # writes benchmarks/results/mobilenetv2.json

Nothing is chosen on the images: plain SVD reads none. They come from the training split, so the figures compare a
compressed network with the dense one and say nothing about ImageNet accuracy.
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
from slim.measurement import Measurement
from slim.passes.low_rank import LowRank
from slim.pipeline import Guard

RESULT = Path(__file__).parent / "results" / "mobilenetv2.json"
ENERGIES = (0.95, 0.9, 0.8)


def figure(found: Measurement | None) -> dict[str, Any] | None:
    return found and found.model_dump(include={"value", "unit", "n", "low", "high"})


def main() -> None:
    data = Path(os.environ["SLIM_TEST_DATA"])
    rows: list[dict[str, Any]] = []
    for energy in ENERGIES:
        with tempfile.TemporaryDirectory() as folder:
            run = slim.run(
                model=mobilenetv2(data),
                data={"source": f"tar:{data / 'imagenet-sample.tar'}", "split": "val=1"},
                target="ort:cpu,threads=1",
                passes=[LowRank(energy=energy, objective="plain", repair="none", conv="none")],
                guard=Guard(),
                out=Path(folder) / "run",
            )
            report = run.report
        if not rows:
            rows.append({"network": "dense", **{name: figure(one) for name, one in report.dense.items()}})
        step = report.steps[0]
        rows.append(
            {
                "network": f"low-rank, energy {energy}",
                "outcome": step.outcome,
                "reason": step.reason,
                "layers_factored": len(step.plan["layers"]),
                **{name: figure(one) for name, one in step.figures.items()},
            }
        )
        print(json.dumps(rows[-1]))
    RESULT.write_text(json.dumps({"rows": rows, "environment": environment.describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
