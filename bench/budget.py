"""Budgets: limits in a file, and the verdict on each against what was measured.

    format: slim-budgets/1
    target: ort:cpu,threads=1
    budgets:
      - {metric: size_bytes, max: 9000000}
      - {metric: latency_ratio, max: 0.8}
      - {metric: latency_p50_ms, max: 4.0, device: 3f2a90c1d77e}

What is counted is judged first, then ratios to a reference timed in the same job, then milliseconds: these only on the
device the budget names by its fingerprint (`slim doctor` prints it), because elsewhere they say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self
from xml.etree import ElementTree

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slim.bench import latency
from slim.errors import RecipeError, SlimError, UsageError, did_you_mean
from slim.export.target import Target
from slim.measurement import Measurement
from slim.recipe import plain_yaml

FORMAT = "slim-budgets/1"


class _Kind(NamedTuple):
    unit: str
    order: int
    """0 counted on the file or on fixed images, 1 a ratio of timings, 2 a timing."""
    source: str
    """Where the figure comes from, for those who lack it."""


METRICS = {
    "size_bytes": _Kind("bytes", 0, "the exported file"),
    "params": _Kind("params", 0, "the run's final artifact; a plain .onnx file does not give it"),
    "macs": _Kind("macs", 0, "the run's final artifact; a plain .onnx file does not give it"),
    "top1_agreement": _Kind("percent", 0, "the files run on the same images; give --data"),
    "top1_drop_points": _Kind("points", 0, "the files run on the same labelled images; give --data"),
    "fusion_coverage": _Kind("percent", 0, "the graph of an int8 file; a float file has none"),
    "latency_ratio": _Kind("ratio", 1, "a comparison with dense.onnx of the run; it must lie beside the candidate"),
    "latency_p50_ms": _Kind("ms", 2, "timing the exported file on this machine"),
    "latency_p95_ms": _Kind("ms", 2, "timing the exported file on this machine, at least 59 calls"),
}
"""metric -> unit of its limits, order of judging, source. Percent runs from 0 to 100."""

Outcome = Literal["pass", "fail", "inconclusive", "unavailable"]
EXIT_CODES: dict[Outcome, int] = {"fail": 3, "unavailable": 5, "inconclusive": 4, "pass": 0}
"""Exit code of each outcome, the gravest first."""


class Budget(BaseModel):
    """One limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: str
    """A key of METRICS."""
    max: float | None = Field(default=None, strict=True, allow_inf_nan=False)
    """Largest value allowed, in the metric's unit."""
    min: float | None = Field(default=None, strict=True, allow_inf_nan=False)
    """Smallest value allowed, in the metric's unit."""
    device: str | None = Field(default=None, min_length=1)
    """Fingerprint of the only machine this latency budget is for; required for milliseconds to be judged at all."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}{did_you_mean(self.metric, METRICS)}")
        if (self.max is None) == (self.min is None):
            raise ValueError(f"{self.metric} needs exactly one of max and min")
        if self.device and METRICS[self.metric].order == 0:
            raise ValueError(f"{self.metric} is the same on every device; remove device: {self.device}")
        return self

    @property
    def bound(self) -> Literal["max", "min"]:
        """Which of the two the limit is."""
        return "min" if self.max is None else "max"

    @property
    def limit(self) -> float:
        """The limit, in the metric's unit."""
        found = self.min if self.max is None else self.max
        assert found is not None, "exactly one is set: checked when built"
        return found

    def __str__(self) -> str:
        return f"{self.metric} {self.bound} {self.limit:.15g}"


class Budgets(BaseModel):
    """A budgets file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["slim-budgets/1"]
    target: str
    """Where the latencies are to be taken, in the words of `--target`."""
    budgets: tuple[Budget, ...] = Field(min_length=1)


class Verdict(BaseModel):
    """What became of one budget."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    budget: Budget
    outcome: Outcome
    unit: str
    value: float | None = None
    """The figure; none when it was not taken."""
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    """How far the figure lies beyond the limit, in `unit`; negative is to spare."""
    detectable: float | None = None
    """Half width of the interval; a limit on a timing that is nearer to the figure than this cannot be decided."""
    message: str
    """One line: figure, limit, by how much."""


def load(path: Path) -> Budgets:
    """The budgets in the YAML file at `path`.

    Raises:
        UsageError: no such file.
        RecipeError: not YAML, an unknown key or metric, not exactly one of max and min; names file and place.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --budgets takes a YAML file that begins with 'format: {FORMAT}'")
    try:
        found = plain_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: holds {type(found).__name__}, not keys; it must begin with 'format: {FORMAT}'")
    try:
        budgets = Budgets.model_validate(found)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from error
    try:
        Target.parse(budgets.target)
    except UsageError as error:
        raise RecipeError(f"{path}: {error}") from error
    return budgets


def judge(budgets: Sequence[Budget], figures: Mapping[str, Measurement], *, fingerprint: str) -> tuple[Verdict, ...]:
    """A verdict on each budget: counted figures first, then ratios, then milliseconds. figures: by metric name.

    Raises:
        UsageError: a budget whose figure was not taken, though this machine could have.
        SlimError: a figure in another unit than its limit.
    """
    return tuple(
        _judged(budget, figures, fingerprint) for budget in sorted(budgets, key=lambda b: METRICS[b.metric].order)
    )


def needs(budgets: Sequence[Budget], *, fingerprint: str) -> frozenset[str]:
    """Metrics that `judge` will want a figure for on the machine with this fingerprint."""
    return frozenset(budget.metric for budget in budgets if _elsewhere(budget, fingerprint) is None)


def exit_code(verdicts: Sequence[Verdict], *, allow_inconclusive: bool = False) -> int:
    """0 all within; 3 one missed; else 5 one not judged here; else 4 one undecided, unless that is allowed."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if allow_inconclusive:
        outcomes.discard("inconclusive")
    return next((code for outcome, code in EXIT_CODES.items() if outcome in outcomes), 0)


def to_console(verdicts: Sequence[Verdict]) -> str:
    """A plain text table, one line for each budget, and a line for each that did not pass."""
    rows = [("budget", "measured", "margin", "verdict"), *map(_cells, verdicts)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    remarks = [f"{verdict.outcome}: {verdict.message}" for verdict in verdicts if verdict.outcome != "pass"]
    return "\n".join([*table, *remarks])


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """The same table for a pull request or a job summary."""
    head = ["| budget | measured | margin | verdict |", "|---|---|---|---|"]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(verdict)) + " |" for verdict in verdicts]
    remarks = [f"- **{verdict.outcome}**: {verdict.message}" for verdict in verdicts if verdict.outcome != "pass"]
    return "\n".join([*head, *rows, *([""] if remarks else []), *remarks])


def to_json(verdicts: Sequence[Verdict], *, allow_inconclusive: bool = False) -> str:
    """`{"format": "slim-gate/1", "exit_code": ..., "verdicts": [...]}`."""
    code = exit_code(verdicts, allow_inconclusive=allow_inconclusive)
    dumped = [verdict.model_dump(mode="json") for verdict in verdicts]
    return json.dumps({"format": "slim-gate/1", "exit_code": code, "verdicts": dumped}, indent=2)


def to_junit(verdicts: Sequence[Verdict]) -> str:
    """JUnit XML: a budget is a test case; what was not decided is skipped, with its message, never passed."""
    outcomes = [verdict.outcome for verdict in verdicts]
    failures = outcomes.count("fail")
    skipped = outcomes.count("inconclusive") + outcomes.count("unavailable")
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "slim gate", **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "slim.gate", "name": str(verdict.budget)})
        if verdict.outcome == "fail":
            ElementTree.SubElement(case, "failure", {"message": verdict.message})
        elif verdict.outcome != "pass":
            ElementTree.SubElement(case, "skipped", {"message": f"{verdict.outcome}: {verdict.message}"})
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _elsewhere(budget: Budget, fingerprint: str) -> str | None:
    """Why the budget cannot be judged on this machine; none if it can."""
    if budget.device and budget.device != fingerprint:
        return f"is for device {budget.device}, this is {fingerprint}; run the gate there"
    if METRICS[budget.metric].order == 2 and not budget.device:
        return (
            f"names no device, and milliseconds of another machine say nothing; add device: {fingerprint} if this is it"
        )
    return None


def _judged(budget: Budget, figures: Mapping[str, Measurement], fingerprint: str) -> Verdict:
    kind = METRICS[budget.metric]
    if reason := _elsewhere(budget, fingerprint):
        return Verdict(budget=budget, outcome="unavailable", unit=kind.unit, message=f"{budget} {reason}")
    if budget.metric not in figures:
        raise UsageError(f"budgets: {budget.metric} was not measured; it comes from {kind.source}")
    figure = figures[budget.metric]
    if figure.unit != kind.unit:
        raise SlimError(f"budgets: {budget.metric} was measured in {figure.unit}, its limit is in {kind.unit}")
    outcome = _outcome(figure, budget, kind)
    margin = figure.value - budget.limit if budget.bound == "max" else budget.limit - figure.value
    detectable = None if figure.low is None or figure.high is None else (figure.high - figure.low) / 2
    return Verdict(
        budget=budget,
        outcome=outcome,
        unit=kind.unit,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        margin=margin,
        detectable=detectable,
        message=_message(budget, figure, outcome, margin, detectable),
    )


def _outcome(figure: Measurement, budget: Budget, kind: _Kind) -> Outcome:
    """By the interval for what is timed, by the figure itself for what is counted.

    Points lost and answers agreed on are counted on fixed images: measured again they are the same, so a verdict on the
    figure cannot flap. Their interval says how other images might fare, and 500 images could hardly ever decide a limit
    of one point by it. The guard of slim/pipeline.py judges points the same way.
    """
    if kind.order == 0:
        figure = figure.model_copy(update={"low": None, "high": None})
    return latency.verdict(figure, budget.limit, bound=budget.bound)


def _message(budget: Budget, figure: Measurement, outcome: Outcome, margin: float, detectable: float | None) -> str:
    share = f" ({abs(margin / budget.limit):.1%})" if budget.limit else ""
    beyond = f"{_number(abs(margin))} {figure.unit}{share}"
    words = f"{figure.metric} is {figure}, {budget.bound} {_number(budget.limit)}"
    if outcome == "pass":
        return f"{words}: within by {beyond}"
    if outcome == "fail":
        return f"{words}: missed by {beyond}"
    control = figure.details.get("control")
    if control and not control["fit"]:
        seen = f"{control['value']:.3f} ({control['low']:.3f}..{control['high']:.3f})"
        return f"{words}: the reference against itself gave {seen}; quieten this machine and measure again"
    return f"{words}: the interval holds the limit; this run tells {_number(detectable or 0)} {figure.unit} apart"


def _cells(verdict: Verdict) -> tuple[str, str, str, str]:
    if verdict.value is None or verdict.margin is None:
        return str(verdict.budget), "not measured", "", verdict.outcome
    measured = f"{_number(verdict.value)} {verdict.unit}"
    if verdict.detectable is not None:
        measured += f" +-{_number(verdict.detectable)}"
    return (
        str(verdict.budget),
        measured,
        f"{'+' if verdict.margin > 0 else ''}{_number(verdict.margin)}",
        verdict.outcome,
    )


def _number(value: float) -> str:
    """Whole numbers in full, for bytes and parameters; others to four digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


def _explain(error: ValidationError) -> str:
    """The first thing pydantic found, in one line: place, value, rule, way out."""
    # A misspelt key is also a missing one; its own name helps more.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    *parents, last = first["loc"] or ("",)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parents).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = (Budget if parents else Budgets).model_fields
        return f"{place + ': ' if place else ''}unknown key {last!r}{did_you_mean(str(last), known)}"
    whole = f"{place}[{last}]" if isinstance(last, int) else f"{place}.{last}".lstrip(".")
    if first["type"] == "missing":
        return f"{whole}: is missing; every budgets file needs format, target and budgets, every budget a metric"
    rule = first["msg"].removeprefix("Value error, ")
    return f"{whole}: {rule}" if first["type"] == "value_error" else f"{whole}: {first['input']!r}: {rule}"
