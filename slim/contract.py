"""The contract of a pass, and what a pass may use.

A pass is its configuration (frozen fields) plus up to three methods. The order of events is `__call__`, which is final:
plan, rewrite, fit, verify. Measuring and rolling back belong to the pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, final

import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from torch import nn

from slim import environment
from slim.artifact import Artifact, Backbone, Preprocessing, Step
from slim.distributed import on_main
from slim.measurement import Measurement
from slim.quantization import Method, Quantization

if TYPE_CHECKING:
    from slim.data import Augment, Data
    from slim.training import Objective, Training

Plan = dict[str, JsonValue]
"""Plain JSON. Under `sparse` a pass may list state-dict keys of weights in which it sets zeros: whatever trains them
later, in this step or a following one, keeps those zeros."""
Role = Literal["structure", "prepare", "repair"]
Advance = Callable[..., None]
"""`advance(steps, note)`: so many steps are done; `note` says how it stands."""
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda steps, note="": None


@dataclass(frozen=True)
class Loading:
    """How training data is read."""

    batch_size: int = 64
    """Images of one optimiser step, over all processes."""
    workers: int = 0
    """Reader processes of each training process."""


@dataclass(frozen=True)
class Fed:
    """A network that is no artifact, what it is fed, and in how many bits it is served."""

    model: nn.Module
    input: Preprocessing
    quantization: Quantization | None = None
    """Of its file; none leaves that in 32 bits."""


class Meter(Protocol):
    """Latency and accuracy of a network on the target; implemented by slim.bench, handed in by whoever runs the chain.

    Every method exports the network first and measures the exported file.
    """

    @property
    def target(self) -> str:
        """The target, in the words of `--target`."""

    def latency(self, model: Artifact | Fed) -> Measurement:
        """p50 in ms of one call at the target's batch size."""

    def compare(
        self, candidate: Artifact | Fed, reference: Artifact | Fed, *, limit: float | None = None
    ) -> Measurement:
        """Ratio of latencies candidate / reference, paired in one run; below 1 is faster.

        Measured longer while the interval holds `limit`.
        """

    def beside(self, models: Sequence[Artifact | Fed], reference: Artifact | Fed) -> Sequence[Measurement]:
        """Ratio of the latency of each to the reference's, all taken in turn in one run; for networks by the dozen."""

    def table(self, modules: Sequence[tuple[nn.Module, tuple[int, ...]]]) -> list[Measurement]:
        """Time in ms of each module alone at the target's batch size, with inputs of the given shape without batch.

        In the order of `modules`; equal ones are measured once. Their values play no part.
        """

    def accuracy(self, model: Artifact | Fed) -> Measurement:
        """Top-1 in percent on the validation split; `samples` holds 1.0 or 0.0 for every image, in split order."""

    def drop(self, candidate: Artifact | Fed, reference: Artifact | Fed) -> Measurement:
        """Top-1 points lost, paired on the same images; above 0 is worse."""

    def size(self, model: Artifact | Fed) -> Measurement:
        """Bytes of the exported file."""

    def layers(self, model: Fed) -> tuple[str, ...]:
        """Keys of the layers of the exported graph that can be served in INT8, in its order; see slim/quantization.py.

        A key begins with the name of the module.
        """

    def calibrate(self, model: Fed, method: Method) -> Quantization:
        """INT8 of every layer, with the ranges that activations have on the calibration images."""

    def fidelity(self, candidate: Fed, reference: Fed) -> Measurement:
        """Percent of calibration images that both files put into the same class.

        `details` holds the `cosine` of their logits and `mse`, their mean squared difference.
        """

    def coverage(self, model: Artifact | Fed) -> Measurement | None:
        """Percent of the layers of an INT8 file that are computed in INT8; `details["float"]` names the rest.

        None where the runtime does not tell.
        """

    def parity(self, model: Artifact | Fed) -> Measurement:
        """Largest absolute difference between torch and the exported file on real images.

        Raises:
            ParityError: the difference, or the top-1 agreement, is outside the tolerance.
        """


@dataclass(frozen=True)
class Context:
    """What a pass may use. Nothing else is read: no global generator, no clock, no environment variable."""

    data: Data | None = None
    """Splits `train`, `val`, `calib`, `unlabeled`; none when the run has no data."""
    meter: Meter | None = None
    """Latency and accuracy on the target; none when the run has no target."""
    reference: Artifact | None = None
    """The artifact before the current stage."""
    dense: Artifact | None = None
    """The artifact before the first structural stage: nothing was compressed yet."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("slim"))
    progress: Progress = no_progress
    """`with progress("finetune", steps) as advance: advance(1, "loss 0.31")`."""
    backbone: Backbone | None = None
    """The untouched network the pass works on: its classes, and what it is fed; in `fit`, what it is fed after the
    pass. Set by `Pass.__call__`."""
    loading: Loading = Loading()
    """How training data is read."""
    checkpoint: Path | None = None
    """Where training keeps what it needs to go on after a kill; none: nothing is kept."""
    history: tuple[Step, ...] = ()
    """Steps already applied to the network. Read only."""
    guard: bool = True
    """False when the run keeps every step whatever it cost; written into the history."""
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    """What `plan` found at some expense and `fit` needs again, such as singular vectors; each pass begins with an empty
    one. Of several processes rank 0 alone plans, so only its memo is filled."""
    plan: Plan = field(default_factory=dict)
    """What `plan` decided, for `fit`, in every process."""

    def fed(self, model: nn.Module) -> Fed:
        """`model` with what the network that the pass was given is fed."""
        assert self.backbone is not None  # Pass.__call__ set it
        return Fed(model, self.backbone.input)

    def train(
        self,
        model: nn.Module,
        objective: Objective,
        training: Training,
        augment: Augment,
        splits: Sequence[str] = ("train",),
    ) -> dict[str, JsonValue]:
        """The one training loop on this run's data, device, seed and checkpoint; see slim/training.py."""
        from slim.training import train

        return train(model, objective, training, augment, self, splits)


class Pass(BaseModel):
    """A compression or training step: frozen configuration, and what it does to a network."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    """The word on the command line and in recipes."""
    version: ClassVar[int] = 1
    """Raised when the plan's format or the meaning of a field changes; see `migrate`."""
    role: ClassVar[Role]
    """`structure` is judged on speed, `prepare` belongs to the structure that follows, `repair` to the one before."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Traits the network must have: `dense`, `float`, `supernet`."""
    gives: ClassVar[frozenset[str]] = frozenset()
    """Traits the network has afterwards."""
    drops: ClassVar[frozenset[str]] = frozenset()
    """Traits the network no longer has afterwards."""
    shrinks: ClassVar[frozenset[str]] = frozenset()
    """Costs the pass claims not to grow: `params`, `macs`."""

    @property
    def reads(self) -> frozenset[str]:
        """Data splits without which the pass cannot work: `train`, `calib`, `unlabeled`."""
        return frozenset()

    @property
    def trains(self) -> bool:
        """Whether `fit` trains the classifier, which a freshly seeded one needs."""
        return False

    @property
    def measures(self) -> bool:
        """Whether `plan` times networks on the target, so that there has to be one."""
        return False

    @property
    def recovers(self) -> bool:
        """Whether the pass learns from what the network was before its stage, so that a structure has to come first."""
        return False

    def caveat(self, figures: Mapping[str, Measurement]) -> str:
        """One clause said along when the guard refuses the pass for its speed; empty where there is nothing to add."""
        return ""

    def sources(self, context: Context) -> dict[str, str]:
        """Digests of what the pass reads besides its input and the data, by name, such as a teacher's."""
        return {}

    def forecast(self, artifact: Artifact, context: Context) -> dict[str, JsonValue]:
        """Look at the network before any work starts: what the pass will cost, by name, for `--dry-run`.

        `artifact` is what the chain starts from; earlier passes may make it smaller.

        Raises:
            SlimError: the pass cannot work with this network, teacher or data.
        """
        return {}

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Look and decide. Plain JSON; changes nothing."""
        return {}

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Change structure only: pure, deterministic, no data, no randomness. Values may be left unset."""
        return model

    def feeds(self, given: Preprocessing, plan: Plan) -> Preprocessing:
        """What the network is fed after the pass, where that is not what it was `given`. As pure as `rewrite`.

        Channels stay. No rewrite sees it: neither that of this pass nor those of the history.
        """
        return given

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue] | None:
        """Change values only. `teacher` is the untouched input model. Returns figures worth recording, if any."""
        return None

    @classmethod
    def migrate(cls, version: int, config: dict[str, Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
        """Config and plan of an older `version` in today's form; none when there is no way."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__call__ is not Pass.__call__:
            raise TypeError(f"{cls.__name__}: __call__ is final, for it verifies; write plan, rewrite or fit instead")

    @final
    def __call__(self, artifact: Artifact, context: Context | None = None) -> Artifact:
        """Plan -> rewrite -> fit -> verify.

        Raises:
            PassError: the pass could not do its work.
            VerifyError: the pass broke the contract.
        """
        from slim import verify

        context = context or Context()
        reference = context.reference or artifact
        context = replace(
            context,
            history=artifact.history,
            backbone=artifact.backbone,
            reference=reference,
            dense=context.dense or reference,
            memo={},
        )
        # Taken now, so that a pass that changes what it was given is found out afterwards.
        digests = {"input": artifact.digest, "reference": reference.digest, **self.sources(context)}
        config = verify.config_returns(self)
        teacher = artifact.model()
        plan = on_main(lambda: verify.plain_json(self, "plan", self.plan(teacher, context)))
        model = self.rewrite(artifact.model(), plan)
        structure = verify.signature(model)
        fed = verify.fed_after(self, artifact.backbone, plan)
        figures = self.fit(model, teacher, replace(context, plan=plan, backbone=fed)) or {}
        step = Step(
            name=self.name,
            version=self.version,
            config=config,
            plan=plan,
            seed=context.seed,
            data_id=context.data.id if context.data else None,
            digests=digests,
            metrics=verify.plain_json(self, "record", figures),
            environment={"versions": dict(environment.versions())},
            guard=context.guard,
        )
        # From rank 0 to all: batch norms of other processes saw other images.
        return on_main(lambda: verify.after_pass(self, (artifact, reference), model, structure, step))
