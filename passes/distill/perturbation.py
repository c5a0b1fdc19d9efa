"""Weight perturbation: the product of each low-rank pair is held to the dense weight that it stands for.

From PELA's intermediate stage (Guo et al. 2024, arXiv:2310.10700). There the largest entry of the difference is drawn
to a fixed size, which gives one entry of a layer a gradient and also pulls differences up to that size; that is
`perturb-max`. `perturb` is a hinge on the relative Frobenius norm: it costs nothing to stay as near to the dense weight
as the pair was at the start. Trains nothing along, and reads no output of either network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.distill.method import Method, Outputs
from slim.passes.low_rank import schemes

Kind = Literal["perturb", "perturb-max"]
SIZE = 1e-3
"""PELA's size of the largest difference, for DeiT; in units of the weights."""


class Perturbation(Method):
    """Mean over the pairs of what their products have moved away from the dense weights."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, pairs: Sequence[nn.Sequential], dense: Sequence[Tensor], kind: Kind) -> None:
        """`dense`: one weight for each pair, in the shape of the layer that the pair stands for."""
        super().__init__()
        # A tuple is not registered: these values are the student's, and the optimiser has them from there.
        self.pairs, self.kind = tuple(pairs), kind
        for index, weight in enumerate(dense):
            self.register_buffer(f"dense_{index}", weight.detach().float(), persistent=False)
        with torch.no_grad():
            self.start = tuple(float(relative_error(*both)) for both in self._weights())

    @classmethod
    def place(
        cls, student: nn.Module, weights: Mapping[str, Tensor], kind: Kind = "perturb", *, may_be_none: bool = False
    ) -> Perturbation:
        """Every pair of the student in whose place the teacher has a weight of the composed shape.

        Args:
            student: with low-rank pairs.
            weights: the teacher's values by name, its batch norms not merged.
            kind: the distance.
            may_be_none: no pair is no error, and no loss.

        Raises:
            PassError: there is no such pair.
        """
        pairs, dense = [], []
        for name, module in student.named_modules():
            weight = weights.get(f"{name}.weight")
            if weight is None or not isinstance(module, nn.Sequential) or schemes.scheme_of(module) is None:
                continue
            if schemes.composed(module).shape == weight.shape:
                pairs.append(module)
                dense.append(weight)
        if not (pairs or may_be_none):
            raise PassError(
                f"distill: method {kind!r} finds no low-rank pair that stands for a layer of the teacher; put it behind"
                " low-rank, with --teacher stage or dense, or use --method kd"
            )
        return cls(pairs, dense, kind)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """{"perturb": loss}, or nothing where there are no pairs; no argument is read."""
        if not self.pairs:
            return {}
        # Autocast would lower the products, and a difference of weights is small.
        with torch.autocast(self.get_buffer("dense_0").device.type, enabled=False):
            if self.kind == "perturb":
                moved = [excess(*both, start) for both, start in zip(self._weights(), self.start, strict=True)]
            else:
                moved = [off_size(*both) for both in self._weights()]
            return {"perturb": torch.stack(moved).mean()}

    def _weights(self) -> list[tuple[Tensor, Tensor]]:
        return [(schemes.composed(pair), self.get_buffer(f"dense_{i}")) for i, pair in enumerate(self.pairs)]


def relative_error(composed: Tensor, dense: Tensor) -> Tensor:
    """Frobenius norm of the difference over that of `dense`; both of one shape, scalar."""
    norm = torch.linalg.vector_norm
    error: Tensor = norm(composed - dense) / norm(dense).clamp(min=torch.finfo(dense.dtype).tiny)
    return error


def excess(composed: Tensor, dense: Tensor, tolerance: float) -> Tensor:
    """Square of what the relative error has above `tolerance`; scalar."""
    return (relative_error(composed, dense) - tolerance).relu().square()


def off_size(composed: Tensor, dense: Tensor, size: float = SIZE) -> Tensor:
    """Squared difference of the largest entry of the error and `size`, as PELA has it; scalar."""
    return ((composed - dense).abs().max() - size).square()
