"""Weight perturbation: pairs are held to the dense weights they stand for, and nothing is registered twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from slim.data import Data
from slim.errors import PassError
from slim.passes.distill import Distill
from slim.passes.distill.hidden import every_path
from slim.passes.distill.method import Outputs
from slim.passes.distill.perturbation import Perturbation, excess, off_size, relative_error
from slim.passes.low_rank import schemes
from slim.passes.low_rank.schemes import Scheme
from tests.passes.distill.classroom import (
    FACTOR,
    FAST,
    NETWORKS,
    STILL,
    VIT,
    after,
    artifact,
    context,
    noise,
    said,
    taught,
)

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")
DENSE = torch.tensor([[3.0, 0.0], [0.0, 4.0]])


def toy(kept: float = 3.0) -> nn.Sequential:
    """A pair of rank 1 whose product is [[kept, 0], [0, 0]]."""
    pair = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2))
    with torch.no_grad():
        pair[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        pair[1].weight.copy_(torch.tensor([[kept], [0.0]]))
    return pair


WEAKER = torch.tensor([[3.0, 0.0], [0.0, 1.0]])


def loss_of(method: Perturbation) -> Tensor:
    return method(Outputs(), Outputs(), torch.zeros(1))["perturb"]


def test_the_hinge_by_hand() -> None:
    # W - AB = diag(0, 4) and |W| = 5: an error of 4/5.
    assert float(relative_error(schemes.composed(toy()).detach(), DENSE)) == pytest.approx(0.8)
    pairs = (toy(), toy())
    method = Perturbation(pairs, (DENSE, DENSE), "perturb")
    assert float(loss_of(method).detach()) == 0
    with torch.no_grad():
        pairs[0][1].weight[0] = 0
    # Now AB = 0, an error of 1, 0.2 above that of the start; the other pair has not moved.
    assert float(loss_of(method).detach()) == pytest.approx(0.2**2 / 2)
    assert float(excess(torch.zeros(2, 2), DENSE, 1.0)) == 0


def test_the_largest_entry_by_hand() -> None:
    # The largest difference is 4 for the first, 2.5 for the second with diag(0.5, 0) against diag(3, 1).
    method = Perturbation((toy(), toy(0.5)), (DENSE, WEAKER), "perturb-max")
    assert float(loss_of(method).detach()) == pytest.approx((3.999**2 + 2.499**2) / 2)
    # It is drawn up to its size as well: no difference costs 1e-6.
    assert float(off_size(DENSE, DENSE)) == pytest.approx(1e-6)


def test_away_from_the_dense_weight_there_is_a_gradient_and_towards_it_none() -> None:
    for inputs, outputs, away in (
        ([[1.0, 0.0]], [[2.5], [0.0]], True),  # AB = diag(2.5, 0) errs by sqrt(0.25 + 16) / 5, more than 4 / 5
        ([[0.0, 1.0]], [[0.0], [4.0]], False),  # AB = diag(0, 4) errs by 3 / 5
    ):
        pair = toy()
        method = Perturbation((pair,), (DENSE,), "perturb")
        with torch.no_grad():
            pair[0].weight.copy_(torch.tensor(inputs))
            pair[1].weight.copy_(torch.tensor(outputs))
        loss = loss_of(method)
        loss.backward()
        assert (float(loss.detach()) > 0) is away
        for layer in (pair[0], pair[1]):
            assert layer.weight.grad is not None
            assert bool(layer.weight.grad.any()) is away


def kernels() -> dict[str, tuple[nn.Linear | nn.Conv2d, Scheme]]:
    return {
        "channel": (nn.Conv2d(6, 8, 3, stride=2, padding=1), "channel"),
        "spatial": (nn.Conv2d(6, 8, 3, stride=2, padding=1), "spatial"),
        "grouped": (nn.Conv2d(6, 8, 3, groups=2), "channel"),
    }


@pytest.mark.parametrize("kind", kernels())
def test_pairs_of_convolutions_are_held_too(kind: str) -> None:
    layer, scheme = kernels()[kind]
    pair = schemes.factored(layer, scheme, 2)
    with torch.no_grad():
        for seed, value in enumerate((pair[0].weight, pair[1].weight, layer.weight)):
            value.copy_(noise(1, (1, 1, value.numel()), seed=seed).view(value.shape))
    dense, product = layer.weight.detach(), schemes.composed(pair).detach()
    method = Perturbation.place(nn.ModuleDict({"conv": pair}), {"conv.weight": dense})
    assert method.pairs == (pair,)
    with torch.no_grad():
        pair[0].weight.mul_(3)
    begun, now = ((scale * product - dense).norm() / dense.norm() for scale in (1, 3))
    assert now > begun + 0.1
    # A difference of two numbers near 1 in float32, squared.
    assert float(loss_of(method).detach()) == pytest.approx(float((now - begun) ** 2), rel=1e-5)


def test_nothing_is_registered_twice_and_gradients_reach_the_pair() -> None:
    pair = toy(0.5)
    method = Perturbation((pair,), (WEAKER,), "perturb-max")
    assert [*method.parameters()] == []
    assert method.state_dict() == {}
    assert [name for name, _ in method.named_buffers()] == ["dense_0"]
    loss_of(method).backward()
    assert pair[0].weight.grad is not None
    assert pair[0].weight.grad.any()


def test_weights_of_other_shapes_and_plain_layers_are_left() -> None:
    student = nn.ModuleDict({"one": toy(), "two": toy(), "plain": nn.Linear(2, 2)})
    weights = {"one.weight": DENSE, "two.weight": torch.ones(3, 2), "plain.weight": DENSE}
    assert Perturbation.place(student, weights).pairs == (student["one"],)


def test_without_a_pair_it_is_an_error_unless_it_may_be_none() -> None:
    with pytest.raises(PassError, match=r"'perturb-max' finds no low-rank pair .*; put it behind low-rank, .* or use"):
        Perturbation.place(nn.Linear(2, 2), {"weight": DENSE}, "perturb-max")
    none = Perturbation.place(nn.Linear(2, 2), {"weight": DENSE}, may_be_none=True)
    assert none(Outputs(), Outputs(), torch.zeros(1)) == {}


def test_under_bf16_it_is_computed_in_float32() -> None:
    method = Perturbation((toy(0.1),), (DENSE,), "perturb-max")
    expected = loss_of(method)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(method)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# In the pass


def test_recovery_holds_pairs_where_there_are_any(digits: Data) -> None:
    given = artifact("vit")
    recover = Distill(**FAST, **STILL)
    result = after(recover, FACTOR(given), given, digits)
    assert set(said(result)["losses"]) == {"forward", "hidden", "perturb"}
    (teacher,) = said(result)["teachers"]
    assert teacher["pairs"] == 8
    result = after(recover, artifact("vit", seed=2), given, digits)
    assert set(said(result)["losses"]) == {"forward", "hidden"}
    assert "pairs" not in said(result)["teachers"][0]


def test_alone_it_needs_a_pair(digits: Data) -> None:
    given = artifact("vit")
    for method in ("perturb", "perturb-max"):
        with pytest.raises(PassError, match=f"method '{method}' finds no low-rank pair"):
            after(Distill(method=method, **FAST), given, given, digits)
        # The pair may be made later in the chain, so that a forecast cannot tell.
        here = replace(context(digits, teacher=given), backbone=given.backbone)
        assert Distill(method=method, **FAST).forecast(given, here)["auxiliary_params"] == 0


def test_the_dense_weight_is_that_before_the_teachers_norms_were_merged(digits: Data) -> None:
    """The student's norms are not merged, so its pairs stand for what was there before."""
    given = artifact("resnet")
    # Norms that divide by 2, so that merging them halves the weights.
    state = {name: value * 4 if name.endswith("running_var") else value for name, value in given.state.items()}
    given = replace(given, state=state)
    student = FACTOR(given)
    result = after(Distill(method="perturb-max", **FAST, **STILL), student, given, digits)
    _, _, (teacher,) = taught(student, given)
    expected, merged = (
        float(loss_of(Perturbation.place(student.model(), weights, "perturb-max")).detach())
        for weights in (given.state, teacher.model.state_dict())
    )
    assert said(result)["loss"][0] == pytest.approx(expected, abs=1e-6)  # recorded to six places
    assert abs(merged - expected) > 0.1 * expected


def test_drop_path_is_off_while_maps_are_compared(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "paths", ("vit_tiny_patch16_224", {**VIT, "drop_path_rate": 0.5}))
    given = artifact("paths")
    for method, off in (("hidden", True), ("recover", True), ("kd", False)):
        result = after(Distill(method=method, **FAST, **STILL), given, given, digits)
        # It is its own teacher: nothing but chance can tell them apart.
        assert (said(result)["loss"][0] <= 1e-6) is off


def test_drop_path_is_put_back() -> None:
    model = nn.Sequential(DropPath(0.3), nn.Identity(), DropPath(0.1)).train()
    ones = torch.ones(64, 1)
    with every_path(model):
        assert torch.equal(model(ones), ones)
    assert [model[0].drop_prob, model[2].drop_prob] == [0.3, 0.1]
