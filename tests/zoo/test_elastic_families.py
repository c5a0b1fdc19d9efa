"""Elastic on real timm families: what can be is, a subnet of it goes all the way, and gated is cut out.

Takes minutes, so `make test` leaves it out: `make test-zoo`.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from slim import store
from slim.bench.measure import TargetMeter
from slim.contract import Context
from slim.data import open_data
from slim.export.target import Target
from slim.passes.elastic import BestSubnet, Elastic
from slim.passes.elastic.extract import extract
from slim.passes.elastic.gates import gated, resized
from slim.passes.elastic.subnets import from_json
from tests.zoo.networks import CLASSES, built, images_of, outputs

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("one_thread")]

SAME = 1e-5
"""Of the largest output: layers add up in another order once channels are gone, or they are two."""
SMALL = {"img_size": 64}
FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[str, ...], tuple[int, int]]] = {
    # timm's name -> arguments, pixels, patterns of layers whose outputs are elastic, and how many of these and of
    # blocks that may be left out there are, counted in the architecture.
    "resnet18": ({}, 64, ("layer?.?.conv1",), (8, 5)),
    "resnet50": ({}, 64, ("layer?.?.conv[12]",), (32, 12)),
    "resnet26d": ({}, 64, ("layer?.?.conv[12]",), (16, 4)),
    "seresnet50": ({}, 64, ("layer?.?.conv[12]",), (32, 12)),
    "mobilenetv2_100": ({}, 64, ("blocks.[1-6].?.conv_pw",), (16, 10)),
    "mobilenetv3_large_100": ({}, 64, ("blocks.[1-5].?.conv_pw",), (14, 9)),
    "mobilenetv4_conv_small": ({}, 64, ("blocks.[23].?.pw_exp.conv",), (12, 10)),
    "efficientnet_b0": ({}, 64, ("blocks.[1-6].?.conv_pw",), (15, 9)),
    "convnext_atto": ({}, 64, ("stages.*.mlp.fc1",), (12, 12)),
    "vit_tiny_patch16_224": (
        {**SMALL, "dynamic_img_size": True},
        64,
        ("blocks.*.mlp.fc1", "blocks.*.attn.qkv:heads"),
        (24, 12),
    ),
    "deit3_small_patch16_224": (SMALL, 64, ("blocks.*.mlp.fc1", "blocks.*.attn.qkv:heads"), (24, 12)),
    "swin_tiny_patch4_window7_224": (
        {**SMALL, "window_size": 2},
        64,
        ("layers.*.mlp.fc1", "layers.*.attn.qkv:heads"),
        (24, 12),
    ),
    "regnety_002": ({}, 64, ("s?.b*.conv1.conv",), (13, 9)),
}
OF_ONE_SIZE = ("deit3_small_patch16_224", "swin_tiny_patch4_window7_224")
"""Families that take images of the size they were built for alone."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_elastic_and_its_subnet_goes_all_the_way(family: str, tmp_path: Path) -> None:
    kwargs, pixels, patterns, (widths, blocks) = FAMILIES[family]
    given = built(family, kwargs, pixels)
    data = open_data("digits", limit_train=64, limit_val=16, calib=16)
    made = Elastic(epochs=0, held_out=32)(given, Context(data=data))
    plan = cast(Any, made.history[-1].plan)
    assert made.weights == given.weights
    assert sum(any(fnmatch(name, one) for one in patterns) for name in plan["dims"]) == widths
    assert len(plan["blocks"]) == blocks
    assert not plan["dims"].keys() & plan["left"].keys()
    assert all(plan["left"].values())

    # Without repair a subnet is nothing but the network with closed gates.
    after = BestSubnet(to="0.6x-macs", evaluations=4, proposals=20, repair="none")(made, Context(data=data))
    assert after.costs["macs"] <= 0.6 * given.costs["macs"]
    assert after.costs["params"] < given.costs["params"]
    model, images = after.model(), images_of(given, 2)
    for n in (1, 2):
        logits = outputs(model, images[:n])
        assert logits.shape == (n, CLASSES)
        assert logits.isfinite().all()
    closed, everything = (
        made.model(),
        Elastic(epochs=0, held_out=32, ranks=(1.0, 0.5), pixels=(48,), criterion="random"),
    )
    space = Elastic(epochs=0, held_out=32).space_of(closed, given.backbone.input.size, plan)
    with gated(closed, space) as choose:
        choose(from_json(cast(Any, after.history[-1].plan["subnet"])))
        expected = outputs(closed, images)
    assert (outputs(model, images) - expected).abs().max() <= SAME * expected.abs().max()
    assert (expected - outputs(given.model(), images)).abs().max() > 0.01 * expected.abs().max()

    # Ranks and smaller images besides.
    everything = Elastic(epochs=0, held_out=32, ranks=(1.0, 0.5), pixels=(48,), criterion="random")
    more = everything(given, Context(data=data))
    space = everything.space_of(closed, given.backbone.input.size, more.history[-1].plan)
    assert len(space.ranks) >= 5
    assert space.pixels == ((0,) if family in OF_ONE_SIZE else (0, 48))
    thin = replace(space.largest, ranks=space.smallest.ranks, pixels=space.pixels[-1])
    assert space.factored(thin).keys() == {rank.layer for rank in space.ranks}
    seen = images if family in OF_ONE_SIZE else resized(images, 48)
    for subnet in (thin, space.smallest):
        smaller = extract(closed, space, subnet)
        with gated(closed, space) as choose:
            choose(subnet)
            expected = outputs(closed, images)
        assert (outputs(smaller, seen) - expected).abs().max() <= SAME * expected.abs().max()

    loaded = store.load(store.save(after, tmp_path / "saved"))
    assert loaded.digest == after.digest
    assert store.traits(loaded) == {"dense", "float"}
    assert torch.equal(outputs(loaded.model(), images), outputs(model, images))
    meter = TargetMeter(Target.parse("ort:cpu,threads=1"), None, tmp_path)
    assert meter.parity(after).n == 8  # raises where the file differs
