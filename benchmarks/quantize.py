"""INT8 and half precision on ONNX Runtime and OpenVINO, beside what the runtimes' own tools make of the same file.

    SLIM_TEST_DATA=/path python -m benchmarks.quantize                # whatever has no result yet
    SLIM_TEST_DATA=/path python -m benchmarks.quantize mobilenetv2    # files of every kind, and the neighbours'
    SLIM_TEST_DATA=/path python -m benchmarks.quantize shapes         # latency of INT8 against fp32 on other shapes

Each network is a file benchmarks/results/quantize/NETWORK.json. MobileNetV2 is a real ImageNet network: 250 images
calibrate, 250 others, of other classes, are reported on, and nothing is chosen on those. All its files take turns in
one run, a process each, one thread. The other shapes have random weights with batch norm statistics of 16 real images;
their speed is what is asked, and depends on no value.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor, nn

from benchmarks.low_rank import begin
from benchmarks.quantize_neighbours import NNCF, ORT
from slim import environment, pretrained
from slim.artifact import Artifact, Preprocessing
from slim.bench import accuracy, statistics
from slim.bench.latency import Protocol
from slim.bench.measure import TargetMeter
from slim.bench.worker import Worker, serving
from slim.console import bars
from slim.contract import Context, Fed
from slim.data import open_data
from slim.export import quantized
from slim.export.parity import cosine, logits
from slim.export.target import Target
from slim.measurement import Measurement
from slim.passes.quantize import Quantize
from slim.quantization import METHODS, Method, Quantization
from slim.recipe import ModelSpec

RESULTS = Path(__file__).parent / "results" / "quantize"
WORK = Path("runs/benchmarks/quantize")
TARGETS = {name: Target.parse(f"{name}:cpu,threads=1") for name in ("ort", "openvino")}
CHOICE = "int8, chosen"
FIELDS = {"value", "low", "high", "n"}

AT_LEAST = 0.97
"""Speed of slim's file, as a share of the best neighbour's on the same runtime."""

SHAPES: dict[str, dict[str, Any]] = {
    # A residual branch that begins at zero would be removed, and not be timed.
    "resnet18": {"zero_init_last": False},
    "resnet50": {"zero_init_last": False},
    "mobilenetv3_small_100": {},
    "mobilenetv3_large_100": {},
    "vit_tiny_patch16_224": {},
}


@dataclass(frozen=True)
class Side:
    """A file on a runtime."""

    runtime: str
    name: str
    path: Path
    neighbour: bool = False


@dataclass(frozen=True)
class _Calibrated(TargetMeter):
    """Decodes the calibration images once; the ranges on them are the same on every target, and kept in WORK."""

    images: tuple[Tensor, ...] = ()

    def _calibration(self, fed: Preprocessing) -> Iterator[Tensor]:
        return iter(self.images)

    def calibrate(self, model: Fed, method: Method) -> Quantization:
        kept = WORK / f"ranges-{method}-{self._plain(model).sha256[:16]}.json"
        if not kept.exists():
            kept.write_text(super().calibrate(model, method).model_dump_json())
        return Quantization.model_validate_json(kept.read_text())


def mobilenetv2(protocol: Protocol) -> dict[str, Any]:
    """Files of every kind on both runtimes: what they keep, and how fast they are, side by side."""
    folder = WORK / "mobilenetv2"
    kept = folder / "made.json"
    if not kept.exists():
        kept.write_text(json.dumps(made(folder), indent=1) + "\n")
    found = json.loads(kept.read_text())
    sides = [
        Side(row["runtime"], row["file"], folder / place, row["neighbour"])
        for row, place in zip(found["rows"], found.pop("places"), strict=True)
    ]
    timed = in_turn(sides, protocol)
    rows = [what | how for what, how in zip(found["rows"], timed.pop("rows"), strict=True)]
    return {"network": "mobilenetv2", **found, "rows": rows, **timed}


def made(folder: Path) -> dict[str, Any]:
    """All files, written into `folder`, and what each keeps."""
    dense, data = begin("mobilenetv2")
    given = dense.backbone.input
    images = list(data.eval_batches("val", given, batch_size=32))
    calibration = tuple(batch for batch, _ in data.eval_batches("calib", given, batch_size=32))
    sides: list[Side] = []
    planned: dict[str, Any] = {}
    for runtime, target in TARGETS.items():
        exported = folder / runtime
        exported.mkdir(parents=True, exist_ok=True)
        meter = _Calibrated(target, data, exported, progress=bars, images=calibration)
        context = Context(data=data, meter=meter, reference=dense, dense=dense, seed=0, backbone=dense.backbone)
        fed = Fed(dense.model(), given)
        sides.append(Side(runtime, "fp32", meter.export(dense).path, neighbour=runtime == "openvino"))
        half, chosen = Quantize(precision="fp16")(dense, context), Quantize()(dense, context)
        sides.append(Side(runtime, "fp16", meter.export(half).path))
        for method in METHODS:
            one = replace(fed, quantization=meter.calibrate(fed, method))
            sides.append(Side(runtime, f"int8, {method}", meter.export(one).path))
        sides.append(Side(runtime, CHOICE, meter.export(chosen).path))
        planned[runtime] = chose(chosen)
        print(f"{runtime}: {planned[runtime]}", flush=True)
    sides += neighbours(sides[0].path, torch.cat(calibration), folder)
    rows = [
        {"runtime": side.runtime, "file": side.name, "neighbour": side.neighbour, **what}
        for side, what in zip(sides, fidelity(sides, images), strict=True)
    ]
    return {
        "calibrated_on": sum(map(len, calibration)),
        "planned": planned,
        "rows": rows,
        "places": [str(side.path.relative_to(folder)) for side in sides],
    }


def chose(after: Artifact) -> dict[str, Any]:
    """What the pass decided, and among what."""
    plan = after.history[-1].plan
    setting = Quantization.model_validate(plan["quantization"])
    return {"method": setting.method, "float_layers": list(setting.floats), "candidates": plan["candidates"]}


def neighbours(source: Path, calibration: Tensor, folder: Path) -> list[Side]:
    """INT8 files made of the same float file with the same images by the runtimes' own tools."""
    values = folder / "calibration.npy"
    np.save(values, calibration.numpy())
    command = [sys.executable, "-m", "benchmarks.quantize_neighbours", str(source), str(values), str(folder)]
    # In continuous integration NNCF reports no usage.
    subprocess.run(command, check=True, env=os.environ | {"CI": "true"})
    return [
        Side("ort", "onnxruntime.quantization int8", folder / ORT, neighbour=True),
        Side("openvino", "NNCF int8", folder / NNCF, neighbour=True),
    ]


def fidelity(sides: Sequence[Side], images: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Top-1 of each file, and what it keeps of ONNX Runtime's fp32, which is the first."""
    found: list[dict[str, Any]] = []
    reference: tuple[Measurement, Tensor] | None = None
    for side in sides:
        target = TARGETS[side.runtime]
        top1 = accuracy.accuracy(side.path, target, images)
        with serving(side.path, target, threads=environment.usable_cores()) as session:
            given = torch.cat([logits(session, batch, place=side.name) for batch, _ in images])
        reference = reference or (top1, given)
        found.append(
            {
                "top1": top1.model_dump(include=FIELDS),
                "lost": accuracy.drop(top1, reference[0]).model_dump(include=FIELDS),
                "agreement": accuracy.agreement(top1, reference[0]).model_dump(include=FIELDS),
                "cosine": round(cosine(reference[1], given), 6),
                "int8_layers": covered(side.runtime, side.path),
            }
        )
        print(f"{side.runtime}, {side.name}: {top1.value:.1f} %", flush=True)
    return found


def covered(runtime: str, path: Path) -> list[int]:
    """Layers that the runtime computes in INT8, and all of them."""
    if runtime == "ort":
        found = quantized.coverage(path)
        return [found.fused, found.of]
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", hints)
    kinds = [
        operator.get_rt_info()["runtimePrecision"].astype(str)
        for operator in compiled.get_runtime_model().get_ordered_ops()
        if operator.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
    ]
    return [sum(kind in ("u8", "i8") for kind in kinds), len(kinds)]


def in_turn(sides: Sequence[Side], protocol: Protocol) -> dict[str, Any]:
    """Every file timed in rounds of random order, whatever its runtime; ONNX Runtime's fp32 twice, as the control.

    slim.bench.latency does this on one target; the figures are read, and sessions doubled while a verdict is undecided,
    as they are there.
    """
    load, order = os.getloadavg()[0], np.random.default_rng(0)
    wall = _wall([*sides, sides[0]], protocol, order)
    while True:
        found = _figures(sides, wall, protocol)
        undecided = any(one["verdict"] == "undecided" for one in found["verdicts"])
        if not undecided or 2 * wall.shape[1] * wall.shape[2] > protocol.max_rounds:
            break
        wall = np.concatenate([wall, _wall([*sides, sides[0]], protocol, order)], axis=1)
    conditions = {
        "layout": list(wall.shape[1:]),
        "threads": 1,
        "batch": 1,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "niceness": os.nice(0),
    }
    return found | {"conditions": conditions}


def _figures(sides: Sequence[Side], wall: statistics.Array, protocol: Protocol) -> dict[str, Any]:
    """wall: (sides and the control, sessions, rounds, calls) ms."""

    def ratio(side: int, reference: int) -> dict[str, float]:
        ours, theirs = wall[side], wall[reference]
        return statistics.paired_ratio(ours, theirs, generator=np.random.default_rng(0)).as_json()

    plain = {runtime: _place(sides, runtime, "fp32") for runtime in TARGETS}
    best = {
        runtime: min(
            (place for place, side in enumerate(sides) if side.neighbour and side.runtime == runtime),
            key=lambda place: ratio(place, 0)["value"],
        )
        for runtime in TARGETS
    }
    rows: list[dict[str, Any]] = []
    for place, side in enumerate(sides):
        p50 = statistics.bootstrap(wall[place], statistics.median, generator=np.random.default_rng(0))
        rows.append(
            {
                "ms": p50.as_json(),
                "fastest_of_round_ms": round(float(np.median(wall[place].min(axis=-1))), 6),
                "ratio": ratio(place, 0),
                "ratio_to_fp32_of_runtime": ratio(place, plain[side.runtime]),
                "speed_of_best_neighbour": ratio(best[side.runtime], place),
            }
        )
    verdicts = []
    for runtime in TARGETS:
        speed = rows[_place(sides, runtime, CHOICE)]["speed_of_best_neighbour"]
        met, missed = speed["low"] >= AT_LEAST, speed["high"] < AT_LEAST
        verdicts.append(
            {
                "runtime": runtime,
                "best_neighbour": sides[best[runtime]].name,
                "speed": speed,
                "at_least": AT_LEAST,
                "verdict": "met" if met else "missed" if missed else "undecided",
            }
        )
    control = statistics.paired_ratio(wall[-1], wall[0], generator=np.random.default_rng(0))
    return {
        "rows": rows,
        "verdicts": verdicts,
        "control": control.as_json() | {"fit": not control.leaves(1.0, protocol.tolerance)},
    }


def _place(sides: Sequence[Side], runtime: str, name: str) -> int:
    return next(place for place, side in enumerate(sides) if (side.runtime, side.name) == (runtime, name))


def _wall(sides: Sequence[Side], protocol: Protocol, order: np.random.Generator) -> statistics.Array:
    """Wall time of every recorded call, ms, (sides, sessions, rounds, calls)."""
    shape = len(sides), protocol.sessions, protocol.rounds, protocol.calls
    wall = np.empty(shape)
    with ExitStack() as stack, bars("in turn", protocol.sessions) as advance:
        workers = [stack.enter_context(Worker(TARGETS[side.runtime])) for side in sides]
        for session in range(protocol.sessions):
            for side in order.permutation(len(sides)):
                workers[side].open(sides[side].path, batch=1, seed=0)
                workers[side].run(protocol.warm_up)
            for round_ in range(protocol.rounds):
                for side in order.permutation(len(sides)):
                    wall[side, session, round_] = workers[side].run(protocol.calls, warm_up=1).wall_ms
            advance(1, "")
    return wall


def shape(name: str) -> dict[str, Any]:
    """INT8 against fp32 on either runtime: the sign of the interval is the verdict."""
    source = f"tar:{Path(os.environ['SLIM_TEST_DATA']) / 'imagenet-sample.tar'}"
    spec = ModelSpec(name=name, args=SHAPES[name], weights="none")
    started = pretrained.start(spec, open_data(source, split="train=0.5,val=0.5", calib=16), seed=0)
    data, given = started.data, started.artifact.backbone.input
    assert data is not None
    images = torch.cat([batch for batch, _ in data.eval_batches("calib", given, batch_size=16)])
    model = settled(started.artifact.model(), images)
    rows = []
    for runtime, target in TARGETS.items():
        with tempfile.TemporaryDirectory() as exported:
            meter = _Calibrated(target, data, Path(exported), progress=bars, images=(images,))
            plain = Fed(model, given)
            int8 = replace(plain, quantization=meter.calibrate(plain, "minmax"))
            ratio = meter.compare(int8, plain, limit=1.0)
            low, high = ratio.low, ratio.high
            assert low is not None
            assert high is not None
            rows.append(
                {
                    "runtime": runtime,
                    "ratio": ratio.model_dump(include=FIELDS),
                    "ms": {side: ratio.details[side]["p50_ms"] for side in ("candidate", "reference")},
                    "int8_layers": covered(runtime, meter.export(int8).path),
                    "verdict": "faster" if high < 1 else "slower" if low > 1 else "undecided",
                    "control": {key: ratio.details["control"][key] for key in ("value", "low", "high", "fit")},
                    "conditions": {key: ratio.details[key] for key in ("layout", "threads", "load_average")},
                }
            )
            print(f"{name}, {runtime}: {ratio.value:.3f} ({low:.3f}..{high:.3f})", flush=True)
    return {"network": name, "calibrated_on": len(images), "rows": rows}


@torch.no_grad()
def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """Fresh weights give activations of any size; with batch norm statistics of images they have the size they have."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0
    model.train()(images)
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    known: dict[str, tuple[str, ...]] = {"mobilenetv2": ("mobilenetv2",), "shapes": tuple(SHAPES)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for part in sys.argv[1:] or known:
        for name in known[part]:
            file = RESULTS / f"{name}.json"
            if not file.exists():
                # Many files take turns, which makes a round long; more of them average what disturbs parts of one.
                found = mobilenetv2(Protocol(sessions=12)) if part == "mobilenetv2" else shape(name)
                file.write_text(json.dumps(found | {"environment": environment.describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
