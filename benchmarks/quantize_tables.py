"""The part of docs/results.md about INT8 and half precision, from benchmarks/results/quantize/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.prune_tables import span

RESULTS = Path(__file__).parent / "results" / "quantize"
SHAPES = ("resnet18", "resnet50", "mobilenetv3_small_100", "mobilenetv3_large_100", "vit_tiny_patch16_224")
RUNTIMES = {"ort": "ONNX Runtime", "openvino": "OpenVINO"}
HEAD = """\
## INT8 and half precision

Each row is one file on one runtime: batch 1, one thread, 32-bit arithmetic wherever the file leaves it a choice.
Intervals are 95 %. *Chosen* is what `quantize` planned for the runtime, on the calibration images alone."""


def mobilenetv2(found: Any) -> str:
    count, planned = found["rows"][0]["top1"]["n"], found["planned"]
    lines = [
        "### MobileNetV2, ImageNet sample",
        "",
        f"{found['calibrated_on']} images calibrate, {count} others, of other classes, are reported on. Lost points,",
        "agreement, cosine and the ratio of latencies are against fp32 on ONNX Runtime; all files took turns in one",
        f"run, and that file twice: {span(found['control'], 3)}. The ratio to fp32 is to that of the same runtime.",
        "*ms* is the p50 of all calls, *fastest* the median over rounds of the fastest of three, which ratios are of:",
        "on a busy machine long calls are interrupted, short ones seldom.",
        "*Neighbours* are made by the runtimes' own tools from the same file and the same images. These weights were",
        "once quantised for each channel, so INT8 is unusually kind to them.",
        "",
        f"| runtime | file | top-1 of {count}, % | points lost | agreement, % | cosine | ms | fastest | ratio "
        "| ratio to fp32 | INT8 layers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for runtime, words in RUNTIMES.items():
        for row in found["rows"]:
            if row["runtime"] == runtime:
                name = f"{row['file']} *(neighbour)*" if row["neighbour"] else row["file"]
                fused, of = row["int8_layers"]
                lines.append(
                    f"| {words} | {name} | {row['top1']['value']:.1f} | {span(row['lost'], 1, '+')} "
                    f"| {row['agreement']['value']:.1f} | {row['cosine']:.5f} | {row['ms']['value']:.2f} "
                    f"| {row['fastest_of_round_ms']:.2f} | {span(row['ratio'], 3)} "
                    f"| {span(row['ratio_to_fp32_of_runtime'], 3)} | {fused} of {of} |"
                )
    lines += ["", "| runtime | chosen | best neighbour | speed of the chosen, of the neighbour's | asked | verdict |"]
    lines.append("|---|---|---|---|---|---|")
    for one in found["verdicts"]:
        plan = planned[one["runtime"]]
        chosen = f"{plan['method']}, {len(plan['float_layers'])} layers in float"
        lines.append(
            f"| {RUNTIMES[one['runtime']]} | {chosen} | {one['best_neighbour']} | {span(one['speed'], 3)} "
            f"| {one['at_least']} | {one['verdict']} |"
        )
    return "\n".join(lines)


def shapes(found: dict[str, Any]) -> str:
    lines = [
        "### Is INT8 faster?",
        "",
        "INT8 against fp32 on the same runtime, min-max ranges of 16 images, random weights with batch norm statistics",
        "of these images. The verdict is the side of 1 that the whole interval lies on.",
        "",
        "| network | runtime | fp32, ms | INT8, ms | ratio | INT8 layers | verdict | the same file twice |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        for row in found[name]["rows"] if name in found else ():
            fused, of = row["int8_layers"]
            lines.append(
                f"| {name} | {RUNTIMES[row['runtime']]} | {row['ms']['reference']['value']:.2f} "
                f"| {row['ms']['candidate']['value']:.2f} | {span(row['ratio'], 3)} | {fused} of {of} "
                f"| {row['verdict']} | {span(row['control'], 3)} |"
            )
    return "\n".join(lines)


def section() -> str:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    parts = [HEAD]
    if "mobilenetv2" in found:
        parts.append(mobilenetv2(found["mobilenetv2"]))
    if not found.keys().isdisjoint(SHAPES):
        parts.append(shapes(found))
    device = next(iter(found.values()))["environment"]["device"]
    machine = f"Machine: {device['cpu']}, {device['cores']} cores, busy with other work: read ratios."
    parts.append(f"{machine} Scripts: `benchmarks/quantize.py`, `quantize_neighbours.py`.")
    return "\n\n".join(parts)
