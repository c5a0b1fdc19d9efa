"""Ways to a graph besides torch.export alone: merged before tracing, attention in plain steps, TorchScript.

All work on copies: a network that was traced keeps what it cached meanwhile, some of it without values.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slim.errors import SlimError
from slim.surgery import close, in_eval, swap

SCRIPT_OPSET = 20
"""Newest that the TorchScript exporter writes."""

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Note on a node: the torch modules it came from, outermost first, and the operation."""

MERGING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that timm's reparameterize_model calls."""


class _Cutting(TorchFunctionMode):
    """deepcopy refuses tensors that autograd made, such as the biases LeViT caches while it runs: their values do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; what autograd made is copied by its values."""
    with _Cutting():
        return copy.deepcopy(model)


def merged(model: nn.Module, size: tuple[int, ...]) -> tuple[nn.Module, str]:
    """The network with its branches and norms merged by timm, and what became of them; never changed in place.

    `merged`; `merged, but for` blocks where timm cannot, as around a layer that was factored; nothing where there are
    none; or why all are left: two images (*size) would get other logits. Without any the network is the one given.
    """
    if not any(name and _mergeable(module) for name, module in model.named_modules()):
        return model, ""
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(device)
    other = copied(model).eval()
    # New layers draw values before they get theirs.
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        left = _merge(other)
        if other.to(device).eval().state_dict().keys() == model.state_dict().keys():
            return model, f"timm merges none: {left[0]}" if left else ""
        try:
            found, expected = (copied(network).eval()(images) for network in (other, model))
        except Exception as error:  # whatever a network raises that reads what is gone
            return model, f"merged by timm the network fails: {_line(error)}"
    if not close(found, expected):
        return model, "merged by timm the network computes something else"
    return other, f"merged, but for {len(left)}: {left[0]}" if left else "merged"


def _merge(model: nn.Module) -> list[str]:
    """Merge each outermost block that timm can; the others, with what they raise."""
    from timm.utils.model import reparameterize_model

    done: list[str] = []
    left = []
    for name, module in [*model.named_modules()]:
        if not name or not _mergeable(module) or any(name.startswith(f"{outer}.") for outer in done):
            continue
        try:
            (block,) = reparameterize_model(nn.Sequential(copied(module)), inplace=True)
        except Exception as error:  # whatever timm's blocks raise where a layer is not what they made
            left.append(f"{name}: {_line(error)}")
        else:
            swap(model, name, block)
            done.append(name)
    return left


def _mergeable(module: nn.Module) -> bool:
    return any(hasattr(module, method) for method in MERGING)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def unfused(model: nn.Module) -> nn.Module | None:
    """A copy whose attention is written out in steps; None where none of its modules fuses it."""
    other, found = copied(model), False
    for module in other.modules():
        if getattr(module, "fused_attn", False):
            cast(Any, module).fused_attn, found = False, True
    return other if found else None


def script(model: nn.Module, size: tuple[int, ...]) -> onnx.ModelProto:
    """The graph of `model` by TorchScript, optimised; what each node came from is noted as torch.export notes it.

    A TorchScript trace is what happened for one input: a branch not taken is missing, a number read from the input is a
    constant. So it counts only if another batch of other values leaves the same trace.
    """
    from onnxscript import optimizer

    data = _traced(model, torch.zeros(2, *size))
    if data != _traced(model, torch.ones(3, *size)):
        raise SlimError("another batch of other images leaves another trace")
    proto = onnx.load_model_from_string(data)
    names = {name for name, _ in model.named_modules()}
    for node in proto.graph.node:
        node.metadata_props.add(key=SCOPES_KEY, value=repr([_module(node.name, names), node.op_type]))
    return cast(onnx.ModelProto, optimizer.optimize(proto))


def _traced(model: nn.Module, images: Tensor) -> bytes:
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    written, fresh = io.BytesIO(), copied(model)
    with in_eval(fresh):
        torch.onnx.export(
            fresh,
            (images.to(device),),
            cast(Any, written),  # a path by its type, a path or a stream by its text
            dynamo=False,
            opset_version=SCRIPT_OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    return written.getvalue()


def _module(node: str, names: set[str]) -> str:
    """`layer1.0.conv1` of `/layer1/layer1.0/conv1_1/Conv`: a part is a name in one of the modules before it.

    Behind it stands how often the module was called before, where it was.
    """
    found = ""
    for part in node.split("/")[1:-1]:
        outer = found.split(".") if found else []
        spelled = (part, re.sub(r"_\d+$", "", part))
        within = (".".join([*outer[:depth], name]) for name in spelled for depth in range(len(outer), -1, -1))
        found = next((name for name in within if name in names), found)
    return found
