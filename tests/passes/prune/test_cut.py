"""Cutting: a group at zero is cut out exactly, and a group that is wrong is not believed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import timm
import torch
from timm.layers import Attention, LayerNorm2d
from torch import Tensor, nn

from slim.passes.prune.cut import NOT_EQUAL, SINGLE, cut, pruned, silenced, some_of, trusted
from slim.passes.prune.groups import Group, groups_of, positions
from tests.contract.zoo import SIZE, ZOO, Tied, artifact
from tests.passes.prune.toys import SWIN, Chain

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (3, 8, 8)
EXACT = 1e-5
"""Of the largest output: fp32 rounds each of some dozen layers by 1e-7."""


def noisy(model: nn.Module) -> nn.Module:
    """In eval mode, with values and statistics that hide nothing: fresh norms and layer scales would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model.eval()


def noise(size: tuple[int, int, int], count: int = 2) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(7))


def off(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def halved(groups: list[Group]) -> list[tuple[Group, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    return [(group, some_of(group.units, generator)) for group in groups]


def zeroed(model: nn.Module, kept: list[tuple[Group, list[int]]]) -> nn.Module:
    """Only values at zero, every module as it was."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for key, dims in positions(model.state_dict(), kept).items():
            value = silent.get_parameter(key) if key in dict(silent.named_parameters()) else silent.get_buffer(key)
            for dim, stays in dims.items():
                gone = [place for place in range(value.shape[dim]) if place not in stays]
                value.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0.0)
    return silent


def check(
    model: nn.Module, size: tuple[int, int, int], heads: Literal["whole", "dims"] = "whole"
) -> tuple[list[Group], dict[str, str]]:
    """Cut about half of every inner group that is believed, and compare; those groups, and the groups refused."""
    found, refused = trusted(model, groups_of(model, size, heads=heads)[0], size)
    inner = [group for group in found if group.inner]
    kept = halved(inner)
    images = noise(size)
    with torch.no_grad():
        whole, zero, less = model(images), zeroed(model, kept)(images), pruned(model, kept)(images)
    assert off(zero, whole) > 1e-3, "the test would show nothing"
    assert off(less, zero) <= EXACT
    return inner, refused


# A group at zero is cut out exactly


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.less, self.more = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.more(self.less(x.mean((2, 3), keepdim=True)).relu()).sigmoid()  # type: ignore[no-any-return]


class Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Added(nn.Module):
    """A block of tokens with a norm before it and a residual around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block = nn.LayerNorm(12), block

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        out: Tensor = tokens + self.block(self.norm(tokens))
        return out.mT.reshape(x.shape)


TOYS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "batch norm": (
        lambda: Chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), width=6),
        2,
    ),
    "one slope": (lambda: Chain(nn.Conv2d(3, 8, 3), nn.PReLU(), nn.Conv2d(8, 6, 1), width=6), 2),
    "a slope each": (lambda: Chain(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 1), width=6), 2),
    "depthwise": (
        lambda: Chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(), nn.Conv2d(8, 6, 1), width=6),
        2,
    ),
    "depthwise, wider": (
        lambda: Chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.SiLU(), nn.Conv2d(16, 6, 1), width=6),
        2,
    ),
    "groups": (
        lambda: Chain(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 6, 1), width=6),
        2,
    ),
    "group norm": (
        lambda: Chain(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 6, 1), width=6),
        2,
    ),
    "squeeze and excitation": (
        lambda: Chain(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Excited(8), nn.Conv2d(8, 6, 1), width=6),
        3,
    ),
    "concatenation": (
        lambda: Chain(
            Branches(nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1), width=6
        ),
        3,
    ),
    "hidden units behind a layer norm": (
        lambda: Chain(
            nn.Conv2d(3, 12, 1), Added(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))), width=12
        ),
        1,
    ),
}


@pytest.mark.parametrize("case", TOYS)
def test_cutting_what_is_zero_changes_nothing(case: str) -> None:
    make, groups = TOYS[case]
    torch.manual_seed(0)
    assert len(check(noisy(make()), SMALL)[0]) == groups


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("heads", ["whole", "dims"])
@pytest.mark.parametrize("normed", [True, False])
def test_cutting_heads_or_their_dimensions_that_are_zero_changes_nothing(
    fused: bool, heads: Literal["whole", "dims"], normed: bool
) -> None:
    torch.manual_seed(0)
    attention = Attention(12, num_heads=3, qkv_bias=True, qk_norm=normed, norm_layer=nn.LayerNorm)
    attention.fused_attn = fused
    model = noisy(Chain(nn.Conv2d(3, 12, 1), Added(attention), width=12))
    if heads == "dims" and normed:
        assert all(group.kind == "channels" for group in groups_of(model, SMALL, heads=heads)[0])
        return
    (group,), _ = check(model, SMALL, heads)
    smaller: Any = pruned(model, [(group, [0])])
    attn = smaller.layers[1].block
    expected = (1, 4, 4, 0.5) if heads == "whole" else (3, 1, 3, 1.0)
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale) == expected
    assert (attn.qkv.out_features, attn.proj.in_features) == (3 * attn.attn_dim, attn.attn_dim)


FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet": ("resnet18", {"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]}, 32),
    "regnet": ("regnety_002", {}, 32),
    "densenet": ("densenet121", {"growth_rate": 4, "block_config": [2, 2]}, 32),
    "squeeze and excitation": ("tinynet_e", {}, 32),
    "mobilevit": ("mobilevit_xxs", {}, 64),
    "fastvit": ("fastvit_t8", {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 128]}, 32),
    "resnet with group norms": ("resnetv2_50d_gn", {"layers": [1, 1], "channels": [128, 256], "stem_chs": 64}, 32),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 64),
}
"""Name -> timm model, its arguments, side of the image."""


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_timm_are_cut_exactly_and_every_group_is_believed(family: str) -> None:
    name, options, side = FAMILIES[family]
    torch.manual_seed(0)
    model = noisy(timm.create_model(name, num_classes=5, **options))
    inner, refused = check(model, (3, side, side), "dims" if family == "swin" else "whole")
    assert inner
    assert not refused


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_cut_exactly(name: str) -> None:
    assert check(noisy(artifact(name).model()), SIZE)[0]


def test_every_group_of_swin_tiny_is_believed_and_its_streams_are_cut_as_if_they_were_zero() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=64, window_size=2)
    size = (3, 64, 64)
    found, refused = trusted(model.eval(), groups_of(model, size)[0], size)
    # In each of 12 blocks attention and hidden units; the streams of 4 stages.
    assert (len(found), refused) == (28, {})
    assert sum(not group.inner for group in found) == 4
    kept = halved(found)
    less = pruned(noisy(model), kept)
    with torch.no_grad():
        assert off(less(noise(size)), silenced(model, kept)(noise(size))) <= EXACT
    attn: Any = less.get_submodule("layers.0.blocks.0.attn")
    assert attn.relative_position_bias_table.shape[1] == attn.num_heads == 1
    merging: Any = less.get_submodule("layers.1.downsample")
    stem: Any = less.get_submodule("patch_embed.proj")
    assert merging.norm.normalized_shape == (4 * stem.out_channels,)
    assert merging.reduction.in_features == 4 * stem.out_channels


# Norms over all channels


@pytest.mark.parametrize("norm", [LayerNorm2d, lambda width: nn.GroupNorm(1, width)], ids=["layer norm", "one group"])
def test_norms_over_all_channels_are_compared_over_those_that_stay(norm: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    model = noisy(Chain(nn.Conv2d(3, 8, 1), norm(8), nn.GELU(), nn.Conv2d(8, 6, 1), width=6))
    groups, _ = groups_of(model, SMALL)
    found, _ = trusted(model, groups, SMALL)
    first = found[0]
    assert not first.inner
    kept = [(first, [1, 2, 6])]
    with torch.no_grad():
        less, silent = pruned(model, kept)(noise(SMALL)), silenced(model, kept)(noise(SMALL))
        assert off(less, silent) <= EXACT
        assert off(zeroed(model, kept)(noise(SMALL)), less) > 1e-3, "its statistics change"


# Sizes after the cut


def test_a_grouped_convolution_keeps_whole_groups_and_says_so() -> None:
    model = noisy(TOYS["groups"][0]())
    found, _ = groups_of(model, SMALL)
    smaller: Any = pruned(model, [(found[0], [0, 2, 3])])
    conv = smaller.layers[1]
    assert (conv.groups, conv.in_channels, conv.out_channels, smaller.layers[0].out_channels) == (3, 9, 18, 9)
    depthwise = noisy(TOYS["depthwise"][0]())
    less: Any = pruned(depthwise, [(groups_of(depthwise, SMALL)[0][0], [1, 5, 6])])
    assert (less.layers[1].groups, less.layers[1].in_channels, less.layers[1].out_channels) == (3, 3, 3)
    normed = noisy(TOYS["group norm"][0]())
    fewer: Any = pruned(normed, [(groups_of(normed, SMALL)[0][0], [1])])
    assert (fewer.layers[1].num_groups, fewer.layers[1].num_channels) == (1, 3)


def test_cut_changes_the_network_in_place_and_pruned_and_silenced_do_not() -> None:
    model = noisy(TOYS["batch norm"][0]())
    before = copy.deepcopy(model.state_dict())
    kept = halved(groups_of(model, SMALL)[0])
    pruned(model, kept)
    silenced(model, kept)
    trusted(model, [group for group, _ in kept], SMALL)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    cut(model, positions(model.state_dict(), kept[:1]), {})
    assert model.get_parameter("layers.0.weight").shape[0] == len(kept[0][1])


# What is not believed


def shifted(group: Group, key: str, by: int) -> Group:
    """The group with the place of every channel in one tensor moved on."""
    members = tuple(
        replace(member, index=member.index.roll(by, 0)) if member.key == key else member for member in group.members
    )
    assert members != group.members
    return replace(group, members=members)


# An even shift would hide from a trial that cuts every other unit.
@pytest.mark.parametrize("by", [1, 2, 4])
@pytest.mark.parametrize("wrong", [[0], [1], [0, 2], [0, 1, 2, 3]])
def test_a_wrong_group_is_refused_and_those_around_it_stay(wrong: list[int], by: int) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.5))]
    model = noisy(Chain(nn.Conv2d(3, 8, 1), *layers, width=8))
    groups, _ = groups_of(model, SMALL)
    names = [group.name for group in groups]
    groups = [
        shifted(group, group.name + ".weight", by) if number in wrong else group for number, group in enumerate(groups)
    ]
    found, refused = trusted(model, groups, SMALL)
    assert [group.name for group in found] == [name for number, name in enumerate(names) if number not in wrong]
    assert refused == {names[number]: NOT_EQUAL for number in wrong}


def test_two_groups_with_their_places_swapped_are_refused() -> None:
    torch.manual_seed(0)
    model = noisy(Chain(Branches(nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(16, 6, 1), width=6))
    one, two, third = groups_of(model, SMALL)[0]
    readers = one.members[-1], two.members[-1]
    assert all(member.reads for member in readers)
    swapped = [
        replace(group, members=(*group.members[:-1], reader))
        for group, reader in zip((one, two), readers[::-1], strict=True)
    ]
    found, refused = trusted(model, [*swapped, third], SMALL)
    assert found == [third]
    assert set(refused) == {one.name, two.name}


def test_a_wrong_group_is_refused_behind_a_layer_that_is_still_zero() -> None:
    torch.manual_seed(0)
    model = noisy(Chain(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), width=6))
    nn.init.zeros_(model.get_parameter("head.weight"))
    one, two = groups_of(model, SMALL)[0]
    found, _ = trusted(model, [shifted(one, "layers.2.weight", 1), two], SMALL)
    assert found == [two]


def test_a_group_of_one_unit_is_left_with_the_reason() -> None:
    model = noisy(Chain(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 6, 1), width=6))
    found, refused = trusted(model, groups_of(model, SMALL)[0], SMALL)
    assert [group.name for group in found] == ["layers.1"]
    assert refused == {"layers.0": SINGLE}


@pytest.mark.parametrize("units", range(2, 40))
def test_no_shift_takes_the_units_of_the_trial_to_themselves(units: int) -> None:
    drawn = some_of(units, torch.Generator().manual_seed(units))
    assert drawn == sorted(set(drawn))
    assert math.gcd(len(drawn), units) == 1
    for by in range(1, units):
        assert {(unit + by) % units for unit in drawn} != set(drawn)


# Networks of the user's own


class Transposed(nn.Module):
    """Mixes tokens as if they were channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tokens, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        out: Tensor = self.head((tokens + self.tokens(tokens.mT).mT).mean(1))
        return out


class Mixing(nn.Module):
    """A reshape that makes channels of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(32, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x).reshape(len(x), 4, 2, 4, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 32, 4, -1)
        out: Tensor = self.head(self.next(maps).relu().mean((2, 3)))
        return out


class Branching(nn.Module):
    """Goes where its input says, calls a layer twice, and takes a second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.never, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = self.twice(self.twice(self.stem(x)).relu())
        if mask is not None or float(x.mean()) > 10:
            maps = self.never(maps)
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


class Unusual(nn.Module):
    """Layers that no group knows how to cut, and more than one output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.attn, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.up(self.stem(x)).flatten(2).mT
        tokens = self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1)), tokens


class Single(nn.Module):
    """Makes a tensor of fp32, so that it cannot compute in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x).flatten(2)
        out: Tensor = self.head((maps @ torch.ones(maps.shape[2], 1))[:, :, 0])
        return out


class Unreachable(nn.Module):
    """Nothing it puts out depends on its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.stem(x)
        return x.mean((2, 3))


OWN: dict[str, Callable[[], nn.Module]] = {
    "transposed": Transposed,
    "mixing": Mixing,
    "branching": Branching,
    "unusual": Unusual,
    "single": Single,
    "unreachable": Unreachable,
    "tied": lambda: Tied(5, 8),
}


@pytest.mark.parametrize("case", OWN)
def test_networks_of_the_users_own_are_cut_exactly_or_left_with_reasons(case: str) -> None:
    torch.manual_seed(0)
    model = noisy(OWN[case]())
    before = copy.deepcopy(model.state_dict())
    groups, left = groups_of(model, SMALL)
    found, refused = trusted(model, groups, SMALL)
    assert all(left.values())
    assert all(refused.values())
    assert {group.name for group in groups} == {group.name for group in found} | set(refused)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for group in found:
        kept = halved([group])
        with torch.no_grad():
            assert off(pruned(model, kept)(noise(SMALL)), silenced(model, kept)(noise(SMALL))) <= EXACT


def test_a_network_of_fp32_alone_is_tried_in_fp32() -> None:
    model = noisy(Single())
    groups, _ = groups_of(model, SMALL)
    assert [group.name for group in trusted(model, groups, SMALL)[0]] == ["stem"]
    assert not trusted(model, [shifted(groups[0], "head.weight", 1)], SMALL)[0]


def test_channels_that_a_reshape_mixes_are_not_believed() -> None:
    model = noisy(Mixing())
    found, _ = trusted(model, groups_of(model, SMALL)[0], SMALL)
    assert "stem" not in {group.name for group in found}
