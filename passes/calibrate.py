"""Second moments and means of the inputs of layers, from one pass over a few unlabelled images.

What a layer multiplies are rows: tokens of a Linear layer, im2col patches of a convolution, padded as it pads them.
Of each image only as many rows are read as the moments need, spread by a fixed permutation, so that a batch of patches
is never unfolded. Where second moments of k x k convolutions do not fit in memory, the largest are replaced by those of
the channels alone, kernel positions taken as independent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from slim.contract import Progress, no_progress
from slim.errors import PassError
from slim.surgery import in_eval

Layer = nn.Linear | nn.Conv2d

ROWS_PER_INPUT = 64
"""Rows read for each of d inputs: a second moment of n independent rows is off by about sqrt(d / n), here an eighth."""
BLOCK = 512
"""Columns multiplied at once: blocks below the diagonal are mirrored, which nearly halves the work of a wide layer."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the inputs of one layer, for each of its g groups."""

    second: Tensor
    """(g, d, d) fp64: mean of x x^T, not centred."""
    mean: Tensor
    """(g, d) fp64."""
    n: int
    """Rows seen."""
    taps: bool
    """Whether d counts (i, kh, kw), as in `weight.flatten(1)`; else the channels alone, for want of memory."""
    noise: Tensor
    """(g,) fp64 in [0, 1]: share of the squared covariances of different inputs that is due to too few images."""

    @property
    def covariance(self) -> Tensor:
        """(g, d, d) fp64, as the images have it."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def shrunk(self) -> Tensor:
        """(g, d, d) fp64: the covariance, those of different inputs without the share that is noise."""
        covariance = self.covariance
        kept = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2) * self.noise[:, None])
        return covariance.mul_(1 - self.noise[:, None, None]).add_(kept)

    def expanded(self, kernel: int) -> Moments:
        """With kernel positions, as many as given: independent, each with these moments; itself where it has them.

        The covariance is kron(covariance, I); the second moment has the product of the means beside it, without which
        it would be that of no input whose mean is not zero.
        """
        if self.taps:
            return self
        covariance = torch.kron(self.covariance, torch.eye(kernel, dtype=self.second.dtype, device=self.second.device))
        mean = self.mean.repeat_interleave(kernel, 1)
        second = covariance.add_(mean[:, :, None] * mean[:, None, :])
        return Moments(second, mean, self.n, taps=True, noise=self.noise)


def collect(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    *,
    images: int,
    memory_gb: float,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> dict[str, Moments]:
    """Moments of the inputs of the named Linear layers and convolutions.

    Args:
        model: lies on `device`; every call of a layer counts.
        names: dotted names.
        batches: (B, C, H, W) each; how they are cut does not matter.
        images: how many they hold together.
        memory_gb: 1e9 bytes that the second moments may take together.
        device: where to work; none: the CPU, where the moments come to lie in any case.
        progress: told after every batch.

    Raises:
        PassError: they do not fit; a layer is not called; its input is not finite.
    """
    layers = {name: cast(Layer, model.get_submodule(name)) for name in names}
    taps = _with_taps(layers, memory_gb)
    device = device or torch.device("cpu")
    second = {
        name: torch.zeros(_shape(layer, taps[name]), dtype=torch.double, device=device)
        for name, layer in layers.items()
    }
    mean = {name: value.new_zeros(value.shape[:2]) for name, value in second.items()}
    apart = {name: value.new_zeros(len(value)) for name, value in second.items()}
    n = dict.fromkeys(names, 0)
    batch = range(0)

    def adding(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if not x.isfinite().all():
                raise PassError(f"calibrate: the input of layer {name!r} is not finite; check weights and images")
            # A table of the network's own, not the images': one and the same in every batch.
            shown = batch if x.shape[0] % len(batch) == 0 else range(1)
            wanted = -(-ROWS_PER_INPUT * mean[name].shape[1] // images)
            found = rows(cast(Layer, layer), x, shown, wanted, taps=taps[name]).float().movedim(1, 0)
            add_upper(second[name], found)
            if shown is batch:
                apart[name] += squares_apart(found, len(shown))
            mean[name] += found.sum(1, dtype=torch.double)
            n[name] += found.shape[1]

        return add

    with ExitStack() as hooks, in_eval(model), progress("calibrate", images) as advance:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(adding(name)))
        for part in batches:
            batch = range(batch.stop, batch.stop + len(part))
            model(part.to(device))
            advance(len(part))
    for name in names:
        if not n[name]:
            raise PassError(f"calibrate: layer {name!r} was never called; skip it")
        mirror(second[name])
    return {name: _moments(second[name], mean[name], n[name], taps[name], apart[name], images) for name in names}


def squares_apart(x: Tensor, images: int) -> Tensor:
    """Squared second moments of different inputs, summed over images.

    x: (g, images * rows, d), image by image. Returns (g,) fp64.
    """
    groups, count, width = x.shape
    each = x.reshape(groups * images, count // images, width) / (count // images) ** 0.5
    # |X^T X| = |X X^T|: the smaller of the two.
    whole = (each @ each.mT if each.shape[1] < width else each.mT @ each).square().sum((1, 2), dtype=torch.double)
    own = each.square().sum(1).square().sum(1, dtype=torch.double)
    found: Tensor = (whole - own).view(groups, images).sum(1)
    return found


def _moments(second: Tensor, mean: Tensor, n: int, taps: bool, apart: Tensor, images: int) -> Moments:
    """From sums over all rows, and the squares of every image's own second moment."""
    second, mean, apart = second.div_(n).cpu(), (mean / n).cpu(), apart.cpu()
    found = Moments(second, mean, n, taps, apart.new_zeros(len(apart)))

    def between(moment: Tensor) -> Tensor:
        return moment.square().sum((1, 2)) - moment.diagonal(dim1=1, dim2=2).square().sum(1)

    # Variance of a mean over images, summed over pairs of inputs, against what the pairs have.
    variance = (apart / images - between(second)).clamp(min=0) / max(images - 1, 1)
    pairs = between(found.covariance)
    noise = torch.where(pairs > 0, variance / pairs.clamp(min=torch.finfo(torch.double).tiny), 0.0).clamp(max=1)
    return dataclasses.replace(found, noise=noise)


def positions(total: int, wanted: int, images: range) -> Tensor:
    """(len(images), min(wanted, total)) int64: which of its `total` rows are read of each image, none twice.

    One image goes on in a fixed permutation where the one before it stopped, so that all are read equally often.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    wanted = min(wanted, total)
    first = torch.arange(images.start, images.stop)[:, None] * wanted
    return order[(first + torch.arange(wanted)) % total]


def thinned(x: Tensor, images: range, wanted: int) -> Tensor:
    """(n, C): the rows of x (B, ..., C) at `positions`; B is a multiple of the images, in their order."""
    x = x.flatten(0, -2)
    total = len(x) // len(images)
    start = torch.arange(len(images))[:, None] * total
    return x[(start + positions(total, wanted, images)).flatten().to(x.device)]


def rows(layer: Layer, x: Tensor, images: range, wanted: int, *, taps: bool = True) -> Tensor:
    """What the layer multiplies when it is called with x, `wanted` rows of each image.

    Args:
        layer: Linear, or a convolution of any groups, stride, dilation and padding.
        x: (B, ..., I) or (B, I, H, W); B is a multiple of the images, in their order.
        images: their numbers, by which positions are chosen.
        wanted: rows of each image; all where there are fewer. Positions are those of the layer's output.
        taps: for a convolution, patches in the order of `weight.flatten(1)`; without, only the channels of its input.

    Returns:
        (n, groups, d).
    """
    if isinstance(layer, nn.Linear):
        return thinned(x, images, wanted)[:, None]
    if not taps:
        found = thinned(x.movedim(1, -1), images, wanted)
        return found.reshape(len(found), layer.groups, -1)
    x = padded(layer, x).movedim(1, -1)
    batch, height, width, channels = x.shape
    (kh, kw), (dh, dw), (sh, sw) = layer.kernel_size, layer.dilation, layer.stride
    down, across = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    corners = torch.arange(down)[:, None] * (sh * width) + torch.arange(across) * sw
    corners = torch.arange(batch)[:, None] * (height * width) + corners.flatten()
    offsets = torch.arange(kh)[:, None] * (dh * width) + torch.arange(kw) * dw
    places = thinned(corners[..., None], images, wanted) + offsets.flatten()
    return x.reshape(-1, channels)[places.to(x.device)].movedim(1, 2).reshape(len(places), layer.groups, -1)


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input x (B, C, H, W) as the convolution pads it."""
    if isinstance(layer, Conv2dSame):
        return cast(Tensor, pad_same(x, layer.kernel_size, layer.stride, layer.dilation))
    # Left, right, top, bottom; torch keeps it for the modes its kernels lack, and fills it for 'same' and 'valid' too.
    sides = layer._reversed_padding_repeated_twice
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def add_upper(second: Tensor, x: Tensor) -> None:
    """Add x^T x of x (g, n, d) to `second` (g, d, d) in its own precision; blocks below the diagonal are left out."""
    for start in range(0, x.shape[2], BLOCK):
        part = slice(start, start + BLOCK)
        second[:, part, start:] += x[:, :, part].mT @ x[:, :, start:]


def mirror(second: Tensor) -> None:
    """Fill in what `add_upper` left out."""
    for start in range(0, second.shape[1], BLOCK):
        stop = start + BLOCK
        second[:, stop:, start:stop] = second[:, start:stop, stop:].mT


def _shape(layer: Layer, taps: bool) -> tuple[int, int, int]:
    if isinstance(layer, nn.Linear):
        return 1, layer.in_features, layer.in_features
    width = layer.weight[0].numel() if taps else layer.weight.shape[1]
    return layer.groups, width, width


def _with_taps(layers: Mapping[str, Layer], memory_gb: float) -> dict[str, bool]:
    """Which layers keep their kernel positions; the largest lose them until the cap holds."""
    taps = dict.fromkeys(layers, True)

    def needed(name: str) -> float:
        groups, width, _ = _shape(layers[name], taps[name])
        return groups * width * width * 8 / 1e9

    for name in sorted(layers, key=needed, reverse=True):
        if sum(map(needed, layers)) <= memory_gb:
            break
        layer = layers[name]
        taps[name] = not (isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1)
    total = sum(map(needed, layers))
    if total > memory_gb:
        raise PassError(
            f"calibrate: the second moments of {len(layers)} layers need {total:.2g} GB, "
            f"allowed are {memory_gb:g}; raise memory_gb or skip layers"
        )
    return taps
