"""A tail is what the teacher does, lets gradients through, and owns nothing."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.distill.tails import Tail, tail_of
from slim.passes.distill.taps import difference, outputs
from tests.passes.distill.pairs import SMALL, SWIN, TEACHERS, VIT, images, network, student, teacher

pytestmark = pytest.mark.usefixtures("one_thread")

EVA_VIT: dict[str, Any] = {**VIT, "dynamic_img_size": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **TEACHERS,
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "no prefix, mean pool": ("vit_base_patch16_siglip_gap_224", VIT),
    "registers": ("vit_small_patch14_reg4_dinov2", VIT),
    "clip": ("vit_base_patch16_clip_224", VIT),
    "shared biases": ("beit_base_patch16_224", {**VIT, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "swin v2": ("swinv2_tiny_window8_256", {**SWIN, "depths": (1, 1, 2)}),
    "convnext v2": ("convnextv2_atto", TEACHERS["convnext"][1]),
    "rope": ("vit_small_patch16_rope_224", VIT),
    "rope, any size": ("vit_small_patch16_rope_224", EVA_VIT),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", VIT),
    "rope mixed, any size": ("vit_small_patch16_rope_mixed_224", EVA_VIT),
    "dino v3": ("vit_small_patch16_dinov3", VIT),
    "eva without rope": ("eva_giant_patch14_224", {**VIT, "depth": 2}),
}


def through(model: nn.Module, tail: Tail, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What the tail makes of the teacher's own map, and what the teacher made of it."""
    with torch.no_grad():
        given = outputs(model, batch, indices=(tail.index,))
        tokens = given.maps[tail.index].flatten(2).transpose(1, 2)
        return tail(tokens, given.prefix.get(tail.index)), tail.target(model.forward_features(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_gives_the_final_features_of_the_teacher(kind: str) -> None:
    name, arguments = KINDS[kind]
    model = network(name, **arguments)
    tail = tail_of(model, SMALL)
    again, expected = through(model, tail, images(SMALL, 3, seed=7))
    assert difference(again, expected) <= 1e-5
    assert again.dtype == expected.dtype == torch.float32
    channels, height, width = tail.leaves
    assert again.shape == (3, height * width, channels)


@pytest.mark.parametrize("kind", ["vit", "beit", "shared biases", "rope", "rope mixed"])
def test_two_blocks_give_the_same_as_one(kind: str) -> None:
    name, arguments = KINDS[kind]
    model = network(name, **{**arguments, "depth": 3})
    for blocks in (1, 2):
        tail = tail_of(model, SMALL, blocks=blocks)
        assert tail.index == 2 - blocks
        assert difference(*through(model, tail, images(SMALL, seed=7))) <= 1e-5


@pytest.mark.parametrize(("depth", "blocks"), [(2, 1), (12, 1), (23, 1), (24, 2), (40, 3)])
def test_a_twelfth_of_the_blocks_is_re_used(depth: int, blocks: int) -> None:
    tail = tail_of(network("vit_tiny_patch16_224", **{**VIT, "embed_dim": 12, "depth": depth}), SMALL)
    assert (tail.blocks, tail.index) == (blocks, depth - 1 - blocks)


def test_shapes_are_those_before_and_after_the_last_stage() -> None:
    tail = tail_of(teacher("swin"), SMALL)
    assert (tail.index, tail.enters, tail.leaves) == (1, (32, 4, 4), (64, 2, 2))
    tail = tail_of(teacher("convnext"), (3, 64, 32))  # a grid that is no square
    assert (tail.index, tail.enters, tail.leaves) == (2, (32, 4, 2), (64, 2, 1))
    tail = tail_of(teacher("vit"), SMALL)
    assert (tail.index, tail.enters, tail.leaves) == (1, (48, 4, 4), (48, 4, 4))


@pytest.mark.parametrize("name", TEACHERS)
def test_gradients_reach_the_tokens_and_no_value_of_the_teacher(name: str) -> None:
    model = teacher(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tail = tail_of(model, SMALL)
    assert model.training
    channels, height, width = tail.enters
    tokens = torch.randn(2, height * width, channels, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tail(tokens, torch.zeros(2, getattr(model, "num_prefix_tokens", 0), channels)).square().sum().backward()
    assert tokens.grad.abs().amin((0, 2)).sum() > 0
    assert all(value.grad is None and not value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_in_bf16_takes_and_gives_float32(name: str) -> None:
    model = teacher(name)
    tail = tail_of(model, SMALL)
    exact, _ = through(model, tail, images(SMALL))
    model.bfloat16()  # after the tail was made: it follows the teacher
    channels, height, width = tail.enters
    again, expected = through(model, tail, images(SMALL).bfloat16())
    assert again.dtype == torch.float32
    assert torch.equal(again, expected)
    assert 0 < difference(again, exact) < 0.1  # bf16 has 8 bits; rounding adds up over the whole network
    tokens = torch.randn(2, height * width, channels, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prefix = torch.zeros(2, getattr(model, "num_prefix_tokens", 0), channels)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            given = tail(tokens, prefix)
        assert given.dtype == torch.float32
        (gradient,) = torch.autograd.grad(given.sum(), tokens)
        assert gradient.dtype == torch.float32
    tail_of(model, SMALL)


def test_a_module_that_holds_a_tail_does_not_hold_the_teacher() -> None:
    model = teacher("vit")
    holder = nn.Module()
    holder.tail = tail_of(model, SMALL)
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert copy.deepcopy(holder).tail is holder.tail


@pytest.mark.parametrize("vandal", ["norm", "blocks.2.attn.qkv"])
def test_a_tail_that_is_not_what_the_network_does_is_refused(vandal: str) -> None:
    model = network("vit_tiny_patch16_224", **VIT)
    features = model.forward_intermediates

    @functools.wraps(features)
    def changed(*given: Any, **arguments: Any) -> Any:
        hook = model.get_submodule(vandal).register_forward_hook(lambda _module, _given, out: out * 1.1)
        try:
            return features(*given, **arguments)
        finally:
            hook.remove()

    model.forward_intermediates = changed
    reason = "the last 1 blocks of teacher VisionTransformer give other features than the network, off by"
    with pytest.raises(PassError, match=reason):
        tail_of(model, SMALL)


def test_networks_without_a_tail_are_refused() -> None:
    reason = (
        "teacher ResNet has no last stage to send features through; "
        "take a Swin, ViT, DeiT3, BEiT or ConvNeXt as teacher, or --method kd"
    )
    with pytest.raises(PassError, match=reason):
        tail_of(student("resnet")[0], SMALL)


@pytest.mark.parametrize("blocks", [0, 3, 4])
def test_blocks_that_do_not_leave_one_before_them_are_refused(blocks: int) -> None:
    reason = f"teacher VisionTransformer has 3 blocks, {blocks} of them at its end cannot be re-used; at least 1 and"
    with pytest.raises(PassError, match=reason):
        tail_of(teacher("vit"), SMALL, blocks=blocks)


def test_blocks_are_of_networks_that_have_blocks_alone() -> None:
    with pytest.raises(PassError, match="tail_blocks 2 counts blocks of a ViT; SwinTransformer re-uses its last stage"):
        tail_of(teacher("swin"), SMALL, blocks=2)
