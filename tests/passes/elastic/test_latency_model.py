"""The latency of subnets, from whole networks that were measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from slim.errors import PassError, StoreError
from slim.measurement import Measurement
from slim.passes.elastic.latency import LatencyModel, build
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.subnets import drawn
from slim.passes.elastic.table import Origin, Row, as_table, rows_of
from slim.passes.elastic.terms import HELD_OUT, LEAST_ROWS, ROWS_PER_TERM, Terms, rows_to_measure
from tests.passes.elastic import toys_of_search as toys

HERE = Origin(device="0123456789ab", target="ort:cpu,threads=1", network="f" * 64)
Measure = Callable[[Subnet], Measurement]


@pytest.fixture
def space() -> Space:
    return toys.space(6)


@pytest.fixture
def terms(space: Space) -> Terms:
    # Squares: not a sum of the other terms.
    return Terms(space, lambda subnet: 1e6 * (1 + sum(share**2 for share in toys.shares(space, subnet))))


def timed(ms: Callable[[Subnet], float]) -> Measure:
    def measure(subnet: Subnet) -> Measurement:
        value = ms(subnet)
        return Measurement(metric="latency_p50_ms", value=value, unit="ms", low=0.99 * value, high=1.01 * value)

    return measure


def each(measure: Measure) -> Callable[[Sequence[Subnet]], list[Measurement]]:
    return lambda some: [measure(subnet) for subnet in some]


def additive(terms: Terms) -> Measure:
    """A truth of the model's own form, with no term for every third width and block."""
    theta = np.array([0.3 * (number % 3) for number in range(len(terms.names) - 2)] + [2.0, 1.5])
    return timed(lambda subnet: float(terms([subnet])[0] @ theta))


def test_the_rows_are_the_ladder_and_random_ones_of_which_some_are_held_out(space: Space, terms: Terms) -> None:
    fit, held = rows_to_measure(terms, seed=0)
    assert fit[0] == space.largest
    assert space.canonical(space.smallest) in fit
    assert len(fit) == max(LEAST_ROWS, np.ceil(ROWS_PER_TERM * len(terms.names)))
    assert len(held) == HELD_OUT
    assert len({*fit, *held}) == len(fit) + len(held)
    assert all(space.allows(one) and space.canonical(one) == one for one in (*fit, *held))
    assert rows_to_measure(terms, seed=0) == (fit, held) != rows_to_measure(terms, seed=1)


def test_more_terms_ask_for_more_rows() -> None:
    wide = toys.space(20)
    terms = Terms(wide, lambda subnet: toys.cost(wide, subnet))
    fit, _ = rows_to_measure(terms, seed=0)
    assert len(terms.names) == 21 + 20 + 2
    assert len(fit) == 52  # 1.2 * 43, rounded up


def test_a_space_with_few_subnets_is_measured_whole() -> None:
    small = toys.space(1, choices=(8, 4), fewest=0)
    fit, held = rows_to_measure(Terms(small, lambda subnet: toys.cost(small, subnet)), seed=0)
    assert {*fit, *held} == {*toys.all_of(small)}
    assert len(held) == len({*fit, *held}) // 4
    none = toys.space(0, choices=(8, 4, 2))
    with pytest.raises(PassError, match="3 subnets are too few for a model of latency; make more widths elastic"):
        rows_to_measure(Terms(none, lambda subnet: 1.0), seed=0)


def test_a_sum_of_terms_is_recovered(space: Space, terms: Terms) -> None:
    measure = additive(terms)
    model = build(terms, each(measure), HERE, seed=0)
    assert model.form == "terms"
    assert min(model.theta) >= 0
    assert model.errors["terms"].mape < 1
    rng, unseen = Random(99), {row.subnet for row in model.rows}
    for subnet in (drawn(space, rng) for _ in range(200)):
        if subnet not in unseen:
            assert model.predict(subnet) == pytest.approx(measure(subnet).value, rel=0.01)


def test_a_narrower_subnet_is_never_predicted_to_be_slower(space: Space, terms: Terms) -> None:
    rng, noise = Random(3), Random(4)
    model = build(terms, each(timed(lambda subnet: toys.cost(space, subnet) * noise.uniform(0.8, 1.2))), HERE, seed=0)
    assert min(model.theta) >= 0
    for subnet in (drawn(space, rng) for _ in range(100)):
        narrower = Subnet(tuple(max(2, count - 2) for count in subnet.units), subnet.on)
        assert model.predict(space.canonical(narrower)) <= model.predict(subnet) + 1e-9


def test_the_line_is_used_where_it_predicts_better(space: Space, terms: Terms) -> None:
    noise = Random(0)
    # Fifteen terms for thirty rows learn the noise; two hardly do.
    measure = timed(lambda subnet: (1.0 + 3e-6 * terms.macs(subnet)) * noise.uniform(0.93, 1.07))
    model = build(terms, each(measure), HERE, seed=0)
    assert model.form == "macs"
    assert model.errors["macs"].mape < model.errors["terms"].mape
    assert set(model.theta[:-2]) == {0.0}
    # Noise of 7 % either way has a standard deviation of 4 %; 30 rows bring it below 1.5 % for a line.
    assert model.theta[-1] == pytest.approx(1.0, rel=0.25)
    for subnet in (space.largest, space.smallest):
        assert model.predict(subnet) == pytest.approx(1.0 + 3e-6 * terms.macs(space.canonical(subnet)), rel=0.05)
    assert str(model).startswith("a * MACs + b: ")
    assert "held out" in str(model)


def test_the_errors_are_those_of_what_was_held_out(terms: Terms) -> None:
    truth = additive(terms)
    held = set(rows_to_measure(terms, seed=0)[1])
    # Twice as slow where nothing is fitted: predictions are half of it, all of them.
    model = build(terms, each(timed(lambda one: truth(one).value * (2 if one in held else 1))), HERE, seed=0)
    assert model.errors["terms"].mape == pytest.approx(50, abs=0.5)
    assert model.errors["terms"].largest == pytest.approx(50, abs=0.5)
    assert model.errors["terms"].tau == pytest.approx(1.0)
    assert [row.subnet for row in model.rows if row.held_out] == rows_to_measure(terms, seed=0)[1]


def test_blocks_built_alike_share_their_terms(space: Space) -> None:
    builds = {f"blocks.{number}.fc1": "mlp" for number in range(6)} | {f"blocks.{n}": "block" for n in range(6)}
    terms = Terms(space, lambda subnet: toys.cost(space, subnet), builds)
    assert terms.names == ("width stem", "width mlp", "block block", "macs", "constant")
    (row,) = terms([Subnet((8, 8, 4, 2, 8, 8, 8), (True, True, True, False, False, False))])
    assert row[:3] == pytest.approx([1.0, 1 + 0.5 + 0.25, 3.0])
    model = build(terms, each(additive(terms)), HERE, seed=0)
    assert model.errors["terms"].mape < 1


def test_a_table_comes_back_as_it_was_written(space: Space, terms: Terms) -> None:
    model = build(terms, each(additive(terms)), HERE, seed=0)
    written = json.dumps(model.as_json(), sort_keys=True)
    read = LatencyModel.from_json(json.loads(written), terms, HERE)
    assert read.as_json() == model.as_json()
    assert read.predict(space.smallest) == model.predict(space.smallest)
    assert read.rows == model.rows
    assert model.as_json()["format"] == "slim-table/2"
    assert all(row.low < row.ms < row.high for row in read.rows)


@pytest.mark.parametrize(
    ("changed", "value"), [("device", "ba9876543210"), ("target", "ort:cpu,threads=2"), ("network", "0" * 64)]
)
def test_a_table_of_something_else_is_refused(terms: Terms, changed: str, value: str) -> None:
    data = build(terms, each(additive(terms)), HERE, seed=0).as_json()
    elsewhere = replace(HERE, **{changed: value})
    said = f"latency table: it was measured for {changed} '{getattr(HERE, changed)}', not '{value}'; measure again"
    for read in (lambda: LatencyModel.from_json(data, terms, elsewhere), lambda: rows_of(data, elsewhere)):
        with pytest.raises(StoreError) as raised:
            read()
        assert str(raised.value) == said


def test_a_table_of_another_space_format_or_half_done_is_refused(terms: Terms) -> None:
    data: dict[str, Any] = build(terms, each(additive(terms)), HERE, seed=0).as_json()
    small = toys.space(2)
    with pytest.raises(StoreError, match="its terms are not those of this space"):
        LatencyModel.from_json(data, Terms(small, lambda subnet: 1.0), HERE)
    with pytest.raises(StoreError, match="format 'slim/1' is not 'slim-table/2'"):
        rows_of({**data, "format": "slim/1"}, HERE)
    with pytest.raises(StoreError, match="it is not finished"):
        LatencyModel.from_json(as_table(HERE, rows_of(data, HERE)[:5]), terms, HERE)


def test_what_was_measured_before_is_not_measured_again(terms: Terms) -> None:
    truth, kept = additive(terms), list[Row]()

    def killed(subnet: Subnet) -> Measurement:
        if len(kept) == 12:
            raise KeyboardInterrupt
        return truth(subnet)

    with pytest.raises(KeyboardInterrupt):
        build(terms, each(killed), HERE, seed=0, keep=kept.append)
    stored = json.loads(json.dumps(as_table(HERE, kept)))
    asked, more = list[Subnet](), list[Row]()

    def counted(subnet: Subnet) -> Measurement:
        asked.append(subnet)
        return truth(subnet)

    model = build(terms, each(counted), HERE, seed=0, rows_done=rows_of(stored, HERE), keep=more.append)
    fit, held = rows_to_measure(terms, seed=0)
    assert asked == [*fit, *held][12:] == [row.subnet for row in more]
    assert model.as_json() == build(terms, each(truth), HERE, seed=0).as_json()
