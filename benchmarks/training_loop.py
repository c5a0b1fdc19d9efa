"""Time per step of the training loop beside a plain hand-written one on the same batches; limit 1.05x.

    python benchmarks/training_loop.py      # writes benchmarks/results/training_loop.json

Both train the same network from the same values with AdamW, cosine schedule and clipping, reading the same batches in
turn: one epoch of one, one of the other. The plain loop has nothing else: no progress, no checkpoint, no check of
the loss. Steps are timed from the end of the first to the end of the last; what a training pass costs once, before and
after its steps, stands apart.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from slim import environment
from slim.artifact import Backbone, Preprocessing
from slim.contract import Advance, Context
from slim.data import Augment, Data, open_data
from slim.passes.finetune import label_loss
from slim.training import Training, train

RESULT = Path(__file__).parent / "results" / "training_loop.json"
ROUNDS = 15
LIMIT = 1.05
BACKBONE = Backbone(
    name="convnext_atto",
    kwargs={"patch_size": 2, "conv_mlp": False},
    num_classes=10,
    input=Preprocessing(size=(3, 32, 32), crop=1.0),
)
TRAINING = Training(epochs=1, precision="fp32")
AUGMENT = Augment(flip=0.0)
BATCH = 64


def plain(data: Data) -> list[float]:
    """One epoch; when each step ended."""
    model = BACKBONE.build().train().to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=TRAINING.lr, weight_decay=TRAINING.weight_decay)
    total = data.steps(BATCH)
    warm = round(total * TRAINING.warmup)
    ends = []
    batches = data.train_batches(BACKBONE.input, AUGMENT, seed=0, epoch=0, batch_size=BATCH, num_classes=10)
    for step, batch in enumerate(batches):
        share = step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        for group in optimizer.param_groups:
            group["lr"] = TRAINING.lr * share
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images.to(memory_format=torch.channels_last)), batch.target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
        optimizer.step()
        ends.append(time.perf_counter())
    return ends


def ours(data: Data) -> list[float]:
    """One epoch; when each step ended."""
    ends: list[float] = []

    @contextmanager
    def watch(_title: str, _total: int) -> Iterator[Advance]:
        yield lambda steps, note=None: ends.append(time.perf_counter()) if steps else None

    train(BACKBONE.build(), label_loss, TRAINING, AUGMENT, Context(data=data, backbone=BACKBONE, progress=watch))
    return ends


def timed(loop: Callable[[Data], list[float]], data: Data) -> tuple[float, float]:
    """Seconds of a step, and of everything that is not a step."""
    started = time.perf_counter()
    ends = loop(data)
    whole, steps = time.perf_counter() - started, ends[-1] - ends[0]
    step = steps / (len(ends) - 1)
    return step, whole - step * len(ends)


def main() -> None:
    data = open_data("digits")
    timed(ours, data)
    timed(plain, data)
    pairs, once = [], []
    for round_ in range(ROUNDS):
        loops = [ours, plain] if round_ % 2 else [plain, ours]
        times = {loop: timed(loop, data) for loop in loops}
        pairs.append((times[ours][0], times[plain][0]))
        once.append(times[ours][1] - times[plain][1])
        print(f"round {round_ + 1}/{ROUNDS}: {pairs[-1][0] * 1000:.1f} ms against {pairs[-1][1] * 1000:.1f} ms a step")
    ratios = sorted(a / b for a, b in pairs)
    result = {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "limit": LIMIT,
        "median_ms_per_step": {
            "slim": round(1000 * statistics.median(a for a, _ in pairs), 2),
            "plain": round(1000 * statistics.median(b for _, b in pairs), 2),
        },
        "once_per_pass_seconds_median": round(statistics.median(once), 3),
        "rounds": ROUNDS,
        "steps_per_round": data.steps(BATCH),
        "threads": torch.get_num_threads(),
        "environment": environment.describe(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
