"""The part of docs/results.md about elastic networks, and its drawing, from benchmarks/results/elastic/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.prune_tables import TOP, row

RESULTS = Path(__file__).parent / "results"
ARMS = {
    "family": "the family",
    "plain-sandwich": "the family, plain sandwich",
    "ranks-and-pixels": "the family, ranks and pixels",
    "alone": "alone, a fifth of the epochs",
    "alone-longer": "alone, as many epochs",
    "untrained-norms": "no training, norms re-estimated",
    "untrained-both": "no training, and layers refitted",
}
TITLES = {
    "mobilenetv2": "MobileNetV2, ImageNet sample, no training",
    "resnet": "ResNet-18, thin, CIFAR-10 (JPEG), 10 epochs of 9,000 images",
    "vit": "ViT, small, CIFAR-10 (JPEG), 5 epochs of 9,000 images",
}
HEAD = """\
## Once for all

Each row is one network: its exported file, timed against the dense one (batch 1, one thread of ONNX Runtime) and
evaluated beside it on the same images; intervals are 95 %. `elastic` trains a family once, `subnet` cuts every size out
of it, by 1,000 training images that it is not trained on. *Alone* is one size, chosen among untrained subnets by the
same search, and trained by `distill` with labels: for a fifth of the family's epochs, so that five of them have as many
in all, or for as many. A step of the family costs nearly three plain ones, as measured below.

![Top-1 of subnets](elastic.svg)"""


def rows(network: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "elastic" / network).glob("*.json"))}


def sizes(found: dict[str, Any], arm: str) -> list[tuple[str, Any]]:
    """Share and figures of the first seed, the largest first."""
    names = [name for name in found if name.startswith(f"{arm}-0.") and name.endswith("-0")]
    shares = sorted((name.removeprefix(f"{arm}-").rpartition("-")[0] for name in names), reverse=True)
    return [(share, found[f"{arm}-{share}-0"]) for share in shares]


def network(name: str) -> str:
    found = rows(name)
    lines = [f"### {TITLES[name]}", "", TOP]
    by_share: dict[str, list[str]] = {}
    for arm, words in ARMS.items():
        for share, one in sizes(found, arm):
            by_share.setdefault(share, []).append(row(f"{share}x-macs", words, [one]))
    for share in sorted(by_share, reverse=True):
        lines += by_share[share]
    return "\n".join(lines)


def cost() -> str:
    found = json.loads((RESULTS / "elastic_cost.json").read_text())
    gates = ", ".join(f"{short(name)} {ratio(one)}" for name, one in of(found["open_gates"]).items())
    steps = ", ".join(f"{name} {ratio(one)}" for name, one in of(found["step"]).items())
    cuts = ", ".join(
        f"{short(name)} {one['cut']:.2f} s ({one['cut_and_norms']:.1f} s with norms, {one['images']} images)"
        for name, one in of(found["cutting_out"]).items()
    )
    searched = found["searching"]
    models = "; ".join(f"{short(name)} {one['said']}" for name, one in of(found.get("latency_model", {})).items())
    return "\n".join(
        [
            "### What it costs",
            "",
            f"- A forward pass with all gates open, against none: {gates}.",
            f"- A training step against one of `finetune`: {steps}.",
            f"- Cutting the smallest subnet out: {cuts}.",
            f"- A search on the ResNet: {searched['evaluated']} subnets evaluated on {searched['images']:,} images,"
            f" {searched['alone']} more for single changes, {searched['proposed']:,} proposed, in"
            f" {searched['seconds']:.0f} s on one thread; tau {searched['tau']:.2f}.",
            *([f"- The latency model, on networks held out: {models}."] if models else []),
        ]
    )


def short(name: str) -> str:
    return name.rpartition(":")[2]


def of(part: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in part.items() if name != "environment"}


def ratio(one: dict[str, float]) -> str:
    return f"{one['ratio']:.3f}x (quartiles {one['quartile_low']:.3f}..{one['quartile_high']:.3f})"


def section() -> str:
    there = [name for name in TITLES if rows(name)]
    parts = [HEAD, *(network(name) for name in there)]
    if (RESULTS / "elastic_cost.json").exists():
        parts.append(cost())
    device = next(iter(rows(there[0]).values()))["environment"]["device"]
    machine = f"Machine: {device['cpu']}, {device['cores']} cores, busy with other work: read ratios."
    return "\n\n".join(parts) + f"\n\n{FINDINGS}\n{machine} Scripts: `benchmarks/elastic.py`, `elastic_cost.py`."


FINDINGS = """\
- ResNet: one training of ten epochs gives five networks that, from half of the operations down, beat five that were
  trained alone in as many epochs together: by 0.4 points at 0.5, 0.8 at 0.4 and 4.4 at 0.3. Above half each alone is
  better, by about a point: what is cut little needs little training, and the family's largest has drifted by then. A
  size that gets all ten epochs for itself is a point and a half better than the family's.
- The ramp (DepS) and the plain sandwich end within a quarter of a point of each other at every size, the sandwich a
  little ahead: from a pretrained start the ramp bought nothing here (one seed).
- ResNet, with ranks (half of the operations of 13 layers) and images of 24 pixels to choose from as well: worse at
  every size, by 2.4, 1.8, 1.8, 1.0 and 0.4 points, and slower for its operations, as at 0.5 with 0.67 of the latency
  against 0.51: two thin layers are two calls. More choices train worse together, so neither is there unless asked for.
- ViT: the family loses. Each size alone is better after its one epoch than the family after five, by 1.5, 0.9, 3.4,
  2.1 and 1.5 points, and with five epochs by 4.1 at 0.5. What a pretrained ViT loses to narrower widths comes back
  within an epoch; its subnets learn more slowly together, at the rate that keeps the largest.
- MobileNetV2 without training: with norms re-estimated it loses 10 points at 0.9 of the operations and 22 at 0.8; with
  layers refitted as well 6 and 9, where `prune` lost 18 at 0.8: a search that looks at accuracy finds a better network
  than a ranking. Nothing pays within a point. The subnets were chosen by 125 images.
- The searches evaluate 24 subnets for each size, on 1,000 images, where a point is within the noise.
"""


def chart() -> str:
    """Top-1 over operations, a line for each arm, one panel for each network, in the page's colours."""
    parts, y, left, width, height = [], 30, 60, 430, 190
    for name in (one for one in TITLES if rows(one)):
        found = rows(name)
        lines = {arm: [(one["macs"], one["top1"]["value"]) for _, one in sizes(found, arm)] for arm in ARMS}
        lines = {arm: points for arm, points in lines.items() if points}
        some = sizes(found, next(iter(lines)))[0][1]
        dense = some["top1"]["value"] + some["drop"]["value"]
        values = [dense, *(value for points in lines.values() for _, value in points)]
        low, high = min(values) - 1, max(values) + 1
        shares = [float(share) for arm in lines for share, _ in sizes(found, arm)]
        first, last = (edge([*shares, *(at for points in lines.values() for at, _ in points)]) for edge in (min, max))

        def x(share: float, first: float = first, last: float = last) -> float:
            return left + (share - first + 0.03) / (last - first + 0.06) * width

        def top(value: float, low: float = low, high: float = high, y: int = y) -> float:
            return y + 16 + (high - value) / (high - low) * height

        parts.append(f'<text class="head" x="{left}" y="{y}">{TITLES[name]}</text>')
        step = next(one for one in (1, 2, 5, 10, 20) if (high - low) / one <= 7)
        for tick in range(int(low // step + 1) * step, int(high) + 1, step):
            at = top(tick)
            parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{tick}</text>')
        for share in sorted(set(shares)):
            parts.append(f'<text x="{x(share):.1f}" y="{y + height + 34}" text-anchor="middle">{share:g}</text>')
        at = top(dense)
        parts.append(f'<line class="dense" x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}"/>')
        ends: list[float] = []
        for number, arm in enumerate(ARMS):
            if arm not in lines:
                continue
            places = [(x(at), top(value)) for at, value in sorted(lines[arm])]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="c{number}" points="{path}"/>')
            parts += [f'<circle class="d{number}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places]
            end = places[-1][1]
            while any(abs(end - other) < 14 for other in ends):
                end += 2
            ends.append(end)
            words = ARMS[arm]
            parts.append(f'<text class="t{number}" x="{left + width + 10}" y="{end + 4:.1f}">{words}</text>')
        y += height + 70
    colours = ("#1f5fa8", "#c2571a", "#b0418f", "#2f8f5b", "#8b5fbf", "#8a8a8a", "#1f5fa8")
    style = "text{font:12px system-ui,sans-serif;fill:#555}.head{font-weight:600}.grid{stroke:#8884}"
    style += ".dense{stroke:#888;stroke-dasharray:4 3}"
    for number, colour in enumerate(colours):
        style += f".c{number}{{stroke:{colour};fill:none;stroke-width:2}}.d{number},.t{number}{{fill:{colour}}}"
    title = "top-1, %, over the share of multiply-accumulates; dashed: the dense network"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {y}" role="img">'
        f"<title>{title}</title><style>{style}</style>"
        + "".join(parts)
        + f'<text x="{left + width / 2}" y="{y - 10}" text-anchor="middle">{title}</text></svg>\n'
    )
