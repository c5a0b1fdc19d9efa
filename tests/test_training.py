"""The training loop: taken up after a kill, reproducible, stopped when it diverges."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim import job, recipe, training
from slim.artifact import Artifact, Backbone, Preprocessing, Step, state_digest
from slim.contract import Context, Loading
from slim.data import Augment, Batch, Data, open_data
from slim.errors import DivergedError, PassError, RecipeError, StoreError
from slim.passes.finetune import Finetune, label_loss
from slim.training import Training, schedule_of

pytestmark = pytest.mark.usefixtures("one_thread")
INPUT = Preprocessing(size=(3, 32, 32), crop=1.0)
VIT_ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
NETWORKS = {
    "layer-norm": Backbone(name="vit_tiny_patch16_224", kwargs=VIT_ARGS, num_classes=10, input=INPUT),
    "dropout": Backbone(
        name="vit_tiny_patch16_224",
        kwargs={**VIT_ARGS, "drop_rate": 0.2, "drop_path_rate": 0.2},
        num_classes=10,
        input=INPUT,
    ),
    "batch-norm": Backbone(name="mobilenetv2_035", num_classes=10, input=INPUT),
}
PLAIN = Augment(flip=0.0, scale_low=1.0)
STEPS = 4  # of an epoch: 64 images in batches of 16


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=16)


def context_of(data: Data, backbone: Backbone, **fields: Any) -> Context:
    return Context(data=data, backbone=backbone, loading=Loading(batch_size=16), **fields)


def trained(
    data: Data,
    network: str = "layer-norm",
    *,
    objective: training.Objective = label_loss,
    augment: Augment = PLAIN,
    checkpoint: Path | None = None,
    seed: int = 0,
    **fields: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    settings = Training(**{"epochs": 3, "lr": 1e-3, "precision": "fp32", **fields})
    backbone = NETWORKS[network]
    model = backbone.build(seed=1)
    context = context_of(data, backbone, checkpoint=checkpoint, seed=seed)
    return model, training.train(model, objective, settings, augment, context)


class At:
    """Cross-entropy, except at one step (from 1), where something else happens."""

    def __init__(self, step: int, loss: Any) -> None:
        self.step, self.loss, self.calls = step, loss, 0

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        usual = label_loss(model, batch)
        return {"label": self.loss(usual["label"])} if self.calls == self.step else usual


class Counted(At):
    """Is told the steps done and all steps, before each."""

    def __init__(self, step: int, loss: Any) -> None:
        super().__init__(step, loss)
        self.told: list[tuple[int, int]] = []

    def before_step(self, step: int, total: int) -> None:
        assert self.calls == len(self.told), "not before the forward pass"
        self.told.append((step, total))


def interrupt(loss: Tensor) -> Tensor:
    raise KeyboardInterrupt


def broken_gradient(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is not a number: the root is infinitely steep at 0."""
    return loss + (loss - loss).abs().sqrt()


@pytest.mark.parametrize(
    ("network", "fields", "augment"),
    [
        ("layer-norm", {}, PLAIN),
        ("dropout", {"ema": 0.9}, Augment(mixup=0.2, smoothing=0.1, erase=0.3)),
        ("batch-norm", {"optimizer": "sgd", "lr": 0.05, "precision": "bf16"}, PLAIN),
    ],
    ids=["adamw", "dropout, mixup and moving average", "batch norm, momentum and bf16"],
)
def test_training_taken_up_ends_with_the_values_of_uninterrupted_training(
    network: str, fields: dict[str, Any], augment: Augment, digits: Data, tmp_path: Path
) -> None:
    whole, said = trained(digits, network, augment=augment, **fields)
    place = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        # After epoch 2 begun, so that half an epoch is done again.
        trained(digits, network, objective=At(STEPS + 3, interrupt), augment=augment, checkpoint=place, **fields)
    watched = At(-1, interrupt)
    again, says = trained(digits, network, objective=watched, augment=augment, checkpoint=place, **fields)
    assert watched.calls == 2 * STEPS, "the first epoch was not done again"
    assert state_digest(again.state_dict()) == state_digest(whole.state_dict())
    assert says == said


def test_a_checkpoint_within_an_epoch_is_taken_up_there(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 3)
    whole, _ = trained(digits)
    place = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        trained(digits, objective=At(5, interrupt), checkpoint=place)
    with caplog.at_level(logging.INFO, "slim"):
        again, _ = trained(digits, checkpoint=place)
    assert "training goes on from step 3 of 12" in caplog.text
    assert state_digest(again.state_dict()) == state_digest(whole.state_dict())


def test_an_objective_is_told_the_step_before_each_forward_pass_and_after_a_kill_the_right_one(
    digits: Data, tmp_path: Path
) -> None:
    whole, total = Counted(-1, interrupt), 3 * STEPS
    trained(digits, objective=whole)
    assert whole.told == [(step, total) for step in range(total)]
    place = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        trained(digits, objective=Counted(STEPS + 2, interrupt), checkpoint=place)
    again = Counted(-1, interrupt)
    trained(digits, objective=again, checkpoint=place)
    assert again.told == [(step, total) for step in range(STEPS, total)]


RECIPE = """\
model:
  name: vit_tiny_patch16_224
  args: {img_size: 32, patch_size: 8, depth: 1, embed_dim: 32, num_heads: 2}
  weights: none
  input: {size: [3, 32, 32], crop: 1.0}
data: {source: digits, batch_size: 1, limit: {train: 400, val: 16}}
threads: 1
device: cpu
passes:
  - {name: finetune, epochs: 1, lr: 1.0e-3, flip: 0.0, precision: fp32}
"""


def test_a_killed_run_continued_with_resume_ends_with_the_same_weights(tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(RECIPE)
    command = [sys.executable, "-m", "slim", "run", "-f", str(file), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (found := list((out / "steps").glob("*.checkpoint"))):
            assert killed.poll() is None, "the run ended before it wrote a checkpoint"
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert [path.name for path in (out / "steps").iterdir() if not path.name.endswith(".partial")] == [found[0].name]

    resumed = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=True)
    assert "training goes on from step 200 of 400" in " ".join(resumed.stderr.split())
    assert not list((out / "steps").glob(".*checkpoint"))

    whole = job.execute(job.prepare(recipe.parse(recipe.read(file), place="test")), tmp_path / "whole")
    assert job.Run(out).artifact.weights == whole.artifact.weights


@pytest.fixture
def checkpoint(digits: Data, tmp_path: Path) -> Path:
    place = tmp_path / ".01-finetune-0123abcd.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        trained(digits, objective=At(STEPS + 2, interrupt), checkpoint=place)
    return place


@pytest.mark.parametrize("damage", ["cut short", "empty", "one bit", "something else"])
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: str, checkpoint: Path, digits: Data) -> None:
    content = bytearray(checkpoint.read_bytes())
    if damage == "one bit":  # torch's own reader does not notice
        content[len(content) // 2] ^= 1
    else:
        content = {"cut short": content[: len(content) // 2], "empty": b"", "something else": b"hello"}[damage]
    checkpoint.write_bytes(content)
    with pytest.raises(StoreError, match=r"checkpoint: not a whole checkpoint; delete it to start the step again$"):
        trained(digits, checkpoint=checkpoint)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_at_its_step_and_keeps_the_checkpoint(
    value: float, digits: Data, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoint"
    with pytest.raises(DivergedError, match=rf"loss is {value} at step 7 of 12; lower --lr or --clip \(.* step 4\)"):
        trained(digits, objective=At(7, lambda loss: loss * value), checkpoint=place)
    whole, _ = trained(digits)
    again, _ = trained(digits, checkpoint=place)
    assert state_digest(again.state_dict()) == state_digest(whole.state_dict())


def test_values_that_were_spoiled_by_the_last_step_before_a_checkpoint_are_not_kept(
    digits: Data, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoint"
    with pytest.raises(DivergedError, match=r"loss is nan at step 9 of 12; .*step 4"):
        trained(digits, objective=At(2 * STEPS, broken_gradient), checkpoint=place)
    again, _ = trained(digits, checkpoint=place)
    assert all(value.isfinite().all() for value in again.state_dict().values())


def test_values_that_were_spoiled_by_the_very_last_step_are_no_result(digits: Data) -> None:
    with pytest.raises(DivergedError, match=r"'.*' is not finite after step 12; lower --lr .*\(no checkpoint"):
        trained(digits, objective=At(3 * STEPS, broken_gradient))


def test_divergence_names_the_step_of_the_chain_and_ends_with_1(tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match=r"^step 1 'finetune': training: loss is (nan|inf) at step \d+ of 8"
    ) as error:
        job.run(
            model={"name": "vit_tiny_patch16_224", "args": VIT_ARGS, "weights": "none", "input": {"size": [3, 32, 32]}},
            data={"source": "digits", "batch_size": 16, "limit": {"train": 64, "val": 16}},
            passes=[Finetune(epochs=2, lr=1e30, warmup=0, precision="fp32")],
            out=tmp_path / "run",
        )
    assert error.value.exit_code == 1
    assert not (tmp_path / "run" / "final").exists()


def test_the_moving_average_replaces_the_values(digits: Data) -> None:
    seen: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return label_loss(model, batch)

    last, _ = trained(digits, objective=watched)
    averaged, _ = trained(digits, ema=0.75)
    expected = dict(seen[0])
    for values in (*seen[1:], dict(last.named_parameters())):
        expected = {name: 0.75 * mean + 0.25 * values[name].detach() for name, mean in expected.items()}
    for name, value in averaged.named_parameters():
        # Twelve roundings of float32 in another order: 12 * 6e-8 of values below 1.
        torch.testing.assert_close(value.detach(), expected[name], rtol=0, atol=1e-6)


def test_losses_are_recorded_as_means_of_each_epoch(digits: Data) -> None:
    losses: list[float] = []

    def recorded(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        loss = label_loss(model, batch)
        losses.append(float(loss["label"].detach()))
        return loss

    _, figures = trained(digits, objective=recorded, epochs=2)
    assert figures["loss"] == pytest.approx([np.mean(losses[:STEPS]), np.mean(losses[STEPS:])], abs=1e-6)
    assert figures["loss"][1] < figures["loss"][0]
    assert (figures["steps"], figures["images"]) == (2 * STEPS, 2 * 64)


def test_images_of_a_split_smaller_than_the_batch_are_counted_once() -> None:
    data = open_data("digits", limit_train=5, limit_val=5)
    _, figures = trained(data, epochs=2)
    assert (figures["steps"], figures["images"]) == (2, 10)


@pytest.mark.parametrize("wanted", ["auto", "bf16", "fp32"])
def test_precision_is_that_of_the_forward_pass_and_never_of_the_values(wanted: str, digits: Data) -> None:
    dtypes: set[torch.dtype] = set()

    def watched(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs = model(batch.images)
        dtypes.add(outputs.dtype)
        return {"label": F.cross_entropy(outputs.float(), batch.target)}

    model, figures = trained(digits, objective=watched, epochs=1, precision=wanted)
    here = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    assert figures["precision"] == (here if wanted == "auto" else wanted)
    assert dtypes == {torch.bfloat16 if figures["precision"] == "bf16" else torch.float32}
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adamm", r"optimizer: 'adamm' is not an optimiser of timm; did you mean 'adam"),
        ("qqqqq", r"is not an optimiser of timm; timm.optim.list_optimizers\(\) has them all"),
        ("adahessian", r"needs second derivatives"),
    ],
)
def test_an_optimiser_that_cannot_work_is_refused_before_any_work(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=f"^finetune: .*{says}"):
        recipe.build_pass(Finetune, {"optimizer": name})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which the optimiser needs")
def test_an_optimiser_that_cannot_be_made_here_says_why(digits: Data) -> None:
    with pytest.raises(PassError, match=r"optimizer 'fusedadam' cannot be made here \(.*CUDA.*\); choose another"):
        trained(digits, optimizer="fusedadam")


def test_dropout_comes_from_the_seed(digits: Data) -> None:
    first, again, other = (trained(digits, "dropout", seed=seed)[0] for seed in (0, 0, 1))
    assert state_digest(first.state_dict()) == state_digest(again.state_dict())
    assert state_digest(first.state_dict()) != state_digest(other.state_dict())


def test_the_largest_seed_a_recipe_can_hold_works(digits: Data) -> None:
    trained(digits, seed=2**62, epochs=1)


def test_global_generators_are_left_as_they_were(digits: Data) -> None:
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]
    trained(digits, "dropout", augment=Augment(mixup=0.2, color_jitter=0.3), epochs=1)
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])


def test_the_network_comes_back_plain(digits: Data) -> None:
    model, _ = trained(digits, "batch-norm", epochs=1)
    assert not model.training
    assert all(value.grad is None and value.is_contiguous() for value in model.parameters())
    assert Artifact.of(model, NETWORKS["batch-norm"]).model() is not None


@pytest.mark.parametrize(("total", "warmup"), [(20, 0.2), (20, 0.0), (1, 0.9), (3, 0.9)])
def test_the_rate_rises_to_the_peak_and_falls_to_zero(total: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = schedule_of(optimizer, total, warmup)
    rates = []
    for step in range(total):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    rising = min(round(total * warmup), total - 1)
    falling = total - rising
    assert rates[:rising] == pytest.approx([2.0 * step / rising for step in range(rising)])
    assert rates[rising:] == pytest.approx([1 + math.cos(math.pi * step / falling) for step in range(falling)])


def test_frozen_norms_keep_their_statistics_and_normalise_by_them(digits: Data) -> None:
    before = NETWORKS["batch-norm"].build(seed=1).state_dict()
    statistics = [name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    for freeze in (True, False):
        model, _ = trained(digits, "batch-norm", epochs=1, freeze_norms=freeze)
        after = model.state_dict()
        assert statistics
        assert all(torch.equal(before[name], after[name]) == freeze for name in statistics)
        weights = [name for name in before if name.endswith("bn1.weight")]
        assert not any(torch.equal(before[name], after[name]) for name in weights), "their values are trained"


def test_folded_norms_that_would_be_normalised_by_a_batch_are_warned_of(
    digits: Data, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(*, folded: bool, **fields: Any) -> bool:
        caplog.clear()
        model = NETWORKS["batch-norm"].build(seed=1)
        if folded:
            model.get_parameter("bn1.bias").data.fill_(0.5)
            model.get_buffer("bn1.running_var").fill_(1 - 1e-5)
        context = context_of(digits, NETWORKS["batch-norm"])
        training.train(model, label_loss, Training(epochs=1, precision="fp32", **fields), PLAIN, context)
        return "1 of 52 batch norms are folded" in caplog.text

    assert warned(folded=True)
    assert not warned(folded=True, freeze_norms=True)
    assert not warned(folded=True, trainable="head")
    assert not warned(folded=False)


SPARSE = "blocks.0.mlp.fc1.weight"


def test_zeros_of_weights_made_sparse_before_are_held_and_no_others(digits: Data) -> None:
    model = NETWORKS["layer-norm"].build(seed=1)
    also, other = "blocks.0.mlp.fc2.weight", "blocks.0.attn.proj.weight"
    for name in (SPARSE, also, other):
        model.get_parameter(name).data[:, ::3] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # The second key is of a layer that the network no longer has.
    step = Step(name="mask", version=1, config={}, plan={"sparse": [SPARSE, "blocks.7.mlp.fc1.weight"]}, seed=0)
    context = context_of(digits, NETWORKS["layer-norm"], history=(step,), plan={"sparse": [also]})
    settings = Training(epochs=1, precision="fp32", ema=0.5)
    training.train(model, label_loss, settings, PLAIN, context)
    after = model.state_dict()
    for name in (SPARSE, also):
        assert torch.equal(after[name] == 0, before[name] == 0)
        assert not torch.equal(after[name], before[name])
    assert not (after[other] == 0).any()


def test_zeros_held_are_those_of_the_checkpoint_that_is_taken_up(digits: Data, tmp_path: Path) -> None:
    """Masks chosen again on another machine may differ in a tie; the values that go on are the checkpoint's."""
    place, settings = tmp_path / "checkpoint", Training(epochs=2, precision="fp32", ema=0.5)

    def masked(first: int) -> nn.Module:
        model = NETWORKS["layer-norm"].build(seed=1)
        model.get_parameter(SPARSE).data[:, first::2] = 0
        return model

    def go_on(model: nn.Module, objective: training.Objective, checkpoint: Path | None) -> nn.Module:
        context = context_of(digits, NETWORKS["layer-norm"], checkpoint=checkpoint, plan={"sparse": [SPARSE]})
        training.train(model, objective, settings, PLAIN, context)
        return model

    whole = go_on(masked(0), label_loss, None)
    with pytest.raises(KeyboardInterrupt):
        go_on(masked(0), At(STEPS + 2, interrupt), place)
    again = go_on(masked(1), label_loss, place)
    assert state_digest(again.state_dict()) == state_digest(whole.state_dict())
