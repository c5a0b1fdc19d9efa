"""Elastic: a pretrained network is trained so that its subnets work as well, and any of them can be cut out later.

The sandwich of the largest, the smallest and random subnets (BigNAS, arXiv:2003.11142) from a pretrained start, with
the subnets' gradients ramped up (DepS, arXiv:2407.06167); widths are ordered by importance once (DynaBERT,
arXiv:2004.04037). The network stays what it was: gates exist while it is trained alone, and its state dict is that of
the stock network. Does not choose a subnet: that is `subnet`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator
from torch import nn

from slim import surgery
from slim.artifact import Artifact
from slim.contract import Context, Pass, Plan, Role
from slim.data import Augment
from slim.distributed import is_main
from slim.errors import PassError
from slim.passes import calibration
from slim.passes.elastic import overview, sampling
from slim.passes.elastic.discover import Found, Wanted, discover
from slim.passes.elastic.examine import Examiner
from slim.passes.elastic.gates import gated
from slim.passes.elastic.objective import Branches, Choose, Divergence, Sandwich
from slim.passes.elastic.space import Dim, Space
from slim.passes.prune.criteria import BLIND, Criterion, ranked
from slim.passes.prune.groups import groups_of
from slim.training import Training

OF_SANDWICH = ("nets", "ramp", "divergence", "label_weight", "guard")
"""Fields that mean nothing to POA."""


class Elastic(Training, Augment, Pass):
    """Train a network together with its subnets."""

    name: ClassVar[str] = "elastic"
    version: ClassVar[int] = 2
    role: ClassVar[Role] = "prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"dense", "float"})
    gives: ClassVar[frozenset[str]] = frozenset({"supernet"})
    drops: ClassVar[frozenset[str]] = frozenset({"dense"})

    epochs: int = Field(default=10, ge=0)
    """Passes over the training images; 0 trains nothing: subnets are then cut out of the network as it is."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate; a fifth to a tenth of what the network was trained with."""
    widths: tuple[float, ...] = (1.0, 0.75, 0.5)
    """Shares of a block's inner width to choose from, in (0, 1]."""
    depth: float = Field(default=0.5, gt=0, le=1)
    """Least share of a stage's blocks that stay; 1 keeps them all."""
    heads: Literal["whole", "none"] = "whole"
    """Whether attention heads are elastic."""
    ranks: tuple[float, ...] = (1.0,)
    """Shares of a layer's operations that two thinner layers in its place may have, in (0, 1]; 1 is the layer itself,
    and by default it is all there is."""
    min_width: int = Field(default=64, ge=1)
    """A layer with fewer inputs or outputs than this is never two."""
    pixels: tuple[int, ...] = ()
    """Smaller sides of the input to choose from, such as `192,160`; by default it has its own alone."""
    align: int = Field(default=8, ge=1)
    """Widths are multiples of this, the tile of the runtime's kernels."""
    floor: int = Field(default=8, ge=1)
    """Least width, in channels."""
    skip: tuple[str, ...] = ()
    """Layers and blocks that stay whole, as patterns of dotted names: `stages.0.*`."""
    criterion: Criterion = "taylor"
    """What orders the channels of a width: the Fisher information of the network's own predictions (`taylor`) or of the
    labels (`taylor-labels`), image by image, or another criterion of prune."""
    method: Literal["sandwich", "ends", "poa"] = "sandwich"
    """Which subnets learn in a step: the smallest and random ones, the smallest alone, or POA's, without labels."""
    nets: int = Field(default=4, ge=2)
    """Sandwich: networks trained in a step, the largest and the smallest among them."""
    ramp: float = Field(default=0.1, ge=0, le=1)
    """Share of all steps over which the subnets' weight rises to 1 (DepS); 0 is the plain sandwich."""
    divergence: Divergence = "kl"
    """How far a subnet is from the largest: Kullback-Leibler, or AlphaNet's adaptive alpha-divergence."""
    temperature: float = Field(default=1.0, gt=0)
    """What logits are divided by in distillation; the losses are multiplied by its square."""
    label_weight: float = Field(default=1.0, ge=0)
    """Weight of cross-entropy with the labels in the largest; 0 reads no label."""
    guard: float = Field(default=0.5, ge=0)
    """Weight of the divergence of the largest from the network before training, which keeps it from drifting."""
    images: Literal["train", "unlabeled", "all"] = "train"
    """Which images are shown: the training split, the unlabeled pool, or both."""
    held_out: int = Field(default=1000, ge=1)
    """Training images that are not trained on, on which subnets are compared later."""

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        unused = [name for name in OF_SANDWICH if getattr(self, name) != Elastic.model_fields[name].default]
        if self.method == "poa" and unused:
            raise ValueError(f"method poa has no {', '.join(unused)}; leave it out, or choose sandwich")
        if self.method == "ends" and self.nets != Elastic.model_fields["nets"].default:
            raise ValueError(f"method ends trains two networks a step, not nets={self.nets}; leave it out")
        if self.method != "poa" and not self.label_weight and not self.guard:
            raise ValueError("label_weight=0 and guard=0: nothing trains the largest; give one of them")
        for name, shares in (("widths", self.widths), ("ranks", self.ranks)):
            if any(not 0 < share <= 1 for share in shares):
                raise ValueError(f"{name} {shares}: shares lie in (0, 1]; 0.5 keeps half")
        return self

    @property
    def reads(self) -> frozenset[str]:
        """The splits shown, and those that rank and compare."""
        looks = {"calib"} if self.criterion not in BLIND else set()
        return frozenset({"train", *(self.splits if self.epochs else ()), *looks})

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits shown, in order."""
        return ("train", "unlabeled") if self.images == "all" else (self.images,)

    def forecast(self, artifact: Artifact, context: Context) -> dict[str, JsonValue]:
        """What will be elastic, and how long training takes."""
        assert context.data is not None  # Pipeline.check saw to it
        found = discover(artifact.model(), artifact.backbone.input.size, self._wanted)
        data = context.data.apart(self.held_out, context.seed)
        return {
            "widths": len(found.groups),
            "blocks": len(found.blocks),
            "ranks": len(found.ranks),
            "sides": len(found.pixels) - 1,
            "left": len(found.left),
            "networks_a_step": self.nets if self.method == "sandwich" else 2,
            "steps": data.steps(context.loading.batch_size, self.splits) * self.epochs,
        }

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """What is elastic, in which order units go, and why the rest is not."""
        assert context.backbone is not None  # Pass.__call__ set it
        assert context.data is not None  # Pipeline.check saw to it
        held = context.data.apart(self.held_out, context.seed).membership("held")  # an error now, not after the work
        found = discover(model, context.backbone.input.size, self._wanted)
        orders, unranked = self._orders(model, found, context)
        there = [number for number, group in enumerate(found.groups) if group.name in orders]
        dims = [Dim(found.groups[n], found.choices[n], orders[found.groups[n].name]) for n in there]
        space = Space(
            tuple(dims),
            tuple(found.blocks),
            tuple(found.fewest),
            found.left | unranked,
            tuple(found.ranks),
            found.pixels,
        )
        if space.smallest == space.largest:
            reasons = "; ".join(sorted(set(space.left.values()))) or "no layer makes channels that another reads"
            raise PassError(f"elastic: nothing can be elastic ({reasons}); skip less, or lower floor")
        context.log.info(
            "elastic: %d widths, %d blocks, %d ranks, %d smaller inputs; %d stay as they are",
            *(len(space.dims), len(space.blocks), len(space.ranks), len(space.pixels) - 1, len(space.left)),
        )
        for line in overview.lines(space):
            context.log.info("elastic:   %s", line)
        return {**space.as_plan(), "held": held}

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue] | None:
        """Train with gates, and take them off."""
        if not self.epochs:
            return None
        assert context.backbone is not None  # Pass.__call__ set it
        assert context.data is not None  # Pipeline.check saw to it
        space = self.space_of(model, context.backbone.input.size, context.plan)
        context = replace(context, data=context.data.apart(self.held_out, context.seed))
        examiner = Examiner.of(teacher, space, context, "norms") if is_main() else None
        before = _accuracies(examiner)

        def report(epoch: int) -> dict[str, float]:
            if examiner is None:
                return {}
            examiner.model.load_state_dict(model.state_dict())
            now = _accuracies(examiner)
            context.log.info(
                "elastic: epoch %d of %d: largest %.2f %%, smallest %.2f %%; before %.2f and %.2f, held-out images",
                *(epoch, self.epochs, now["largest"], now["smallest"], before["largest"], before["smallest"]),
            )
            return now

        with surgery.on_device(context.device, teacher), gated(model, space) as choose:
            objective = self._objective(choose, space, model, teacher, context.seed)
            _after_epochs(objective, self.epochs, report)
            figures = context.train(model, objective, self, self, self.splits)
        return {**figures, "top1_held_out": {"before": {**before}, "after": {**report(self.epochs)}}}

    def _objective(
        self, choose: Choose, space: Space, model: nn.Module, original: nn.Module, seed: int
    ) -> Sandwich | Branches:
        if self.method == "poa":
            return Branches(
                choose,
                partial(sampling.ladder, space, seed),
                space.largest,
                student=model,
                original=original,
                intact=0.8,
                momentum=0.996,
                temperature=self.temperature,
            )
        draw: Callable[[int], Any] = partial(sampling.sandwich, space, seed, count=self.nets)
        return Sandwich(
            choose,
            draw if self.method == "sandwich" else partial(sampling.ends, space, seed),
            space.largest,
            ramp=self.ramp,
            divergence=self.divergence,
            temperature=self.temperature,
            label_weight=self.label_weight,
            guard=self.guard,
            original=original if self.guard else None,
        )

    @classmethod
    def migrate(cls, version: int, config: dict[str, Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
        """Version 1 had widths and blocks alone."""
        return (config, {**plan, "ranks": {}, "pixels": [0]}) if version == 1 else None

    def space_of(self, model: nn.Module, size: tuple[int, int, int], plan: Plan) -> Space:
        """The space that `plan` has made of a network, with its groups found again. Raises PassError: it changed."""
        return Space.from_plan(plan, groups_of(model, size, heads=self.heads)[0])

    @property
    def _wanted(self) -> Wanted:
        return Wanted(
            widths=self.widths,
            depth=self.depth,
            heads=self.heads,
            align=self.align,
            floor=self.floor,
            skip=self.skip,
            ranks=self.ranks,
            min_width=self.min_width,
            pixels=self.pixels,
        )

    def _orders(
        self, model: nn.Module, found: Found, context: Context
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Units of each group, the most important first, and why others have no order."""
        looks = self.criterion not in BLIND
        count = calibration.count(context, self.name, "criterion group-l2") if looks else 0
        with surgery.on_device(context.device, model):
            scored, left = ranked(
                model,
                found.groups,
                self.criterion,
                (lambda: calibration.images(context)) if looks else None,
                images=count,
                seed=context.seed,
                labels=calibration.labels(context, self.name) if self.criterion == "taylor-labels" else None,
                device=context.device,
                progress=context.progress,
            )
        orders = {one.group.name: one.scores.argsort(descending=True, stable=True).tolist() for one in scored}
        return {name: tuple(order) for name, order in orders.items()}, left


def _accuracies(examiner: Examiner | None) -> dict[str, float]:
    """Top-1 in percent of the largest and the smallest, on rank 0."""
    if examiner is None:
        return {}
    space = examiner.space
    return {
        name: round(examiner.accuracy(one), 3)
        for name, one in (("largest", space.largest), ("smallest", space.smallest))
    }


def _after_epochs(objective: Sandwich | Branches, epochs: int, report: Callable[[int], object]) -> None:
    """Have `report` called at the end of every epoch but the last, whose values may still be averaged."""
    own: Callable[[float], None] | None = getattr(objective, "after_step", None)

    def after_step(done: float) -> None:
        if own is not None:
            own(done)
        epoch = round(done * epochs)
        if abs(done * epochs - epoch) < 1e-9 and 0 < epoch < epochs:
            report(epoch)

    objective.after_step = after_step  # type: ignore[method-assign]
