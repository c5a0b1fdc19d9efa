"""The loss of a distillation step: what the student and its teachers say of a batch, turned into named losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slim.data import Batch
from slim.passes.distill import taps
from slim.passes.distill.logits import label_loss
from slim.passes.distill.method import Method, Outputs
from slim.passes.distill.teacher import Teacher

Answers = Callable[[Batch], Outputs]
"""What a teacher says of a batch: a network's forward pass, or targets read from a cache."""


@dataclass(frozen=True)
class Lesson:
    """One teacher, and what is learned from it."""

    answers: Answers
    methods: Sequence[tuple[Method, float]]
    """Each with its weight."""


class Distillation(nn.Module):
    """The methods of every lesson, weighed; with several teachers, the mean over them."""

    def __init__(self, lessons: Sequence[Lesson], *, label_weight: float) -> None:
        super().__init__()
        self.lessons, self.label_weight = tuple(lessons), label_weight
        # Registered, so that what they train along is moved, averaged and kept with the student. Teachers are not:
        # no optimiser, checkpoint, gradient clip or process group may hold them.
        self.methods = nn.ModuleList(method for lesson in lessons for method, _ in lesson.methods)
        every = [method for lesson in lessons for method, _ in lesson.methods]
        self.needs = frozenset[str]().union(*(method.needs for method in every))
        self.indices = tuple(sorted({index for method in every for index in method.student_maps}))
        self.leaves_unused = not (label_weight or self.needs & {"logits", "token_logits"})
        """Whether the student's classifier, and whatever stands before it alone, learns nothing."""

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named losses, float32 scalars; their sum is trained on."""
        ours = taps.outputs(student, batch.images, indices=self.indices, embedding="embedding" in self.needs)
        named: dict[str, Tensor] = {}
        for lesson in self.lessons:
            theirs = lesson.answers(batch)
            for method, weight in lesson.methods:
                for name, loss in method(ours, theirs, batch.target).items():
                    share = loss * (weight / len(self.lessons))
                    named[name] = named[name] + share if name in named else share
        if self.label_weight:
            assert ours.logits is not None
            named["label"] = label_loss(ours.logits, batch.target) * self.label_weight
        return named


def live(teacher: Teacher, methods: Sequence[Method]) -> Answers:
    """The teacher's forward pass, with what the methods read and nothing else."""
    indices = tuple(sorted({index for method in methods for index in method.teacher_maps}))
    needs = frozenset[str]().union(*(method.needs for method in methods))

    def answers(batch: Batch) -> Outputs:
        said: Outputs = teacher(batch.images, indices=indices, embedding="embedding" in needs, final="final" in needs)
        return said

    return answers


def cached(lookup: Callable[[int, Tensor], Tensor], temperature: float, device: torch.device) -> Answers:
    """Targets read instead of computed: log-probabilities at the temperature are logits up to a constant."""

    def answers(batch: Batch) -> Outputs:
        return Outputs(logits=lookup(batch.epoch, batch.positions).to(device) * temperature)

    return answers
