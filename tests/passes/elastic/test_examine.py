"""What a subnet is worth: it is repaired as it will ship, and asked about images that were held out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim.artifact import Artifact, state_digest
from slim.contract import Context, Loading
from slim.data import Data, open_data
from slim.passes.elastic import BestSubnet, Elastic
from slim.passes.elastic.examine import Examiner, Images, Repair, images_for_statistics, statistics_count, top1
from slim.passes.elastic.extract import extract
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.subnets import from_json
from tests.contract.zoo import artifact
from tests.passes.elastic.families import family

pytestmark = pytest.mark.usefixtures("one_thread")

HELD = 48
UNTRAINED = Elastic(epochs=0, widths=(0.5,), align=2, floor=2, held_out=HELD)


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=112, limit_val=16, calib=32)


def held_apart(made: Artifact, data: Data, held: int = HELD) -> Context:
    """As `fit` knows it, with a seed that is not the usual one."""
    return Context(data=data.apart(held, 5), backbone=made.backbone, history=made.history)


def family_of(given: Artifact, data: Data, step: Elastic = UNTRAINED) -> tuple[Artifact, Space]:
    after = step(given, Context(data=data, seed=5))
    return after, step.space_of(after.model(), after.backbone.input.size, after.history[-1].plan)


def values(model: nn.Module) -> str:
    return state_digest(model.state_dict())


def test_new_statistics_are_worth_ten_points_to_a_subnet_that_was_not_trained(
    taught: Artifact, six_hundred: Data
) -> None:
    step = UNTRAINED.model_copy(update={"held_out": 200, "depth": 1.0})
    after, space = family_of(taught, six_hundred, step)
    found = {
        how: Examiner.of(after.model(), space, held_apart(after, six_hundred, 200), how).accuracy(space.smallest)
        for how in ("none", "norms", "both")
    }
    assert found["norms"] >= found["none"] + 10
    assert found["both"] >= found["none"] + 10


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("how", ["none", "norms", "outputs", "both"])
def test_what_is_examined_is_what_ships_value_for_value(name: str, how: Repair, digits: Data) -> None:
    made, space = family_of(artifact(name), digits)
    # Held out is what the elastic step held out, with its seed and not with that of this run.
    shipped = BestSubnet(to="0.9x-params", evaluations=2, proposals=20, repair=how)(made, Context(data=digits, seed=8))
    plan: Any = shipped.history[-1].plan
    chosen = from_json(plan["subnet"])
    examiner = Examiner.of(made.model(), space, held_apart(made, digits), how)
    assert values(examiner.finished(chosen)) == shipped.weights == values(examiner.finished(chosen))
    best = max(point["top1"] for point in plan["search"]["front"])
    assert examiner.accuracy(chosen) == pytest.approx(best, abs=1e-4)  # written down with four digits
    if (how, name) != ("norms", "vit") and how != "none":
        assert shipped.weights != values(extract(made.model(), space, chosen))
        assert shipped.history[-1].metrics["images"] == 112 - HELD


def test_statistics_alone_leave_a_network_without_batch_norms_as_it_was_cut(digits: Data) -> None:
    made, space = family_of(artifact("convnext"), digits)
    examiner = Examiner.of(made.model(), space, held_apart(made, digits), "norms")
    assert values(examiner.finished(space.smallest)) == values(extract(made.model(), space, space.smallest))


@pytest.mark.parametrize("how", ["norms", "both"])
def test_the_largest_is_left_as_it_is(how: Repair, digits: Data) -> None:
    made, space = family_of(artifact("resnet"), digits)
    examiner = Examiner.of(made.model(), space, held_apart(made, digits), how)
    assert values(examiner.finished(space.largest)) == made.weights
    examiner.finished(space.smallest)
    assert values(examiner.model) == made.weights


def test_a_subnet_that_lacks_blocks_alone_has_its_norms_mended_too(digits: Data) -> None:
    model, space = family("resnet")
    without = Subnet(space.largest.units, space.smallest.on)
    assert space.skipped(without) == ["layer1.1", "layer2.1", "layer3.1"]
    made = artifact("resnet")
    images = images_for_statistics(held_apart(made, digits), made.backbone.input, 64)
    looks = Images(lambda side: [], lambda side: images)
    finished = Examiner(model, space, looks, "norms", torch.device("cpu")).finished(without)
    # The norm behind the first block that is missing sees other images now, and has their statistics.
    norm, seen = finished.get_submodule("layer2.0.bn1"), list[Tensor]()
    with norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        finished(images)
    was = model.get_buffer("layer2.0.bn1.running_mean")
    # fp32 sums over 64 images of 4 x 4 positions.
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (seen[0].mean((0, 2, 3)) - was).abs().max() > 0.1


def test_images_for_statistics_are_of_those_trained_on_and_no_more_than_fit(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact("resnet")
    context = held_apart(made, digits)
    assert context.data is not None
    images = images_for_statistics(context, made.backbone.input, statistics_count(made.model(), made.backbone.input))
    expected = [one for one, _ in context.data.eval_batches("train", made.backbone.input, batch_size=64)]
    assert torch.equal(images, expected[0])
    assert len(images) == 112 - HELD
    largest = 64 * 16 * 16 * 4  # bytes that the widest layer, the stem, puts out for one image
    monkeypatch.setattr("slim.passes.elastic.examine.MEMORY_GB", 7.5 * 4 * largest / 1e9)
    assert statistics_count(made.model(), made.backbone.input) == 7


class Fixed(nn.Module):
    """Says what it was told, image after image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.at = logits, 0

    def forward(self, images: Tensor) -> Tensor:
        said = self.logits[self.at : self.at + len(images)]
        self.at += len(images)
        return said


def test_top1_is_the_share_of_images_over_batches_of_any_size() -> None:
    labels = torch.tensor([0, 1, 2, 2, 1])
    logits = torch.eye(3)[torch.tensor([0, 1, 0, 2, 0])]
    images = torch.zeros(5, 1)
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    model = Fixed(logits).train()
    assert top1(model, batches, torch.device("cpu")) == pytest.approx(60)
    assert model.training


def test_all_images_held_out_are_asked_about(digits: Data) -> None:
    made, space = family_of(artifact("vit"), digits)
    context = held_apart(made, digits)
    examiner = Examiner.of(made.model(), space, replace(context, loading=Loading(batch_size=7)), "none")
    labels = torch.cat([labels for _, labels in examiner.images.held(0)]).tolist()
    assert context.data is not None
    assert labels == [*context.data.split("held").labels]
    assert len(labels) == HELD
    everything = torch.cat([images for images, _ in examiner.images.held(0)])
    with torch.no_grad():
        right = (made.model()(everything).argmax(1) == torch.tensor(labels)).sum()
    assert examiner.accuracy(space.largest) == pytest.approx(100 * int(right) / HELD)
