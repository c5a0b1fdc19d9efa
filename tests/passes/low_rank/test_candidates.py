"""Which layers may be factored, with which inputs, and what is said of every other one."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.low_rank.candidates import candidates
from tests.contract import zoo
from tests.contract.zoo import SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")
SQUEEZED = "squeeze-and-excitation"


class Kinds(nn.Module):
    """One layer for every reason there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)  # three inputs
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)  # 8 to 8 in each group
        self.pointwise = nn.Conv2d(16, 32, 1, stride=2)
        self.twice = nn.Linear(32, 32)
        self.read = nn.Linear(32, 32)
        self.zero = nn.Linear(32, 32)
        self.unwanted = nn.Linear(32, 32)
        self.pair = nn.Sequential(nn.Linear(32, 20, bias=False), nn.Linear(20, 32))
        self.head = nn.Linear(32, 10)
        nn.init.zeros_(self.zero.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pointwise(self.grouped(self.depthwise(self.stem(images)))).mean((2, 3))
        features = self.twice(self.twice(features)) + nn.functional.linear(features, self.read.weight)
        logits: Tensor = self.head(self.pair(self.unwanted(self.zero(features))))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def test_every_layer_is_a_candidate_or_has_a_reason() -> None:
    found, dense = candidates(Kinds(), SIZE, min_width=16, skip=("unw*",), factored=frozenset({"pair"}))
    assert {one.name: (one.size, one.calls) for one in found} == {"pointwise": ((16, 8, 8), 1), "twice": ((32,), 2)}
    assert dense == {
        "stem": "narrower than min_width 16",
        "grouped": "narrower than min_width 16",
        "read": "its weight is read directly, not called",
        "zero": "its weight is zero",
        "unwanted": "in skip",
        "pair.0": "factored by a step before",
        "pair.1": "factored by a step before",
        "head": "classifier",
    }


def test_a_candidate_is_the_layer_of_the_network_itself() -> None:
    model = Kinds()
    found, _ = candidates(model, SIZE, min_width=8)
    assert all(one.layer is model.get_submodule(one.name) for one in found)
    # Widths count for one group: with 8, the grouped layer joins; the pair, of which no step is known, is two layers.
    assert {"grouped", "pair.0", "pair.1"} < {one.name for one in found}


def test_a_factored_layer_of_the_same_beginning_is_not_taken_for_the_pair() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32)))
    found, dense = candidates(model, (3, 8, 32), min_width=16, factored=frozenset({"1"}))
    assert ([one.name for one in found], dense) == (["0"], {"1.0": "factored by a step before"})


def test_layers_that_share_a_weight_stay_for_two_pairs_would_not() -> None:
    tied = zoo.tied(10, width=32).eval()
    found, dense = candidates(tied, SIZE, min_width=16)
    assert (found, dense["first"], dense["second"]) == ([], "its weight is shared", "its weight is shared")
    # One layer in two places: only one of them would become a pair.
    layer = nn.Linear(32, 32)
    found, dense = candidates(nn.Sequential(layer, nn.Linear(32, 32), layer), (3, 8, 32), min_width=16)
    assert ([one.name for one in found], dense) == (["1"], {"0": "its weight is shared"})


def test_a_linear_layer_is_seen_with_all_dimensions_but_the_batch() -> None:
    found, _ = candidates(artifact("mixer").model(), SIZE, min_width=16)
    sizes = {one.name: one.size for one in found}
    # 16 patches of 32 channels; the layers that mix tokens get them transposed.
    assert sizes["blocks.0.mlp_tokens.fc1"] == (32, 16)
    assert sizes["blocks.0.mlp_channels.fc1"] == (16, 32)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_b0", "regnety_002", "ese_vovnet19b_dw"])
def test_squeeze_and_excitation_stays_whatever_its_width(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    found, dense = candidates(model, SIZE, min_width=4)
    squeezes = {layer for layer, reason in dense.items() if reason == SQUEEZED}
    inside = {
        layer
        for layer, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and {"se", "attn"} & set(layer.split(".")[:-1])
    }
    assert squeezes == inside
    assert squeezes
    assert {one.name for one in found}.isdisjoint(squeezes)


def test_depthwise_convolutions_are_not_even_mentioned() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    found, dense = candidates(model, SIZE, min_width=4)
    depthwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1}
    assert len(depthwise) == 11
    assert depthwise.isdisjoint({one.name for one in found} | dense.keys())


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_a_convolution_that_computes_with_another_weight_than_it_holds_is_not_even_mentioned(
    kind: type[nn.Module],
) -> None:
    model = nn.Sequential(kind(3, 32, 3), kind(32, 32, 3), Conv2dSame(32, 32, 3))
    found, dense = candidates(model, SIZE, min_width=16)
    assert ([one.name for one in found], dense) == (["2"], {})


def test_attention_that_reads_its_weight_is_told_from_attention_that_calls_it() -> None:
    reads, calls = (candidates(artifact(name).model(), SIZE, min_width=16) for name in ("beit", "vit"))
    assert reads[1]["blocks.0.attn.qkv"] == "its weight is read directly, not called"
    assert "blocks.0.attn.proj" in {one.name for one in reads[0]}
    assert "blocks.0.attn.qkv" in {one.name for one in calls[0]}


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left_not_even_by_a_network_that_fails(fails: bool) -> None:
    model = artifact("vit").model()
    if fails:
        with pytest.raises(AssertionError, match="Input height"):  # timm's
            candidates(model, (3, 31, 31), min_width=16)
    else:
        candidates(model, SIZE, min_width=16)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_no_value_and_no_mode_is_changed() -> None:
    model = artifact("resnet").model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    candidates(model, SIZE, min_width=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_patterns_of_skip_match_whole_names() -> None:
    model = artifact("vit").model()
    everything = {one.name for one in candidates(model, SIZE, min_width=16)[0]}
    found, dense = candidates(model, SIZE, min_width=16, skip=("blocks.[1-9].*", "*.fc1"))
    skipped = {name for name, reason in dense.items() if reason == "in skip"}
    assert {one.name for one in found} == {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc2"}
    assert skipped == everything - {one.name for one in found}
    with pytest.raises(
        PassError, match=r"^low-rank: skip 'fc1' matches no layer; names are such as 'patch_embed.proj'$"
    ):
        candidates(model, SIZE, min_width=16, skip=("blocks.*", "fc1"))


def test_a_layer_that_stays_anyway_may_hold_anything() -> None:
    model = Kinds()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
        model.grouped.weight[0, 0] = torch.nan
    assert len(candidates(model, SIZE, min_width=16)[0]) > 0
    with pytest.raises(PassError, match=r"^low-rank: layer 'grouped' holds values that are not finite; start from"):
        candidates(model, SIZE, min_width=8)
