"""ScaleKD: a student of any kind mimics the final features of a pre-trained vision transformer.

Fan et al. 2024 (arXiv:2411.06786). Cross-attention projectors turn the student's last two maps into tokens of the
teacher. The early ones go through the teacher's frozen last stage and come out as a first guess of its final features
(the proxy path); the late ones, asked by that guess, give a second (the main path). Both guesses are compared with the
final features in two views: as they are, and with their spatial mean taken away, which the mean would else drown.
Does not learn from logits or labels; add a method that does. The student itself is not changed.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from slim.errors import PassError
from slim.passes.distill import taps
from slim.passes.distill.method import Method, Outputs
from slim.passes.distill.projector import STEMS, CrossAttentionProjector, Stem
from slim.passes.distill.tails import Tail, tail_of
from slim.passes.distill.taps import Shape

View = Literal["ori", "alt"]
VIEWS: tuple[View, ...] = get_args(View)
SUMMED = {"ori": 0.08, "alt": 0.06}
"""Weight of each view when distances are summed over the tokens, as in the paper."""
MEANED = {"ori": 3.92, "alt": 2.94}
"""The same for the mean over tokens: equal at the paper's 7 x 7 tokens, and not growing with the grid."""
EPS = {"ori": 1e-6, "alt": 1e-3}
"""Least norm a token is divided by. Without its mean a map may be all but zero, and rounding would be blown up."""


def without_mean(tokens: Tensor) -> Tensor:
    """(B, N, C) minus the mean over N, which is the map without the first coefficient of its 2-D DCT."""
    return tokens - tokens.mean(1, keepdim=True)


def distances(student: Tensor, teacher: Tensor, *, eps: float) -> Tensor:
    """(B, N) squared distance of tokens (B, N, C) after each is scaled to norm 1: 2 - 2 cos, in [0, 4]."""
    scaled = functional.normalize(student, dim=-1, eps=eps) - functional.normalize(teacher, dim=-1, eps=eps)
    return scaled.square().sum(-1)


def view_loss(student: Tensor, teacher: Tensor, view: View, *, paper_scale: bool = False) -> Tensor:
    """Weighted distance of tokens (B, N, C) in one view, mean over the batch; computed in float32."""
    student, teacher = student.float(), teacher.float()
    if view == "alt":
        student, teacher = without_mean(student), without_mean(teacher)
    apart = distances(student, teacher, eps=EPS[view])
    return SUMMED[view] * apart.sum(1).mean() if paper_scale else MEANED[view] * apart.mean()


class ScaleKD(Method):
    """Projectors on the student's last maps, each view with its own; made by `place`."""

    needs: ClassVar[frozenset[str]] = frozenset({"final"})

    def __init__(
        self,
        sources: dict[int, Shape],
        target: Tail | tuple[int, Shape],
        *,
        heads: int | None = None,
        qk_scale: float = 5.0,
        views: tuple[View, ...] = VIEWS,
        stem: Stem = "conv3",
        batch_norm: bool = True,
        paper_scale: bool = False,
    ) -> None:
        """Values are drawn from the global generator; `place` is what seeds them, and says what the options mean.

        `sources` are index and shape of the student's maps: early and late with a tail, else late alone. `target` is
        the teacher's tail, or index and shape of its last map.
        """
        tail, (index, (width, *grid)) = (
            (target, (target.index, target.leaves)) if isinstance(target, Tail) else (None, target)
        )
        super().__init__(student_maps=tuple(sources), teacher_maps=(index,))
        # A plain object, no Module: the teacher stays outside of what is trained, moved and saved.
        self.tail, self.views, self.paper_scale = tail, views, paper_scale
        single = [index for index, shape in sources.items() if shape[1:] == (1, 1)]
        if "alt" in views and (grid == [1, 1] or single):
            # One key gives every query the same answer, so a student's single position shows as one everywhere.
            whose = "the teacher's last map" if grid == [1, 1] else f"the student's map {single[0]}"
            raise PassError(
                f"scalekd: {whose} has one position, of which nothing is left without its mean; "
                "larger images, or without the alt view"
            )

        def projector(source: Shape, width: int, queries: int | None) -> CrossAttentionProjector:
            chosen = heads_for(width, heads)
            return CrossAttentionProjector(
                source, width, heads=chosen, queries=queries, qk_scale=qk_scale, stem=stem, batch_norm=batch_norm
            )

        shapes = tuple(sources.values())
        self.proxies, self.mains = nn.ModuleDict(), nn.ModuleDict()
        for view in views:
            if self.tail is not None:
                entry, height, breadth = self.tail.enters
                self.proxies[view] = projector(shapes[0], entry, height * breadth)
            self.mains[view] = projector(shapes[-1], width, grid[0] * grid[1] if self.tail is None else None)

    @classmethod
    def place(
        cls,
        student: nn.Module,
        student_size: Shape,
        teacher: nn.Module,
        teacher_size: Shape,
        *,
        heads: int | None = None,
        qk_scale: float = 5.0,
        views: tuple[View, ...] = VIEWS,
        perception: bool = True,
        tail_blocks: int | None = None,
        stem: Stem = "conv3",
        paper_scale: bool = False,
        seed: int,
        dry: bool = False,
    ) -> Self:
        """The method for a pair of networks; grids and widths are read off both. Freezes the teacher's values.

        Args:
            student: its maps at `student_size` (channels, height, width) are what is projected.
            student_size: of the images the student sees.
            teacher: on whose features the student is trained.
            teacher_size: of the images the teacher sees, which may be others than the student's.
            heads: of every projector; None is one per 64 channels of the teacher, or fewer so that they divide them.
            qk_scale: factor on the attention's scaled dot products.
            views: `ori`, `alt` or both.
            perception: the proxy path through the teacher's last stage. False leaves the main path with learned
                queries: the early map has nothing to be compared with but through that stage, so it is not read.
            tail_blocks: how many last blocks of a ViT count as its last stage; None is a twelfth of them.
            stem: of the projectors; see `CrossAttentionProjector`.
            paper_scale: distances summed over tokens with the paper's weights, not their mean.
            seed: of the projectors' values.
            dry: without values, to count `auxiliary_params` before any of their memory is taken.

        Raises:
            PassError: this pair cannot be placed, and why.
        """
        _check_settings(qk_scale, views, perception, tail_blocks, stem)
        taps.check(student, student_size)
        shapes = taps.maps_of(student, student_size)
        early, late = taps.last_two(shapes)
        target: Tail | tuple[int, Shape]
        if perception:
            target = tail_of(teacher, teacher_size, blocks=tail_blocks)
        else:
            teacher.requires_grad_(False)
            ends = taps.maps_of(teacher, teacher_size)
            target = len(ends) - 1, ends[-1]
        taps.check(teacher, teacher_size)
        batch_norm = any(isinstance(module, _BatchNorm) for module in student.modules())
        with torch.random.fork_rng(devices=[]), torch.device("meta" if dry else "cpu"):
            torch.default_generator.manual_seed(seed)
            return cls(
                {index: shapes[index] for index in ((early, late) if perception else (late,))},
                target,
                heads=heads,
                qk_scale=qk_scale,
                views=views,
                stem=stem,
                batch_norm=batch_norm,
                paper_scale=paper_scale,
            )

    @property
    def auxiliary_params(self) -> int:
        """Values trained beside the student's and thrown away."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """See `Method`: `proxy_ori`, `main_ori`, `proxy_alt`, `main_alt`, as far as views and perception go.

        The main path asks with the tokens of the proxy path, not detached: its loss trains the early map too.
        """
        index = self.teacher_maps[0]
        if self.tail is None:
            final = teacher.maps[index].flatten(2).transpose(1, 2)
        else:
            assert teacher.final is not None
            final = self.tail.target(teacher.final)
        losses: dict[str, Tensor] = {}
        for view in self.views:
            guess = None
            if self.tail is not None:
                early = self.proxies[view](student.maps[self.student_maps[0]])
                guess = self.tail(early, teacher.prefix.get(index))
                losses[f"proxy_{view}"] = self._loss(guess, final, view)
            late = self.mains[view](student.maps[self.student_maps[-1]], guess)
            losses[f"main_{view}"] = self._loss(late, final, view)
        return losses

    def _loss(self, tokens: Tensor, final: Tensor, view: View) -> Tensor:
        return view_loss(tokens, final, view, paper_scale=self.paper_scale)


def heads_for(width: int, heads: int | None) -> int:
    """Heads of a projector to `width` channels: as asked, else the most that divide it and are 64 channels or wider.

    Raises:
        PassError: what is asked for does not divide the channels.
    """
    if heads is None:
        return next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)
    if heads < 1 or width % heads:
        raise PassError(
            f"scalekd: heads {heads} do not divide the teacher's {width} channels; "
            f"{heads_for(width, None)} would, which is what stands without heads"
        )
    return heads


def _check_settings(
    qk_scale: float, views: tuple[View, ...], perception: bool, tail_blocks: int | None, stem: Stem
) -> None:
    if not views or len(set(views)) < len(views) or not set(views) <= set(VIEWS):
        raise PassError(f"scalekd: views {', '.join(views) or 'none'}: ori, alt or both, each once")
    if stem not in STEMS:
        raise PassError(f"scalekd: stem {stem!r} is unknown; one of {', '.join(STEMS)}")
    if not qk_scale > 0:
        raise PassError(f"scalekd: qk_scale {qk_scale} must be above 0; the paper has 5")
    if tail_blocks is not None and not perception:
        raise PassError(f"scalekd: tail_blocks {tail_blocks} without perception re-uses nothing; give one of them")
