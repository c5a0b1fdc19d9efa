"""Latency of subnets that were not measured: from some thirty whole networks, measured on the target.

What a subnet takes is a sum, none of whose terms is negative: of each width for the share that is kept of it, of each
block that is there, of the share of multiply-accumulates, and a constant. The terms are fitted to whole networks, for
differences to the largest one all carry its error, and add it up.

A line of the multiply-accumulates alone (a * MACs + b) is fitted to the same networks, and used where it predicts those
held out better. The choice is made on the networks the errors are of, so they are a little flattering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from slim.contract import Progress, no_progress
from slim.errors import StoreError
from slim.measurement import Measurement
from slim.passes.elastic.predictor import rank_correlation
from slim.passes.elastic.space import Subnet
from slim.passes.elastic.table import Origin, Row, as_table, is_finished, rows_of
from slim.passes.elastic.terms import Terms, rows_to_measure

Matrix = NDArray[np.float64]

TOGETHER = 6
"""Networks that are measured in turn beside the largest, in one run; a worker each, so not too many. Measured one by
one, the model was 4.8 % off on a thin ResNet of 32 pixels, 3.6 % on ResNet-18 of 128 and 7.6 % on MobileNetV3-Large
of 160; so it was 3.5, 0.9 and 4.6 % (benchmarks/elastic_cost.py, 38 networks each, 8 held out)."""


@dataclass(frozen=True)
class Errors:
    """Of predictions for networks held out."""

    mape: float
    """Mean absolute error, percent."""
    largest: float
    """Largest absolute error, percent."""
    tau: float | None
    """Kendall's rank correlation; none where all are predicted alike."""

    @classmethod
    def of(cls, predicted: Matrix, found: Matrix) -> Errors:
        """Both in ms."""
        missed = 100 * np.abs(predicted / found - 1)
        return cls(float(missed.mean()), float(missed.max()), rank_correlation(predicted, found))


@dataclass(frozen=True)
class Rates:
    """What the parts of a network take, for who makes parts of it smaller; in ms."""

    whole: float
    """The network as it is."""
    widths: Mapping[str, float]
    """Name of a group -> all its units, besides their operations."""
    ranks: Mapping[str, float]
    """Name of a layer -> it as one, besides its operations; as two it takes its share of them."""
    pair: float
    """A layer more, where one becomes two."""
    mac: float
    """One multiply-accumulate."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any], origin: Origin) -> Rates:
        """Those of a table.

        Raises:
            StoreError: it is of another device, target or network, or not finished.
        """
        _finished(data, origin)
        return cls(**data["rates"])


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicts milliseconds on one target, for the subnets of one network."""

    terms: Terms
    theta: tuple[float, ...]
    """ms for each term, 0 or more."""
    form: Literal["terms", "macs"]
    """All terms, or the multiply-accumulates and the constant alone."""
    errors: Mapping[str, Errors]
    """Of both forms, on the networks held out."""
    rows: tuple[Row, ...]
    """What was measured."""
    origin: Origin

    def predict(self, subnet: Subnet) -> float:
        """Latency in ms."""
        return float(self.terms([subnet])[0] @ np.array(self.theta))

    @property
    def rates(self) -> Rates:
        """What the parts of the largest network take."""
        ms = dict(zip(self.terms.names, self.theta, strict=True))
        return Rates(
            whole=self.predict(self.terms.space.largest),
            widths={group: ms[term] for group, term in self.terms.widths.items()},
            ranks={layer: ms[term] for layer, term in self.terms.ranks.items()},
            pair=ms.get("pairs", 0.0),
            mac=ms["macs"] / self.terms.most,
        )

    def __str__(self) -> str:
        """`3.1 % off on 8 networks held out (at most 8.9 %, tau 0.87); a * MACs + b: 4.7 %`."""
        used, held = self.errors[self.form], sum(row.held_out for row in self.rows)
        tau = "none" if used.tau is None else f"{used.tau:.2f}"
        said = f"{used.mape:.1f} % off on {held} networks held out (at most {used.largest:.1f} %, tau {tau})"
        if self.form == "macs":
            return f"a * MACs + b: {said}; a term for each width and block: {self.errors['terms'].mape:.1f} %"
        return f"{said}; a * MACs + b: {self.errors['macs'].mape:.1f} %"

    def as_json(self) -> dict[str, JsonValue]:
        """Plain JSON, with all that was measured."""
        return {
            **as_table(self.origin, self.rows),
            "terms": dict(zip(self.terms.names, self.theta, strict=True)),
            "form": self.form,
            "errors": {form: asdict(errors) for form, errors in self.errors.items()},
            "rates": asdict(self.rates),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], terms: Terms, origin: Origin) -> LatencyModel:
        """What `as_json` wrote.

        Raises:
            StoreError: it is of another device, target, network or space, or not finished.
        """
        rows = _finished(data, origin)
        if {*data["terms"]} != {*terms.names}:
            raise StoreError("latency table: its terms are not those of this space; measure again")
        errors = {form: Errors(**found) for form, found in data["errors"].items()}
        return cls(terms, tuple(data["terms"][name] for name in terms.names), data["form"], errors, tuple(rows), origin)


def _finished(data: Mapping[str, Any], origin: Origin) -> list[Row]:
    rows = rows_of(data, origin)
    if not is_finished(data):
        raise StoreError("latency table: it is not finished; measure the rest, by running the same command again")
    return rows


def fitted(terms: Terms, rows: Sequence[Row], origin: Origin) -> LatencyModel:
    """The model of what was measured, of which some is held out."""
    fit, held = [row for row in rows if not row.held_out], [row for row in rows if row.held_out]
    columns, ms = terms([row.subnet for row in fit]), np.array([row.ms for row in fit])
    line = np.concatenate([np.zeros(columns.shape[1] - 2), _solved(columns[:, -2:], ms)])
    theta = {"terms": _solved(columns, ms), "macs": line}
    seen, true = terms([row.subnet for row in held]), np.array([row.ms for row in held])
    errors = {form: Errors.of(seen @ one, true) for form, one in theta.items()}
    form: Literal["terms", "macs"] = "terms" if errors["terms"].mape <= errors["macs"].mape else "macs"
    return LatencyModel(terms, tuple(theta[form].tolist()), form, errors, tuple(rows), origin)


def build(
    terms: Terms,
    measure: Callable[[Sequence[Subnet]], Sequence[Measurement]],
    origin: Origin,
    *,
    seed: int,
    rows_done: Iterable[Row] = (),
    keep: Callable[[Row], None] = lambda row: None,
    progress: Progress = no_progress,
) -> LatencyModel:
    """Measure what is missing, and fit.

    Args:
        terms: of the space.
        measure: latencies of some subnets on the target, in ms; those of one call may be taken in turn.
        origin: where it is measured, and of what.
        seed: of the random subnets.
        rows_done: measured before; those that are wanted are not measured again.
        keep: told each new row.
        progress: told after every row, and how well the model predicts.
    """
    fit, held = rows_to_measure(terms, seed)
    done = {row.subnet: row for row in rows_done}
    missing = [subnet for subnet in (*fit, *held) if subnet not in done]
    with progress("latency table", len(fit) + len(held)) as advance:
        advance(len(fit) + len(held) - len(missing))
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            for subnet, found in zip(some, measure(some), strict=True):
                low, high = (found.value if end is None else end for end in (found.low, found.high))
                done[subnet] = Row(subnet, found.value, low, high, subnet in held)
                keep(done[subnet])
                advance(1, f"{found.value:.4g} ms")
        rows = [replace(done[subnet], held_out=subnet in held) for subnet in (*fit, *held)]
        model = fitted(terms, rows, origin)
        advance(0, str(model))
    return model


def _solved(columns: Matrix, ms: Matrix) -> Matrix:
    """Terms of least relative error, none below 0."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # half a second that nothing else here needs

    found, _ = nnls(columns / ms[:, None], np.ones(len(ms)), maxiter=100 * columns.shape[1])
    return np.asarray(found)
