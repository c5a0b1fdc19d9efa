"""What low-rank costs in accuracy, rung by rung: plain, weighed, under a budget, repaired, then trained.

    SLIM_TEST_DATA=/path python -m benchmarks.low_rank                        # whatever has no result yet
    SLIM_TEST_DATA=/path python -m benchmarks.low_rank mobilenetv2 resnet vit # these networks alone

Each figure is a file benchmarks/results/low_rank/NETWORK/ARM-SHARE.json. MobileNetV2 is a real ImageNet network: 250
images calibrate, 250 others, of other classes, are reported on. ResNet and ViT are trained here on CIFAR-10 (JPEG), 256
training images calibrate, and the 10,000 test images are reported on. Nothing is chosen on images that are reported on.
The trained arms have the same epochs, rate and images; so has the dense network that they stand beside.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.nets import mobilenetv2
from slim import costs, environment, pretrained, store
from slim.artifact import Artifact
from slim.bench.measure import TargetMeter
from slim.console import bars
from slim.contract import Context, Fed, Loading, Pass
from slim.data import Data, open_data
from slim.export.target import Target
from slim.passes.distill import Distill
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.recipe import ModelSpec

RESULTS = Path(__file__).parent / "results" / "low_rank"
WORK = Path("runs/benchmarks/low_rank")
TARGET = "ort:cpu,threads=1"
CIFAR_INPUT = {"size": [3, 32, 32], "mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262], "crop": 1.0}
PLAIN: dict[str, Any] = {"objective": "plain", "select": "uniform", "repair": "none"}


@dataclass(frozen=True)
class Network:
    """A network, its images, and how it is compressed and trained."""

    shares: tuple[float, ...]
    """Of the parameters that stay."""
    settings: dict[str, Any]
    """Of low-rank."""
    batch_size: int
    finetune: dict[str, Any]
    """Of training with labels; none where there are too few images for it."""
    recover: dict[str, Any]
    """Of learning from the dense network."""
    shares_of_latency: tuple[float, ...] = ()


NETWORKS = {
    "mobilenetv2": Network((0.9, 0.8, 0.7), {"min_width": 32}, 25, {}, {"epochs": 4}, shares_of_latency=(0.9, 0.8)),
    "resnet": Network(
        (0.667, 0.5, 0.333),
        {"min_width": 16},
        128,
        {"epochs": 2, "lr": 5e-4},
        {"epochs": 2, "lr": 5e-4, "label_weight": 1.0},
        shares_of_latency=(0.8, 0.65, 0.5),
    ),
    "vit": Network(
        (0.667, 0.5, 0.333),
        {"min_width": 64},
        128,
        {"epochs": 1, "lr": 5e-4},
        {"epochs": 1, "lr": 5e-4, "label_weight": 1.0},
        shares_of_latency=(0.8, 0.65),
    ),
}


def arms(network: Network, budget: str) -> dict[str, tuple[Pass, ...]]:
    """What is done to the network, by the name of its file."""
    whole = LowRank(to=budget, **network.settings)
    if budget.endswith("latency"):
        return {"repaired": (whole,)}
    found: dict[str, tuple[Pass, ...]] = {
        "plain-uniform": (LowRank(to=budget, **network.settings, **PLAIN),),
        "whitened-uniform": (LowRank(to=budget, select="uniform", repair="none", **network.settings),),
        "whitened-greedy": (LowRank(to=budget, repair="none", **network.settings),),
        "repaired": (whole,),
        "recovered": (whole, Distill(**network.recover)),
    }
    if network.finetune:
        found["plain-uniform-finetuned"] = (*found["plain-uniform"], Finetune(**network.finetune))
    return found


def begin(name: str) -> tuple[Artifact, Data]:
    """The dense network and its images."""
    data = Path(os.environ["SLIM_TEST_DATA"])
    if name == "mobilenetv2":
        spec = ModelSpec.model_validate(mobilenetv2(data))
        images = open_data(f"tar:{data / 'imagenet-sample.tar'}", split="train=0.5,val=0.5", calib=250)
        started = pretrained.start(spec, images, seed=0, trust=False)
        assert started.data is not None
        return started.artifact, started.data
    source = f"tar:{data / 'cifar10-jpeg.tar.xz'}"
    factory, rate = {"resnet": ("resnet18_thin", 2e-3), "vit": ("vit_small", 1e-3)}[name]
    out = WORK / f"dense-{factory}"
    if not (out / "final").is_dir():
        slim.run(
            model={"name": f"benchmarks.nets:{factory}", "weights": "none", "input": CIFAR_INPUT},
            data={"source": source, "batch_size": 128},
            target=TARGET,
            passes=[Finetune(epochs=12, lr=rate)],
            export=None,
            threads=1,
            out=out,
            resume=True,
            trust=True,
            progress=bars,
        )
    return store.load(out / "final", trust=True), open_data(source)


def apply(passes: Sequence[Pass], given: Artifact, context: Context) -> Artifact:
    """A chain without its guard: what does not pay is published beside what does."""
    after = given
    for step in passes:
        after = step(after, context)
    return after


@contextmanager
def on_target(dense: Artifact, data: Data, *, batch_size: int, seed: int = 0) -> Iterator[tuple[TargetMeter, Context]]:
    """A meter that has measured nothing yet, and what the passes may use."""
    with tempfile.TemporaryDirectory() as exported:
        meter = TargetMeter(Target.parse(TARGET), data, Path(exported), progress=bars)
        context = Context(
            data=data,
            meter=meter,
            reference=dense,
            dense=dense,
            seed=seed,
            progress=bars,
            loading=Loading(batch_size=batch_size),
            backbone=dense.backbone,
        )
        yield meter, context


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or NETWORKS:
        network = NETWORKS[name]
        dense, data = begin(name)
        folder = RESULTS / name
        folder.mkdir(parents=True, exist_ok=True)
        with on_target(dense, data, batch_size=network.batch_size) as (meter, context):
            todo: dict[str, tuple[Pass, ...]] = {"dense": ()}
            # As many epochs more for the dense network, in the way that it can be trained.
            todo["dense-trained"] = (Finetune(**network.finetune) if network.finetune else Distill(**network.recover),)
            for metric, shares in (("params", network.shares), ("latency", network.shares_of_latency)):
                for share in shares:
                    for arm, passes in arms(network, f"{share}x-{metric}").items():
                        todo[f"{arm}-{share}-{metric}"] = passes
            for arm, passes in todo.items():
                file = folder / f"{arm}.json"
                if not file.exists():
                    started = time.time()
                    after = apply(passes, dense, context)
                    spent = time.time() - started
                    found = figures(after, dense, meter) | {
                        "history": steps(after, dense, "layers"),
                        "environment": environment.describe(),
                        "arm": arm,
                        "seconds": round(spent, 1),
                    }
                    file.write_text(json.dumps(found, indent=1) + "\n")
                    print(f"{name} {arm}: {found['top1']['value']:.2f} %, {found['params']:.3f} of the parameters")


def figures(after: Artifact | Fed, dense: Artifact, meter: TargetMeter) -> dict[str, Any]:
    """What is reported of one network, against the dense one on the same images and in the same run."""
    fields = {"value", "low", "high", "n"}
    same = isinstance(after, Artifact) and after.digest == dense.digest
    counted = after.costs if isinstance(after, Artifact) else costs.count(after.model, after.input.size)
    return {
        "params": counted["params"] / dense.costs["params"],
        "macs": counted["macs"] / dense.costs["macs"],
        "top1": meter.accuracy(after).model_dump(include=fields),
        "drop": None if same else meter.drop(after, dense).model_dump(include=fields),
        "latency_ratio": None if same else meter.compare(after, dense).model_dump(include=fields),
    }


def steps(after: Artifact, dense: Artifact, decided: str) -> list[dict[str, Any]]:
    """What was done to the dense network; of each plan its budget and what it `decided`: "layers", "groups"."""
    return [
        {
            "name": step.name,
            "config": step.config,
            "metrics": step.metrics,
            "budget": step.plan.get("budget"),
            decided: step.plan.get(decided),
        }
        for step in after.history[len(dense.history) :]
    ]


if __name__ == "__main__":
    main()
