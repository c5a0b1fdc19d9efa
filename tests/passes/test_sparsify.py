"""Sparsify: what shall be cut vanishes on schedule and nothing else does, so that the cut changes no output."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim import distributed, job, recipe, store
from slim.artifact import Artifact
from slim.contract import Advance, Context, Loading
from slim.data import Batch, Data, open_data
from slim.errors import OrderError, PassError, RecipeError
from slim.passes.finetune import Finetune
from slim.passes.prune import Prune
from slim.passes.prune.choose import numbers
from slim.passes.sparsify import (
    DONE,
    LEAST,
    Slices,
    Sparsify,
    Sparsifying,
    attention_term,
    grown,
    norms,
    shrink,
    soften,
    targets_of,
)
from slim.pipeline import Pipeline
from tests.contract.zoo import artifact

pytestmark = pytest.mark.usefixtures("one_thread")
CUT: dict[str, Any] = {"to": "0.6x-macs", "criterion": "group-l2", "ranking": "local", "align": 2, "floor": 2}
FAST: dict[str, Any] = {**CUT, "epochs": 2, "lr": 1e-3, "flip": 0.0, "precision": "fp32"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit, grow": ("vit", {"penalty": "grow"}),
    "vit, lasso": ("vit", {"penalty": "lasso"}),
    "vit, lasso, dims": ("vit", {"penalty": "lasso", "heads": "dims"}),
    "convnext, grow": ("convnext", {"penalty": "grow"}),
    "resnet, grow": ("resnet", {"penalty": "grow"}),
    "resnet, lasso": ("resnet", {"penalty": "lasso"}),
    # Without what 3 x 3 convolutions read, which pad.
    "resnet, bn-l1": ("resnet", {"penalty": "bn-l1", "skip": ("conv1", "*.conv1"), "to": "0.98x-macs"}),
}


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=16, calib=16)


@pytest.fixture(scope="module")
def context(digits: Data) -> Context:
    return Context(data=digits, loading=Loading(batch_size=16))


@pytest.fixture(scope="module")
def runs(context: Context) -> dict[str, Artifact]:
    """Networks after sparsify, eight steps each."""
    return {name: Sparsify(**{**FAST, **options})(artifact(net), context) for name, (net, options) in RUNS.items()}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def plan_of(made: Artifact) -> dict[str, Any]:
    plan: Any = made.history[-1].plan
    return dict(plan)


def said(made: Artifact) -> dict[str, Any]:
    metrics: Any = made.history[-1].metrics
    return dict(metrics)


def batch_of(count: int) -> Batch:
    return Batch(noise(count, 3, 32, 32).float(), torch.arange(count), torch.arange(count), 0)


def targets(made: Artifact) -> Slices:
    penalty: Any = made.history[-1].config["penalty"]
    return targets_of(made.model(), plan_of(made), penalty)


def parameters(made: Artifact) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in made.model().named_parameters()}


def outputs(made: Artifact) -> Tensor:
    with torch.inference_mode():
        found: Tensor = made.model()(noise(8, 3, 32, 32).float())
    return found


def sparsifying(value: Tensor, steps: int, **fields: Any) -> tuple[Sparsifying, Tensor]:
    """What is done after each of so many steps to the first two rows of a weight; and that weight."""
    model = nn.Linear(value.shape[1], len(value), bias=False)
    model.weight.data.copy_(value)
    return Sparsifying(
        model, {"weight": {0: [0, 1]}}, Sparsify(**CUT, **fields), steps, torch.device("cpu")
    ), model.weight.data


# Tensors


@pytest.mark.parametrize(("shape", "dim"), [((6, 5), 0), ((4, 6), 1), ((3, 6, 2, 2), 1), ((6,), 0)])
def test_soften_minimises_distance_plus_norm(shape: tuple[int, ...], dim: int) -> None:
    value, threshold, places = noise(*shape), 0.7, torch.tensor([0, 2, 5])
    softened = value.clone()
    soften(softened, dim, places, threshold)
    for place in range(6):
        given, found = value.select(dim, place).flatten(), softened.select(dim, place).flatten()
        if place not in places:
            assert torch.equal(found, given)
            continue
        # Candidates all over the place, near what was found, along the given slice, and zero.
        near = found + noise(500, len(given), seed=place) * torch.logspace(-4, 0, 500).double()[:, None]
        along = given * torch.linspace(0, 1.5, 301).double()[:, None]
        tried = torch.cat([noise(500, len(given), seed=9), near, along])
        objective = 0.5 * (tried - given).square().sum(1) + threshold * tried.norm(dim=1)
        best = 0.5 * (found - given).square().sum() + threshold * found.norm()
        assert best <= objective.min() + 1e-12  # rounding of fp64


def test_soften_by_hand() -> None:
    value = torch.tensor([[3.0, 4], [0.3, 0.4], [0, 0], [1, 1]])
    soften(value, 0, torch.tensor([0, 1, 2]), 2.0)
    torch.testing.assert_close(value, torch.tensor([[1.8, 2.4], [0, 0], [0, 0], [1, 1]]))  # 5 -> 3, 0.5 -> 0
    assert torch.equal(value[1:3], torch.zeros(2, 2))
    soften(value, 0, torch.tensor([0]), value[0].norm())  # a threshold equal to the norm
    assert torch.equal(value[0], torch.zeros(2))


def test_shrink_multiplies_its_slices_alone() -> None:
    value = torch.arange(6.0).view(2, 3)
    shrink(value, 1, torch.tensor([0, 2]), 0.5)
    assert value.tolist() == [[0, 1, 1], [1.5, 4, 2.5]]


def test_norms_are_over_the_mean_of_those_that_stay_and_always_finite() -> None:
    value = torch.tensor([[3.0, 4], [0, 0], [6, 8], [0, 1]])
    assert norms(value, 0, [0, 1]) == pytest.approx([5 / 5.5, 0])  # 10 and 1 stay
    assert norms(value, 1, [0]) == pytest.approx([math.sqrt(45 / 81)])
    assert norms(value[:, 1], 0, [3]) == pytest.approx([1 / 4])
    assert norms(torch.ones(4, 3), 0, [1, 2]) == [1, 1]
    assert norms(torch.zeros(4, 3), 0, [1, 2]) == [0, 0]
    assert norms(torch.tensor([2.0, 0, 0]), 0, [0]) == [2]  # nothing to compare with


def test_the_rate_grows_in_proportion_to_time_until_done_and_stays() -> None:
    assert grown(0) == 0
    assert grown(DONE) == pytest.approx(-math.log(LEAST))
    assert grown(DONE / 2) == pytest.approx(-math.log(LEAST) / 4)  # the integral of a straight line
    ends = [(grown(share + 1e-6) - grown(share)) / 1e-6 for share in (DONE, 0.9)]
    assert ends == pytest.approx([2 * -math.log(LEAST) / DONE] * 2, rel=1e-4)  # twice the mean rate before


@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_growing_leaves_the_least_when_done_whatever_the_steps(steps: int, strength: float) -> None:
    before = noise(4, 3).float()
    objective, value = sparsifying(before, steps, strength=strength)
    for step in range(1, round(DONE * steps) + 1):
        objective.after_step(step / steps)
    # fp32 rounds once a step.
    torch.testing.assert_close(value[:2], before[:2] * LEAST**strength, rtol=steps * 1e-7, atol=0)
    assert torch.equal(value[2:], before[2:])


@pytest.mark.parametrize("steps", [5, 40])
def test_lasso_ends_in_zero_when_done_and_takes_the_same_from_all(steps: int) -> None:
    before = torch.tensor([[3.0, 4], [0, 2.5], [1, 1]])
    objective, value = sparsifying(before, steps, penalty="lasso")
    for step in range(1, steps + 1):
        objective.after_step(step / steps)
        left = max(1 - step / steps / DONE, 0)
        expected = [5 * left, max(2.5 - 5 * (1 - left), 0), math.sqrt(2)]
        assert value.norm(dim=1).tolist() == pytest.approx(expected, abs=1e-5)
        assert torch.equal(value[:2], torch.zeros(2, 2)) == (step / steps >= DONE)


def test_lasso_ends_in_zero_although_training_pushes_from_zero_up() -> None:
    objective, value = sparsifying(torch.zeros(3, 2), 50, penalty="lasso")
    for step in range(1, 51):
        value += 0.1
        objective.after_step(step / 50)
        assert torch.equal(value[:2], torch.zeros(2, 2)) == (step / 50 >= DONE)


def test_attention_term_by_hand() -> None:
    first = torch.tensor([[[[1.0, 0], [0.5, 0.5]]]])
    second = torch.full((2, 3, 4, 4), 0.25)
    expected = ((math.log(2) + 2 * math.log(1.25)) / 4 + math.log(1 + 1 / 16)) / 2
    assert float(attention_term([first, second])) == pytest.approx(expected)
    one, all_alike = torch.eye(577)[None, None], torch.full((1, 1, 577, 577), 1 / 577)
    # Least where attention is most diffuse, and small even where it is not: log(2) / 577.
    assert float(attention_term([all_alike])) == pytest.approx(1 / 577**2, rel=1e-3)
    assert float(attention_term([one])) == pytest.approx(math.log(2) / 577)


# What vanishes


@pytest.mark.parametrize("name", RUNS)
def test_what_shall_be_cut_has_vanished_and_the_report_says_so(name: str, runs: dict[str, Artifact]) -> None:
    made, metrics = runs[name], said(runs[name])
    values = parameters(made)
    wanted = {key: dims for key, dims in plan_of(made)["keep"].items() if key in values}
    if "bn-l1" in name:
        wanted = {key: dims for key, dims in wanted.items() if ".bn" in key and key.endswith(".weight")}
    found = targets(made)
    assert found == {
        key: {int(dim): sorted({*range(values[key].shape[int(dim)])} - {*numbers(kept)}) for dim, kept in dims.items()}
        for key, dims in wanted.items()
    }
    assert metrics["targets"] == sum(len(places) for dims in found.values() for places in dims.values()) > 10
    assert metrics["vanished"] == 1.0
    assert metrics["largest"] < 1e-3
    assert "losses" not in metrics  # of which there is one: no attention term
    for key, dims in found.items():
        for dim, places in dims.items():
            zero = (values[key].movedim(dim, 0).reshape(values[key].shape[dim], -1) == 0).all(1)
            assert zero.nonzero()[:, 0].tolist() == ([] if "grow" in name else places), key


def test_a_scale_vanishes_and_its_bias_stays(runs: dict[str, Artifact]) -> None:
    values, found = parameters(runs["resnet, bn-l1"]), targets(runs["resnet, bn-l1"])
    assert found
    for key, dims in found.items():
        for stays in (key.replace(".weight", ".bias"), key.replace(".bn", ".conv")):
            assert (values[stays][dims[0]] != 0).all()


def test_a_useless_unit_goes_to_zero_and_the_others_stay(context: Context) -> None:
    given = artifact("vit")
    state, units = {key: value.clone() for key, value in given.state_dict().items()}, [3, 4, 50, 191]
    state["blocks.0.mlp.fc1.weight"][units] *= 1e-3
    state["blocks.0.mlp.fc2.weight"][:, units] *= 1e-3
    step = Sparsify(**{**FAST, "to": "0.99x-params"}, penalty="lasso", skip=("blocks.1.*", "*.attn.*"))
    made = step(Artifact(given.backbone, state), context)
    (entry,) = plan_of(made)["groups"].values()
    assert entry["kept"] <= 188
    values = parameters(made)
    for weight in (values["blocks.0.mlp.fc1.weight"], values["blocks.0.mlp.fc2.weight"].T):
        zero = (weight == 0).all(1).nonzero()[:, 0].tolist()
        assert {*units} <= {*zero}
        assert len(zero) == 192 - entry["kept"]


def test_untrained_targets_shrink_and_nothing_else_does(context: Context) -> None:
    made = Sparsify(**{**FAST, "optimizer": "sgd", "lr": 1e-12, "weight_decay": 0.0})(artifact("vit"), context)
    before, after, found = parameters(artifact("vit")), parameters(made), targets(made)
    assert len(found) < len(before)
    for key, value in before.items():
        expected = value.clone()
        for dim, places in found.get(key, {}).items():
            shrink(expected, dim, torch.tensor(places), math.exp(-grown(1.0)))
        torch.testing.assert_close(after[key], expected, rtol=1e-5, atol=1e-9)  # eight roundings; steps of 1e-12


def test_what_has_targets_has_no_weight_decay_and_the_rest_has(context: Context) -> None:
    # Gradients are clipped to 1, so eight steps of 1e-6 with momentum 0.9 move no value by more than 8e-5.
    fast: dict[str, Any] = {**FAST, "optimizer": "sgd", "lr": 1e-6, "weight_decay": 1e4, "strength": 1e-9}
    made = Sparsify(**fast)(artifact("vit"), context)
    before, after, found = parameters(artifact("vit")), parameters(made), targets(made)
    spared = {key for key, value in before.items() if value.ndim < 2} | {"pos_embed", "cls_token"}
    for key, value in before.items():
        if key in found or key in spared:
            torch.testing.assert_close(after[key], value, rtol=0, atol=8e-5)
        else:
            assert after[key].norm() < 0.95 * value.norm(), key
    assert {"blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight"} <= {*found}
    assert {"head.weight", "patch_embed.proj.weight"} <= {*before} - {*found} - spared


def test_nothing_vanishes_with_hardly_any_strength_and_it_is_said(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    made = Sparsify(**{**FAST, "epochs": 1}, strength=1e-9)(artifact("vit"), context)
    assert said(made)["vanished"] < 0.01  # a bias may be near zero to begin with
    assert said(made)["largest"] > 1
    count = said(made)["targets"]
    left = count - round(said(made)["vanished"] * count)
    assert f"{left} of {count} slices are left, the largest at " in caplog.text
    assert "of what stays; raise --strength or --epochs" in caplog.text


def test_mixup_and_clipping_are_those_of_the_training_loop(context: Context) -> None:
    step, given = Sparsify(**{**FAST, "epochs": 1}), artifact("vit")
    other = Sparsify(**{**FAST, "epochs": 1}, mixup=0.4, clip=1e-3)
    assert said(step(given, context))["loss"] != said(other(given, context))["loss"]


# The cut


@pytest.mark.parametrize("name", RUNS)
def test_cutting_what_has_vanished_changes_no_output(name: str, runs: dict[str, Artifact], context: Context) -> None:
    made = runs[name]
    cut = Prune(to="sparsified", repair="none")(made, context)
    assert cut.costs["params"] < made.costs["params"]
    before, after = outputs(made), outputs(cut)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5  # fp32, and 1e-4 squared of `grow`


def test_prune_cuts_exactly_what_was_chosen(runs: dict[str, Artifact], context: Context) -> None:
    made = runs["vit, lasso"]
    cut = Prune(to="sparsified", repair="none")(made, context)
    chosen = plan_of(made)
    assert plan_of(cut) == {key: chosen[key] for key in ("groups", "keep", "attributes", "left")}
    before, after = made.state_dict(), cut.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        for dim, kept in chosen["keep"].get(key, {}).items():
            value = value.index_select(int(dim), torch.tensor(numbers(kept)))
        assert torch.equal(after[key], value)


def test_prune_needs_a_sparsify_right_before_it(runs: dict[str, Artifact], context: Context) -> None:
    prune = Prune(to="sparsified", repair="none")
    with pytest.raises(
        PassError, match=r"^prune: --to sparsified cuts what .*, but nothing is before it; put it there$"
    ):
        prune(artifact("vit"), context)
    between = Finetune(epochs=1, flip=0.0, precision="fp32")(runs["vit, lasso"], context)
    with pytest.raises(PassError, match=r"^prune: .* but 'finetune' is before it; put it there$"):
        prune(between, context)


@pytest.mark.parametrize(("chain", "says"), [((), "none follows"), ((Finetune(),), "step 2 'finetune' follows, which")])
def test_a_chain_without_a_structure_behind_it_is_refused(chain: tuple[Any, ...], says: str, context: Context) -> None:
    step = Sparsify(**CUT)
    with pytest.raises(OrderError, match=f"^step 1 'sparsify' prepares a structural pass, but {says}"):
        Pipeline((step, *chain)).check(artifact("vit"), context)
    Pipeline((step, Prune(to="sparsified"), *chain)).check(artifact("vit"), context)


# The attention term


def given(made: Artifact, step: Sparsify, context: Context) -> tuple[nn.Module, Context]:
    """A network, and what `fit` is given with it."""
    model = made.model()
    context = replace(context, backbone=made.backbone)
    return model, replace(context, plan=step.plan(model, context))


def test_the_term_is_of_all_blocks_and_trains_queries_and_keys(context: Context) -> None:
    step = Sparsify(**FAST, attention=0.5)
    model, _ = given(artifact("vit"), step, context)
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.qkv.weight").mul_(5)  # blocks that differ
    by_hand: list[Tensor] = []

    def see(_: nn.Module, __: Any, rows: Tensor) -> None:
        query, key, _value = rows.view(4, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        by_hand.append((query @ key.mT / 4).softmax(3))

    seen = [block.attn.qkv.register_forward_hook(see) for block in model.blocks]  # type: ignore[union-attr]
    objective = Sparsifying(model, {}, step, 1, torch.device("cpu"))
    losses = objective(model, batch_of(4))
    assert len(by_hand) == len(seen) == 2
    # Fused or not, by hand or not: fp32 in another order.
    torch.testing.assert_close(losses["attention"], 0.5 * attention_term(by_hand), rtol=1e-4, atol=0)
    losses["attention"].backward()  # type: ignore[no-untyped-call]
    for key in ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"):
        assert model.get_parameter(key).grad[:96].abs().sum(1).gt(0).all()  # type: ignore[index]
    assert model.get_parameter("head.weight").grad is None


def test_attention_without_a_fused_kernel_shows_its_probabilities_too() -> None:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=10)
    objective = Sparsifying(model, {}, Sparsify(**CUT, attention=1.0), 1, torch.device("cpu"))
    losses = objective(model, batch_of(2))
    assert 1 / 16**2 * 0.9 < float(losses["attention"].detach()) < math.log(2) / 16


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_attention_is_left_as_it_was(ends: str, context: Context) -> None:
    step = Sparsify(**{**FAST, "epochs": 1}, attention=0.01)
    model, context = given(artifact("vit"), step, context)
    modules = [module for module in model.modules() if hasattr(module, "fused_attn")]
    modules[0].fused_attn = False  # type: ignore[assignment]
    before = [module.fused_attn for module in modules]
    assert before == [False, True]
    if ends == "well":
        assert len(step.fit(model, model, context)["losses"]["attention"]) == 1  # type: ignore[arg-type, index, call-overload]
    else:
        with pytest.raises(KeyboardInterrupt):
            step.fit(model, model, replace(context, progress=killing_at(2)))
    assert [module.fused_attn for module in modules] == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# What cannot work


def test_what_cannot_work_says_so_in_one_line(context: Context) -> None:
    with pytest.raises(PassError, match=r"^sparsify: attention has a weight, but no attention of the network shows"):
        Sparsify(**FAST, attention=0.01)(artifact("resnet"), context)
    says = r"^sparsify: penalty bn-l1 needs a batch norm, and group 'blocks.0.attn.qkv:heads' has none; use grow$"
    with pytest.raises(PassError, match=says):
        Sparsify(**FAST, penalty="bn-l1")(artifact("vit"), context)
    with pytest.raises(PassError, match=r"^sparsify: to 100M-macs cuts nothing \(.*\); ask for less"):
        Sparsify(**{**FAST, "to": "100M-macs"})(artifact("vit"), context)
    with pytest.raises(RecipeError, match=r"^sparsify: .*ema=0.9 would average channels back that have vanished"):
        recipe.build_pass(Sparsify, {"to": "0.5x-macs", "ema": 0.9})


# Taken up, and in several processes


def killing_at(step: int) -> Any:
    @contextmanager
    def killing(title: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(steps: int, note: str | None = "") -> None:
            nonlocal done
            done += steps
            if title.startswith("training") and done == step:
                raise KeyboardInterrupt

        yield advance

    return killing


@pytest.mark.parametrize("name", ["vit, grow", "vit, lasso"])
def test_a_killed_training_taken_up_ends_with_the_same_values(
    name: str, runs: dict[str, Artifact], context: Context, tmp_path: Path
) -> None:
    net, options = RUNS[name]
    step, place = Sparsify(**{**FAST, **options}), tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        step(artifact(net), replace(context, checkpoint=place, progress=killing_at(6)))  # in the second epoch of four
    assert place.exists()
    again = step(artifact(net), replace(context, checkpoint=place))
    assert again.weights == runs[name].weights
    assert said(again) == said(runs[name])


RECIPE = """\
model:
  name: vit_tiny_patch16_224
  args: {img_size: 32, patch_size: 8, depth: 1, embed_dim: 48, num_heads: 3}
  weights: none
  input: {size: [3, 32, 32], crop: 1.0}
data: {source: digits, batch_size: 25, limit: {train: 100, val: 16}, calib: 16}
threads: 1
device: cpu
passes:
  - {name: sparsify, to: 0.6x-macs, align: 2, floor: 2, penalty: lasso, attention: 0.01, epochs: 2, TRAINING}
  - {name: prune, to: sparsified}
"""
TRAINING = "lr: 0.02, optimizer: sgd, flip: 0.0, precision: fp32"


def learn(file: Path, place: Path) -> None:
    """What the recipe comes to, without files that are measured or shipped; also the script of several processes."""
    prepared = job.prepare(recipe.parse(recipe.read(file), place="test"))
    result = prepared.recipe.pipeline()(prepared.start.artifact, prepared.context())
    distributed.on_main(lambda: store.save(result.artifact, place))


def test_two_processes_sparsify_as_one_does(tmp_path: Path) -> None:
    file, script = tmp_path / "recipe.yaml", tmp_path / "script.py"
    file.write_text(RECIPE.replace("TRAINING", TRAINING))
    imports = "import sys\nfrom pathlib import Path\nfrom slim import distributed, job, recipe, store\n"
    script.write_text(f"{imports}\n{inspect.getsource(learn)}\nlearn(Path(sys.argv[1]), Path(sys.argv[2]))\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(file), str(tmp_path / "together")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    learn(file, tmp_path / "alone")
    alone, together = store.load(tmp_path / "alone"), store.load(tmp_path / "together")
    one, two = alone.history[0], together.history[0]
    assert one.plan == two.plan
    assert one.metrics["vanished"] == two.metrics["vanished"] == 1.0
    # SGD is linear in the gradient, so float32 sums in another order stay small.
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5, abs=1e-6)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key], value, rtol=1e-5, atol=1e-5)
