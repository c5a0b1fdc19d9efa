"""Closed-form repair of a compressed network from a few unlabelled images: no labels, no gradient.

Layers are refitted by least squares to what the dense network puts out (He et al. 2017, arXiv:1707.06168), and batch
norms given back the mean and variance that they have in the dense network: in execution order, so that each correction
sees what the ones before it have left. Weights move only where the images say so: a ridge draws them to what they are,
and a change is made as far as one fitted to half of the images holds for the other half.
Norms are expressed by the dense network's statistics on these images first: to re-estimate those that were folded
(mean 0, variance 1) as they are would destroy the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor, nn

from slim import surgery
from slim.contract import Progress, no_progress
from slim.errors import PassError
from slim.passes.calibrate import Layer, rows, thinned
from slim.surgery import in_eval

ROWS_PER_INPUT = 20
"""Rows of the least squares for each unknown of an output."""
LEAST_SHARE = 0.01
"""Of the dense variance: a norm whose input varies less is not scaled up further, it would scale up noise."""
LEAST_RIDGE = 1e-10
"""Of the energy of a layer's inputs: below it their variance is rounding of fp32, and nothing can be fitted to it."""

Norm = nn.BatchNorm1d | nn.BatchNorm2d


def repair(
    model: nn.Module,
    dense: nn.Module,
    refit: Mapping[str, str],
    images: Tensor,
    *,
    as_dense_sees: Tensor | None = None,
    kept: Mapping[str, Sequence[int]] | None = None,
    norms: bool = True,
    ridge: float = 1e-3,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> dict[str, JsonValue]:
    """Change values of `model` in place so that it computes what `dense` does, as well as its structure can.

    Args:
        model: the compressed network; it takes all images at once, see `images_that_fit`.
        dense: the network it came from; on the same device.
        refit: Linear layer or convolution in `model` -> module in `dense` that has its output. Input widths may differ.
        images: (n, C, H, W), as the network takes them.
        as_dense_sees: the same images as `dense` takes them, where that is of another size; norms are then matched
            alone, for outputs of another size cannot be compared, and `refit` has to be empty.
        kept: layer or norm in `model` -> channels of its output in `dense` that it still has; all where it is missing.
        norms: whether batch norms are matched: those with the same name in both, affine, with statistics.
        ridge: what moving a weight costs, relative to the mean variance of the layer's inputs.
        batch_size: images that `dense` takes at once.
        progress: told after every batch and every correction.

    Returns:
        How many layers were refitted and norms matched, on how many images; over the refitted layers, the mean relative
        error of the output before and after, and the mean share of the change that was made; layers left as they are,
        because a forward pass does not call them once, with one output for each image.

    Raises:
        PassError: a layer or norm sees values that are not finite.
    """
    assert as_dense_sees is None or not refit
    images = images.to(next(model.parameters()).device)
    seen = images if as_dense_sees is None else as_dense_sees.to(images.device)
    spans = [range(at, min(at + batch_size, len(images))) for at in range(0, len(images), batch_size)]
    kept = kept or {}
    shared = _shared_norms(model, dense, kept) if norms else []
    steady, steady_dense = _steady(model, [*refit, *shared], images), _steady(dense, [*refit.values(), *shared], seen)
    left = [name for name, target in refit.items() if name not in steady or target not in steady_dense]
    refits = {
        name: _Refit(name, model.get_submodule(name), kept.get(name), spans, ridge)
        for name in refit
        if name not in left
    }
    matches = {
        name: _Match(name, dense.get_submodule(name), kept.get(name))
        for name in shared
        if name in steady & steady_dense
    }
    steps = len(images) + len(refits) + len(matches)
    with in_eval(dense), in_eval(model), progress("repair", steps) as advance:
        with ExitStack() as hooks:
            for name, layer in refits.items():
                hooks.enter_context(dense.get_submodule(refit[name]).register_forward_hook(layer.watch))
            for name, norm in matches.items():
                hooks.enter_context(dense.get_submodule(name).register_forward_pre_hook(norm.watch))
            for span in spans:
                dense(seen[span.start : span.stop])
                advance(len(span))
        with ExitStack() as hooks:
            corrections: dict[str, _Refit | _Match] = {**refits, **matches}
            for name, correction in corrections.items():
                module = model.get_submodule(name)
                hooks.enter_context(module.register_forward_pre_hook(correction.correct))
                hooks.enter_context(module.register_forward_hook(lambda _m, _i, _o, name=name: advance(1, name)))
            model(images)
    figures: dict[str, JsonValue] = {
        "refit": len(refits),
        "norms": len(matches),
        "images": len(images),
        "left": [*left],
    }
    if refits:
        figures["error_before"] = round(sum(layer.before for layer in refits.values()) / len(refits), 6)
        figures["error_after"] = round(sum(layer.after for layer in refits.values()) / len(refits), 6)
        figures["share"] = round(sum(layer.share for layer in refits.values()) / len(refits), 6)
    return figures


def change_of(gram: Tensor, cross: Tensor, ridge: float, *, biased: bool) -> Tensor:
    """The change of a weight that best explains its residuals r by its inputs z, in fp64.

    Args:
        gram: (g, d, d), sum of z z^T. `biased`: the last input is 1 for every row, and moving its weight costs nothing.
        cross: (g, o, d), sum of r z^T.
        ridge: what moving a weight costs, relative to the mean variance of the inputs (energy where there is no bias).
        biased: whether the layer has a bias.

    Returns:
        (g, o, d): minimises sum |r - change z|^2 + cost |change|^2.
    """
    energy = gram.diagonal(dim1=1, dim2=2)
    inputs = energy[:, :-1] if biased else energy
    spread = inputs - gram[:, -1, :-1].square() / gram[:, -1, -1:] if biased else inputs
    cost = ridge * spread.mean(1, keepdim=True) + LEAST_RIDGE * inputs.mean(1, keepdim=True)
    cost = cost.clamp(min=torch.finfo(torch.float32).tiny).expand_as(inputs)  # inputs that are all zero
    if biased:
        cost = F.pad(cost, (0, 1))
    solved: Tensor = torch.linalg.solve_ex(gram + cost.diag_embed(), cross.mT)[0]
    return solved.mT


def held_share(gram: Tensor, cross: Tensor, ridge: float, *, biased: bool) -> float:
    """How far to follow a least-squares change, in [0, 1]: as far as that of each half of the images suits the other.

    gram and cross as for `change_of`, with the halves before: (2, g, d, d) and (2, g, o, d). A handful of images has
    fewer kinds of rows than a layer has inputs, and what is fitted to them may help nobody else.
    """
    gain = cost = 0.0
    for half in (0, 1):
        change = change_of(gram[half], cross[half], ridge, biased=biased)
        gain += float((change * cross[1 - half]).sum())
        cost += float((change @ gram[1 - half] * change).sum())
    return min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0


def matched(
    norm: Norm, mean: Tensor, variance: Tensor, found_mean: Tensor, found_variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values of a norm that does to inputs of the found moments what `norm` does to those of the dense ones.

    All moments (C,) fp64. First the same function is written with the dense mean and variance in the place of the
    norm's own, then these are exchanged for the found ones.

    Returns:
        Weight, bias, running mean and running variance, (C,) fp64 each.
    """
    own_mean, own_variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    slope = norm.weight.double() / (own_variance + norm.eps).sqrt()
    weight = slope * (variance + norm.eps).sqrt()
    bias = norm.bias.double() + slope * (mean - own_mean)
    return weight, bias, found_mean, found_variance.maximum(LEAST_SHARE * variance)


def images_that_fit(model: nn.Module, size: tuple[int, int, int], memory_gb: float) -> int:
    """How many images (C, H, W) one forward pass can take in `memory_gb` (1e9 bytes), at least 1.

    Four tensors as large as the largest output of a module are reckoned to live at once: a block's input, its branch,
    what is being computed, and the rows read from it.
    """
    largest = 0

    def weigh(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.nbytes)

    with ExitStack() as hooks, in_eval(model):
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(weigh))
        model(torch.zeros(1, *size, device=next(model.parameters()).device))
    return max(1, int(memory_gb * 1e9 / (4 * largest)))


class Spread:
    """Mean and variance of each channel, over as many calls as there are."""

    def __init__(self) -> None:
        self.n = 0
        self.sums = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Count x (B, C, ...) in: each image in fp32 about its own mean, which loses nothing, their sums in fp64."""
        for part in torch.split(x.reshape(*x.shape[:2], -1), 8):
            shift = part.mean(2, keepdim=True)
            part = part - shift
            off = part.mean(2).double()  # the rounding of the first mean
            mean, size = shift[:, :, 0].double() + off, part.shape[2]
            squares = torch.linalg.vector_norm(part, dim=2).double().square() + size * (mean.square() - off.square())
            self.sums = self.sums + torch.stack([size * mean.sum(0), squares.sum(0)])
            self.n += size * len(part)

    @property
    def mean(self) -> Tensor:
        """(C,) fp64."""
        return self.sums[0] / self.n

    @property
    def variance(self) -> Tensor:
        """(C,) fp64, of the rows themselves (divided by n)."""
        return (self.sums[1] / self.n - self.mean.square()).clamp(min=0)


class _Refit:
    """One layer: what it should put out, and its values once it has seen its inputs."""

    def __init__(
        self, name: str, layer: nn.Module, kept: Sequence[int] | None, spans: Sequence[range], ridge: float
    ) -> None:
        self.name, self.layer, self.kept, self.spans, self.ridge = name, cast(Layer, layer), kept, spans, ridge
        self.wanted = -(-ROWS_PER_INPUT * self.layer.weight[0].numel() // spans[-1].stop)
        self.targets: list[Tensor] = []
        self.before = self.after = 0.0
        """Relative error of the output: |error| / |target|."""
        self.share = 0.0
        """How much of the least-squares change was made."""

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what the dense layer puts out for the next span of images."""
        channels_last = output if isinstance(self.layer, nn.Linear) else output.movedim(1, -1)
        seen = thinned(channels_last, self.spans[len(self.targets)], self.wanted)
        self.targets.append(seen if self.kept is None else seen[:, self.kept])

    def correct(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Solve on the inputs for all images; set weight and bias."""
        layer, each = self.layer, len(inputs[0]) // self.spans[-1].stop
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        weight = layer.weight.double().reshape(groups, len(layer.weight) // groups, -1)
        if layer.bias is not None:
            weight = torch.cat([weight, layer.bias.double().reshape(groups, -1, 1)], 2)
        width = weight.shape[2]
        gram, cross = weight.new_zeros(2, groups, width, width), weight.new_zeros(2, *weight.shape)
        error = energy = weight.new_zeros(())
        for span, target in zip(self.spans, self.targets, strict=True):
            z = rows(layer, inputs[0][span.start * each : span.stop * each], span, self.wanted).double().movedim(1, 0)
            if layer.bias is not None:
                z = F.pad(z, (0, 1), value=1.0)
            y = target.double().reshape(len(target), groups, -1).movedim(1, 0)
            r = y - z @ weight.mT
            # Rows of one image stay together, for they are alike; the odd image goes to one half, then to the other.
            middle = z.shape[1] // len(span) * ((len(span) + span.start % 2) // 2)
            for half, part in enumerate((slice(middle), slice(middle, None))):
                gram[half] += z[:, part].mT @ z[:, part]
                cross[half] += r[:, part].mT @ z[:, part]
            error, energy = error + r.square().sum(), energy + y.square().sum()
        self.targets.clear()
        biased = layer.bias is not None
        self.share = held_share(gram, cross, self.ridge, biased=biased)
        change = self.share * change_of(gram.sum(0), cross.sum(0), self.ridge, biased=biased)
        _check(self.name, change)
        gained = 2 * (change * cross.sum(0)).sum() - (change @ gram.sum(0) * change).sum()
        energy = energy.maximum(error).clamp(min=torch.finfo(torch.float32).tiny)  # a target that is zero
        self.before = float((error / energy).sqrt())
        self.after = float(((error - gained).clamp(min=0) / energy).sqrt())
        weight = weight + change
        if layer.bias is not None:
            layer.bias.copy_(weight[:, :, -1].flatten())
            weight = weight[:, :, :-1]
        layer.weight.copy_(weight.reshape(layer.weight.shape))


class _Match:
    """One batch norm: what its inputs are in the dense network, and its values once it has seen the compressed ones."""

    def __init__(self, name: str, dense: nn.Module, kept: Sequence[int] | None) -> None:
        self.name, self.expected = name, Spread()
        self.dense = copy.deepcopy(cast(Norm, dense))
        self.kept = slice(None) if kept is None else list(kept)
        if kept is not None:
            surgery.keep(self.dense, {key: {0: kept} for key, value in dense.state_dict().items() if value.ndim})

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count in what the dense norm sees."""
        self.expected.add(inputs[0][:, self.kept])

    def correct(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Measure the inputs for all images; set every value."""
        norm, expected, found = cast(Norm, module), self.expected, Spread()
        found.add(inputs[0])
        values = matched(self.dense, expected.mean, expected.variance, found.mean, found.variance)
        _check(self.name, *values)
        places = (norm.weight, norm.bias, cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var))
        for place, value in zip(places, values, strict=True):
            place.copy_(value)


def _check(name: str, *values: Tensor) -> None:
    if not all(bool(value.isfinite().all()) for value in values):
        raise PassError(f"repair: {name!r} sees values that are not finite; check weights and images")


def _shared_norms(model: nn.Module, dense: nn.Module, kept: Mapping[str, Sequence[int]]) -> list[str]:
    """Batch norms that both networks have, with as many channels as are kept of the dense one's."""
    ours, theirs = _norms(model), _norms(dense)
    return [
        name for name, width in ours.items() if name in theirs and width == len(kept.get(name, range(theirs[name])))
    ]


def _norms(model: nn.Module) -> dict[str, int]:
    return {
        name: module.num_features
        for name, module in model.named_modules()
        if isinstance(module, Norm) and module.affine and module.running_mean is not None
    }


def _steady(model: nn.Module, names: Iterable[str], images: Tensor) -> frozenset[str]:
    """Modules called once, and whose output is that of the first image, then that of the second.

    Others put out a table of the network's own, or have the batch in another dimension: rows of two networks, seen in
    batches of unequal size, could not be laid side by side.
    """
    firsts: dict[str, list[Tensor]] = {name: [] for name in names}
    batch = images[:1]

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # Copied, as an activation may overwrite it.
        return lambda _m, _i, output: firsts[name].append(output.flatten()[: output.numel() // len(batch)].clone())

    with ExitStack() as hooks, in_eval(model):
        for name in firsts:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(look(name)))
        for batch in (images[:1], images[:2]):
            model(batch)
    return frozenset(name for name, seen in firsts.items() if len(seen) == 2 and _close(*seen))


def _close(one: Tensor, two: Tensor) -> bool:
    # Kernels differ by the size of the batch: 1e-6 of a value, for each of some hundred layers before.
    return one.shape == two.shape and bool((one - two).abs().max() <= 1e-3 * one.abs().max())
