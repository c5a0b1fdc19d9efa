"""The losses of a step that trains a network and its subnets together, in one forward and one backward pass.

The sandwich (BigNAS, Yu et al. 2020, arXiv:2003.11142): the largest learns from the labels, and in the same step its
subnets learn what it says. A pretrained largest is ready to teach, so there are no phases; the subnets' share alone is
ramped up (DepS, Annavajjala et al. 2024, arXiv:2407.06167). POA's three branches (Zhang et al. 2024, arXiv:2408.01031)
need no labels. Batch norms' running statistics are those of the largest, and dropout and stochastic depth act in it
alone. All graphs of a step are held until its backward pass: n networks take the memory of n.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slim.data import Batch
from slim.passes.distill.logits import label_loss, soft_kl
from slim.passes.elastic.space import Subnet

Choose = Callable[[Subnet], None]
Draw = Callable[[int], Sequence[Subnet]]
"""Step -> the subnets trained in it besides the largest; see sampling.py."""
Divergence = Literal["kl", "alpha"]

LARGEST_RATIO = 5.0
"""Bound of q / p in the alpha-divergence, AlphaNet's: unbounded, a single class sends training back to chance."""


class Sandwich(nn.Module):
    """The largest learns from labels and from what it was, its subnets from the largest."""

    def __init__(
        self,
        choose: Choose,
        draw: Draw,
        largest: Subnet,
        *,
        ramp: float,
        divergence: Divergence,
        temperature: float,
        label_weight: float,
        guard: float = 0.0,
        original: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """What a step is made of.

        Args:
            choose: of `gated`, on the network that is trained.
            draw: the subnets of a step.
            largest: what the gates are left at.
            ramp: share of all steps over which the subnets' weight rises from 0 to 1, in [0, 1]; see `beta`.
            divergence: what a subnet is compared with the largest by.
            temperature: of both sides, above 0; losses are times its square.
            label_weight: of the cross-entropy of the largest; 0 reads no label.
            guard: weight of KL(original || largest), which keeps the largest from drifting.
            original: images -> logits of the network before training. It is called without gradients, and is neither
                trained nor kept in checkpoints.
        """
        super().__init__()
        assert label_weight or guard, "else nothing trains the largest"
        assert bool(guard) == (original is not None), "the original and its weight go together"
        self.choose, self.draw, self.largest = choose, draw, largest
        self.ramp, self.temperature = ramp, temperature
        self.divergence: Divergence = divergence
        self.label_weight, self.guard = label_weight, guard
        self._original = (original,)  # in a tuple: a module would be registered, and trained, moved and saved along
        self.step, self.total = 0, 1

    def before_step(self, step: int, total: int) -> None:
        """The steps done and all steps: what to draw, and how much it weighs."""
        self.step, self.total = step, total

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named losses, float32 scalars; their sum is trained on.

        `label` and `original` are of the largest, `subnets` the sum over subnets times `beta`. A sum, as BigNAS and
        DepS have it: each network counts as one, so that to train more of them at a time takes nothing from any.
        """
        ours = model(batch.images)
        named: dict[str, Tensor] = {}
        if self.label_weight:
            named["label"] = label_loss(ours, batch.target) * self.label_weight
        (original,) = self._original
        if original is not None:
            with torch.no_grad():
                theirs = original(batch.images)
            named["original"] = soft_kl(ours, theirs, kind="forward", temperature=self.temperature) * self.guard
        weight = beta(self.step, self.total, self.ramp)
        subnets = answers(model, batch.images, self.choose, self.draw(self.step), self.largest)
        found = [self._distance(logits, ours) for logits in subnets]
        named["subnets"] = torch.stack(found).sum() * weight
        return named

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """No gradient reaches `theirs`."""
        if self.divergence == "alpha":
            return adaptive(ours, theirs, temperature=self.temperature)
        return soft_kl(ours, theirs, kind="forward", temperature=self.temperature)


class Branches(nn.Module):
    """POA's three branches: subnets learn from the network as it is now and as it was on average, without labels.

    Of POA this has the branches, their weights and the ladder of subnets (see sampling.py), on the network's own logits
    and on one view of an image. It has no crops, no masked patches, no prototype heads with their centring, and no
    KoLeo term: those learn features from nothing, and here there is a network that has them. Nor are layers scaled by
    depth / depth kept: a pretrained network was not learned with that factor. POA's temperature of 0.1 is one of
    cosines; logits have their own scale.

    Losses are KL where POA has cross-entropy: the gradients are the same, and 0 says that nothing is left to learn.
    The mean teacher begins as the network itself, so what first moves anything is the subnets' share.
    """

    def __init__(
        self,
        choose: Choose,
        draw: Draw,
        largest: Subnet,
        *,
        student: nn.Module,
        original: nn.Module,
        intact: float,
        momentum: float,
        temperature: float,
    ) -> None:
        """What a step is made of.

        Args:
            choose: of `gated`, on `student`.
            draw: the subnets of a step, for POA one.
            largest: what the gates are left at.
            student: the network that is trained.
            original: the same network without gates, which is copied: the teacher's first values.
            intact: weight of the largest's loss, in (0, 1); a subnet's is what is missing to 1. POA's is 0.8.
            momentum: share of itself that the teacher keeps in a step at first, rising to 1 by a cosine (DINO, Caron et
                al. 2021, arXiv:2104.14294).
            temperature: of every side, above 0; losses are times its square.
        """
        super().__init__()
        self.choose, self.draw, self.largest = choose, draw, largest
        self.intact, self.momentum, self.temperature = intact, momentum, temperature
        self.teacher = copy.deepcopy(original).requires_grad_(False).eval()
        self._student = (student,)  # in a tuple: it is trained and saved on its own
        self.step = 0

    def train(self, mode: bool = True) -> Branches:
        """The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def before_step(self, step: int, total: int) -> None:
        """The steps done: what to draw."""
        self.step = step

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Move the teacher towards the student; integer buffers are taken over."""
        keeps = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * done)) / 2
        (student,) = self._student
        theirs, ours = self.teacher.state_dict(), student.state_dict()
        for name, value in theirs.items():
            if value.is_floating_point():
                value.lerp_(ours[name], 1 - keeps)
            else:
                value.copy_(ours[name])

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named losses, float32 scalars; their sum is trained on. `subnets` is the sum over them."""
        with torch.no_grad():
            theirs = self.teacher(batch.images)
        ours = model(batch.images)
        found = [
            self._kl(logits, theirs) + self._kl(logits, ours)
            for logits in answers(model, batch.images, self.choose, self.draw(self.step), self.largest)
        ]
        return {
            "intact": self._kl(ours, theirs) * self.intact,
            "subnets": torch.stack(found).sum() * (1 - self.intact),
        }

    def _kl(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return soft_kl(ours, theirs, kind="forward", temperature=self.temperature)


def answers(
    model: nn.Module, images: Tensor, choose: Choose, subnets: Sequence[Subnet], largest: Subnet
) -> list[Tensor]:
    """(B, K) logits of each subnet, quietly; the gates are left at the largest, whatever happens."""
    found = []
    with quiet(model):
        try:
            for subnet in subnets:
                choose(subnet)
                found.append(model(images))
        finally:
            choose(largest)
    return found


def beta(step: int, total: int, ramp: float) -> float:
    """Weight of the subnets after `step` of `total` steps: rising from 0 over the first share `ramp`, then 1.

    With `ramp` 0 it is 1 throughout: the plain sandwich.
    """
    rising = ramp * total
    return min(1.0, step / rising) if rising else 1.0


def adaptive(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """AlphaNet's divergence (Wang et al. 2021, arXiv:2102.07954): of each image the larger of two, mean over B.

    One is KL(p || q), which punishes a student q that misses what the teacher p holds likely; the other, of alpha = -1,
    is (sum q^2 / p - 1) / 2, which punishes one that holds likely what the teacher does not, with q / p bounded. Times
    T**2. Its gradient is not that of the bounded value, which is flat where it matters, but of the divergence with the
    bounded ratio for a weight: -sum(w * log q), w = p for the first and q * (1/2 - q / p) for the other.

    Args:
        student: (B, K) logits.
        teacher: (B, K) logits; no gradient.
        temperature: T, above 0.
    """
    log_q = F.log_softmax(student.float() / temperature, 1)
    log_p = F.log_softmax(teacher.detach().float() / temperature, 1)
    p, q = log_p.exp(), log_q.detach().exp()
    ratio = (log_q.detach() - log_p).exp().clamp(max=LARGEST_RATIO)
    missing = (p * (log_p - log_q.detach())).sum(1)
    excess = (q * (ratio - 1)).sum(1) / 2
    carriers = torch.where((excess > missing)[:, None], q * (0.5 - ratio), p)
    carried = -(carriers * log_q).sum(1)
    values = torch.maximum(missing, excess)
    return (values + carried - carried.detach()).mean() * temperature**2


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped, and no batch norm remembers what passes, though it normalises by it as before.

    Modules are put into eval mode, for some drop without a layer of their own; but batch norms in training mode stay,
    with their statistics out of reach. In the end all is as it was.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [
        module
        for module, training in modes
        if isinstance(module, _BatchNorm) and training and module.track_running_stats
    ]
    try:
        model.eval()
        for norm in norms:
            # Not by train(): timm's norms hold a drop layer within. Nor by momentum 0: batches would still be counted.
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, training in modes:  # by train(), which clears caches; parents first, for it goes down to children
            module.train(training)
