"""The losses of a step on a network and its subnets: who learns what, and what a subnet's pass leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim import training
from slim.artifact import state_digest
from slim.contract import Context, Loading
from slim.data import Augment, Batch, Data, open_data
from slim.passes.distill.logits import soft_kl
from slim.passes.elastic.extract import extract
from slim.passes.elastic.gates import gated
from slim.passes.elastic.objective import LARGEST_RATIO, adaptive, beta, quiet
from slim.passes.elastic.sampling import ladder, sandwich
from slim.passes.elastic.space import Subnet
from slim.training import Training
from tests.passes.elastic.toys_of_training import SIZE, VIT, branched, sandwiched, space_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    """A block with an inner width, and something to drop."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.bn2(self.conv2(self.drop(torch.relu(self.bn1(self.conv1(x))))))
        return out


class Convolutions(nn.Module):
    """Three such blocks between a stem and a classifier."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(Residual(drop) for _ in range(3)))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))
        return out


def convolutions(drop: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Convolutions(drop)


def batch_of(count: int = 6, *, soft: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(10, (count,), generator=generator)
    images = torch.randn(count, *SIZE, generator=generator)
    return Batch(images, F.one_hot(target, 10) * 0.9 + 0.01 if soft else target, torch.arange(count), 0)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """By name, of the values that the loss depends on."""
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, [*learning.values()], retain_graph=True, allow_unused=True)
    return {name: one for name, one in zip(learning, found, strict=True) if one is not None}


def test_the_weight_of_subnets_rises_from_nothing_over_the_ramp_and_stays() -> None:
    values = [beta(step, 200, 0.1) for step in range(200)]
    assert values[:21] == pytest.approx([step / 20 for step in range(21)])
    assert set(values[20:]) == {1.0}
    assert values == sorted(values)
    assert {beta(step, 200, 0.0) for step in range(200)} == {1.0}


@pytest.mark.parametrize("build", [VIT.build, partial(convolutions, 0.3)], ids=["layer norm", "batch norm and dropout"])
def test_with_weight_zero_a_step_is_one_on_the_largest_alone(build: Any) -> None:
    def stepped(with_subnets: bool) -> dict[str, Tensor]:
        model = build()
        with sandwiched(model, ramp=1.0) as (objective, _):
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                if with_subnets:
                    objective.before_step(0, 10)
                    losses = objective(model, batch_of())
                    assert losses["subnets"].item() == 0
                    loss = torch.stack([*losses.values()]).sum()
                else:
                    loss = F.cross_entropy(model(batch_of().images), batch_of().target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    alone, together = stepped(False), stepped(True)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("divergence", ["kl", "alpha"])
def test_a_subnet_that_says_what_the_largest_says_has_nothing_to_learn(divergence: str) -> None:
    model = VIT.build()
    largest = space_of(model).largest
    with sandwiched(model, divergence=divergence, draw=lambda _: [largest]) as (objective, _):
        model.train()
        loss = objective(model, batch_of())["subnets"]
    # Of probabilities that add up to 1 within 1e-7.
    assert abs(loss.item()) < 1e-6
    assert all(float(one.abs().max()) < 1e-6 for one in gradients(loss, model).values())


def test_subnets_learn_from_the_largest_and_it_learns_nothing_from_them() -> None:
    model = convolutions()
    with sandwiched(model, temperature=2.0) as (objective, space):
        model.train()
        targets = model(batch_of().images).detach()
        found = gradients(objective(model, batch_of())["subnets"], model)
        objective.choose(space.smallest)
        loss = soft_kl(model(batch_of().images), targets, kind="forward", temperature=2.0)
        expected = gradients(loss, model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_losses_of_several_subnets_are_added_and_weighed() -> None:
    model = VIT.build().train()
    with sandwiched(model) as (objective, space):
        others = sandwich(space, 0, 0, 4)
        assert len(set(others)) == 3

        def loss(draw: Any, ramp: float) -> Tensor:
            objective.draw, objective.ramp = draw, ramp
            objective.before_step(1, 10)
            found: Tensor = objective(model, batch_of())["subnets"]
            return found

        each = [loss(lambda _, one=one: [one], 0.0) for one in others]
        torch.testing.assert_close(loss(lambda _: others, 0.0), torch.stack(each).sum())
        torch.testing.assert_close(loss(lambda _: others, 0.5), torch.stack(each).sum() * 0.2)


def test_labels_may_be_mixed_or_missing() -> None:
    model = VIT.build().train()
    with sandwiched(model, label_weight=0.5) as (objective, _):
        said = model(batch_of().images)
        for batch in (batch_of(), batch_of(soft=True)):
            expected = F.cross_entropy(said, batch.target) / 2
            torch.testing.assert_close(objective(model, batch)["label"], expected)
        nobody = batch_of()._replace(target=torch.full((6,), -1))
        assert objective(model, nobody)["label"].item() == 0


def test_the_guard_compares_the_largest_with_what_it_was_and_needs_no_labels() -> None:
    model = VIT.build().train()
    original = copy.deepcopy(model).eval()
    batch = batch_of()._replace(target=torch.full((6,), -1))
    with sandwiched(model, label_weight=0.0, guard=2.0, original=original) as (objective, _):
        first = objective(model, batch)
        assert first.keys() == {"original", "subnets"}
        assert abs(first["original"].item()) < 1e-6
        with torch.no_grad():
            model.get_parameter("head.weight").mul_(-1)
        later = objective(model, batch)["original"]
        expected = 2 * soft_kl(model(batch.images), original(batch.images), kind="forward")
        torch.testing.assert_close(later, expected)
    assert later.item() > 0.01
    assert gradients(later, model)
    assert not gradients(later, original)
    assert not [*objective.parameters()], "the original would be trained and saved along"


@pytest.mark.parametrize("build", [VIT.build, convolutions], ids=["layer norm", "batch norm"])
def test_what_a_subnet_lacks_learns_nothing_and_what_it_has_learns(build: Any) -> None:
    model = build()
    with sandwiched(model) as (objective, space):
        model.train()
        found = gradients(objective(model, batch_of())["subnets"], model)
        smallest = space.smallest
    assert smallest.on == (True, False, False)
    assert not [name for name in found if name.startswith(("blocks.1.", "blocks.2."))]
    for number, dim in enumerate(space.dims):
        if space.within(number) != 0:
            continue
        kept = dim.order[: smallest.units[number]]
        dropped = [unit for unit in range(dim.group.units) if unit not in kept]
        members = [member for member in dim.group.members if member.key in found]
        assert len(members) > 1
        for member in members:
            rows = found[member.key].movedim(member.dim, 0)
            assert not rows[member.index[dropped].flatten()].any(), member.key
            assert rows[member.index[list(kept)].flatten()].any(), member.key


def test_statistics_of_batch_norms_are_those_of_the_largest() -> None:
    model = convolutions(0.5)
    alone = copy.deepcopy(model).train()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        alone(batch_of().images)
    with sandwiched(model) as (objective, space), torch.random.fork_rng():
        model.train()
        objective.draw = partial(sandwich, space, 0, count=4)
        torch.manual_seed(2)
        objective(model, batch_of())
    for name, value in model.named_buffers():
        assert torch.equal(value, alone.get_buffer(name)), name
    assert int(model.get_buffer("bn.num_batches_tracked")) == 1


def modes(model: nn.Module) -> list[tuple[bool, object]]:
    return [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]


def test_a_quiet_network_drops_nothing_normalises_by_the_batch_and_comes_back_as_it_was() -> None:
    model = convolutions(0.5).train()
    plain = convolutions().train()
    model.get_submodule("blocks.1").eval()  # frozen: normalises by what it remembers
    plain.get_submodule("blocks.1").eval()
    before, values = modes(model), copy.deepcopy(model.state_dict())
    images = batch_of().images
    with quiet(model):
        quietly = model(images)
    assert torch.equal(quietly, plain(images))
    assert modes(model) == before
    assert state_digest(model.state_dict()) == state_digest(values)
    with pytest.raises(KeyboardInterrupt), quiet(model):
        raise KeyboardInterrupt
    assert modes(model) == before
    assert not torch.equal(model(images), model(images)), "it drops again"


def test_attention_that_drops_without_a_layer_of_its_own_is_quiet_too() -> None:
    model = VIT.model_copy(update={"kwargs": {**VIT.kwargs, "attn_drop_rate": 0.5, "drop_path_rate": 0.5}}).build()
    model.train()
    images = batch_of().images
    assert not torch.equal(model(images), model(images))
    with quiet(model):
        quietly = model(images), model(images)
    assert torch.equal(*quietly)


def test_gates_are_left_at_the_largest_whatever_happens() -> None:
    model = VIT.build().eval()
    images = batch_of().images
    whole = model(images)

    def breaks(_: int) -> Iterator[Any]:
        yield space.smallest
        raise ValueError("no more")

    with sandwiched(model) as (objective, space):
        objective(model, batch_of())
        assert torch.equal(model(images), whole)
        objective.draw = breaks  # type: ignore[assignment]
        with pytest.raises(ValueError, match="no more"):
            objective(model, batch_of())
        assert torch.equal(model(images), whole)


def logits(scale: float, seed: int) -> Tensor:
    return torch.randn(40, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def divergences(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, D of alpha 1 and of alpha -1: sum of q * ((p / q)^alpha - 1) / (alpha * (alpha - 1))."""
    p, q = theirs.softmax(1), ours.softmax(1)
    return (p * (p / q).log()).sum(1), (q * (q / p - 1)).sum(1) / 2


def test_the_adaptive_divergence_is_the_larger_of_two_and_so_is_its_gradient() -> None:
    ours, theirs = logits(0.4, 0).requires_grad_(), logits(0.4, 1)
    assert (ours.softmax(1) / theirs.softmax(1)).max() < LARGEST_RATIO
    missing, excess = divergences(ours, theirs)
    assert 0 < int((excess > missing).sum()) < len(ours), "both are larger at times"
    for temperature in (1.0, 2.0):
        expected = torch.maximum(*divergences(ours / temperature, theirs / temperature)).mean() * temperature**2
        found = adaptive(ours, theirs.requires_grad_(), temperature=temperature)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)  # computed in float32
        (exact,) = torch.autograd.grad(expected, ours)
        got, none = torch.autograd.grad(found, (ours, theirs), allow_unused=True)
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-7)
        assert none is None


def test_the_adaptive_divergence_is_bounded_where_the_subnet_hopes_for_what_the_largest_rules_out() -> None:
    ours = torch.tensor([[0.0, 0.0]], requires_grad=True)
    theirs = torch.tensor([[90.0, 0.0]])
    loss = adaptive(ours, theirs, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, ours)
    # q = (1/2, 1/2), q / p = (1/2, 5 instead of 6e38): (q . (q / p - 1)) / 2, and of logit j it is q_j * sum(w) - w_j
    # with w = q * (1/2 - q / p) = (0, -9/4). The other divergence is log 2 only.
    assert LARGEST_RATIO == 5
    torch.testing.assert_close(loss.detach(), torch.tensor((-1 / 4 + 2) / 2))
    torch.testing.assert_close(gradient, torch.tensor([[-9 / 8, 9 / 8]]))


def test_the_adaptive_divergence_is_finite_however_sure_both_are() -> None:
    ours = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, -1e4]], requires_grad=True)
    theirs = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 0.0, 1e4]])
    loss = adaptive(ours, theirs, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, ours)
    assert math.isfinite(loss.item())
    assert gradient.isfinite().all()


def test_three_branches_have_the_gradients_of_poas_cross_entropies() -> None:
    model = VIT.build().train()
    temperature = 2.0
    with branched(model, temperature=temperature) as (objective, space):
        with torch.no_grad():
            for parameter in objective.teacher.parameters():
                parameter.mul_(1.1)
        losses = objective(model, batch_of())
        found = gradients(torch.stack([*losses.values()]).sum(), model)
    with torch.no_grad():
        mean = objective.teacher(batch_of().images) / temperature
        small = extract(model, space, space.smallest)(batch_of().images)
    with gated(model, space) as choose:
        intact = model(batch_of().images)
        choose(space.smallest)
        elastic = model(batch_of().images)
        torch.testing.assert_close(elastic, small, rtol=1e-4, atol=1e-5)
        now = intact.detach() / temperature
        loss = 0.8 * F.cross_entropy(intact / temperature, mean.softmax(1))
        for targets in (mean, now):
            loss = loss + 0.2 * F.cross_entropy(elastic / temperature, targets.softmax(1))
        expected = gradients(loss * temperature**2, model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_the_mean_teacher_follows_the_student_ever_more_slowly_and_is_saved() -> None:
    model = convolutions()
    with branched(model) as (objective, _):
        objective.train()
        assert not any(module.training for module in objective.teacher.modules())
        assert not any(value.requires_grad for value in objective.teacher.parameters())
        assert float(objective(model.eval(), batch_of())["intact"].detach().abs()) < 1e-6, "it begins as the network"
        before = copy.deepcopy(objective.teacher.state_dict())
        with torch.no_grad():
            for one in model.state_dict().values():
                one.add_(1)
        for done, moves in ((0.0, 0.1), (0.5, 0.05), (1.0, 0.0)):
            objective.teacher.load_state_dict(before)
            objective.after_step(done)
            for name, value in objective.teacher.state_dict().items():
                if value.is_floating_point():
                    torch.testing.assert_close(value, before[name] + moves, rtol=0, atol=1e-6)
                else:
                    assert torch.equal(value, model.state_dict()[name])
    saved = {name.removeprefix("teacher.") for name in objective.state_dict()}
    assert saved == {*model.state_dict()}, "the teacher and nothing else"


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=16)


@pytest.mark.parametrize("kind", ["sandwich", "branches"])
def test_training_that_was_killed_goes_on_with_the_same_ramp_draws_and_teacher(
    kind: str, digits: Data, tmp_path: Path
) -> None:
    def trained(stop: int, checkpoint: Path | None) -> nn.Module:
        def draw(step: int) -> list[Subnet]:
            if step == stop:
                raise KeyboardInterrupt
            return sandwich(space, 0, step, 3) if kind == "sandwich" else ladder(space, 0, step)

        model = VIT.build()
        space = space_of(model)
        context = Context(data=digits, backbone=VIT, loading=Loading(batch_size=16), checkpoint=checkpoint)
        settings = Training(epochs=3, lr=1e-3, precision="fp32")
        with sandwiched(model, ramp=0.8) if kind == "sandwich" else branched(model) as (objective, _):
            objective.draw = draw
            training.train(model, objective, settings, Augment(flip=0.0, scale_low=1.0), context)
        return model

    whole = trained(-1, None)
    place = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        trained(6, place)  # of 12: taken up at 4
    again = trained(-1, place)
    assert state_digest(again.state_dict()) == state_digest(whole.state_dict())
