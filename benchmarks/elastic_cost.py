"""What being elastic costs: open gates, a training step, cutting out, searching, and how far off the latency model is.

    SLIM_TEST_DATA=/path python -m benchmarks.elastic_cost     # writes benchmarks/results/elastic_cost.json

Forward passes and training loops run in turn, in changing order, in one process; ratios are of medians, with the
quartiles of the paired ratios. The latency model is that of `slim table build`, and its error is of networks that it
was not fitted to.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.distillation_step import Clock, made
from benchmarks.low_rank import begin, on_target
from slim import environment
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context, Loading, Pass
from slim.data import open_data
from slim.goal import parse_goal
from slim.passes.elastic import Elastic
from slim.passes.elastic.extract import extract
from slim.passes.elastic.family import Family
from slim.passes.elastic.gates import gated
from slim.passes.finetune import Finetune

RESULT = Path(__file__).parent / "results" / "elastic_cost.json"
ROUNDS = 15
THIN = Backbone(name="benchmarks.nets:resnet18_thin", num_classes=10, input=Preprocessing(size=(3, 32, 32), crop=1.0))
LOOP: dict[str, Any] = {"epochs": 1, "flip": 0.0}


def network(name: str, pixels: int) -> Backbone:
    return Backbone(name=name, num_classes=10, input=Preprocessing(size=(3, pixels, pixels)))


def ratios(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Of medians, and the quartiles of the ratios of pairs."""
    pairs = [a / b for a, b in zip(first, second, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    return {
        "ratio": round(statistics.median(first) / statistics.median(second), 4),
        "quartile_low": round(low, 4),
        "quartile_high": round(high, 4),
    }


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, the first round left out."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for place in (0, 1) if number % 2 else (1, 0):
            seconds = (first, second)[place]()
            if number:
                found[place].append(seconds)
    return found


def open_gates() -> dict[str, Any]:
    """A forward pass with all gates open against the network without any."""
    found = {}
    for backbone, batch in ((THIN, 64), (network("resnet50", 224), 2), (network("vit_tiny_patch16_224", 224), 4)):
        given = made(backbone)
        plain, elastic = given.model(), Elastic(epochs=0, criterion="group-l2", held_out=8)
        step = elastic(given, Context(data=open_data("digits"), backbone=backbone)).history[-1]
        gates = given.model()
        space = elastic.space_of(gates, backbone.input.size, step.plan)
        images = torch.randn(batch, *backbone.input.size)
        with torch.inference_mode(), gated(gates, space):
            found[backbone.name] = ratios(
                *in_turn(partial(timed, partial(gates, images)), partial(timed, partial(plain, images)), 4 * ROUNDS)
            )
    return found


def step() -> dict[str, Any]:
    """A step that trains four networks against one that trains one, with and without the frozen network as guard."""
    data = open_data("digits")

    def loop(given: Pass) -> float:
        clock, start = Clock(), made(THIN)
        given(start, Context(data=data, progress=clock, loading=Loading(64)))
        return clock.step

    plain = Finetune(**LOOP)
    return {
        name: ratios(*in_turn(partial(loop, elastic), partial(loop, plain), 5))
        for name, elastic in {
            "four networks": Elastic(**LOOP, ramp=0.0, guard=0.0, held_out=8),
            "and the guard": Elastic(**LOOP, ramp=0.0, held_out=8),
        }.items()
    }


def cutting_out() -> dict[str, Any]:
    """Seconds to cut the smallest subnet out, and with its norms re-estimated."""
    found = {}
    for backbone in (THIN, network("resnet50", 224), network("mobilenetv3_large_100", 224)):
        family = of(made(backbone), "digits")
        smallest, images = family.space.smallest, family.examiner.images.train(0)  # read before the clock runs
        found[backbone.name] = {
            "cut": round(timed(partial(extract, family.model, family.space, smallest)), 3),
            "cut_and_norms": round(timed(partial(family.examiner.finished, smallest)), 3),
            "images": len(images),
        }
    return found


def of(given: Artifact, source: str) -> Family:
    context = Context(data=open_data(source, limit_train=1200), backbone=given.backbone)
    made_elastic = Elastic(epochs=0, criterion="group-l2", held_out=600)(given, context)
    context = Context(data=context.data, backbone=given.backbone, history=made_elastic.history)
    return Family.of(made_elastic.model(), context, repair="norms")


def searching() -> dict[str, Any]:
    """150 subnets evaluated on 1,000 images, of 2,000 proposed for each; the ResNet of benchmarks/low_rank.py."""
    dense, data = begin("resnet")
    with on_target(dense, data, batch_size=128) as (_, context):
        after = Elastic(epochs=0)(dense, context)
        context = Context(data=data, backbone=dense.backbone, history=after.history)
        family = Family.of(after.model(), context, repair="norms")
        goal = parse_goal("0.5x-macs")
        cost, _ = family.costs(goal, None)
        started = time.perf_counter()
        front = family.search(cost, [goal], storage=None, evaluations=150, proposals=2000)
        seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "evaluated": front.evaluations,
        "alone": len(front.points) - front.evaluations,
        "proposed": front.proposals,
        "images": 1000,
        "tau": front.tau,
    }


def latency_model() -> dict[str, Any]:
    """Errors on networks held out, for whole networks measured on the target."""
    found = {}
    for backbone in (THIN, network("resnet18", 128), network("mobilenetv3_large_100", 160)):
        given = made(backbone)
        after = Elastic(epochs=0, criterion="group-l2", held_out=8)(given, Context(data=open_data("digits")))
        with on_target(after, open_data("digits"), batch_size=1) as (meter, context):
            family = Family.of(
                after.model(), Context(data=context.data, backbone=backbone, history=after.history), repair="none"
            )
            started = time.perf_counter()
            model = family.measured(meter)
        found[f"{backbone.name}@{backbone.input.size[1]}"] = {
            "said": str(model),
            "form": model.form,
            "errors": {form: vars(errors) for form, errors in model.errors.items()},
            "rows": len(model.rows),
            "seconds": round(time.perf_counter() - started, 1),
        }
    return found


def main() -> None:
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "open_gates": open_gates,
        "step": step,
        "cutting_out": cutting_out,
        "searching": searching,
        "latency_model": latency_model,
    }
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name, part in parts.items():
        if name not in found:
            found[name] = part() | {"environment": environment.describe()}
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
            print(name, {key: value for key, value in found[name].items() if key != "environment"}, flush=True)


if __name__ == "__main__":
    main()
