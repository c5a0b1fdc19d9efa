"""Distances between the logits of a student and a teacher, and the losses that labels give.

Soft targets (Hinton et al. 2015, arXiv:1503.02531), their symmetric form (SSLD, arXiv:2103.05959), DKD (Zhao et al.
2022, arXiv:2203.08679), DIST (Huang et al. 2022, arXiv:2205.10536), logit standardisation (Sun et al. 2024,
arXiv:2403.01427) and DeiT's hard labels (Touvron et al. 2021, arXiv:2012.12877). B images, K classes, K at least 2.

All is computed in float32, under autocast too: near convergence the rounding of bf16 is a quarter of the divergence.
Losses are sums over classes and means over the batch, times T**2 where there is a temperature T; gradients reach the
student alone. Nothing reads a label unless it is given one. Each of several processes sees its own share of the batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward", "reverse", "jeffreys", "js"]
"""KL(teacher || student); KL(student || teacher); half the sum of both; Jensen-Shannon, at most ln 2."""

SPREAD_FLOOR = 1e-8  # of a row's or column's norm in DIST, as its authors have it: a constant one has no correlation
STANDARD_FLOOR = 1e-7  # of a row's standard deviation, likewise: a row of equal logits would divide by zero


def soft_kl(student: Tensor, teacher: Tensor, *, kind: Divergence, temperature: float = 1.0) -> Tensor:
    """Divergence of the softened distributions, times T**2 so that gradients keep their size as T grows.

    `jeffreys` is what SSLD calls JS, and has no bound; `js` is the true one, at most ln 2 before T**2.

    Args:
        student: (B, K) logits.
        teacher: (B, K) logits.
        kind: which of the four.
        temperature: T, above 0.
    """
    s, t = _log_softmax(student, temperature), _log_softmax(teacher.detach(), temperature)
    match kind:
        case "forward":
            loss = _kl(t, s)
        case "reverse":
            loss = _kl(s, t)
        case "jeffreys":
            loss = (_kl(t, s) + _kl(s, t)) / 2
        case "js":
            loss = (_kl_to_middle(t, s) + _kl_to_middle(s, t)) / 2
    return loss * temperature**2


def decoupled(
    student: Tensor, teacher: Tensor, target: Tensor | None, *, alpha: float, beta: float, temperature: float = 1.0
) -> Tensor:
    """DKD: `alpha` * KL of (target, not target) + `beta` * KL among the other classes, times T**2.

    Plain KL weighs the second term by 1 - pt[target], which a sure teacher makes vanish.

    Args:
        student: (B, K) logits.
        teacher: (B, K) logits.
        target: (B,) int64 or (B, K) soft labels, of which the largest counts. An image without label (-1, a row of
            zeros, or none at all) takes the teacher's class.
        alpha: weight of the target's term.
        beta: weight of the other classes' term.
        temperature: T, above 0.
    """
    teacher = teacher.detach()
    chosen = _classes(target, teacher)[:, None]
    rest = torch.arange(student.shape[1] - 1, device=student.device)[None]
    # (B, K - 1) indices of the other classes. The others are taken out rather than masked or subtracted: their mass is
    # a logsumexp, which neither underflows beside a sure target nor meets an infinity in the backward pass.
    rest = rest + (rest >= chosen)

    def binary(logits: Tensor) -> Tensor:
        log_p = _log_softmax(logits, temperature)
        return torch.cat([log_p.gather(1, chosen), log_p.gather(1, rest).logsumexp(1, keepdim=True)], 1)

    def others(logits: Tensor) -> Tensor:
        return _log_softmax(logits.gather(1, rest), temperature)

    of_target = _kl(binary(teacher), binary(student))
    of_others = _kl(others(teacher), others(student))
    return (alpha * of_target + beta * of_others) * temperature**2


def relational(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """DIST: 1 - Pearson correlation of each image's probabilities, plus 1 - that of each class's over the batch.

    Both are means, over images and over classes; times T**2 as its authors have it, although correlation has no scale:
    here a higher T is more weight. Constant values count as uncorrelated. So with one image the second term, which
    compares images, is a constant 1 without gradient, and every process compares its own share of a batch alone.

    Args:
        student: (B, K) logits.
        teacher: (B, K) logits.
        temperature: T, above 0.
    """
    s, t = _log_softmax(student, temperature).exp(), _log_softmax(teacher.detach(), temperature).exp()
    return (2 - _correlation(s, t, dim=1).mean() - _correlation(s, t, dim=0).mean()) * temperature**2


def standardized(logits: Tensor) -> Tensor:
    """Each image's logits with mean 0 and standard deviation 1, so that only their pattern is learned, not their size.

    Given to `soft_kl` for both networks. logits: (B, K). Returns (B, K) float32.
    """
    z = logits.float()
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + STANDARD_FLOOR)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy against the teacher's class. student, teacher: (B, K) logits."""
    return F.cross_entropy(student.float(), teacher.argmax(1))


def label_loss(student: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy against labels; images without label add nothing.

    Divided by B, labelled or not: the weight of a labelled image does not depend on how many others are labelled.

    Args:
        student: (B, K) logits.
        target: (B,) int64, or (B, K) soft labels; -1 or a row of zeros where an image has no label.
    """
    if target.ndim == 2:
        target = target.float()
    return F.cross_entropy(student.float(), target, ignore_index=-1, reduction="sum") / len(student)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.float() / temperature, 1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q): sum over classes, mean over the batch."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _kl_to_middle(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || (p + q) / 2). No term exceeds ln 2 * p, and all are 0 where p = q, whatever the rounding of the logs."""
    return (log_p.exp() * (math.log(2) - F.softplus(log_q - log_p))).sum(1).mean()


def _correlation(p: Tensor, q: Tensor, *, dim: int) -> Tensor:
    """Pearson correlation along `dim`; 0 where either is constant."""
    return F.cosine_similarity(p - p.mean(dim, keepdim=True), q - q.mean(dim, keepdim=True), dim=dim, eps=SPREAD_FLOOR)


def _classes(target: Tensor | None, teacher: Tensor) -> Tensor:
    """(B,) int64: the label where an image has one, else the teacher's class."""
    guess = teacher.argmax(1)
    if target is None:
        return guess
    if target.ndim == 2:
        return torch.where(target.any(1), target.argmax(1), guess)
    return torch.where(target < 0, guess, target)
