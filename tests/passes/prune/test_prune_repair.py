"""What pruning leaves is repaired: what others can stand in for is not missed, whatever form the norms are in."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from slim import surgery
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context
from slim.data import Data, open_data
from slim.passes.merge import Merge
from slim.passes.prune import Prune
from tests.contract.zoo import CLASSES, SIZE, artifact
from tests.passes.prune.toys import error, images_of, outputs

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"align": 2, "floor": 2}


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=16, calib=64)


class Redundant(nn.Module):
    """32 channels that are mixtures of 6, each normalised: any half of them says everything."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.mix, self.norm = nn.Conv2d(6, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.read, self.behind = nn.Conv2d(32, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.behind(self.read(self.norm(self.mix(self.stem(images).relu()))))
        logits: Tensor = self.head(maps.relu().mean((2, 3)))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def settled(model: nn.Module) -> nn.Module:
    """Batch norms with the statistics of noise, and with scales of their own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
        model.train()(torch.randn(32, *SIZE, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def normed(name: str) -> Artifact:
    given = artifact(name)
    return Artifact.of(settled(given.model()), given.backbone, trust=True)


@pytest.mark.parametrize("repair", ["both", "outputs"])
def test_channels_that_others_can_stand_in_for_are_not_missed(repair: Any, digits: Data) -> None:
    place = "tests.passes.prune.test_prune_repair:Redundant"
    chosen = Backbone(name=place, num_classes=CLASSES, input=Preprocessing(size=SIZE, crop=1.0))
    given = Artifact.of(settled(chosen.build(seed=1, trust=True)), chosen, trust=True)
    images = images_of(digits, given)
    expected = outputs(given, images)

    def off(how: Any) -> float:
        step = Prune(ratio=0.5, criterion="random", repair=how, skip=("stem", "read"), **SMALL)
        return error(outputs(step(given, Context(data=digits)), images), expected)

    # The ridge leaves 1e-3 of what could be had.
    assert off(repair) < 2e-3
    assert off("none") > 0.1


def test_a_repair_of_everything_is_better_than_of_half_and_that_than_none(digits: Data) -> None:
    given = normed("resnet")
    images = images_of(digits, given)
    expected = outputs(given, images)
    ways: list[Any] = ["both", "norms", "none"]
    off = [
        error(outputs(Prune(ratio=0.75, repair=way, **SMALL)(given, Context(data=digits)), images), expected)
        for way in ways
    ]
    assert off == sorted(off)


@torch.no_grad()
def folded(given: Artifact) -> Artifact:
    """Norms that say mean 0, variance 1, and layers before them that do what they did."""
    model = given.model()
    for before, behind in surgery.norms_of_layers(model, torch.randn(2, *SIZE)).items():
        layer, norm = cast(Any, model.get_submodule(before)), cast(Any, model.get_submodule(behind))
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        layer.weight.mul_(slope.view(-1, 1, 1, 1))
        norm.bias.sub_(slope * norm.running_mean)
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
        norm.weight.fill_((1 + norm.eps) ** 0.5)
    return Artifact.of(model, given.backbone, trust=True)


def test_folded_norms_are_repaired_as_norms_are(digits: Data) -> None:
    given = normed("resnet")
    images = images_of(digits, given)
    expected = outputs(given, images)
    assert error(outputs(folded(given), images), expected) < 1e-5

    def pruned(start: Artifact, how: Any) -> Tensor:
        step = Prune(ratio=0.75, criterion="random", repair=how, **SMALL)
        return outputs(step(start, Context(data=digits)), images)

    assert error(pruned(folded(given), "norms"), pruned(given, "norms")) < 1e-3
    # The least squares weigh a layer's outputs by their size, which folding changes.
    assert error(pruned(folded(given), "both"), expected) < 1.05 * error(pruned(given, "both"), expected)


def test_norms_that_are_merged_away_leave_outputs_to_repair(digits: Data) -> None:
    given = normed("resnet")
    images = images_of(digits, given)
    expected = outputs(given, images)
    merged = Merge()(given)
    step = Prune(ratio=0.75, criterion="random", repair="outputs", **SMALL)
    whole, without = (outputs(step(one, Context(data=digits)), images) for one in (given, merged))
    assert error(without, expected) < 1.05 * error(whole, expected)
