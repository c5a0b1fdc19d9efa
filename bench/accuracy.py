"""Accuracy of an exported file, and what a candidate lost against a reference on the same images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slim import environment
from slim.bench.worker import serving
from slim.errors import DataError, UsageError
from slim.export.parity import logits
from slim.export.target import Target
from slim.measurement import Measurement

Z = 1.959964
"""Quantile of the normal distribution: 95 % lie within +- Z."""

RESAMPLES = 10_000
"""Bootstrap resamples; the interval's ends repeat to about 1 % of its width."""


def accuracy(
    path: Path,
    target: Target,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    progress: Callable[[int], object] | None = None,
) -> Measurement:
    """Top-1 in percent of the file at `path` on `target`, with a Wilson interval.

    batches: pairs of images (B, C, H, W) float32 and class indices (B,) int, every image once, in a fixed order.
    progress: told the number of images after each batch.

    `samples` holds 1.0 or 0.0 for each image, `details["predictions"]` the class it was given.

    Raises:
        DataError: no images, or a class index the file has no output for.
        ParityError: a logit that is not finite.
        StoreError, UsageError, MissingExtra: the file cannot be run; see `serving`.
    """
    predictions: list[int] = []
    truths: list[int] = []
    top5 = classes = 0
    with serving(path, target, threads=environment.usable_cores()) as session:
        for images, labels in batches:
            outputs = logits(session, images, place=str(path))
            classes = outputs.shape[1]
            if len(labels) != len(outputs) or int(labels.min()) < 0 or int(labels.max()) >= classes:
                raise DataError(
                    f"{path}: {len(labels)} labels {int(labels.min())}..{int(labels.max())} for {len(outputs)} images "
                    f"and {classes} classes; each image needs one label from 0 to {classes - 1}"
                )
            predictions += outputs.argmax(1).tolist()
            truths += labels.tolist()
            top5 += int((outputs.topk(min(5, classes), dim=1).indices == labels.cpu()[:, None]).sum())
            if progress:
                progress(len(images))
    if not truths:
        raise DataError(f"{path}: accuracy needs at least one image; the split is empty")
    hits = [float(guess == truth) for guess, truth in zip(predictions, truths, strict=True)]
    low, high = wilson(int(sum(hits)), len(hits))
    details: dict[str, Any] = {"predictions": predictions, "classes": classes, "labels_sha256": _digest(truths)}
    if classes >= 10:
        details["top5"] = 100 * top5 / len(hits)
    return Measurement(
        metric="accuracy_top1",
        value=100 * sum(hits) / len(hits),
        unit="percent",
        n=len(hits),
        low=low,
        high=high,
        statistic="mean",
        target=str(target),
        environment=environment.describe(),
        samples=tuple(hits),
        details=details,
    )


def drop(candidate: Measurement, reference: Measurement, *, seed: int = 0) -> Measurement:
    """Points of top-1 that `candidate` lost against `reference`, both from `accuracy` on the same images.

    Negative where it gained. The interval is a paired bootstrap over the images, drawn from `seed`.

    Raises:
        UsageError: the two were not measured on the same images in the same order.
    """
    _paired(candidate, reference, candidate.samples, reference.samples)
    lost = sum(one < other for one, other in zip(candidate.samples, reference.samples, strict=True))
    won = sum(one > other for one, other in zip(candidate.samples, reference.samples, strict=True))
    n = len(candidate.samples)
    # An image counts -1, 0 or 1, so resampling images is drawing these three counts.
    draws = np.random.default_rng(seed).multinomial(n, [lost / n, won / n, (n - lost - won) / n], size=RESAMPLES)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5])
    return Measurement(
        metric="top1_drop_points",
        value=100 * (lost - won) / n,
        unit="points",
        n=n,
        low=float(low),
        high=float(high),
        statistic="mean",
        target=candidate.target,
        environment=candidate.environment,
        details={"lost": lost, "won": won},
    )


def agreement(candidate: Measurement, reference: Measurement) -> Measurement:
    """Percent of images that both files put into the same class, right or wrong; both from `accuracy`.

    Raises:
        UsageError: the two were not measured on the same images in the same order.
    """
    ours, theirs = (one.details.get("predictions", []) for one in (candidate, reference))
    _paired(candidate, reference, ours, theirs)
    same = [float(one == other) for one, other in zip(ours, theirs, strict=True)]
    low, high = wilson(int(sum(same)), len(same))
    return Measurement(
        metric="top1_agreement",
        value=100 * sum(same) / len(same),
        unit="percent",
        n=len(same),
        low=low,
        high=high,
        statistic="mean",
        target=candidate.target,
        environment=candidate.environment,
        samples=tuple(same),
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval in percent of a share seen as `hits` of `n` (Wilson 1927); honest at 0 and 100 %, too."""
    share, z2 = hits / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def _paired(candidate: Measurement, reference: Measurement, ours: Sequence[float], theirs: Sequence[float]) -> None:
    for one in (candidate, reference):
        if one.metric != "accuracy_top1":
            raise UsageError(f"comparison of {one.metric}: needs two measurements of accuracy_top1")
    if not ours or len(ours) != len(theirs):
        raise UsageError(
            f"comparison: {len(ours)} images of the candidate against {len(theirs)} of the reference; "
            "measure both on the same images and keep their raw samples"
        )
    if candidate.details.get("labels_sha256") != reference.details.get("labels_sha256"):
        raise UsageError(
            f"comparison: the {len(ours)} labels differ between candidate and reference; "
            "measure both on the same images in the same order"
        )


def _digest(labels: list[int]) -> str:
    return hashlib.sha256(torch.tensor(labels).numpy().tobytes()).hexdigest()
