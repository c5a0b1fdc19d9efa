"""What it takes to find the groups of a ResNet-50 and to plan its pruning, and how close a latency budget is met.

    SLIM_TEST_DATA=/path python benchmarks/prune_cost.py     # writes benchmarks/results/prune_cost.json

Real images, fresh weights: time depends on what the weights are by a few steps of the choice alone. Limits: 60 s for
dependency graph and plan on two cores; of a budget of 0.6x-latency the interval's lower end at most 1.02 of the limit,
and no group left that could take a step more.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.low_rank_cost import CORES, IMAGES
from slim import environment
from slim.artifact import Artifact, Backbone
from slim.bench.measure import TargetMeter
from slim.contract import Context
from slim.data import open_data
from slim.export.target import Target
from slim.passes.prune import Prune
from slim.passes.prune.cut import trusted
from slim.passes.prune.groups import groups_of

RESULT = Path(__file__).parent / "results" / "prune_cost.json"
NAME, KWARGS = "resnet50", {"zero_init_last": False}  # fresh, the last norms of its blocks would be zero


def main() -> None:
    torch.set_num_threads(CORES)
    source = f"tar:{Path(os.environ['SLIM_TEST_DATA']) / 'imagenet-sample.tar'}"
    data = open_data(source, split="train=0.6,val=0.4", calib=IMAGES)
    backbone = Backbone(name=NAME, kwargs=KWARGS, num_classes=1000)
    dense = Artifact.of(backbone.build(), backbone)
    model = dense.model()
    started = time.perf_counter()
    groups, _ = groups_of(model, backbone.input.size)
    graph = time.perf_counter() - started
    trusted(model, groups, backbone.input.size)
    rows: list[dict[str, Any]] = [
        {"what": "graph", "seconds": round(graph, 1)},
        {"what": "trial", "seconds": round(time.perf_counter() - started - graph, 1)},
    ]
    with tempfile.TemporaryDirectory() as folder:
        meter = TargetMeter(Target.parse("ort:cpu"), data, Path(folder))
        context = Context(data=data, meter=meter, backbone=backbone)
        for settings in (
            {"criterion": "group-l2", "to": "0.5x-macs"},
            {"criterion": "gram", "to": "0.5x-macs"},
            {"criterion": "gram", "to": "0.6x-latency"},
        ):
            started = time.perf_counter()
            plan: Any = Prune(**settings).plan(model, context)
            rows.append(
                {"what": "plan", **settings, "seconds": round(time.perf_counter() - started, 1),
                 "groups": len(plan["groups"]), "budget": plan["budget"]}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(
        json.dumps(
            {"network": NAME, "images": IMAGES, "cores": CORES, "rows": rows, "environment": environment.describe()},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
