"""Each invariant of slim/verify.py against a pass that breaks it and nothing else."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from slim import passes, verify
from slim.artifact import Artifact
from slim.bench.measure import TargetMeter
from slim.contract import Context, Fed, Pass, Plan, Role
from slim.errors import ParityError, VerifyError
from slim.export.onnx import OnnxFile
from slim.export.target import Target
from slim.pipeline import Guard
from tests.contract.zoo import artifact


class Vandal(Pass):
    """Harmless; each below breaks one invariant."""

    name: ClassVar[str] = "vandal"
    role: ClassVar[Role] = "structure"


class Wrapped(nn.Module):
    """The classifier, followed by a function of its outputs."""

    def __init__(self, head: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.then = head, then

    def forward(self, features: Tensor) -> Tensor:
        return self.then(self.head(features))


def after_head(model: nn.Module, then: Callable[[Tensor], Tensor]) -> nn.Module:
    model.head = Wrapped(model.get_submodule("head"), then)
    return model


class ChangesReference(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        assert context.reference is not None
        context.reference.state["head.weight"][0, 0] += 1


class ChangesBackbone(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        assert context.backbone is not None
        context.backbone.kwargs["depth"] = 3


class FitShape(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        block: Any = model.get_submodule("blocks.0.mlp")
        block.fc1, block.fc2 = nn.Linear(48, 64), nn.Linear(64, 48)


class FitBuffer(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        model.register_buffer("seen", torch.zeros(1))


class FitDtype(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        model.double()


class OwnState(Vandal):
    """Rewrites by what it has seen, not by its plan."""

    calls: ClassVar[int] = 0

    def extra(self) -> int:
        type(self).calls += 1
        return type(self).calls


class ReplayKeys(OwnState):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.register_parameter(f"extra{self.extra()}", nn.Parameter(torch.zeros(1)))
        return model


class ReplayShape(OwnState):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.register_parameter("extra", nn.Parameter(torch.zeros(self.extra())))
        return model


class ReplayDtype(OwnState):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        dtype = torch.float32 if self.extra() % 2 else torch.float64
        model.register_buffer("extra", torch.zeros(1, dtype=dtype))
        return model


class ReplayRaises(OwnState):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        if self.extra() > 1:
            raise KeyError("only once")
        return model


class Louder(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return 1.01 * super().forward(features)


class HiddenState(Vandal):
    """Same keys; one number lives in the code of a module."""

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        louder = Louder(48, 10)
        louder.load_state_dict(model.get_submodule("head").state_dict())
        model.head = louder


class HiddenBuffer(Vandal):
    """A buffer that state dicts leave out."""

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.register_buffer("scale", torch.ones(1), persistent=False)
        return after_head(model, lambda logits: logits * model.get_buffer("scale"))

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        model.get_buffer("scale").fill_(1.01)


class Unregistered(Vandal):
    name: ClassVar[str] = "vandall"


class BadPlan(Vandal):
    kind: str

    def plan(self, model: nn.Module, context: Context) -> Plan:
        plans: dict[str, Any] = {
            "tuple": {"kept": (1, 2)},
            "int key": {"kept": {1: "a"}},
            "nan": {"share": math.nan},
            "tensor": {"kept": torch.arange(2)},
            "list": ["a"],
        }
        return plans[self.kind]  # type: ignore[no-any-return]


class LostConfig(Vandal):
    share: float = Field(default=1.0, exclude=True)


class StricterConfig(Vandal):
    layers: tuple[str, ...] = Field(default=(), strict=True)


class NanConfig(Vandal):
    share: float = 1.0


class NanFigures(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> Any:
        return {"loss": math.nan}


class NanOutputs(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        with torch.no_grad():
            model.get_parameter("head.weight").fill_(math.nan)


class NanInBatches(Vandal):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        return after_head(model, lambda logits: logits / (2 - len(logits)))


class WrongShape(Vandal):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        return after_head(model, lambda logits: logits[:, :9])


class NotATensor(Vandal):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        return after_head(model, lambda logits: (logits, logits))  # type: ignore[arg-type, return-value]


class DoesNotFit(Vandal):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.head = nn.Linear(47, 10)
        return model


class RandomInEval(Vandal):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        return after_head(model, lambda logits: F.dropout(logits, 0.5, training=True))


class LeavesHook(Vandal):
    kind: str

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        getattr(model.get_submodule("blocks.1"), f"register_{self.kind}_hook")(lambda *_: None)


class LeavesParametrization(Vandal):
    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        parametrizations.weight_norm(model.get_submodule("head"))
        return model


class StrayDevice(Vandal):
    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        model.get_submodule("head").to("meta")


class Grows(Vandal):
    """Twice the hidden units, and says it shrinks."""

    shrinks: ClassVar[frozenset[str]] = frozenset({"params"})

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        block: Any = model.get_submodule("blocks.0.mlp")
        block.fc1, block.fc2 = nn.Linear(48, 384), nn.Linear(384, 48)
        return model

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
        with torch.no_grad():
            for value in model.get_submodule("blocks.0.mlp").parameters():
                value.zero_()


class GrowsMacs(Vandal):
    """As many parameters, used twice."""

    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "macs"})

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        block: Any = model.get_submodule("blocks.0")
        model.blocks = nn.Sequential(block, block, model.get_submodule("blocks.1"))
        return model


VANDALS: list[tuple[Pass, str]] = [
    (ChangesReference(), "changed an artifact it was given; work on the module"),
    (ChangesBackbone(), "changed an artifact it was given; work on the module"),
    (
        FitShape(),
        r"fit turned 'blocks.0.mlp.fc1.bias' from \(\(192,\), .*\) into \(\(64,\), .*change structure in rewrite",
    ),
    (FitBuffer(), r"fit turned 'seen' from nothing into \(\(1,\), torch.float32\); change structure in rewrite"),
    (FitDtype(), r"fit turned 'blocks.0.attn.proj.bias' from .*float32\) into .*float64\)"),
    (ReplayKeys(), "replay fails: .*does not rebuild the network.*extra1.*rewrite must need nothing but its plan"),
    (ReplayShape(), "replay fails: .*size mismatch for extra.*rewrite must need nothing but its plan"),
    (ReplayDtype(), "replay gives other keys, shapes or dtypes; rewrite must need only its plan"),
    (ReplayRaises(), "replay fails: .*step 1 'vandal' cannot be applied again .*only once"),
    (HiddenState(), "the replayed network differs by .*; it has state outside its values"),
    (HiddenBuffer(), "the replayed network differs by .*; it has state outside its values"),
    (Unregistered(), "replay fails: .*pass 'vandall' is unknown; did you mean 'vandal'"),
    (BadPlan(kind="tuple"), "its plan comes back changed from JSON; use a dict with str keys"),
    (BadPlan(kind="int key"), "its plan comes back changed from JSON; use a dict with str keys"),
    (BadPlan(kind="nan"), "its plan is not plain JSON .*; use a dict with str keys, lists and finite numbers"),
    (BadPlan(kind="tensor"), "its plan is not plain JSON .*Tensor"),
    (BadPlan(kind="list"), "its plan comes back changed from JSON; use a dict"),
    (LostConfig(share=0.5), "its configuration comes back changed from JSON"),
    (StricterConfig(layers=("a",)), "its configuration cannot be read back: Input should be a valid tuple"),
    (NanConfig(share=math.nan), "its configuration is not plain JSON"),
    (NanFigures(), "its record is not plain JSON"),
    (NanOutputs(), "outputs at batch 1 are not finite"),
    (NanInBatches(), "outputs at batch 2 are not finite"),
    (WrongShape(), r"outputs have shape \(1, 9\), not \(1, 10\)"),
    (NotATensor(), "the network returned tuple, not a tensor of logits"),
    (DoesNotFit(), "the network fails at batch 1 .*shapes cannot be multiplied"),
    (RandomInEval(), "outputs differ between two calls in eval mode; remove the randomness"),
    (LeavesHook(kind="forward"), "left a hook on 'blocks.1'; remove it before fit returns"),
    (LeavesHook(kind="forward_pre"), "left a hook on 'blocks.1'"),
    (LeavesHook(kind="full_backward"), "left a hook on 'blocks.1'"),
    (LeavesHook(kind="full_backward_pre"), "left a hook on 'blocks.1'"),
    (LeavesParametrization(), "left a parametrization on 'head'; register and remove it within fit"),
    (StrayDevice(), "left 'head.weight' on meta; move the network back to the CPU"),
    (Grows(), r"claims to shrink params, grew it from 67258 to \d+; leave the layers alone"),
    (GrowsMacs(), r"claims to shrink macs, grew it from 1143456 to \d+"),
]


def register(monkeypatch: pytest.MonkeyPatch, *vandals: type[Pass]) -> None:
    """Make replay find the passes, as if the table listed them; a later one of the same name wins."""
    for vandal in vandals:
        monkeypatch.setitem(sys.modules, "vandals", SimpleNamespace(Vandal=vandal))
        monkeypatch.setitem(passes.PASSES, "vandal", ("vandals", "Vandal", ""))


@pytest.fixture(scope="module")
def tiny() -> Artifact:
    return artifact("vit")


@pytest.fixture
def given(tiny: Artifact) -> Artifact:
    """A copy that a vandal may spoil."""
    return Artifact(tiny.backbone.model_copy(deep=True), tiny.state_dict())


@pytest.mark.parametrize(
    ("vandal", "message"),
    VANDALS,
    ids=["-".join([type(v).__name__, *map(str, v.model_dump().values())]) for v, _ in VANDALS],
)
def test_a_vandal_is_caught(vandal: Pass, message: str, given: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, type(vandal))
    if isinstance(vandal, OwnState):
        monkeypatch.setattr(type(vandal), "calls", 0)
    with pytest.raises(VerifyError, match=message) as caught:
        vandal(given, Context(reference=given))
    assert str(caught.value).startswith(f"{vandal.name}: ")
    assert "\n" not in str(caught.value)


def test_a_harmless_pass_is_let_through(given: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Vandal)
    after = Vandal()(given)
    assert after.weights == given.weights
    assert after.history[0].digests == {"input": given.digest, "reference": given.digest, "output": after_digest(after)}


def after_digest(after: Artifact) -> str:
    return dataclasses.replace(after).digest


def test_the_reference_of_the_stage_is_watched_too(given: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, ChangesReference)
    reference = dataclasses.replace(given, state=given.state_dict())
    with pytest.raises(VerifyError, match="changed an artifact it was given"):
        ChangesReference()(given, Context(reference=reference))


def test_a_memory_format_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    class ChannelsLast(Vandal):
        def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> None:
            model.to(memory_format=torch.channels_last)

    register(monkeypatch, ChannelsLast)
    network = artifact("mobilenet")
    assert ChannelsLast()(network).weights == network.weights


def test_the_callers_generator_is_left_alone(given: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Vandal)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Vandal()(given)
    assert torch.equal(torch.rand(4), expected)


def test_no_switch_turns_verify_off() -> None:
    assert list(inspect.signature(Pass.__call__).parameters) == ["self", "artifact", "context"]
    assert list(inspect.signature(verify.after_pass).parameters) == ["pass_", "inputs", "model", "structure", "step"]
    names = [field.name for field in dataclasses.fields(Context)] + list(Guard.model_fields) + list(Pass.model_fields)
    assert not [name for name in names if "verif" in name or "check" in name.replace("checkpoint", "")]
    tree = ast.parse(Path(verify.__file__).read_text())
    # `python -O` drops asserts, and an environment variable would be a switch.
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]


def test_call_is_final() -> None:
    with pytest.raises(TypeError, match="Unverified: __call__ is final, for it verifies; write plan, rewrite or fit"):

        class Unverified(Vandal):
            def __call__(self, artifact: Artifact, context: Context | None = None) -> Artifact:  # type: ignore[misc]
                return artifact


def test_call_is_final_for_what_a_pass_is_mixed_with() -> None:
    class Mixed:
        def __call__(self, artifact: Artifact, context: Context | None = None) -> Artifact:
            return artifact

    with pytest.raises(TypeError, match="__call__ is final"):
        type("Unverified", (Mixed, Vandal), {})


def test_ship_catches_an_export_that_differs(given: Artifact, tmp_path: Path) -> None:
    meter = TargetMeter(Target.parse("ort:cpu"), None, tmp_path)
    assert verify.ship(given, meter).metric == "parity_max_abs"

    changed = given.state_dict()
    changed["head.bias"][0] += 0.1
    other = dataclasses.replace(given, state=changed)

    class Swapping(TargetMeter):
        def export(self, model: Artifact | Fed) -> OnnxFile:
            return super().export(other)

    swapped = Swapping(Target.parse("ort:cpu"), None, tmp_path)
    with pytest.raises(ParityError, match="differs from torch by"):
        verify.ship(given, swapped)
