"""Choosing what a network loses: for `prune`, which cuts it out, and `sparsify`, which drives it to zero first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import nn

from slim import surgery
from slim.contract import Context, Fed, Plan
from slim.errors import PassError
from slim.goal import Goal, parse_goal
from slim.passes import calibration
from slim.passes.layers import skipped
from slim.passes.prune import densities, widths
from slim.passes.prune.criteria import BLIND, Criterion, Ranked, ranked, share_lost
from slim.passes.prune.cut import cut, trusted
from slim.passes.prune.groups import Group, attributes, groups_of, positions
from slim.passes.prune.prices import predicted, prices
from slim.passes.prune.widths import Ranking, Units, Widths
from slim.passes.reach import Words, cost_of, meter_of, reach

if TYPE_CHECKING:
    from slim.passes.elastic.latency import Rates

ONLY_INNER = "its channels leave the block; scope all cuts them too"
SPARED = "the budget is met with less loss elsewhere"
ROUNDED = "its width closest to the ratio is all it has"


class Choosing(BaseModel):
    """Which channels go."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    criterion: Criterion = "gram"
    """What a channel is worth: the energy it brings to the layers that read it (`gram`), its weights (`group-l2`), what
    the prediction (`taylor`) or the likelihood of the labels (`taylor-labels`) would change, its batch norm's scale
    (`bn`), or nothing (`random`)."""
    ranking: Ranking | None = None
    """Who competes: all for what is lost per cost saved (`global`, the default), none (`local`, one share for all),
    groups of one build (`isomorphic`); or shares by densities: `synflow`, `erk`, `magnitude`, `proxy`."""
    scope: Literal["internal", "all"] = "internal"
    """Channels within blocks alone, where cutting out what is zero changes nothing, or the residual stream as well."""
    heads: Literal["whole", "dims", "none"] = "whole"
    """What goes in attention: whole heads, as many dimensions of every head, or nothing."""
    align: int = Field(default=8, ge=1)
    """Widths are multiples of this, the tile of the runtime's kernels."""
    floor: int = Field(default=8, ge=1)
    """Least width, in channels."""
    skip: tuple[str, ...] = ()
    """Layers whose channels stay, as patterns of dotted names: `stages.0.*`."""


class Chooser:
    """The groups of one network, ranked, and the plans that come of them."""

    def __init__(self, given: Choosing, model: nn.Module, context: Context, name: str) -> None:
        assert context.backbone is not None  # Pass.__call__ set it
        self.given, self.model, self.context, self.name = given, model, context, name
        self.size = context.backbone.input.size
        groups, self.left = self._groups()
        with surgery.on_device(context.device, model):
            looks = given.criterion not in BLIND
            count = calibration.count(context, name, "criterion group-l2") if looks else 0
            self.ranked, unranked = ranked(
                model,
                groups,
                given.criterion,
                (lambda: calibration.images(context)) if looks else None,
                images=count,
                seed=context.seed,
                labels=calibration.labels(context, name) if given.criterion == "taylor-labels" else None,
                device=context.device,
                progress=context.progress,
            )
        self.left |= unranked
        self.options = [widths.allowed(one.group, given.align, given.floor) for one in self.ranked]
        for one, some in zip(self.ranked, self.options, strict=True):
            if len(some) == 1:
                self.left[one.group.name] = f"no narrower multiple of {given.align} from {given.floor} up"
        both = [(one, some) for one, some in zip(self.ranked, self.options, strict=True) if len(some) > 1]
        self.ranked, self.options = [one for one, _ in both], [some for _, some in both]
        if not both:
            reasons = "; ".join(sorted(set(self.left.values()))) or "no layer makes channels that another reads"
            raise PassError(f"{name}: no channels can go ({reasons}); skip less, lower floor, or try scope all")

    def at_ratio(self, ratio: float) -> Plan:
        """The plan in which every group keeps this share."""
        return self.plan(widths.local(self.ranked, self.options)(ratio), ROUNDED)

    def reach(self, to: str, rates: Rates | None = None) -> Plan:
        """The plan under a budget; with `rates`, which are in milliseconds, no layer is timed.

        Raises:
            PassError: the budget cannot be reached.
        """
        goal = parse_goal(to)
        meter = meter_of(goal, self.context, self.name) if goal.measured else None
        fewest = [some[0] for some in self.options]
        groups = [one.group for one in self.ranked]
        found = Widths(
            self.ranked,
            self.options,
            predicted(rates, self.model, groups, self.size)
            if rates is not None
            else prices(goal, self.model, groups, fewest, self.size, meter),
            self._by_share(goal),
        )

        def build(units: Units) -> Fed:
            smaller = copy.deepcopy(self.model)
            apply(smaller, self.plan(units))
            return self.context.fed(smaller)

        words = Words(self.name, "widths", "lower floor, skip less, or try scope all")
        units, figures = reach(goal, found, self.context.fed(self.model), build, self.context, words)
        return {**self.plan(units), "budget": {"ranking": self.given.ranking or "global", **figures}}

    def plan(self, units: Units, whole: str = SPARED) -> Plan:
        """What is cut when each group keeps so many of its best units; `whole` says why some keep all."""
        kept = [
            (one, sorted(one.scores.argsort(descending=True, stable=True)[:count].tolist()))
            for one, count in zip(self.ranked, units, strict=True)
        ]
        smaller = [(one, some) for one, some in kept if len(some) < one.group.units]
        left = {**self.left, **{one.group.name: whole for one, some in kept if len(some) == one.group.units}}
        chosen = [(one.group, some) for one, some in smaller]
        stays = positions(self.model.state_dict(), chosen)
        return {
            "groups": {one.group.name: entry(one, some) for one, some in smaller},
            "keep": {key: {str(dim): ranges(some) for dim, some in dims.items()} for key, dims in stays.items()},
            "attributes": cast(JsonValue, attributes([(group, len(some)) for group, some in chosen])),
            "left": cast(JsonValue, dict(sorted(left.items()))),
        }

    def _groups(self) -> tuple[list[Group], dict[str, str]]:
        """Groups that may be cut, and why the others may not."""
        given = self.given
        found, left = groups_of(self.model, self.size, heads=given.heads)
        layers = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        names = [*layers, *(name for group in found for name in (group.name, *group.makers))]
        unwanted = skipped(self.name, given.skip if names else (), names)
        allowed = []
        for group in found:
            if given.scope == "internal" and not group.inner:
                left[group.name] = ONLY_INNER
            elif not unwanted.isdisjoint((group.name, *group.makers)):
                left[group.name] = "in skip"
            else:
                allowed.append(group)
        kept, refused = trusted(self.model, allowed, self.size)
        return kept, left | refused

    def _by_share(self, goal: Goal) -> widths.Share | None:
        rule = self.given.ranking or "global"
        if rule == "global":
            return None
        if rule == "local":
            return widths.local(self.ranked, self.options)
        if rule == "isomorphic":
            return widths.isomorphic(
                self.ranked, self.options, [build_of(self.model, one.group) for one in self.ranked]
            )
        groups = [one.group for one in self.ranked]
        sides = densities.sides_of(self.model, groups)
        share = goal.share or goal.limit_of(1.0) / cost_of(goal, self.context.fed(self.model), self.context, self.name)
        found = densities.densities(self.model, [*sides], self.size, min(share, 1.0), rule)
        weights = {name: float(cast(Any, self.model.get_submodule(name)).weight.numel()) for name in sides}
        logs = densities.log_widths(found, sides, weights)
        return widths.by_density(self.ranked, self.options, [logs.get(group.name, 0.0) for group in groups])


def apply(model: nn.Module, plan: Plan) -> None:
    """Cut out, in place, what a plan does not keep."""
    says: Any = plan["attributes"]
    cut(model, stays_of(plan), says)


def stays_of(plan: Plan) -> surgery.Positions:
    """What a plan keeps of the tensors that it cuts."""
    keep: Any = plan["keep"]
    return {key: {int(dim): numbers(some) for dim, some in dims.items()} for key, dims in keep.items()}


def outputs_kept(plan: Plan) -> dict[str, list[int]]:
    """Layer or norm -> channels of its output that a plan keeps, where some are cut out."""
    return {key.rpartition(".")[0]: dims[0] for key, dims in stays_of(plan).items() if 0 in dims}


def entry(one: Ranked, kept: Sequence[int]) -> dict[str, JsonValue]:
    """What a plan says of one group that keeps its best units, for people."""
    group = one.group
    return {
        "kind": group.kind,
        "width": group.width,
        "kept": len(kept) * group.unit,
        "unit": group.unit,
        "units": ranges(kept),
        "layers": {"makes": [*group.makers], "reads": [*group.readers]},
        "lost": round(float(share_lost(one.scores)[len(kept)]), 6),
        "internal": group.inner,
    }


def build_of(model: nn.Module, group: Group) -> str:
    """What tells groups of different build apart: the modules they run through, widths left out."""
    parts: list[str] = [group.kind]
    for member in group.members:
        module = model.get_submodule(member.layer)
        parts.append(f"{type(module).__name__}{getattr(module, 'kernel_size', '')}{member.dim}{member.reads}")
    return " ".join(parts)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in short: `0-31,40`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def numbers(text: str) -> list[int]:
    """What `ranges` wrote."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
