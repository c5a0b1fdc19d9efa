"""The words of a report: its sentence, its step table, its figures with their units, and how they were measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from slim.bench.report import NOT_MEASURED, Report
from slim.measurement import Measurement
from slim.runs import Figures, Record

COLUMNS = {
    "params": "params",
    "macs": "MACs",
    "size_bytes": "size",
    "latency_p50_ms": "latency",
    "accuracy_top1": "top-1",
}
"""Metric -> heading of the step table, in its order."""


class Row(NamedTuple):
    """One line of the step table."""

    label: str
    kind: str
    figures: Figures
    verdict: str
    reason: str
    step: Record | None = None


def rows(report: Report) -> list[Row]:
    """The step table: the dense network, each step, what ships."""
    # A network trained before anything is cut is what the cuts are compared with: `dense` stands after its training.
    trained = report.steps[0].role == "repair" and report.steps[0].outcome == "kept" if report.steps else False
    leading = sum(trained and step.stage == report.steps[0].stage for step in report.steps)
    reason = "what the steps below are compared with" if leading else "the untouched network"
    steps = [Row(f"{s.position} {s.name}", s.outcome, s.figures, s.outcome, s.reason, s) for s in report.steps]
    ships = f"ships as {report.file}" if report.file else "the result"
    return [
        *steps[:leading],
        Row("dense", "dense", report.dense, "", reason),
        *steps[leading:],
        Row("final", "final", report.final, "", ships),
    ]


def number(figure: Measurement, *, sign: bool = False) -> str:
    """Value with unit: `0.55 ms`, `98.2 %`, `3.39 M`, `13.6 MB`, `0.73x`, `+0.2 points`."""
    value, unit = figure.value, figure.unit
    if unit in ("params", "macs"):
        return _scaled(value, ("", " k", " M", " G", " T"))
    if unit == "bytes":
        return _scaled(value, (" B", " kB", " MB", " GB", " TB"))
    digits = _digits(value, unit, figure.n)
    value = round(value, digits) or 0.0  # never -0.0
    text = f"{value:{'+' if sign and value else ''}.{digits}f}"
    return text + {"ratio": "x", "percent": " %"}.get(unit, f" {unit}")


def interval(figure: Measurement) -> str:
    """`0.53..0.57` in the figure's unit; empty for a figure that was counted."""
    if figure.low is None or figure.high is None:
        return ""
    digits = _digits(figure.value, figure.unit, figure.n)
    return f"{figure.low:.{digits}f}..{figure.high:.{digits}f}"


def headline(report: Report) -> str:
    """What came out, in one sentence: `0.55 ms instead of 0.75 ms (0.73x, 95 % 0.70..0.76), 98.0 % top-1 (...)`."""
    tried = [step for step in report.steps if step.outcome != "not run"]
    structure = [step for step in tried if step.role == "structure"]
    if tried and not any(step.outcome == "kept" for step in tried):
        return "Every stage was rolled back: what ships is the dense network."
    if structure and not any(step.outcome == "kept" for step in structure):
        ships = [report.final[m] for m in ("latency_p50_ms", "accuracy_top1") if m in report.final]
        figures = ", ".join(number(f) + (" top-1" if f.metric == "accuracy_top1" else "") for f in ships)
        return f"Every compression stage was rolled back: what ships is as large as it was{figures and f', {figures}'}."
    parts = [part for part in (_latency_words(report), _accuracy_words(report)) if part]
    if not parts:
        parts = [*_size_words(report), "latency and accuracy not measured"]
    elif len(parts) == 1:
        parts.append(f"{'accuracy' if _latency_words(report) else 'latency'} not measured")
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
    return f"{number(accuracy)} top-1{f' ({number(change, sign=True)})' if change else ''}" if accuracy else ""


def _size_words(report: Report) -> Iterator[str]:
    before, after = report.dense.get("params"), report.final.get("params")
    if before and after and before.value:
        yield f"{number(after)} parameters instead of {number(before)} ({after.value / before.value:.2f}x)"


def fed(report: Report) -> str:
    """What a pass changed of the input: `input 3x32x32 -> 3x24x24`; empty where it is what it was."""
    before, after = report.dense_input, report.final_input
    if before is None or after is None or before == after:
        return ""
    old, new = ({**one.model_dump(mode="json"), "size": _listed(one.size, "x")} for one in (before, after))
    changed = (f"{name} {as_text(old[name])} -> {as_text(new[name])}" for name in old if old[name] != new[name])
    return f"input {_listed(changed).removeprefix('size ')}"


def gain(figures: Figures) -> Measurement | None:
    """`top1_drop_points` turned round, so that better is positive as everywhere else on the page."""
    drop = figures.get("top1_drop_points")
    if drop is None:
        return None
    low, high = (None if end is None else -end for end in (drop.high, drop.low))
    return drop.model_copy(update={"value": -drop.value, "low": low, "high": high})


class Tile(NamedTuple):
    """One of the figures at the top of the page."""

    name: str
    after: Measurement | None
    before: Measurement | None
    share: float | None
    """What is left of `before`, as a ratio; none where less is not better."""
    change: Measurement | None
    """Points, better is positive."""


def tiles(report: Report) -> list[Tile]:
    """Latency, accuracy, parameters and size of what ships, against the dense network."""
    names = {"latency_p50_ms": "Latency", "accuracy_top1": "Top-1", "params": "Parameters", "size_bytes": "File size"}
    return [_tile(report, metric, name) for metric, name in names.items()]


def _tile(report: Report, metric: str, name: str) -> Tile:
    after, before = report.final.get(metric), report.dense.get(metric)
    if metric == "accuracy_top1":
        return Tile(name, after, before, None, gain(report.final))
    share = after.value / before.value if after and before and before.value else None
    if metric == "latency_p50_ms" and "latency_ratio" in report.final:
        share = report.final["latency_ratio"].value  # paired in one run: steadier than a quotient of two medians
    return Tile(name, after, before, share, None)


def method(report: Report) -> dict[str, str]:
    """How it was measured: heading -> words. What is not known is said, not left out."""
    timed = [row.figures["latency_p50_ms"] for row in rows(report) if "latency_p50_ms" in row.figures]
    judged = sorted({row.figures["accuracy_top1"].n for row in rows(report) if "accuracy_top1" in row.figures})
    device, guard, final = report.environment.get("device", {}), report.guard, report.final
    versions = report.environment.get("versions", {})
    cores = f"{device['cores']} cores" if "cores" in device else ""
    now = (("load", "load_average"), ("governor", "governor"), ("fingerprint", "fingerprint"))
    spent = {kind: sum(s.seconds.get(kind, 0.0) for s in report.steps) for s in report.steps for kind in s.seconds}
    parity, agreement = final.get("parity_max_abs"), final.get("top1_agreement")
    return {
        "Target": report.target or f"none, so latency was {NOT_MEASURED}",
        "Latency": _timed_words(timed[-1]) if timed else NOT_MEASURED,
        "Threads": _conditions(timed[-1]) if timed else NOT_MEASURED,
        "Peak memory": _memory(report) or NOT_MEASURED,
        "A/A control": _control(report) or NOT_MEASURED,
        "Accuracy": f"top-1 on {_listed(judged, ' or ')} images" if judged else NOT_MEASURED,
        "Data": _data_words(report),
        "Parity": f"largest difference {parity.value:.2g} from torch to the file" if parity else NOT_MEASURED,
        "Agreement": f"{number(agreement)} of answers equal the dense network's" if agreement else NOT_MEASURED,
        "Guard": f"rolls back a stage that drops over {guard.max_drop:.1f} points or gains under {guard.min_gain:.1f} %"
        if guard.on
        else "off: every stage was kept whatever it cost",
        "Machine": _listed((device.get("cpu"), cores, " ".join(device.get("isa", ())), device.get("os")))
        or "not recorded",
        "Its state": _listed(
            f"{word} {report.environment[key]}" for word, key in now if report.environment.get(key) is not None
        )
        or "not recorded",
        "Versions": _listed(f"{name} {version}" for name, version in versions.items()) or "not recorded",
        "Time spent": _listed(f"{kind} {seconds:.1f} s" for kind, seconds in spent.items()) or "not recorded",
        "Seed": str(report.seed),
    }


def _listed(words: Iterable[object], between: str = ", ") -> str:
    return between.join(str(word) for word in words if word)


def _data_words(report: Report) -> str:
    if report.data is None:
        return f"none, so accuracy was {NOT_MEASURED}"
    counts = {"training": report.data.train, "validation": report.data.val}
    images = (f"{count} {split} images" for split, count in counts.items() if count is not None)
    return _listed((report.data.source, *images, report.data.id))


def _timed_words(timed: Measurement) -> str:
    together = ", all files in turn in one run" if timed.details.get("in_turn_with") else ""
    return f"{timed.statistic or 'median'} of {timed.n} calls{together}"


def _conditions(timed: Measurement) -> str:
    bound = timed.details.get("cpus")
    pinned = f"bound to cores {_listed(bound)}" if bound else "not bound to a core"
    waiting = "spinning" if timed.details.get("spinning") else "waiting without spinning"
    return f"{timed.details.get('threads', 'unknown')} in a call, {pinned}, {waiting}"


def _memory(report: Report) -> str | None:
    """Largest memory of the process that ran the file, the interpreter and the runtime included."""
    peaks = {}
    for name, figures in (("", report.final), ("dense ", report.dense)):
        timed = figures.get("latency_p50_ms")
        if timed is not None and timed.details.get("peak_memory_bytes"):
            value = timed.details["peak_memory_bytes"]
            peaks[name] = number(Measurement(metric="peak_memory_bytes", value=value, unit="bytes"))
    return _listed(f"{name}{peak}" for name, peak in peaks.items()) + " with the runtime" if peaks else None


def _control(report: Report) -> str | None:
    """The latest A/A control: a file timed against itself, which ought to give 1."""
    for figures in (report.final, *(step.figures for step in reversed(report.steps))):
        found = figures["latency_ratio"].details.get("control") if "latency_ratio" in figures else None
        if found is not None:
            fit = "" if found.get("fit", True) else "; unfit, so this machine could not judge latency"
            return f"a file against itself: {found['value']:.3f}x, 95 % {found['low']:.3f}..{found['high']:.3f}{fit}"
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


def printable(text: str) -> str:
    """Without what could drive a terminal, and what no XML may hold: names and reasons come from files."""
    return "".join(one if one.isprintable() else "?" for one in text)


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
