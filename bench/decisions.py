"""What each pass decided for a layer and why, in a few words, read off the plans of a history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from slim.artifact import Step
from slim.quantization import module_of


class Decision(BaseModel):
    """What one pass decided for one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Pass name."""
    text: str
    """In a few words."""
    changes: bool
    """Whether the layer has another size or pattern for it; false where it is left, with the reason."""


def decisions(history: Sequence[Step], layer: str) -> Iterator[Decision]:
    """What the passes of a history decided for a layer; those that decide nothing by layer are left out."""
    for step in history:
        found = SENTENCES[step.name](step.plan, layer) if step.name in SENTENCES else None
        if found is not None:
            yield Decision(name=step.name, text=found.text, changes=found.changes)


class Sentence(NamedTuple):
    """What a plan says of a layer, and whether that changes the layer."""

    text: str
    changes: bool


Plan = Mapping[str, Any]


def _low_rank(plan: Plan, layer: str) -> Sentence | None:
    if chosen := plan["layers"].get(layer):
        texts = [f"rank {chosen['rank']} of {chosen['full']}"]
        texts += ["spatial"] if chosen["scheme"] == "spatial" else []
        texts += [_lost(chosen["loss"])] if "loss" in chosen else []
        texts += [f"{chosen['dense_ms']:.3f} -> {chosen['ms']:.3f} ms"] if "ms" in chosen else []
        return Sentence(", ".join(texts), True)
    reason = plan["dense"].get(layer)
    return Sentence(f"left, {reason}", False) if reason else None


def _prune(plan: Plan, layer: str) -> Sentence | None:
    found = _widths(plan, layer)
    if cut := [text for text, changes in found if changes]:
        return Sentence(", ".join(cut), True)
    for name, reason in plan["left"].items():
        if name.partition(":")[0] == layer:
            return Sentence(f"left, {reason}", False)
    return Sentence(", ".join(text for text, _ in found), False) if found else None


def _sparsify(plan: Plan, layer: str) -> Sentence | None:
    cut = [text for text, changes in _widths(plan, layer) if changes]
    return Sentence(f"trained towards {', '.join(cut)}", False) if cut else None


def _subnet(plan: Plan, layer: str) -> Sentence | None:
    if any(layer.startswith(f"{block}.") for block in plan["skipped"]):
        return Sentence("its block is left out", True)
    cut = [text for text, changes in _widths(plan, layer) if changes]
    cut += [f"two layers of rank {plan['ranks'][layer]}"] if layer in plan["ranks"] else []
    return Sentence(", ".join(cut), True) if cut else None


def _widths(plan: Plan, layer: str) -> list[Sentence]:
    """What becomes of a layer's outputs and inputs, for each group of channels that it makes or reads."""
    found = []
    for side, channels in (("makes", "outputs"), ("reads", "inputs")):
        for group in plan["groups"].values():
            if layer not in group["layers"][side]:
                continue
            before, after = group["width"], group["kept"]
            if group["kind"] == "channels":
                what = channels
            else:  # whole heads, or what every head has of them
                before, after = before // group["unit"], after // group["unit"]
                what = "heads" if group["kind"] == "heads" else "dims of a head"
            cut = after < before
            lost = f" ({_lost(group['lost'])})" if side == "makes" and "lost" in group else ""
            found.append(Sentence(f"{before} -> {after} {what}{lost}" if cut else f"all {before} {what} stay", cut))
    return found


def _elastic(plan: Plan, layer: str) -> Sentence | None:
    texts = []
    for dim in plan["dims"].values():
        if layer in dim["layers"]["makes"]:
            heads = dim["kind"] == "heads"
            widths = [count if heads else count * dim["unit"] for count in dim["choices"]]
            texts.append(f"{', '.join(map(str, widths))} {'heads' if heads else 'outputs'}")
    if rank := plan["ranks"].get(layer):
        texts.append(f"whole or rank {', '.join(map(str, rank['choices'][1:]))}")
    if texts:
        return Sentence(f"{'; '.join(texts)} to choose from", False)
    names = (layer, f"rank of {layer}")
    reasons = (reason for name, reason in plan["left"].items() if name.partition(":")[0] in names)
    return next((Sentence(f"left, {reason}", False) for reason in reasons), None)


def _merge(plan: Plan, layer: str) -> Sentence | None:
    texts, changes = [], False
    places = _places(layer)
    for kind, what in (("norms", "norm"), ("scales", "scale")):
        texts += [f"{what} {plan[kind][place]} folded in" for place in places if place in plan[kind]]
    for first, second in plan["pairs"].items():
        if first in places or second in places:
            changes = True
            other = second if first in places else first
            texts.append("one layer again" if other in places else f"one layer with {other}")
    return Sentence(", ".join(texts), changes) if texts else None


def _mask(plan: Plan, layer: str) -> Sentence | None:
    for place in _places(layer):
        if chosen := plan["layers"].get(place):
            return Sentence(f"{chosen['pattern']} zeros, {100 * chosen['kept']:.0f} % stay", True)
    reason = plan["left"].get(layer)
    return Sentence(f"left, {reason}", False) if reason else None


def _qat(plan: Plan, layer: str) -> Sentence | None:
    for place in _places(layer):
        if place in plan["layers"]:
            return Sentence("trained in simulated INT8", True)
    reason = plan["left"].get(layer)
    return Sentence(f"left, {reason}", False) if reason else None


def _quantize(plan: Plan, layer: str) -> Sentence | None:
    served = plan["quantization"]
    kept = {module_of(key) if served["precision"] == "int8" else key for key in served["floats"]}
    if any(place in kept for place in _places(layer)):
        return Sentence("left in 32 bits", False)
    return Sentence(f"served in {served['precision']}", True)


def _places(layer: str) -> tuple[str, ...]:
    """Where the layer lies, also once a low-rank has made a pair of it."""
    return layer, f"{layer}.0", f"{layer}.1"


def _lost(share: float) -> str:
    return f"{100 * share:.1f} % lost"


SENTENCES: dict[str, Callable[[Plan, str], Sentence | None]] = {
    "elastic": _elastic,
    "low-rank": _low_rank,
    "mask": _mask,
    "merge": _merge,
    "prune": _prune,
    "qat": _qat,
    "quantize": _quantize,
    "sparsify": _sparsify,
    "subnet": _subnet,
}
"""Pass -> what its plan says of a layer."""
