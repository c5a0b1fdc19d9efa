"""Sparsify: training drives the channels that will be cut to zero first, so that the cut itself costs nothing.

Which channels go is decided up front for a budget, as `prune` decides it; then the network trains on labels while a
penalty on those channels grows (Wang et al. 2021, growing regularisation, arXiv:2012.09243), or a proximal step makes
them exactly zero (group lasso: Yuan and Lin 2006; on batch norm scales: Liu et al. 2017, arXiv:1708.06519). What is
penalised has no weight decay. The attention term of Sparse-ViT (arXiv:2307.11988) can be added; it makes no channel
vanish, and is kept as published for comparison. Cuts nothing: `prune --to sparsified` behind it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import Tensor, nn

from slim.contract import Context, Pass, Plan, Role
from slim.data import Augment, Batch
from slim.errors import PassError
from slim.goal import parse_goal
from slim.passes.finetune import label_loss
from slim.passes.prune.choose import BLIND, Chooser, Choosing, numbers
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
        targets = targets_of(model, context.plan, self.penalty)
        objective = _Sparsifying(model, targets, self)
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
    norm_types = nn.BatchNorm1d | nn.BatchNorm2d
    norms_of = {name for name, module in model.named_modules() if isinstance(module, norm_types)}
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


def norms(value: Tensor, dim: int, places: list[int]) -> list[float]:
    """Norms of the slices at `places` of a dimension, over the mean norm of the others."""
    each = (
        value.detach().double().movedim(dim, 0).flatten(1).norm(dim=1)
        if value.ndim > 1
        else value.detach().double().abs()
    )
    stays = torch.ones(len(each), dtype=torch.bool, device=each.device)
    stays[places] = False
    found: list[float] = (each[places] / each[stays].mean().clamp(min=torch.finfo(torch.double).tiny)).tolist()
    return found


def shrink(value: Tensor, dim: int, places: Tensor, factor: float) -> None:
    """Multiply slices, in place."""
    value.index_copy_(dim, places, value.index_select(dim, places) * factor)


def soften(value: Tensor, dim: int, places: Tensor, threshold: float) -> None:
    """The proximal step of a group lasso: each slice's norm falls by `threshold`, to zero at least, in place."""
    slices = value.index_select(dim, places).movedim(dim, 0)
    norm = slices.flatten(1).norm(dim=1) if slices.ndim > 1 else slices.abs()
    factor = (1 - threshold / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(min=0)
    slices = slices * factor.view(-1, *[1] * (slices.ndim - 1))
    value.index_copy_(dim, places, slices.movedim(0, dim))


class _Sparsifying:
    """The loss, and what happens to the targets after every step."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Mapping[int, list[int]]], settings: Sparsify) -> None:
        self.settings, self.done = settings, 0.0
        self.undecayed = frozenset(targets)
        """Parameters without weight decay; read by the training loop."""
        self.slices = [
            (model.get_parameter(key), dim, torch.tensor(some))
            for key, dims in targets.items()
            for dim, some in dims.items()
        ]
        self.largest = [self._largest(*one) for one in self.slices]
        self.attention = _Attention(model) if settings.attention else None

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        losses = label_loss(model, batch)
        if self.attention is not None:
            losses["attention"] = self.settings.attention * self.attention.term()
        return losses

    @torch.no_grad()
    def after_step(self, share_done: float) -> None:
        """Shrink the targets by what is due since the last step."""
        step, self.done = share_done - self.done, share_done
        for (value, dim, places), largest in zip(self.slices, self.largest, strict=True):
            places = places.to(value.device)
            if self.settings.penalty == "grow":
                # The rate grows in proportion to the time: its integral up to DONE is log(1 / LEAST).
                rate = 2 * min(share_done, DONE) / DONE**2 * -math.log(LEAST)
                shrink(value, dim, places, math.exp(-self.settings.strength * rate * step))
            else:
                soften(value, dim, places, self.settings.strength * largest / DONE * step)

    def close(self) -> None:
        """Leave the network without hooks."""
        if self.attention is not None:
            self.attention.close()

    @staticmethod
    @torch.no_grad()
    def _largest(value: Tensor, dim: int, places: Tensor) -> float:
        slices = value.index_select(dim, places).movedim(dim, 0).reshape(len(places), -1)
        return float(slices.norm(dim=1).max())


class _Attention:
    """The attention probabilities of every block, seen where they enter their dropout."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[Any] = [module for module in model.modules() if is_attention(module)]
        if not self.modules:
            raise PassError(
                "sparsify: attention has a weight, but the network has no attention that it knows; leave it out"
            )
        self.fused = [one.fused_attn for one in self.modules]
        self.seen: list[Tensor] = []
        self.hooks = []
        for one in self.modules:
            one.fused_attn = False  # the fused kernel never shows its probabilities
            self.hooks.append(one.attn_drop.register_forward_pre_hook(lambda _m, inputs: self.seen.append(inputs[0])))

    def term(self) -> Tensor:
        """Mean of log(1 + A^2) over heads, rows and columns, averaged over blocks, of the last forward pass."""
        found = torch.stack([seen.float().square().log1p().mean() for seen in self.seen]).mean()
        self.seen.clear()
        return found

    def close(self) -> None:
        """As it was."""
        for hook in self.hooks:
            hook.remove()
        for one, fused in zip(self.modules, self.fused, strict=True):
            one.fused_attn = fused
