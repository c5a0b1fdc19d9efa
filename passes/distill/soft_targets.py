"""Methods that need logits alone: any student, any teacher with the same classes, no labels."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from slim.passes.distill import logits as maths
from slim.passes.distill.method import Method, Outputs


class SoftTargets(Method):
    """A divergence between the softened predictions: forward or reverse KL, Jeffreys, Jensen-Shannon."""

    def __init__(
        self, kind: Literal["forward", "reverse", "jeffreys", "js"], *, temperature: float, standardize: bool
    ) -> None:
        super().__init__()
        self.kind: Literal["forward", "reverse", "jeffreys", "js"] = kind
        self.temperature, self.standardize = temperature, standardize

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """The target is not read."""
        ours, theirs = logits_of(student, teacher, standardize=self.standardize)
        return {self.kind: maths.soft_kl(ours, theirs, kind=self.kind, temperature=self.temperature)}


class Decoupled(Method):
    """DKD: the target class and the others, each with a weight of its own."""

    def __init__(self, *, alpha: float, beta: float, temperature: float) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """The class is the label where there is one, else the teacher's."""
        ours, theirs = logits_of(student, teacher)
        loss = maths.decoupled(ours, theirs, target, alpha=self.alpha, beta=self.beta, temperature=self.temperature)
        return {"decoupled": loss}


class Relational(Method):
    """DIST: how classes are ranked within an image, and images within a class, instead of the exact shares."""

    def __init__(self, *, temperature: float, standardize: bool) -> None:
        super().__init__()
        self.temperature, self.standardize = temperature, standardize

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """The target is not read."""
        ours, theirs = logits_of(student, teacher, standardize=self.standardize)
        return {"relational": maths.relational(ours, theirs, temperature=self.temperature)}


class Token(Method):
    """DeiT's distillation token, a second classifier that learns from the teacher alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "token_logits"})

    def __init__(self, *, hard: bool, temperature: float) -> None:
        super().__init__()
        self.hard, self.temperature = hard, temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """The target is not read; the class token learns from the labels, if they have a weight."""
        assert student.token_logits is not None
        assert teacher.logits is not None
        if self.hard:
            return {"token": maths.hard(student.token_logits, teacher.logits)}
        loss = maths.soft_kl(student.token_logits, teacher.logits, kind="forward", temperature=self.temperature)
        return {"token": loss}


def logits_of(student: Outputs, teacher: Outputs, *, standardize: bool = False) -> tuple[Tensor, Tensor]:
    """Both (B, classes) float32, each brought to mean 0 and variance 1 over the classes if asked."""
    assert student.logits is not None  # `needs` says so
    assert teacher.logits is not None
    if not standardize:
        return student.logits, teacher.logits
    return maths.standardized(student.logits), maths.standardized(teacher.logits)
