"""What pruning costs in accuracy: criteria with and without repair, and sparsify > prune > recover against others.

    SLIM_TEST_DATA=/path python -m benchmarks.prune                          # whatever has no result yet
    SLIM_TEST_DATA=/path python -m benchmarks.prune mobilenetv2 resnet vit   # these networks alone

Each figure is a file benchmarks/results/prune/NETWORK/ARM-SHARE-SEED.json. MobileNetV2 is a real ImageNet network that
is not trained: 250 images calibrate, 250 others, of other classes, are reported on. ResNet and ViT are those of
benchmarks/low_rank.py, trained on CIFAR-10 (JPEG); every arm trains on the same 10,000 images for as many epochs, the
dense network as well, and the 10,000 test images are reported on. Nothing is chosen on images that are reported on:
the ResNet's rate (5e-4 or 2e-3) and scope were chosen on 4,000 training images that these arms do not train on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.group_norm_pruner import share_of_macs, sparsify_and_prune
from benchmarks.low_rank import apply, begin, figures, on_target, steps
from slim import environment
from slim.artifact import Artifact
from slim.contract import Context, Fed, Pass
from slim.data import Data, open_data
from slim.passes.distill import Distill
from slim.passes.finetune import Finetune
from slim.passes.prune import Prune
from slim.passes.sparsify import Sparsify

RESULTS = Path(__file__).parent / "results" / "prune"
IMAGES = 10_000
RATES = {"resnet": 2e-3, "vit": 5e-4}
PLAIN: dict[str, Any] = {"criterion": "group-l2", "ranking": "local", "repair": "none"}
GROUP_NORM_PRUNER = "group-norm-pruner"


@dataclass(frozen=True)
class Arm:
    """What is done to the dense network, and with which seeds."""

    passes: tuple[Pass, ...]
    seeds: tuple[int, ...] = (0,)
    share_of_macs: float | None = None
    """Of torch-pruning's own pruner, which takes the place of the passes before."""


def mobilenetv2() -> dict[str, Arm]:
    """Without training: every criterion, with and without repair."""
    found = {"dense": Arm(())}
    for criterion in ("gram", "taylor", "group-l2", "bn", "random"):
        for repair in ("none", "both"):
            found[f"{criterion}-{repair}-0.8-macs"] = Arm((Prune(to="0.8x-macs", criterion=criterion, repair=repair),))
    for ranking in ("local", "isomorphic"):
        found[f"gram-{ranking}-0.8-macs"] = Arm((Prune(to="0.8x-macs", ranking=ranking),))
    for share in (0.9, 0.7):
        found[f"gram-both-{share}-macs"] = Arm((Prune(to=f"{share}x-macs"),))
    found["gram-both-0.8-latency"] = Arm((Prune(to="0.8x-latency"),))
    return found


def resnet() -> dict[str, Arm]:
    """Sparsify, prune, recover, against pruning and fine-tuning for as many epochs, two of them before the cut."""
    rate, sparse, rest = {"lr": RATES["resnet"]}, 2, 4
    longer = Finetune(epochs=sparse + rest, **rate)
    found = {"dense": Arm(()), "dense-trained": Arm((longer,))}
    for to, scope, seeds in (
        ("0.333x-macs", "all", (0, 1, 2)),
        ("0.5x-macs", "internal", (0, 1, 2)),
        ("0.5x-latency", "internal", (0, 1, 2)),
    ):
        name, choice = to.replace("x-", "-"), {"to": to, "scope": scope}
        cut = (Sparsify(**choice, epochs=sparse, **rate), Prune(to="sparsified"))
        found[f"sparsified-recovered-{name}"] = Arm((*cut, Distill(epochs=rest, label_weight=1.0, **rate)), seeds)
        found[f"pruned-finetuned-{name}"] = Arm((Prune(to=to, **PLAIN), longer), seeds)
        # Nothing in it knows a latency: it is given the share of operations that ours came to.
        share = float(to.partition("x")[0]) if to.endswith("macs") else 0.0
        found[f"{GROUP_NORM_PRUNER}-{name}"] = Arm((Finetune(epochs=rest, **rate),), seeds, share)
        recover = Distill(epochs=sparse + rest, label_weight=1.0, **rate)
        found[f"pruned-recovered-{name}"] = Arm((Prune(**choice), recover), seeds)
    return found


def vit() -> dict[str, Arm]:
    """Whether pruning after sparsity beats pruning without, with and without training behind the cut."""
    rate = {"lr": RATES["vit"]}
    found = {"dense": Arm(()), "dense-trained": Arm((Finetune(epochs=4, **rate),))}
    to, name = "0.6x-macs", "0.6-macs"
    finetune, longer = Finetune(epochs=2, **rate), Finetune(epochs=4, **rate)
    sparsify = Sparsify(to=to, epochs=2, **rate)
    attention = Sparsify(to=to, epochs=2, attention=0.01, **rate)
    cut = Prune(to="sparsified")
    found[f"pruned-{name}"] = Arm((Prune(to=to),))
    found[f"pruned-finetuned-{name}"] = Arm((Prune(to=to), longer), (0, 1, 2))
    found[f"trained-pruned-{name}"] = Arm((finetune, Prune(to=to)))
    found[f"sparsified-{name}"] = Arm((sparsify, cut))
    found[f"sparsified-finetuned-{name}"] = Arm((sparsify, cut, finetune), (0, 1, 2))
    found[f"attention-finetuned-{name}"] = Arm((attention, cut, finetune))
    return found


NETWORKS = {
    "mobilenetv2": mobilenetv2,
    "resnet": resnet,
    "vit": vit,
}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or NETWORKS:
        dense, data = begin(name)
        if name != "mobilenetv2":
            source = f"tar:{Path(os.environ['SLIM_TEST_DATA']) / 'cifar10-jpeg.tar.xz'}"
            data = open_data(source, limit_train=IMAGES)
        folder = RESULTS / name
        folder.mkdir(parents=True, exist_ok=True)
        for arm, what in NETWORKS[name]().items():
            for seed in what.seeds:
                file = folder / f"{arm}-{seed}.json"
                if not file.exists():
                    found = run(arm, what, seed, dense, data, folder)
                    file.write_text(json.dumps(found, indent=1) + "\n")
                    print(f"{name} {file.stem}: {found['top1']['value']:.2f} %, {found['macs']:.3f} of the MACs")


def run(name: str, arm: Arm, seed: int, dense: Artifact, data: Data, folder: Path) -> dict[str, Any]:
    """One arm."""
    with on_target(dense, data, batch_size=128, seed=seed) as (meter, context):
        started = time.time()
        history: list[dict[str, Any]] = []
        after: Artifact | Fed
        if arm.share_of_macs is None:
            after = apply(arm.passes, dense, context)
            history = steps(after, dense, "groups")
        else:
            after = context.fed(theirs(arm, name, dense, context, folder))
        spent = time.time() - started
        return figures(after, dense, meter) | {
            "environment": environment.describe(),
            "arm": name,
            "seed": seed,
            "seconds": round(spent, 1),
            "history": history,
        }


def theirs(arm: Arm, name: str, dense: Artifact, context: Context, folder: Path) -> nn.Module:
    """torch-pruning's pruner for the same share of the operations; for a latency, for the share that ours came to."""
    share = arm.share_of_macs
    if not share:
        ours = folder / f"{name.replace(GROUP_NORM_PRUNER, 'sparsified-recovered')}-{context.seed}.json"
        share = json.loads(ours.read_text())["macs"]
    model, size = dense.model(), dense.backbone.input.size
    (settings,) = arm.passes
    assert isinstance(settings, Finetune)
    return sparsify_and_prune(
        model, settings, context, sparse_epochs=2, fits=lambda one: share_of_macs(one, model, size) <= share
    )


if __name__ == "__main__":
    main()
