"""The only file that edits modules, and the one that holds them still for a look."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and without gradients; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def on_device(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """The networks on `device`, and on the CPU again afterwards."""
    for model in models:
        model.to(device)
    try:
        yield
    finally:
        for model in models:
            model.to("cpu")


Positions = dict[str, dict[int, list[int]]]
"""State-dict key -> dimension -> what stays of it, ascending."""


def keep(model: nn.Module, positions: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
    """Cut everything but `positions` out of the tensors named; their modules' sizes follow."""
    touched: dict[int, nn.Module] = {}
    for key, dims in positions.items():
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        value = cast(Tensor, getattr(module, name))
        kept = value.detach()
        for dim, places in dims.items():
            kept = kept.index_select(dim, torch.tensor(places, dtype=torch.long, device=kept.device))
        if isinstance(value, nn.Parameter):
            kept = nn.Parameter(kept, requires_grad=value.requires_grad)
        setattr(module, name, kept)
        touched[id(module)] = module
    for module in touched.values():
        resize(module)


def resize(module: nn.Module) -> None:
    """Make a module say the sizes that its tensors have; a convolution's groups must be right before."""
    one = cast(Any, module)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        one.num_features = len(module.running_mean if module.running_mean is not None else module.weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule `name` (dotted path) was, in the same training mode."""
    old = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    module.train(old.training)
    # nn.Sequential and nn.ModuleList index children by string, which setattr serves as well.
    setattr(model.get_submodule(parent), child, module)


def classifiers(model: nn.Module) -> frozenset[str]:
    """Dotted names of the classifier modules (timm's `get_classifier`); empty where the network has none to tell."""
    if not hasattr(model, "get_classifier"):
        return frozenset()
    found = cast(Any, model).get_classifier()
    heads = {id(head) for head in (found if isinstance(found, tuple | list) else (found,))}
    return frozenset(name for name, module in model.named_modules() if id(module) in heads)


def fold_batch_norms(model: nn.Module, images: Tensor) -> int:
    """Merge every batch norm that only scales and shifts what a layer puts out into that layer.

    In eval mode, for good: the network can no longer be trained as it was. Which pairs there are is seen in one forward
    pass of `images` (B, C, H, W), and kept only if the outputs for them are the same afterwards.

    Returns:
        How many were merged; 0 where merging would change what the network computes.
    """
    pairs = norms_of_layers(model, images)
    folded = copy.deepcopy(model)
    for network in (folded, model):
        for layer, norm in pairs.items():
            fold_norm(network, layer, norm)
        if network is folded:
            with torch.no_grad():
                if not close(folded(images), model(images)):
                    return 0
    return len(pairs)


def norms_of_layers(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Linear layer or convolution -> the batch norm that reads what it puts out; see `followers`."""
    pairs = followers(model, images, (nn.Conv2d, nn.Linear), (nn.BatchNorm1d, nn.BatchNorm2d))

    def fits(layer: Any, norm: Any) -> bool:
        # Without running statistics it normalises by the batch in eval mode too.
        return norm.running_mean is not None and norm.num_features == len(layer.weight)

    return {layer: norm for layer, norm in pairs.items() if fits(model.get_submodule(layer), model.get_submodule(norm))}


def fold_norm(model: nn.Module, layer: str, norm: str) -> None:
    """Scale and shift what `layer` puts out as `norm` does in eval mode, and take the norm away."""
    first, second = cast(Any, model.get_submodule(layer)), cast(Any, model.get_submodule(norm))
    first.weight, first.bias = fuse_conv_bn_weights(
        first.weight, first.bias, second.running_mean, second.running_var, second.eps, second.weight, second.bias
    )
    # timm's norms may end in an activation.
    rest = [part for part in (getattr(second, "drop", None), getattr(second, "act", None)) if part is not None]
    swap(model, norm, nn.Sequential(*rest) if rest else nn.Identity())


def fold_scale(model: nn.Module, layer: str, scale: str) -> None:
    """Multiply what `layer` puts out by the `gamma` of the module `scale`, which then is without it."""
    first, second = cast(Any, model.get_submodule(layer)), cast(Any, model.get_submodule(scale))
    gamma = second.gamma.detach().flatten()
    first.weight = nn.Parameter(first.weight.detach() * gamma.view(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias = nn.Parameter(first.bias.detach() * gamma)
    if is_scale(second):
        swap(model, scale, nn.Identity())
    else:
        second.gamma = None  # ConvNeXt's block leaves it out then


def is_scale(module: nn.Module) -> bool:
    """Whether the module is a layer scale and nothing else; timm has several classes of these names."""
    return type(module).__name__ in ("LayerScale", "LayerScale2d")


def followers(
    model: nn.Module, images: Tensor, first: tuple[type[nn.Module], ...], second: tuple[type[nn.Module], ...]
) -> dict[str, str]:
    """Module of a type in `first` -> the one of a type in `second` that is called with what the former returned.

    Seen in one forward pass of `images` (B, C, H, W) in eval mode. Both are called once, and nothing stands between but
    what hands on the very tensor, as dropout does. Others may read that tensor too, which is not seen.
    """
    made: dict[int, tuple[str, int]] = {}
    pairs: dict[str, str] = {}
    calls: Counter[str] = Counter()
    kept: list[Tensor] = []  # so that no two outputs share an id

    def before(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[name] += 1
        # An activation in place hands on the very tensor as well, but changed.
        if inputs and isinstance(module, second) and id(inputs[0]) in made:
            maker, version = made[id(inputs[0])]
            if inputs[0]._version == version:
                pairs[maker] = name

    def after(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(module, first):
            kept.append(output)
            made[id(output)] = name, output._version

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, first + second):
            hooks.append(module.register_forward_pre_hook(lambda m, i, name=name: before(name, m, i)))
            hooks.append(module.register_forward_hook(lambda m, _, o, name=name: after(name, m, o)))
    try:
        with in_eval(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {maker: name for maker, name in pairs.items() if calls[maker] == calls[name] == 1}


def audible(model: nn.Module) -> nn.Module:
    """A copy with noise on values near zero: behind a fresh classifier or layer scale every change would look exact."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in copied.parameters():
            usual = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            if value.square().mean().sqrt() < usual / 10:
                value.add_(torch.randn(value.shape, generator=generator), alpha=usual)
    return copied


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by the order of additions at most: 1e-4 of the largest value."""
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())
