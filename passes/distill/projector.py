"""Cross-attention projector: a student map becomes tokens on the teacher's grid and of its width.

ScaleKD (Fan et al. 2024, arXiv:2411.06786). Queries stand for the teacher's positions, keys and values are the
student's positions, so neither grids nor widths need agree. No residual leads from the queries to the output: what
comes out is made of student features only. Trained along with the student, then thrown away.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from slim.errors import PassError
from slim.passes.distill.taps import Shape, shape_of

Stem = Literal["conv3", "dw3", "pw256"]
STEMS: tuple[Stem, ...] = get_args(Stem)
NARROW = 256
"""Channels that `pw256` leaves; a map that has fewer keeps its own."""


class CrossAttentionProjector(nn.Module):
    """A map (B, C, H, W) to tokens (B, N, width).

    Keys and values are ReLU(norm(stem(map))) + P, with P learned, one value per channel and position. Queries are
    ReLU(Linear(Q)), with Q learned or given. Attention, LayerNorm, then a feed-forward net around which the normed
    tokens are added.
    """

    def __init__(
        self,
        source: Shape,
        width: int,
        *,
        heads: int,
        queries: int | None,
        qk_scale: float = 5.0,
        stem: Stem = "conv3",
        batch_norm: bool = True,
    ) -> None:
        """Values are drawn from the global generator, as torch's modules draw theirs.

        Args:
            source: (C, H, W) of the student's map.
            width: channels of the teacher.
            heads: of the attention; divide `width`.
            queries: N, the learned queries; None when queries are given with every call.
            qk_scale: factor on the scaled dot products, so attention starts sharper than uniform.
            stem: conv3 as in the paper; dw3 one 3 x 3 filter per channel; pw256 a 1 x 1 to at most 256 channels.
            batch_norm: after the stem; False is LayerNorm over channels.
        """
        super().__init__()
        assert width % heads == 0
        self.source, self.heads = source, heads
        self.scale = qk_scale * (width // heads) ** -0.5
        channels, height, grid_width = source
        keyed = min(channels, NARROW) if stem == "pw256" else channels
        if stem == "pw256":
            first = nn.Conv2d(channels, keyed, 1)
        else:
            first = nn.Conv2d(channels, keyed, 3, padding=1, groups=channels if stem == "dw3" else 1)
        norm = nn.BatchNorm2d(keyed) if batch_norm else LayerNorm2d(keyed)
        self.stem = nn.Sequential(first, norm, nn.ReLU())
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, keyed, height, grid_width), std=0.02))
        self.queries = None if queries is None else nn.Parameter(torch.randn(1, queries, width))
        self.query_stem = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(keyed, width), nn.Linear(keyed, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, maps: Tensor, queries: Tensor | None = None) -> Tensor:
        """(B, N, width) tokens of maps (B, C, H, W).

        Args:
            maps: of the student, in any floating dtype.
            queries: (B, N, width); instead of learned ones.

        Raises:
            PassError: the maps have another size than the projector was made for.
        """
        if shape_of(maps) != self.source:
            raise PassError(
                f"scalekd: a student map is {shape_of(maps)}, the projector was made for {self.source} (channels, "
                "height, width); train at the input size it was placed for"
            )
        assert (queries is None) != (self.queries is None)
        chosen = cast(Tensor, self.queries if queries is None else queries).expand(len(maps), -1, -1)
        keyed = (self.stem(maps.to(self.positions.dtype)) + self.positions).flatten(2).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(
            self._split(self.query(self.query_stem(chosen))),
            self._split(self.key(keyed)),
            self._split(self.value(keyed)),
            scale=self.scale,
        )
        normed = self.norm(self.output(attended.transpose(1, 2).flatten(2)))
        tokens: Tensor = normed + self.feed_forward(normed)
        return tokens

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to (B, heads, N, width / heads)."""
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)
