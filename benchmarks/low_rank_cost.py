"""What it takes to calibrate and plan low-rank on a network of ResNet-50's size, and how good its prediction is.

    SLIM_TEST_DATA=/path python benchmarks/low_rank_cost.py     # writes benchmarks/results/low_rank_cost.json

Real images, fresh weights: neither time nor memory depends on what the weights are. Peak memory is of the process that
plans; the workers that time layers are others. Limits: 5 minutes and 4 GB on two cores, and 10 % between the predicted
and the measured latency, at every attempt.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slim import environment
from slim.artifact import Artifact, Backbone
from slim.bench.measure import TargetMeter
from slim.contract import Advance, Context
from slim.data import open_data
from slim.export.target import Target
from slim.passes.low_rank import LowRank

RESULT = Path(__file__).parent / "results" / "low_rank_cost.json"
CASES: dict[str, tuple[dict[str, Any], str]] = {
    # Fresh, the last norm of each of its blocks would be zero, and its blocks would count for nothing.
    "resnet50": ({"zero_init_last": False}, "0.7x-latency"),
}
IMAGES = 256
CORES = 2


def main() -> None:
    torch.set_num_threads(CORES)
    source = f"tar:{Path(os.environ['SLIM_TEST_DATA']) / 'imagenet-sample.tar'}"
    data = open_data(source, split="train=0.6,val=0.4", calib=IMAGES)
    rows = []
    for name, (kwargs, to) in CASES.items():
        backbone = Backbone(name=name, kwargs=kwargs, num_classes=1000)
        dense = Artifact.of(backbone.build(), backbone)
        seconds: dict[str, float] = {}

        @contextmanager
        def timed(title: str, total: int, seconds: dict[str, float] = seconds) -> Iterator[Advance]:
            started = time.perf_counter()
            yield lambda steps, note="": None
            seconds[title] = round(seconds.get(title, 0.0) + time.perf_counter() - started, 1)

        with tempfile.TemporaryDirectory() as folder:
            meter = TargetMeter(Target.parse("ort:cpu"), data, Path(folder))
            context = Context(data=data, meter=meter, backbone=backbone, progress=timed)
            model, started = dense.model(), time.perf_counter()
            plan: Any = LowRank(to=to).plan(model, context)
        rows.append(
            {
                "network": name,
                "params": dense.costs["params"],
                "to": to,
                "layers": len(plan["layers"]),
                "seconds": round(time.perf_counter() - started, 1),
                "seconds_by_part": seconds,
                # In kB on Linux.
                "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
                "budget": plan["budget"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(
        json.dumps({"images": IMAGES, "cores": CORES, "rows": rows, "environment": environment.describe()}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
