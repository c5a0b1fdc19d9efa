"""Fine-tuning on real handwritten digits: it learns, repairs, takes soft targets, and repeats to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context, Loading
from slim.data import Batch, Data, open_data
from slim.errors import DataError
from slim.passes.finetune import Finetune, label_loss
from slim.pipeline import Pipeline

IMAGES = Preprocessing(size=(3, 32, 32), crop=1.0)
PLAIN: dict[str, Any] = {"flip": 0.0, "scale_low": 0.8, "precision": "fp32"}
"""Digits have a left and a right; fp32 because which machines have bf16 differs."""


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", limit_train=600, limit_val=200)


@pytest.fixture(scope="module")
def few() -> Data:
    return open_data("digits", limit_train=64, limit_val=8)


@pytest.fixture(scope="module")
def fresh() -> Artifact:
    chosen = Backbone(
        name="convnext_atto",
        kwargs={"depths": [1, 1, 2, 1], "dims": [16, 32, 48, 64], "patch_size": 2, "ls_init_value": None},
        num_classes=10,
        input=IMAGES,
    )
    return Artifact.of(chosen.build(seed=1), chosen)


@pytest.fixture(scope="module")
def trained(fresh: Artifact, data: Data) -> Artifact:
    return Finetune(epochs=4, lr=4e-3, **PLAIN)(fresh, context(data))


def context(data: Data, seed: int = 0) -> Context:
    return Context(data=data, loading=Loading(batch_size=32), seed=seed)


def correct(made: Artifact, data: Data) -> float:
    """Percent of the validation images."""
    model, right = made.model(), 0
    with torch.inference_mode():
        for images, labels in data.eval_batches("val", IMAGES, batch_size=100):
            right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(data.split("val"))


def test_it_learns(fresh: Artifact, trained: Artifact, data: Data) -> None:
    loss: Any = trained.history[0].metrics["loss"]
    assert len(loss) == 4
    assert loss[0] > 3 * loss[-1]
    assert correct(fresh, data) < 30  # of ten classes; 10 by chance
    assert correct(trained, data) > 80
    assert trained.history[0].metrics["images"] == 4 * (600 // 32) * 32


def test_it_repairs_a_broken_network(trained: Artifact, data: Data) -> None:
    state, generator = trained.state_dict(), torch.Generator().manual_seed(0)
    for value in state.values():
        value += 0.15 * torch.randn(value.shape, generator=generator)
    broken = Artifact(trained.backbone, state)
    repaired = Finetune(epochs=2, lr=2e-3, **PLAIN)(broken, context(data))
    assert correct(broken, data) < 60
    assert correct(repaired, data) > 80


@pytest.mark.parametrize("soft", [{"mixup": 0.2, "smoothing": 0.1}, {"cutmix": 1.0}], ids=" ".join)
def test_soft_targets_are_trained_on(soft: dict[str, float], fresh: Artifact, data: Data) -> None:
    after = Finetune(epochs=2, lr=4e-3, **PLAIN, **soft)(fresh, context(data))
    loss: Any = after.history[0].metrics["loss"]
    assert loss[-1] < loss[0] - 0.2
    assert correct(after, data) > 60


def test_the_same_seed_gives_the_same_bits_and_another_other_ones(fresh: Artifact, few: Data) -> None:
    step = Finetune(epochs=1, mixup=0.2, **PLAIN)
    torch.manual_seed(1)
    first = step(fresh, context(few, seed=3)).weights
    torch.manual_seed(2)  # what the caller drew before does not matter
    assert step(fresh, context(few, seed=3)).weights == first
    assert step(fresh, context(few, seed=4)).weights != first


def test_the_moving_average_is_what_is_kept(fresh: Artifact, few: Data) -> None:
    plain, averaged = (Finetune(epochs=1, ema=ema, **PLAIN)(fresh, context(few)) for ema in (0.0, 0.9))
    assert averaged.weights != plain.weights
    assert averaged.history[0].metrics == plain.history[0].metrics  # the training itself is the same


def test_it_is_left_plain(trained: Artifact) -> None:
    model = trained.model()
    assert not model.training
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


def test_without_a_train_split_it_does_not_start(fresh: Artifact) -> None:
    with pytest.raises(DataError, match="step 1 'finetune' reads the split 'train', which the data lacks; give --data"):
        Pipeline((Finetune(),)).check(fresh, Context())


class Fixed(nn.Module):
    """Gives the logits it was made with."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_the_loss_by_hand() -> None:
    # Two classes, logits 0 and log 3: probabilities 1/4 and 3/4.
    model = Fixed(torch.tensor([[0.0, 3.0], [0.0, 3.0]]).clamp(min=1).log().to(torch.bfloat16))
    exact = model.logits.float()

    def loss_of(target: torch.Tensor) -> torch.Tensor:
        return label_loss(model, Batch(torch.zeros(2, 3, 1, 1), target, torch.arange(2), 0))["label"]

    hard = loss_of(torch.tensor([1, 0]))
    assert hard.dtype == torch.float32
    torch.testing.assert_close(hard, -F.log_softmax(exact, 1)[[0, 1], [1, 0]].mean())
    assert float(hard) == pytest.approx((torch.tensor([4 / 3, 4.0]).log().mean()).item(), rel=1e-2)  # bf16 logits
    soft = loss_of(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert float(soft) == pytest.approx(float(hard))  # one of each is the half of both
