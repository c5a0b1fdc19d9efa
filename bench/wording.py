"""The words of a report: its sentence, its step table, its figures with their units, and how they were measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from slim.bench.report import NOT_MEASURED, Figures, Report, StepReport
from slim.measurement import Measurement

COLUMNS = ("params", "macs", "size_bytes", "latency_p50_ms", "accuracy_top1")
"""Metrics of the step table, in its order."""


class Row(NamedTuple):
    """One line of the step table."""

    label: str
    kind: str
    figures: Figures
    verdict: str
    reason: str
    step: StepReport | None = None


def rows(report: Report) -> list[Row]:
    """The step table: the dense network, each step, what ships."""
    steps = [Row(f"{s.position} {s.name}", s.outcome, s.figures, s.outcome, s.reason, s) for s in report.steps]
    ships = f"ships as {report.file}" if report.file else "the result"
    return [
        Row("dense", "dense", report.dense, "", "the untouched network"),
        *steps,
        Row("final", "final", report.final, "", ships),
    ]


def number(figure: Measurement, sign: bool = False) -> str:
    """Value with unit: `0.55 ms`, `98.2 %`, `3.39 M`, `13.6 MB`, `0.73x`, `+0.2 points`."""
    value, unit = figure.value, figure.unit
    if unit in ("params", "macs"):
        return _scaled(value, ("", " k", " M", " G", " T"))
    if unit == "bytes":
        return _scaled(value, (" B", " kB", " MB", " GB", " TB"))
    digits = _digits(value, unit, figure.n)
    text = f"{value:{'+' if sign and round(value, digits) else ''}.{digits}f}"
    return text + {"ratio": "x", "percent": " %"}.get(unit, f" {unit}")


def interval(figure: Measurement) -> str:
    """`0.53..0.57` in the figure's unit; empty for a figure that was counted."""
    if figure.low is None or figure.high is None:
        return ""
    digits = max(_digits(end, figure.unit, figure.n) for end in (figure.low, figure.high))
    return f"{figure.low:.{digits}f}..{figure.high:.{digits}f}"


def headline(report: Report) -> str:
    """What came out, in one sentence: `0.55 ms instead of 0.75 ms (0.73x, 95 % 0.70..0.76), 98.0 % top-1 (...)`."""
    tried = [step for step in report.steps if step.outcome != "not run"]
    structure = [step for step in tried if step.role == "structure"]
    if tried and not any(step.outcome == "kept" for step in tried):
        return "Every stage was rolled back: what ships is the dense network."
    parts = [part for part in (_latency_words(report), _accuracy_words(report)) if part]
    if not parts:
        parts = [*_size_words(report), "latency and accuracy not measured"]
    elif len(parts) == 1:
        parts.append(f"{'accuracy' if _latency_words(report) else 'latency'} not measured")
    if structure and not any(step.outcome == "kept" for step in structure):
        parts.insert(0, "every compression stage was rolled back")
    text = ", ".join(parts)
    return text[0].upper() + text[1:]


def _latency_words(report: Report) -> str:
    before, after = report.dense.get("latency_p50_ms"), report.final.get("latency_p50_ms")
    ratio = report.final.get("latency_ratio")
    if not after:
        return ""
    unclear = ratio is not None and ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high
    spread = f", 95 % {interval(ratio)}" if ratio and interval(ratio) else ""
    share = f" ({number(ratio)}{spread}{': no clear difference' if unclear else ''})" if ratio else ""
    return f"{number(after)}{f' instead of {number(before)}' if before else ''}{share}"


def _accuracy_words(report: Report) -> str:
    accuracy, change = report.final.get("accuracy_top1"), gain(report.final)
    return f"{number(accuracy)} top-1{f' ({number(change, True)})' if change else ''}" if accuracy else ""


def _size_words(report: Report) -> Iterator[str]:
    before, after = report.dense.get("params"), report.final.get("params")
    if before and after and before.value:
        yield f"{number(after)} parameters instead of {number(before)} ({after.value / before.value:.2f}x)"


def gain(figures: Figures) -> Measurement | None:
    """`top1_drop_points` turned round, so that better is positive as everywhere else on the page."""
    drop = figures.get("top1_drop_points")
    if drop is None:
        return None
    low, high = (None if end is None else -end for end in (drop.high, drop.low))
    return drop.model_copy(update={"value": -drop.value, "low": low, "high": high})


def _tiles(report: Report) -> list[dict[str, Any]]:
    """The four figures at the top of the page: name, after, before, and the share that is left (none: no bar)."""
    names = {
        "latency_p50_ms": "Latency",
        "accuracy_top1": "Top-1 accuracy",
        "params": "Parameters",
        "size_bytes": "File size",
    }
    tiles = []
    for metric, name in names.items():
        after, before = report.final.get(metric), report.dense.get(metric)
        share = after.value / before.value if after and before and before.value and metric != "accuracy_top1" else None
        if share is not None and metric == "latency_p50_ms" and "latency_ratio" in report.final:
            share = report.final["latency_ratio"].value  # paired in one run: steadier than a quotient of two medians
        change = gain(report.final) if metric == "accuracy_top1" else None
        tiles.append({"name": name, "after": after, "before": before, "share": share, "change": change})
    return tiles


def _method(report: Report) -> Iterator[tuple[str, str]]:
    """How it was measured: (heading, words)."""
    device, versions = report.environment.get("device", {}), report.environment.get("versions", {})
    yield "Target", report.target or f"none: latency {NOT_MEASURED}"
    timed = [row.figures["latency_p50_ms"] for row in rows(report) if "latency_p50_ms" in row.figures]
    if timed:
        statistic = f", {timed[-1].statistic} of them" if timed[-1].statistic else ""
        yield "Timed calls", f"{timed[-1].n} for each file{statistic}; intervals are 95 %, by bootstrap"
    control = _control(report)
    if timed:
        yield "A/A control", control or NOT_MEASURED
    data = report.data
    counts = {"training": data.train, "validation": data.val} if data else {}
    images = ", ".join(f"{count} {split} images" for split, count in counts.items() if count is not None)
    yield "Data", "; ".join(filter(None, (data.source, images, data.id))) if data else f"none: accuracy {NOT_MEASURED}"
    judged = {row.figures["accuracy_top1"].n for row in rows(report) if "accuracy_top1" in row.figures}
    if judged:
        yield "Accuracy", f"top-1 of the exported file on {' / '.join(map(str, sorted(judged)))} images"
    for metric, words in (("parity_max_abs", "largest difference"), ("top1_agreement", "agreement with dense")):
        if metric in report.final:
            figure = report.final[metric]
            shown = f"{figure.value:.2g}" if metric == "parity_max_abs" else number(figure)
            yield {"parity_max_abs": "Parity"}.get(metric, "Top-1 agreement"), f"{words} {shown}, n={figure.n}"
    rule = f"rolls back a stage that costs over {report.guard.max_drop:g} points or gives under {report.guard.min_gain:g} %"
    yield "Guard", rule if report.guard.on else "off: every stage was kept whatever it cost"
    cores = f"{device['cores']} cores" if "cores" in device else ""
    machine = (device.get("cpu", ""), cores, " ".join(device.get("isa", [])), device.get("os", ""))
    yield "Machine", ", ".join(filter(None, machine)) or "not recorded"
    state = {"load": "load_average", "governor": "governor", "fingerprint": "fingerprint"}
    known = [
        f"{word} {report.environment[key]}" for word, key in state.items() if report.environment.get(key) is not None
    ]
    yield "Its state", ", ".join(known) or "not recorded"
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"
    spent = {kind: sum(s.seconds.get(kind, 0.0) for s in report.steps) for s in report.steps for kind in s.seconds}
    yield "Time spent", ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent.items()) or "not recorded"
    yield "Seed", str(report.seed)


def _control(report: Report) -> str | None:
    """The latest A/A control: a file timed against itself, which ought to give 1."""
    for figures in (report.final, *(step.figures for step in reversed(report.steps))):
        found = figures["latency_ratio"].details.get("control") if "latency_ratio" in figures else None
        if isinstance(found, Mapping) and "value" in found:
            words = f"the dense file against itself: {found['value']:.3f}x"
            ends = found.get("low"), found.get("high")
            return words + (f", 95 % {ends[0]:.3f}..{ends[1]:.3f}" if None not in ends else "")
        if found is not None:
            return as_text(found)
    return None


def as_table(value: JsonValue) -> tuple[list[str], list[list[str]]] | None:
    """Columns and rows of a list or mapping of flat records that share keys; none when it is not one."""
    records = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(records, list) or len(records) < 2 or not all(isinstance(r, dict) and r for r in records):
        return None
    mappings = [record for record in records if isinstance(record, dict)]
    columns = list(mappings[0])
    if any(list(record) != columns for record in mappings) or len(columns) > 8:
        return None
    names = [[name] for name in value] if isinstance(value, dict) else [[] for _ in mappings]
    heads = ["", *columns] if isinstance(value, dict) else columns
    return heads, [[*name, *map(as_text, r.values())] for name, r in zip(names, mappings, strict=True)]


def as_text(value: JsonValue) -> str:
    """A JSON value on one line; a bare string without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 else 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{units[power]}"


def _digits(value: float, unit: str, n: int) -> int:
    if unit in ("percent", "points"):
        return 2 if n > 1000 else 1  # one image more or less shows in the last digit
    if unit == "ratio":
        return 2
    size = abs(value)
    return 3 if 0 < size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0
