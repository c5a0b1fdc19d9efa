"""Surgery: batch norms are merged into convolutions only where the network computes the same afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim import surgery
from tests.contract.zoo import SIZE, ZOO, artifact

pytestmark = pytest.mark.usefixtures("one_thread")


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def images() -> Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def with_statistics(network: str) -> nn.Module:
    """The zoo's network after it has seen images, so that no norm is the identity."""
    model = artifact(network).model().train()
    with torch.no_grad():
        model(images() * 2 + 1)
    return model.eval()


@pytest.mark.parametrize("network", ZOO)
def test_every_norm_of_a_convolution_is_merged_and_nothing_else_changes(network: str) -> None:
    model = with_statistics(network)
    before, expected = norms(model), model(images())
    assert surgery.fold_batch_norms(model, images()) == before
    assert (before > 0) == (network in ("resnet", "mobilenet"))
    assert norms(model) == 0
    # Merged weights are rounded once more than the two were: 1e-7 of a value, for each of at most 50 layers.
    assert (model(images()) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Shared(nn.Module):
    """One convolution, two readers of what it gives: its norm, and a shortcut past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.weight, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        joined: Tensor = (self.norm(features) + features).mean((2, 3))
        return joined


class Twice(nn.Module):
    """One convolution called twice, with a norm for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.b(self.first(self.a(self.first(images)))).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [Shared, Twice])
def test_what_would_change_the_network_is_left_alone(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert surgery.fold_batch_norms(model, images()) == 0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
