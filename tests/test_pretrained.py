"""Where a chain starts: the network, its weights, its head and its preprocessing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.data import ImageNetInfo

from slim import job, recipe, store
from slim.data import Data, open_data
from slim.errors import BackboneError, DataError, StoreError
from slim.passes.low_rank import LowRank
from slim.pretrained import start
from slim.recipe import InputSpec, ModelSpec

SMALL = InputSpec(size=(3, 32, 32), crop=1.0)
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def spec(name: str = "resnet18", *, weights: str = "none", feed: InputSpec = SMALL, **args: Any) -> ModelSpec:
    return ModelSpec(
        name=name, args=args or (RESNET if name.startswith("resnet18") else {}), weights=weights, input=feed
    )


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=8, limit_val=8)


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file with the values of the small ResNet with so many classes, seeded otherwise than any start below."""
    folder = tmp_path_factory.mktemp("weights")

    def written(classes: int) -> Path:
        import timm

        path = folder / f"{classes}.safetensors"
        with torch.random.fork_rng():
            torch.manual_seed(99)
            state = timm.create_model("resnet18", num_classes=classes, **RESNET).state_dict()
        safetensors.torch.save_file(state, path)
        return path

    return written


def chain(spec: ModelSpec, *passes: str, data: str = "digits") -> recipe.Recipe:
    given = {"model": spec.model_dump(), "data": data, "device": "cpu", "passes": [{"name": name} for name in passes]}
    return recipe.parse(given, place="test")


# Weights


def test_without_weights_the_values_come_from_the_seed(digits: Data) -> None:
    first, again, other = (start(spec(), digits, seed=seed) for seed in (0, 0, 1))
    assert first.artifact.digest == again.artifact.digest
    assert first.artifact.digest != other.artifact.digest
    assert first.artifact.backbone.num_classes == 10
    assert first.artifact.labels == digits.classes


def test_a_fresh_network_has_to_be_trained_first() -> None:
    with pytest.raises(DataError, match=r"^the network is fresh \(--weights none\): .*'low-rank' does not; begin with"):
        job.prepare(chain(spec(), "low-rank"))
    job.prepare(chain(spec(), "finetune", "low-rank"))


def test_weights_with_the_classes_of_the_data_keep_their_head(digits: Data, weights_of: Any) -> None:
    path = weights_of(10)
    begin = start(spec(weights=str(path)), digits, seed=0)
    state = safetensors.torch.load_file(path)
    assert not begin.fresh_head
    assert all(torch.equal(value, state[key]) for key, value in begin.artifact.state.items())


def test_weights_of_other_classes_get_a_new_head_and_keep_the_rest_to_the_bit(digits: Data, weights_of: Any) -> None:
    path = weights_of(7)
    begin = start(spec(weights=str(path)), digits, seed=3)
    state, found = safetensors.torch.load_file(path), begin.artifact.state
    assert begin.fresh_head.startswith("class-count mismatch: the data has 10 classes, the weights 7")
    assert begin.artifact.backbone.num_classes == 10
    assert found["fc.weight"].shape[0] == 10
    assert all(torch.equal(found[key], state[key]) for key in state if not key.startswith("fc."))
    assert torch.equal(found["fc.weight"], start(spec(), digits, seed=3).artifact.state["fc.weight"])
    assert not torch.equal(found["fc.weight"], start(spec(), digits, seed=4).artifact.state["fc.weight"])


def test_a_new_head_that_nothing_trains_is_a_class_count_mismatch(weights_of: Any) -> None:
    given = spec(weights=str(weights_of(7)))
    with pytest.raises(
        DataError, match=r"^class-count mismatch: the data has 10 classes, the weights 7; .* begin with"
    ):
        job.prepare(chain(given, "low-rank", "finetune"))
    job.prepare(chain(given, "finetune", "low-rank"))


def test_without_data_the_classes_are_those_of_the_weights(weights_of: Any) -> None:
    begin = start(spec(weights=str(weights_of(7))), None, seed=0)
    assert (begin.artifact.backbone.num_classes, begin.fresh_head, begin.data) == (7, "", None)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (
            "model.pth",
            r"^--weights model\.pth: is not `pretrained`, `none` or a \.safetensors file; slim unpickles nothing",
        ),
        ("imagenet", r"^--weights imagenet: is not `pretrained`, `none` or a"),
        ("gone.safetensors", r"^--weights gone\.safetensors: no such file$"),
    ],
)
def test_weights_that_are_no_safetensors_file_are_refused(weights: str, says: str, digits: Data) -> None:
    with pytest.raises(BackboneError, match=says):
        start(spec(weights=weights), digits, seed=0)


def test_a_truncated_file_is_refused(digits: Data, weights_of: Any, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights_of(10).read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"cut\.safetensors: not a whole safetensors file"):
        start(spec(weights=str(cut)), digits, seed=0)


def test_weights_of_other_arguments_name_the_first_value_that_does_not_fit(digits: Data, weights_of: Any) -> None:
    wider = {**RESNET, "channels": [8, 8, 16, 32]}
    says = (
        r"10\.safetensors: does not fit resnet18: 'fc\.weight' is \(10, 16\) in the file, "
        r"\(10, 32\) in the network and \d+ more; check --model-arg$"
    )
    with pytest.raises(BackboneError, match=says):
        start(spec(weights=str(weights_of(10)), **wider), digits, seed=0)
    # A new head excuses the head alone.
    with pytest.raises(
        BackboneError, match=r"'layer4\.0\.bn1\.bias' is \(16,\) in the file, \(32,\) in the network and"
    ):
        start(spec(weights=str(weights_of(7)), **wider), digits, seed=0)


def test_weights_that_lack_a_value_are_refused(digits: Data, weights_of: Any, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(weights_of(10))
    del state["bn1.bias"]
    safetensors.torch.save_file(state, tmp_path / "less.safetensors")
    says = r"'bn1\.bias' is missing in the file, \(\d+,\) in the network; check --model-arg$"
    with pytest.raises(BackboneError, match=says):
        start(spec(weights=str(tmp_path / "less.safetensors")), digits, seed=0)


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slim", "run", "--model", "resnet18", "--data", "digits"]
    # The hub's client reads these when it is imported.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command += ["--out", str(tmp_path / "run"), "--quiet", "finetune"]
    began = time.monotonic()
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 60, "it waited for something"
    assert said.returncode == 2
    line = " ".join(said.stderr.split())
    assert re.fullmatch(
        r"Error: --weights pretrained: resnet18 cannot be had from timm's hub \(.*\); "
        r"give --weights PATH\.safetensors, or --weights none to start fresh",
        line,
    ), said.stderr
    assert not (tmp_path / "run").exists()


def test_a_network_that_never_had_weights_says_so(digits: Data) -> None:
    with pytest.raises(BackboneError, match=r"^--weights pretrained: .* \(No pretrained weights exist for .*\); give"):
        start(spec("mnasnet_050", weights="pretrained"), digits, seed=0)


# Names and arguments


@pytest.mark.parametrize("data", [True, False], ids=["with data", "without data"])
@pytest.mark.parametrize("weights", ["none", "pretrained"])
def test_an_unknown_network_names_the_nearest(weights: str, data: bool, digits: Data) -> None:
    with pytest.raises(BackboneError, match=r"^model 'resnt18' is not a timm model; did you mean 'resnet18'\?$"):
        start(spec("resnt18", weights=weights), digits if data else None, seed=0)


@pytest.mark.parametrize("weights", ["none", "pretrained"])
def test_unknown_weights_of_a_known_network_are_named(weights: str, digits: Data) -> None:
    with pytest.raises(
        BackboneError, match=r"^model 'resnet18\.a1_in1': timm has no weights 'a1_in1' of it; did you mean"
    ):
        start(spec("resnet18.a1_in1", weights=weights), digits, seed=0)


@pytest.mark.parametrize("args", [{"widht": 3}, {"num_classes": 3}])
def test_an_argument_the_network_does_not_take_is_named(args: dict[str, Any], digits: Data) -> None:
    with pytest.raises(BackboneError, match=rf"^model 'resnet18' .*{next(iter(args))}"):
        start(spec(**args), digits, seed=0)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's with networks in it."""
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def pooled(num_classes, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(width, num_classes))\n"
        "def features(num_classes):\n"
        "    return nn.Conv2d(3, num_classes, 3)\n"
        "def nothing(num_classes):\n"
        "    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return "my_networks"


def test_a_factory_is_imported_with_trust_alone(factories: str, digits: Data) -> None:
    given = spec(f"{factories}:pooled", width=4)
    with pytest.raises(BackboneError, match=r"^model 'my_networks:pooled' runs code of yours .*; add --trust"):
        start(given, digits, seed=0)
    assert factories not in sys.modules
    begin = start(given, digits, seed=0, trust=True)
    assert begin.artifact.state["0.weight"].shape == (4, 3, 3, 3)
    assert begin.artifact.backbone.num_classes == 10
    assert begin.fresh_head


def test_a_factory_takes_weights_from_a_file(factories: str, digits: Data, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    kept = start(spec(f"{factories}:pooled"), digits, seed=7, trust=True).artifact
    safetensors.torch.save_file(dict(kept.state), path)
    begin = start(spec(f"{factories}:pooled", weights=str(path)), digits, seed=0, trust=True)
    assert begin.artifact.weights == kept.weights
    assert not begin.fresh_head


@pytest.mark.parametrize(
    ("factory", "weights", "says"),
    [
        (
            "pooled",
            "pretrained",
            r"cannot be had from timm's hub .*; give --weights PATH\.safetensors, or --weights none",
        ),
        ("features", "none", r"gives \(1, 10, 30, 30\) for one image, not \(1, 10\); slim compresses classifiers"),
        ("nothing", "none", r"returned NoneType, not a torch module"),
        ("missing", "none", r"cannot be imported"),
    ],
)
def test_a_factory_that_does_not_serve_says_why(
    factory: str, weights: str, says: str, factories: str, digits: Data
) -> None:
    with pytest.raises(BackboneError, match=says):
        start(spec(f"{factories}:{factory}", weights=weights), digits, seed=0, trust=True)


def test_a_factory_without_data_has_no_number_of_classes(factories: str) -> None:
    with pytest.raises(DataError, match=r"^the number of classes is unknown: give --data"):
        start(spec(f"{factories}:pooled"), None, seed=0, trust=True)


# Preprocessing


def test_preprocessing_is_that_of_timm(digits: Data) -> None:
    found = start(spec("mobilenetv3_small_050.lamb_in1k", feed=InputSpec()), digits, seed=0).artifact.backbone.input
    assert (found.size, found.interpolation, found.crop) == ((3, 224, 224), "bicubic", 0.875)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_preprocessing_is_that_of_the_named_weights() -> None:
    """Two sets of weights of one network, which were trained on differently normalised images."""
    means = {
        tag: start(spec(f"mobilenetv3_large_100.{tag}", feed=InputSpec()), None, seed=0).artifact.backbone.input.mean
        for tag in ("ra_in1k", "miil_in21k_ft_in1k")
    }
    assert means == {"ra_in1k": (0.485, 0.456, 0.406), "miil_in21k_ft_in1k": (0.0, 0.0, 0.0)}


def test_every_part_of_preprocessing_can_be_overridden(digits: Data) -> None:
    feed = InputSpec(size=(3, 40, 48), mean=(0.1, 0.2, 0.3), std=(1, 2, 3), interpolation="nearest", crop=0.5)
    found = start(spec(feed=feed), digits, seed=0).artifact.backbone.input
    assert found.model_dump() == feed.model_dump()
    alone = start(spec(feed=InputSpec(mean=(0.5, 0.5, 0.5))), digits, seed=0).artifact.backbone.input
    assert (alone.mean, alone.std) == ((0.5, 0.5, 0.5), (0.229, 0.224, 0.225))


def test_a_value_for_each_channel_is_asked_for(digits: Data) -> None:
    with pytest.raises(BackboneError, match=r"^--mean 0\.5: 1 values for 3 channels; give one each$"):
        start(spec(feed=InputSpec(mean=(0.5,))), digits, seed=0)


def test_an_input_the_network_does_not_take_is_found_before_any_work(digits: Data) -> None:
    with pytest.raises(
        BackboneError, match=r"^model 'vit_tiny_patch16_224' does not take an input of \(3, 32, 32\) \("
    ):
        start(spec("vit_tiny_patch16_224", depth=1), digits, seed=0)


def test_global_generators_are_left_as_they_were(digits: Data) -> None:
    before = torch.get_rng_state()
    start(spec(), digits, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


# The real network and images


def test_the_real_network_and_images_meet(data_dir: Path) -> None:
    given = ModelSpec(
        name="mobilenetv2_100",
        args={"pad_type": "same"},
        weights=str(data_dir / "mobilenetv2_100.safetensors"),
        input=InputSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )
    data = open_data(f"tar:{data_dir / 'imagenet-sample.tar'}", split="val=1")
    begin = start(given, data, seed=0)
    assert begin.artifact.backbone.num_classes == 1000
    assert not begin.fresh_head
    assert begin.artifact.labels is not None
    assert len(begin.artifact.labels) == 1000
    assert begin.data is not None
    images, labels = next(begin.data.eval_batches("val", begin.artifact.backbone.input, batch_size=32))
    with torch.inference_mode():
        right = int((begin.artifact.model()(images).argmax(1) == labels).sum())
    # 87 % of all 500 are; with labels of another order, or other preprocessing, next to none would be.
    assert right >= 24
    folder, output = data.classes[data.split("val").labels[0]], begin.data.split("val").labels[0]
    assert ImageNetInfo("imagenet-1k").label_names()[output] == folder


# A folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Data) -> Path:
    """A run whose network was factored; its class names are those of digits."""
    out = tmp_path_factory.mktemp("continued") / "run"
    given = chain(
        spec("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=64, num_heads=2), "low-rank"
    )
    blind = LowRank(objective="plain", repair="none")
    job.execute(job.prepare(given.model_copy(update={"data": None, "passes": (blind,)})), out)
    return out


def test_a_folder_goes_on_with_its_history_and_values(folder: Path) -> None:
    there = store.load(folder / "final")
    for name in (folder, folder / "final"):
        begun = start(ModelSpec(name=str(name)), None, seed=5)
        assert begun.artifact.digest == there.digest
        assert [step.name for step in begun.artifact.history] == ["low-rank"]
        assert begun.fresh_head == ""


def test_a_folder_takes_another_input_but_no_other_arguments(digits: Data, tmp_path: Path) -> None:
    begun = start(spec(), digits, seed=0)
    place = str(store.save(begun.artifact, tmp_path / "artifact"))
    larger = start(ModelSpec(name=place, input=InputSpec(size=(3, 48, 48))), digits, seed=0).artifact
    assert larger.backbone.input == begun.artifact.backbone.input.model_copy(update={"size": (3, 48, 48)})
    assert larger.weights == begun.artifact.weights
    assert larger.costs["macs"] > begun.artifact.costs["macs"]
    with pytest.raises(BackboneError, match="an artifact has its own arguments and weights; drop --model-arg"):
        start(ModelSpec(name=place, args={"depth": 2}), digits, seed=0)
    with pytest.raises(BackboneError, match="drop --weights none"):
        start(ModelSpec(name=place, weights="none"), digits, seed=0)
    with pytest.raises(BackboneError, match=r"does not take an input of \(1, 32, 32\)"):
        start(ModelSpec(name=place, input=InputSpec(size=(1, 32, 32), mean=(0.5,), std=(0.5,))), None, seed=0)


def test_a_folder_with_other_classes_than_the_data_is_refused(folder: Path, digits: Data) -> None:
    with pytest.raises(DataError, match="class-count mismatch: 10 class folders, the network has 1000 outputs"):
        start(ModelSpec(name=str(folder)), digits, seed=0)


def test_a_folder_without_an_artifact_is_refused_and_a_name_of_timm_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="holds no artifact and no run"):
        start(ModelSpec(name=str(tmp_path)), None, seed=0)
    (tmp_path / "resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    assert start(spec(), None, seed=0).artifact.backbone.name == "resnet18"
