"""Repair of a network that has lost channels: what it still has is held against the same channels of the dense one."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import nn

from slim import surgery
from slim.passes.repair import repair
from tests.contract.zoo import SIZE
from tests.passes.test_repair import convolutional, draw, error, images, outputs, set_values

pytestmark = pytest.mark.usefixtures("one_thread")

VALUES = ("weight", "bias", "running_mean", "running_var")

FEWER = {"0": [0, 2, 3, 5, 7], "1": [0, 2, 3, 5, 7], "3": [1, 4, 6], "4": [1, 4, 6]}
"""What a pruned `convolutional` still has of its outputs; the Linear layer has all, and its norm."""


def narrowed(dense: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """`convolutional` without the channels that are not kept: the second convolution loses inputs and outputs."""
    model = copy.deepcopy(dense)
    stays: surgery.Positions = {key: {0: kept[key[0]]} for key in dense.state_dict() if key[0] in kept}
    stays = {key: dims for key, dims in stays.items() if not key.endswith("num_batches_tracked")}
    stays["3.weight"][1], stays["8.weight"] = kept["0"], {1: kept["3"]}
    surgery.keep(model, stays)
    return model


def test_norms_of_fewer_channels_are_matched_to_those_that_are_kept_of_the_dense_ones() -> None:
    dense = set_values(convolutional())
    model, x = narrowed(dense, FEWER), images(40)
    assert repair(model, dense, {}, x, kept=FEWER)["norms"] == 3  # the last norm is in nobody's list: all of it is kept
    for name, width in (("1", 5), ("4", 3), ("9", 6)):
        places = FEWER.get(name, [*range(width)])
        before, norm, own = int(name), cast(nn.BatchNorm2d, model.get_submodule(name)), dense.get_submodule(name)
        found, expected = (outputs(cast(nn.Sequential, one)[:before], x).double() for one in (model, dense))
        expected, axes = expected[:, places], [at for at in range(found.ndim) if at != 1]
        weight, bias, mean, variance = (getattr(own, key).detach().double()[places] for key in VALUES)
        slope, spread = weight / (variance + norm.eps).sqrt(), expected.var(axes, correction=0)
        hand = (
            slope * (spread + norm.eps).sqrt(),
            bias + slope * (expected.mean(axes) - mean),
            found.mean(axes),
            found.var(axes, correction=0).maximum(0.01 * spread),
        )
        for key, value in zip(VALUES, hand, strict=True):
            # Sums in fp32 against sums in fp64, of values up to 10 times the result.
            torch.testing.assert_close(getattr(norm, key).detach().double(), value, rtol=1e-5, atol=1e-5)


def test_a_layer_without_some_inputs_and_outputs_is_refitted_to_the_rows_that_stay() -> None:
    dense = set_values(convolutional())
    model, x = narrowed(dense, FEWER), draw(60, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    figures = repair(model, dense, {"3": "3"}, x, kept=FEWER, norms=False, ridge=1e-9)
    z = nn.functional.unfold(outputs(cast(nn.Sequential, model)[:3], x), 3, stride=2).movedim(1, 2).flatten(0, 1)
    y = outputs(cast(nn.Sequential, dense)[:4], x)[:, FEWER["3"]].movedim(1, -1).flatten(0, 2).double()
    rows = torch.cat([z.double(), torch.ones(len(z), 1)], 1)
    best = torch.linalg.lstsq(rows, y, driver="gelsd").solution.T
    # 9 patches of each image are fewer than the 20 * 45 / 60 asked for, so all are read: the solution is unique.
    share = cast(float, figures["share"])
    assert 0.5 < share < 1
    for key, wanted in (("3.weight", best[:, :-1].reshape(3, 5, 3, 3)), ("3.bias", best[:, -1])):
        way = before[key] + share * (wanted.float() - before[key])
        torch.testing.assert_close(model.state_dict()[key], way, rtol=0, atol=1e-4)  # the ridge; `share` has 6 digits
    error = float((rows @ best.T - y).norm() / y.norm())
    assert error < cast(float, figures["error_after"]) < cast(float, figures["error_before"])


def test_weights_of_a_duplicate_that_is_cut_are_taken_over() -> None:
    dense = set_values(convolutional())
    with torch.no_grad():
        for key, value in dense.state_dict().items():
            if key[0] in FEWER and value.ndim:
                value[1::2] = value[::2]
    even = {name: [0, 2, 4, 6] for name in FEWER}
    model, bare = narrowed(dense, even), narrowed(dense, even)
    assert error(bare, dense, images(40, seed=1)) > 0.1
    # On noise no input says what others do but for the duplicates: one weight alone is best.
    repair(model, dense, {"3": "3", "8": "8"}, draw(60, *SIZE), kept=even, ridge=1e-9)
    assert error(model, dense, images(40, seed=1)) < 1e-3
    for key in ("3.weight", "8.weight"):
        both = dense.state_dict()[key][:, ::2] + dense.state_dict()[key][:, 1::2]
        torch.testing.assert_close(model.state_dict()[key], both[::2] if key[0] == "3" else both, rtol=0, atol=1e-2)


def test_to_keep_every_channel_by_name_is_to_name_none() -> None:
    dense = set_values(convolutional())
    found = []
    for kept in (None, {}, {name: [*range(8)] for name in FEWER}):
        model = copy.deepcopy(dense)
        with torch.no_grad():
            cast(nn.Conv2d, model.get_submodule("0")).weight[1] *= 0.1
        repair(model, dense, {"3": "3"}, images(20), kept=kept)
        found.append(model.state_dict())
    assert all(torch.equal(value, one[key]) for one in found[1:] for key, value in found[0].items())
