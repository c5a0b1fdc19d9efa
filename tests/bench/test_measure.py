"""The meter: each network is exported once, each file measured once, and what is measured is the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slim.artifact import Artifact, Backbone, Preprocessing
from slim.bench import latency, measure
from slim.bench.measure import TargetMeter, measure_accuracy
from slim.contract import Fed, Meter
from slim.data import Data, open_data
from slim.errors import DataError, ParityError
from slim.export.target import Target

pytestmark = pytest.mark.usefixtures("one_thread")
BACKBONE = Backbone(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2},
    num_classes=10,
    input=Preprocessing(size=(3, 32, 32), crop=1.0),
)
TARGET = Target.parse("ort:cpu,threads=1")
QUICK = latency.Protocol(sessions=3, rounds=4, calls=2, warm_up=1)


def network(seed: int) -> Artifact:
    return Artifact.of(BACKBONE.build(seed=seed), BACKBONE)


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=16, limit_val=70)


@pytest.fixture(scope="module")
def shared(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> TargetMeter:
    """A meter that only tests which change nothing on disk use."""
    return TargetMeter(TARGET, digits, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was exported and measured, as it happens; timing is quick."""
    done: list[str] = []

    def count(module: Any, name: str, **fields: Any) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return real(*args, **kwargs, **fields)

        monkeypatch.setattr(module, name, called)

    count(measure, "export_onnx")
    count(measure, "parity")
    count(measure, "measure_accuracy")
    count(latency, "latency", protocol=QUICK)
    count(latency, "compare", protocol=QUICK)
    count(latency, "beside", protocol=QUICK)
    return done


def test_it_is_the_meter_that_passes_know(shared: TargetMeter) -> None:
    meter: Meter = shared
    assert meter.target == "ort:cpu,threads=1,batch=1,precision=fp32"


def test_each_question_about_a_network_is_answered_once(digits: Data, counted: list[str], tmp_path: Path) -> None:
    meter = TargetMeter(TARGET, digits, tmp_path)
    first, second = network(0), network(1)
    answers = [
        (
            meter.size(first),
            meter.parity(first),
            meter.latency(first),
            meter.accuracy(first),
            meter.compare(second, first),
            meter.drop(second, first),
        )
        # The same values in another object, as an artifact loaded from its folder is.
        for first, second in ((first, second), (network(0), network(1)))
    ]
    assert answers[0] == answers[1]
    assert sorted(counted) == sorted(["export_onnx"] * 2 + ["parity", "latency", "compare"] + ["measure_accuracy"] * 2)
    meter.compare(first, second)  # the other way round is another question
    assert counted.count("compare") == 2


def test_a_module_fed_alike_has_the_figures_of_the_artifact_with_its_values(
    digits: Data, counted: list[str], tmp_path: Path
) -> None:
    meter = TargetMeter(TARGET, digits, tmp_path)
    artifact = network(0)
    for question in (meter.size, meter.parity, meter.latency, meter.accuracy):
        assert question(Fed(artifact.model(), BACKBONE.input)) == question(artifact)
    assert [counted.count(name) for name in ("parity", "latency", "measure_accuracy")] == [1, 1, 1]


def test_a_changed_module_is_another_network(shared: TargetMeter) -> None:
    model = network(0).model()
    before = shared.export(Fed(model, BACKBONE.input))
    with torch.no_grad():
        model.get_parameter("head.bias")[0] += 100
    after = shared.export(Fed(model, BACKBONE.input))
    assert after.sha256 != before.sha256
    # It now sees the first class in every image; a fresh network cannot.
    labels = shared.data.split("val").labels if shared.data else ()
    assert shared.accuracy(Fed(model, BACKBONE.input)).value == pytest.approx(100 * labels.count(0) / len(labels))


def predicted(network: Artifact | Fed, fed: Preprocessing, digits: Data) -> tuple[list[int], list[int]]:
    """What torch says of the validation images when it is fed so, and their labels."""
    model = network.model() if isinstance(network, Artifact) else network.model
    batches = list(digits.eval_batches("val", fed, batch_size=100))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.inference_mode():
        return model(images).argmax(1).tolist(), labels.tolist()


def test_accuracy_is_that_of_torch_on_the_whole_split(shared: TargetMeter, digits: Data) -> None:
    answers, labels = predicted(network(0), BACKBONE.input, digits)
    hits = [float(one == label) for one, label in zip(answers, labels, strict=True)]
    found = shared.accuracy(network(0))
    assert found.samples == tuple(hits)
    assert (found.n, found.value) == (70, pytest.approx(100 * sum(hits) / 70))


# Fed otherwise


@pytest.fixture(scope="module")
def convolutions() -> nn.Module:
    """Takes images of any size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
        return nn.Sequential(*layers).eval()


def test_every_network_is_measured_as_it_is_fed(shared: TargetMeter, digits: Data, convolutions: nn.Module) -> None:
    smaller = BACKBONE.input.model_copy(update={"size": (3, 16, 16)})
    large, small = Fed(convolutions, BACKBONE.input), Fed(convolutions, smaller)
    for network in (large, small):
        assert shared.export(network).inputs[0].shape[1:] == network.input.size
        answers, _ = predicted(network, network.input, digits)
        assert shared.accuracy(network).details["predictions"] == answers
        assert shared.parity(network).value < 1e-4
    lost = shared.drop(small, large)
    assert lost.n == 70
    assert lost.value == pytest.approx(shared.accuracy(large).value - shared.accuracy(small).value)


def test_one_file_fed_otherwise_has_the_same_latency_and_another_accuracy(
    digits: Data, counted: list[str], convolutions: nn.Module, tmp_path: Path
) -> None:
    meter = TargetMeter(TARGET, digits, tmp_path)
    darker = BACKBONE.input.model_copy(update={"mean": (0.9, 0.9, 0.9)})
    usual, other = Fed(convolutions, BACKBONE.input), Fed(convolutions, darker)
    assert meter.export(usual).sha256 == meter.export(other).sha256
    assert meter.latency(usual) == meter.latency(other)
    for network in (usual, other):
        assert meter.accuracy(network).details["predictions"] == predicted(network, network.input, digits)[0]
        meter.parity(network)
    # Else the images would look alike, and the test tell nothing.
    assert meter.accuracy(usual).details["predictions"] != meter.accuracy(other).details["predictions"]
    assert [counted.count(name) for name in ("latency", "parity", "measure_accuracy")] == [1, 2, 2]


def test_parity_looks_at_real_images(shared: TargetMeter) -> None:
    found = shared.parity(network(0))
    assert found.n == 16  # of the calibration subset, which is all of train here
    assert found.value < 1e-4


def test_without_images_parity_is_asked_on_noise(tmp_path: Path) -> None:
    assert TargetMeter(TARGET, None, tmp_path).parity(network(0)).n == 8


def test_a_file_that_is_not_the_network_is_found_out(digits: Data, tmp_path: Path) -> None:
    meter = TargetMeter(TARGET, digits, tmp_path)
    file = meter.export(network(0))
    file.path.write_bytes(meter.export(network(1)).path.read_bytes())
    with pytest.raises(ParityError, match=r"differs from torch by .* so the file computes something else"):
        meter.parity(network(0))
    with pytest.raises(ParityError):  # a failure is no answer
        meter.parity(network(0))


@pytest.mark.parametrize("kind", ["no data", "no validation split"])
def test_accuracy_without_a_validation_split_says_what_to_give(
    kind: str, digits: Data, counted: list[str], tmp_path: Path
) -> None:
    train_alone = replace(digits, splits={"train": digits.split("train")})
    meter = TargetMeter(TARGET, None if kind == "no data" else train_alone, tmp_path)
    with pytest.raises(DataError, match=r"^accuracy: there is no validation split; give --data with val/, or --split"):
        meter.accuracy(network(0))


def test_progress_counts_every_image(digits: Data, shared: TargetMeter) -> None:
    shown: dict[str, int] = {}

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
        def advance(steps: int, note: str = "") -> None:
            shown["done"] = shown.get("done", 0) + steps

        shown["total"] = total
        yield advance

    path = shared.export(network(0)).path
    measure_accuracy(path, TARGET, digits, BACKBONE.input, progress=progress)
    assert shown == {"total": 70, "done": 70}


def test_several_beside_one_are_ratios_in_their_order_and_are_asked_once(
    counted: list[str], digits: Data, tmp_path: Path
) -> None:
    meter, small = TargetMeter(TARGET, digits, tmp_path), network(0)
    deep = BACKBONE.model_copy(update={"kwargs": {**BACKBONE.kwargs, "depth": 12}})
    large = Artifact.of(deep.build(seed=0), deep)
    found = meter.beside([large, small], small)
    assert [one.unit for one in found] == ["ratio", "ratio"]
    assert found[0].value > 2  # twelve blocks against one
    assert 0.5 < found[1].value < 2  # a file against itself, on a machine that may be busy
    assert all(one.low is not None and one.high is not None and one.low <= one.value <= one.high for one in found)
    assert meter.beside([large, small], small) == found
    assert counted.count("beside") == 1
