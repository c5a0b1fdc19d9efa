"""Structured pruning: whole channels, hidden units and attention heads are cut out, and layers really get narrower.

What belongs together is found as in DepGraph (Fang et al. 2023, arXiv:2301.12900), how much goes where is decided under
a budget of parameters, operations or milliseconds measured on the target, and what is left is repaired in closed form
as in channel pruning by reconstruction (He et al. 2017, arXiv:1707.06168). Trains nothing; `sparsify` before it makes
the cut painless, and `distill` behind it learns the rest. Does not make a network shallower.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import nn

from slim import surgery
from slim.contract import Context, Pass, Plan, Role
from slim.distributed import is_main
from slim.errors import PassError
from slim.goal import parse_goal
from slim.passes import calibration, repair
from slim.passes.prune.choose import Chooser, Choosing, apply, numbers, outputs_kept
from slim.passes.prune.criteria import BLIND
from slim.passes.prune.fold import fold_means

SPARSIFIED = "sparsified"
BLINDLY = "criterion group-l2 and repair none"


class Prune(Choosing, Pass):
    """Cut channels, hidden units and attention heads out."""

    name: ClassVar[str] = "prune"
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"dense", "float"})
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "macs"})

    to: str | None = None
    """Budget, as a share kept or absolutely: `0.6x-latency`, `4ms`, `0.5x-macs`, `2.1M-params`, `0.5x-size`; or
    `sparsified`: exactly what the sparsify before it chose."""
    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Without `to`: share of its channels each group keeps, in (0, 1)."""
    table: str | None = None
    """Latency table of `slim table build`; none times layers alone where the budget is in milliseconds."""
    repair: Literal["both", "outputs", "norms", "none"] = "both"
    """Closed-form repair on the calibration images: layers that lost inputs by least squares, norms' statistics."""
    memory_gb: float = Field(default=2.0, gt=0)
    """Memory for one forward pass of all calibration images during repair, GB; fewer are used beyond it."""

    @field_validator("to")
    @classmethod
    def _a_goal(cls, value: str | None) -> str | None:
        return value if value in (None, SPARSIFIED) else str(parse_goal(value))

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.to is None) == (self.ratio is None):
            said = "neither is given" if self.to is None else f"to={self.to} and ratio={self.ratio} are given"
            raise ValueError(f"{said}; give one: to, as 0.6x-latency, or ratio, the share every group keeps")
        if self.ratio is not None and self.ranking not in (None, "local"):
            raise ValueError(f"ratio keeps one share everywhere, and ranking={self.ranking} shares a budget; give --to")
        unused = [name for name, known in Choosing.model_fields.items() if getattr(self, name) != known.default]
        if self.to == SPARSIFIED and unused:
            raise ValueError(f"to={SPARSIFIED} cuts what sparsify chose, so {', '.join(unused)} must be set there")
        if self.table is not None and (self.to in (None, SPARSIFIED) or not parse_goal(str(self.to)).timed):
            given = f"ratio={self.ratio}" if self.to is None else f"to={self.to}"
            raise ValueError(f"table={self.table} is of milliseconds, and {given} is not; give --to 0.6x-latency")
        return self

    @property
    def reads(self) -> frozenset[str]:
        """Calibration images, unless nothing looks at them."""
        chooses = self.to != SPARSIFIED and self.criterion not in BLIND
        return frozenset({"calib"}) if chooses or self.repair != "none" else frozenset()

    @property
    def measures(self) -> bool:
        """Whether the budget is one of the exported file."""
        return self.to is not None and self.to != SPARSIFIED and parse_goal(self.to).measured

    def sources(self, context: Context) -> dict[str, str]:
        """The table's content."""
        if self.table is None:
            return {}
        from slim.passes.elastic import table  # which is built on this package

        return table.sources(self.table)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """What stays of every tensor, by group, and why the other groups stay whole."""
        if self.repair != "none":
            calibration.count(context, self.name, BLINDLY)  # an error now, not after the work
        if self.to == SPARSIFIED:
            return self._sparsified(context)
        rates = None
        if self.table is not None:
            from slim.passes.elastic import dense  # which is built on this package

            rates = dense.rates(self.table, model, parse_goal(str(self.to)), context, self.name)
        chooser = Chooser(self, model, context, self.name)
        plan = chooser.at_ratio(self.ratio) if self.ratio is not None else chooser.reach(str(self.to), rates)
        if not plan["groups"]:
            reasons = sorted(set(cast(dict[str, str], plan["left"]).values()))
            rule = f"to {self.to}" if self.to else f"ratio {self.ratio}"
            raise PassError(f"prune: {rule} cuts nothing ({'; '.join(reasons)}); ask for less")
        return plan

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Narrower layers, with the values of what stays."""
        apply(model, plan)
        return model

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue] | None:
        """Fold what the cut channels put out on average, then repair. Rank 0's values go to every process."""
        if not is_main():
            return None
        assert context.backbone is not None  # Pass.__call__ set it
        probe = torch.randn(2, *context.backbone.input.size, generator=torch.Generator().manual_seed(0))
        folded = copy.deepcopy(teacher)
        blind = self.repair == "none"
        gone = _gone(teacher, context.plan)
        refit = self._refit(gone, context.plan)
        if self.repair == "outputs":
            # Refitted, they give the norm behind what it got before: folded into that norm, the mean would count twice.
            gone = {name: some for name, some in gone.items() if name not in refit or _biased(teacher, name)}
        with surgery.on_device(context.device, model, teacher, folded):
            probe = probe.to(context.device)
            batches = [probe] if blind else (part.to(context.device) for part in calibration.images(context))
            unfolded = fold_means(folded, gone, batches, probe, constants_only=blind)
            apply(folded, context.plan)
            model.load_state_dict(folded.state_dict())
            figures: dict[str, JsonValue] = {"unfolded": [*unfolded]}
            return figures if blind else figures | self._repair(model, teacher, refit, context)

    def _sparsified(self, context: Context) -> Plan:
        """The plan of the sparsify before."""
        last = context.history[-1] if context.history else None
        if last is None or last.name != "sparsify":
            before = f"{last.name!r} is" if last else "nothing is"
            raise PassError(f"prune: --to sparsified cuts what sparsify chose, but {before} before it; put it there")
        return {key: last.plan[key] for key in ("groups", "keep", "attributes", "left")}

    def _refit(self, gone: Iterable[str], plan: Plan) -> list[str]:
        """Layers to refit; not where queries are scaled, which no longer are what they were."""
        says: Any = plan["attributes"]
        rescaled = {f"{name}.qkv" for name, values in says.items() if "scale" in values}
        return [name for name in gone if name not in rescaled] if self.repair in ("both", "outputs") else []

    def _repair(
        self, model: nn.Module, dense: nn.Module, refit: Sequence[str], context: Context
    ) -> dict[str, JsonValue]:
        assert context.backbone is not None  # Pass.__call__ set it
        most = repair.images_that_fit(model, context.backbone.input.size, self.memory_gb)
        count = calibration.count(context, self.name, BLINDLY)
        return repair.repair(
            model,
            dense,
            {name: name for name in refit},
            next(calibration.images(context, min(most, count))),
            kept=outputs_kept(context.plan),
            norms=self.repair in ("both", "norms"),
            batch_size=calibration.EVAL_BATCH,
            progress=context.progress,
        )


def _biased(model: nn.Module, layer: str) -> bool:
    return getattr(model.get_submodule(layer), "bias", None) is not None


def _gone(model: nn.Module, plan: Plan) -> dict[str, list[int]]:
    """Linear layer or convolution -> inputs that are cut out of it."""
    keep: Any = plan["keep"]
    found = {}
    for key, dims in keep.items():
        owner = key.rpartition(".")[0]
        layer: Any = model.get_submodule(owner)
        if isinstance(layer, nn.Linear | nn.Conv2d) and "1" in dims:
            stays = set(numbers(dims["1"]))
            found[owner] = [place for place in range(layer.weight.shape[1]) if place not in stays]
    return found
