"""What must hold after every pass: one function per invariant, and no switch that turns one off.

1. the input artifact is bit-identical          5. finite outputs of the right shape at batch 1 and 2, twice the same
2. `fit` kept every key, shape and dtype         6. no hooks, parametrizations or stray devices are left
3. backbone + history rebuild the network        7. a pass that claims to shrink a cost did not grow it
4. config and plan survive a JSON round trip
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slim import costs
from slim.artifact import Artifact, Step, state_digest
from slim.contract import Meter, Pass, Plan
from slim.errors import StoreError, VerifyError
from slim.measurement import Measurement

Signature = dict[str, tuple[tuple[int, ...], torch.dtype]]

REPLAY_TOLERANCE = 1e-5
"""Largest difference between the network in hand and its replay, relative to the largest output. Their values are
bit-identical; kernels may still add in another order where memory formats differ."""


def after_pass(pass_: Pass, given: Artifact, model: nn.Module, structure: Signature, step: Step) -> Artifact:
    """The artifact after a pass, once every invariant held. `structure` is the signature `rewrite` left.

    Raises:
        VerifyError: names the pass and what it broke.
    """
    model.eval()
    input_unchanged(pass_, given)
    signature_kept(pass_, structure, model)
    nothing_left_behind(pass_, model, may_hold_gates="supernet" in pass_.gives)
    result = Artifact.of(model, given.backbone, history=(*given.history, step), labels=given.labels, trust=given.trust)
    # The caller's generator is left as it was; within, a network that draws random numbers gets new ones every call.
    with torch.random.fork_rng(devices=[]):
        outputs = outputs_sound(pass_, model, given)
        replayed(pass_, result, model, outputs)
    cost_not_grown(pass_, given, model)
    digests = {**step.digests, "input": given.digest, "output": result.digest}
    history = (*given.history, step.model_copy(update={"digests": digests}))
    return Artifact(given.backbone, result.state, history, given.labels, given.trust)


def ship(artifact: Artifact, meter: Meter) -> Measurement:
    """Export and parity: whether what is shipped computes what the network computes. Raises ParityError."""
    return meter.parity(artifact)


def signature(model: nn.Module) -> Signature:
    """Shape and dtype by state-dict key."""
    return {key: (tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}


def input_unchanged(pass_: Pass, given: Artifact) -> None:
    """Invariant 1. The digest in the artifact was taken before the pass ran."""
    if state_digest(given.state) != given.weights:
        raise VerifyError(f"{pass_.name}: changed the artifact it was given; work on the module, it is a copy")


def signature_kept(pass_: Pass, before: Signature, model: nn.Module) -> None:
    """Invariant 2: `fit` changes values, never structure."""
    after = signature(model)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            old, new = before.get(key, "nothing"), after.get(key, "nothing")
            raise VerifyError(f"{pass_.name}: fit turned {key!r} from {old} into {new}; change structure in rewrite")


def replayed(pass_: Pass, result: Artifact, model: nn.Module, outputs: Tensor) -> None:
    """Invariant 3: what is saved rebuilds the network in hand, and computes the same."""
    try:
        rebuilt = result.model()
    except (StoreError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise VerifyError(f"{pass_.name}: replay fails ({detail}); rewrite must need nothing but its plan") from error
    if signature(rebuilt) != signature(model):
        raise VerifyError(f"{pass_.name}: replay gives other keys, shapes or dtypes; rewrite must need only its plan")
    again = _forward(rebuilt, result, batch=2)
    if not torch.allclose(again, outputs, rtol=0, atol=REPLAY_TOLERANCE * max(1.0, float(outputs.abs().max()))):
        worst = float((again - outputs).abs().max())
        raise VerifyError(f"{pass_.name}: the replayed network differs by {worst:.3g}; it has state outside its values")


def plain_json(pass_: Pass, plan: Plan) -> Plan:
    """Invariant 4: the plan and the configuration as JSON gives them back."""
    try:
        again: Plan = json.loads(json.dumps(plan, allow_nan=False))
        config = type(pass_)(**json.loads(json.dumps(pass_.model_dump(mode="json"), allow_nan=False)))
    except (TypeError, ValueError, ValidationError) as error:
        raise VerifyError(f"{pass_.name}: configuration or plan is not plain JSON: {error}") from error
    if again != plan or config != pass_:
        what = "plan" if again != plan else "configuration"
        raise VerifyError(f"{pass_.name}: its {what} comes back changed from JSON; use str keys and plain values")
    return again


def outputs_sound(pass_: Pass, model: nn.Module, given: Artifact) -> Tensor:
    """Invariant 5; the outputs at batch 2, (2, classes)."""
    classes = given.backbone.num_classes
    for batch in (1, 2):
        outputs = _forward(model, given, batch=batch)
        if outputs.shape != (batch, classes):
            raise VerifyError(f"{pass_.name}: outputs have shape {tuple(outputs.shape)}, not {(batch, classes)}")
        if not outputs.isfinite().all():
            raise VerifyError(f"{pass_.name}: outputs at batch {batch} are not finite")
        if not torch.equal(outputs, _forward(model, given, batch=batch)):
            raise VerifyError(f"{pass_.name}: outputs differ between two calls in eval mode; remove the randomness")
    return outputs


def nothing_left_behind(pass_: Pass, model: nn.Module, *, may_hold_gates: bool = False) -> None:
    """Invariant 6: no hooks, parametrizations or stray devices. A supernet may carry its gates."""
    for name, module in model.named_modules():
        if not may_hold_gates and any(getattr(module, hooks) for hooks in _HOOKS):
            raise VerifyError(f"{pass_.name}: left a hook on {name or 'the network'!r}; remove it before fit returns")
        if parametrize.is_parametrized(module):
            raise VerifyError(f"{pass_.name}: left a parametrization on {name!r}; remove_parametrizations in fit")
    for name, value in _values(model):
        if value.device.type != "cpu":
            raise VerifyError(f"{pass_.name}: left {name!r} on {value.device}; move the network back to the CPU")


def cost_not_grown(pass_: Pass, given: Artifact, model: nn.Module) -> None:
    """Invariant 7, for the costs the pass names in `shrinks`."""
    if not pass_.shrinks:
        return
    size = given.backbone.input.size
    before, after = costs.count(given.model(), size), costs.count(model, size)
    for cost in sorted(pass_.shrinks):
        if after[cost] > before[cost]:
            raise VerifyError(f"{pass_.name}: claims to shrink {cost}, grew it from {before[cost]} to {after[cost]}")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _forward(model: nn.Module, given: Artifact, *, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, *given.backbone.input.size, generator=generator)
    with torch.inference_mode():
        outputs: Any = model(images)
    if not isinstance(outputs, Tensor):
        raise VerifyError(f"the network returned {type(outputs).__name__}, not a tensor of logits")
    return outputs
