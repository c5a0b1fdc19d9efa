"""Sparsify: training drives the channels that will be cut to zero first, so that the cut itself costs nothing.

Which channels go is decided up front for a budget, as `prune` decides it; then the network trains on labels while a
penalty on those channels grows (Wang et al. 2021, growing regularisation, arXiv:2012.09243), or a proximal step makes
them exactly zero (group lasso: Yuan and Lin 2006; on batch norm scales: Liu et al. 2017, arXiv:1708.06519). What is
penalised has no weight decay. The attention term of Sparse-ViT (arXiv:2307.11988) can be added; it makes no channel
vanish, and is kept as published for comparison. Cuts nothing: `prune --to sparsified` behind it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import Tensor, nn

from slim.contract import Context, Pass, Plan, Role
from slim.data import Augment, Batch
from slim.errors import PassError
from slim.goal import parse_goal
from slim.passes.finetune import label_loss
from slim.passes.prune.choose import Chooser, Choosing, numbers
from slim.passes.prune.criteria import BLIND
from slim.passes.prune.groups import is_attention
from slim.training import Training

Penalty = Literal["grow", "lasso", "bn-l1"]
Slices = dict[str, dict[int, list[int]]]
"""Parameter -> dimension -> positions that shall vanish."""

DONE = 0.8
"""Share of the steps after which an untrained channel would have vanished; the rest lets the others settle."""
LEAST = 1e-4
"""What `grow` leaves of an untrained channel by then."""
VANISHED = 1e-3
"""A slice whose norm is below this share of the mean norm of those that stay has vanished."""
NO_ATTENTION = (
    "sparsify: attention has a weight, but no attention of the network shows its probabilities; leave it at 0"
)


class Sparsify(Choosing, Training, Augment, Pass):
    """Train the channels that prune will cut towards zero."""

    name: ClassVar[str] = "sparsify"
    role: ClassVar[Role] = "prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"dense", "float"})

    to: str
    """Budget after the cut, as a share kept or absolutely: `0.6x-latency`, `4ms`, `0.5x-macs`, `2.1M-params`."""
    penalty: Penalty = "grow"
    """What drives channels to zero: growing shrinkage, a proximal group lasso, or one on batch norms' scales alone."""
    strength: float = Field(default=1.0, gt=0)
    """Of the penalty; with 1 an otherwise untrained channel has vanished after four fifths of the steps."""
    attention: float = Field(default=0.0, ge=0)
    """Weight of Sparse-ViT's term, mean log(1 + A^2) over attention probabilities; published with 0.01."""

    @field_validator("to")
    @classmethod
    def _a_goal(cls, value: str) -> str:
        return str(parse_goal(value))

    @model_validator(mode="after")
    def _no_average(self) -> Self:
        if self.ema:
            raise ValueError(f"ema={self.ema} would average channels back that have vanished; leave it at 0")
        return self

    @property
    def reads(self) -> frozenset[str]:
        """Labelled images; calibration images where the criterion looks at them."""
        return frozenset({"train"}) | (frozenset() if self.criterion in BLIND else frozenset({"calib"}))

    @property
    def trains(self) -> bool:
        """Yes, the classifier as well."""
        return True

    @property
    def measures(self) -> bool:
        """Whether the budget is one of the exported file."""
        return parse_goal(self.to).measured

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """What prune will keep; see there."""
        chooser = Chooser(self, model, context, self.name)
        plan = chooser.reach(self.to)
        if not plan["groups"]:
            reasons = sorted(set(chooser.left.values())) or ["every group keeps all it has"]
            raise PassError(f"sparsify: to {self.to} cuts nothing ({'; '.join(reasons)}); ask for less, or scope all")
        return plan

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
        """Train all values in place; what is to be cut vanishes on the way."""
        assert context.data is not None  # Pipeline.check saw to it
        targets = targets_of(model, context.plan, self.penalty)
        steps = context.data.steps(context.loading.batch_size) * self.epochs
        objective = Sparsifying(model, targets, self, steps, context.device)
        try:
            figures = context.train(model, objective, self, self)
        finally:
            objective.close()
        ratios = [
            ratio
            for key, dims in targets.items()
            for dim, some in dims.items()
            for ratio in norms(model.get_parameter(key), dim, some)
        ]
        gone = sum(ratio < VANISHED for ratio in ratios)
        context.log.info("sparsify: %d of %d slices have vanished", gone, len(ratios))
        if gone < len(ratios):
            context.log.warning(
                "sparsify: %d of %d slices are left, the largest at %.2g of what stays; raise --strength or --epochs",
                len(ratios) - gone,
                len(ratios),
                max(ratios),
            )
        return {
            **figures,
            "targets": len(ratios),
            "vanished": round(gone / len(ratios), 6),
            "largest": round(max(ratios), 8),
        }


def targets_of(model: nn.Module, plan: Plan, penalty: Penalty) -> Slices:
    """What of each parameter shall vanish: what the plan does not keep; of `bn-l1` the scales of batch norms alone.

    Raises:
        PassError: a group has no batch norm to put a penalty on.
    """
    keep: Any = plan["keep"]
    groups: Any = plan["groups"]
    parameters = dict(model.named_parameters())
    norms_of = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and f"{name}.weight" in parameters
    }
    if penalty == "bn-l1":
        for name, group in groups.items():
            if not norms_of & {*group["layers"]["makes"]}:
                raise PassError(f"sparsify: penalty bn-l1 needs a batch norm, and group {name!r} has none; use grow")
    found: Slices = {}
    for key, dims in keep.items():
        owner, _, leaf = key.rpartition(".")
        if key not in parameters or (penalty == "bn-l1" and (owner not in norms_of or leaf != "weight")):
            continue
        for dim, kept in dims.items():
            stays = set(numbers(kept))
            places = [place for place in range(parameters[key].shape[int(dim)]) if place not in stays]
            found.setdefault(key, {})[int(dim)] = places
    return found


def lengths(value: Tensor, dim: int) -> Tensor:
    """(n,): norm of each of the n slices of a dimension."""
    found: Tensor = value.movedim(dim, 0).reshape(value.shape[dim], -1).norm(dim=1)
    return found


def norms(value: Tensor, dim: int, places: list[int]) -> list[float]:
    """Norms of the slices at `places` of a dimension, over the mean norm of the others; as they are where that is 0."""
    each = lengths(value.detach().double(), dim)
    stays = torch.ones(len(each), dtype=torch.bool, device=each.device)
    stays[places] = False
    mean = float(each[stays].mean())
    found: list[float] = (each[places] / (mean or 1.0)).tolist()
    return found


def grown(share: float) -> float:
    """Integral, up to a share of the steps, of a rate that grows in proportion to the time until DONE, then stays.

    It is log(1 / LEAST) at DONE.
    """
    growing = min(share, DONE)
    return -math.log(LEAST) * ((growing / DONE) ** 2 + 2 * (share - growing) / DONE)


def shrink(value: Tensor, dim: int, places: Tensor, factor: float) -> None:
    """Multiply slices, in place."""
    value.index_copy_(dim, places, value.index_select(dim, places) * factor)


def soften(value: Tensor, dim: int, places: Tensor, threshold: float | Tensor) -> None:
    """The proximal step of a group lasso: each slice's norm falls by `threshold`, to zero at least, in place."""
    slices = value.index_select(dim, places)
    norm = lengths(slices, dim)
    factor = (1 - threshold / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(min=0)
    shape = [1] * value.ndim
    shape[dim] = -1
    value.index_copy_(dim, places, slices * factor.view(shape))


def attention_term(probabilities: Sequence[Tensor]) -> Tensor:
    """Sparse-ViT's term: mean of log(1 + A^2) over images, heads, rows and columns, averaged over blocks.

    probabilities: (B, H, N, N) of each block. The published code keeps that of the last block alone.
    """
    return torch.stack([one.float().square().log1p().mean() for one in probabilities]).mean()


class Sparsifying:
    """The loss, and what happens to the targets after every step.

    What is due depends on the share done and on the values alone, so a run taken up from a checkpoint goes on as it
    was.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Mapping[int, list[int]]],
        settings: Sparsify,
        steps: int,
        device: torch.device,
    ) -> None:
        self.settings, self.step = settings, 1 / steps
        self.undecayed = frozenset(targets)
        """Parameters without weight decay; read by the training loop."""
        self.slices = [
            (model.get_parameter(key), dim, torch.tensor(some, device=device))
            for key, dims in targets.items()
            for dim, some in dims.items()
        ]
        self.attention = _Attention(model) if settings.attention else None

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss on labels and, where it has a weight, the attention term."""
        losses = label_loss(model, batch)
        if self.attention is not None:
            losses["attention"] = self.settings.attention * self.attention.term()
        return losses

    @torch.no_grad()
    def after_step(self, share_done: float) -> None:
        """Shrink the targets by what is due for one step."""
        before, strength = share_done - self.step, self.settings.strength
        factor = math.exp(-strength * (grown(share_done) - grown(before)))
        # Of the largest slice, so that it is zero at DONE, and from then on. Measured anew, for it may have grown.
        part = strength * self.step / max(DONE - before, self.step)
        for value, dim, places in self.slices:
            if self.settings.penalty == "grow":
                shrink(value, dim, places, factor)
            else:
                soften(value, dim, places, part * lengths(value.index_select(dim, places), dim).max())

    def close(self) -> None:
        """Leave the network without hooks."""
        if self.attention is not None:
            self.attention.close()


class _Attention:
    """The attention probabilities of every block, seen where they enter their dropout."""

    def __init__(self, model: nn.Module) -> None:
        modules: list[Any] = [one for one in model.modules() if is_attention(one)]
        modules = [one for one in modules if isinstance(getattr(one, "attn_drop", None), nn.Module)]
        if not modules:
            raise PassError(NO_ATTENTION)
        self.seen: list[Tensor] = []
        # The fused kernel never shows its probabilities; some attention has no such kernel.
        self.fused: list[tuple[Any, bool]] = [(one, one.fused_attn) for one in modules if hasattr(one, "fused_attn")]
        for one, _ in self.fused:
            one.fused_attn = False
        self.hooks = [one.attn_drop.register_forward_pre_hook(self._see) for one in modules]

    def term(self) -> Tensor:
        """Of the last forward pass."""
        if not self.seen:
            raise PassError(NO_ATTENTION)
        found = attention_term(self.seen)
        self.seen.clear()
        return found

    def close(self) -> None:
        """As it was."""
        for hook in self.hooks:
            hook.remove()
        for one, fused in self.fused:
            one.fused_attn = fused

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen.append(inputs[0])
