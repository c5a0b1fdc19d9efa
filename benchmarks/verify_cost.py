"""What verification costs: at most 10 % of the pass or 1 s, and under 5 s for ResNet-50.

python benchmarks/verify_cost.py        # writes benchmarks/results/verify_cost.json
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from slim import environment, verify
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context, Pass
from slim.data import open_data
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank

RESULT = Path(__file__).parent / "results" / "verify_cost.json"
RUNS = 3
SMALL = Backbone(
    name="convnext_atto",
    kwargs={"patch_size": 2, "conv_mlp": False},
    num_classes=10,
    input=Preprocessing(size=(3, 32, 32), crop=1.0),
)

PLAIN: dict[str, Any] = {"objective": "plain", "repair": "none", "conv": "none"}
"""Without calibration, which would only make the share of verification look smaller."""


def timed(step: Pass, backbone: Backbone, context: Context) -> tuple[float, float]:
    """Seconds of the whole pass, and of its verification."""
    artifact = Artifact.of(backbone.build(), backbone)
    # In a chain these are known: the artifact is what the step before verified, or the dense network of the report.
    _ = artifact.costs, artifact.weights
    inside: list[float] = []
    check = verify.after_pass

    def measured(*args: Any, **kwargs: Any) -> Artifact:
        started = time.perf_counter()
        result = check(*args, **kwargs)
        inside.append(time.perf_counter() - started)
        return result

    verify.after_pass = measured
    try:
        started = time.perf_counter()
        step(artifact, context)
        return time.perf_counter() - started, inside[0]
    finally:
        verify.after_pass = check


def main() -> None:
    context = Context(data=open_data("digits"))
    cases: list[tuple[str, Pass, Backbone]] = [
        ("low-rank, convnext_atto 32 px", LowRank(ratio=0.5, **PLAIN), SMALL),
        ("finetune 2 epochs, convnext_atto 32 px", Finetune(epochs=2, flip=0.0), SMALL),
        ("low-rank, mobilenetv2_100", LowRank(ratio=0.5, **PLAIN), Backbone(name="mobilenetv2_100", num_classes=1000)),
        ("low-rank, resnet50", LowRank(ratio=0.5, **PLAIN), Backbone(name="resnet50", num_classes=1000)),
    ]
    rows = []
    for name, step, backbone in cases:
        runs = [timed(step, backbone, context) for _ in range(RUNS)]
        whole, check = (statistics.median(column) for column in zip(*runs, strict=True))
        limit = 5.0 if backbone.name == "resnet50" else max(1.0, 0.1 * whole)
        rows.append(
            {
                "case": name,
                "pass_seconds": round(whole, 3),
                "verify_seconds": round(check, 3),
                "verify_seconds_range": [round(min(c for _, c in runs), 3), round(max(c for _, c in runs), 3)],
                "share": round(check / whole, 3),
                "limit_seconds": round(limit, 3),
                "within": check <= limit,
            }
        )
        print(json.dumps(rows[-1]))
    RESULT.write_text(json.dumps({"runs": RUNS, "cases": rows, "environment": environment.describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
