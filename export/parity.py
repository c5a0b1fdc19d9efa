"""Parity: does the exported file compute what the network computes, on real images?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slim import environment
from slim.errors import ParityError, SlimError, StoreError, UsageError
from slim.export.target import Target
from slim.measurement import Measurement
from slim.surgery import in_eval

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest logit. Two orders of summation in float32 differ by 1e-7 to 3e-5 on
60 timm architectures; a swapped layout or a lost weight by 1e-2 and more."""

CHUNK = 32
"""Images of one call; more need memory and gain nothing."""


def parity(model: nn.Module, path: Path, images: Tensor, *, target: Target) -> Measurement:
    """Largest absolute difference of the logits of `model` and of the file at `path` on `images` (B, C, H, W) float32.

    Top-1 must agree on every image whose two best classes lie further apart than the tolerance. `model` is left as it
    was; it runs on its own device.

    Raises:
        ParityError: the two differ by more than rounding, or one of them is not finite.
        UsageError: no images, or not of the size the file takes.
        StoreError: ONNX Runtime cannot load the file.
        MissingExtra: ONNX Runtime is not installed.
    """
    session = open_session(path, target)
    exported = logits(session, images, place=str(path))
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    with in_eval(model):
        expected = torch.cat([model(chunk.to(device)).float().cpu() for chunk in torch.split(images, CHUNK)])
    if not torch.isfinite(expected).all():
        raise ParityError(
            f"parity: {type(model).__name__} itself gives {_count_bad(expected)} of {expected.numel()} logits that are "
            "not finite; the network is broken, not the export: look at the values before exporting"
        )
    if expected.shape != exported.shape:
        raise ParityError(
            f"parity: {path} gives logits {tuple(exported.shape)}, torch {tuple(expected.shape)}; "
            "the file is another network's, export this one again"
        )
    largest = (expected - exported).abs().max().item()
    scale = expected.abs().max().item()
    relative = largest / scale if scale else float(largest > 0)
    agree = expected.argmax(1) == exported.argmax(1)
    clear = _margins(expected) > TOLERANCE * scale
    disagreeing = int((~agree & clear).sum())
    agreement = 100 * agree.float().mean().item()
    if relative > TOLERANCE or disagreeing:
        raise ParityError(
            f"parity: {path} differs from torch by {largest:.3g} at most ({relative:.3g} of the largest logit) and in "
            f"top-1 on {disagreeing} of {len(images)} images; at most {TOLERANCE:g} and 0 are rounding, "
            "so the file computes something else: export it again, and report the layer if it stays"
        )
    return Measurement(
        metric="parity_max_abs",
        value=largest,
        unit="logits",
        n=len(images),
        statistic="max",
        target=str(target),
        environment=environment.describe(),
        details={"top1_agreement": agreement, "relative": relative, "tolerance": TOLERANCE},
    )


def open_session(path: Path, target: Target, *, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` of the file at `path`, as it is served on `target`.

    `threads` instead of the target's, where only the outputs matter.

    Raises:
        UsageError: no such file.
        StoreError: ONNX Runtime cannot load it.
        MissingExtra: ONNX Runtime is not installed.
    """
    target.probe()
    import onnxruntime

    if not path.is_file():
        raise UsageError(f"{path}: no such file; give an exported .onnx file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or target.threads
    options.inter_op_num_threads = 1
    # Threads that wait by spinning take the cores from whatever else the run is doing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # its errors come back as exceptions; printed as well they would be said twice
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no base class
        raise StoreError(f"{path}: ONNX Runtime cannot load it: {_line(error)}; export it again") from error


def logits(session: Any, images: Tensor, *, place: str) -> Tensor:
    """Logits (B, classes) float32 of `images` (B, C, H, W) float32, B >= 1, in chunks; a fixed batch is filled up.

    Raises:
        UsageError: no images, not of the size the graph takes, or not a classifier. Errors name `place`.
        ParityError: a logit that is not finite.
        SlimError: the runtime fails on them.
    """
    source = session.get_inputs()[0]
    batch, *size = source.shape
    fits = images.ndim == len(source.shape) == 4 and all(
        want == have or not isinstance(want, int) for want, have in zip(size, images.shape[1:], strict=True)
    )
    if not fits or len(images) == 0 or source.type != "tensor(float)":
        raise UsageError(
            f"{place}: input {source.name!r} is {source.type} (batch, {', '.join(map(str, size))}), the images are "
            f"float {tuple(images.shape)}; give at least one image of that size, and a file that takes float32"
        )
    fixed = batch if isinstance(batch, int) else None
    chunks = torch.split(images.float().cpu(), fixed or CHUNK)
    result = torch.cat([_call(session, chunk, fixed, place=place) for chunk in chunks])
    if result.ndim != 2:
        raise UsageError(f"{place}: the output is {tuple(result.shape)}; a classifier gives (batch, classes)")
    if not torch.isfinite(result).all():
        raise ParityError(
            f"{place}: ONNX Runtime gives {_count_bad(result)} of {result.numel()} logits that are not finite; "
            "its figures would mean nothing: export the network again from weights that are finite"
        )
    return result


def _call(session: Any, chunk: Tensor, fixed: int | None, *, place: str) -> Tensor:
    count = len(chunk)
    if fixed and count < fixed:
        chunk = torch.cat([chunk, chunk[-1:].expand(fixed - count, -1, -1, -1)])
    try:
        outputs = session.run(None, {session.get_inputs()[0].name: chunk.numpy()})[0]
    except Exception as error:  # the runtime's own exceptions share no base class
        raise SlimError(f"{place}: ONNX Runtime cannot run it: {_line(error)}; export it again") from error
    return torch.from_numpy(outputs).float()[:count]


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
