"""The part of docs/results.md about low-rank, and its drawing, from benchmarks/results/low_rank/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

NETWORKS = {
    "resnet": "ResNet-18, thin, CIFAR-10 (JPEG)",
    "vit": "ViT, small, CIFAR-10 (JPEG)",
    "mobilenetv2": "MobileNetV2, ImageNet sample",
}
ARMS = {
    "plain-uniform": "plain SVD, one share for all",
    "whitened-uniform": "whitened, one share for all",
    "whitened-greedy": "whitened, ranks for the budget",
    "repaired": "and repaired: `low-rank` as it is",
    "plain-uniform-finetuned": "plain SVD, one share, fine-tuned",
    "recovered": "`low-rank` as it is, then `distill`",
}
HEAD = """\
## Low-rank, rung by rung

Each row is one network: its exported file, timed against the dense one (batch 1, one thread of ONNX Runtime) and
evaluated beside it on the same images; intervals are 95 %. 250 or 256 images without labels calibrate; rows without
training took no gradient step. Trained rows of one network have equal epochs, rate and images: 2 epochs of the 50,000
training images for the ResNet, 1 for the ViT, 4 of the 250 calibration images, without labels, for MobileNetV2; one
seed.

How layers are weighed against each other was chosen on training images of the ResNet that were not calibrated with, and
on MobileNetV2's calibration images; the figures of its other images stood beside these and agreed.

![Top-1 over the share of parameters kept](low_rank.svg)
"""
FINDINGS = """\
- Smaller is not faster: a budget of parameters is best met in late layers, which see few positions and take little
  time. At a third of the parameters the ResNet keeps three quarters of its latency, where one share for all would keep
  half. Ask for milliseconds: at 0.65 of the latency it lost 0.5 points without any training. Half of the latency is
  close to the least that its layers can give: accuracy is lost there, and how much depends on how well the table was
  timed (65 % here, 76 % in an earlier run).
- PELA's claim, at most 0.6 points lost at a third fewer parameters, holds for both networks trained here before any
  training, and for the ViT down to a third. Uniform plain SVD fine-tuned on labels as long as `distill` trains loses
  more than `low-rank` and `distill` in every pair.
- Weighing by inputs and choosing ranks for the budget is what counts; the closed-form repair adds little where the
  loss is small, and points where it is large.
- MobileNetV2 is reported on classes that its 250 calibration images do not show, and its 1 x 1 convolutions have little
  to give: the same ladder holds, from 0 to 48 % at nine tenths of the parameters, but nothing pays. Learning from the
  same 250 images again gains nothing there. A negative result, as that of plain SVD below.
- Ranks learned by gates were no better than greedy ones where both were tried (79.0 against 80.9 % at 0.34 of the
  ResNet's parameters, on training images that were not calibrated with).
"""
COLOURS = ("#9a9a9a", "#c58b2a", "#4a90c2", "#1f5fa8", "#b3433c", "#2f8f5b")


def rows(network: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "low_rank" / network).glob("*.json"))}


def span(figure: Any, digits: int = 1, sign: str = "") -> str:
    return f"{figure['value']:{sign}.{digits}f} ({figure['low']:{sign}.{digits}f}..{figure['high']:{sign}.{digits}f})"


def line(words: str, row: Any) -> str:
    lost = {key: 0.0 - row["drop"][end] for key, end in (("value", "value"), ("low", "high"), ("high", "low"))}
    budget = next((step["budget"] for step in row["history"] if step["budget"]), None)
    asked = budget["to"] if budget else ""
    return (
        f"| {asked} | {words} | {row['params']:.3f} | {row['macs']:.3f} | {span(row['latency_ratio'], 3)} "
        f"| {row['top1']['value']:.1f} | {span(lost, 2, '+')} |"
    )


def table(network: str) -> str:
    found = rows(network)
    dense = found["dense"]["top1"]
    lines = [
        f"### {NETWORKS[network]}",
        "",
        f"Dense: {span(dense, 2)} % of {dense['n']:,} images.",
        "",
        "| asked for | done | params | MACs | latency | top-1, % | against dense, points |",
        "|---|---|---|---|---|---|---|",
        line("the dense network, trained as long as the trained arms", found["dense-trained"]),
    ]
    for metric in ("params", "latency"):
        shares = sorted({name.split("-")[-2] for name in found if name.endswith(metric)}, reverse=True)
        for share in shares:
            lines += [
                line(
                    words if metric == "params" else words.removeprefix("and repaired: "),
                    found[f"{arm}-{share}-{metric}"],
                )
                for arm, words in ARMS.items()
                if f"{arm}-{share}-{metric}" in found
            ]
    return "\n".join(lines)


def section() -> str:
    device = rows("resnet")["dense"]["environment"]["device"]
    tables = "\n\n".join(table(name) for name in NETWORKS if rows(name))
    machine = f"Machine: {device['cpu']}, {device['cores']} cores, busy with other work: read ratios."
    return f"{HEAD}\n{tables}\n\n{FINDINGS}\n{machine} Script: `benchmarks/low_rank.py`."


def chart() -> str:
    """Top-1 over the share of parameters kept, one panel for each network, as an SVG in the page's colours."""
    panels = [name for name in NETWORKS if rows(name)]
    width, height, left, top = 230, 220, 56, 30
    parts: list[str] = []
    for place, name in enumerate(panels):
        found = {stem: row for stem, row in rows(name).items() if stem.endswith("params")}
        shares = [row["params"] for row in found.values()]
        low, high = min(shares) - 0.03, max(shares) + 0.03
        reached = [row["top1"]["value"] for row in (*found.values(), rows(name)["dense"])]
        floor, ceiling = 10 * (int(min(reached)) // 10), 10 * (int(max(reached)) // 10 + 1)
        x0 = left + place * (width + 62)

        def x(share: float, x0: int = x0, low: float = low, high: float = high) -> float:
            return x0 + (share - low) / (high - low) * width

        def y(percent: float, floor: int = floor, ceiling: int = ceiling) -> float:
            return top + height - (percent - floor) / (ceiling - floor) * height

        parts.append(f'<text class="head" x="{x0}" y="{top - 12}">{NETWORKS[name]}</text>')
        for tick in range(floor, ceiling + 1, 10):
            parts.append(f'<line class="grid" x1="{x0}" x2="{x0 + width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
            parts.append(f'<text x="{x0 - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
        dense = rows(name)["dense"]["top1"]["value"]
        parts.append(f'<line class="dense" x1="{x0}" x2="{x0 + width}" y1="{y(dense):.1f}" y2="{y(dense):.1f}"/>')
        for colour, arm in zip(COLOURS, ARMS, strict=True):
            line_of = sorted(
                (r["params"], r["top1"]["value"]) for s, r in found.items() if s.rpartition("-0.")[0] == arm
            )
            points = [(x(share), y(percent)) for share, percent in line_of]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline style="stroke:{colour}" points="{path}"/>')
            parts += [f'<circle style="fill:{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in points]
        for share in sorted({round(float(stem.split("-")[-2]), 3) for stem in found}):
            parts.append(f'<text x="{x(share):.1f}" y="{top + height + 16}" text-anchor="middle">{share:g}</text>')
    bottom = top + height + 46
    for place, (colour, words) in enumerate(zip(COLOURS, ARMS.values(), strict=True)):
        a, b = left + (place % 2) * 400, bottom + (place // 2) * 20
        parts.append(
            f'<circle style="fill:{colour}" cx="{a}" cy="{b - 4}" r="4"/><text x="{a + 10}" y="{b}">{words}</text>'
        )
    style = (
        "text{font:12px system-ui,sans-serif;fill:#333}.head{font-weight:600}.grid{stroke:#ddd}"
        ".dense{stroke:#888;stroke-dasharray:4 3}polyline{fill:none;stroke-width:2}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}"
    )
    whole = left + len(panels) * (width + 62)
    title = "top-1, %, over the share of parameters kept; dashed: the dense network"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(whole, 820)} {bottom + 76}" role="img">'
        f"<title>{title}</title><style>{style}</style>"
        + "".join(parts)
        + f'<text x="{left}" y="{bottom + 64}">{title.replace("`", "")}</text></svg>\n'
    ).replace("`", "")
