"""Learning a teacher's embedding: the pooled features of a network, or of any encoder of images or captions.

A trained linear map takes the student's embedding (B, student width) into the teacher's space. There either the angle
to the same image's teacher embedding is closed, or that embedding is to be told from those of the other images: InfoNCE
(van den Oord et al. 2018, arXiv:1807.03748), one-sided. Both are as in GPT4Image, whose targets are texts. Needs no
labels and no common classes. Does not align maps, nor train the teacher's side.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from slim.passes.distill.method import Method, Outputs


class EmbeddingTarget(Method):
    """Learn the teacher's embedding through a linear map that is thrown away afterwards.

    The map is there for equal widths too: another network's axes are in an order of their own, and imposing them would
    take features from the classifier that reads them. Equal widths start from the identity, so that a compressed copy
    of the teacher starts in the teacher's axes, with loss 0 where nothing was lost.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"embedding"})

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        kind: Literal["cosine", "infonce"] = "cosine",
        temperature: float = 0.2,
    ) -> None:
        """Unequal widths draw the map from torch's generator.

        Args:
            student_width: of the student's embedding.
            teacher_width: of the teacher's.
            kind: close the angle, or tell images apart.
            temperature: of `infonce`, above 0; `cosine` has none.
        """
        super().__init__()
        self.kind, self.temperature = kind, temperature
        self.projector = nn.Linear(student_width, teacher_width)
        if student_width == teacher_width:
            nn.init.eye_(self.projector.weight)
            nn.init.zeros_(self.projector.bias)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """{"embedding": loss}; `target` is not read."""
        assert student.embedding is not None  # `needs` asked for both
        assert teacher.embedding is not None
        with torch.autocast(student.embedding.device.type, enabled=False):
            projected = self.projector(student.embedding.float())
        if self.kind == "cosine":
            return {"embedding": cosine_distance(projected, teacher.embedding)}
        return {"embedding": info_nce(projected, teacher.embedding, temperature=self.temperature)}


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over B of 1 - cosine, in float32; gradients reach the student alone. student, teacher: (B, D)."""
    return (1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=1)).mean()


def info_nce(student: Tensor, teacher: Tensor, *, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of finding each image's teacher embedding among those of all images, in float32.

    With several processes, among the images of all of them: the mean of their losses, weighed by their shares of the
    batch, is the loss of one process, and so with the gradients, which reach the student alone.

    Args:
        student: (B, D), B images of this process; the length of a row does not matter.
        teacher: (B, D), of the same images.
        temperature: the cosines are divided by it, above 0.
    """
    keys, start = _of_all_processes(teacher.detach().float())
    # Autocast would lower the product.
    with torch.autocast(student.device.type, enabled=False):
        logits = F.normalize(student.float(), dim=1) @ F.normalize(keys, dim=1).T / temperature
    return F.cross_entropy(logits, start + torch.arange(len(student), device=student.device))


def _of_all_processes(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes in order of rank, and where this one's begin; their numbers may differ."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = torch.zeros(world, dtype=torch.int64, device=rows.device)
    counts[rank] = len(rows)
    dist.all_reduce(counts)
    sizes: list[int] = counts.tolist()
    # Only parts of one shape can be gathered: the shorter shares are padded, and cut again.
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sum(sizes[:rank])
