"""Groups: which channels belong together, by hand on toys and in timm's families, and why others are left."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from slim import surgery
from slim.passes.prune.groups import (
    TIED,
    UNCALLED,
    Group,
    Member,
    attributes,
    groups_of,
    is_attention,
    positions,
    spans,
)
from tests.contract.zoo import SIZE, ZOO, Tied, artifact
from tests.passes.prune.toys import SWIN, Chain

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (3, 8, 8)


def group(model: nn.Module, name: str, size: tuple[int, int, int] = SMALL, **options: Any) -> Group:
    found, left = groups_of(model.eval(), size, **options)
    assert name in {one.name for one in found}, left
    return next(one for one in found if one.name == name)


def indices(one: Group) -> dict[tuple[str, int], list[list[int]]]:
    return {(member.key, member.dim): member.index.tolist() for member in one.members}


# The two functions of what is kept


def by_hand() -> Group:
    members = (
        Member("a.weight", 0, torch.tensor([[0, 1], [2, 3], [4, 5]])),
        Member("b.weight", 1, torch.tensor([[1], [2], [3]]), reads=True),
    )
    return Group("a", "channels", 3, 2, members, True, {"a": {"groups": 2}})


def test_positions_are_all_that_no_cut_unit_lies_at() -> None:
    state = {"a.weight": torch.zeros(6, 2), "b.weight": torch.zeros(2, 5), "c.weight": torch.zeros(4)}
    found = positions(state, [(by_hand(), [0, 2])])
    assert found == {"a.weight": {0: [0, 1, 4, 5]}, "b.weight": {1: [0, 1, 3, 4]}}


def test_groups_that_share_a_tensor_each_take_their_own_places() -> None:
    state = {"norm.weight": torch.zeros(5)}
    first = Group("a", "channels", 2, 1, (Member("norm.weight", 0, torch.tensor([[0], [1]])),), True)
    second = Group("b", "channels", 3, 1, (Member("norm.weight", 0, torch.tensor([[2], [3], [4]])),), True)
    assert positions(state, [(first, [1]), (second, [0, 2])]) == {"norm.weight": {0: [1, 2, 4]}}


def test_attributes_are_shares_times_units_and_the_scale_follows_the_width() -> None:
    # 16 dimensions have scale 1/4 and 4 have 1/2.
    dims = Group("b:dims", "dims", 16, 2, (), True, {"b": {"head_dim": 1, "attn_dim": 2}}, scale=0.25)
    assert attributes([(by_hand(), 2), (dims, 4)]) == {
        "a": {"groups": 4},
        "b": {"head_dim": 4, "attn_dim": 8, "scale": 0.5},
    }


def test_a_group_says_its_width_its_readers_and_its_makers() -> None:
    one = by_hand()
    assert (one.width, one.readers, one.makers) == (6, ("b",), ("a",))


# What belongs together


def test_a_channel_is_a_row_of_its_layer_an_entry_of_its_norm_and_a_column_of_its_reader() -> None:
    model = Chain(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), width=6)
    found = group(model, "layers.0")
    each = [[0], [1], [2], [3]]
    norm = {("layers.1." + key, 0): each for key in ("weight", "bias", "running_mean", "running_var")}
    assert indices(found) == {
        ("layers.0.weight", 0): each,
        ("layers.0.bias", 0): each,
        **norm,
        ("layers.3.weight", 1): each,
    }
    assert found.inner
    assert (found.readers, found.makers) == (("layers.3",), ("layers.0", "layers.1"))


def test_channels_before_a_flattening_are_runs_of_columns() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.hidden, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4 * 64, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.hidden(self.conv(x).flatten(1)))
            return out

    # 8 x 8 positions of each channel.
    expected = torch.arange(256).view(4, 64).tolist()
    assert indices(group(Flat(), "conv"))[("hidden.weight", 1)] == expected


def test_units_of_a_grouped_convolution_are_its_groups() -> None:
    model = Chain(
        nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(24, 6, 1), width=6
    )
    found = group(model, "layers.0")
    assert (found.units, found.unit) == (4, 3)
    assert found.attributes(3) == {"layers.1": {"groups": 3}}
    assert indices(found)[("layers.0.weight", 0)][1] == [3, 4, 5]
    assert indices(found)[("layers.1.weight", 0)][1] == [6, 7, 8, 9, 10, 11]
    assert indices(found)[("layers.3.weight", 1)][3] == [18, 19, 20, 21, 22, 23]
    assert ("layers.1.weight", 1) not in indices(found), "each group reads its own channels already"


def test_units_of_two_grouped_convolutions_are_whole_groups_of_both() -> None:
    model = Chain(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 1, groups=4), nn.Conv2d(24, 24, 1, groups=6), width=24)
    model.layers.append(nn.Conv2d(24, 24, 1))
    found = group(model, "layers.0")
    # The greatest common divisor of 4 and 6 is 2.
    assert (found.units, found.unit) == (2, 12)
    assert found.attributes(1) == {"layers.1": {"groups": 2}, "layers.2": {"groups": 3}}


def test_grouped_convolutions_in_a_residual_branch_are_of_one_group() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.one, self.two = nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 8, 1, groups=4)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.stem(x)
            out: Tensor = self.head((stream + self.two(self.one(stream))).mean((2, 3)))
            return out

    found = group(Residual(), "stem")
    assert (found.units, found.unit, found.inner) == (4, 2, False)
    assert found.attributes(2) == {"one": {"groups": 2}, "two": {"groups": 2}}


@pytest.mark.parametrize("times", [1, 3])
def test_a_depthwise_convolution_has_one_group_for_each_channel_before_it(times: int) -> None:
    model = Chain(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6 * times, 3, groups=6), nn.Conv2d(6 * times, 4, 1), nn.Identity(), width=4
    )
    found = group(model, "layers.0")
    assert (found.units, found.unit) == (6, 1)
    assert found.attributes(4) == {"layers.1": {"groups": 4}}
    assert indices(found)[("layers.2.weight", 1)][1] == list(range(times, 2 * times))


@pytest.mark.parametrize(("parts", "inner"), [(1, False), (4, True), (8, True)])
def test_units_of_a_group_norm_are_its_groups_and_a_norm_over_all_channels_is_not_inner(
    parts: int, inner: bool
) -> None:
    model = Chain(nn.Conv2d(3, 8, 1), nn.GroupNorm(parts, 8), nn.ReLU(), nn.Conv2d(8, 6, 1), width=6)
    found = group(model, "layers.0")
    assert found.inner == inner
    assert (found.units, found.unit) == ((8, 1) if parts == 1 else (parts, 8 // parts))
    assert found.attributes(1) == ({} if parts == 1 else {"layers.1": {"num_groups": 1}})
    assert spans(model.layers[1]) == (parts == 1)


class Joined(nn.Module):
    """Two layers side by side, and two that read both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.third, self.head = nn.Conv2d(10, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(torch.cat([self.one(x), self.two(x)], 1).relu()).mean((2, 3)))
        return out


def test_channels_behind_a_concatenation_are_shifted() -> None:
    assert indices(group(Joined(), "one"))[("third.weight", 1)] == [[0], [1], [2], [3]]
    assert indices(group(Joined(), "two"))[("third.weight", 1)] == [[4], [5], [6], [7], [8], [9]]


# Attention


def vit() -> nn.Module:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options).eval()
    return model


def test_a_head_is_its_rows_of_queries_keys_and_values_and_its_columns_of_the_projection() -> None:
    found = group(vit(), "blocks.0.attn.qkv:heads", (3, 32, 32))
    # 3 heads of 4 dimensions: queries are the rows 0..11, keys 12..23, values 24..35.
    second = [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]
    assert (found.kind, found.units, found.unit, found.inner) == ("heads", 3, 4, True)
    assert {key: index[1] for key, index in indices(found).items()} == {
        ("blocks.0.attn.qkv.weight", 0): second,
        ("blocks.0.attn.qkv.bias", 0): second,
        ("blocks.0.attn.proj.weight", 1): [4, 5, 6, 7],
    }
    assert found.attributes(2) == {"blocks.0.attn": {"num_heads": 2, "attn_dim": 8}}


def test_a_dimension_is_a_row_of_every_heads_queries_keys_and_values() -> None:
    found = group(vit(), "blocks.0.attn.qkv:dims", (3, 32, 32), heads="dims")
    assert (found.kind, found.units, found.unit) == ("dims", 4, 3)
    assert indices(found)[("blocks.0.attn.qkv.weight", 0)][1] == [1, 5, 9, 13, 17, 21, 25, 29, 33]
    assert indices(found)[("blocks.0.attn.proj.weight", 1)][1] == [1, 5, 9]
    # The scale of 4 dimensions is 1/2, that of one is 1.
    assert found.attributes(1) == {"blocks.0.attn": {"head_dim": 1, "attn_dim": 3, "scale": 1.0}}


def test_swins_table_of_relative_positions_has_a_column_for_each_head() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SWIN)
    found = group(model, "layers.2.blocks.0.attn.qkv:heads", (3, 64, 64))
    assert indices(found)[("layers.2.blocks.0.attn.relative_position_bias_table", 1)] == [[0], [1], [2], [3]]


ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "gated": ({"gated": True}, "whole", "gated or normalised"),
    "normed over heads": ({"scale_norm": True, "norm_layer": nn.LayerNorm}, "whole", "gated or normalised"),
    "normed queries": ({"qk_norm": True, "norm_layer": nn.LayerNorm}, "dims", "queries and keys are normalised"),
    "none": ({}, "none", "heads is none"),
}


class Attending(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.stem, self.attn, self.head = nn.Conv2d(3, 12, 4, stride=4), attn, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        out: Tensor = self.head((tokens + self.attn(tokens)).mean(1))
        return out


@pytest.mark.parametrize("case", ODD)
def test_attention_that_cannot_be_cut_is_left_with_the_reason(case: str) -> None:
    options, heads, reason = ODD[case]
    model = Attending(Attention(12, num_heads=3, **options)).eval()
    found, left = groups_of(model, SMALL, heads=cast(Literal["whole", "dims", "none"], heads))
    assert not [one for one in found if one.kind != "channels"]
    assert reason in left["attn.qkv"]


def test_heads_of_attention_with_normalised_queries_can_go_whole() -> None:
    model = Attending(Attention(12, num_heads=3, qk_norm=True, norm_layer=nn.LayerNorm))
    assert group(model, "attn.qkv:heads").units == 3


def test_a_users_module_that_only_has_the_name_of_attention_is_left() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v))
            return out

    Own.__name__ = "Attention"
    assert is_attention(Own())
    _, left = groups_of(Attending(Own()).eval(), SMALL)
    assert left["attn.qkv"] == "it does not say its heads or their scale"


# Networks


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_of_the_zoo_is_in_a_group_or_left_with_a_reason(name: str) -> None:
    model = artifact(name).model()
    found, left = groups_of(model, SIZE)
    made = {layer for one in found for layer in one.makers} | set(left)
    layers = {key for key, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers <= made
    assert not {one.name for one in found} & set(left)


@pytest.mark.parametrize("name", ZOO)
def test_the_network_is_left_bit_identical_and_the_groups_are_the_same_each_time(name: str) -> None:
    model = artifact(name).model().eval()
    before = copy.deepcopy(model.state_dict())
    flags = [value.requires_grad for value in model.parameters()]
    generator = torch.get_rng_state()
    one, left = groups_of(model, SIZE)
    two, again = groups_of(model, SIZE)
    assert [(each.name, indices(each), each.per_unit) for each in one] == [
        (each.name, indices(each), each.per_unit) for each in two
    ]
    assert left == again
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert flags == [value.requires_grad for value in model.parameters()]
    assert not any(module.training or module._forward_hooks for module in model.modules())
    assert torch.equal(generator, torch.get_rng_state())


def test_groups_are_in_the_order_of_the_network() -> None:
    model = artifact("vit").model()
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    found = [order[one.name.partition(":")[0]] for one in groups_of(model, SIZE)[0]]
    assert found == sorted(found)


def test_classifiers_keep_their_classes() -> None:
    for name in ("resnet", "convnext", "vit"):
        model = artifact(name).model()
        found, left = groups_of(model, SIZE)
        (head,) = surgery.classifiers(model)
        assert left[head] == "classifier"
        assert all(head not in one.makers for one in found)


def test_the_residual_stream_is_not_inner_and_what_stays_in_a_block_is() -> None:
    model = artifact("resnet").model()
    inner = {one.name: one.inner for one in groups_of(model, SIZE)[0]}
    assert inner["layer1.0.conv1"]
    assert inner["layer1.0.conv2"]
    assert not inner["layer1.0.conv3"]


def test_what_is_behind_squeeze_and_excitation_is_of_the_group() -> None:
    model = timm.create_model("tinynet_e", num_classes=5)
    found, _ = groups_of(model.eval(), (3, 32, 32))
    key = "blocks.1.0.se.conv_expand.weight"
    wide = next(one for one in found if any(member.key == key for member in one.members))
    assert {"blocks.1.0.conv_pw", "blocks.1.0.conv_dw", "blocks.1.0.se.conv_expand"} <= set(wide.makers)
    assert {"blocks.1.0.se.conv_reduce", "blocks.1.0.conv_pwl"} <= set(wide.readers)


def test_merging_of_patches_reads_each_channel_of_four_neighbours() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SWIN)
    found = indices(group(model, "patch_embed.proj", (3, 64, 64)))
    # 12 channels of 4 neighbours, one neighbour after the other.
    for key, dim in (("norm.weight", 0), ("norm.bias", 0), ("reduction.weight", 1)):
        assert found[(f"layers.1.downsample.{key}", dim)][1] == [1, 13, 25, 37]


def test_layers_that_are_not_called_are_left() -> None:
    model = Chain(nn.Conv2d(3, 4, 1), width=4)
    model.register_module("unused", nn.Linear(3, 3))
    assert groups_of(model.eval(), SMALL)[1]["unused"] == UNCALLED


def test_layers_that_share_a_weight_are_left() -> None:
    found, left = groups_of(Tied(5, 8).eval(), (3, 8, 8))
    assert {name: reason for name, reason in left.items() if name != "head"} == dict.fromkeys(
        ("stem", "first", "second"), TIED
    )
    assert [one.name for one in found] == ["head"], "without get_classifier nobody knows that it is one"


def test_a_network_that_cannot_be_traced_leaves_every_layer_with_the_reason() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        @torch.no_grad()
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            raise NotImplementedError("some other\nsize") if other is None else TypeError("two images as two arguments")

    found, left = groups_of(Frozen().eval(), SMALL)
    assert not found
    assert left == dict.fromkeys(("one", "two"), "torch-pruning cannot trace the network (some other size)")
