"""Gates: the soft threshold by hand, how far it closes them, and that only they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim import costs
from slim.artifact import Artifact, state_digest
from slim.contract import Context, Loading
from slim.data import Batch, Data, open_data
from slim.errors import DataError, PassError
from slim.passes.low_rank import LowRank, schemes
from slim.passes.low_rank.candidates import Candidate, candidates
from slim.passes.low_rank.gates import DENSE_SHARE, Closing, Gate, close_gates, threshold
from slim.passes.low_rank.gates import _install as install
from slim.passes.low_rank.gates import _ordered as ordered
from slim.passes.low_rank.ways import Way, ways_of
from slim.pipeline import Pipeline
from slim.training import Training
from tests.contract.zoo import BLIND, SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")

STILL = Training(epochs=2, lr=1e-12, weight_decay=0.0, warmup=0.0, clip=0.0, freeze_norms=True, precision="fp32")
"""Moves nothing, so that the threshold is all that happens."""


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=32, calib=32)


def context(data: Data | None, given: Artifact) -> Context:
    return Context(data=data, loading=Loading(batch_size=8), backbone=given.backbone)


def plain_ways(model: nn.Module) -> list[list[Way]]:
    found, _ = candidates(model, SIZE, min_width=16)
    return [ways_of(one, "plain", None, ("channel", "spatial")) for one in found]


def closing(*gates: tuple[list[float], float], whole: float = 0.4) -> tuple[Closing, list[Gate]]:
    made = [Gate(torch.tensor(values), last=True) for values, _ in gates]
    return Closing(nn.Identity(), made, [weight for _, weight in gates], whole), made


def values(gate: Gate) -> list[float]:
    return [round(value, 6) for value in gate.values.tolist()]


def test_the_threshold_rises_with_the_square_once_half_of_the_steps_are_done() -> None:
    assert DENSE_SHARE == 0.5
    objective, (gate,) = closing(([0.5, 0.1, -0.3], 1.0))
    for done, expected in [
        (0.25, [0.5, 0.1, -0.3]),
        (0.5, [0.5, 0.1, -0.3]),
        (0.75, [0.4, 0.0, -0.2]),  # 0.4 * (1 / 2) ** 2 in all
        (1.0, [0.1, 0.0, 0.0]),  # 0.4 in all: 0.3 more
    ]:
        objective.after_step(done)
        assert values(gate) == expected


def test_a_gate_that_costs_more_is_shrunk_by_more() -> None:
    objective, (cheap, dear) = closing(([0.5, 0.15], 0.5), ([0.9, 0.5], 1.5))
    objective.after_step(1.0)
    assert (values(cheap), values(dear)) == ([0.3, 0.0], [0.3, 0.0])


def test_what_training_opens_again_is_shrunk_by_what_is_added_alone() -> None:
    objective, (gate,) = closing(([0.05, 1.0], 1.0))
    objective.after_step(0.75)
    with torch.no_grad():
        gate.values[0] = 0.35
    objective.after_step(1.0)
    assert values(gate) == [0.05, 0.6]


def test_training_taken_up_from_a_checkpoint_does_not_shrink_twice() -> None:
    once, (gate,) = closing(([1.0], 1.0))
    once.after_step(0.75)
    again, (other,) = closing((gate.values.tolist(), 1.0))
    again.load_state_dict(once.state_dict())
    again.after_step(1.0)
    assert values(other) == [0.6]


def test_the_error_is_the_divergence_from_the_dense_network() -> None:
    dense = nn.Linear(4, 3)
    objective = Closing(dense, [], [], 0.0)
    batch = Batch(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(5), torch.zeros(5), 0)
    assert float(objective(dense, batch)["dense"].detach()) == pytest.approx(0.0, abs=1e-7)
    other = nn.Linear(4, 3)
    p, q = (one(batch.images).detach().softmax(1) for one in (dense, other))
    expected = float((p * (p / q).log()).sum() / 5)
    assert float(objective(other, batch)["dense"].detach()) == pytest.approx(expected, rel=1e-5)
    assert not list(objective.parameters()), "the dense network would be trained, and saved"


def test_the_least_threshold_that_meets_the_budget_by_hand() -> None:
    gates = [torch.tensor([0.9, 0.4, 0.1]), torch.tensor([0.8, 0.6])]
    # Over their weights 0.9, 0.4, 0.1 and 0.4, 0.3; a unit costs 1 and 2.
    weights, prices = [1.0, 2.0], [1.0, 2.0]
    for limit, expected in [(7.0, 0.0), (6.9, 0.1), (6.0, 0.1), (5.9, 0.3), (3.9, 0.4), (0.5, 0.9)]:
        assert threshold(gates, weights, prices, limit) == pytest.approx(expected)


@pytest.mark.parametrize("limit", [0.0, 10.0, 55.0, 100.0, 1000.0])
def test_above_the_threshold_the_budget_is_met_and_with_one_gate_more_it_is_not(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gates = [torch.rand(count, generator=generator) for count in (7, 11, 5)]
    weights, prices = [0.5, 1.0, 2.0], [2.0, 4.0, 8.0]
    found = threshold(gates, weights, prices, limit)

    def cost(at_least: bool) -> float:
        where = torch.ge if at_least else torch.gt
        each = [
            p * int(where(gate.double() / w, found).sum()) for gate, w, p in zip(gates, weights, prices, strict=True)
        ]
        return sum(each)

    assert cost(at_least=False) <= limit
    assert cost(at_least=True) > limit or found == 0.0


@pytest.mark.parametrize(
    ("layer", "shape", "scheme"),
    [
        (nn.Linear(12, 9), (2, 5, 12), "channel"),
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 7), "channel"),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (2, 6, 7, 7), "spatial"),
        (nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 7, 7), "channel"),
    ],
)
def test_gates_as_they_begin_change_nothing_and_are_shares_of_the_energy(
    layer: schemes.Layer, shape: tuple[int, ...], scheme: schemes.Scheme
) -> None:
    model = nn.Sequential(layer)
    (way,) = [w for w in ways_of(Candidate("0", layer, shape[1:], 1), "plain", None, (scheme,)) if w.scheme == scheme]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    gate = install(model, way)
    # Two layers in fp32 in place of one; values of size 1.
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert float(gate.values.detach().square().sum()) == pytest.approx(1.0, rel=1e-6)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["0.1.values"]


def test_components_follow_their_gates_in_every_group() -> None:
    layer = nn.Conv2d(8, 8, 1, groups=2, bias=False)
    (way,) = ways_of(Candidate("0", layer, (8, 3, 3), 1), "plain", None, ())
    gates = torch.tensor([0.1, 0.0, -0.7, 0.3, 0.2, 0.5, 0.0, 0.4], dtype=torch.double)
    found = ordered(way, gates)
    sorted_gates = torch.tensor([[0.7, 0.3, 0.1, 0.0], [0.5, 0.4, 0.2, 0.0]], dtype=torch.double)
    for rank in range(5):
        kept = sorted_gates.clone()
        kept[:, rank:] = 0
        left_out = 1 - float(kept.square().sum() / sorted_gates.square().sum())
        assert float(found.losses[rank]) == pytest.approx(left_out, abs=1e-12)
    # The components themselves are as the spectrum has them: gates choose, and shrink nothing.
    order = torch.tensor([[2, 3, 0, 1], [1, 3, 0, 2]])
    for rank in range(5):
        kept = torch.zeros(2, 4, dtype=torch.double).scatter(1, order[:, :rank], 1.0)
        a, b = found.factors.pair(rank)
        expected = way.factors.left * (kept * way.factors.spectrum)[:, None, :] @ way.factors.right
        torch.testing.assert_close(a @ b, expected, rtol=0, atol=1e-12)


def test_a_layer_all_of_whose_gates_closed_loses_nothing_at_any_rank() -> None:
    (way,) = ways_of(Candidate("0", nn.Linear(8, 8), (8,), 1), "plain", None, ())
    assert ordered(way, torch.zeros(8, dtype=torch.double)).losses.tolist() == [0.0] * 9


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_without_training_the_spectra_decide_by_what_a_unit_costs(digits: Data, metric: Any) -> None:
    given = artifact("vit")
    model = given.model()
    ladders = plain_ways(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ways, figures = close_gates(model, ladders, 0.6, STILL, context(digits, given), metric=metric)

    assert figures["steps"] == 2 * 32 // 8
    assert state_digest(model.state_dict()) == state_digest(before)
    assert [(way.candidate.name, way.scheme) for way in ways] == [(w[0].candidate.name, w[0].scheme) for w in ladders]
    unit = [way.macs(1) if metric == "macs" else way.params(1) for way in ways]
    weights = [one * len(unit) / sum(unit) for one in unit]
    shares = [(way.factors.spectrum / way.factors.spectrum.square().sum().sqrt())[0] for (way,) in ladders]
    whole = costs.count(model, SIZE)[metric]
    dense = sum(way.dense_macs if metric == "macs" else way.dense_params for way in ways)
    limit = 0.6 * whole - (whole - dense)
    total = 1.2 * threshold(shares, weights, unit, limit)
    expected = [int((share > total * weight).sum()) for share, weight in zip(shares, weights, strict=True)]
    assert figures["open"] == expected
    assert sum(n * one for n, one in zip(expected, unit, strict=True)) <= limit
    assert len(set(expected)) > 1, "all layers alike, so costs and spectra decided nothing"


def test_a_grouped_layer_pays_for_a_rank_in_all_groups_at_once(digits: Data) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 4, stride=4)
            self.mix = nn.Conv2d(32, 32, 1, groups=2)
            self.head = nn.Linear(32, 10)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.mix(self.stem(images)).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    model, given = Grouped().eval(), artifact("vit")
    ladders = [one for one in plain_ways(model) if one[0].candidate.name == "mix"]
    whole = costs.count(model, SIZE)["params"]
    # The 2 * 16 gates stand for 1024 weights, 512 more than the layer has: with room for these, none has to close.
    share = 1 + (512 + 1e-3) / whole
    ways, figures = close_gates(model, ladders, share, STILL, context(digits, given), metric="params")
    assert figures["open"] == [32]
    assert ways[0].factors.spectrum.shape == (2, 16)


def test_training_moves_the_gates_and_nothing_else(digits: Data) -> None:
    given = artifact("vit")
    model = given.model()
    ladders = plain_ways(model)
    training = STILL.model_copy(update={"lr": 0.05, "epochs": 4})
    moved, still = (
        close_gates(model, ladders, 0.5, one, context(digits, given), metric="params")[0] for one in (training, STILL)
    )
    pairs = zip(moved, still, strict=True)
    assert any(not torch.allclose(one.losses, two.losses, rtol=0, atol=0.05) for one, two in pairs)
    for one, (was,) in zip(moved, ladders, strict=True):
        # The same components, put in another order.
        similar = (one.factors.left[0].T @ was.factors.left[0]).abs()
        assert torch.allclose(similar.amax(1), torch.ones(len(similar), dtype=torch.double), rtol=0, atol=1e-9)
    assert state_digest(model.state_dict()) == given.weights


def test_the_pass_takes_its_ranks_from_the_gates(digits: Data) -> None:
    given = artifact("vit")
    step = LowRank(to="0.6x-params", select="gated", align=2, min_width=16, gate_epochs=3, gate_lr=0.01, **BLIND)
    after = step(given, context(digits, given))
    plan: Any = after.history[-1].plan
    budget = plan["budget"]
    assert budget["select"] == "gated"
    assert after.costs["params"] == budget["achieved"] <= budget["limit"]
    assert len(budget["gates"]["open"]) == len(plan["layers"]) + list(plan["dense"].values()).count(
        "the budget is met with less loss elsewhere"
    )
    assert budget["gates"]["steps"] == 3 * 32 // 8
    assert "calib" in step.reads
    assert given.digest == artifact("vit").digest


def test_gates_need_calibration_images(digits: Data) -> None:
    step = LowRank(to="0.6x-params", select="gated", align=2, min_width=16, **BLIND)
    with pytest.raises(DataError, match=r"step 1 'low-rank' reads the split 'calib', which the data lacks"):
        Pipeline((step,)).check(artifact("vit"), Context())


def test_gates_do_not_close_in_several_processes(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    given = artifact("vit")
    model = given.model()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        PassError, match=r"^low-rank: select gated trains while it plans, in one process; run it without"
    ):
        close_gates(model, plain_ways(model), 0.5, STILL, context(digits, given), metric="params")
