"""How much is lost with each unit of a group, by one of six criteria.

    gram      energy that the unit's channels carry into the layers that read them: tr(W G W^T) with G their second
              moment on the images, centred where the reader has a bias, which makes up for the mean; of several
              readers the shares of what each puts out
    group-l2  squares of the unit's weights in all tensors of the group, biases apart: sum over tensors of
              |w_u|^2 / mean(w^2), so that layers of different scale count the same
    taylor    what the log-likelihood loses to first order (Molchanov et al. 2019, arXiv:1906.10771), of classes drawn
              from the prediction: the Fisher information; see observed.py
    taylor-labels  the same of the images' own labels: the empirical Fisher information
    bn        variance that the group's batch norms give the channels. With true running statistics that is the squared
              weight of the norm; it stays right where a norm is folded and says weight 1, variance 1
    random    uniform, to compare with

Of attention's queries, keys and values (`dims`) every head has its own order; see scores.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from slim.contract import Progress, no_progress
from slim.errors import PassError
from slim.passes.prune import scores
from slim.passes.prune.groups import Group
from slim.passes.prune.observed import Calibration, look, reached, slopes
from slim.passes.prune.scores import Part, by_slot, parts_of, unreached

Criterion = Literal["gram", "group-l2", "taylor", "taylor-labels", "bn", "random"]
BLIND: frozenset[Criterion] = frozenset({"group-l2", "random"})
"""Criteria that look at no image."""
TINY = torch.finfo(torch.double).tiny


@dataclass(frozen=True, eq=False)
class Ranked:
    """A group whose units have a score."""

    group: Group
    """As given; of kind `dims` with other indices: unit r holds, in every head, its r-th best dimension."""
    scores: Tensor
    """(units,) fp64, finite, at least 0: what is lost with each unit, in the criterion's own unit. Of `dims` the share
    of a head's queries and keys plus that of its values, summed over the heads."""


def ranked(
    model: nn.Module,
    groups: Sequence[Group],
    criterion: Criterion,
    batches: Callable[[], Iterable[Tensor]] | None,
    *,
    images: int,
    seed: int,
    labels: Tensor | None = None,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> tuple[list[Ranked], dict[str, str]]:
    """The groups with their scores, in the order given, and why the others have none.

    Args:
        model: lies on `device`; its parameters need no gradient and get none.
        groups: that can be cut out, see `trusted` in cut.py.
        criterion: see above.
        batches: (B, C, H, W) each, the same images at every call, cut in any way; none: for group-l2 and random alone.
        images: how many they hold together.
        seed: of random scores and of the classes drawn.
        labels: (images,) int64, for `taylor-labels` alone.
        device: where to work; none: the CPU, where the scores come to lie in any case.
        progress: told after every batch.

    Raises:
        PassError: there are no images and the criterion needs some; values that are not finite.
    """
    if batches is None and criterion not in BLIND:
        raise PassError(
            f"prune: criterion {criterion} looks at images and there are none; "
            "give data with a training split, or criterion group-l2"
        )
    if labels is None and criterion == "taylor-labels":
        raise PassError("prune: criterion taylor-labels has no labels; criterion taylor needs none")
    own = labels if criterion == "taylor-labels" else None
    given = batches and Calibration(batches, images, seed, device or torch.device("cpu"), progress, own)
    parts = {group: parts_of(group) for group in groups}
    left: dict[str, str] = {}
    if given and criterion in ("gram", "taylor", "taylor-labels"):
        on_way = reached(model, [spot for some in parts.values() for part in some for spot in part.spots], given)
        why = {group.name: [unreached(part, on_way) for part in some] for group, some in parts.items()}
        left |= {name: reason for name, reasons in why.items() for reason in reasons if reason}
    parts = {group: some for group, some in parts.items() if group.name not in left}
    flat = [part for some in parts.values() for part in some]
    scored = dict(zip(flat, _scored(model, flat, criterion, given, seed), strict=True))
    found: list[Ranked] = []
    for group, some in parts.items():
        lost = [one for part in some if (one := scored[part]) is not None]
        if len(lost) < len(some):
            left[group.name] = "no batch norm among its members"
            continue
        if not all(one.isfinite().all() for one in lost):
            raise PassError(f"prune: scores of {group.name!r} are not finite; start from weights that are")
        ordered, of_units = by_slot(group, *lost) if group.kind == "dims" else (group, lost[0])
        found.append(Ranked(ordered, of_units))
    return found, left


def _scored(
    model: nn.Module,
    parts: Sequence[Part],
    criterion: Criterion,
    given: Calibration | None,
    seed: int,
) -> Sequence[Tensor | None]:
    """Scores (units,) fp64 of every part; none where `bn` has no norm."""
    if criterion == "random":
        return scores.random(parts, seed)
    if criterion == "group-l2":
        return [scores.group_l2(model, part) for part in parts]
    assert given is not None  # `ranked` has asked
    if criterion == "bn":
        return scores.bn(model, parts, given)
    spots = [spot for part in parts for spot in part.spots]
    if criterion == "gram":
        seen = look(model, spots, given)
        return [scores.gram(model, part, seen) for part in parts]
    slope = slopes(model, spots, given)
    return [torch.stack([slope[spot] for spot in part.spots]).sum(0) for part in parts]


def share_lost(scores: Tensor) -> Tensor:
    """Share of the total lost when only the k best units stay, k = 0 ... units.

    scores: (units,), finite, at least 0. Returns (units + 1,) fp64: 1 at 0, where the whole group is gone, then
    descending to 0. Scores that are all zero say that one unit is as good as all: 0 from k = 1 on.
    """
    ascending = scores.double().sort().values
    ascending = ascending / ascending[-1].clamp(min=TINY)  # no sum overflows
    lost = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)]).flip(0)
    lost = lost / lost[0].clamp(min=TINY)
    lost[0] = 1.0
    return lost
