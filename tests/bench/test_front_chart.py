"""The picture of `slim family`: what is drawn where."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from slim.bench.front_chart import FRAME, picture, to_svg

TRIED = [(1.0, 50.0), (2.0, 70.0), (2.5, 65.0), (3.0, 20.0), (4.0, 80.0)]
FRONT = [(1.0, 50.0), (2.0, 70.0), (4.0, 80.0)]


def test_dearer_lies_to_the_right_and_better_above() -> None:
    found = picture(TRIED, FRONT, {"2ms": (2.0, 70.0), "4ms": (4.0, 80.0)}, "ms", "title", "note")
    assert [x for x, _ in found.dots] == sorted(x for x, _ in found.dots)
    heights = dict(zip([50.0, 70.0, 65.0, 80.0], [y for _, y in found.dots], strict=True))
    assert sorted(heights, key=lambda top1: -heights[top1]) == [50.0, 65.0, 70.0, 80.0]
    left, top, right, bottom = FRAME
    assert all(left < x < right and top < y < bottom for x, y in found.dots)
    assert [(one.x, one.y) for one in found.chosen] == [found.dots[1], found.dots[3]]


def test_what_is_worse_than_the_worst_of_the_best_is_counted_and_not_drawn() -> None:
    found = picture(TRIED, FRONT, {}, "ms", "title", "note")
    assert (len(found.dots), found.below) == (4, 1)


def test_the_line_goes_through_the_best_and_never_down() -> None:
    found = picture(TRIED, FRONT, {}, "ms", "title", "note")
    corners = [float(y) for y in re.findall(r"V([\d.]+)", found.path)]
    assert len(corners) == 2
    assert corners[0] > corners[1]
    assert found.path.endswith(f"H{FRAME[2]:.1f}")


def test_one_point_alone_can_be_drawn() -> None:
    found = picture([(1.0, 50.0)], [(1.0, 50.0)], {"1ms": (1.0, 50.0)}, "ms", "title", "note")
    assert (found.chosen[0].x, found.chosen[0].y) == found.dots[0]


def test_costs_are_written_in_their_unit() -> None:
    tried = [(1e8, 50.0), (2e8, 60.0)]
    found = picture(tried, tried, {}, "macs", "title", "note")
    assert {tick.text.split()[-1] for tick in found.x_ticks} == {"M"}


def test_the_file_is_well_formed_whatever_the_texts_are() -> None:
    drawn = ElementTree.fromstring(to_svg(TRIED, FRONT, {"<2ms>": (2.0, 70.0)}, "ms", 'a & "b" <c>', "note"))
    assert 'a & "b" <c>' in [one.text for one in drawn.iter() if one.tag.endswith("title")]
    assert "<2ms>" in [one.text for one in drawn.iter() if one.tag.endswith("text")]
