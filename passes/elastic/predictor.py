"""Accuracy of subnets that were not evaluated: what each change costs alone, summed, and corrected by what was found.

One evaluation for each choice of each width, rank and side of the input, and for each block left out; a subnet loses
the sum. What that misses, for changes that go well or badly together, is learned from subnets that were really
evaluated, by a ridge regression of the residuals.

The rule: a correction is used once `FEWEST` subnets were evaluated, if it brings the root mean square residual down,
each subnet being predicted by the correction fitted without it. All figures of quality are of those predictions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slim.contract import Progress, no_progress
from slim.passes.elastic.space import Space, Subnet

FEWEST = 8
"""Evaluated subnets from which a correction is tried."""
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Ridges that are tried; one of 10 halves what ten subnets say of a choice they share."""

Matrix = NDArray[np.float64]


def singles(space: Space) -> list[Subnet]:
    """The largest, and each that differs from it by one choice of one axis."""
    largest = space.largest
    found, whole = [largest], space.chosen(largest)
    for number, choices in enumerate(space.axes):
        for choice in choices[1:]:
            one = space.of((*whole[:number], choice, *whole[number + 1 :]))
            if space.allows(one):
                found.append(one)
    return found


def measure_singles(
    space: Space, accuracy: Callable[[Subnet], float | None], *, progress: Progress = no_progress
) -> dict[Subnet, float]:
    """Accuracy of all `singles`, in percent.

    Args:
        space: of the subnets.
        accuracy: evaluates a subnet really, in percent; none where another process is at it: it is asked again later.
        progress: told after every one.
    """
    wanted, found = singles(space), dict[Subnet, float]()
    waiting = deque(wanted)
    with progress("one change at a time", len(wanted)) as advance:
        while waiting:
            one = accuracy(waiting[0])
            if one is None:
                waiting.rotate(-1)
                continue
            found[waiting.popleft()] = one
            advance(1, f"{one:.2f} %")
    return {subnet: found[subnet] for subnet in wanted}


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predicts accuracy in percent."""

    space: Space
    top: float
    """Accuracy of the largest, in percent."""
    drops: Matrix
    """Points lost by each change alone: of each axis of the space its choices but the first."""
    tau: float | None = None
    """Kendall's rank correlation with subnets really evaluated, none of which its own prediction was fitted on."""
    ridge: float | None = None
    """Strength of the correction; none where there is none."""
    weights: Matrix | None = None
    """Of the correction: points for each change, for the sum and for its square, and a constant."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of the sums it was fitted on."""

    @classmethod
    def of(cls, space: Space, measured: Mapping[Subnet, float]) -> Predictor:
        """The sum of the changes, from the accuracy of all `singles`."""
        top = measured[space.largest]
        changes = singles(space)[1:]
        drops = _changes(space, changes).T @ np.array([top - measured[one] for one in changes])
        return cls(space, top, drops)

    @property
    def table(self) -> dict[str, Any]:
        """Points lost alone, by width, block, rank and `pixels`: what is chosen -> points; of a block the points."""
        left, space = iter(self.drops.tolist()), self.space
        found: dict[str, Any] = {
            dim.group.name: {str(count): round(next(left), 4) for count in dim.choices[1:]} for dim in space.dims
        }
        found |= {block.name: round(next(left), 4) for block in space.blocks}
        found |= {
            f"rank of {rank.layer}": {str(one): round(next(left), 4) for one in rank.choices[1:]}
            for rank in space.ranks
        }
        sides = {str(side): round(next(left), 4) for side in space.pixels[1:]}
        return found | ({"pixels": sides} if sides else {})

    def predict(self, subnets: Sequence[Subnet]) -> Matrix:
        """Accuracy of each, in percent."""
        changes = _changes(self.space, subnets)
        lost = changes @ self.drops
        if self.weights is None:
            return self.top - lost
        return np.asarray(self.top - lost + _columns(changes, lost, self.scale) @ self.weights)

    def refit(self, evaluated: Mapping[Subnet, float]) -> Predictor:
        """With the correction that these subnets ask for, by the rule above; `singles` among them play no part."""
        alone = set(singles(self.space))
        rows = [(one, found) for one, found in evaluated.items() if one not in alone]
        plain = replace(self, tau=None, ridge=None, weights=None)
        if len(rows) < FEWEST:
            return plain
        found = np.array([accuracy for _, accuracy in rows])
        changes = _changes(self.space, [one for one, _ in rows])
        lost = changes @ self.drops
        residual = found - (self.top - lost)
        scale = float(lost.mean()), float(lost.std()) or 1.0
        columns = _columns(changes, lost, scale)
        error, used, weights, left = float(np.square(residual).mean()), None, None, residual
        for strength in STRENGTHS:
            tried, missed = ridge(columns, residual, strength)
            if float(np.square(missed).mean()) < error:
                error, used, weights, left = float(np.square(missed).mean()), strength, tried, missed
        return replace(plain, tau=rank_correlation(found - left, found), ridge=used, weights=weights, scale=scale)


def rank_correlation(predicted: Matrix, found: Matrix) -> float | None:
    """Kendall's tau; none where one of the two is all the same."""
    from scipy.stats import kendalltau  # type: ignore[import-untyped]  # a second that nothing else here needs

    if len(found) < 2 or np.ptp(predicted) == 0 or np.ptp(found) == 0:
        return None
    return float(kendalltau(predicted, found).statistic)


def _changes(space: Space, subnets: Sequence[Subnet]) -> Matrix:
    """(subnets, changes): 1 where a subnet has a change, in the order of `Predictor.drops`."""
    made = np.array([space.chosen(space.canonical(one)) for one in subnets]).reshape(len(subnets), len(space.axes))
    changes = [made[:, number] == choice for number, choices in enumerate(space.axes) for choice in choices[1:]]
    return np.stack(changes, 1).astype(np.float64) if changes else np.zeros((len(made), 0))


def _columns(changes: Matrix, lost: Matrix, scale: tuple[float, float]) -> Matrix:
    """What the residual is regressed on: losses of many changes add up to less than their sum, or to more."""
    sums = (lost - scale[0]) / scale[1]
    return np.column_stack([changes, sums, np.square(sums), np.ones(len(sums))])


def ridge(columns: Matrix, aim: Matrix, strength: float) -> tuple[Matrix, Matrix]:
    """Weights, and for each row what the weights fitted without it miss. The last column is not held back."""
    penalty = np.full(columns.shape[1], strength)
    penalty[-1] = 0.0
    inverse = np.linalg.inv(columns.T @ columns + np.diag(penalty))
    weights = inverse @ columns.T @ aim
    leverage = np.einsum("ij,jk,ik->i", columns, inverse, columns)
    return weights, (aim - columns @ weights) / (1 - leverage)
