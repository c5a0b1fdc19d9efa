"""What must hold after every pass: one function per invariant, and no switch that turns one off.

1. the input artifact is bit-identical          5. finite outputs of the right shape at batch 1 and 2, twice the same
2. `fit` kept every key, shape and dtype         6. no hooks, parametrizations or stray devices are left
3. backbone + history rebuild the network        7. a pass that claims to shrink a cost did not grow it
4. config and plan survive a JSON round trip

5 and 7 are asked with what the network is fed after the pass, which may be other than before, but for its channels.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slim import costs
from slim.artifact import Artifact, Backbone, Preprocessing, Step
from slim.contract import Fed, Meter, Pass, Plan
from slim.errors import StoreError, VerifyError
from slim.measurement import Measurement

Signature = dict[str, tuple[tuple[int, ...], torch.dtype]]

REPLAY_TOLERANCE = 1e-4
"""Largest difference between the network in hand and its replay, as a share of the largest output. Their values are
bit-identical, and so are their outputs unless the pass left another memory format: its kernels add in another order,
which was 3e-6 at most on six networks. Lost state shows at 1e-2 and more."""


def after_pass(
    pass_: Pass, inputs: tuple[Artifact, Artifact], model: nn.Module, structure: Signature, step: Step
) -> Artifact:
    """The artifact after a pass, once every invariant held.

    Args:
        pass_: what was applied.
        inputs: the artifact it was applied to, and the one before the stage.
        model: what it left.
        structure: signature of the network as `rewrite` left it.
        step: the new entry of the history, which gets the digest of the result.

    Raises:
        VerifyError: names the pass and what it broke.
    """
    given = inputs[0]
    model.eval()
    input_unchanged(pass_, *inputs)
    signature_kept(pass_, structure, model)
    nothing_left_behind(pass_, model)
    backbone = fed_after(pass_, given.backbone, step.plan)
    result = Artifact.of(model, backbone, history=(*given.history, step), labels=given.labels, trust=given.trust)
    # The caller's generator is left as it was; within, a network that draws random numbers gets new ones every call.
    with torch.random.fork_rng(devices=[]):
        outputs = outputs_sound(pass_, result, model)
        replayed(pass_, result, model, outputs)
    cost_not_grown(pass_, given, Fed(model, backbone.input))
    done = step.model_copy(update={"digests": {**step.digests, "output": result.digest}})
    return replace(result, history=(*given.history, done))


def ship(artifact: Artifact, meter: Meter) -> Measurement:
    """Export and parity: whether what is shipped computes what the network computes. Raises ParityError."""
    return meter.parity(artifact)


def signature(model: nn.Module) -> Signature:
    """Shape and dtype by state-dict key."""
    return {key: (tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}


def fed_after(pass_: Pass, given: Backbone, plan: Plan) -> Backbone:
    """The backbone with what the network is fed after the pass."""
    try:
        found = Preprocessing.model_validate(pass_.feeds(given.input, plan).model_dump(warnings=False))
    except ValidationError as error:
        detail = error.errors()[0]["msg"]
        raise VerifyError(f"{pass_.name}: feeds says no preprocessing: {detail}; change what it was given") from error
    if _channels(found) != _channels(given.input):
        raise VerifyError(
            f"{pass_.name}: feeds says {_channels(found)}, the network was given {_channels(given.input)}; "
            "change height, width or how they are made, not channels"
        )
    return given.model_copy(update={"input": found})


def input_unchanged(pass_: Pass, *inputs: Artifact) -> None:
    """Invariant 1. The digests kept in the artifacts were taken before the pass ran."""
    for given in inputs:
        if replace(given).digest != given.digest:
            raise VerifyError(f"{pass_.name}: changed an artifact it was given; work on the module, it is a copy")


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
    except StoreError as error:
        raise VerifyError(f"{pass_.name}: replay fails: {error}; rewrite must need nothing but its plan") from error
    if signature(rebuilt) != signature(model):
        raise VerifyError(f"{pass_.name}: replay gives other keys, shapes or dtypes; rewrite must need only its plan")
    worst = float((_forward(pass_, result, rebuilt, batch=2) - outputs).abs().max())
    if not worst <= REPLAY_TOLERANCE * float(outputs.abs().max()):
        raise VerifyError(f"{pass_.name}: the replayed network differs by {worst:.3g}; it has state outside its values")


def config_returns(pass_: Pass) -> Plan:
    """Invariant 4 for the configuration; it as JSON gives it back."""
    config = plain_json(pass_, "configuration", pass_.model_dump(mode="json"))
    try:
        same = type(pass_)(**config) == pass_
    except ValidationError as error:
        detail = error.errors()[0]["msg"]
        raise VerifyError(f"{pass_.name}: its configuration cannot be read back: {detail}; mend its fields") from error
    if not same:
        raise VerifyError(f"{pass_.name}: its configuration comes back changed from JSON; use fields that it can hold")
    return config


def plain_json(pass_: Pass, what: str, value: Plan) -> Plan:
    """Invariant 4 for the plan, and for whatever else goes into the history; it as JSON gives it back."""
    rule = "use a dict with str keys, lists and finite numbers"
    try:
        again = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise VerifyError(f"{pass_.name}: its {what} is not plain JSON ({error}); {rule}") from error
    if again != value or not isinstance(again, dict):
        raise VerifyError(f"{pass_.name}: its {what} comes back changed from JSON; {rule}")
    return again


def outputs_sound(pass_: Pass, result: Artifact, model: nn.Module) -> Tensor:
    """Invariant 5; the outputs at batch 2, (2, classes)."""
    classes = result.backbone.num_classes
    for batch in (1, 2):
        outputs = _forward(pass_, result, model, batch=batch)
        if outputs.shape != (batch, classes):
            raise VerifyError(
                f"{pass_.name}: outputs have shape {tuple(outputs.shape)}, not {(batch, classes)}; leave the classifier"
            )
        if not outputs.isfinite().all():
            raise VerifyError(f"{pass_.name}: outputs at batch {batch} are not finite; look at the values fit leaves")
        if not torch.equal(outputs, _forward(pass_, result, model, batch=batch)):
            raise VerifyError(f"{pass_.name}: outputs differ between two calls in eval mode; remove the randomness")
    return outputs


def nothing_left_behind(pass_: Pass, model: nn.Module) -> None:
    """Invariant 6: no hooks, parametrizations or stray devices."""
    for name, module in model.named_modules():
        place = repr(name) if name else "the network"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise VerifyError(f"{pass_.name}: left a hook on {place}; remove it before fit returns")
        if parametrize.is_parametrized(module):
            raise VerifyError(f"{pass_.name}: left a parametrization on {place}; register and remove it within fit")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.device.type != "cpu":
            raise VerifyError(f"{pass_.name}: left {name!r} on {value.device}; move the network back to the CPU")


def cost_not_grown(pass_: Pass, given: Artifact, after: Fed) -> None:
    """Invariant 7, for the costs the pass names in `shrinks`."""
    if not pass_.shrinks:
        return
    before, now = given.costs, costs.count(after.model, after.input.size)
    for cost in sorted(pass_.shrinks):
        if now[cost] > before[cost]:
            raise VerifyError(
                f"{pass_.name}: claims to shrink {cost}, grew it from {before[cost]} to {now[cost]}; "
                "leave the layers alone that do not pay"
            )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _channels(given: Preprocessing) -> str:
    return f"{given.size[0]} channels, {len(given.mean)} means and {len(given.std)} deviations"


def _forward(pass_: Pass, result: Artifact, model: nn.Module, *, batch: int) -> Tensor:
    size = result.backbone.input.size
    generator = torch.Generator().manual_seed(batch)
    try:
        with torch.inference_mode():
            outputs: Any = model(torch.randn(batch, *size, generator=generator))
    except Exception as error:  # whatever a network can raise
        detail = " ".join(str(error).split())[:200]
        raise VerifyError(
            f"{pass_.name}: the network fails at batch {batch} of {size} ({detail}); what was rewritten does not fit "
            "its place, or feeds says what it does not take"
        ) from error
    if not isinstance(outputs, Tensor):
        raise VerifyError(f"{pass_.name}: the network returned {type(outputs).__name__}, not a tensor of logits")
    return outputs
