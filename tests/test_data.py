"""Data: calibration subset, limits, labels of the network's outputs, and what is asked for in vain."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slim.artifact import Preprocessing
from slim.data import Augment, Data, open_data
from slim.errors import DataError
from slim.images import hash_key
from slim.sources import imagenet_names

SMALL = Preprocessing(size=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop=1.0)


def folder_of(root: Path, classes: tuple[str, ...], count: int) -> Path:
    """One grey per class, so a batch shows whether image and label belong together."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 24), (number * 20,) * 3).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits")


@pytest.fixture
def real_data() -> Path:
    place = os.environ.get("SLIM_TEST_DATA")
    if place is None:
        pytest.skip("SLIM_TEST_DATA is not set: the folder with imagenet-sample.tar and cifar10-jpeg.tar.xz")
    return Path(place)


def test_calib_is_the_first_of_train_in_hash_order() -> None:
    data = open_data("digits", calib=40, seed=3)
    train = data.split("train")
    expected = sorted(train.names, key=lambda name: hash_key(name, 3))[:40]
    assert data.split("calib").names == tuple(expected)
    labels = dict(zip(train.names, train.labels, strict=True))
    assert data.split("calib").labels == tuple(labels[name] for name in expected)
    assert open_data("digits", calib=40, seed=3).split("calib").names == tuple(expected)
    assert open_data("digits", calib=40, seed=4).split("calib").names != tuple(expected)


def test_images_held_apart_are_the_last_in_hash_order_and_no_longer_in_train(digits: Data) -> None:
    train, parts = digits.split("train"), digits.apart(100, 3)
    held, rest = parts.split("held"), parts.split("train")
    assert held.names == tuple(sorted(train.names, key=lambda name: hash_key(name, 3))[-100:])
    # The first are those of calibration.
    assert {*held.names}.isdisjoint(open_data("digits", calib=1197, seed=3).split("calib").names)
    assert {*held.names, *rest.names} == {*train.names}
    assert len(held) + len(rest) == len(train)
    labels = dict(zip(train.names, train.labels, strict=True))
    for part in (held, rest):
        assert part.labels == tuple(labels[name] for name in part.names)
    assert sum(len(labels) for _, labels in parts.eval_batches("held", SMALL, batch_size=64)) == 100
    # The data that was given is as it was, and so is all else.
    assert not digits.has("held")
    assert parts.split("val") is digits.split("val")
    assert parts.id == digits.id


def test_the_same_images_are_held_apart_with_the_same_seed_and_others_with_another(digits: Data) -> None:
    def held(count: int, seed: int) -> tuple[str, ...]:
        return open_data("digits").apart(count, seed).split("held").names

    assert held(100, 3) == digits.apart(100, 3).split("held").names
    assert held(40, 3) == held(100, 3)[-40:]
    assert held(100, 3) != held(100, 4)
    # In which order the images come plays no part.
    turned = replace(digits, splits={"train": digits.split("train").take(range(1296, -1, -1))})
    assert turned.apart(100, 3).split("held").names == held(100, 3)


@pytest.mark.parametrize("count", [1297, 5000])
def test_holding_all_images_apart_leaves_nothing_to_train_on(count: int, digits: Data) -> None:
    with pytest.raises(DataError) as caught:
        digits.apart(count, 0)
    assert str(caught.value) == (
        f"data digits: {count} images held out of 1297 for training leave none; hold fewer out"
    )
    assert len(digits.apart(1296, 0).split("train")) == 1
    with pytest.raises(DataError, match="no split 'train'; has val"):
        replace(digits, splits={"val": digits.split("val")}).apart(1, 0)


def test_what_is_trained_on_is_without_the_images_held_apart(digits: Data) -> None:
    pooled = replace(digits, splits={**digits.splits, "unlabeled": digits.split("val")})
    assert len(pooled.pool(("train", "unlabeled"))) == 1297 + 500  # kept by the data it was asked of
    parts = pooled.apart(1000, 0)
    assert parts.steps(27) == 11
    assert len(parts.pool(("train", "unlabeled"))) == 297 + 500
    names = {name.partition("/")[2] for name in parts.pool(("train", "unlabeled")).names}
    assert names.isdisjoint(parts.split("held").names)


def test_images_are_held_apart_before_labels_are_mapped_or_after(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", (imagenet_names()[1], imagenet_names()[999]), 4)
    data = open_data(f"folder:{root}", split="train=1")
    after, before = data.for_classes(1000).apart(3, 0), data.apart(3, 0).for_classes(1000)
    for name in ("train", "held"):
        assert after.split(name).names == before.split(name).names
        assert after.split(name).labels == before.split(name).labels
        # And with the labels of the folders again.
        folders = after.for_classes(2).split(name)
        assert folders.labels == data.apart(3, 0).split(name).labels
        assert [(1, 999)[label] for label in folders.labels] == [*after.split(name).labels]


def test_limits_take_the_first_in_hash_order_and_nest() -> None:
    small, large = (open_data("digits", limit_train=n, limit_val=n, calib=8) for n in (10, 50))
    for name in ("train", "val"):
        assert small.split(name).names == large.split(name).names[:10]
        assert len(set(small.split(name).labels)) > 3  # not sorted by class
    assert small.split("calib").names == small.split("train").names[:8]
    assert len(open_data("digits", limit_val=10_000).split("val")) == 500


def test_membership_follows_what_a_split_holds() -> None:
    data = open_data("digits", limit_train=20)
    assert data.membership("train") == open_data("digits", limit_train=20).membership("train")
    assert data.membership("train") != open_data("digits", limit_train=21).membership("train")
    assert data.membership("train") != open_data("digits", limit_train=20, seed=1).membership("train")
    assert data.membership("val") == open_data("digits").membership("val")
    assert len({data.membership("val"), data.membership("train"), data.membership("train", "val")}) == 3


def test_names_that_are_no_text_are_read_and_hashed(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ("cat",), 3)
    os.rename(os.fsencode(root / "cat" / "1.png"), os.fsencode(root / "cat") + b"/\xff.png")
    data = open_data(f"folder:{root}", split="train=1")
    assert sum(len(labels) for _, labels in data.eval_batches("train", SMALL, batch_size=4)) == 3
    assert data.id != data.membership("train")


def test_an_explicit_calib_share_is_kept_out_of_train(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ("cat", "dog"), 10)
    data = open_data(f"folder:{root}", split="train=0.5,val=0.25,calib=0.25", calib=4)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 10, "val": 5, "calib": 4}
    assert not set(data.split("calib").names) & set(data.split("train").names)


@pytest.mark.parametrize("option", ["calib", "limit_train", "limit_val"])
def test_a_limit_of_zero_is_an_error(option: str) -> None:
    with pytest.raises(DataError, match=r"is 0, it must be at least 1"):
        open_data("digits", **{option: 0})  # type: ignore[arg-type]


def test_has_and_a_missing_split(digits: Data) -> None:
    assert digits.has("calib")
    assert not digits.has("unlabeled")
    with pytest.raises(DataError, match=r"no split 'unlabeled'; has train, val, calib"):
        digits.eval_batches("unlabeled", SMALL, batch_size=4)


def test_equal_counts_map_one_to_one(digits: Data) -> None:
    assert digits.fits(10)
    assert digits.for_classes(10).split("val").labels == digits.split("val").labels
    assert digits.labels(10) == tuple("0123456789")


def test_other_counts_name_both(digits: Data) -> None:
    assert not digits.fits(1000)
    for ask in (digits.for_classes, digits.labels):
        with pytest.raises(DataError, match=r"class-count mismatch: 10 class folders, the network has 1000 outputs"):
            ask(1000)


def test_wordnet_folders_map_to_imagenet_and_map_once(tmp_path: Path) -> None:
    goldfish, tench = imagenet_names()[1], imagenet_names()[0]
    toilet_paper = imagenet_names()[999]
    root = folder_of(tmp_path / "set", (goldfish, toilet_paper), 2)
    data = open_data(f"folder:{root}", split="val=1", unlabeled=str(root))
    mapped = data.for_classes(1000)
    assert set(mapped.split("val").labels) == {1, 999}
    assert mapped.for_classes(1000).split("val").labels == mapped.split("val").labels
    assert mapped.for_classes(2).split("val").labels == data.split("val").labels
    assert set(mapped.split("unlabeled").labels) == {-1}
    assert mapped.id == data.id
    labels = data.labels(1000)
    assert (labels[1], len(labels)) == ("goldfish, Carassius auratus", 1000)
    assert tench not in labels
    # A label in a batch is the label of its image: the grey was the folder's number times 20.
    for images, targets in mapped.eval_batches("val", SMALL, batch_size=3):
        greys = ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round()
        assert targets.tolist() == [1 if grey == 0 else 999 for grey in greys.tolist()]


def test_one_folder_that_is_no_wordnet_id_stops_the_mapping(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", (imagenet_names()[0], "cat"), 1)
    data = open_data(f"folder:{root}", split="val=1")
    assert not data.fits(1000)
    with pytest.raises(DataError, match="2 class folders, the network has 1000"):
        data.for_classes(1000)


def test_eval_batches_are_what_the_network_is_fed(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (tmp_path / "set" / "cat").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "set" / "cat" / "1.png")
    data = open_data(f"folder:{tmp_path / 'set'}", split="val=1")
    preprocessing = SMALL.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)})
    ((images, labels),) = data.eval_batches("val", preprocessing, batch_size=8)
    expected = (pixels.transpose(2, 0, 1) / 255 - np.reshape((0.1, 0.2, 0.3), (3, 1, 1))) / np.reshape(
        (0.5, 0.25, 2.0), (3, 1, 1)
    )
    assert (images.dtype, labels.dtype, labels.tolist()) == (torch.float32, torch.int64, [0])
    np.testing.assert_allclose(images[0].numpy(), expected, atol=1e-5)  # float32 rounding of values up to 4


def test_eval_crops_the_middle_share_that_is_asked_for(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[8:24, 8:24] = 255
    (tmp_path / "set" / "cat").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "set" / "cat" / "1.png")
    data = open_data(f"folder:{tmp_path / 'set'}", split="val=1")
    half = SMALL.model_copy(update={"crop": 0.5})
    ((images, _),) = data.eval_batches("val", half, batch_size=1)
    assert images.shape == (1, 3, 16, 16)
    assert bool((images == 1).all())
    ((images, _),) = data.eval_batches("val", SMALL, batch_size=1)
    assert images[0, 0, 0, 0] == -1


def test_eval_batches_keep_split_order_and_the_last_small_batch(digits: Data) -> None:
    batches = list(digits.eval_batches("val", SMALL, batch_size=64))
    assert [len(labels) for _, labels in batches] == [64] * 7 + [52]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(digits.split("val").labels)


def test_unlabeled_batches_have_no_label(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "plain", ("a", "b"), 2)
    data = open_data("digits", unlabeled=str(root))
    ((images, labels),) = data.eval_batches("unlabeled", SMALL, batch_size=8)
    assert (tuple(images.shape), labels.tolist()) == ((4, 3, 16, 16), [-1] * 4)


def test_steps_drop_the_last_batch_unless_it_is_the_only_one(digits: Data) -> None:
    assert (digits.steps(64), digits.steps(1297), digits.steps(5000)) == (20, 1, 1)
    with pytest.raises(DataError, match="batch size is 0"):
        digits.steps(0)


def train(data: Data, **options: int) -> object:
    defaults = {"seed": 0, "epoch": 0, "batch_size": 4, "num_classes": 10}
    return data.train_batches(SMALL, Augment(), **{**defaults, **options})


def test_what_train_batches_cannot_do_is_said_at_once(digits: Data, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels up to 9, the network has 5 outputs"):
        train(digits, num_classes=5)
    with pytest.raises(DataError, match="a batch of 1 images cannot feed 2 processes"):
        train(digits, batch_size=1, world=2)
    only_val = open_data(f"folder:{folder_of(tmp_path / 'set', ('cat',), 1)}", split="val=1")
    with pytest.raises(DataError, match="no split 'train'; has val"):
        train(only_val)
    with pytest.raises(DataError, match="no split 'train'"):
        only_val.steps(4)


def test_networks_of_one_channel_are_refused(digits: Data) -> None:
    grey = SMALL.model_copy(update={"size": (1, 16, 16)})
    with pytest.raises(DataError, match="preprocessing: 1 channels, but images are read as RGB"):
        digits.eval_batches("val", grey, batch_size=1)


# real data


def test_imagenet_sample_maps_by_wordnet_id(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = open_data(f"tar:{real_data / 'imagenet-sample.tar'}", split="train=0.5,val=0.5")
    assert (len(data.classes), len(data.split("train")), len(data.split("val"))) == (500, 250, 250)
    mapped = data.for_classes(1000)
    for name in ("train", "val"):
        split = mapped.split(name)
        wordnet = [path.split("/")[0] for path in split.names]
        assert [imagenet_names()[label] for label in split.labels] == wordnet
    assert len({*mapped.split("train").labels, *mapped.split("val").labels}) == 500
    images, _ = next(mapped.eval_batches("val", Preprocessing(), batch_size=4))
    assert images.shape == (4, 3, 224, 224)


def test_cifar_tar_has_its_train_and_test(real_data: Path) -> None:
    # Sixty thousand files: unpacked into the user's own cache, where a second run finds them.
    data = open_data(f"tar:{real_data / 'cifar10-jpeg.tar.xz'}", limit_val=16)
    assert (len(data.split("train")), len(data.split("val")), len(data.split("calib"))) == (50_000, 16, 256)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    images, labels = next(data.eval_batches("val", SMALL, batch_size=16))
    assert len(images) == len(labels) == 16
