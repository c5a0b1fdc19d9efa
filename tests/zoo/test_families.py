"""Prune on real timm families: it cuts what it should, and the result runs, is saved, loaded and exported.

Takes minutes, so `make test` leaves it out: `make test-zoo`.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from slim import costs, store, surgery
from slim.artifact import Artifact
from slim.bench.measure import TargetMeter
from slim.contract import Context
from slim.data import open_data
from slim.export.target import Target
from slim.passes.prune import Prune
from slim.passes.prune.choose import numbers
from slim.passes.prune.groups import groups_of
from tests.zoo.networks import CLASSES, Norm, built, images_of, outputs

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("one_thread")]

SMALL = {"img_size": 64}
FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    # timm's name -> arguments, pixels, and the layers that make the hidden channels of its blocks.
    "resnet18": ({}, 64, ("layer?.?.conv1",)),
    "resnet50": ({}, 64, ("layer?.?.conv[12]",)),
    "mobilenetv2_100": ({}, 64, ("blocks.[1-6].?.conv_pw",)),
    "mobilenetv3_small_100": ({}, 64, ("blocks.[1-4].?.conv_pw",)),
    "efficientnet_b0": ({}, 64, ("blocks.[1-6].?.conv_pw",)),
    "regnety_002": ({}, 64, ("s?.b*.conv[12].conv",)),
    "convnext_atto": ({}, 64, ("stages.*.mlp.fc1",)),
    "vit_tiny_patch16_224": (SMALL, 64, ("blocks.*.mlp.fc1",)),
    "deit_tiny_patch16_224": (SMALL, 64, ("blocks.*.mlp.fc1",)),
    "swin_tiny_patch4_window7_224": ({**SMALL, "window_size": 2}, 64, ("layers.*.mlp.fc1",)),
    "mixer_s16_224": (SMALL, 64, ("blocks.*.mlp_tokens.fc1", "blocks.*.mlp_channels.fc1")),
    "mobilevit_xxs": ({}, 64, ("stages.?.?.conv1_1x1.conv", "stages.*.transformer.*.mlp.fc1")),
    "fastvit_t8": ({}, 64, ("stages.*.mlp.fc1",)),
    "efficientvit_b0": ({}, 64, ("stages.*.inverted_conv.conv",)),
    "levit_128s": ({}, 224, ("stages.*.mlp.ln1.linear",)),
}
WHAT: dict[str, dict[str, Any]] = {
    "whole heads": {"scope": "internal", "heads": "whole"},
    "dims": {"scope": "internal", "heads": "dims"},
    "all": {"scope": "all", "heads": "whole"},
}
ATTENTION = {"vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilevit_xxs"}
"""Families with heads to cut; in others `heads` changes nothing."""
ROWS = [(family, what) for family in FAMILIES for what in WHAT if what != "dims" or family in ATTENTION]
NO_STREAM = {"mixer_s16_224"}
"""Families whose residual stream the dependency graph takes for another axis: it stays whole, and the plan says why."""


@lru_cache(maxsize=1)
def network(family: str) -> Artifact:
    kwargs, pixels, _ = FAMILIES[family]
    return built(family, kwargs, pixels)


def layers_of(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def macs_of(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Layer -> multiply-accumulates for one image."""
    found: dict[str, int] = {}

    def count(name: str, layer: Any, output: Tensor) -> None:
        found[name] = layer.weight.numel() * output.numel() // len(layer.weight)

    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: count(name, layer, output))
        for name, layer in layers_of(model).items()
    ]
    outputs(model, image)
    for hook in hooks:
        hook.remove()
    return found


def half_of(width: int) -> int:
    """The multiple of 8, or all, that is nearest to half of the width; of two the larger."""
    kept: int = min([*range(8, width, 8), width], key=lambda one: (abs(one - width / 2), -one))
    return kept


def halved(family: str, model: nn.Module, what: str) -> Iterator[tuple[str, int, int]]:
    """Layers whose outputs have to become fewer, by the architecture: name, outputs now, and then."""
    for name, layer in layers_of(model).items():
        width = len(layer.weight)
        if any(fnmatch(name, pattern) for pattern in FAMILIES[family][2]):
            yield name, width, half_of(width)
        elif name.endswith(".attn.qkv"):
            heads = cast(int, model.get_submodule(name.removesuffix(".qkv")).num_heads)
            each = width // 3 // heads
            yield name, width, 3 * (heads * half_of(each) if what == "dims" else math.ceil(heads / 2) * each)


def zeroed(model: nn.Module, plan: Any) -> nn.Module:
    """The network with zeros wherever the plan keeps nothing."""
    with torch.no_grad():
        for key, dims in plan["keep"].items():
            for dim, text in dims.items():
                value = dict(model.named_parameters()).get(key)
                if value is not None:  # running statistics do not matter where weight and bias are zero
                    gone = sorted({*range(value.shape[int(dim)])} - {*numbers(text)})
                    value.index_fill_(int(dim), torch.tensor(gone, dtype=torch.long), 0.0)
    return model


@pytest.mark.parametrize(("family", "what"), ROWS)
def test_a_family_is_pruned_and_goes_all_the_way(family: str, what: str, tmp_path: Path) -> None:
    given = network(family)
    dense, size = given.model(), given.backbone.input.size
    after = Prune(ratio=0.5, criterion="group-l2", repair="none", **WHAT[what])(given)
    model, plan = after.model(), cast(Any, after.history[-1].plan)

    # Widths: half of what is hidden, in whole tiles.
    now, then = layers_of(dense), layers_of(model)
    saved = {"params": 0.0, "macs": 0.0}
    macs = macs_of(dense, images_of(given, 1))
    found = [*halved(family, dense, what)]
    assert found
    assert any(name.endswith(".attn.qkv") for name, _, _ in found) == (family in ATTENTION)
    for name, width, kept in found:
        assert len(then[name].weight) == kept < width, name
        saved["params"] += (1 - kept / width) * now[name].weight.numel()
        saved["macs"] += (1 - kept / width) * macs[name]
    for name, layer in then.items():
        whole = len(layer.weight) == len(now[name].weight)
        assert whole or name.endswith(".attn.qkv") or len(layer.weight) % 8 == 0, name
    for group in plan["groups"].values():
        tile = {"channels": 8, "heads": group["unit"], "dims": 8 * group["unit"]}[group["kind"]]
        assert group["kept"] % tile == 0
        assert group["kept"] < group["width"]
    if what == "all" and family not in NO_STREAM:
        assert not all(group["internal"] for group in plan["groups"].values())

    # Costs: at least what these layers alone save, and exactly what the plan keeps.
    for cost, least in saved.items():
        assert after.costs[cost] <= given.costs[cost] - least, cost
    shapes = {key: list(value.shape) for key, value in dense.named_parameters()}
    for key in shapes.keys() & plan["keep"].keys():
        for dim, text in plan["keep"][key].items():
            shapes[key][int(dim)] = len(numbers(text))
    assert after.costs["params"] == sum(math.prod(shape) for shape in shapes.values()) == costs.count_params(model)

    # Each group is cut, or there is a reason.
    groups, refused = groups_of(dense, size, heads=WHAT[what]["heads"])
    assert {*plan["groups"], *plan["left"]} == {group.name for group in groups} | refused.keys()
    assert not plan["groups"].keys() & plan["left"].keys()
    assert all(plan["left"].values())

    # What was cut out alone, before constants are folded into biases, is as good as zero.
    images = images_of(given, 2)
    assert outputs(dense, images).diff(dim=0).abs().max() > 0.01 * outputs(dense, images).abs().max()
    if what != "all":  # across the residual stream norms take their statistics over fewer channels
        bare = Prune(ratio=0.5, **WHAT[what]).rewrite(given.model(), plan)
        assert surgery.close(outputs(bare, images), outputs(zeroed(given.model(), plan), images))
    for n in (1, 2):
        logits = outputs(model, images[:n])
        assert logits.shape == (n, CLASSES)
        assert logits.isfinite().all()

    loaded = store.load(store.save(after, tmp_path / "saved"))
    assert loaded.digest == after.digest
    again = loaded.model()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert torch.equal(outputs(again, images), outputs(model, images))

    meter = TargetMeter(Target.parse("ort:cpu,threads=1"), None, tmp_path)
    assert meter.parity(after).n == 8  # raises where the file differs
    assert meter.size(after).value < 4 * given.costs["params"]


@pytest.mark.parametrize("family", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_family_is_ranked_and_repaired_on_sixteen_images(family: str) -> None:
    given = network(family)
    context = Context(data=open_data("digits", limit_train=64, limit_val=32, calib=16))
    after = {repair: Prune(ratio=0.5, criterion="gram", repair=repair)(given, context) for repair in ("both", "none")}
    figures: Any = after["both"].history[-1].metrics
    model = after["both"].model()
    readers = {
        key.rpartition(".")[0] for key, dims in cast(Any, after["both"].history[-1].plan)["keep"].items() if "1" in dims
    }
    assert (figures["images"], figures["refit"], figures["left"]) == (16, len(readers), [])
    assert figures["norms"] == sum(isinstance(module, Norm) for module in model.modules())
    assert figures["error_after"] < figures["error_before"]
    assert after["both"].history[-1].plan == after["none"].history[-1].plan
    assert context.data is not None
    images, _ = next(context.data.eval_batches("calib", given.backbone.input, batch_size=16))
    wanted = outputs(given.model(), images)
    off = {repair: float((outputs(one.model(), images) - wanted).norm()) for repair, one in after.items()}
    assert off["both"] < off["none"]


LOADS = """
import sys
sys.modules["torch_pruning"] = None  # importing it raises ImportError
from slim import store
print(store.load(sys.argv[1]).digest)
"""


def test_a_pruned_network_is_loaded_without_torch_pruning(tmp_path: Path) -> None:
    given = network("regnety_002")  # grouped convolutions and gates: the plan has most to tell
    after = Prune(ratio=0.5, criterion="group-l2", repair="none", scope="all")(given)
    store.save(after, tmp_path / "saved")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path / "saved")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [after.digest]
