"""What a distillation step costs: against a teacher's forward pass and a plain step timed apart, and with the cache.

    python -m benchmarks.distillation_step     # writes benchmarks/results/distillation_step.json

All loops read the same augmented digits with the same student and run in turn, in changing order, one epoch each.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slim import environment
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Advance, Context, Loading
from slim.data import open_data
from slim.passes.distill import Distill
from slim.passes.distill.records import tolerance
from slim.passes.distill.teacher import Teacher
from slim.passes.finetune import Finetune
from slim.store import save
from slim.training import resolve_precision

RESULT = Path(__file__).parent / "results" / "distillation_step.json"
ROUNDS, BATCH, CURVE = 11, 64, 4
INPUT = Preprocessing(size=(3, 32, 32), crop=1.0)
STUDENT = Backbone(name="benchmarks.nets:resnet18_thin", num_classes=10, input=INPUT)
TEACHER = Backbone(name="benchmarks.nets:swin_small", num_classes=10, input=INPUT)
LOOP: dict[str, Any] = {"epochs": 1, "flip": 0.0}
DATA = open_data("digits")


def made(backbone: Backbone) -> Artifact:
    return Artifact.of(backbone.build(seed=1, trust=True), backbone, trust=True)


class Clock:
    """Takes the time at which each step of the training bar ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    @contextmanager
    def __call__(self, title: str, _total: int) -> Iterator[Advance]:
        """A progress bar for `Context`."""
        training = title.startswith("training")
        yield lambda steps, note=None: self.ends.append(time.perf_counter()) if steps and training else None

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def loop(fit: Callable[[Context], object]) -> float:
    clock = Clock()
    fit(Context(data=DATA, progress=clock, loading=Loading(BATCH), backbone=STUDENT, reference=made(STUDENT)))
    return clock.step


def forward(teacher: Teacher) -> float:
    """Median seconds of the teacher's forward pass on batches that training shows."""
    times = []
    for batch in DATA.train_batches(INPUT, Finetune(**LOOP), seed=0, epoch=0, batch_size=BATCH, num_classes=10):
        images = batch.images.to(memory_format=torch.channels_last)
        started = time.perf_counter()
        teacher.logits(images)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def curves(options: dict[str, Any], cache: str) -> dict[str, Any]:
    """Loss of each epoch with the live teacher and from the cache, and how far the top-k may move one at most."""
    found: dict[str, Any] = {}
    for name, place in (("live", None), ("cached", cache)):
        model = made(STUDENT).model()
        context = Context(data=DATA, loading=Loading(BATCH), backbone=STUDENT, reference=made(STUDENT))
        found[name] = Distill(**{**options, "epochs": CURVE, "cache": place}).fit(model, model, context)
    logits = torch.cat([model(images) for images, _ in DATA.eval_batches("val", INPUT, batch_size=250)]).detach()
    spread = float((logits.amax(1) - logits.amin(1)).max())
    index = json.loads((Path(cache) / "index.json").read_text())
    mass = found["cached"]["cache"]["mass"]
    return {
        "live": found["live"]["loss"],
        "cached": found["cached"]["loss"],
        "k": index["k"],
        "mass": mass,
        "tolerance": tolerance(mass, classes=10, k=index["k"], spread=spread),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "teacher"
        # Trained, as predictions that are all alike would be stored whole.
        able = Finetune(epochs=6, lr=2e-3, flip=0.0)(made(TEACHER), Context(data=DATA, loading=Loading(BATCH)))
        save(able, place)
        options: dict[str, Any] = {"teacher": (str(place),), "method": ("kd",), **LOOP}
        teacher = Teacher(
            able, INPUT, device=torch.device("cpu"), precision=resolve_precision("auto", torch.device("cpu"))
        )
        kinds: dict[str, Callable[[], float]] = {
            "plain": lambda: loop(lambda c: Finetune(**LOOP).fit(made(STUDENT).model(), made(STUDENT).model(), c)),
            "teacher": lambda: forward(teacher),
            "live": lambda: loop(lambda c: Distill(**options).fit(made(STUDENT).model(), made(STUDENT).model(), c)),
            "cached": lambda: loop(
                lambda c: Distill(**options, cache=f"{folder}/cache").fit(
                    made(STUDENT).model(), made(STUDENT).model(), c
                )
            ),
        }
        for kind in kinds.values():
            kind()
        rounds: list[dict[str, float]] = []
        for number in range(ROUNDS):
            order = list(kinds) if number % 2 else list(kinds)[::-1]
            rounds.append({name: kinds[name]() for name in order})
            print(f"round {number + 1}/{ROUNDS}: " + ", ".join(f"{n} {t * 1e3:.1f} ms" for n, t in rounds[-1].items()))
        curve = curves(options, f"{folder}/curve")
    ratios = {
        "live_against_apart": [one["live"] / (one["teacher"] + one["plain"]) for one in rounds],
        "cached_against_plain": [one["cached"] / one["plain"] for one in rounds],
        "live_against_plain": [one["live"] / one["plain"] for one in rounds],
    }
    result = {
        "rounds": ROUNDS,
        "batch": BATCH,
        "steps_per_round": DATA.steps(BATCH),
        "median_ms": {name: statistics.median(one[name] for one in rounds) * 1e3 for name in kinds},
        **{
            name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for name, values in ratios.items()
        },
        "curve": curve,
        "environment": environment.describe(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.3f}x ({min(values):.3f}..{max(values):.3f})")


if __name__ == "__main__":
    main()
