"""Low-rank approximation: Linear layers and convolutions become two thinner ones, by an SVD weighed by their inputs.

Ranks in proportion as in PELA (Guo et al. 2024, arXiv:2310.10700), or chosen for a budget of parameters, operations or
milliseconds measured on the target. Weighed by the inputs' second moment as in DRONE (Chen et al. 2021) and SVD-LLM
(arXiv:2403.07378). What is lost is repaired in closed form; it trains nothing, unless ranks are to be learned by gates,
and `distill` behind it learns the rest. Does not touch depthwise convolutions, nor the classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, JsonValue, field_validator, model_validator
from torch import Tensor, nn

from slim import surgery
from slim.artifact import Step
from slim.contract import Context, Fed, Pass, Plan, Role
from slim.distributed import is_main
from slim.errors import PassError
from slim.goal import parse_goal
from slim.passes import calibrate, calibration, repair
from slim.passes.calibrate import Moments
from slim.passes.low_rank import factors, gates, schemes
from slim.passes.low_rank.candidates import Candidate, candidates
from slim.passes.low_rank.factors import Objective
from slim.passes.low_rank.offers import Ladder, Pick, Select, offers
from slim.passes.low_rank.schemes import Layer, Scheme
from slim.passes.low_rank.ways import Way, ways_of
from slim.passes.reach import Words, cost_of, meter_of, reach
from slim.passes.sensitivity import sensitivities
from slim.training import Training

if TYPE_CHECKING:
    from slim.passes.elastic.latency import Rates

BLIND = "objective plain and repair none"
"""Settings with which it looks at no image."""


class LowRank(Pass):
    """Factor layers by an SVD weighed by their inputs."""

    name: ClassVar[str] = "low-rank"
    version: ClassVar[int] = 2
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})
    drops: ClassVar[frozenset[str]] = frozenset({"dense", "supernet"})
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "macs"})

    to: str | None = None
    """Budget, as a share kept or absolutely: `0.7x-latency`, `3.1ms`, `0.5x-params`, `300M-macs`, `0.5x-size`."""
    select: Select | None = None
    """How ranks share the budget; none is `knapsack` for milliseconds, `greedy` for what is counted."""
    table: str | None = None
    """Latency table of `slim table build`; none times layers alone where the budget is in milliseconds."""
    energy: float = Field(default=0.9, gt=0, le=1)
    """Without `to`: share of its energy each layer keeps, in (0, 1]."""
    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Without `to`: share of its parameters each factored layer keeps, in (0, 1), instead of `energy`."""
    objective: Objective = "whitened"
    """What the factors keep best: the layer's output for the calibration images (`whitened`), the weight scaled by each
    input's size (`activation`), or the weight (`plain`; without `repair` that needs no data)."""
    conv: Literal["best", "channel", "spatial", "none"] = "best"
    """How k x k convolutions become two: k x k then 1 x 1, k x 1 then 1 x k, whichever loses less, or not at all."""
    repair: Literal["both", "outputs", "norms", "none"] = "both"
    """Closed-form repair on the calibration images: factored layers' outputs by least squares, norms' statistics."""
    align: int = Field(default=8, ge=1)
    """Ranks are rounded down to a multiple of this, the tile of the runtime's matrix kernels."""
    guard: float = Field(default=0.9, gt=0, le=1)
    """A layer stays dense when its rank exceeds this share of the break-even rank, in (0, 1]."""
    min_width: int = Field(default=64, ge=1)
    """A layer with fewer inputs or outputs than this stays dense."""
    skip: tuple[str, ...] = ()
    """Layers left dense, as patterns of dotted names: `stages.0.*`."""
    memory_gb: float = Field(default=2.0, gt=0)
    """Memory for second moments of inputs, GB; beyond it those of k x k convolutions are simplified, largest first."""
    gate_epochs: int = Field(default=4, ge=1)
    """With `select=gated`: passes over the calibration images."""
    gate_lr: float = Field(default=5e-4, gt=0)
    """With `select=gated`: learning rate of the gates."""

    @field_validator("to")
    @classmethod
    def _a_goal(cls, value: str | None) -> str | None:
        return value if value is None else str(parse_goal(value))

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        energy = None if self.energy == type(self).model_fields["energy"].default else self.energy
        rules = {"to": self.to, "energy": energy, "ratio": self.ratio}
        given = [f"{name}={value}" for name, value in rules.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both choose the ranks; give one of them")
        if self.to is None and self.select is not None:
            raise ValueError(f"select={self.select} shares a budget, and there is none; give --to, as 0.7x-latency")
        if self.table is not None and (self.to is None or not parse_goal(self.to).timed):
            rule = "the budget is not" if self.to else "there is no budget"
            raise ValueError(f"table={self.table} is of milliseconds, and {rule}; give --to, as 0.7x-latency")
        return self

    @property
    def reads(self) -> frozenset[str]:
        """Calibration images, unless nothing looks at what the layers are fed."""
        blind = self.objective == "plain" and self.repair == "none" and self.select != "gated"
        return frozenset() if blind else frozenset({"calib"})

    @property
    def measures(self) -> bool:
        """Whether the budget is one of the exported file."""
        return self.to is not None and parse_goal(self.to).measured

    def sources(self, context: Context) -> dict[str, str]:
        """The table's content."""
        if self.table is None:
            return {}
        from slim.passes.elastic import table  # which is built on this package

        return table.sources(self.table)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Scheme and rank of every layer that pays, and for every other layer why it stays dense."""
        assert context.backbone is not None  # Pass.__call__ set it
        rates = self._rates(model, context)  # an error now, not after the work
        done = frozenset(name for step in context.history for name in _factored_by(step))
        found, dense = candidates(
            model, context.backbone.input.size, min_width=self.min_width, skip=self.skip, factored=done
        )
        ladders, without = self._ladders(model, found, context)
        dense |= without
        figures: dict[str, JsonValue] = {}
        picks: Sequence[Pick | str | None] = [self._pick(ladder) for ladder in ladders] if self.to is None else []
        if self.to is not None and ladders:
            picks, figures = self._reach(model, ladders, context, rates)
        layers: dict[str, JsonValue] = {}
        for ladder, pick in zip(ladders, picks, strict=True):
            name = ladder[0].candidate.name
            if isinstance(pick, Pick):
                layers[name] = _entry(pick)
            else:
                dense[name] = pick or "the budget is met with less loss elsewhere"
        if not layers:
            rule = f"to {self.to}" if self.to else f"ratio {self.ratio}" if self.ratio else f"energy {self.energy}"
            reasons = sorted(set(dense.values())) or ["no Linear layer or convolution"]
            raise PassError(f"low-rank: {rule} leaves every layer dense ({'; '.join(reasons)}); lower it or min_width")
        context.memo["picks"] = [pick for pick in picks if isinstance(pick, Pick)]
        whole: Plan = {"layers": layers, "dense": cast(JsonValue, dense)}
        return {**whole, "budget": figures} if figures else whole

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Two layers of the planned rank in place of each planned one; their values are left unset."""
        layers: Any = plan["layers"]
        for name, chosen in layers.items():
            layer = cast(Layer, model.get_submodule(name))
            surgery.swap(model, name, schemes.factored(layer, chosen["scheme"], chosen["rank"]))
        return model

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue] | None:
        """Fill both factors, then repair. Rank 0's values go to every process."""
        if not is_main():
            return None
        picks: list[Pick] = context.memo["picks"]
        means: dict[str, Tensor] = context.memo["means"]
        for pick in picks:
            _fill(cast(nn.Sequential, model.get_submodule(pick.name)), pick, means.get(pick.name))
        if self.repair == "none":
            return None
        return self._repair(model, teacher, [pick.name for pick in picks], context)

    @classmethod
    def migrate(cls, version: int, config: dict[str, Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
        """Version 1 factored Linear layers and 1 x 1 convolutions by the plain SVD."""
        if version != 1:
            return None
        layers: Any = plan["layers"]
        channel: Plan = {name: {**chosen, "scheme": "channel"} for name, chosen in layers.items()}
        return {**config, "objective": "plain", "conv": "none", "repair": "none"}, {**plan, "layers": channel}

    def _ladders(
        self, model: nn.Module, found: Sequence[Candidate], context: Context
    ) -> tuple[list[Ladder], dict[str, str]]:
        """The ways of every candidate that has one that pays, and why the others have none."""
        allowed = cast(tuple[Scheme, ...], {"best": ("channel", "spatial"), "none": ()}.get(self.conv, (self.conv,)))
        wanted = [one for one in found if self.conv != "none" or one.layer.weight[0, 0].numel() == 1]
        dense = {one.name: "conv is none" for one in found if one not in wanted}
        with surgery.on_device(context.device, model):
            moments = self._moments(model, wanted, context)
            sensitive = self._sensitivities(model, wanted, context)
        means: dict[str, Tensor] = {}
        ladders: list[Ladder] = []
        with context.progress("low-rank: spectra", len(wanted)) as advance:
            for candidate in wanted:
                advance(1, candidate.name)
                seen = moments.pop(candidate.name, None)  # hundreds of MB for one wide convolution
                ways = ways_of(candidate, self.objective, seen, allowed, sensitivity=sensitive.get(candidate.name))
                paying = [way for way in ways if way.ranks(self.align, self.guard)]
                if not paying:
                    dense[candidate.name] = f"no multiple of {self.align} pays"
                    continue
                ladders.append(paying)
                if seen is not None and candidate.layer.bias is not None:
                    means[candidate.name] = seen.expanded(candidate.layer.weight[0, 0].numel()).mean
        context.memo["means"] = means
        return ladders, dense

    def _moments(self, model: nn.Module, found: Sequence[Candidate], context: Context) -> dict[str, Moments]:
        if self.objective == "plain" or not found:
            return {}
        return calibrate.collect(
            model,
            [one.name for one in found],
            images=calibration.count(context, self.name, BLIND),
            batches=calibration.images(context),
            memory_gb=self.memory_gb,
            device=context.device,
            progress=context.progress,
        )

    def _sensitivities(self, model: nn.Module, found: Sequence[Candidate], context: Context) -> dict[str, float]:
        """How much the prediction depends on each layer; asked only where layers compete for a budget."""
        if self.to is None or self.objective == "plain" or not found:
            return {}
        names, images = [one.name for one in found], calibration.images(context)
        return sensitivities(model, names, images, seed=context.seed, device=context.device, progress=context.progress)

    def _pick(self, ladder: Ladder) -> Pick | str:
        """What `energy` or `ratio` asks of one layer, or why it stays dense."""
        picks = [Pick(way, rank) for way in ladder if (rank := self._rank(way)) and way.pays(rank, self.guard)]
        if picks:  # what loses least at `ratio`; what is smallest at `energy`
            by_ratio, by_energy = (lambda p: p.way.losses[p.rank]), (lambda p: p.way.params(p.rank))
            return min(picks, key=by_energy if self.ratio is None else by_ratio)
        short = all(self._rank(way) == 0 for way in ladder)
        return f"rank below one tile of {self.align}" if short else "its rank would not pay"

    def _rank(self, way: Way) -> int:
        if self.ratio is not None:
            wanted = int(self.ratio * way.break_even)
        else:  # the least rank that keeps the energy; rounding may leave the last loss a little over 0
            wanted = int((way.losses > 1 - self.energy + 1e-12).sum())
            if wanted == len(way.losses):  # losses far beyond break-even are not worked out
                wanted = way.factors.spectrum.shape[-1]
        return wanted // self.align * self.align

    def _rates(self, model: nn.Module, context: Context) -> Rates | None:
        """What the table says of the network."""
        if self.table is None:
            return None
        from slim.passes.elastic import dense  # which is built on this package

        return dense.rates(self.table, model, parse_goal(str(self.to)), context, self.name)

    def _reach(
        self, model: nn.Module, ladders: list[Ladder], context: Context, rates: Rates | None
    ) -> tuple[list[Pick | None], dict[str, JsonValue]]:
        assert self.to is not None
        goal = parse_goal(self.to)
        rule: Select = self.select or ("knapsack" if goal.timed else "greedy")
        trained: dict[str, JsonValue] = {}
        if rule == "gated":
            before = cost_of(goal, context.fed(model), context, self.name)
            share, by_params = goal.limit_of(before) / before, goal.metric in ("params", "size")
            ways, trained = gates.close_gates(
                model, ladders, share, self._gate_training, context, metric="params" if by_params else "macs"
            )
            ladders = [[way] for way in ways]

        meter = meter_of(goal, context, self.name) if goal.measured else None
        found = offers(goal, ladders, rule=rule, align=self.align, guard=self.guard, meter=meter, rates=rates)

        def build(choices: Sequence[int]) -> Fed:
            chosen = [pick for pick in found.chosen(choices) if pick is not None]
            network = self.rewrite(copy.deepcopy(model), {"layers": {pick.name: _entry(pick) for pick in chosen}})
            for pick in chosen:  # timed with the values it will have
                _fill(cast(nn.Sequential, network.get_submodule(pick.name)), pick, None)
            return context.fed(network)

        words = Words(self.name, "ranks", "lower min_width or skip less")
        choices, figures = reach(goal, found, context.fed(model), build, context, words)
        return found.chosen(choices), {"select": rule, **figures, **({"gates": trained} if trained else {})}

    @property
    def _gate_training(self) -> Training:
        return Training(
            epochs=self.gate_epochs, lr=self.gate_lr, weight_decay=0.0, warmup=0.0, clip=0.0, freeze_norms=True
        )

    def _repair(
        self, model: nn.Module, dense: nn.Module, names: Sequence[str], context: Context
    ) -> dict[str, JsonValue]:
        assert context.backbone is not None  # Pass.__call__ set it
        refit = {f"{name}.1": name for name in names} if self.repair in ("both", "outputs") else {}
        with surgery.on_device(context.device, model, dense):
            most = repair.images_that_fit(model, context.backbone.input.size, self.memory_gb)
            return repair.repair(
                model,
                dense,
                refit,
                next(calibration.images(context, min(most, calibration.count(context, self.name, BLIND)))),
                norms=self.repair in ("both", "norms"),
                batch_size=calibration.EVAL_BATCH,
                progress=context.progress,
            )


def _fill(pair: nn.Sequential, pick: Pick, mean: Tensor | None) -> None:
    """Set both factors. With the mean of the inputs known, the bias makes up for what is lost on average."""
    candidate, scheme = pick.way.candidate, pick.way.scheme
    a, b = pick.way.factors.pair(pick.rank)
    bias = candidate.layer.bias
    if bias is not None and mean is not None:
        change = schemes.matrices(candidate.layer, scheme) - a @ b
        bias = factors.shifted_bias(bias.detach(), schemes.in_channel_layout(change, candidate.layer, scheme), mean)
    schemes.fill(pair, a, b, bias)


def _entry(pick: Pick) -> dict[str, JsonValue]:
    """What the plan says of one layer."""
    timed: dict[str, JsonValue] = {}
    if pick.dense_ms is not None and pick.ms is not None:
        timed = {"dense_ms": round(pick.dense_ms, 6), "ms": round(pick.ms, 6)}
    return {
        "scheme": pick.way.scheme,
        "rank": pick.rank,
        "full": schemes.full_rank(pick.way.candidate.layer, pick.way.scheme),
        "break_even": round(pick.way.break_even, 1),
        "loss": round(float(pick.way.losses[pick.rank]), 6),
        **timed,
    }


def _factored_by(step: Step) -> Iterator[str]:
    """Layers that a step made two of: one of this pass, or one that cut out a subnet of lower rank."""
    if step.name in ("low-rank", "subnet"):
        layers: Any = step.plan["layers" if step.name == "low-rank" else "ranks"]
        yield from layers
