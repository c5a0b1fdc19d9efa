"""The record of one view: its k most probable classes and their probabilities, 4 k bytes.

Fast knowledge distillation (Shen and Xing 2022, arXiv:2112.01528) keeps the largest probabilities and gives what they
leave evenly to the other classes. Here are what goes into a record, what comes out, and how far that may be from the
teacher: functions of tensors. Knows no file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MOST_CLASSES = 65_536
"""What a uint16 can number."""
ROUNDING = 2.0**-11
"""Largest relative error of a probability stored as float16..."""
FLOOR = 2.0**-25
"""...and largest absolute one below its normal range: half the least positive float16. Least weight of any class."""
# In bf16 a batch of another size adds up in another order, and results near the middle of two bf16 numbers round the
# other way (2^-8 of the value, in every layer). Emulated on an ImageNet MobileNetV2, its sums disturbed by 1e-6 before
# each rounding: the logits move by 1.6 % of the largest of them on average and by 3.9 % at most. Another teacher, or
# another view, moves them by about as much as they are large.
NOISE = 2.0**-4
"""Share of the largest logit by which a logit may differ when the same teacher sees the same view again."""


def record_dtype(k: int) -> np.dtype[np.void]:
    """One record: `index` k x uint16 class, `prob` k x float16 probability, most probable first; little-endian."""
    return np.dtype([("index", "<u2", (k,)), ("prob", "<f2", (k,))])


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Softmax (B, K) float32 of logits (B, K) at `temperature`."""
    return torch.softmax(logits.float() / temperature, dim=1)


def top_k(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable of K classes, (B, k) int64, and their probabilities, (B, k) float16. logits: (B, K)."""
    prob, index = softened(logits, temperature).topk(k, dim=1)
    return index, prob.half()


def packed(index: Tensor, prob: Tensor) -> npt.NDArray[Any]:
    """Records (B,) of classes (B, k) and their probabilities (B, k)."""
    records = np.empty(len(index), record_dtype(index.shape[1]))
    records["index"], records["prob"] = index.cpu().numpy(), prob.cpu().numpy()
    return records


def unpacked(records: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Classes (B, k) int64 and probabilities (B, k) float32 of records (B,)."""
    return torch.from_numpy(records["index"].astype(np.int64)), torch.from_numpy(records["prob"].astype(np.float32))


def retained(logits: Tensor, temperature: float) -> Tensor:
    """Probability of the 1, 2, ... K most probable classes, (B, K) float64. logits: (B, K)."""
    return torch.softmax(logits.double() / temperature, dim=1).sort(dim=1, descending=True).values.cumsum(1)


def least_k(share: Tensor, mass: float) -> int:
    """Least k that retains `mass`. share: (K,) ascending, of the 1, 2, ... K most probable classes."""
    # Rounding can leave the last share a little under 1.
    return min(int((share < mass).sum()) + 1, len(share))


def log_probs(index: Tensor, prob: Tensor, classes: int) -> Tensor:
    """Log-probabilities (B, classes) float32 of stored records; what the top k leave goes evenly to the other classes.

    No class has less than FLOOR before all are scaled to sum to 1: float16 rounds anything smaller to 0, and the k may
    round to a sum of 1 or more.

    Args:
        index: (B, k) int64, distinct in a row.
        prob: (B, k) float.
        classes: K.
    """
    prob, others = prob.double(), classes - prob.shape[1]
    rest = ((1 - prob.sum(1, keepdim=True)) / max(others, 1)).clamp(min=FLOOR)
    top = prob.clamp(min=FLOOR)
    total = top.sum(1, keepdim=True) + others * rest
    spread = (rest / total).log().float().repeat(1, classes)
    return spread.scatter_(1, index, (top / total).log().float())


def tolerance(mass: float, *, classes: int, k: int, spread: float) -> float:
    """Most that KL(cached || s) and KL(teacher || s) can differ, in nat, for a student s and top k that hold `mass`.

    Of one view, or of the mean over views at their mean mass. At temperature T the student's distribution is the
    softened one; a loss multiplied by T^2 has T^2 times this tolerance.

    Cut: with t = 1 - mass, n = K - k, p~ and s~ teacher and student renormalised on those n classes and u uniform on
    them, the two differ by t * (KL(p~ || s~) - KL(u || s~)). Neither KL is negative; the first is at most
    -log min s~ <= log n + spread, the second at most spread.

    Rounding: float16 and FLOOR move at most d = ROUNDING + (k + K) * FLOOR of the mass. The cross-entropy then moves by
    at most d * spread, and the entropy by d * log(K - 1) + h(d), h the binary entropy (Audenaert 2007,
    arXiv:quant-ph/0610146).

    Args:
        mass: share of the teacher's probability that the top k hold.
        classes: K, at least 2.
        k: classes of a record.
        spread: the student's largest log-probability minus its least, the largest over the views.
    """
    others, moved = classes - k, ROUNDING + (k + classes) * FLOOR
    cut = (1 - mass) * (math.log(others) + spread) if others > 1 else 0.0  # a single class gets exactly what is left
    entropy = -moved * math.log(moved) - (1 - moved) * math.log1p(-moved)
    return cut + moved * (math.log(classes - 1) + spread) + entropy


def agrees(index: Tensor, prob: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Whether each record (B,) bool can come from a teacher that now gives these logits.

    Where no logit moves by more than d = NOISE * the largest, no log-odds move by more than 2 d / T, and no class can
    have been the most probable that is now behind by more. Beyond that a probability has its float16 rounding.

    Args:
        index: (B, k) int64.
        prob: (B, k) float, as stored.
        logits: (B, K).
        temperature: of `prob`.
    """
    scaled = logits.double() / temperature
    moves = 2 * NOISE * scaled.abs().amax(1, keepdim=True)
    log_prob = torch.log_softmax(scaled, dim=1)
    found = log_prob.gather(1, index)
    odds = torch.logit(found.exp())
    low = (odds - moves).sigmoid() * (1 - ROUNDING) - FLOOR
    high = (odds + moves).sigmoid() * (1 + ROUNDING) + FLOOR
    values = ((prob >= low) & (prob <= high)).all(1)
    return values & (log_prob.amax(1) - found[:, 0] <= moves[:, 0])
