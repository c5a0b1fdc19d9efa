"""What `--to` says, and what it does not take."""

from __future__ import annotations

import pytest

from slim.goal import Goal, parse_goal


@pytest.mark.parametrize(
    ("text", "metric", "share", "limit", "unit"),
    [
        ("0.6x-latency", "latency", 0.6, None, "ms"),
        ("0.5x-params", "params", 0.5, None, "params"),
        ("0.25x-macs", "macs", 0.25, None, "macs"),
        ("0.9x-size", "size", 0.9, None, "bytes"),
        ("4ms", "latency", None, 4.0, "ms"),
        ("3.1ms", "latency", None, 3.1, "ms"),
        ("2.1M-params", "params", None, 2_100_000, "params"),
        ("800k-params", "params", None, 800_000, "params"),
        ("5000-params", "params", None, 5_000, "params"),
        ("300M-macs", "macs", None, 300_000_000, "macs"),
        ("1.2G-macs", "macs", None, 1_200_000_000, "macs"),
        ("2.5MB", "size", None, 2_500_000, "bytes"),
        ("800kB", "size", None, 800_000, "bytes"),
        ("1.001k-params", "params", None, 1_001, "params"),  # 1.001 * 1000 is 1000.9999999999999
    ],
)
def test_every_form_is_read(text: str, metric: str, share: float | None, limit: float | None, unit: str) -> None:
    goal = parse_goal(text)
    assert (goal.metric, goal.share, goal.limit, goal.unit) == (metric, share, limit, unit)
    assert str(goal) == text


def test_a_share_is_taken_of_what_was_and_a_limit_stands() -> None:
    assert parse_goal("0.6x-params").limit_of(200) == pytest.approx(120)
    assert parse_goal("4ms").limit_of(200) == 4


def test_milliseconds_have_to_be_timed_and_counts_do_not() -> None:
    timed = [text for text in ("0.6x-latency", "4ms", "0.6x-macs", "1M-params", "1MB") if parse_goal(text).timed]
    assert timed == ["0.6x-latency", "4ms"]


def test_equal_words_are_equal_goals() -> None:
    assert parse_goal("4ms") == parse_goal("4ms") == Goal("4ms", "latency", limit=4.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "0.6x-latencies",
            r"'0.6x-latencies': unknown cost 'latencies'; did you mean 'latency'\?; give the share kept",
        ),
        ("0.6x-energy", r"unknown cost 'energy'; known: latency, macs, params, size; give the share kept"),
        ("2M-parms", r"'2M-parms': unknown cost 'parms'; did you mean 'params'\?"),
        ("4M-latency", r"unknown cost 'latency'; known: macs, params; .* or a limit, as in 4ms"),
        ("1x-params", r"'1x-params': the share kept must lie between 0 and 1; 0.5x-params leaves half of it"),
        ("2x-latency", r"the share kept must lie between 0 and 1; 0.5x-latency leaves half"),
        ("0x-size", r"the share kept must lie between 0 and 1"),
        ("0ms", r"'0ms': the limit must be above 0"),
        ("0.0M-params", r"the limit must be above 0"),
    ],
)
def test_a_wrong_word_or_number_says_what_is_wrong_with_it(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_goal(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "half", "0.6x", "60%", "4 ms", "-4ms", "1e6-params", "4mss", "2m-params", "2,1MB"]
)
def test_another_form_is_named_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no goal; give the share kept, as in 0.6x-latency") as caught:
        parse_goal(text)
    assert str(caught.value).startswith(repr(text))


@pytest.mark.parametrize(
    ("text", "measured", "timed"),
    [
        ("0.6x-latency", True, True),
        ("4ms", True, True),
        ("2.5MB", True, False),
        ("0.5x-size", True, False),
        ("0.5x-params", False, False),
        ("300M-macs", False, False),
    ],
)
def test_what_belongs_to_the_exported_file_is_measured_and_the_rest_counted(
    text: str, measured: bool, timed: bool
) -> None:
    assert (parse_goal(text).measured, parse_goal(text).timed) == (measured, timed)
