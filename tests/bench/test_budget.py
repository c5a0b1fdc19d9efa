from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from slim.bench import budget
from slim.bench.budget import Budget, Verdict
from slim.errors import RecipeError, SlimError, UsageError
from slim.measurement import Measurement

HERE = "3f2a90c1d77e"
ELSEWHERE = "0123456789ab"
HEAD = "format: slim-budgets/1\ntarget: ort:cpu,threads=1\n"


def figure(metric: str, value: float, half_width: float | None = None, **details: Any) -> Measurement:
    ends = {} if half_width is None else {"low": value - half_width, "high": value + half_width}
    return Measurement(metric=metric, value=value, unit=budget.METRICS[metric].unit, details=details, **ends)


def judged(limit: Budget, *figures: Measurement) -> Verdict:
    (verdict,) = budget.judge([limit], {found.metric: found for found in figures}, fingerprint=HERE)
    return verdict


def written(folder: Path, text: str) -> Path:
    path = folder / "budgets.yaml"
    path.write_text(text)
    return path


# The file


def test_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        HEAD + "budgets:\n  - {metric: size_bytes, max: 9000000}\n  - {metric: top1_agreement, min: 97.5}\n"
        f"  - {{metric: latency_p50_ms, max: 4.0, device: {HERE}}}\n",
    )
    found = budget.load(path)
    assert found.target == "ort:cpu,threads=1"
    assert [str(item) for item in found.budgets] == [
        "size_bytes max 9000000",
        "top1_agreement min 97.5",
        "latency_p50_ms max 4",
    ]
    assert found.budgets[2].device == HERE


def test_a_limit_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    found = budget.load(written(tmp_path, HEAD + "budgets: [{metric: macs, max: 3e8}]"))
    assert found.budgets[0].limit == 300_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "budget: []", r"budgets\.yaml: unknown key 'budget'; did you mean 'budgets'\?"),
        (HEAD + "budgets: [{metric: params, max: 1}, {metric: macs, maxx: 1}]", r"\[1\]: unknown key 'maxx'.*'max'\?"),
        (HEAD + "budgets: [{metric: latency, max: 1}]", r"\[0\]: unknown metric 'latency'; did you mean 'latency_"),
        (HEAD + "budgets: [{metric: macs}]", r"budgets\[0\]: macs needs exactly one of max and min"),
        (HEAD + "budgets: [{metric: macs, max: 2, min: 1}]", r"budgets\[0\]: macs needs exactly one of max and min"),
        (HEAD + "budgets: [{metric: macs, max: on}]", r"budgets\[0\]\.max: 'on': Input should be a valid number"),
        (HEAD + "budgets: [{metric: macs, max: 300M}]", r"budgets\[0\]\.max: '300M': Input should be a valid number"),
        (HEAD + "budgets: [{metric: macs, max: .nan}]", r"budgets\[0\]\.max: nan: Input should be a finite number"),
        (HEAD + "budgets: [{metric: macs, max: true}]", r"budgets\[0\]\.max: True: Input should be a valid number"),
        (HEAD + "budgets: [{max: 1}]", r"budgets\[0\]\.metric: is missing"),
        (HEAD + "budgets: [{metric: macs, max: 1, device: abc}]", r"macs is the same on every device; remove device"),
        (HEAD + "budgets: [macs]", r"budgets\[0\]: 'macs'"),
        (HEAD + "budgets: []", r"budgets: \[\]: .*at least 1 item"),
        (HEAD, r"budgets: is missing"),
        ("target: ort:cpu\nbudgets: [{metric: macs, max: 1}]", r"format: is missing"),
        (HEAD.replace("/1", "/2") + "budgets: [{metric: macs, max: 1}]", r"format: 'slim-budgets/2': .*-budgets/1'"),
        (HEAD.replace("ort:cpu", "ort:gpu") + "budgets: [{metric: macs, max: 1}]", r"\.yaml: target .*'ort:gpu'"),
        ("- a\n- b\n", r"budgets\.yaml: holds list, not keys; it must begin with 'format: slim-budgets/1'"),
        ("format: [", r"budgets\.yaml: is not YAML: .*line"),
        ("", r"holds NoneType, not keys"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        budget.load(written(tmp_path, text))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml: no such file; --budgets takes a YAML file"):
        budget.load(tmp_path / "absent.yaml")


# Judging


@pytest.mark.parametrize(
    ("limit", "value", "half_width", "outcome", "margin"),
    [
        (Budget(metric="size_bytes", max=100), 100, None, "pass", 0),
        (Budget(metric="size_bytes", max=100), 101, None, "fail", 1),
        (Budget(metric="fusion_coverage", min=95), 90, None, "fail", 5),
        (Budget(metric="top1_agreement", min=97), 98, 0.5, "pass", -1),
        # Counted on fixed images: by the figure, however wide the interval.
        (Budget(metric="top1_agreement", min=97), 97.2, 0.5, "pass", -0.2),
        (Budget(metric="top1_agreement", min=97), 96.8, 0.5, "fail", 0.2),
        (Budget(metric="top1_drop_points", max=1.0), 1.0, 2.0, "pass", 0),
        (Budget(metric="top1_drop_points", max=1.0), 1.2, 2.0, "fail", 0.2),
        (Budget(metric="latency_ratio", max=0.8), 0.7, 0.03, "pass", -0.1),
        (Budget(metric="latency_ratio", max=0.8), 0.79, 0.03, "inconclusive", -0.01),
        (Budget(metric="latency_ratio", max=0.8), 0.9, 0.03, "fail", 0.1),
        (Budget(metric="latency_p50_ms", max=4.0, device=HERE), 5.0, 0.1, "fail", 1.0),
    ],
)
def test_outcomes_follow_the_interval_of_what_is_timed_and_the_figure_of_what_is_counted(
    limit: Budget, value: float, half_width: float | None, outcome: str, margin: float
) -> None:
    verdict = judged(limit, figure(limit.metric, value, half_width))
    assert verdict.outcome == outcome
    assert verdict.margin == pytest.approx(margin)
    assert verdict.value == value
    assert verdict.detectable == (None if half_width is None else pytest.approx(half_width))


def test_a_verdict_says_by_how_much() -> None:
    ratio = figure("latency_ratio", 0.9, 0.03)
    assert judged(Budget(metric="latency_ratio", max=0.8), ratio).message == (
        "latency_ratio is 0.9 ratio (n=1, 95% 0.87..0.93), max 0.8: missed by 0.1 ratio (12.5%)"
    )
    assert judged(Budget(metric="latency_ratio", max=1.0), ratio).message.endswith("within by 0.1 ratio (10.0%)")
    assert judged(Budget(metric="latency_ratio", max=0.91), ratio).message.endswith(
        "the interval holds the limit; this run tells 0.03 ratio apart"
    )
    assert judged(Budget(metric="top1_drop_points", max=0), figure("top1_drop_points", 0.5)).message.endswith(
        "max 0: missed by 0.5 points"
    )


def test_points_show_the_interval_that_does_not_judge_them() -> None:
    verdict = judged(Budget(metric="top1_drop_points", max=1.0), figure("top1_drop_points", 1.2, 2.0))
    assert verdict.message == (
        "top1_drop_points is 1.2 points (n=1, 95% -0.8..3.2), max 1: missed by 0.2 points (20.0%)"
    )


def test_an_unfit_machine_is_inconclusive_and_says_why() -> None:
    control = {"value": 1.05, "low": 1.03, "high": 1.07, "fit": False}
    verdict = judged(Budget(metric="latency_ratio", max=0.8), figure("latency_ratio", 0.9, 0.03, control=control))
    assert verdict.outcome == "inconclusive"
    assert "the reference against itself gave 1.050 (1.030..1.070); quieten this machine" in verdict.message


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (Budget(metric="latency_p50_ms", max=4.0), f"names no device.*add device: {HERE}"),
        (Budget(metric="latency_p95_ms", max=4.0, device=ELSEWHERE), f"is for device {ELSEWHERE}, this is {HERE}"),
        (Budget(metric="latency_ratio", max=4.0, device=ELSEWHERE), f"is for device {ELSEWHERE}, this is {HERE}"),
    ],
)
def test_milliseconds_of_another_machine_are_never_judged(limit: Budget, message: str) -> None:
    for figures in ([], [figure(limit.metric, 1.0, 0.01)]):  # well within, and still not passed
        verdict = judged(limit, *figures)
        assert verdict.outcome == "unavailable"
        assert verdict.value is None
    assert budget.exit_code([verdict]) == 5
    assert re.search(message, verdict.message)


def test_counted_figures_are_judged_first_then_ratios_then_milliseconds() -> None:
    limits = [
        Budget(metric="latency_p50_ms", max=9.0, device=HERE),
        Budget(metric="latency_ratio", max=0.8),
        Budget(metric="top1_agreement", min=90),
        Budget(metric="size_bytes", max=100),
    ]
    figures = {limit.metric: figure(limit.metric, 1) for limit in limits}
    order = [verdict.budget.metric for verdict in budget.judge(limits, figures, fingerprint=HERE)]
    assert order == ["top1_agreement", "size_bytes", "latency_ratio", "latency_p50_ms"]


def test_a_figure_that_was_not_taken_is_no_pass() -> None:
    with pytest.raises(UsageError, match=r"top1_drop_points was not measured; it comes from .* give --data"):
        judged(Budget(metric="top1_drop_points", max=1))


def test_a_figure_in_another_unit_is_not_compared() -> None:
    share = Measurement(metric="top1_agreement", value=0.98, unit="ratio")
    with pytest.raises(SlimError, match="top1_agreement was measured in ratio, its limit is in percent"):
        judged(Budget(metric="top1_agreement", min=97), share)


def test_needs_leaves_out_what_only_another_machine_can_measure() -> None:
    limits = [
        Budget(metric="size_bytes", max=1),
        Budget(metric="latency_p50_ms", max=1),
        Budget(metric="latency_p95_ms", max=1, device=HERE),
        Budget(metric="latency_ratio", max=1, device=ELSEWHERE),
    ]
    assert budget.needs(limits, fingerprint=HERE) == {"size_bytes", "latency_p95_ms"}


# What is handed on

RATIO = Budget(metric="latency_ratio", max=0.8)
PASS = judged(RATIO, figure("latency_ratio", 0.7, 0.03))
FAIL = judged(RATIO, figure("latency_ratio", 0.9, 0.03))
UNDECIDED = judged(RATIO, figure("latency_ratio", 0.79, 0.03))
UNAVAILABLE = judged(Budget(metric="latency_p50_ms", max=4.0))


@pytest.mark.parametrize(
    ("verdicts", "strict", "lenient"),
    [
        ([PASS], 0, 0),
        ([PASS, UNDECIDED], 4, 0),
        ([UNDECIDED, UNAVAILABLE], 5, 5),
        ([UNAVAILABLE, UNDECIDED, FAIL, PASS], 3, 3),
    ],
)
def test_a_miss_outranks_unavailable_outranks_undecided(verdicts: list[Verdict], strict: int, lenient: int) -> None:
    assert budget.exit_code(verdicts) == strict
    assert budget.exit_code(verdicts, allow_inconclusive=True) == lenient


def test_junit_fails_a_miss_and_skips_what_was_not_decided() -> None:
    root = ElementTree.fromstring(budget.to_junit([PASS, FAIL, UNDECIDED, UNAVAILABLE]))
    (suite,) = root
    assert suite.attrib == {"name": "slim gate", "tests": "4", "failures": "1", "errors": "0", "skipped": "2"}
    assert [[child.tag for child in case] for case in suite] == [[], ["failure"], ["skipped"], ["skipped"]]
    assert suite[1].attrib["name"] == "latency_ratio max 0.8"
    assert suite[1][0].attrib["message"] == FAIL.message
    assert suite[3][0].attrib["message"] == f"unavailable: {UNAVAILABLE.message}"


def test_the_console_table_shows_figure_margin_and_half_width() -> None:
    lines = budget.to_console([PASS, FAIL, UNAVAILABLE]).splitlines()
    assert lines[1].split("  ")[0] == "latency_ratio max 0.8"
    assert "0.7 ratio +-0.03" in lines[1]
    assert lines[1].endswith("pass")
    assert "+0.1 " in lines[2]
    assert lines[3].split()[-1] == "unavailable"
    assert lines[4:] == [f"fail: {FAIL.message}", f"unavailable: {UNAVAILABLE.message}"]


def test_markdown_has_a_row_for_each_budget() -> None:
    lines = budget.to_markdown([PASS, FAIL]).splitlines()
    assert lines[2] == "| latency_ratio max 0.8 | 0.7 ratio +-0.03 | -0.1 | pass |"
    assert lines[-1] == f"- **fail**: {FAIL.message}"


def test_json_carries_the_exit_code_and_comes_back_equal() -> None:
    found = json.loads(budget.to_json([PASS, UNDECIDED]))
    assert found["exit_code"] == 4
    assert [Verdict.model_validate(item) for item in found["verdicts"]] == [PASS, UNDECIDED]
    assert json.loads(budget.to_json([UNDECIDED], allow_inconclusive=True))["exit_code"] == 0
