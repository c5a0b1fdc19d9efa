from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from slim.artifact import Preprocessing
from slim.bench.accuracy import accuracy, agreement, drop, wilson
from slim.errors import DataError, ParityError, UsageError
from slim.export.onnx import export_onnx
from slim.export.parity import parity
from slim.export.target import Target
from slim.measurement import Measurement

TARGET = Target.parse("ort:cpu")
CLASSES = 12


class Lookup(nn.Module):
    """Logits written in the image: its pixels times `sign`, one row of CLASSES of them."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) * self.sign


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("accuracy") / "lookup.onnx"
    return export_onnx(Lookup(), path, Preprocessing(size=(1, 1, CLASSES))).path


def ranking(*ranks: int) -> tuple[Tensor, Tensor]:
    """Images of which the n-th puts its own label, n mod CLASSES, at place ranks[n]; 0 is the best."""
    labels = torch.arange(len(ranks)) % CLASSES
    images = torch.empty(len(ranks), 1, 1, CLASSES)
    for index, (rank, label) in enumerate(zip(ranks, labels.tolist(), strict=True)):
        order = [one for one in range(CLASSES) if one != label]
        order.insert(rank, label)
        images[index, 0, 0, order] = torch.arange(CLASSES, 0, -1).float()
    return images, labels


def batches(images: Tensor, labels: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def measured(hits: str, predictions: str | None = None, labels: str = "same") -> Measurement:
    """What `accuracy` returns, from a string of 1 and 0 for each image."""
    samples = tuple(float(hit) for hit in hits)
    return Measurement(
        metric="accuracy_top1",
        value=100 * sum(samples) / len(samples),
        unit="percent",
        n=len(samples),
        samples=samples,
        details={"predictions": [int(one) for one in predictions or hits], "labels_sha256": labels},
    )


def test_each_image_counts_once_in_order(lookup: Path) -> None:
    told: list[int] = []
    found = accuracy(lookup, TARGET, batches(*ranking(0, 1, 0, 0, 4, 5, 0)), progress=told.append)
    assert found.samples == (1, 0, 1, 1, 0, 0, 1)
    assert (found.metric, found.unit, found.n, found.value) == ("accuracy_top1", "percent", 7, 100 * 4 / 7)
    assert (found.low, found.high) == wilson(4, 7)
    assert found.details["top5"] == 100 * 6 / 7  # the label at place 5 is the sixth best
    assert [found.details["predictions"][index] for index in (0, 2, 3, 6)] == [0, 2, 3, 6]
    assert told == [4, 3]


def test_top5_is_left_out_where_it_means_little(tmp_path: Path) -> None:
    path = export_onnx(Lookup(), tmp_path / "few.onnx", Preprocessing(size=(1, 1, 9))).path
    found = accuracy(path, TARGET, [(torch.eye(9).view(9, 1, 1, 9), torch.arange(9))])
    assert found.value == 100
    assert "top5" not in found.details


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_without_an_output_is_a_data_error(lookup: Path, label: int) -> None:
    images, labels = ranking(0, 0)
    labels[1] = label
    with pytest.raises(DataError, match="each image needs one label from 0 to 11"):
        accuracy(lookup, TARGET, [(images, labels)])


def test_an_empty_split_is_a_data_error(lookup: Path) -> None:
    with pytest.raises(DataError, match="accuracy needs at least one image"):
        accuracy(lookup, TARGET, [])


def test_logits_that_are_not_finite_are_no_accuracy(lookup: Path) -> None:
    images, labels = ranking(0, 0)
    images[0, 0, 0, 3] = float("nan")
    with pytest.raises(ParityError, match="1 of 24 logits that are not finite"):
        accuracy(lookup, TARGET, [(images, labels)])


def test_wilson_interval_at_the_edges_and_in_the_middle() -> None:
    # By hand, z^2 = 3.8415. 10 of 10: low = 10 / (10 + z^2) = 0.72246. 436 of 500: centre (0.872 + z^2 / 1000) /
    # (1 + z^2 / 500) = 0.86916, half width z sqrt(0.872 * 0.128 / 500 + z^2 / 10^6) / (1 + z^2 / 500) = 0.02931.
    assert wilson(10, 10) == pytest.approx((72.246, 100), abs=1e-3)
    assert wilson(0, 10) == pytest.approx((0, 27.754), abs=1e-3)
    assert wilson(436, 500) == pytest.approx((83.985, 89.847), abs=2e-3)


def test_drop_counts_what_was_lost_less_what_was_won() -> None:
    found = drop(measured("1001" * 25), measured("1100" * 25))
    assert (found.metric, found.unit, found.value, found.n) == ("top1_drop_points", "points", 0, 100)
    assert found.details == {"lost": 25, "won": 25}
    assert drop(measured("0111"), measured("1111")).value == 25
    assert drop(measured("1111"), measured("0111")).value == -25


def test_drop_interval_is_paired() -> None:
    # 1000 images of which 40 were lost and 10 won: sd of the mean is sqrt(0.05 - 0.03^2) / sqrt(1000) = 0.7007 points,
    # so 3 -+ 1.373; unpaired (70 % against 73 %) it would be -+ 3.95.
    candidate = measured("1" * 690 + "0" * 40 + "1" * 10 + "0" * 260)
    reference = measured("1" * 690 + "1" * 40 + "0" * 10 + "0" * 260)
    found = drop(candidate, reference)
    assert found.value == pytest.approx(3)
    assert (found.low, found.high) == pytest.approx((3 - 1.373, 3 + 1.373), abs=0.15)
    assert drop(candidate, reference) == found
    assert drop(candidate, reference, seed=1).low == pytest.approx(found.low, abs=0.15)


def test_agreement_is_of_predictions_not_of_hits() -> None:
    found = agreement(measured("1000", predictions="1234"), measured("1000", predictions="1243"))
    assert (found.metric, found.value, found.n) == ("top1_agreement", 50, 4)
    assert (found.low, found.high) == wilson(2, 4)


@pytest.mark.parametrize("compare", [drop, agreement])
def test_only_measurements_of_the_same_images_are_compared(compare: object) -> None:
    assert callable(compare)
    with pytest.raises(UsageError, match="3 images of the candidate against 4 of the reference"):
        compare(measured("111"), measured("1111"))
    with pytest.raises(UsageError, match="the 4 labels differ between candidate and reference"):
        compare(measured("1111"), measured("1111", labels="other"))
    with pytest.raises(UsageError, match="needs two measurements of accuracy_top1"):
        compare(measured("1"), Measurement(metric="latency_p50_ms", value=1, unit="ms"))
    bare = measured("1111").model_copy(update={"samples": (), "details": {}})
    with pytest.raises(UsageError, match=r"0 images of the candidate against 0 .* keep their raw samples"):
        compare(bare, bare)


@pytest.fixture(scope="module")
def shared() -> Path:
    if not (place := os.environ.get("SLIM_TEST_DATA")):
        pytest.skip("SLIM_TEST_DATA is not set: it names the folder with the real network and images")
    return Path(place)


def test_the_real_mobilenet_gets_436_of_500_right_as_an_exported_file(shared: Path, tmp_path: Path) -> None:
    from PIL import Image
    from safetensors.torch import load_file
    from timm.data import ImageNetInfo, create_transform

    with tarfile.open(shared / "imagenet-sample.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    files = sorted(tmp_path.rglob("*.jpg"))
    index = {wordnet: index for index, wordnet in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    half = (0.5, 0.5, 0.5)
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=half, std=half)

    def read(count: int = 25) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(files), count):
            images = []
            for file in files[start : start + count]:
                with Image.open(file) as image:
                    images.append(transform(image.convert("RGB")))
            yield torch.stack(images), torch.tensor([index[file.parent.name] for file in files[start : start + count]])

    model = timm.create_model("mobilenetv2_100", pad_type="same")
    model.load_state_dict(load_file(shared / "mobilenetv2_100.safetensors"))
    exported = export_onnx(model, tmp_path / "model.onnx", Preprocessing(mean=half, std=half))
    found = accuracy(exported.path, TARGET, read())
    assert found.n == 500
    # 436 in an independent evaluation; one image may fall to the other side with another decoder or kernel.
    assert abs(sum(found.samples) - 436) <= 1
    first, _ = next(read(16))
    assert parity(model, exported.path, first, target=TARGET).details["top1_agreement"] == 100
    print(found, found.details["top5"])
