"""Merging: the network computes what it did with fewer modules, and what would change it is left and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim import store, surgery
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context
from slim.errors import PassError
from slim.passes.low_rank import schemes
from slim.passes.merge import Merge

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (3, 32, 32)
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
CONVNEXT: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 40], "patch_size": 2}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}),
    "mobilenet": ("mobilenetv2_035", {}),
    "repvgg": ("repvgg_a0", {}),
    "fastvit": ("fastvit_t8", {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 128]}),
    "convnext": ("convnext_atto", {**CONVNEXT, "conv_mlp": False}),
    "convnext of convolutions": ("convnext_atto", {**CONVNEXT, "conv_mlp": True}),
    "deit3": ("deit3_small_patch16_224", VIT),
    "beit": ("beit_base_patch16_224", VIT),
    "densenet": ("densenet121", {"growth_rate": 4, "block_config": [1, 1]}),
}


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(5))


def made(name: str, kwargs: dict[str, Any]) -> Artifact:
    """A network whose values hide nothing, its norms with the statistics of some images."""
    backbone = Backbone(name=name, kwargs=kwargs, num_classes=10, input=Preprocessing(size=SIZE, crop=1.0))
    model = backbone.build(trust=True).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
        model(noise(4) * 2 + 1)
    return Artifact.of(model.eval(), backbone, trust=True)


def artifact(network: str) -> Artifact:
    return made(*NETWORKS[network])


def toy(network: str, **kwargs: Any) -> Artifact:
    """One of the networks below."""
    return made(f"tests.passes.test_merge:{network}", kwargs)


def merged(given: Artifact, **options: Any) -> tuple[nn.Module, Any]:
    """The network, and the plan; after the pass was verified."""
    after = Merge(**options)(given, Context())
    return after.model(), after.history[-1].plan


def difference(given: Artifact, model: nn.Module) -> float:
    with torch.no_grad():
        expected, found = given.model()(noise()), model(noise())
    return float((found - expected).abs().max() / expected.abs().max())


ROUNDING = 1e-5
"""Merged weights are rounded once more than the two were: 1e-7 of a value, for each of at most 50 layers."""


def counted(model: nn.Module) -> tuple[int, int]:
    """Batch norms and scales."""
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return norms, sum(name.endswith("gamma") for name, _ in model.named_parameters())


@pytest.mark.parametrize("network", [name for name in NETWORKS if name not in ("beit", "densenet")])
def test_all_is_merged_and_the_network_computes_what_it_did(network: str, tmp_path: Path) -> None:
    given = artifact(network)
    norms, scales = counted(given.model())
    assert norms + scales > 0
    after = Merge()(given, Context())
    model = after.model()
    assert counted(model) == (0, 0)
    assert difference(given, model) <= ROUNDING
    plan: Any = after.history[-1].plan
    branched = network in ("repvgg", "fastvit")  # which merge some norms and scales themselves
    assert plan["reparameterized"] is branched
    assert branched or (len(plan["norms"]), len(plan["scales"])) == (norms, scales)
    assert plan["left"] == {} or network == "mobilenet"  # has pairs below break-even
    loaded = store.load(store.save(after, tmp_path / "saved"), trust=True)
    assert loaded.digest == after.digest
    with torch.inference_mode():
        assert torch.equal(loaded.model()(noise()), model(noise()))


def test_what_is_not_asked_for_is_kept() -> None:
    given = artifact("fastvit")
    norms, scales = counted(given.model())
    model, plan = merged(given, fold_norms=False)
    assert counted(model) == (norms, scales - len(plan["scales"]))
    assert (plan["reparameterized"], plan["norms"]) == (False, {})
    model, plan = merged(artifact("deit3"), fold_norms=False, pairs=False)
    assert counted(model) == (0, 0)
    with pytest.raises(PassError, match="nothing to merge"):
        merged(artifact("deit3"), fold_scales=False)
    with pytest.raises(PassError, match="nothing to merge"):
        merged(toy("Pairs", rank=16), pairs=False)


def test_folding_is_exact_in_eval_mode_alone() -> None:
    given = artifact("resnet")
    model, _ = merged(given)
    assert difference(given, model) <= ROUNDING
    with torch.no_grad():
        expected, found = given.model().train()(noise()), model.train()(noise())
    assert float((found - expected).abs().max()) > 0.01 * float(expected.abs().max())


# What is left


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("beit", "merge: nothing to merge (the block multiplies by it in its own code); leave the pass out"),
        ("Plain", "merge: nothing to merge (nothing that it looks for follows a layer); leave the pass out"),
        ("ByBatch", "merge: nothing to merge (it normalises by the batch at all times); leave the pass out"),
    ],
)
def test_nothing_to_merge_is_an_error(network: str, message: str) -> None:
    given = artifact(network) if network in NETWORKS else toy(network)
    with pytest.raises(PassError) as caught:
        Merge()(given, Context())
    assert str(caught.value) == message


def test_a_norm_that_no_layer_feeds_is_left() -> None:
    given = artifact("densenet")
    model, plan = merged(given)
    assert difference(given, model) <= ROUNDING
    assert plan["left"]["features.norm5"] == "what it reads is not what one layer put out"
    left = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert left == {name for name in plan["left"] if "norm" in name}
    assert plan["norms"]["features.conv0"] == "features.norm0"


@pytest.mark.parametrize("silent", [False, True], ids=["heard", "behind a classifier of zeros"])
def test_a_layer_that_something_else_reads_too_is_left_and_the_others_are_merged(silent: bool) -> None:
    given = toy("Residual")
    if silent:
        zeros = {name: torch.zeros_like(value) for name, value in given.state.items() if name.startswith("head")}
        given = replace(given, state={**given.state, **zeros})
    model, plan = merged(given)
    assert plan["norms"] == {"stem": "norm"}
    assert plan["left"] == {"shared_norm": "without it the network would compute something else, or fail"}
    assert silent or difference(given, model) <= ROUNDING


def test_noise_is_added_to_what_is_near_zero_alone() -> None:
    given: Any = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    nn.init.zeros_(given[1].weight)
    nn.init.constant_(given[1].bias, 1e-6)
    found: Any = surgery.audible(given)
    assert torch.equal(found[0].weight, given[0].weight)
    # Standard deviations 1 / sqrt(4) and 0.1, of 16 and of 4 draws.
    assert 0.25 < float(found[1].weight.detach().std()) < 1
    assert 0.02 < float(found[1].bias.detach().abs().max()) < 0.5
    assert float(given[1].weight.detach().abs().max()) == 0


# Pairs


@pytest.mark.parametrize(("rank", "merges"), [(7, False), (8, True), (11, True)])
def test_a_low_rank_pair_becomes_one_layer_from_break_even_on(rank: int, merges: bool) -> None:
    # 16 x 16 weights in one layer, rank * 32 in two: equal at rank 8.
    given = toy("Pairs", rank=rank)
    if not merges:
        with pytest.raises(PassError, match=r"one layer with linear.0 would have 256 weights, the two have 224"):
            Merge()(given, Context())
        return
    model, plan = merged(given)
    # The convolutions: 16 * 3 * 9 = 432 in one layer, rank * (27 + 16) and rank * (9 + 48) in two.
    pays = {"linear": True, "channel": rank * 43 >= 432, "spatial": rank * 57 >= 432}
    assert plan["pairs"] == {f"{name}.0": f"{name}.1" for name in pays if pays[name]}
    assert {name for name in pays if not isinstance(model.get_submodule(name), nn.Sequential)} == {
        name for name in pays if pays[name]
    }
    assert difference(given, model) <= ROUNDING


@pytest.mark.parametrize(("kind", "weights"), [("linear", (128, 48)), ("convolution", (1152, 176))])
def test_other_layers_with_nothing_between_are_merged_where_it_pays(kind: str, weights: tuple[int, int]) -> None:
    given = toy("Chain", kind=kind)
    model, plan = merged(given)
    assert plan["pairs"] == {"wide": "narrow"}
    assert plan["left"] == {"close": "one layer with open would have {} weights, the two have {}".format(*weights)}
    assert isinstance(model.get_submodule("wide"), nn.Identity)
    assert difference(given, model) <= ROUNDING


class Plain(nn.Module):
    """Layers, and an activation in place between them: the second gets the very tensor that the first put out."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Linear(48, 20), nn.ReLU(inplace=True), nn.Linear(20, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return self.head(self.act(self.stem(features)))  # type: ignore[no-any-return]


class ByBatch(nn.Module):
    """A norm without running statistics."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, num_classes, 4, stride=4), nn.BatchNorm2d(10, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.stem(images)).mean((2, 3)) + 1  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A norm that alone reads its convolution, and one past which a shortcut is taken."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)
        self.shared, self.shared_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.shared(self.norm(self.stem(images)).relu())
        return self.head((self.shared_norm(features) + features).mean((2, 3)))  # type: ignore[no-any-return]


class Pairs(nn.Module):
    """Low-rank pairs of all schemes, as the pass makes them."""

    def __init__(self, num_classes: int, rank: int) -> None:
        super().__init__()
        self.channel = schemes.factored(nn.Conv2d(3, 16, 3, stride=2, padding=1), "channel", rank)
        self.spatial = schemes.factored(nn.Conv2d(3, 16, 3, stride=2, padding=1), "spatial", rank)
        self.linear = schemes.factored(nn.Linear(16, 16), "channel", rank)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.channel(images).relu() + self.spatial(images).relu()
        return self.head(self.linear(features.mean((2, 3))).relu())  # type: ignore[no-any-return]


class Chain(nn.Module):
    """Layers with biases and nothing between: two that widen, two that narrow, and two that both pad."""

    def __init__(self, num_classes: int, kind: str) -> None:
        super().__init__()
        self.linear = kind == "linear"
        if self.linear:
            self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 8)
            self.open, self.close = nn.Linear(8, 2), nn.Linear(2, 16)
        else:
            self.tall, self.flat = nn.Conv2d(3, 40, (3, 1), padding=(1, 0)), nn.Conv2d(40, 3, (1, 3), padding=(0, 1))
            self.wide, self.narrow = nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.Conv2d(64, 8, 1, bias=False)
            self.open, self.close = nn.Conv2d(8, 2, 3, padding=1), nn.Conv2d(2, 16, 1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.linear:
            features = nn.functional.adaptive_avg_pool2d(images.mean(1), 4).flatten(1)
        else:
            features = self.flat(self.tall(images)).relu()
        features = self.close(self.open(self.narrow(self.wide(features)).relu())).relu()
        return self.head(features if self.linear else features.mean((2, 3)))  # type: ignore[no-any-return]
