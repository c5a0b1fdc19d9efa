"""Export of real timm families: which way each is traced, and that the file computes what the network computes.

Pruned networks and subnets of them are exported by the tests of those passes. Takes minutes, so `make test` leaves it
out: `make test-zoo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from slim.artifact import Artifact
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.parity import parity
from slim.export.target import Target
from slim.passes.low_rank import LowRank
from slim.passes.prune import Prune
from tests.zoo.networks import built, images_of
from tests.zoo.test_families import FAMILIES

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("one_thread")]

TARGET = Target.parse("ort:cpu,threads=1")
UNFUSED = "dynamo, attention not fused"
BEYOND: dict[str, tuple[dict[str, Any], int]] = {
    # Families that pruning does not handle: timm's name -> arguments, pixels.
    "hiera_tiny_224": ({"img_size": 64}, 64),
    "nest_tiny": ({"img_size": 64}, 64),
    "maxvit_nano_rw_256": ({"img_size": 64}, 64),
    "repvit_m0_9": ({}, 64),
    "repvgg_a0": ({}, 64),
}
NETWORKS = {**{family: (kwargs, pixels) for family, (kwargs, pixels, _) in FAMILIES.items()}, **BEYOND}
ROUTES = dict.fromkeys(("hiera_tiny_224", "nest_tiny"), UNFUSED)
"""Families that are not traced as they are."""
MERGED = {"fastvit_t8", "levit_128s", "repvit_m0_9", "repvgg_a0"}
"""Families with branches or norms that timm merges."""

FACTORED = LowRank(ratio=0.5, align=2, min_width=16, objective="plain", repair="none")
PRUNED = Prune(ratio=0.5, criterion="group-l2", repair="none")


def exported(given: Artifact, folder: Path) -> OnnxFile:
    model, images = given.model(), images_of(given, 5)
    file = export_onnx(model, folder / "model.onnx", given.backbone.input, images=images)
    assert file.parity is not None
    for n in (1, 3):
        assert parity(model, file.path, images[:n], target=TARGET).n == n
    print(
        given.backbone.name, file.route, file.branches, f"{file.nodes} nodes", f"{file.parity.details['relative']:.1g}"
    )
    return file


def norms_of(file: OnnxFile) -> int:
    return sum(node.op_type == "BatchNormalization" for node in onnx.load(file.path).graph.node)


@pytest.mark.parametrize("family", NETWORKS)
def test_a_family_is_exported(family: str, tmp_path: Path) -> None:
    file = exported(built(family, *NETWORKS[family]), tmp_path)
    assert file.route == ROUTES.get(family, "dynamo")
    assert file.branches == ("merged" if family in MERGED else "")
    if family in MERGED:
        assert norms_of(file) == 0
    # Some steps belong to the network itself; a layer never does.
    layers = {node.name for node in onnx.load(file.path).graph.node if node.op_type in ("Conv", "Gemm")}
    assert all(file.scopes[name] for name in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported_in_low_rank(family: str, tmp_path: Path) -> None:
    given = built(family, *NETWORKS[family])
    file = exported(FACTORED(given), tmp_path)
    assert file.route == "dynamo"
    assert file.branches.startswith("merged, but for ") == (family in MERGED)


@pytest.mark.parametrize("family", sorted(MERGED & {*FAMILIES}))
def test_branches_of_a_pruned_family_are_merged(family: str, tmp_path: Path) -> None:
    file = exported(PRUNED(built(family, *NETWORKS[family])), tmp_path)
    assert (file.route, file.branches, norms_of(file)) == ("dynamo", "merged", 0)
