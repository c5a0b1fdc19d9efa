"""Backbones, artifacts and their digests."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from slim import costs, surgery
from slim.artifact import Artifact, Backbone, Preprocessing, Step, state_digest
from slim.errors import BackboneError
from slim.passes.low_rank import LowRank
from tests.contract.zoo import BLIND, CLASSES, SIZE, WIDE, artifact, backbone


@pytest.fixture(scope="module")
def made() -> Artifact:
    return LowRank(ratio=0.5, align=2, min_width=WIDE, **BLIND)(artifact("vit"))


def test_the_same_seed_builds_the_same_network_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (state_digest(backbone("vit").build(seed=seed).state_dict()) for seed in (0, 0, 1))
    assert one == two != other
    assert torch.equal(torch.rand(3), expected)


def test_a_pretrained_tag_keeps_its_own_settings() -> None:
    model: Any = Backbone(name="resnet18.tv_in1k", num_classes=2).build()
    assert model.pretrained_cfg["tag"] == "tv_in1k"
    assert not model.training


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("resnet81", {}, "model 'resnet81' is not a timm model; did you mean 'resnet"),
        ("resnet18.nonsense", {}, "model 'resnet18.nonsense' cannot be built with {}: Invalid pretrained tag"),
        (
            "resnet18",
            {"colour": 1},
            "'resnet18' cannot be built with {'colour': 1}: .*unexpected keyword argument 'colour'",
        ),
        ("resnet18", {"num_classes": 3}, "'resnet18' cannot be built with .*multiple values"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "cannot be built with {'num_heads': 5}: "),
        ("resnet18", {"checkpoint_path": "x"}, "'resnet18': argument 'checkpoint_path' is no part of a network"),
        ("tests.contract.zoo:tied", {"depth": 1}, "'tests.contract.zoo:tied' does not take {'depth': 1}: "),
        ("tests.contract.zoo:backbone", {"name": "vit"}, "'tests.contract.zoo:backbone' does not take"),
        ("tests.contract.zoo:WIDE", {}, "'tests.contract.zoo:WIDE' does not take {}: 'int' object is not callable"),
        ("tests.nowhere:net", {}, "'tests.nowhere:net' cannot be imported: No module named"),
        (":net", {}, "':net' cannot be imported: Empty module name"),
    ],
)
def test_a_backbone_that_cannot_be_built(name: str, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(BackboneError, match=match) as caught:
        Backbone(name=name, kwargs=kwargs, num_classes=2).build(trust=True)
    assert "\n" not in str(caught.value)


def test_a_factory_must_return_a_module() -> None:
    with pytest.raises(BackboneError, match="'builtins:dict' returned dict, not a torch module"):
        Backbone(name="builtins:dict", num_classes=2).build(trust=True)


@pytest.mark.parametrize("crop", [0.0, 1.01])
def test_a_crop_is_a_share(crop: float) -> None:
    with pytest.raises(ValidationError):
        Preprocessing(crop=crop)


def test_a_network_of_ones_own_is_yours_to_change(made: Artifact) -> None:
    model = made.model()
    before = made.weights
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    made.state_dict()["head.bias"].fill_(9)
    assert state_digest(made.state) == before
    assert not model.training
    assert all(value.any() for key, value in made.model().named_parameters() if key == "head.weight")


def test_an_artifact_does_not_share_values_with_the_network_it_was_made_of() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    made = Artifact.of(model, backbone("vit"))
    before = made.weights
    model.train()(torch.ones(2, 3, 4, 4))
    with torch.no_grad():
        model.get_parameter("0.bias").add_(1)
    assert state_digest(made.state) == before


def test_nothing_of_an_artifact_can_be_assigned(made: Artifact) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.labels = ()  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        made.backbone.num_classes = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        made.history[0].seed = 3  # type: ignore[misc]


def test_state_digest_sees_keys_types_shapes_and_every_bit() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    digest = state_digest(state)
    assert state_digest({"b": torch.ones(2), "a": torch.zeros(2, 3)}) == digest
    assert state_digest({"a": torch.zeros(3, 2).t(), "b": torch.ones(2)}) == digest
    changed = {
        "key": {"A": state["a"], "b": state["b"]},
        "shape": {"a": torch.zeros(3, 2), "b": state["b"]},
        "type": {"a": torch.zeros(2, 3, dtype=torch.int32), "b": state["b"]},
        "sign of zero": {"a": -torch.zeros(2, 3), "b": state["b"]},
        "last bit": {"a": state["a"], "b": torch.nextafter(state["b"], torch.tensor(2.0))},
        "one more": {**state, "c": torch.zeros(0)},
    }
    digests = {name: state_digest(value) for name, value in changed.items()}
    assert len({digest, *digests.values()}) == len(changed) + 1


def test_digest_covers_the_structure_and_not_what_was_noted(made: Artifact) -> None:
    def with_step(**update: Any) -> str:
        return dataclasses.replace(made, history=(made.history[0].model_copy(update=update),)).digest

    assert with_step(seed=9, metrics={"loss": 1.0}, digests={}, environment={}) == made.digest
    assert with_step(plan={**made.history[0].plan, "more": 1}) != made.digest
    assert with_step(version=3) != made.digest
    smaller = made.backbone.model_copy(update={"input": Preprocessing(size=(3, 64, 64))})
    assert dataclasses.replace(made, backbone=smaller).digest != made.digest


def test_a_step_comes_back_from_json(made: Artifact) -> None:
    assert Step.model_validate_json(made.history[0].model_dump_json()) == made.history[0]


def test_costs_by_hand() -> None:
    """ViT, 17 tokens of 48: patches 16 x 192 x 48, twice (qkv + two products of attention + proj + MLP), head."""
    block = 17 * 48 * 144 + 2 * 17 * 17 * 48 + 17 * 48 * 48 + 2 * 17 * 48 * 192
    model = artifact("vit").model()
    model.train()
    assert costs.count_macs(model, SIZE) == 16 * 192 * 48 + 2 * block + 48 * 10
    assert model.training
    # Embeddings: patches and their bias, class token, 17 positions. Block: two norms and four layers with bias.
    embeddings = 192 * 48 + 48 + 48 + 17 * 48
    layers = 2 * 2 * 48 + (48 * 144 + 144) + (48 * 48 + 48) + (48 * 192 + 192) + (192 * 48 + 48)
    assert costs.count_params(model) == embeddings + 2 * layers + 2 * 48 + 48 * 10 + 10


def test_costs_of_shared_values_count_once() -> None:
    tied = Backbone(name="tests.contract.zoo:tied", kwargs={"width": 16}, num_classes=CLASSES).build(trust=True)
    assert costs.count_params(tied) == (3 * 16 * 16 + 16) + (16 * 16 + 2 * 16) + (16 * 10 + 10)
    # 8 x 8 places of a 4 x 4 convolution; the shared matrix works twice.
    assert costs.count_macs(tied, SIZE) == 64 * 48 * 16 + 2 * 16 * 16 + 16 * 10


def test_grouped_and_strided_convolutions_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1, stride=2))
    assert costs.count_macs(model, (8, 10, 10)) == 100 * 9 * 8 + 25 * 8 * 16


def test_swap_keeps_the_mode_and_reaches_into_lists() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.ReLU()).eval()
    new = nn.Linear(2, 3)
    surgery.swap(model, "0.1", new)
    assert model.get_submodule("0.1") is new
    assert not new.training
    surgery.swap(model.train(), "1", nn.GELU())
    assert model[1].training
    assert isinstance(model[1], nn.GELU)


@pytest.mark.parametrize(("name", "head"), [("vit", "head"), ("convnext", "head.fc"), ("mobilenet", "classifier")])
def test_classifiers_are_found_by_name(name: str, head: str) -> None:
    assert surgery.classifiers(artifact(name).model()) == {head}


def test_two_classifiers_and_none() -> None:
    deit = Backbone(
        name="deit_tiny_distilled_patch16_224", kwargs={"img_size": 32, "depth": 1, "embed_dim": 48}, num_classes=2
    )
    assert surgery.classifiers(deit.build()) == {"head", "head_dist"}
    assert surgery.classifiers(nn.Sequential(nn.Linear(2, 2))) == frozenset()
