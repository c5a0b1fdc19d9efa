"""Repair: what is lost in a layer is won back where least squares and statistics can, and nothing else moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from slim import surgery
from slim.contract import Advance
from slim.errors import PassError
from slim.passes.calibrate import Layer
from slim.passes.repair import Spread, change_of, held_share, images_that_fit, matched, repair
from tests.contract.zoo import SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int = 0, size: tuple[int, ...] = SIZE) -> Tensor:
    """Smooth, as images are: pixels depend on their neighbours, which is what a refit can use."""
    return nn.functional.avg_pool2d(draw(n, *size, seed=seed), 5, stride=1, padding=2) * 3 + 0.3


def set_values(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a unit gain, biases and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Layer):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.5, generator=generator)
                cast(Tensor, module.running_var).uniform_(0.5, 2, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 2, generator=generator)
                    module.bias.normal_(0, 0.5, generator=generator)
    return model.eval()


def convolutional() -> nn.Sequential:
    """Two convolutions with norms, a Linear layer with one."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.BatchNorm1d(6),
    )


def folded() -> nn.Sequential:
    """The same, its norms merged into the layers before them: what is left of them is mean 0, variance 1."""
    model = cast(nn.Sequential, set_values(convolutional()))
    for at in (0, 3):
        surgery.swap(model, str(at), fuse_conv_bn_eval(cast(nn.Conv2d, model[at]), cast(nn.BatchNorm2d, model[at + 1])))
        surgery.swap(model, str(at + 1), nn.BatchNorm2d(8))
    return model.eval()


def truncate(model: nn.Module, name: str, rank: int) -> str:
    """Two layers of that rank, by plain SVD, in the place of one; the name of the one that has its outputs."""
    layer = cast(Layer, model.get_submodule(name))
    left, spectrum, right = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    inputs, outputs, bias = layer.weight.shape[1], len(layer.weight), layer.bias is not None
    first: Layer
    second: Layer
    if isinstance(layer, nn.Linear):
        first, second = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)
    else:
        shape = {"stride": layer.stride, "padding": layer.padding}
        first = nn.Conv2d(inputs, rank, layer.kernel_size, bias=False, **shape)  # type: ignore[arg-type]
        second = nn.Conv2d(rank, outputs, 1, bias=bias)
    with torch.no_grad():
        first.weight.copy_(right[:rank].reshape(first.weight.shape))
        second.weight.copy_((left[:, :rank] * spectrum[:rank]).reshape(second.weight.shape))
        if layer.bias is not None:
            cast(Tensor, second.bias).copy_(layer.bias)
    surgery.swap(model, name, nn.Sequential(first, second))
    return f"{name}.1"


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model.eval()(x))


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Relative."""
    expected = outputs(dense, x)
    return float((outputs(model, x) - expected).norm() / expected.norm())


def test_the_change_is_that_of_ridge_regression() -> None:
    z, r = draw(50, 2, 4).double(), draw(50, 2, 3, seed=1).double()
    gram, cross = torch.einsum("nga,ngb->gab", z, z), torch.einsum("ngo,nga->goa", r, z)
    change = change_of(gram, cross, 0.1, biased=False)
    for group in range(2):
        # The ridge as four more rows: sqrt(cost) * I with residual zero.
        cost = 0.1 * z[:, group].square().sum(0).mean()
        rows = torch.cat([z[:, group], cost.sqrt() * torch.eye(4, dtype=torch.double)])
        targets = torch.cat([r[:, group], torch.zeros(4, 3, dtype=torch.double)])
        # LEAST_RIDGE is 1e-10 of the energy.
        torch.testing.assert_close(change[group].T, torch.linalg.lstsq(rows, targets).solution, rtol=1e-7, atol=1e-8)


def test_the_ridge_does_not_hold_a_bias() -> None:
    z, wanted = draw(60, 3).double() + 5, torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.double)
    r = z @ wanted.T + 7
    rows = torch.cat([z, torch.ones(60, 1, dtype=torch.double)], 1)
    gram, cross = (rows.T @ rows)[None], (r.T @ rows)[None]
    # However strong: weights stay, and the mean is met.
    held = change_of(gram, cross, 1e9, biased=True)[0]
    assert held[:, :3].abs().max() < 1e-6
    torch.testing.assert_close(held[0, 3], r.mean(), rtol=1e-5, atol=0)
    free = change_of(gram, cross, 0, biased=True)[0]
    # LEAST_RIDGE times the energy of a mean of 5 over a variance of 1: 3e-9 of a weight.
    torch.testing.assert_close(free, torch.cat([wanted, torch.full((1, 1), 7.0).double()], 1), rtol=1e-6, atol=1e-6)


def test_a_matched_norm_does_to_found_moments_what_the_norm_does_to_dense_ones() -> None:
    norm = nn.BatchNorm1d(5)
    set_values(norm)
    x = draw(200, 5) * torch.tensor([0.5, 1, 2, 4, 8]) + torch.arange(5)
    squeezed = x * 0.3 - 2
    mean, variance = x.double().mean(0), x.double().var(0, correction=0)
    found_mean, found_variance = squeezed.double().mean(0), squeezed.double().var(0, correction=0)
    other = nn.BatchNorm1d(5).eval()
    with torch.no_grad():
        for place, value in zip(
            (other.weight, other.bias, other.running_mean, other.running_var),
            matched(norm, mean, variance, found_mean, found_variance),
            strict=True,
        ):
            cast(Tensor, place).copy_(value)
    # eps 1e-5 is 5e-4 of the least variance, 0.3^2 * 0.5^2; halved by the root.
    torch.testing.assert_close(outputs(other, squeezed), outputs(norm, x), rtol=5e-4, atol=5e-4)
    # Noise is not scaled up more than tenfold.
    _, _, _, least = matched(norm, mean, variance, found_mean, found_variance * 1e-9)
    torch.testing.assert_close(least, variance / 100)


def test_spread_is_the_mean_and_variance_of_all_calls_together() -> None:
    x = draw(20, 3, 4, 5) * 2 + 100
    spread = Spread()
    spread.add(x[:9])
    spread.add(x[9:])
    torch.testing.assert_close(spread.mean, x.double().mean((0, 2, 3)), rtol=1e-9, atol=0)
    # Squares of what is left of fp32 after its mean is taken off: 1e-7 for each rounding, though 100^2 is 2500 times 4.
    torch.testing.assert_close(spread.variance, x.double().var((0, 2, 3), correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("build", [convolutional, folded])
def test_an_unchanged_network_stays_the_same_function(build: type[nn.Sequential]) -> None:
    dense = set_values(build()) if build is convolutional else build()
    model = copy.deepcopy(dense)
    refit = {name: name for name in ("0", "3", "8")}
    figures = repair(model, dense, refit, images(40), batch_size=16)
    assert (figures["refit"], figures["norms"], figures["images"], figures["left"]) == (3, 3, 40, [])
    assert figures["error_before"] == figures["error_after"] == 0
    assert not torch.equal(model.state_dict()["1.running_mean"], dense.state_dict()["1.running_mean"])
    assert error(model, dense, images(40, seed=1)) < 1e-5  # fp32, ten layers


@pytest.mark.parametrize("network", ["resnet", "mobilenet", "convnext", "vit", "mixer"])
def test_networks_of_every_kind_stay_the_same_function(network: str) -> None:
    dense = set_values(artifact(network).model())
    model = copy.deepcopy(dense)
    refit = {name: name for name, layer in model.named_modules() if isinstance(layer, Layer)}
    figures = repair(model, dense, refit, images(10), batch_size=4)
    assert (figures["refit"], figures["left"]) == (len(refit), [])
    assert figures["norms"] == sum(isinstance(module, nn.BatchNorm2d) for module in dense.modules())
    # fp32: 1e-6 for each of some 50 layers, which the norms scale up.
    assert error(model, dense, images(10, seed=1)) < 1e-3


def test_a_convolution_scaled_and_shifted_is_put_right_by_its_norm() -> None:
    dense = cast(nn.Sequential, set_values(convolutional()))
    model = copy.deepcopy(dense)
    first, second = cast(nn.Conv2d, model[0]), cast(nn.Conv2d, model[3])
    with torch.no_grad():
        first.weight *= 0.5
        second.weight *= 1.5
        cast(Tensor, second.bias).add_(3)
    assert error(model, dense, images(40, seed=1)) > 0.1
    assert repair(model, dense, {}, images(40))["norms"] == 3
    # The variance is above 0.01; eps 1e-5 does not scale with it: 1e-3, three times, on one channel at most.
    assert error(model, dense, images(40, seed=1)) < 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "groups"])
def test_a_refit_goes_its_share_of_the_way_to_the_least_squares_optimum(kind: str, bias: bool) -> None:
    """Of a layer whose inputs have lost a part; against all patches, so that every position must be right."""
    groups = 2 if kind == "groups" else 1

    def layers() -> nn.Sequential:
        if kind == "linear":
            return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias))
        last = nn.Conv2d(8, 4, (3, 2), stride=2, padding=(1, 0), groups=groups, bias=bias)
        return nn.Sequential(nn.Conv2d(5, 8, 1), nn.ReLU(), last)

    x = draw(30, 5) if kind == "linear" else draw(30, 5, 6, 6)
    dense = set_values(layers())
    model = copy.deepcopy(dense)
    cut = cast(Layer, model.get_submodule("0"))
    with torch.no_grad():
        cut.weight[1::2] = 0.1 * cut.weight[::2]  # each second channel now says little but what another says
    z, target = outputs(nn.Sequential(*list(model.children())[:2]), x), outputs(dense, x)
    if kind != "linear":
        z = nn.functional.unfold(z, (3, 2), stride=2, padding=(1, 0)).movedim(1, 2)
        target = target.movedim(1, -1)
    z, target = z.reshape(-1, groups, z.shape[-1] // groups).double(), target.reshape(len(z.flatten(0, -2)), groups, -1)
    best = 0.0
    for group in range(groups):
        rows = torch.cat([z[:, group], torch.ones(len(z), 1)], 1) if bias else z[:, group]
        y = target[:, group].double()
        best += float((y - rows @ torch.linalg.lstsq(rows, y, driver="gelsd").solution).square().sum())
    # 20 rows for each input are asked: of 30 x 9 patches or 30 rows, all are read.
    before = float((outputs(model, x) - outputs(dense, x)).double().square().sum())
    figures = repair(model, dense, {"2": "2"}, x, ridge=1e-9, batch_size=7)
    reached = float((outputs(model, x) - outputs(dense, x)).double().square().sum())
    # The error is a parabola along the way to the optimum: a share s of the way is 1 - (1 - s) ** 2 of the gain.
    gone = cast(float, figures["share"])
    assert 0 < gone < 1
    assert reached == pytest.approx(
        before - (1 - (1 - gone) ** 2) * (before - best), rel=1e-3
    )  # the ridge, on inputs that are nearly one
    share = math.sqrt(reached / float(target.square().sum()))
    assert figures["error_after"] == pytest.approx(share, abs=1e-5)
    assert cast(float, figures["error_before"]) > share


def test_a_change_is_made_as_far_as_that_of_one_half_suits_the_other() -> None:
    z, true, noise = draw(2, 400, 6).double(), draw(3, 6, seed=1).double(), draw(2, 400, 3, seed=2).double()
    gram = (z.mT @ z)[:, None]

    def share(residual: Tensor) -> float:
        return held_share(gram, (residual.mT @ z)[:, None], 1e-9, biased=False)

    assert share(z @ true.mT) == pytest.approx(1, abs=1e-6)  # both halves say the same
    assert share(torch.stack([z[0] @ true.mT, -z[1] @ true.mT])) == 0  # each says the opposite of the other
    # A half's fit is off by 36 / 400 for each weight, whose own square is 1 on average: 1 / (1 + 0.09); of 18 weights.
    assert share(z @ true.mT + 6 * noise) == pytest.approx(1 / 1.09, abs=0.08)
    # Nothing but noise: the fits of both halves agree by chance alone, half of the time, and then by little.
    drawn = [share(draw(2, 400, 3, seed=seed).double()) for seed in range(10, 40)]
    assert sum(drawn) / len(drawn) < 0.25


def test_a_refit_sees_the_layer_before_it_corrected() -> None:
    dense = set_values(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    model, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    for broken in (model, alone):
        with torch.no_grad():
            cast(nn.Linear, broken.get_submodule("0")).weight.mul_(0.1)
    x = draw(300, 6)
    repair(model, dense, {"0": "0", "2": "2"}, x, ridge=1e-9)
    # The first is put right, so there is nothing left for the second to make up for.
    assert error(model, dense, draw(50, 6, seed=1)) < 1e-5
    torch.testing.assert_close(model.state_dict()["2.weight"], dense.state_dict()["2.weight"], rtol=1e-4, atol=1e-4)
    repair(alone, dense, {"2": "2"}, x, ridge=1e-9)
    assert (alone.state_dict()["2.weight"] - dense.state_dict()["2.weight"]).norm() > 1


def test_input_widths_may_differ() -> None:
    """Pruning: the last hidden channel says what two others do, so the layer can do without it."""
    dense = set_values(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    first, second = cast(nn.Linear, dense.get_submodule("0")), cast(nn.Linear, dense.get_submodule("1"))
    with torch.no_grad():
        first.weight[4], first.bias[4] = first.weight[0] - 2 * first.weight[1], first.bias[0] - 2 * first.bias[1] + 3
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    with torch.no_grad():
        for name, value in dense.state_dict().items():
            own = model.state_dict()[name]
            own.copy_(value[: own.shape[0]] if own.dim() == 1 else value[: own.shape[0], : own.shape[1]])
    assert error(model, dense, draw(50, 6, seed=1)) > 0.1
    repair(model, dense, {"1": "1"}, draw(300, 6), ridge=1e-9)
    assert error(model, dense, draw(50, 6, seed=1)) < 1e-5
    assert second.weight.shape == (3, 5)


@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_truncated_layers_come_nearer_to_the_dense_network_on_images_that_were_not_seen(network: str) -> None:
    dense = set_values(artifact(network).model())
    names = [
        name
        for name, layer in dense.named_modules()
        if isinstance(layer, Layer) and name not in surgery.classifiers(dense) and min(layer.weight.shape[:2]) >= 16
    ]
    plain = copy.deepcopy(dense)
    refit = {truncate(plain, name, min(plain.get_parameter(f"{name}.weight").shape[:2]) // 2): name for name in names}
    fresh, seen = images(64, seed=1), images(128)
    before = error(plain, dense, fresh)
    after = {}
    for what, pairs, norms in (("refit", refit, False), ("norms", {}, True), ("both", refit, True)):
        model = copy.deepcopy(plain)
        figures = repair(model, dense, pairs, seen, norms=norms)
        after[what] = error(model, dense, fresh)
        assert figures["left"] == []
        if pairs:
            assert cast(float, figures["error_after"]) < cast(float, figures["error_before"])
    assert after["refit"] < 0.5 * before
    assert after["both"] < 0.5 * before
    if network == "resnet":  # the other has no batch norms
        assert after["both"] < after["norms"] < 0.5 * before


def test_repairing_twice_is_repairing_once() -> None:
    dense = set_values(convolutional())
    model = copy.deepcopy(dense)
    refit = {truncate(model, "3", 3): "3"}
    repair(model, dense, refit, images(40))
    again = copy.deepcopy(model)
    repair(again, dense, refit, images(40))
    # What the ridge of 1e-3 held back is moved a little further.
    assert error(again, model, images(40, seed=1)) < 1e-2


def test_a_layer_not_called_once_for_the_images_is_left_and_listed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.once = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.table, self.across = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.rows = draw(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.norm(self.twice(self.twice(x)))) + self.table(self.rows).mean(0)
            # Here the images are the second dimension.
            across = self.across(torch.stack([x, -x])).sum(0)
            output: Tensor = self.once(x + across)
            return output

    dense = set_values(Odd())
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    before = copy.deepcopy(model.state_dict())
    names = ("twice", "never", "once", "table", "across")
    figures = repair(model, dense, {name: name for name in names}, draw(40, 4))
    assert figures["left"] == ["twice", "never", "table", "across"]
    assert (figures["refit"], figures["norms"]) == (1, 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"once.weight", "once.bias"}


def test_norms_without_values_of_their_own_or_of_another_width_are_left() -> None:
    def build(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, width, 1),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 4, 1),
            nn.BatchNorm2d(4, affine=False),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4, track_running_stats=False),
        )

    dense, model = set_values(build(6)), set_values(build(5), seed=1)
    before = copy.deepcopy(model.state_dict())
    assert repair(model, dense, {}, images(9))["norms"] == 1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"4.weight", "4.bias", "4.running_mean", "4.running_var"}
    figures = repair(model, dense, {}, images(9), norms=False)
    assert figures == {"refit": 0, "norms": 0, "images": 9, "left": []}


@pytest.mark.parametrize("bias", [True, False])
def test_dead_channels_stay_finite_and_a_constant_input_moves_no_weight(bias: bool) -> None:
    dense = set_values(
        nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=bias), nn.BatchNorm2d(4)
        )
    )
    model = copy.deepcopy(dense)
    dead = cast(nn.Conv2d, model.get_submodule("0"))
    with torch.no_grad():
        dead.weight[1] = 0  # one channel does not vary
    for all_dead in (False, True):
        with torch.no_grad():
            if all_dead:
                dead.weight.zero_()
        figures = repair(model, dense, {"3": "3"}, images(12))
        assert all(math.isfinite(cast(float, figures[key])) for key in ("error_before", "error_after"))
        assert outputs(model, images(12, seed=1)).isfinite().all()
    kept = copy.deepcopy(dense)
    with torch.no_grad():
        cast(nn.Conv2d, kept.get_submodule("0")).weight.zero_()
    repair(kept, dense, {"3": "3"}, images(12), norms=False)
    if bias:
        # Every input is constant: the bias says it all. LEAST_RIDGE against rounding of fp64 leaves 1e-4 of a weight.
        torch.testing.assert_close(kept.state_dict()["3.weight"], dense.state_dict()["3.weight"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["layer", "norm"])
def test_values_that_are_not_finite_are_named_and_no_hook_stays(where: str) -> None:
    dense = set_values(convolutional())
    model = copy.deepcopy(dense)
    x = images(6)
    x[4, 0, 3, 3] = math.inf
    refit, name = ({"0": "0"}, "0") if where == "layer" else ({}, "1")
    with pytest.raises(
        PassError, match=rf"^repair: '{name}' sees values that are not finite; check weights and images$"
    ):
        repair(model, dense, refit, x)
    for network in (model, dense):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_the_dense_network_and_training_flags_are_untouched_and_progress_adds_up() -> None:
    dense, told = set_values(artifact("resnet").model()), []
    model = copy.deepcopy(dense)
    refit = {truncate(model, "layer3.0.conv2", 6): "layer3.0.conv2"}
    model.train()
    model.get_submodule("layer1").eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(dense.state_dict())

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Advance]:
        told.append(-total)
        yield lambda steps, note="": told.append(steps)

    repair(model, dense, refit, images(7), batch_size=3, progress=progress)
    assert sum(told) == 0
    assert [module.training for module in model.modules()] == flags
    assert not any(module.training for module in dense.modules())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    for network in (model, dense):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_images_that_fit_follow_from_the_largest_tensor() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    largest = 8 * 10 * 10 * 4  # bytes
    assert images_that_fit(model, (3, 10, 10), 20 * largest / 1e9) == 5
    assert images_that_fit(model, (3, 10, 10), 1e-9) == 1
