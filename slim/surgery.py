"""The only file that edits modules."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


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
