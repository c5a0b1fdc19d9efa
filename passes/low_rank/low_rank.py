"""Low-rank factorization of Linear layers and 1x1 convolutions: W (o, i) becomes A (o, r) @ B (r, i).

Truncated SVD with the singular values split evenly between both factors (Denton et al. 2014, arXiv:1404.0736; ranks as
in PELA, Guo et al. 2024, arXiv:2310.10700). The discarded loss is the tail of the spectrum, so ranks need no data.
Does not touch k x k, grouped or depthwise convolutions, nor the classifier. Layers whose rank would not pay stay dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any, ClassVar, Self, TypeGuard, cast

import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from slim import surgery
from slim.artifact import Step
from slim.contract import Context, Pass, Plan, Role
from slim.errors import PassError

Layer = nn.Linear | nn.Conv2d
"""What holds a matrix: a Linear layer, or a 1x1 convolution."""


class LowRank(Pass):
    """Factor layers by truncated SVD."""

    name: ClassVar[str] = "low-rank"
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})
    drops: ClassVar[frozenset[str]] = frozenset({"dense"})
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "macs"})

    energy: float = Field(default=0.9, gt=0, le=1)
    """Share of the squared singular values each layer keeps, in (0, 1]."""
    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of its parameters each factored layer keeps, in (0, 1); given, ranks follow it and not `energy`."""
    align: int = Field(default=8, ge=1)
    """Ranks are rounded down to a multiple of this, the tile of the runtime's matrix kernels."""
    guard: float = Field(default=0.9, gt=0, le=1)
    """A layer stays dense when its rank exceeds this share of the break-even rank i*o/(i+o), in (0, 1]."""
    min_width: int = Field(default=64, ge=1)
    """A layer with fewer inputs or outputs than this stays dense."""
    skip: tuple[str, ...] = ()
    """Layers left dense, as patterns of dotted names: `stages.0.*`."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.ratio is not None and self.energy != type(self).model_fields["energy"].default:
            raise ValueError(f"energy={self.energy} and ratio={self.ratio} both choose the ranks; give one of them")
        return self

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Rank of every layer that pays, and for every other layer why it stays dense."""
        layers: dict[str, JsonValue] = {}
        dense: dict[str, JsonValue] = {}
        heads, called = surgery.classifiers(model), _called(model, context)
        done = {name for step in context.history if step.name == self.name for name in _factored_by(step)}
        candidates = [(name, module) for name, module in model.named_modules() if _is_matrix(module)]
        for pattern in self.skip:
            if candidates and not any(fnmatch(name, pattern) for name, _ in candidates):
                raise PassError(f"low-rank: skip {pattern!r} matches no layer; names are such as {candidates[0][0]!r}")
        with context.progress("low-rank: spectra", len(candidates)) as advance:
            for name, module in candidates:
                advance(1, name)
                chosen = self._left_dense(name, module, heads, called, done) or self._choose(name, module)
                (dense if isinstance(chosen, str) else layers)[name] = chosen
        if not layers:
            rule = f"ratio {self.ratio}" if self.ratio is not None else f"energy {self.energy}"
            reasons = sorted({str(reason) for reason in dense.values()}) or ["no Linear layer or 1x1 convolution"]
            raise PassError(f"low-rank: {rule} leaves every layer dense ({'; '.join(reasons)}); lower it or min_width")
        return {"layers": layers, "dense": dense}

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Two layers of the planned rank in place of each planned one; their values are left unset."""
        layers: Any = plan["layers"]
        for name, chosen in layers.items():
            surgery.swap(model, name, factored(cast(Layer, model.get_submodule(name)), chosen["rank"]))
        return model

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        """Fill both factors from the teacher's weight."""
        replaced = [
            (name, layer)
            for name, layer in teacher.named_modules()
            if _is_matrix(layer) and isinstance(model.get_submodule(name), nn.Sequential)
        ]
        with context.progress("low-rank: factors", len(replaced)) as advance, torch.no_grad():
            for name, layer in replaced:
                advance(1, name)
                fill(cast(nn.Sequential, model.get_submodule(name)), layer)

    def _left_dense(
        self, name: str, module: Layer, heads: frozenset[str], called: frozenset[str], done: set[str]
    ) -> str | None:
        outputs, inputs = matrix_shape(module)
        if name in heads:
            return "classifier"
        if name.rpartition(".")[0] in done:
            return "factored by a step before"
        if any(fnmatch(name, pattern) for pattern in self.skip):
            return "in skip"
        if min(outputs, inputs) < self.min_width:
            return f"narrower than min_width {self.min_width}"
        if name not in called:
            return "its weight is read directly, not called"
        return None

    def _choose(self, name: str, layer: Layer) -> dict[str, JsonValue] | str:
        """What is planned for a layer, or why it stays dense."""
        outputs, inputs = matrix_shape(layer)
        if not layer.weight.isfinite().all():
            raise PassError(f"low-rank: layer {name!r} holds values that are not finite; start from weights that are")
        spectrum = torch.linalg.svdvals(as_matrix(layer.weight))
        if not spectrum.any():
            return "its weight is zero"
        if self.ratio is None:
            wanted = rank_for_energy(spectrum, self.energy)
        else:
            wanted = int(self.ratio * break_even(outputs, inputs))
        rank = wanted // self.align * self.align
        if rank == 0:
            return f"rank below one tile of {self.align}"
        most = break_even(outputs, inputs)
        if rank > self.guard * most or rank >= most:
            return "its rank would not pay"
        kept = float((spectrum[:rank] ** 2).sum() / (spectrum**2).sum())
        return {
            "rank": rank,
            "full": len(spectrum),
            "break_even": round(break_even(outputs, inputs), 1),
            "energy": round(kept, 6),
        }


def break_even(outputs: int, inputs: int) -> float:
    """Rank at which two factors have as many parameters as one matrix."""
    return outputs * inputs / (outputs + inputs)


def rank_for_energy(spectrum: Tensor, energy: float) -> int:
    """Least rank whose squared singular values reach `energy` of their sum. spectrum: (n,) descending."""
    share = torch.cumsum(spectrum**2, 0) / (spectrum**2).sum()
    # Rounding can leave the last share a little under 1.
    return min(int((share < energy).sum()) + 1, len(spectrum))


def balanced_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (o, rank) and B (rank, i) with A @ B the best rank-`rank` approximation of weight (o, i), in fp64.

    Each factor takes the square root of the singular values: equal ranges suit a later int8 best. Nested: the factors
    of a smaller rank are the first columns of A and rows of B.
    """
    left, spectrum, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = spectrum[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def as_matrix(weight: Tensor) -> Tensor:
    """(o, i) or (o, i, 1, 1) as (o, i) fp64, detached."""
    return weight.detach().flatten(1).double()


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Outputs and inputs of a Linear layer or 1x1 convolution."""
    return layer.weight.shape[0], layer.weight.shape[1]


def factored(layer: Layer, rank: int) -> nn.Sequential:
    """Two layers in place of one, values unset: B takes the inputs and the stride, A gives the outputs and the bias."""
    outputs, inputs = matrix_shape(layer)
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
    first = nn.Conv2d(inputs, rank, 1, stride=layer.stride, bias=False)  # type: ignore[arg-type]
    return nn.Sequential(first, nn.Conv2d(rank, outputs, 1, bias=bias))


def fill(pair: nn.Sequential, layer: Layer) -> None:
    """Set the values of `factored(layer, rank)` from the layer's."""
    first, second = cast(Layer, pair[0]), cast(Layer, pair[1])
    a, b = balanced_factors(as_matrix(layer.weight), first.weight.shape[0])
    first.weight.copy_(b.reshape(first.weight.shape))
    second.weight.copy_(a.reshape(second.weight.shape))
    if layer.bias is not None and second.bias is not None:
        second.bias.copy_(layer.bias)


def _factored_by(step: Step) -> Iterator[str]:
    layers: Any = step.plan["layers"]
    yield from layers


def _is_matrix(module: nn.Module) -> TypeGuard[Layer]:
    if type(module) is nn.Linear:
        return True
    # Subclasses are left out: standardised or transformed weights are not what their convolution computes with.
    # timm's Conv2dSame pads by stride and kernel, which is nothing for 1 x 1.
    plain = type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"
    return (
        plain
        and isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.groups == 1
        and (module.padding in ((0, 0), "same", "valid"))
    )


def _called(model: nn.Module, context: Context) -> frozenset[str]:
    """Layers that the forward pass calls: some timm attention reads `qkv.weight` itself, which a pair does not have."""
    assert context.backbone is not None  # Pass.__call__ set it
    seen: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: seen.add(name))
        for name, module in model.named_modules()
        if _is_matrix(module)
    ]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, *context.backbone.input.size))
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(seen)
