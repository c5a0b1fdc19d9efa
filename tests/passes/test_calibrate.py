"""Moments of layer inputs: those of explicit patches, whatever the batches, the padding and the memory allowed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from slim.contract import Advance
from slim.errors import PassError
from slim.passes.calibrate import BLOCK, ROWS_PER_INPUT, Layer, Moments, add_upper, collect, mirror, positions, rows
from tests.contract.zoo import SIZE, ZOO, artifact

pytestmark = pytest.mark.usefixtures("one_thread")

CONVOLUTIONS: dict[str, nn.Conv2d] = {
    "1x1": nn.Conv2d(4, 6, 1),
    "1x1, stride": nn.Conv2d(4, 6, 1, stride=2),
    "3x3, padding": nn.Conv2d(4, 6, 3, padding=1),
    "3x3, stride": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "unequal sides": nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)),
    "row": nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    "dilation": nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "same, even kernel": nn.Conv2d(4, 6, (4, 3), padding="same"),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular, same": nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4),
    "timm's same": Conv2dSame(4, 6, 3, stride=2),
    "timm's same, groups": Conv2dSame(4, 6, (2, 5), stride=(3, 1), dilation=(1, 2), groups=2),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Values with a mean that is not zero."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def collect_one(layer: nn.Module, batches: Sequence[Tensor], images: int, memory_gb: float = 1.0) -> Moments:
    return collect(nn.Sequential(layer), ["0"], batches, images=images, memory_gb=memory_gb)["0"]


def assert_moments(found: Moments, x: Tensor) -> None:
    """`found` are those of the rows x (n, g, d)."""
    x = x.double().movedim(1, 0)
    assert found.n == x.shape[1]
    assert found.second.dtype == found.mean.dtype == torch.float64
    # Products are summed in fp32: 1e-7 of their size for each of a few roundings.
    torch.testing.assert_close(found.second, x.mT @ x / x.shape[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean, x.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, on the even one
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_are_what_the_convolution_multiplies_at_the_positions_of_its_output(name: str) -> None:
    layer, x = CONVOLUTIONS[name], draw(3, 4, 12, 11)
    output = layer(x).detach().movedim(1, -1).reshape(3, -1, layer.out_channels)
    for wanted in (1, 7, 10**6):
        found = rows(layer, x, range(5, 8), wanted)
        weight = layer.weight.detach().reshape(layer.groups, -1, found.shape[2])
        product = torch.einsum("ngd,god->ngo", found, weight).flatten(1)
        if layer.bias is not None:
            product += layer.bias.detach()
        chosen = positions(output.shape[1], wanted, range(5, 8))
        expected = torch.cat([image[which] for image, which in zip(output, chosen, strict=True)])
        # Sums of at most 60 products of size 1.
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if "timm" not in name])
def test_moments_of_a_convolution_are_those_of_its_unfolded_patches(name: str) -> None:
    layer, x = CONVOLUTIONS[name], draw(2, 4, 8, 7)
    sides, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
    wide = F.pad(x, sides, mode="constant" if mode == "zeros" else mode)
    # (n, i * kh * kw, positions)
    patches = F.unfold(wide, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    found = collect_one(layer, [x], images=2)
    assert found.taps
    # Of 56 positions at most, 64 for each of 4 inputs or more are asked of two images: all.
    assert_moments(found, patches.movedim(1, 2).reshape(-1, layer.groups, found.mean.shape[1]))


def test_moments_of_a_linear_layer_are_those_of_all_its_tokens() -> None:
    x = draw(4, 5, 7, 3)
    assert_moments(collect_one(nn.Linear(3, 2), [x[:1], x[1:]], images=4), x.reshape(-1, 1, 3))


def test_blocks_of_a_wide_layer_make_one_symmetric_matrix() -> None:
    x = draw(2, 20, 2 * BLOCK + 3)
    second = torch.zeros(2, x.shape[2], x.shape[2], dtype=torch.double)
    add_upper(second, x)
    add_upper(second, x)
    mirror(second)
    torch.testing.assert_close(second, 2 * x.double().mT @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("total", "wanted"), [(49, 3), (49, 49), (49, 60), (1, 1), (3136, 100)])
def test_positions_are_the_same_every_time_none_twice_and_all_read_equally_often(total: int, wanted: int) -> None:
    chosen = positions(total, wanted, range(total))
    assert torch.equal(chosen, positions(total, wanted, range(total)))
    assert torch.equal(chosen[1:], positions(total, wanted, range(1, total)))
    assert chosen.shape == (total, min(wanted, total))
    assert all(len(set(row.tolist())) == len(row) for row in chosen[:50])
    # Over as many images as there are positions, the permutation is gone through a whole number of times.
    assert chosen.flatten().bincount(minlength=total).tolist() == [min(wanted, total)] * total


def test_positions_are_not_aligned_with_the_rows_of_an_image() -> None:
    columns = positions(56 * 56, 112, range(1))[0] % 56
    # Of 112 free draws, a column is drawn twice on average; a stride of 28 or 56 would draw 56 times from two or one.
    assert columns.bincount(minlength=56).max() < 10


def test_thinning_stays_within_its_budget_and_near_the_whole() -> None:
    images, side, width = 64, 24, 4
    x = draw(images, width, side, side)
    layer = nn.Conv2d(width, 2, 1)
    found = collect_one(layer, torch.split(x, 16), images=images)
    assert found.n == ROWS_PER_INPUT * width  # of 64 * 576 there are
    whole = x.movedim(1, -1).reshape(-1, width).double()
    # An entry is the mean of n products x_i x_j; drawn at random it is off by their deviation over sqrt(n). Largest of
    # 16 entries: four deviations.
    products = whole[:, :, None] * whole[:, None, :]
    bound = 4 * products.std(0) / math.sqrt(found.n)
    assert ((found.second[0] - products.mean(0)).abs() <= bound).all()
    assert ((found.second[0] - products.mean(0)).abs() > 1e-6).any()  # it is thinned


@pytest.mark.parametrize("network", ZOO)
def test_moments_do_not_depend_on_the_size_of_the_batches(network: str) -> None:
    model = artifact(network).model()
    names = [name for name, layer in model.named_modules() if isinstance(layer, Layer) and name not in unread(model)]
    x = draw(12, *SIZE)
    one = collect(model, names, [x], images=12, memory_gb=1)
    many = collect(model, names, torch.split(x, 5), images=12, memory_gb=1)
    for name in names:
        assert one[name].n == many[name].n
        # Inputs differ by the rounding of their kernels, which depend on the batch: 1e-6 for each of some 50 layers.
        scale = float(one[name].second.abs().max())
        torch.testing.assert_close(one[name].second, many[name].second, rtol=0, atol=1e-4 * scale)


def unread(model: nn.Module) -> set[str]:
    """Layers whose weight is read directly: BEiT's attention."""
    return {name for name, _ in model.named_modules() if type(model).__name__ == "Beit" and name.endswith("qkv")}


def test_a_layer_called_twice_adds_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(self.layer(x))
            return output

    model, x = Twice(), draw(6, 3)
    found = collect(model, ["layer"], [x], images=6, memory_gb=1)["layer"]
    assert_moments(found, torch.cat([x, model.layer(x).detach()])[:, None])


def test_a_table_of_the_networks_own_is_no_image() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.table = draw(1, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = x + self.layer(self.table).mean(1)
            return output

    found = collect(model := Table(), ["layer"], torch.split(draw(4, 3), 2), images=4, memory_gb=1)["layer"]
    assert_moments(found, model.table.repeat(2, 1, 1).movedim(1, 0).reshape(10, 1, 3))


def test_convolutions_lose_their_kernel_positions_largest_first_until_the_cap_holds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    full = {"0": 27**2 * 8, "1": 144**2 * 8, "2": 8**2 * 8}  # bytes
    batches = [draw(2, 3, 8, 8)]

    def taps(allowed: int) -> dict[str, bool]:
        found = collect(model, list(full), batches, images=2, memory_gb=allowed / 1e9)
        assert sum(moments.second.nbytes for moments in found.values()) <= allowed
        return {name: moments.taps for name, moments in found.items()}

    assert taps(sum(full.values())) == {"0": True, "1": True, "2": True}
    assert taps(sum(full.values()) - 1) == {"0": True, "1": False, "2": True}
    assert taps(full["0"] + full["2"] + 16**2 * 8) == {"0": True, "1": False, "2": True}
    least = 3**2 * 8 + 16**2 * 8 + full["2"]
    assert taps(least) == {"0": False, "1": False, "2": True}
    with pytest.raises(
        PassError, match=r"moments of 3 layers need 2.6e-06 GB, allowed are 2.6\d*e-06; raise memory_gb or"
    ):
        taps(least - 1)


def test_without_kernel_positions_the_moments_are_those_of_the_input_channels() -> None:
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), draw(2, 4, 5, 5)
    found = collect_one(layer, [x], images=2, memory_gb=2 * 2**2 * 8 / 1e9)
    assert not found.taps
    assert_moments(found, x.movedim(1, -1).reshape(-1, 2, 2))


def test_expanded_moments_are_those_of_independent_kernel_positions() -> None:
    x = draw(400, 1, 3).double()
    moments = Moments(
        x[:, 0].T @ x[:, 0] / 400 * torch.ones(2, 1, 1),
        x.mean(0).repeat(2, 1),
        400,
        taps=False,
        noise=torch.zeros(2, dtype=torch.double),
    )
    wide = moments.expanded(4)
    assert wide.taps
    assert wide.n == 400
    assert wide.expanded(4) is wide
    for group in range(2):
        # Order (i, kh, kw): the channel is the slower index.
        expected = torch.kron(moments.covariance[group], torch.eye(4, dtype=torch.double))
        torch.testing.assert_close(wide.covariance[group], expected)
        torch.testing.assert_close(wide.mean[group], moments.mean[group].repeat_interleave(4))
        assert torch.linalg.eigvalsh(wide.covariance[group])[0] > 0  # a covariance, whatever the mean


def test_expanded_moments_are_near_those_of_patches_of_independent_pixels() -> None:
    layer, x = nn.Conv2d(2, 3, 3), draw(16, 2, 12, 12)
    full = collect_one(layer, [x], images=16)
    channels = collect_one(layer, [x], images=16, memory_gb=1e-7)
    assert not channels.taps
    # n is 64 * 18 rows at least; entries have deviation below 2 (E x^4 of N(0.5, 1) is 4.56): five of them.
    bound = 5 * 2 / math.sqrt(min(full.n, channels.n))
    assert (channels.expanded(9).second - full.second).abs().max() < bound


def test_a_layer_that_is_never_called_is_named() -> None:
    model = artifact("beit").model()
    name = min(unread(model))
    with pytest.raises(PassError, match=rf"^calibrate: layer '{name}' was never called; skip it$"):
        collect(model, [name], [draw(2, *SIZE)], images=2, memory_gb=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_input_that_is_not_finite_is_named_wherever_it_lies_and_no_hook_stays(value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    x = draw(1, 3, 64, 64)
    with torch.no_grad():
        assert isinstance(model[0].bias, Tensor)
        model[0].bias[2] = value
    with pytest.raises(PassError, match=r"^calibrate: the input of layer '1' is not finite; check weights and images$"):
        collect(model, ["0", "1"], [x], images=200, memory_gb=1)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_network_is_left_as_it_was_and_every_batch_is_told() -> None:
    model = artifact("resnet").model().train()
    model.get_submodule("layer1").eval()
    before = copy.deepcopy(model.state_dict())
    told: list[object] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Advance]:
        told.append(total)
        yield lambda steps, note="": told.append(steps)

    found = collect(model, ["conv1"], torch.split(draw(5, *SIZE), 2), images=5, memory_gb=1, progress=progress)
    assert told == [5, 2, 2, 1]
    assert not found["conv1"].second.requires_grad
    assert model.training
    assert not model.get_submodule("layer1.0").training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def independent(images: int, width: int = 8, rows: int = 5) -> Tensor:
    """(images * rows, width): inputs that have nothing to do with each other; all rows of an image are the same."""
    return draw(images, 1, width, seed=3).expand(images, rows, width).reshape(-1, width)


def noise_of(x: Tensor, images: int) -> float:
    layer = nn.Sequential(nn.Linear(x.shape[1], 2))
    batches = x.reshape(images, -1, x.shape[1]).split(7)
    return float(collect(layer, ["0"], batches, images=images, memory_gb=1)["0"].noise)


def test_covariances_of_inputs_that_have_nothing_to_do_with_each_other_are_noise() -> None:
    # Each squared covariance is 1 / images on average, all of it noise; the estimate wavers with 28 pairs.
    assert noise_of(independent(40), 40) > 0.7


def test_covariances_that_every_image_has_are_no_noise() -> None:
    x = independent(40)
    together = x[:, :1].expand(-1, 8) + 0.1 * x  # one thing seen eight times
    assert noise_of(together, 40) < 0.15
    assert noise_of(together, 40) > 1 / 80  # 40 images are no more than 40, however many rows they have


def test_shrinking_leaves_variances_and_takes_the_noise_from_the_rest() -> None:
    covariance = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]], dtype=torch.double)
    mean = torch.tensor([[1.0, -1.0]], dtype=torch.double)
    second = covariance + mean[:, :, None] * mean[:, None, :]
    moments = Moments(second, mean, 10, taps=True, noise=torch.tensor([0.25], dtype=torch.double))
    expected = torch.tensor([[[2.0, 0.75], [0.75, 3.0]]], dtype=torch.double)
    torch.testing.assert_close(moments.shrunk, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(moments.covariance, covariance, rtol=0, atol=1e-12)
    assert torch.equal(moments.second, second)


def test_noise_does_not_depend_on_how_batches_are_cut() -> None:
    x = draw(30, 4, 6, seed=5)
    layer = nn.Sequential(nn.Linear(6, 2))
    cuts = [collect(layer, ["0"], torch.split(x, size), images=30, memory_gb=1)["0"].noise for size in (1, 4, 30)]
    for one in cuts[1:]:
        torch.testing.assert_close(one, cuts[0], rtol=1e-5, atol=1e-7)  # sums in fp32
