"""Parity: does the exported file compute what the network computes, on real images?

Asked of every hop: from torch to ONNX, and from ONNX to what a runtime makes of it. Plain files are judged by their
largest difference. Fewer bits differ by their nature, so there the direction of the logits and the class count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slim import environment
from slim.errors import ParityError, SlimError, UsageError
from slim.export.session import Session
from slim.export.target import Target
from slim.measurement import Measurement
from slim.surgery import in_eval

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest logit. Two orders of summation in float32 differ by 1e-7 to 3e-5 on
60 timm architectures; a swapped layout or a lost weight by 1e-2 and more."""

CHUNK = 32
"""Images of one call; more need memory and gain nothing."""


@dataclass(frozen=True)
class Gate:
    """What the logits of a file must keep of those it is compared with."""

    relative: float | None
    """Largest difference, as a share of the largest logit; none where it says nothing."""
    cosine: float
    """Least cosine of the two sets of logits, each image's without their mean."""
    agreement: float
    """Least share, percent, of images that both put into the same class, or whose two best classes lie no further apart
    than `relative`."""


GATES = {
    "fp32": Gate(TOLERANCE, 0.9999, 100.0),
    "fp16": Gate(None, 0.999, 98.0),
    "bf16": Gate(None, 0.99, 95.0),
    "int8": Gate(None, 0.98, 95.0),
}
"""Precision of a file, or of the runtime where that has fewer bits, to what is asked of it."""


def parity(
    model: nn.Module,
    path: Path,
    images: Tensor,
    *,
    target: Target,
    precision: str | None = None,
    session: Session | None = None,
) -> Measurement:
    """Largest absolute difference of the logits of `model` and of the file at `path` on `images` (B, C, H, W) float32.

    `details` holds the mean difference, the cosine and the agreement in top-1. `model` is left as it was; it runs on
    its own device. `precision`: of the file, a key of GATES; the target's where none is given. `session`: of the file,
    where it is open already.

    Raises:
        ParityError: the two differ by more than the gate of that precision lets pass, or one of them is not finite.
        UsageError: no images, or not of the size the file takes.
        StoreError: the runtime cannot load the file.
        TargetError: the runtime cannot run files here.
    """
    exported = logits(session or open_session(path, target), images, place=str(path))
    found = difference(
        expected(model, images), exported, place=str(path), against="torch", gate=GATES[precision or target.precision]
    )
    return found.model_copy(update={"target": str(target)})


def expected(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, classes) float32 of `model`, on the CPU. Raises ParityError where they are not finite."""
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    with in_eval(model):
        found = torch.cat([model(chunk.to(device)).float().cpu() for chunk in torch.split(images, CHUNK)])
    if not torch.isfinite(found).all():
        raise ParityError(
            f"parity: {type(model).__name__} itself gives {_count_bad(found)} of {found.numel()} logits that are "
            "not finite; the network is broken, not the export: look at the values before exporting"
        )
    return found


def difference(wanted: Tensor, given: Tensor, *, place: str, against: str, gate: Gate) -> Measurement:
    """Largest absolute difference of `given` from `wanted`, both (B, classes), once the gate lets it pass.

    Raises:
        ParityError: it does not; the message names `place`, and what it was compared `against`.
    """
    if wanted.shape != given.shape:
        raise ParityError(
            f"parity: {place} gives logits {tuple(given.shape)}, {against} {tuple(wanted.shape)}; "
            "the file is another network's, export this one again"
        )
    apart = (wanted - given).abs()
    largest, scale = apart.max().item(), wanted.abs().max().item()
    relative = largest / scale if scale else float(largest > 0)
    same = wanted.argmax(1) == given.argmax(1)
    undecided = _margins(wanted) <= gate.relative * scale if gate.relative is not None else torch.zeros_like(same)
    agreement = 100 * (same | undecided).float().mean().item()
    direction = cosine(wanted, given)
    missed = [
        f"{name} {value:.4g}, {rule} {limit:g}"
        for name, value, rule, limit, passes in (
            ("largest difference as a share of the largest logit", relative, "at most", gate.relative, _most),
            ("cosine", direction, "at least", gate.cosine, _least),
            ("agreement in top-1 in percent", agreement, "at least", gate.agreement, _least),
        )
        if limit is not None and not passes(value, limit)
    ]
    if missed:
        raise ParityError(
            f"parity: {place} differs from {against} by {largest:.3g} at most on {len(wanted)} images "
            f"({'; '.join(missed)}), so the file computes something else: export it again, and report the layer if it "
            "stays"
        )
    return Measurement(
        metric="parity_max_abs",
        value=largest,
        unit="logits",
        n=len(wanted),
        statistic="max",
        environment=environment.describe(),
        details={
            "top1_agreement": 100 * same.float().mean().item(),
            "relative": relative,
            "mean_abs": apart.mean().item(),
            "cosine": direction,
            "gate": {"relative": gate.relative, "cosine": gate.cosine, "agreement": gate.agreement},
        },
    )


def cosine(wanted: Tensor, given: Tensor) -> float:
    """Cosine of two sets of logits (B, classes), each without its mean over classes, which changes no probability."""
    ours, theirs = (values.double() - values.double().mean(1, keepdim=True) for values in (wanted, given))
    norm = ours.norm() * theirs.norm()
    # Two constants point nowhere; they are alike when they are equal, which the difference tells.
    return float((ours * theirs).sum() / norm) if norm else 1.0


def _most(value: float, limit: float) -> bool:
    return value <= limit


def _least(value: float, limit: float) -> bool:
    return value >= limit


def open_session(path: Path, target: Target, *, threads: int | None = None) -> Session:
    """The file at `path`, opened in this process as it is served on `target`.

    `threads` instead of the target's, where only the outputs matter.

    Raises:
        UsageError: no such file.
        StoreError: the runtime cannot load it.
        TargetError: the runtime cannot run files here.
    """
    target.probe()
    return target.on.open(path, threads=threads or target.threads, precision=target.precision, mode=target.mode)


def logits(session: Session, images: Tensor, *, place: str) -> Tensor:
    """Logits (B, classes) float32 of `images` (B, C, H, W) float32, B >= 1, in chunks; a fixed batch is filled up.

    Raises:
        UsageError: no images, not of the size the graph takes, or not a classifier. Errors name `place`.
        ParityError: a logit that is not finite.
        SlimError: the runtime fails on them.
    """
    source = session.inputs[0]
    batch, *size = source.shape
    fits = images.ndim == len(source.shape) == 4 and all(
        want == have or not isinstance(want, int) for want, have in zip(size, images.shape[1:], strict=True)
    )
    if not fits or len(images) == 0 or source.dtype != "float32":
        raise UsageError(
            f"{place}: input {source.name!r} is {source.dtype} (batch, {', '.join(map(str, size))}), the images are "
            f"float32 {tuple(images.shape)}; give at least one image of that size, and a file that takes float32"
        )
    fixed = batch if isinstance(batch, int) else None
    chunks = torch.split(images.float().cpu(), fixed or CHUNK)
    result = torch.cat([_call(session, chunk, fixed, place=place) for chunk in chunks])
    if result.ndim != 2:
        raise UsageError(f"{place}: the output is {tuple(result.shape)}; a classifier gives (batch, classes)")
    if not torch.isfinite(result).all():
        raise ParityError(
            f"{place}: the runtime gives {_count_bad(result)} of {result.numel()} logits that are not finite; "
            "its figures would mean nothing: export the network again from weights that are finite"
        )
    return result


def _call(session: Session, chunk: Tensor, fixed: int | None, *, place: str) -> Tensor:
    count = len(chunk)
    if fixed and count < fixed:
        chunk = torch.cat([chunk, chunk[-1:].expand(fixed - count, -1, -1, -1)])
    try:
        outputs = session.call([chunk.numpy()])[0]
    except Exception as error:  # the runtimes' own exceptions share no base class
        raise SlimError(f"{place}: the runtime cannot run it: {_line(error)}; export it again") from error
    return torch.tensor(outputs).float()[:count]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _margins(expected: Tensor) -> Tensor:
    """Best minus second best logit of each image; infinite where there is one class."""
    if expected.shape[1] < 2:
        return torch.full((len(expected),), float("inf"))
    best = expected.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _count_bad(values: Tensor) -> int:
    return int((~torch.isfinite(values)).sum())
