"""The teacher's last stage, frozen but differentiable: what ScaleKD sends the student's features through.

A tail takes tokens where the teacher's own map enters its last stage and gives the teacher's final patch tokens. It
computes with the teacher's modules in place, so it owns no parameters and follows the teacher to its device and dtype.
Swin: last stage and closing norm. ConvNeXt: last stage and `norm_pre` (its norm belongs to the head). ViT, DeiT, BEiT,
EVA: last blocks and closing norm, with the teacher's own prefix tokens in front. Other networks have no tail here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.distill.taps import TOLERANCE, Shape, difference, outputs, probe, shape_of
from slim.surgery import in_eval


class Tail(ABC):
    """The last stage of one teacher. Not a Module: whoever holds it must not come to own the teacher's values."""

    stage: ClassVar[str] = "layers"
    """Attribute of the network that lists what the tail is the end of."""

    def __init__(self, model: nn.Module, blocks: int) -> None:
        network: Any = model
        self.network = network
        self.blocks = blocks
        """How many of the listed stages or blocks are re-used."""
        self.index = len(getattr(network, self.stage)) - 1 - blocks
        """Index of `forward_intermediates` whose map feeds the tail."""
        self.enters: Shape = (0, 0, 0)
        """(C, H, W) of that map; set by `tail_of`, as `leaves` is."""
        self.leaves: Shape = (0, 0, 0)
        """(C', H', W') of the patch tokens it gives."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tail:
        return self  # the copy of a method learns from the same teacher

    def __call__(self, tokens: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(B, H'*W', C') float32 final patch tokens of (B, H*W, C) tokens; gradients reach the tokens.

        Args:
            tokens: in row-major order of the grid, any floating dtype.
            prefix: (B, P, C), the teacher's own prefix tokens at `index`; where it has such tokens.
        """
        channels, height, width = self.enters
        assert tokens.shape[1:] == (height * width, channels), f"tokens {tuple(tokens.shape)}, enters {self.enters}"
        dtype = next(self.network.parameters()).dtype
        return self.run(tokens.to(dtype), None if prefix is None else prefix.to(dtype)).float()

    def target(self, final: Tensor) -> Tensor:
        """(B, H'*W', C') float32 patch tokens of what the teacher's `forward_features` gave."""
        return self.patches(final).float()

    @abstractmethod
    def run(self, tokens: Tensor, prefix: Tensor | None) -> Tensor:
        """Tokens in the teacher's dtype through its modules."""

    @abstractmethod
    def patches(self, final: Tensor) -> Tensor:
        """Final features as patch tokens."""


class SwinTail(Tail):
    """Downsampling, blocks and norm; tokens lie on the grid, channels last."""

    def run(self, tokens: Tensor, prefix: Tensor | None) -> Tensor:
        """See `Tail`; the network has no prefix tokens."""
        channels, height, width = self.enters
        maps = tokens.reshape(-1, height, width, channels)
        return self.patches(self.network.norm(self.network.layers[-1](maps)))

    def patches(self, final: Tensor) -> Tensor:
        """(B, H', W', C') to (B, H'*W', C')."""
        return final.flatten(1, 2)


class ConvNextTail(Tail):
    """Downsampling and blocks; channels first."""

    stage: ClassVar[str] = "stages"

    def run(self, tokens: Tensor, prefix: Tensor | None) -> Tensor:
        """See `Tail`; the network has no prefix tokens."""
        maps = tokens.transpose(1, 2).reshape(-1, *self.enters)
        return self.patches(self.network.norm_pre(self.network.stages[-1](maps)))

    def patches(self, final: Tensor) -> Tensor:
        """(B, C', H', W') to (B, H'*W', C')."""
        return final.flatten(2).transpose(1, 2)


class BlocksTail(Tail):
    """The last blocks of a network whose tokens share one grid."""

    stage: ClassVar[str] = "blocks"

    def run(self, tokens: Tensor, prefix: Tensor | None) -> Tensor:
        """See `Tail`."""
        if self.network.num_prefix_tokens:
            assert prefix is not None, "a network with prefix tokens gave none"
            tokens = torch.cat((prefix, tokens), dim=1)
        for position in range(self.index + 1, self.index + 1 + self.blocks):
            tokens = self.network.blocks[position](tokens, **self.arguments(position))
        return self.patches(self.network.norm(tokens))

    def arguments(self, position: int) -> dict[str, Any]:
        """What the network hands the block at `position` along with the tokens."""
        return {}

    def patches(self, final: Tensor) -> Tensor:
        """(B, P + H'*W', C') to (B, H'*W', C')."""
        return final[:, self.network.num_prefix_tokens :]


class BeitTail(BlocksTail):
    """Each block has its own table of position biases, or all share one."""

    def arguments(self, position: int) -> dict[str, Any]:
        """The shared biases, if the network has them."""
        shared = self.network.rel_pos_bias
        return {"shared_rel_pos_bias": None if shared is None else shared()}


class EvaTail(BlocksTail):
    """Queries and keys are turned by their positions; the turns are of the network, or of each block (mixed)."""

    def arguments(self, position: int) -> dict[str, Any]:
        """The turns for the teacher's grid, got the way the network gets them."""
        rope = self.network.rope
        if rope is None:
            return {}
        stored = hasattr(rope, "feat_shape") and not self.network.dynamic_img_size
        turns = rope.get_embed() if stored else rope.get_embed(shape=self.enters[1:])
        return {"rope": turns[position] if self.network.rope_mixed else turns}


KINDS: tuple[tuple[type[nn.Module], type[Tail]], ...] = (
    (SwinTransformer, SwinTail),
    (SwinTransformerV2, SwinTail),
    (ConvNeXt, ConvNextTail),
    (Beit, BeitTail),
    (Eva, EvaTail),
    (VisionTransformer, BlocksTail),
)
"""Network -> its tail. DeiT and DeiT 3 are VisionTransformer in timm."""


def tail_of(model: nn.Module, size: Shape, *, blocks: int | None = None) -> Tail:
    """The tail of a teacher that reads images of `size`. Freezes the teacher's values.

    Args:
        model: the teacher; its mode is kept.
        size: (channels, height, width) of the images it is given.
        blocks: how many of the last blocks of a ViT, DeiT, BEiT or EVA; None is a twelfth of them, at least one.

    Raises:
        PassError: networks of this kind have no tail, `blocks` does not fit, or the tail is not what the network does.
    """
    kind, name = next((tail for network, tail in KINDS if isinstance(model, network)), None), type(model).__name__
    if kind is None:
        raise PassError(
            f"scalekd: teacher {name} has no last stage to send features through; take a Swin, ViT, DeiT3, BEiT or "
            "ConvNeXt as teacher, or --method kd"
        )
    depth = len(getattr(model, kind.stage))
    if not issubclass(kind, BlocksTail):
        if blocks is not None:
            raise PassError(f"scalekd: tail_blocks {blocks} counts blocks of a ViT; {name} re-uses its last stage")
        chosen = 1
    else:
        chosen = max(1, depth // 12) if blocks is None else blocks
    if not 1 <= chosen < depth:
        raise PassError(
            f"scalekd: teacher {name} has {depth} {kind.stage}, {chosen} of them at its end cannot be re-used; "
            f"at least 1 and fewer than {depth}, or another teacher"
        )
    tail = kind(model, chosen)
    model.requires_grad_(False)
    _verify(tail, model, size)
    return tail


def _verify(tail: Tail, model: nn.Module, size: Shape) -> None:
    """Set the shapes, and compare the tail with the network on random images."""
    with in_eval(model):
        given = outputs(model, probe(model, size), indices=(tail.index, tail.index + tail.blocks), final=True)
        before, after = given.maps[tail.index], given.maps[tail.index + tail.blocks]
        tail.enters, tail.leaves = shape_of(before), shape_of(after)
        assert given.final is not None
        expected = tail.target(given.final)
        error = difference(tail(before.flatten(2).transpose(1, 2), given.prefix.get(tail.index)), expected)
    if not error <= TOLERANCE:
        raise PassError(
            f"scalekd: the last {tail.blocks} {tail.stage} of teacher {type(model).__name__} give other features than "
            f"the network, off by {error:.2g} of the largest ({TOLERANCE:g} allowed); take another teacher, or "
            "--method kd"
        )
