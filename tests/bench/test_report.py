"""The report: what it says, what it must never do, and where its charts put things."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError
from rich.console import Console

from slim.artifact import Preprocessing
from slim.bench import charts, report, wording
from slim.bench.report import DataUsed, Report
from slim.errors import StoreError
from slim.measurement import Measurement
from slim.pipeline import Guard
from slim.runs import Record

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"
VOID = {"meta", "br", "img", "link", "input", "hr"}


def figure(metric: str, value: float, spread: float | None = None, **fields: Any) -> Measurement:
    units = {"params": "params", "macs": "macs", "size_bytes": "bytes", "latency_p50_ms": "ms"}
    units |= {"latency_ratio": "ratio", "accuracy_top1": "percent", "top1_drop_points": "points"}
    ends = {} if spread is None else {"low": value - spread, "high": value + spread}
    return Measurement(**{"metric": metric, "value": value, "unit": units[metric], "n": 500, **ends, **fields})


def network(ms: float | None = None, top1: float | None = None, *more: Measurement, scale: float = 1.0) -> Any:
    found = [figure("params", 3.4e6 * scale), figure("macs", 37.4e6 * scale), figure("size_bytes", 13.6e6 * scale)]
    found += [figure("latency_p50_ms", ms, 0.01, statistic="p50")] if ms is not None else []
    found += [figure("accuracy_top1", top1, 1.2)] if top1 is not None else []
    return {f.metric: f for f in (*found, *more)}


def step(position: int, name: str, outcome: str, figures: Any = None, **fields: Any) -> Record:
    role = "repair" if name == "finetune" else "structure"
    defaults = {"role": role, "stage": position, "config": {"ratio": 0.5}, "reason": "because"}
    return Record.model_validate(
        {"position": position, "name": name, "outcome": outcome, "figures": figures or {}, **defaults, **fields}
    )


def ratio(value: float, low: float, high: float, fit: bool = True) -> Measurement:
    control = {"value": 1.002, "low": 0.991, "high": 1.013, "fit": fit}
    return figure("latency_ratio", value, low=low, high=high, details={"control": control})


def demo(**fields: Any) -> Report:
    """Trained, cut and repaired; a second cut was rolled back."""
    steps = (
        step(1, "finetune", "kept", network(0.75, 98.2)),
        step(2, "low-rank", "kept", network(0.55, 97.0, ratio(0.73, 0.70, 0.76), scale=0.5), stage=2),
        step(3, "finetune", "kept", network(0.55, 98.0, scale=0.5), stage=2),
        step(4, "low-rank", "rolled back", network(0.46, 91.6, ratio(0.84, 0.81, 0.87), scale=0.2), stage=3),
        step(5, "finetune", "not run", stage=3),
    )
    drop = figure("top1_drop_points", 0.2, 0.8)
    values = {
        "model": "convnext_atto",
        "target": "ort:cpu,threads=1,batch=1,precision=fp32",
        "data": DataUsed(source="digits", id="full:9f2c", train=1297, val=500),
        "guard": Guard(max_drop=1.0, min_gain=2.0, on=True),
        "environment": {"device": {"cpu": "Example 9000", "cores": 2, "isa": ["avx2"]}, "versions": {"torch": "2.15"}},
        "dense": network(0.75, 98.2),
        "steps": steps,
        "final": network(0.55, 98.0, ratio(0.73, 0.70, 0.76), drop, scale=0.5),
        "file": "bundle/model.onnx",
    }
    return Report(**(values | fields))


def all_rolled_back() -> Report:
    steps = (
        step(1, "low-rank", "rolled back", network(0.78, None, ratio(1.04, 1.01, 1.07))),
        step(2, "low-rank", "rolled back", network(0.46, 91.6)),
    )
    return demo(steps=steps, final=network(0.75, 98.2))


def unmeasured() -> Report:
    steps = (step(1, "low-rank", "kept", network(scale=0.5), reason="not measured"),)
    blank = {"target": None, "data": None, "environment": {}, "file": None}
    return demo(dense=network(), steps=steps, final=network(scale=0.5), **blank)


def hostile() -> Report:
    """A report whose every free text tries to break out of the page."""
    plan = {HOSTILE: {HOSTILE: HOSTILE}, "layers": {f"{HOSTILE}{i}": {HOSTILE: HOSTILE} for i in range(3)}}
    odd = Measurement(metric=HOSTILE, value=1, unit=HOSTILE, statistic=HOSTILE, low=0, high=2)
    figures = network(0.5, 90.0, ratio(0.73, 0.70, 0.76)) | {HOSTILE: odd}
    texts = {"name": HOSTILE, "reason": HOSTILE, "config": {HOSTILE: HOSTILE}, "plan": plan, "seconds": {HOSTILE: 1}}
    return demo(
        model=HOSTILE,
        target=HOSTILE,
        data=DataUsed(source=HOSTILE, id=HOSTILE),
        notices=(HOSTILE,),
        environment={"device": {"cpu": HOSTILE, "isa": [HOSTILE]}, "versions": {HOSTILE: HOSTILE}, "governor": HOSTILE},
        steps=(step(1, "low-rank", "kept", figures).model_copy(update=texts),),
        file=HOSTILE,
    )


REPORTS = [demo, all_rolled_back, unmeasured, hostile]


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag that was opened was closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def printed(subject: Report, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report.to_console(subject))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("make", REPORTS)
def test_page_is_well_formed_and_asks_for_nothing(make: Any) -> None:
    html = report.to_html(make())
    page = Page(html)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
    }
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "src", "xlink:href", "style")]
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face", style)
    policy = [attributes.get("content") for _, attributes in page.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(svg)  # raises if it is not XML


def test_hostile_texts_are_shown_as_they_are() -> None:
    page = Page(report.to_html(hostile()))
    assert page.text.count(HOSTILE) > 20
    assert page.text.count(HOSTILE) == page.text.count("<script>alert(1)</script>")  # `{{ 7 * 7 }}` stayed one text


def test_page_is_the_same_every_time() -> None:
    assert report.to_html(demo()) == report.to_html(demo())


@pytest.mark.parametrize("make", REPORTS)
def test_written_report_is_read_back_equal(make: Any, tmp_path: Path) -> None:
    report.write(make(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert report.load(tmp_path) == report.load(tmp_path / "report.json") == make()
    assert (tmp_path / "report.html").read_text() == report.to_html(make())


def test_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"absent/report\.json: cannot be written: No such file or directory"):
        report.write(demo(), tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text[: len(text) // 2], r"report\.json: the file: Invalid JSON.*run` writes it again"),
        (lambda text: text.replace("slim-report/1", "slim-report/9"), r"format: Input should be 'slim-report/1'"),
        (lambda text: text.replace('"seed"', '"sead"'), r"sead: Extra inputs are not permitted"),
        (
            lambda text: text.replace('"value":0.55', '"value":NaN'),
            r"latency_p50_ms\.value: Input should be a finite number",
        ),
    ],
)
def test_broken_report_is_refused_in_one_line(change: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(change(demo().model_dump_json()))
    with pytest.raises(StoreError, match=complaint) as caught:
        report.load(path)
    assert "\n" not in str(caught.value)


def test_missing_report_names_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"report\.json: cannot be read: No such file.*`slim run` writes it"):
        report.load(tmp_path)


def test_figure_that_is_no_number_cannot_enter_a_report() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        demo(final={"accuracy_top1": figure("accuracy_top1", math.nan)})


UNCLEAR = network(0.74, 98.0, ratio(0.99, 0.96, 1.02))


@pytest.mark.parametrize(
    ("subject", "sentence"),
    [
        (demo(), "0.55 ms instead of 0.75 ms (0.73x, 95 % 0.70..0.76), 98.0 % top-1 (-0.2 points)"),
        (all_rolled_back(), "Every stage was rolled back: what ships is the dense network."),
        (unmeasured(), "1.70 M parameters instead of 3.40 M (0.50x), latency and accuracy not measured"),
        (
            demo(final=UNCLEAR),
            "0.74 ms instead of 0.75 ms (0.99x, 95 % 0.96..1.02: no clear difference), 98.0 % top-1",
        ),
        (
            demo(steps=(step(1, "finetune", "kept"), step(2, "low-rank", "rolled back")), final=network(0.75, 98.2)),
            "Every compression stage was rolled back: what ships is as large as it was, 0.75 ms, 98.2 % top-1.",
        ),
        (demo(final=network(0.55)), "0.55 ms instead of 0.75 ms, accuracy not measured"),
        (demo(final={}, dense={}, steps=()), "Latency and accuracy not measured"),
    ],
)
def test_headline_says_what_came_out(subject: Report, sentence: str) -> None:
    assert wording.headline(subject) == sentence
    assert sentence in printed(subject, 120)
    assert sentence in Page(report.to_html(subject)).text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, ""),
        ({"size": (3, 24, 20)}, "input 3x32x32 -> 3x24x20"),
        ({"size": (3, 24, 24), "crop": 1.0}, "input 3x32x32 -> 3x24x24, crop 0.875 -> 1.0"),
        ({"interpolation": "bilinear"}, "input interpolation bicubic -> bilinear"),
    ],
)
def test_an_input_that_a_pass_changed_is_one_line(change: dict[str, Any], line: str) -> None:
    before = Preprocessing(size=(3, 32, 32))
    subject = demo(dense_input=before, final_input=before.model_copy(update=change))
    assert wording.fed(subject) == line
    shown = (*printed(subject, 120).splitlines(), *Page(report.to_html(subject)).words)
    assert [one.rstrip() for one in shown if one.startswith("input ")] == ([line] * 2 if line else [])
    assert wording.fed(demo(final_input=before)) == ""  # where it is not known, nothing is said


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.546, "ms", "0.55 ms"),
        (0.0463, "ms", "0.046 ms"),
        (12.34, "ms", "12.3 ms"),
        (1234.5, "ms", "1234 ms"),
        (13_612_000, "bytes", "13.6 MB"),
        (512, "bytes", "512 B"),
        (999_700, "params", "1.00 M"),
        (17_600_000_000, "macs", "17.6 G"),
        (0.734, "ratio", "0.73x"),
        (98.04, "percent", "98.0 %"),
        (-0.04, "points", "0.0 points"),
        (0.2, "points", "+0.2 points"),
    ],
)
def test_number_carries_its_unit(value: float, unit: str, text: str) -> None:
    assert wording.number(Measurement(metric="m", value=value, unit=unit, n=500), sign=unit == "points") == text


def test_accuracy_on_many_images_shows_what_one_image_changes() -> None:
    assert wording.number(Measurement(metric="m", value=76.128, unit="percent", n=50_000)) == "76.13 %"


def test_dense_stands_after_the_training_that_made_it() -> None:
    assert [row.label for row in wording.rows(demo())][:3] == ["1 finetune", "dense", "2 low-rank"]
    assert [row.label for row in wording.rows(all_rolled_back())][:2] == ["dense", "1 low-rank"]


def test_page_shows_verdicts_reasons_and_how_it_was_measured() -> None:
    page = Page(report.to_html(demo(notices=("one notice",)))).text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "rolled back : because",
        "not run",
        "one notice",
        "Example 9000",
        "torch 2.15",
        "full:9f2c",
        "p50 of 500",
    ):
        assert words in page
    assert "a file against itself: 1.002x, 95 % 0.991..1.013" in page
    assert "1297 training images, 500 validation images" in page


def test_unfit_machine_is_said() -> None:
    page = Page(report.to_html(demo(final=network(0.55, 98.0, ratio(0.7, 0.6, 0.8, fit=False))))).text
    assert "unfit, so this machine could not judge latency" in page


def test_what_was_not_measured_is_said_and_never_drawn() -> None:
    html = report.to_html(unmeasured())
    text = Page(html).text
    assert "none, so latency was not measured" in text
    assert "none, so accuracy was not measured" in text
    assert " ms" not in text
    assert 'viewBox="0 0 460' not in html
    assert printed(unmeasured(), 120).count("not measured") == 1 + 2 * 3 + 1  # headline, three rows, the reason


def test_long_plan_is_cut_with_a_note() -> None:
    layers = {f"layers.{i}.fc": {"rank": i, "full": 768} for i in range(800)}
    html = report.to_html(demo(steps=(step(1, "low-rank", "kept", network(0.5, 98.0), plan={"layers": layers}),)))
    text = Page(html).text
    assert "layers.499.fc" in text
    assert "layers.500.fc" not in text
    assert "800 entries; the first 500 are shown, report.json has them all" in text


@pytest.mark.parametrize("width", [120, 80])
@pytest.mark.parametrize("make", [demo, all_rolled_back, unmeasured])
def test_console_table_fits_and_loses_nothing(make: Any, width: int) -> None:
    text = printed(make(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    words = text.split()
    for row in wording.rows(make()):
        assert row.label.split()[-1] in words
    if make is demo:
        for word in ("0.54..0.56", "96.8..99.2", "rolled", "0.46", "3.40"):
            assert word in words


def test_console_prints_control_sequences_and_markup_as_text() -> None:
    text = printed(demo(steps=(step(1, "low-rank", "kept", reason="\x1b[2J[red]gone[/red]\r\u202e"),)), 120)
    assert "?[2J[red]gone[/red]??" in text
    assert "\x1b" not in text


def test_scatter_shows_every_measured_network_and_names_the_others() -> None:
    found = charts.scatter(demo())
    assert found is not None
    assert [point.label for point in found.points] == [
        "1 finetune",
        "dense",
        "2 low-rank",
        "3 finetune",
        "4 low-rank",
        "final",
    ]
    by_label = {point.label: point for point in found.points}
    assert by_label["4 low-rank"].x < by_label["final"].x < by_label["dense"].x  # faster is further left
    assert by_label["4 low-rank"].y > by_label["final"].y > by_label["dense"].y  # worse is further down
    assert all(point.across and point.upright for point in found.points)
    assert found.path.count("L") == 4  # the rolled-back network is not on the way
    found = charts.scatter(all_rolled_back())
    assert found is not None
    assert found.left_out == ["1 low-rank"]
    assert charts.scatter(unmeasured()) is None


def test_rolled_back_networks_are_hollow() -> None:
    html = report.to_html(demo())
    assert re.search(r'<g class="rolled-back"><title>4 low-rank: 0\.46 ms \(0\.45\.\.0\.47\)', html)
    assert ".rolled-back .dot { fill: var(--card)" in html


def test_wide_spread_of_accuracy_keeps_the_top_apart() -> None:
    found = charts.scatter(demo(dense=network(0.75, 9.8), final=network(0.55, 100.0)))
    assert found is not None
    assert found.stretched
    at = {point.label: point.y for point in found.points}
    # 98 and 91.6 lie 6.4 points apart, 91.6 and 9.8 lie 81.8: on a linear axis the one gap is 13 times the other.
    assert (at["4 low-rank"] - at["3 finetune"]) * 3 > at["dense"] - at["4 low-rank"]
    rows = [tick.at for tick in found.y_ticks]
    assert all(abs(one - other) >= charts.LINE for one, other in combinations(rows, 2))
    assert all(math.isfinite(point.y) for point in found.points)  # 100 % has no logarithm of its error


@pytest.mark.parametrize("count", [2, 6, 12])
def test_labels_never_overlap(count: int) -> None:
    """Networks as near each other as final and the last step are, all in one corner of the frame."""
    marks = [(430.0 - 2 * (i % 3), 40.0 + 3 * i) for i in range(count)]
    placed = charts.place_labels(marks, [f"{i} low-rank" for i in range(count)], [], charts.PLOT)
    for (one, _), (other, _) in combinations(placed, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    left, top, right, bottom = charts.PLOT
    for box, _ in placed:
        assert left <= box[0] <= box[2] <= right
        assert top <= box[1] <= box[3] <= bottom


@pytest.mark.parametrize(("low", "high"), [(0.43, 0.77), (0, 1), (74.1, 74.4), (12, 1900), (-3, 3)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:g}") <= 6 for tick in found)


def test_changes_are_against_what_a_step_was_given() -> None:
    steps = (
        step(1, "low-rank", "rolled back", network(0.50, 90.0), stage=1),
        step(2, "finetune", "rolled back", network(0.50, 92.0), stage=1),
        step(3, "low-rank", "kept", network(0.60, 97.0), stage=2),
        step(4, "finetune", "kept", network(0.60, 97.5), stage=2),
    )
    final = network(0.60, 97.5, figure("top1_drop_points", 0.7, 0.5))
    found = charts.changes(demo(steps=steps, final=final))
    given = [change.before.value if change.before else None for change in found]
    assert given == [None, 0.75, 0.50, 0.75, 0.60, 0.60]  # step 3 starts again from dense: stage 1 was rolled back
    points = [change.points.value if change.points else None for change in found]
    assert points == pytest.approx([None, -8.2, 2.0, -1.2, 0.5, -0.7])
    assert [change.source for change in found] == [0, 0, 1, 0, 3, 4]


def test_waterfall_colours_a_change_only_when_the_intervals_are_apart() -> None:
    found = charts.waterfall(demo())
    assert found is not None
    tones = {bar.label: (bar.ms_text, bar.ms_tone) for bar in found.bars}
    assert tones["2 low-rank"] == ("-0.20 ms", "better")
    assert tones["3 finetune"] == ("0.00 ms", "even")
    assert tones["final"] == ("0.55 ms", "whole")
    assert charts.waterfall(unmeasured()) is None


def test_waterfall_cuts_short_what_would_dwarf_the_rest() -> None:
    steps = (step(1, "low-rank", "kept", network(0.6, 98.0)), step(2, "low-rank", "kept", network(0.5, 97.8)))
    found = charts.waterfall(demo(dense=network(0.75, 9.8), steps=steps, final=network(0.5, 97.8)))
    assert found is not None
    assert [bar.clipped for bar in found.bars] == [False, True, False, False]
    small = found.bars[2].points
    assert small is not None
    assert small[1] - small[0] > charts.POINTS_REACH / 2
