"""The maths of ScaleKD on plain tensors, then the method on pairs of networks of every kind."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.distill.method import Outputs
from slim.passes.distill.projector import CrossAttentionProjector
from slim.passes.distill.scalekd import ScaleKD, distances, heads_for, view_loss, without_mean
from slim.passes.distill.taps import outputs
from tests.passes.distill.pairs import (
    LARGE,
    SMALL,
    STUDENTS,
    SWIN,
    TEACHERS,
    VIT,
    images,
    network,
    student,
    teacher,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NO_TARGET = torch.zeros(2, dtype=torch.int64)
VIEWS = ("ori", "alt")
PATHS = {f"{path}_{view}" for path in ("proxy", "main") for view in VIEWS}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def size_of(name: str) -> tuple[int, int, int]:
    return LARGE if name == "convnext" else SMALL


def given(method: ScaleKD, ours: nn.Module, size: tuple[int, int, int], theirs: nn.Module, other: tuple) -> tuple:
    """What both networks gave for two images; the student's maps as leaves, so that none leads to another."""
    with torch.no_grad():
        seen = outputs(theirs, images(other), indices=method.teacher_maps, final=True)
        learned = outputs(ours, images(size), indices=method.student_maps)
    return Outputs(maps={index: values.requires_grad_() for index, values in learned.maps.items()}), seen


@pytest.fixture(scope="module")
def pair() -> tuple[ScaleKD, Outputs, Outputs]:
    """A residual network on a Swin; maps and losses of one batch."""
    ours, size = student("resnet")
    theirs = teacher("swin")
    method = ScaleKD.place(ours, size, theirs, SMALL, seed=0)
    return method, *given(method, ours.train(), size, theirs, SMALL)


def test_the_alt_view_is_the_map_without_its_first_dct_coefficient() -> None:
    maps = random(2, 5, 6, 4).double()  # T1, on a grid that is no square
    spectrum = dctn(maps.numpy(), axes=(2, 3), norm="ortho")
    spectrum[..., 0, 0] = 0
    expected = torch.from_numpy(idctn(spectrum, axes=(2, 3), norm="ortho"))
    ours = without_mean(maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(ours.transpose(1, 2).reshape(maps.shape), expected, rtol=0, atol=1e-12)
    assert without_mean(random(2, 49, 8) + 3).mean(1).abs().max() < 1e-6


def test_an_offset_of_each_channel_is_seen_by_the_ori_view_alone() -> None:
    ours, theirs, offset = random(2, 16, 8), random(2, 16, 8, seed=1), random(2, 1, 8, seed=2)  # T2
    before, after = (view_loss(tokens, theirs, "alt") for tokens in (ours, ours + offset))
    assert after == pytest.approx(float(before), rel=1e-5)
    before, after = (view_loss(tokens, theirs, "ori") for tokens in (ours, ours + offset))
    assert after != pytest.approx(float(before), rel=1e-2)


@pytest.mark.parametrize("view", VIEWS)
def test_a_positive_scale_changes_no_view(view: str) -> None:
    ours, theirs = random(2, 16, 8), random(2, 16, 8, seed=1)  # T3
    before = view_loss(ours, theirs, view)
    assert view_loss(7.0 * ours, 0.3 * theirs, view) == pytest.approx(float(before), rel=1e-5)
    assert view_loss(-ours, theirs, view) != pytest.approx(float(before), rel=1e-2)


def test_a_token_is_as_far_as_its_angle() -> None:
    ours, theirs = random(2, 16, 8), random(2, 16, 8, seed=1)
    apart = distances(ours, theirs, eps=1e-6)
    assert apart.shape == (2, 16)
    torch.testing.assert_close(apart, 2 - 2 * torch.cosine_similarity(ours, theirs, dim=-1))


@pytest.mark.parametrize("view", VIEWS)
def test_both_scales_agree_at_seven_by_seven_and_only_the_papers_grows_with_the_grid(view: str) -> None:
    ours, theirs = random(3, 49, 8), random(3, 49, 8, seed=1)
    mean, summed = (view_loss(ours, theirs, view, paper_scale=paper) for paper in (False, True))
    assert mean == pytest.approx(float(summed), rel=1e-6)
    ours, theirs = ours.repeat(1, 4, 1), theirs.repeat(1, 4, 1)
    assert view_loss(ours, theirs, view) == pytest.approx(float(mean), rel=1e-5)
    assert view_loss(ours, theirs, view, paper_scale=True) == pytest.approx(4 * float(mean), rel=1e-5)


def test_the_papers_scale_is_the_papers_sum() -> None:
    ours, theirs = random(3, 10, 8), random(3, 10, 8, seed=1)
    total = 0.0
    for image in range(3):
        for token in range(10):
            s, t = ours[image, token], theirs[image, token]
            total += float((s / s.norm() - t / t.norm()).square().sum())
    assert view_loss(ours, theirs, "ori", paper_scale=True) == pytest.approx(0.08 * total / 3, rel=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_equal_tokens_cost_nothing(view: str) -> None:
    tokens = random(2, 16, 8)  # T4
    assert view_loss(tokens, tokens.clone(), view) == 0


@pytest.mark.parametrize("view", VIEWS)
def test_tokens_in_bf16_are_compared_in_float32(view: str) -> None:
    ours, theirs = random(2, 16, 8).bfloat16(), random(2, 16, 8, seed=1).bfloat16()
    loss = view_loss(ours, theirs, view)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, view_loss(ours.float(), theirs.float(), view))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-8, 1e4])
def test_a_constant_map_has_a_finite_gradient(value: float) -> None:
    tokens = torch.full((2, 16, 8), value).requires_grad_()  # T8
    nearly = (value * (1 + 1e-7 * random(2, 16, 8))).requires_grad_()
    for ours in (tokens, nearly):
        loss = view_loss(ours, random(2, 16, 8, seed=1), "alt")
        (gradient,) = torch.autograd.grad(loss, ours)
        assert loss.isfinite()
        # d(2.94 mean |s/eps - t|^2)/ds is at most 2 * 2.94 * |s/eps - t| / (32 eps), of which |..| <= 2.
        assert gradient.norm(dim=-1).max() <= 2 * 2.94 * 2 / 32 / 1e-3


def projector(**changed: Any) -> CrossAttentionProjector:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        settings: dict[str, Any] = {"heads": 2, "queries": 4, **changed}
        return CrossAttentionProjector((6, 3, 5), 8, **settings)


@pytest.mark.parametrize("learned", [True, False])
def test_the_projector_is_the_formula_of_the_paper(learned: bool) -> None:
    made = projector(queries=4 if learned else None).eval().double()
    maps, queries = random(2, 6, 3, 5).double(), random(2, 4, 8, seed=1).double()
    made.stem[1].running_mean.uniform_(generator=torch.Generator().manual_seed(2))
    conv, norm = made.stem[0], made.stem[1]
    stemmed = nn.functional.conv2d(maps, conv.weight, conv.bias, padding=1)
    stemmed = (stemmed - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    keyed = (stemmed.clamp_min(0) + made.positions).reshape(2, 6, 15).mT
    asked = made.queries.expand(2, -1, -1) if learned else queries
    asked = (asked @ made.query_stem[0].weight.T + made.query_stem[0].bias).clamp_min(0)
    q, k, v = (layer(x) for layer, x in ((made.query, asked), (made.key, keyed), (made.value, keyed)))
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        heads.append((5.0 * 4**-0.5 * q[..., part] @ k[..., part].mT).softmax(-1) @ v[..., part])
    attended = made.output(torch.cat(heads, -1))
    centred = attended - attended.mean(-1, keepdim=True)  # no query is added: LayerNorm reads attention alone
    u = centred / (centred.square().mean(-1, keepdim=True) + made.norm.eps).sqrt()
    expected = u + made.feed_forward[2](made.feed_forward[0](u).clamp_min(0))
    torch.testing.assert_close(made(maps, None if learned else queries), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_projector_has_the_parameters_of_the_paper(learned: bool, batch_norm: bool) -> None:
    made = projector(queries=4 if learned else None, batch_norm=batch_norm)  # T9
    cs, ct, grid = 6, 8, 15
    expected = 9 * cs**2 + 3 * cs + cs * grid + 11 * ct**2 + 2 * cs * ct + 12 * ct + (4 * ct if learned else 0)
    assert sum(value.numel() for value in made.parameters()) == expected


def test_cheap_stems_cost_less_and_give_the_same_shape() -> None:
    maps = random(2, 300, 3, 3)
    stems: dict[str, int] = {}
    for stem in ("conv3", "dw3", "pw256"):
        made = CrossAttentionProjector((300, 3, 3), 8, heads=1, queries=4, stem=stem)
        assert made(maps).shape == (2, 4, 8)
        stems[stem] = sum(value.numel() for value in made.stem.parameters())
    assert stems == {"conv3": 9 * 300**2 + 900, "dw3": 12 * 300, "pw256": 300 * 256 + 3 * 256}


def test_maps_of_another_size_are_refused() -> None:
    reason = r"a student map is \(6, 4, 5\), the projector was made for \(6, 3, 5\) \(channels, height, width\); train"
    with pytest.raises(PassError, match=reason):
        projector()(random(2, 6, 4, 5))


@pytest.mark.parametrize(
    ("width", "heads"), [(48, 1), (64, 1), (96, 1), (192, 3), (768, 12), (1536, 24), (1000, 10), (97, 1)]
)
def test_heads_are_64_channels_or_the_next_wider_that_divides(width: int, heads: int) -> None:
    assert heads_for(width, None) == heads


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_that_do_not_divide_are_refused(heads: int) -> None:
    with pytest.raises(PassError, match=f"heads {heads} do not divide the teacher's 96 channels; 1 would"):
        heads_for(96, heads)


@pytest.mark.parametrize("ours", STUDENTS)
@pytest.mark.parametrize("theirs", TEACHERS)
def test_every_kind_of_student_learns_from_every_kind_of_teacher(ours: str, theirs: str) -> None:
    model, size = student(ours)  # T7, T5
    frozen = teacher(theirs)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    method = ScaleKD.place(model, size, frozen, size_of(theirs), seed=0)
    learned, seen = given(method, model, size, frozen, size_of(theirs))
    losses = method(learned, seen, NO_TARGET)
    assert set(losses) == PATHS
    assert all(loss.dtype == torch.float32 and loss.ndim == 0 and 0 < loss < 16 for loss in losses.values())
    sum(losses.values()).backward()
    for values in learned.maps.values():
        assert values.grad.abs().sum() > 0
    for name, value in method.named_parameters():
        assert value.grad is not None, name
    for cap in (*method.proxies.values(), *method.mains.values()):
        assert all(value.grad.abs().sum() > 0 for value in (cap.positions, cap.query.weight, cap.key.weight))
    assert all(value.grad is None and not value.requires_grad for value in frozen.parameters())
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert not {id(value) for value in method.parameters()} & {id(value) for value in frozen.parameters()}
    assert (
        method.auxiliary_params
        == ScaleKD.place(model, size, frozen, size_of(theirs), seed=0, dry=True).auxiliary_params
    )


@pytest.mark.parametrize("view", VIEWS)
def test_the_main_path_alone_trains_the_early_map(view: str, pair: tuple[ScaleKD, Outputs, Outputs]) -> None:
    method, learned, seen = pair
    losses = method(learned, seen, NO_TARGET)
    early, late = (learned.maps[index] for index in method.student_maps)
    through_queries, straight = torch.autograd.grad(losses[f"main_{view}"], [early, late], retain_graph=True)
    assert through_queries.abs().sum() > 0
    assert straight.abs().sum() > 0
    (none,) = torch.autograd.grad(losses[f"proxy_{view}"], [late], retain_graph=True, allow_unused=True)
    assert none is None


def test_each_view_has_projectors_of_its_own(pair: tuple[ScaleKD, Outputs, Outputs]) -> None:
    method, learned, seen = pair
    losses = method(learned, seen, NO_TARGET)
    others = [*method.proxies["alt"].parameters(), *method.mains["alt"].parameters()]
    for name in ("proxy_ori", "main_ori"):
        gradients = torch.autograd.grad(losses[name], others, retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in gradients)


class Fixed(nn.Module):
    """A projector that gives what it was told."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, *given: Tensor | None) -> Tensor:
        return self.tokens


@pytest.mark.parametrize("name", TEACHERS)
def test_projectors_that_give_the_teachers_own_features_cost_nothing(name: str) -> None:
    model, size = student("mixer")
    frozen = teacher(name)  # T4, with the tail between
    method = ScaleKD.place(model, size, frozen, size_of(name), seed=0)
    learned, seen = given(method, model, size, frozen, size_of(name))
    for view in VIEWS:
        method.proxies[view] = Fixed(seen.maps[method.tail.index].flatten(2).transpose(1, 2))
        method.mains[view] = Fixed(method.tail.target(seen.final))
    assert all(loss < 1e-6 for loss in method(learned, seen, NO_TARGET).values())


def test_parameters_are_those_of_the_formula_and_the_dry_count_takes_no_memory() -> None:
    model, size = student("resnet")
    frozen = teacher("swin")
    method = ScaleKD.place(model, size, frozen, SMALL, seed=0, dry=True)
    early, late, entry, width = (96, 4 * 4), (128, 2 * 2), 32, 64

    def formula(source: tuple[int, int], ct: int) -> int:
        cs, grid = source
        return 9 * cs**2 + 3 * cs + cs * grid + 11 * ct**2 + 2 * cs * ct + 12 * ct

    # Learned queries on the early map alone: one per position of the teacher's 4 x 4 grid.
    assert method.auxiliary_params == 2 * (formula(early, entry) + 16 * entry + formula(late, width))
    assert all(value.is_meta for value in method.parameters())


def test_the_papers_pair_has_176_million_parameters() -> None:
    # ResNet-50 on Swin-L at 224: 35.7 M for the early map and 140.2 M for the late one, as computed from the shapes.
    with torch.device("meta"):
        early = CrossAttentionProjector((1024, 14, 14), 768, heads=16, queries=196)
        late = CrossAttentionProjector((2048, 7, 7), 1536, heads=24, queries=None)
    counts = [2 * sum(value.numel() for value in made.parameters()) / 1e6 for made in (early, late)]
    assert counts == pytest.approx([35.7, 140.2], abs=0.05)


def test_the_seed_alone_decides_the_values() -> None:
    model, size = student("mixer")
    frozen = teacher("vit")
    state = torch.get_rng_state()
    one, same, other = (ScaleKD.place(model, size, frozen, SMALL, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not torch.equal(one["proxies.ori.positions"], other["proxies.ori.positions"])
    assert not torch.equal(one["proxies.ori.positions"], one["proxies.alt.positions"])
    assert not any(key.startswith("tail") for key in one)


def test_placing_changes_nothing_of_either_network() -> None:
    model, size = student("resnet")
    model.train()
    frozen = teacher("convnext").train()
    before = [copy.deepcopy(network.state_dict()) for network in (model, frozen)]
    ScaleKD.place(model, size, frozen, LARGE, seed=0)
    for network_, state in zip((model, frozen), before, strict=True):
        assert network_.training
        assert all(torch.equal(value, state[key]) for key, value in network_.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())


def test_the_stem_is_normed_as_the_student_is() -> None:
    frozen = teacher("vit")
    for name, norm in (("resnet", "BatchNorm2d"), ("mixer", "LayerNorm2d")):
        model, size = student(name)
        method = ScaleKD.place(model, size, frozen, SMALL, seed=0)
        assert type(method.mains["ori"].stem[1]).__name__ == norm
        assert sum(type(module).__name__ == norm for module in method.modules()) == 4


@pytest.mark.parametrize("name", [*TEACHERS, "resnet"])
def test_without_perception_the_late_map_is_compared_with_the_teachers_last(name: str) -> None:
    model, size = student("vit")
    frozen, other = (teacher(name), size_of(name)) if name in TEACHERS else student(name)
    method = ScaleKD.place(model, size, frozen, other, perception=False, seed=0)
    learned, seen = given(method, model, size, frozen, other)
    assert method.student_maps == (3,)
    losses = method(learned, seen, NO_TARGET)
    assert set(losses) == {"main_ori", "main_alt"}
    sum(losses.values()).backward()
    assert all(value.grad is not None for value in method.parameters())
    assert all(value.grad is None for value in frozen.parameters())
    final = seen.maps[method.teacher_maps[0]].flatten(2).transpose(1, 2)
    if name in TEACHERS:
        with_tail = ScaleKD.place(model, size, frozen, other, seed=0).tail
        assert torch.equal(final, with_tail.target(seen.final))
    for view in VIEWS:
        method.mains[view] = Fixed(final)
    assert all(loss < 1e-6 for loss in method(learned, seen, NO_TARGET).values())


@pytest.mark.parametrize("view", VIEWS)
def test_one_view_has_half_of_the_projectors(view: str) -> None:
    model, size = student("mixer")
    frozen = teacher("vit")
    method = ScaleKD.place(model, size, frozen, SMALL, views=(view,), stem="dw3", heads=3, seed=0)
    losses = method(*given(method, model, size, frozen, SMALL), NO_TARGET)
    assert set(losses) == {f"proxy_{view}", f"main_{view}"}
    assert len(method.proxies) == len(method.mains) == 1


def test_options_reach_the_projectors_and_the_losses(pair: tuple[ScaleKD, Outputs, Outputs]) -> None:
    model, size = student("resnet")
    frozen = teacher("swin")
    made = ScaleKD.place(model, size, frozen, SMALL, heads=4, qk_scale=2.0, paper_scale=True, seed=0)
    caps = [*made.proxies.values(), *made.mains.values()]
    assert [(cap.heads, cap.scale) for cap in caps] == [(4, 2 * 8**-0.5)] * 2 + [(4, 2 * 16**-0.5)] * 2
    learned, seen = given(made, model, size, frozen, SMALL)
    summed = made(learned, seen, NO_TARGET)
    made.paper_scale = False
    for name, loss in made(learned, seen, NO_TARGET).items():
        assert summed[name].item() == pytest.approx(loss.item() * 4 / 49, rel=1e-5)  # 2 x 2 tokens in place of 7 x 7
    blocks = ScaleKD.place(model, size, teacher("vit"), SMALL, tail_blocks=2, seed=0)
    assert (blocks.tail.index, blocks.teacher_maps) == (0, (0,))


@pytest.mark.parametrize("bf16_teacher", [False, True])
def test_losses_are_float32_under_autocast(bf16_teacher: bool) -> None:
    model, size = student("resnet")
    frozen = teacher("vit")
    method = ScaleKD.place(model, size, frozen, SMALL, seed=0).eval()
    exact = method(*given(method, model, size, frozen, SMALL), NO_TARGET)
    if bf16_teacher:
        frozen.bfloat16()
    with torch.no_grad():
        batch = images(SMALL).to(torch.bfloat16 if bf16_teacher else torch.float32)
        seen = outputs(frozen, batch, indices=method.teacher_maps, final=True)
    with torch.autocast("cpu", torch.bfloat16):
        learned = outputs(model, images(size), indices=method.student_maps)
        losses = method(learned, seen, NO_TARGET)
    assert learned.maps[4].dtype == torch.bfloat16
    outside = method(learned, seen, NO_TARGET)  # maps in bf16, projectors in float32
    for name, loss in losses.items():
        assert loss.dtype == outside[name].dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1)  # of 8 bits, over some 20 layers
        assert loss.item() != exact[name].item()
    sum(losses.values()).backward()
    assert all(value.grad is None for value in frozen.parameters())
    assert all(value.grad.isfinite().all() for value in method.parameters())


def test_a_constant_student_map_has_a_finite_loss_and_gradient(pair: tuple[ScaleKD, Outputs, Outputs]) -> None:
    method, learned, seen = pair
    for value in (0.0, 2.0):  # T8
        maps = {index: torch.full_like(one, value).requires_grad_() for index, one in learned.maps.items()}
        losses = method(Outputs(maps=maps), seen, NO_TARGET)
        gradients = torch.autograd.grad(sum(losses.values()), [*maps.values(), *method.parameters()])
        assert all(loss.isfinite() for loss in losses.values())
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_copy_learns_from_the_same_teacher(pair: tuple[ScaleKD, Outputs, Outputs]) -> None:
    method = pair[0]
    assert copy.deepcopy(method).tail is method.tail
    assert len(list(method.named_modules())) == len(list(copy.deepcopy(method).named_modules()))
    assert not [name for name, _ in method.named_parameters() if not name.startswith(("proxies.", "mains."))]


def test_sixty_four_images_can_be_learned_by_heart() -> None:
    model = network("vit_tiny_patch16_224", **{**VIT, "embed_dim": 64, "depth": 2, "num_heads": 4})  # T10
    frozen = network("swin_tiny_patch4_window7_224", **{**SWIN, "embed_dim": 8, "depths": (1, 1, 1)})
    method = ScaleKD.place(model, SMALL, frozen, SMALL, seed=0)
    batches = images(SMALL, 64).split(32)
    with torch.no_grad():
        seen = [outputs(frozen, batch, indices=method.teacher_maps, final=True) for batch in batches]
    optimizer = torch.optim.Adam([*model.parameters(), *method.parameters()], lr=2e-3)
    epochs: list[float] = []
    for _ in range(48):
        total = 0.0
        for batch, theirs in zip(batches, seen, strict=True):
            losses = method(outputs(model, batch, indices=method.student_maps), theirs, NO_TARGET)
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(batches)
        epochs.append(total)
    assert all(after < before for before, after in pairwise(epochs)), epochs
    assert epochs[-1] < 0.1 * epochs[0], epochs


def place(theirs: nn.Module, other: tuple[int, int, int] = SMALL, **options: Any) -> ScaleKD:
    model, size = student("mixer")
    return ScaleKD.place(model, size, theirs, other, seed=0, **options)


def test_settings_that_cannot_be_are_refused() -> None:
    frozen = teacher("vit")
    for options, reason in (
        ({"views": ()}, "views none: ori, alt or both, each once"),
        ({"views": ("ori", "ori")}, "views ori, ori: ori, alt or both, each once"),
        ({"views": ("dct",)}, "views dct: ori, alt or both, each once"),
        ({"stem": "conv5"}, "stem 'conv5' is unknown; one of conv3, dw3, pw256"),
        ({"qk_scale": 0.0}, r"qk_scale 0\.0 must be above 0; the paper has 5"),
        ({"heads": 7}, "heads 7 do not divide the teacher's 48 channels; 1 would"),
        ({"perception": False, "tail_blocks": 1}, "tail_blocks 1 without perception re-uses nothing"),
        ({"tail_blocks": 3}, "has 3 blocks, 3 of them at its end cannot be re-used"),
    ):
        with pytest.raises(PassError, match=reason):
            place(frozen, **options)


def test_pairs_that_cannot_be_placed_are_refused() -> None:
    with pytest.raises(PassError, match="teacher ResNet has no last stage to send features through"):
        place(student("resnet")[0])
    reason = "the teacher's last map has one position, of which nothing is left without its mean; larger images, or w"
    with pytest.raises(PassError, match=reason):
        place(teacher("convnext"), SMALL)
    assert set(place(teacher("convnext"), SMALL, views=("ori",)).mains) == {"ori"}
    with pytest.raises(PassError, match="the student's map 4 has one position"):
        ScaleKD.place(student("resnet")[0], SMALL, teacher("vit"), SMALL, seed=0)
    shallow = network("vit_tiny_patch16_224", **{**VIT, "depth": 1})
    with pytest.raises(PassError, match="the network has 1 map, two are read"):
        ScaleKD.place(shallow, SMALL, teacher("vit"), SMALL, seed=0)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_networks_whose_features_are_not_what_they_compute_are_refused(whose: str) -> None:
    pair = {"student": student("mixer")[0], "teacher": teacher("vit")}
    plain = pair[whose].forward
    pair[whose].forward = lambda batch: plain(batch) + 1
    with pytest.raises(PassError, match=f"the features of {type(pair[whose]).__name__} give other logits"):
        ScaleKD.place(pair["student"], SMALL, pair["teacher"], SMALL, seed=0)
