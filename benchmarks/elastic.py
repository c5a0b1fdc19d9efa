"""Once for all: a family from one training against each size trained alone, and the ramp against the plain sandwich.

    SLIM_TEST_DATA=/path python -m benchmarks.elastic                 # whatever has no result yet
    SLIM_TEST_DATA=/path python -m benchmarks.elastic resnet vit      # these networks alone

Each figure is a file benchmarks/results/elastic/NETWORK/ARM-SHARE-SEED.json. ResNet and ViT are those of
benchmarks/low_rank.py, trained on CIFAR-10 (JPEG); every arm trains on 10,000 images, of which a family holds 1,000 out
to choose its subnets by; the 10,000 test images are reported on and choose nothing. A family trains for as many epochs
as all its sizes trained alone together; what a step of it costs is in elastic_cost.py. MobileNetV2 is a real ImageNet
network that is not trained: 250 images calibrate and choose, 250 others, of other classes, are reported on. Rates
were chosen on held-out training images: the ResNet's came out as half of what it was trained with; the ViT's is that of
1e-4, 2e-4 and 4e-4 with which its largest was best (72.8, 73.2 and 72.0 %; its smallest had 58.2, 60.2 and 61.7).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.low_rank import apply, begin, figures, on_target
from slim import environment, store
from slim.artifact import Artifact
from slim.contract import Pass
from slim.data import Data, open_data
from slim.passes.distill import Distill
from slim.passes.elastic import BestSubnet, Elastic

RESULTS = Path(__file__).parent / "results" / "elastic"
WORK = Path("runs/benchmarks/elastic")
IMAGES = 10_000
SHARES = (0.8, 0.65, 0.5, 0.4, 0.3)
"""Of the multiply-accumulates."""
MIDDLE = 0.5
EPOCHS = {"resnet": 10, "vit": 5}
RATES = {"resnet": 1e-3, "vit": 2e-4}
EVALUATIONS = 24
"""Of subnets, for each size; those of single changes are shared by all sizes of a family."""


def families(name: str) -> dict[str, tuple[Elastic, tuple[int, ...]]]:
    """One training each, and its seeds."""
    given: dict[str, Any] = {"epochs": EPOCHS[name], "lr": RATES[name]}
    found = {"family": (Elastic(**given), (0,))}
    if name == "resnet":
        found["plain-sandwich"] = (Elastic(ramp=0.0, **given), (0,))
        found["ranks-and-pixels"] = (Elastic(ranks=(1.0, 0.5), min_width=32, pixels=(24,), **given), (0,))
    return found


def best(name: str, family: str, share: float, **more: Any) -> BestSubnet:
    """The search for one size, which knows what those before it evaluated."""
    folder = WORK.absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{folder / family}.db"
    return BestSubnet(to=f"{share}x-macs", evaluations=EVALUATIONS, storage=storage, **more)


def alone(name: str, share: float, epochs: int) -> tuple[Pass, ...]:
    """One size, of the network as it is, trained on its own."""
    return Elastic(epochs=0), best(name, "alone", share), Distill(epochs=epochs, lr=RATES[name], label_weight=1.0)


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("mobilenetv2", "resnet", "vit"):
        dense, data = begin(name)
        if name == "mobilenetv2":
            untrained(dense, data)
            continue
        data = open_data(f"tar:{Path(os.environ['SLIM_TEST_DATA']) / 'cifar10-jpeg.tar.xz'}", limit_train=IMAGES)
        for family, (elastic, seeds) in families(name).items():
            for seed in seeds:
                supernet, seconds = trained(name, family, elastic, dense, data, seed)
                for share in SHARES:
                    passes = [best(name, f"{family}-{seed}", share)]
                    one(name, f"{family}-{share}-{seed}", passes, supernet, dense, data, seed, seconds)
        for share in SHARES:
            # A fifth of the family's epochs, so that five sizes have as many in all; at one size as many as it has.
            lengths = {"alone": EPOCHS[name] // len(SHARES)} | (
                {"alone-longer": EPOCHS[name]} if share == MIDDLE else {}
            )
            for arm, epochs in lengths.items():
                one(name, f"{arm}-{share}-0", alone(name, share, epochs), dense, dense, data, 0, 0.0)


def untrained(dense: Artifact, data: Data) -> None:
    """MobileNetV2: what importance, norms and least squares give without training."""
    elastic = Elastic(epochs=0, held_out=125)
    for share in (0.9, 0.8, 0.7):
        for repair in ("norms", "both"):
            passes = [elastic, best("mobilenetv2", repair, share, repair=repair)]
            one("mobilenetv2", f"untrained-{repair}-{share}-0", passes, dense, dense, data, 0, 0.0)


def trained(name: str, family: str, elastic: Elastic, dense: Artifact, data: Data, seed: int) -> tuple[Artifact, float]:
    """The elastic network, kept from one run of this script to the next, and the seconds that it took."""
    folder = WORK / name / f"{family}-{seed}"
    if not folder.is_dir():
        started = time.time()
        with on_target(dense, data, batch_size=128, seed=seed) as (_, context):
            made = elastic(dense, context)
        store.save(made, folder)
        (folder.parent / f"{family}-{seed}.seconds").write_text(str(round(time.time() - started, 1)))
    seconds = float((folder.parent / f"{family}-{seed}.seconds").read_text())
    return store.load(folder, trust=True), seconds


def one(
    name: str,
    arm: str,
    passes: Sequence[Pass],
    given: Artifact,
    dense: Artifact,
    data: Data,
    seed: int,
    seconds: float,
) -> None:
    """One network, reported on."""
    file = RESULTS / name / f"{arm}.json"
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with on_target(dense, data, batch_size=128, seed=seed) as (meter, context):
        after = apply(passes, given, context)
        spent = time.time() - started
        found = {
            **figures(after, dense, meter),
            "arm": arm,
            "seed": seed,
            "seconds_of_family": seconds,
            "seconds": round(spent, 1),
            "history": [
                {"name": step.name, "config": step.config, "metrics": step.metrics}
                | {key: step.plan.get(key) for key in ("budget", "search", "skipped")}
                for step in after.history[len(dense.history) :]
            ],
            "environment": environment.describe(),
        }
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name} {arm}: {found['top1']['value']:.2f} %, {found['macs']:.3f} of the MACs", flush=True)


if __name__ == "__main__":
    main()
