"""Hidden states: the student's maps drawn to those of the teacher at the same depth, where their shapes are equal.

What a compressed network was before is its best teacher: same depth, same widths, same meaning of each channel
(hidden-state regression as in Self-Distillation, Lee et al. 2023, arXiv:2210.02871). No projector is trained, so maps
whose shape a pass has changed are left out, and listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import ClassVar

from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.distill import taps
from slim.passes.distill.method import Method, Outputs


class Hidden(Method):
    """Squared distance of maps at the same index, relative to the teacher's energy, mean over the maps."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, indices: tuple[int, ...], unequal: tuple[str, ...] = ()) -> None:
        super().__init__(student_maps=indices, teacher_maps=indices)
        self.unequal = unequal
        """Maps that are not compared, and why, for the record."""

    @classmethod
    def place(
        cls,
        student: nn.Module,
        student_size: taps.Shape,
        teacher: nn.Module,
        teacher_size: taps.Shape,
        *,
        may_be_none: bool = False,
    ) -> Hidden:
        """Every index at which both have a map of the same shape.

        Raises:
            PassError: a network does not show its maps, or no two are equal; unless there `may_be_none`.
        """
        try:
            pairs = list(zip_longest(taps.maps_of(student, student_size), taps.maps_of(teacher, teacher_size)))
        except PassError as error:
            if may_be_none:
                return cls((), (str(error),))
            raise
        unequal = tuple(
            f"{index}: {shape_text(ours)}, the teacher's {shape_text(theirs)}"
            for index, (ours, theirs) in enumerate(pairs)
            if ours != theirs
        )
        equal = tuple(index for index, (ours, theirs) in enumerate(pairs) if ours == theirs)
        if not (equal or may_be_none):
            raise PassError(f"distill: no hidden state has the teacher's shape ({unequal[0]}); use --method kd")
        return cls(equal, unequal)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """The target is not read."""
        if not self.student_maps:
            return {}
        distances = [relative_distance(student.maps[index], teacher.maps[index]) for index in self.student_maps]
        return {"hidden": sum(distances, start=distances[0].new_zeros(())) / len(distances)}


def relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of squared differences over that of squares of the teacher, per image, mean over B; (B, ...) -> scalar."""
    ours, theirs = student.float().flatten(1), teacher.detach().float().flatten(1)
    # A dead map has no energy to compare with.
    return ((ours - theirs).square().sum(1) / theirs.square().sum(1).clamp(min=1e-6)).mean()


@contextmanager
def every_path(model: nn.Module) -> Iterator[None]:
    """Drop path is off: the teacher never misses a block, so that maps of a student that does differ by chance."""
    from timm.layers import DropPath

    rates = {module: module.drop_prob for module in model.modules() if isinstance(module, DropPath)}
    for module in rates:
        module.drop_prob = 0.0
    try:
        yield
    finally:
        for module, rate in rates.items():
            module.drop_prob = rate


def shape_text(shape: tuple[int, int, int] | None) -> str:
    """`64x8x8`, or `none`."""
    return "x".join(map(str, shape)) if shape else "none"
