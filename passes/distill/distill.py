"""Distillation: a network learns from what another one says of the same images, instead of from their labels.

The teacher is the network itself before its stage (recovery, the default), the dense one, another run's, or one of
timm's. One that is fed images of another size, as before a pass that made the input smaller, is shown the student's,
resized: it sees no detail that the student does not. Methods add up. They change values only: what they train along is
thrown away, so the student is exported as it would be without. Does not touch the teacher, and reads no label unless
`label_weight` or dkd is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, JsonValue, ModelWrapValidatorHandler, field_validator, model_validator
from torch import nn

from slim import costs
from slim.artifact import Artifact, state_digest
from slim.contract import Context, Pass, Role
from slim.data import Augment
from slim.errors import PassError
from slim.passes.distill import methods
from slim.passes.distill.cache import filled, opened
from slim.passes.distill.hidden import Hidden, every_path
from slim.passes.distill.method import Method
from slim.passes.distill.methods import Pair
from slim.passes.distill.objective import Distillation, Lesson, cached, live
from slim.passes.distill.perturbation import Perturbation
from slim.passes.distill.presets import PRESETS, Preset
from slim.passes.distill.targets import USUAL_K, bytes_needed, index_in
from slim.passes.distill.teacher import OWN, Teacher, classes_of, find
from slim.training import Training, resolve_precision


class Distill(Training, Augment, Pass):
    """Learn from a teacher; the network before its stage, unless another is named."""

    name: ClassVar[str] = "distill"
    role: ClassVar[Role] = "repair"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})

    teacher: tuple[str, ...] = ("stage",)
    """`stage` (before this stage), `dense` (before any compression), a run or artifact folder, or a timm name; several
    are averaged."""
    preset: Preset | None = None
    """Fills in what is not given; none is `recover` for the teachers `stage` and `dense`."""
    method: tuple[str, ...] = ()
    """What is learned, with a weight if not 1, such as `dist=2`; none is `recover` or, with another network, `kd`."""
    images: Literal["train", "unlabeled", "all"] = "train"
    """Which images are shown: the training split, the unlabeled pool, or both."""
    label_weight: float = Field(default=0.0, ge=0)
    """Weight of cross-entropy with the labels, added; 0 adds none."""
    temperature: float = Field(default=1.0, gt=0)
    """What logits are divided by; the losses are multiplied by its square."""
    standardize: bool = False
    """Bring logits to mean 0 and variance 1 over the classes first; then temperature 2 and a weight of 9 are usual."""
    dkd_beta: float = Field(default=2.0, ge=0)
    """DKD: weight of the classes that are not the target; that of the target is 1."""
    scalekd_stem: Literal["conv3", "dw3", "pw256"] = "conv3"
    """ScaleKD: how a student map enters the projector; conv3 is the paper's, the others cost less."""
    scalekd_alt: bool = True
    """ScaleKD: also compare maps after their mean is taken away."""
    scalekd_perception: bool = True
    """ScaleKD: send the student's features through the teacher's frozen last stage."""
    scalekd_tail: int | None = Field(default=None, ge=1)
    """ScaleKD: blocks of a plain ViT that count as its last stage; none is a twelfth of them."""
    scalekd_paper_scale: bool = False
    """ScaleKD: sum over tokens as the paper does, instead of the mean that does not grow with the grid."""
    cache: str | None = None
    """Folder in which the teacher's targets are kept, for methods that need logits alone; filled where they miss."""
    cache_mass: float = Field(default=0.999, gt=0, le=1)
    """Cache: share of each prediction's mass that the stored classes hold on average; decides how many are stored."""
    cache_check: int = Field(default=64, ge=0)
    """Cache: stored targets computed again, and compared, before they are used; 0 compares none."""

    @model_validator(mode="wrap")
    @classmethod
    def _filled(cls, given: Any, handler: ModelWrapValidatorHandler[Distill]) -> Distill:
        """What was not given comes from the preset, and the preset from the teacher."""
        if not isinstance(given, Mapping):
            return handler(given)
        # An empty list names no teacher and no method, as an option that is not there.
        values = {name: (value,) if name in ("teacher", "method") and isinstance(value, str) else value
                  for name, value in given.items() if value not in ((), [])}  # fmt: skip
        teachers = values.get("teacher", ("stage",))
        own = isinstance(teachers, list | tuple) and all(spec in OWN for spec in teachers)
        preset = values.get("preset") or ("recover" if own and "method" not in values else None)
        filled_in = PRESETS.get(str(preset), {"method": ("kd",)})
        found = handler({**filled_in, **values, "preset": preset})
        # What a preset filled in was not given: a recipe in which the preset is changed afterwards follows it.
        object.__setattr__(found, "__pydantic_fields_set__", set(given))
        return found

    @field_validator("method")
    @classmethod
    def _known_methods(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        methods.parse(value)
        return value

    @model_validator(mode="after")
    def _cacheable(self) -> Distill:
        if self.cache is not None:
            beyond = [
                name for name, _ in methods.parse(self.method) if name in (*methods.BEYOND_LOGITS, methods.RECOVER)
            ]
            if beyond:
                raise ValueError(
                    f"cache: method {beyond[0]!r} reads more of the teacher than its logits; drop one of them"
                )
            if len(self.teacher) > 1:
                raise ValueError(f"cache: it holds one teacher's targets, not {len(self.teacher)}; drop it")
            if self.standardize:
                raise ValueError("cache: standardize reads all logits, of which the largest are kept; drop one of them")
        return self

    @model_validator(mode="after")
    def _teaches_the_classifier(self) -> Distill:
        names = [name for name, _ in methods.parse(self.method)]
        token = next((name for name in names if name in methods.TOKENS), None)
        beyond = next((name for name in names if name in methods.BEYOND_LOGITS), None)
        if self.trainable == "head" and (token or beyond):
            rule = "needs both tokens in training" if token else "leaves the classifier alone"
            raise ValueError(f"trainable head: method {token or beyond!r} {rule}; use --trainable all, or --method kd")
        if token and set(names) <= {*methods.TOKENS, *methods.BEYOND_LOGITS} and not self.label_weight:
            raise ValueError(
                f"method {token!r} teaches the second classifier alone, and the network answers with the mean of both;"
                " give --label-weight, or --method kd as well"
            )
        return self

    @property
    def reads(self) -> frozenset[str]:
        """The splits shown."""
        return frozenset(self.splits)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits shown, in order."""
        return ("train", "unlabeled") if self.images == "all" else (self.images,)

    @property
    def trains(self) -> bool:
        """Yes, unless no method asks for logits."""
        return bool(self.label_weight) or methods.reads_logits(self.method)

    @property
    def recovers(self) -> bool:
        """Whether a teacher is the network itself."""
        return any(spec in OWN for spec in self.teacher)

    def sources(self, context: Context) -> dict[str, str]:
        """The teachers' digests."""
        return {"teacher": "+".join(find(spec, context).digest for spec in self.teacher)}

    def forecast(self, artifact: Artifact, context: Context) -> dict[str, JsonValue]:
        """Costs of the whole pass; the pair is placed for it, so one that cannot be is refused here."""
        tutors = self._tutors(artifact.model(), context, dry=True)
        assert context.data is not None  # Pipeline.check saw to it
        expected: dict[str, JsonValue] = {
            "teacher": ", ".join(tutor.artifact.backbone.name for tutor in tutors),
            "teacher_macs": sum(tutor.artifact.costs["macs"] for tutor in tutors),
            "student_macs": artifact.costs["macs"],
            "auxiliary_params": sum(costs.count_params(method) for tutor in tutors for method, _ in tutor.methods),
            "steps": context.data.steps(context.loading.batch_size, self.splits) * self.epochs,
        }
        if self.cache is not None:
            expected["cache_bytes"] = self._cache_bytes(tutors[0], context)
        return expected

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
        """Train in place; what the methods trained along is left behind."""
        tutors = self._tutors(model, context)
        digests = [state_digest(tutor.teacher.state_dict()) for tutor in tutors]
        said: dict[str, JsonValue] = {"teachers": [tutor.said for tutor in tutors]}
        for tutor in tutors:
            context.log.info(
                "distill: taught by %s", ", ".join(f"{name} {value}" for name, value in tutor.said.items())
            )
        answers = [live(tutor.teacher, [method for method, _ in tutor.methods]) for tutor in tutors]
        if self.cache is not None:
            targets, checked = filled(self, tutors[0].artifact, tutors[0].teacher, context)
            answers = [cached(targets.lookup, self.temperature, context.device)]
            said["cache"] = {**checked}
        lessons = [Lesson(answer, tutor.methods) for answer, tutor in zip(answers, tutors, strict=True)]
        objective = Distillation(lessons, label_weight=self.label_weight)
        with ExitStack() as held:
            if "token_logits" in objective.needs:
                held.enter_context(_two_heads(model))
            if any(isinstance(method, Hidden) and method.student_maps for method in objective.methods):
                held.enter_context(every_path(model))
            figures = context.train(model, objective, self, self, self.splits)
        if [state_digest(tutor.teacher.state_dict()) for tutor in tutors] != digests:
            raise PassError("distill: the teacher changed while it taught, which it must not; report this")
        return {**figures, **said}

    def _cache_bytes(self, tutor: Tutor, context: Context) -> int:
        """Bytes of the cache, an estimate with USUAL_K until k is chosen. One with other targets is refused here."""
        if not self.recovers:
            return opened(self, tutor.artifact, tutor.teacher, context).size_bytes(self.epochs)
        # What the teacher will be is not known yet: the network before its stage.
        assert self.cache is not None  # as in `forecast`
        assert context.data is not None
        assert context.backbone is not None
        begun = index_in(Path(self.cache).expanduser())
        k = begun.k if begun else min(context.backbone.num_classes, USUAL_K)
        return bytes_needed(len(context.data.pool(self.splits)), self.epochs, k)

    def _tutors(self, model: nn.Module, context: Context, *, dry: bool = False) -> list[Tutor]:
        """Every teacher with the methods placed on it.

        Raises:
            PassError: a teacher cannot be found, does not know the classes, or cannot be placed.
        """
        backbone, reference = context.backbone, context.reference
        assert backbone is not None  # Pass.__call__ and the pipeline set both
        assert reference is not None
        tutors = []
        for spec in self.teacher:
            artifact = find(spec, context)
            needs_classes = bool(methods.reads_logits(self.method))
            teacher = Teacher(
                artifact,
                backbone.input,
                classes=classes_of(artifact, reference.labels, backbone.num_classes) if needs_classes else None,
                device=context.device,
                precision=resolve_precision(self.precision, context.device),
            )
            pair = Pair(model, backbone.input.size, teacher.model, artifact.backbone.input.size, artifact.state)
            tutors.append(Tutor(artifact, teacher, methods.build(self, pair, seed=context.seed, dry=dry)))
        return tutors


@dataclass(frozen=True)
class Tutor:
    """A teacher, where it is from, and what is learned from it."""

    artifact: Artifact
    teacher: Teacher
    methods: list[tuple[Method, float]]

    @property
    def said(self) -> dict[str, JsonValue]:
        """For the record: who it is, which of its hidden states are compared, and how many of its weights."""
        named: dict[str, JsonValue] = {"network": f"{self.artifact.backbone.name} {self.artifact.digest[:12]}"}
        for method, _ in self.methods:
            if isinstance(method, Hidden):
                named |= {"hidden": [*method.student_maps], "not_compared": [*method.unequal]}
            elif isinstance(method, Perturbation) and method.pairs:
                named["pairs"] = len(method.pairs)
        return named


@contextmanager
def _two_heads(model: nn.Module) -> Iterator[None]:
    """The network gives the logits of both its tokens while it trains, and their mean again afterwards."""
    switch = cast(Any, model).set_distilled_training
    switch(True)
    try:
        yield
    finally:
        switch(False)
