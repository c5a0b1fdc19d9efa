"""One network of each family: factored, repaired, saved, loaded, exported, and the file computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slim import store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context
from slim.data import Data, open_data
from slim.export.onnx import export_onnx
from slim.export.parity import parity
from slim.export.target import Target
from slim.passes.low_rank import LowRank, schemes
from tests.contract.zoo import CLASSES, SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")

SWIN = Backbone(
    name="timm.models.swin_transformer:SwinTransformer",
    kwargs={"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
    num_classes=CLASSES,
    input=Preprocessing(size=SIZE, crop=1.0),
)
FAMILIES = {
    # Family -> some layers that are factored, with their schemes, and some that stay dense.
    "resnet": ({"layer3.0.conv1": {"channel"}, "layer3.0.conv2": {"channel", "spatial"}}, {"fc", "conv1"}),
    "mobilenet": ({"blocks.5.0.conv_pw": {"channel"}, "blocks.5.0.conv_pwl": {"channel"}}, {"classifier", "conv_stem"}),
    "vit": ({"blocks.0.attn.qkv": {"channel"}, "blocks.1.mlp.fc2": {"channel"}}, {"head", "patch_embed.proj"}),
    "swin": ({"layers.0.blocks.1.attn.qkv": {"channel"}, "layers.1.downsample.reduction": {"channel"}}, {"head.fc"}),
    "convnext": ({"stages.2.blocks.0.mlp.fc1": {"channel"}}, {"head.fc", "stem.0"}),
    "mixer": (
        {"blocks.0.mlp_tokens.fc1": {"channel"}, "blocks.1.mlp_channels.fc2": {"channel"}},
        {"head", "stem.proj"},
    ),
}


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(data=open_data("digits", limit_train=64, limit_val=16, calib=64))


def network(family: str) -> Artifact:
    return artifact(family) if family != "swin" else Artifact.of(SWIN.build(seed=1, trust=True), SWIN, trust=True)


def images_of(data: Data | None, given: Artifact) -> torch.Tensor:
    assert data is not None
    images, _ = next(data.eval_batches("val", given.backbone.input, batch_size=16))
    return images


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_all_the_way(family: str, context: Context, tmp_path: Path) -> None:
    given = network(family)
    # Through `Pass.__call__`, which verifies: finite outputs, replay, no hook left, no cost grown, its input unchanged.
    after = LowRank(ratio=0.5, align=2, min_width=16)(given, context)

    plan: Any = after.history[-1].plan
    factored, dense = FAMILIES[family]
    model = after.model()
    for name, expected in factored.items():
        pair = model.get_submodule(name)
        assert schemes.scheme_of(pair) == plan["layers"][name]["scheme"]
        assert plan["layers"][name]["scheme"] in expected
    assert dense <= plan["dense"].keys()
    assert all(0 <= chosen["loss"] < 1 for chosen in plan["layers"].values())
    assert after.costs["params"] < given.costs["params"]
    assert after.costs["macs"] < given.costs["macs"]
    figures: Any = after.history[-1].metrics
    assert figures["refit"] == len(plan["layers"])
    assert figures["left"] == []
    assert figures["error_after"] <= figures["error_before"]

    loaded = store.load(store.save(after, tmp_path / "saved"), trust=True)
    assert loaded.digest == after.digest
    assert all(torch.equal(value, after.state[key]) for key, value in loaded.state.items())
    images = images_of(context.data, given)
    with torch.inference_mode():
        expected = model(images)
        # Kernels may add in another order where memory lies otherwise: a bit or two of a sum.
        assert (loaded.model()(images) - expected).abs().max() <= 1e-6 * expected.abs().max()

    file = export_onnx(model, tmp_path / "network.onnx", given.backbone.input)
    found = parity(model, file.path, images, target=Target.parse("ort:cpu,threads=1"))
    assert found.n == 16
