"""How much a network's prediction depends on what each layer puts out, from one backward pass over a few images.

For a small error of the output that favours no direction, the expected Kullback-Leibler divergence of the prediction is
half its squared length times the mean squared gradient, per output, of the log-likelihood of a class drawn from the
prediction itself: the trace of the Fisher information (Martens 2020, arXiv:1412.1193). Needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.contract import Progress, no_progress
from slim.errors import PassError
from slim.surgery import in_eval

IMAGES = 64
"""One figure for each layer needs few: layers differ by factors of ten."""
BATCH = 8
"""Images of one backward pass, which holds every activation of the network at once."""


def sensitivities(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    *,
    seed: int,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Divergence in nats for each unit of squared output error at one position of each layer; see above.

    Args:
        model: lies on `device`; its parameters need no gradient and get none.
        names: of layers with outputs (B, ..., C), or (B, C, H, W) of a convolution.
        batches: (B, C, H, W) each; the first images are used, up to `IMAGES`.
        seed: of the classes drawn.
        device: where to work; none: the CPU.
        progress: told after every batch.

    Raises:
        PassError: the prediction of an image is not finite.
    """
    squares = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(seed)
    done = 0

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
            output.register_hook(lambda gradient: add(name, gradient, channels))  # type: ignore[no-untyped-call]

        return hook

    def add(name: str, gradient: Tensor, channels: int) -> None:
        squares[name] += float(gradient.square().sum(dtype=torch.double)) / channels

    with ExitStack() as hooks, in_eval(model), torch.enable_grad(), progress("sensitivity", IMAGES) as advance:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(watch(name)))
        for images in _first(batches):
            shown = images.to(device or "cpu", copy=True).requires_grad_(True)
            torch.autograd.grad(drawn_loss(model(shown), generator, "sensitivity"), shown)
            done += len(images)
            advance(len(images))
    return {name: total / (2 * max(done, 1)) for name, total in squares.items()}


def drawn_loss(logits: Tensor, generator: torch.Generator, name: str) -> Tensor:
    """Minus the log-likelihood, in nats, of a class drawn for each image from its prediction; summed over the images.

    Args:
        logits: (B, classes), on any device; the loss is of fp32.
        generator: of the classes; on the CPU, where they are drawn.
        name: of who asks, for the error.

    Raises:
        PassError: the prediction of an image is not finite.
    """
    logits = logits.float()
    if not logits.isfinite().all():
        raise PassError(f"{name}: the network's output is not finite; check weights and images")
    drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


def _first(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The first images, in batches of `BATCH`, whatever batches they come in."""
    left = IMAGES
    for images in batches:
        yield from torch.split(images[:left], BATCH)
        left -= len(images)
        if left <= 0:
            return
