"""Does `slim bench` call a difference where there is none, and does it see one that is there?

A file is compared with itself 200 times, and with a graph padded to be about 8 % slower 50 times, while a process keeps
one core busy. Rule: a difference (the whole interval outside 1 +- 2 %) is called in at most 2 of the 200, and "slower"
in at least 80 % of the padded. The padded graph's true slow-down comes from a long run of its own.

    python benchmarks/aa_control.py            # about 30 minutes on 2 cores; interrupted, it goes on where it stopped
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from slim import environment
from slim.bench.latency import Protocol, compare, differs
from slim.export.target import Target
from slim.measurement import Measurement

NETWORK = "mobilenetv3_small_100"
PADDED_CONV = 31
"""The Conv, counted in graph order, behind which identity 1x1 Convs are put: 144 channels at 14 x 14."""
PADDING = 3
"""How many of them; each costs about 2.7 %."""
CALIBRATION = Protocol(sessions=64, max_rounds=1024, aim_s=120)
TARGET = Target(runtime="ort", device="cpu", threads=1)
RESULTS = Path(__file__).parent / "results" / "aa_control.json"


def export(folder: Path) -> Path:
    import timm
    import torch

    torch.manual_seed(0)
    path = folder / "network.onnx"
    network = timm.create_model(NETWORK, pretrained=False).eval()
    torch.onnx.export(network, (torch.randn(1, 3, 224, 224),), path, dynamo=True, external_data=False, verbose=False)
    return path


def pad(source: Path, out: Path, *, at: int, count: int) -> Path:
    """Put `count` identity 1x1 Convs, which cost time and change nothing, behind the Conv number `at`."""
    model = shape_inference.infer_shapes(onnx.load(source))
    graph = model.graph
    conv = [node for node in graph.node if node.op_type == "Conv"][at]
    end = conv.output[0]
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.value_info}
    channels = shapes[end][1]
    eye = np.eye(channels, dtype=np.float32).reshape(channels, channels, 1, 1)
    graph.initializer.append(numpy_helper.from_array(eye, "padding"))
    names = [end, *(f"padded_{number}" for number in range(count))]
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == end:
                node.input[place] = names[-1]
    first = list(graph.node).index(conv) + 1
    for number in range(count):
        node = helper.make_node("Conv", [names[number], "padding"], [names[number + 1]], kernel_shape=[1, 1])
        graph.node.insert(first + number, node)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)
    return out


@contextmanager
def busy(core: int) -> Iterator[None]:
    """One process that never rests, bound to `core`."""
    # It ends with its parent, whatever ended that.
    code = (
        f"import os; os.sched_setaffinity(0, {{{core}}}); parent = os.getppid()\n"
        "while os.getppid() == parent: sum(range(10**6))"
    )
    burner = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        burner.kill()
        burner.wait()


def row(found: Measurement, began: float) -> dict[str, Any]:
    details = found.details
    return {
        "ratio": round(found.value, 5),
        "low": round(found.low or 0.0, 5),
        "high": round(found.high or 0.0, 5),
        "differs": differs(found),
        "control": {key: details["control"][key] for key in ("value", "low", "high", "fit")},
        "cpu_ratio": details["cpu_ratio"],
        "p50_ms": [details[side]["p50_ms"]["value"] for side in ("candidate", "reference")],
        "layout": details["layout"],
        "drifting": details["steady"]["drifting"],
        "load_average": details["load_average"][1],
        "steal_percent": details["steal_percent"],
        "seconds": round(time.time() - began, 2),
    }


def summary(results: dict[str, Any]) -> dict[str, Any]:
    same, padded = results["same"], results["padded"]
    logs = np.log([[r["ratio"], r["low"], r["high"]] for r in same]) if same else np.zeros((0, 3))
    called, seen = sum(r["differs"] for r in same), sum(r["differs"] and r["ratio"] > 1 for r in padded)
    return {
        "same_runs": len(same),
        "same_called_different": called,
        "same_sd_percent": round(100 * float(logs[:, 0].std()), 3) if same else None,
        "same_worst_percent": round(100 * float(abs(logs[:, 0]).max()), 3) if same else None,
        "same_interval_holds_1": int(((logs[:, 1] <= 0) & (logs[:, 2] >= 0)).sum()),
        "same_half_width_percent": round(50 * float(np.median(logs[:, 2] - logs[:, 1])), 3) if same else None,
        "controls_unfit": sum(not r["control"]["fit"] for r in same + padded),
        "padded_runs": len(padded),
        "padded_called_slower": seen,
        "padded_median_ratio": round(float(np.median([r["ratio"] for r in padded])), 4) if padded else None,
        "seconds_median": round(float(np.median([r["seconds"] for r in same + padded])), 2) if same else None,
        "rule_holds": len(same) >= 200 and len(padded) >= 50 and called <= 2 and seen >= 0.8 * len(padded),
    }


def save(results: dict[str, Any], out: Path) -> None:
    results["summary"] = summary(results)
    lines = [json.dumps(key) + ": " + _rows(value) for key, value in results.items()]
    beside = out.with_suffix(".part")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    beside.replace(out)


def _rows(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def begin(network: Path, padded: Path, out: Path) -> dict[str, Any]:
    """What is there already, if it was measured on the same files by the same protocol; else an empty page."""
    identity = {
        "network": NETWORK,
        "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in (network, padded)],
        "padding": {"conv": PADDED_CONV, "count": PADDING},
        "target": str(TARGET),
        "protocol": Protocol().model_dump(mode="json"),
        "fingerprint": environment.fingerprint(),
    }
    if out.exists():
        results: dict[str, Any] = json.loads(out.read_text())
        changed = [key for key, value in identity.items() if results["identity"].get(key) != value]
        if changed:
            raise SystemExit(f"{out}: was measured with another {', '.join(changed)}; move it away to start anew")
        return results
    return {
        "summary": {},
        "identity": identity,
        "environment": environment.describe(),
        "true_slowdown": None,
        "same": [],
        "padded": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same", type=int, default=200, help="comparisons of the file with itself")
    parser.add_argument("--padded", type=int, default=50, help="comparisons with the padded file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, busy(max(os.sched_getaffinity(0))):
        network = export(Path(folder))
        padded = pad(network, Path(folder) / "padded.onnx", at=PADDED_CONV, count=PADDING)
        results = begin(network, padded, options.out)
        if not results["true_slowdown"]:
            began = time.time()
            found = compare(padded, network, TARGET, seed=2**31, protocol=CALIBRATION)
            results["true_slowdown"] = row(found, began)
            save(results, options.out)
            print("true slow-down", found, flush=True)
        while len(results["same"]) < options.same or len(results["padded"]) < options.padded:
            # In step, so that both see the same hours of a machine that others use too.
            behind = len(results["padded"]) * options.same < len(results["same"]) * options.padded
            kind = "padded" if behind or len(results["same"]) >= options.same else "same"
            number = len(results[kind])
            began = time.time()
            seed = number + (10_000 if kind == "padded" else 0)
            found = compare(padded if kind == "padded" else network, network, TARGET, seed=seed)
            results[kind].append(row(found, began))
            save(results, options.out)
            counts = results["summary"]
            print(
                f"{kind} {number}: {found}; called {counts['same_called_different']}/{counts['same_runs']} same, "
                f"{counts['padded_called_slower']}/{counts['padded_runs']} padded",
                flush=True,
            )
    print(json.dumps(results["summary"], indent=2))


if __name__ == "__main__":
    main()
