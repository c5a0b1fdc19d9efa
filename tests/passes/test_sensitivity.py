"""Divergence of a prediction for an error of a layer's output: against what such errors really do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.sensitivity import BATCH, IMAGES, sensitivities
from tests.contract.zoo import SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def divergence(model: nn.Module, name: str, shown: Tensor, size: float) -> float:
    """Mean divergence of the prediction when noise of standard deviation `size` is added to what a layer puts out."""
    generator = torch.Generator().manual_seed(1)

    def disturb(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + size * torch.randn(output.shape, generator=generator)

    with torch.inference_mode():
        expected = model(shown).double().log_softmax(1)
        hook = model.get_submodule(name).register_forward_hook(disturb)
        total = 0.0
        for _ in range(20):
            found = model(shown).double().log_softmax(1)
            total += float((expected.exp() * (expected - found)).sum(1).mean())
        hook.remove()
    return total / 20


@pytest.mark.parametrize(
    ("network", "name"),
    [("vit", "blocks.0.mlp.fc1"), ("vit", "blocks.1.attn.proj"), ("resnet", "layer2.0.conv2"), ("mixer", "stem.proj")],
)
def test_it_foretells_what_a_small_error_does(network: str, name: str) -> None:
    model = artifact(network).model()
    shown = images(IMAGES)
    found = sensitivities(model, [name], [shown], seed=0)[name]
    layer = model.get_submodule(name)
    channels = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    size = 1e-3
    # Noise on every output of a position is an error of squared length channels * size ** 2 there.
    assert isinstance(channels, int)
    expected = divergence(model, name, shown, size) / (channels * size**2)
    # Classes are drawn once for each of 64 images, and noise 20 times: a fifth is what both leave open.
    assert found == pytest.approx(expected, rel=0.2)


def test_batches_may_be_cut_in_any_way_and_only_the_first_images_count() -> None:
    model = artifact("vit").model()
    shown, names = images(IMAGES + 10), ["blocks.0.mlp.fc2"]
    whole = sensitivities(model, names, [shown], seed=0)
    cut = sensitivities(model, names, shown[:IMAGES].split(BATCH), seed=0)
    assert cut[names[0]] == pytest.approx(whole[names[0]], rel=1e-5)
    assert sensitivities(model, names, [shown], seed=1) != whole


def test_the_network_is_left_as_it_was() -> None:
    model = artifact("resnet").model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shown = images(8)
    sensitivities(model, ["layer1.0.conv1"], [shown], seed=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    assert not shown.requires_grad


def test_a_prediction_that_is_not_finite_is_an_error() -> None:
    model = artifact("vit").model()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(PassError, match="sensitivity: the network's output is not finite; check weights and images"):
        sensitivities(model, ["blocks.0.mlp.fc1"], [images(8)], seed=0)
