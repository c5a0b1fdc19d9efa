"""Which weights become zero, that they stay zero in whatever is trained afterwards, and which layers are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slim import store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Advance, Context, Loading
from slim.data import Data, open_data
from slim.errors import DataError, PassError
from slim.passes.calibrate import collect
from slim.passes.distill import Distill
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.mask import Mask
from slim.passes.merge import Merge
from slim.passes.patterns import PAIRS, cheapest, moments_of_fours, two_of_four
from slim.pipeline import Pipeline
from tests.contract.zoo import BLIND, SIZE, WIDE, ZOO, artifact

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"flip": 0.0, "precision": "fp32", "lr": 1e-3}
SMALLEST: dict[str, Any] = {"criterion": "magnitude", "epochs": 0}
"""Masks that look at no image and train nothing."""


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=16, calib=16)


@pytest.fixture(scope="module")
def context(digits: Data) -> Context:
    return Context(data=digits, loading=Loading(batch_size=16))


@pytest.fixture(scope="module")
def trained(context: Context) -> Artifact:
    """The vit after masks and an epoch of training."""
    return Mask(epochs=1, **FAST)(artifact("vit"), context)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plan_of(made: Artifact) -> dict[str, Any]:
    plan: Any = made.history[-1].plan
    return dict(plan)


def zeros_of(made: Artifact, keys: list[str]) -> dict[str, Tensor]:
    """Where the weights of these names are zero."""
    state = made.state_dict()
    return {key: state[key] == 0 for key in keys if key in state}


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of every four consecutive inputs, as kernels read them (O, kh, kw, I), two at most are not zero."""
    read = weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1)
    return bool(((read.reshape(-1, 4) != 0).sum(1) <= 2).all())


# Which weights


def test_of_every_four_the_two_smallest_become_zero_by_hand() -> None:
    weight = torch.tensor([[4.0, -1, 2, 3, 0, 5, -6, 0.5], [1, -2, -3, 4, -8, 7, -6, 5]])
    expected = [[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1]]
    assert two_of_four(weight).int().tolist() == expected


def test_fours_of_a_convolution_run_along_its_inputs_at_each_position_of_the_kernel() -> None:
    weight = noise(6, 8, 3, 2)
    found = two_of_four(weight)
    for row in range(3):
        for column in range(2):
            assert torch.equal(found[:, :, row, column], two_of_four(weight[:, :, row, column]))


def test_weights_that_cancel_each_other_go_although_they_are_larger() -> None:
    # The last two inputs are always equal, so 9 x - 9 x adds nothing; the first two are independent of all.
    weight = torch.tensor([[1.0, 1, 9, -9]])
    second = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).double()
    assert two_of_four(weight).tolist() == [[True, True, False, False]]
    assert two_of_four(weight, second).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("layer", [nn.Linear(8, 5), nn.Conv2d(8, 5, 3, padding=1)], ids=["linear", "conv"])
def test_the_pair_that_goes_is_the_best_of_the_six_for_the_very_inputs(layer: nn.Linear | nn.Conv2d) -> None:
    weight = noise(*layer.weight.shape, seed=1)
    # Rows of inputs in the order of weight.flatten(1), correlated by a random mixing.
    width = weight[0].numel()
    x = (noise(500, width, seed=2) @ noise(width, width, seed=3)).double()
    found = two_of_four(weight, x.T @ x / len(x)).flatten(1)
    taps = width // 8
    for output, row in enumerate(weight.flatten(1).double()):
        for block in range(2):
            for tap in range(taps):
                columns = [(4 * block + i) * taps + tap for i in range(4)]
                changes = [float((x[:, [columns[a], columns[b]]] @ row[[columns[a], columns[b]]]).square().mean())
                           for a, b in PAIRS]  # fmt: skip
                best = PAIRS[changes.index(min(changes))]
                assert found[output, columns].nonzero().flatten().tolist() == list(best)


def test_moments_of_the_channels_alone_are_the_same_at_every_position_of_the_kernel(digits: Data) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    (images, _), *_ = digits.eval_batches("calib", Preprocessing(size=SIZE), batch_size=16)
    # 5200 B: room for the moments of 8 channels (512 B), not for those of 8 * 9 taps (41 kB).
    moments = collect(network, ["1"], [images], images=16, memory_gb=5.2e-6)["1"]
    assert not moments.taps
    whole = moments.expanded(9)
    torch.testing.assert_close(
        moments_of_fours(moments.second[0], 8).expand(9, -1, -1, -1), moments_of_fours(whole.second[0], 8)
    )
    weight = noise(4, 8, 3, 3)
    assert torch.equal(two_of_four(weight, moments.second[0]), two_of_four(weight, whole.second[0]))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_unstructured_takes_exactly_its_share_of_the_smallest(share: float) -> None:
    weight = noise(10, 4, 5)
    zeros = cheapest(weight, share)
    assert int(zeros.sum()) == round(share * 200)
    assert weight[zeros].abs().max() < weight[~zeros].abs().min()


def test_unstructured_counts_how_large_an_input_is() -> None:
    weight = torch.tensor([[3.0, 1], [2, 5]])
    second = torch.diag(torch.tensor([1.0, 100])).double()
    assert cheapest(weight, 0.5).tolist() == [[False, True], [True, False]]  # 1 and 2
    assert cheapest(weight, 0.5, second).tolist() == [[True, False], [True, False]]  # 9 and 4 of 9, 100, 4, 2500
    # One moment for each channel of 1 x 2 kernels: 2 * 100 is more than 9 * 1.
    kernels = torch.tensor([[[[3.0, 2]], [[1.0, 2]]]])
    assert cheapest(kernels, 0.5, second).flatten().tolist() == [True, True, False, False]
    assert cheapest(torch.ones(2, 2), 0.5).flatten().tolist() == [True, True, False, False]  # alike: the first


# A network


@pytest.mark.parametrize("network", sorted(ZOO))
@pytest.mark.parametrize("criterion", ["gram", "magnitude"])
def test_every_masked_layer_has_the_pattern_and_nothing_else_changes(
    network: str, criterion: Any, context: Context
) -> None:
    given = artifact(network)
    made = Mask(criterion=criterion, epochs=0)(given, context)
    plan, before, after = plan_of(made), given.state_dict(), made.state_dict()
    assert plan["sparse"] == [f"{name}.weight" for name in plan["layers"]]
    for key, value in after.items():
        if key in plan["sparse"]:
            assert is_two_of_four(value)
            assert int((value == 0).sum()) == value.numel() // 2
            assert torch.equal(value[value != 0], before[key][value != 0])
        else:
            assert torch.equal(value, before[key])
    assert made.history[-1].metrics == {"zeros": 0.5}
    assert all(entry == {"pattern": "2:4", "kept": 0.5} for entry in plan["layers"].values())


def test_unstructured_keeps_the_share_of_every_layer(context: Context) -> None:
    made = Mask(pattern="unstructured", share=0.75, epochs=0)(artifact("resnet"), context)
    plan = plan_of(made)
    for key, zeros in zeros_of(made, plan["sparse"]).items():
        assert int(zeros.sum()) == round(0.75 * zeros.numel()), key
    assert plan["layers"]["layer1.0.conv1"] == {"pattern": "unstructured", "kept": 0.25}
    assert not all(is_two_of_four(made.state_dict()[key]) for key in plan["sparse"])


class Net(nn.Module):
    """Layers of every kind the pass has to tell apart."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.point = nn.Conv2d(16, 18, 1)
        self.odd = nn.Conv2d(18, 16, 1)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.read = nn.Linear(16, 16)
        self.skipped = nn.Linear(16, 16)
        self.off = nn.Linear(16, 16, bias=False)
        nn.init.zeros_(self.off.weight)
        self.attention = nn.MultiheadAttention(16, 1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.odd(self.point(self.grouped(self.depthwise(self.stem(images))))).mean((2, 3))
        features = self.skipped(self.second(self.first(features)))
        features = features + self.off(nn.functional.linear(features, self.read.weight))
        logits: Tensor = self.head(features + self.attention(features, features, features)[0])
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def net() -> Artifact:
    chosen = Backbone(name="tests.passes.test_mask:Net", num_classes=16, input=Preprocessing(size=SIZE))
    return Artifact.of(chosen.build(trust=True), chosen, trust=True)


LEFT = {
    "stem": "3 inputs are no multiple of 4",
    "depthwise": "depthwise",
    "grouped": "grouped",
    "odd": "18 inputs are no multiple of 4",
    "first": "its weight is shared",
    "read": "its weight is read directly, not called",
    "skipped": "in skip",
    "off": "its weight is zero",
    "attention.out_proj": "it does not compute with its weight as it is",
    "head": "classifier",
    "second": "its weight is shared",
}


def test_each_layer_that_is_left_says_why(context: Context) -> None:
    plan = plan_of(Mask(epochs=0, skip=("skip*",))(net(), context))
    assert (list(plan["layers"]), plan["left"]) == (["point"], LEFT)


def test_what_rules_only_gram_or_only_fours_do_not_hold_for_the_others() -> None:
    by_size = plan_of(Mask(**SMALLEST, skip=("skipped",))(net()))
    assert set(by_size["layers"]) == {"point", "read"}
    anywhere = plan_of(Mask(pattern="unstructured", **SMALLEST, skip=("skipped",))(net()))
    assert set(anywhere["layers"]) == {"stem", "point", "odd", "read"}


def test_what_cannot_work_says_so_in_one_line(digits: Data) -> None:
    with pytest.raises(PassError, match=r"^mask: skip 'blokcs\.\*' matches no layer; names are such as 'stem'$"):
        Mask(**SMALLEST, skip=("blokcs.*",))(net())
    with pytest.raises(PassError, match=r"^mask: 2:4 fits no layer \(.*; classifier; .*\); skip less, or leave"):
        Mask(**SMALLEST, skip=("point", "read", "skipped"))(net())
    with pytest.raises(PassError, match=r"^mask: there are no calibration images; give data .*, or magnitude$"):
        Mask(epochs=0)(net())
    broken = net()
    state = broken.state_dict()
    state["point.weight"][0, 0] = torch.nan
    with pytest.raises(PassError, match=r"^mask: layer 'point' holds values that are not finite; start from"):
        Mask(**SMALLEST)(Artifact(broken.backbone, state, trust=True))
    with pytest.raises(ValidationError, match=r"share=0.7 does not go with 2:4, which is a half; give pattern unst"):
        Mask(share=0.7)


@pytest.mark.parametrize(
    ("step", "reads"),
    [
        (Mask(), {"calib", "train"}),
        (Mask(criterion="magnitude"), {"train"}),
        (Mask(epochs=0), {"calib"}),
        (Mask(**SMALLEST), set()),
    ],
)
def test_it_reads_what_it_looks_at(step: Mask, reads: set[str]) -> None:
    assert step.reads == reads
    if reads:
        with pytest.raises(DataError, match="'mask' reads the split"):
            Pipeline((step,)).check(artifact("vit"), Context())
    else:
        Pipeline((step,)).check(artifact("vit"), Context())


# Zeros that stay


def test_its_own_training_moves_every_value_but_the_zeros(trained: Artifact, context: Context) -> None:
    masked = Mask(epochs=0)(artifact("vit"), context)
    keys = plan_of(trained)["sparse"]
    assert len(keys) == 8  # qkv, proj, fc1 and fc2 of two blocks
    before, after = masked.state_dict(), trained.state_dict()
    for key, zeros in zeros_of(masked, keys).items():
        assert torch.equal(after[key] == 0, zeros)
        assert (after[key] != before[key])[~zeros].all()
    metrics = trained.history[-1].metrics
    assert metrics["zeros"] == 0.5
    assert metrics["steps"] == 4


@pytest.mark.parametrize(
    "step",
    [Finetune(epochs=1, **FAST), Finetune(epochs=1, ema=0.5, **FAST), Distill(epochs=1, method=("kd",), **FAST)],
    ids=["finetune", "finetune with a moving average", "distill"],
)
def test_a_later_training_keeps_the_zeros(step: Finetune | Distill, trained: Artifact, context: Context) -> None:
    keys = plan_of(trained)["sparse"]
    after = step(trained, context)
    expected = zeros_of(trained, keys)
    assert zeros_of(after, keys).keys() == expected.keys()
    for key, zeros in zeros_of(after, keys).items():
        assert torch.equal(zeros, expected[key])
        assert int(zeros.sum()) == zeros.numel() // 2
        assert not torch.equal(after.state_dict()[key], trained.state_dict()[key]), "nothing was trained"


def test_layers_that_a_later_step_wrote_anew_are_trained_as_any(trained: Artifact, context: Context) -> None:
    keys = plan_of(trained)["sparse"]
    pairs = LowRank(ratio=0.5, align=2, min_width=WIDE, skip=("*.qkv",), **BLIND)(trained, context)
    assert set(zeros_of(pairs, keys)) == {"blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"}
    after = Finetune(epochs=1, **FAST)(pairs, context)
    assert all(torch.equal(zeros, zeros_of(trained, keys)[key]) for key, zeros in zeros_of(after, keys).items())
    assert not any((value == 0).any() for key, value in after.state_dict().items() if key.endswith(".0.weight"))


def test_masks_of_folded_layers_survive(context: Context) -> None:
    made = Mask(**SMALLEST)(artifact("resnet"), context)
    folded = Merge()(made, context)
    keys = plan_of(made)["sparse"]
    for key, zeros in zeros_of(Finetune(epochs=1, freeze_norms=True, **FAST)(folded, context), keys).items():
        assert torch.equal(zeros, zeros_of(made, keys)[key])


def test_a_killed_training_taken_up_ends_with_the_same_values(digits: Data, tmp_path: Path) -> None:
    step, given = Mask(epochs=2, **FAST), artifact("vit")
    whole = step(given, Context(data=digits, loading=Loading(batch_size=16)))

    @contextmanager
    def killing(title: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(steps: int, note: str | None = "") -> None:
            nonlocal done
            done += steps
            if title.startswith("training") and done == 6:  # in the second epoch of four steps
                raise KeyboardInterrupt

        yield advance

    place = tmp_path / "checkpoint"
    stopped = Context(data=digits, loading=Loading(batch_size=16), checkpoint=place, progress=killing)
    with pytest.raises(KeyboardInterrupt):
        step(given, stopped)
    assert place.exists()
    again = step(given, Context(data=digits, loading=Loading(batch_size=16), checkpoint=place))
    assert again.weights == whole.weights


def test_what_is_saved_comes_back_to_the_bit(trained: Artifact, context: Context, tmp_path: Path) -> None:
    after = Finetune(epochs=1, **FAST)(trained, context)
    store.save(after, tmp_path / "saved")
    loaded = store.load(tmp_path / "saved", trust=True)
    assert loaded.weights == after.weights
    assert loaded.history == after.history
    # The zeros are held by a loaded network's history as well.
    again = Finetune(epochs=1, **FAST)(loaded, context)
    keys = plan_of(trained)["sparse"]
    assert all(torch.equal(zeros, zeros_of(trained, keys)[key]) for key, zeros in zeros_of(again, keys).items())
