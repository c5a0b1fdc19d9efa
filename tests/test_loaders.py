"""Batches: the same whatever the workers and ranks, generators left alone, broken images counted and named."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from slim import loaders
from slim.artifact import Preprocessing
from slim.data import Augment, Data, open_data
from slim.errors import DataError

SMALL = Preprocessing(size=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop=1.0)
PLAIN = Augment(flip=0, scale_low=1)
EVERYTHING = Augment(color_jitter=0.4, mixup=0.8, cutmix=1.0, smoothing=0.1, erase=0.5)
Batches = list[tuple[Tensor, Tensor]]
"""Images and targets."""


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=50)


def batches(data: Data, augment: Augment = EVERYTHING, **options: Any) -> Batches:
    defaults = {"seed": 1, "epoch": 0, "batch_size": 12, "num_classes": len(data.classes)}
    return [(batch.images, batch.target) for batch in data.train_batches(SMALL, augment, **{**defaults, **options})]


def equal(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def grey_set(root: Path, count: int) -> Path:
    """One class; the grey of image i is i, its name is its number."""
    (root / "only").mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (16, 16), (index,) * 3).save(root / "only" / f"{index:03d}.png")
    return root


def greys(images: Tensor) -> list[int]:
    return [int(grey) for grey in ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().tolist()]


AUGMENTS = {
    "default": Augment(),
    "everything": EVERYTHING,
    "mixup": Augment(mixup=0.2),
    "cutmix": Augment(cutmix=1.0),
    "smoothing": Augment(smoothing=0.1),
    "rand-augment": Augment(auto="rand-m9-mstd0.5"),
    "augmix": Augment(auto="augmix-m3-w3"),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_batches_are_the_same_for_any_ranks_and_again(digits: Data, name: str) -> None:
    one = batches(digits, AUGMENTS[name])
    assert equal(one, batches(digits, AUGMENTS[name]))
    for world in (2, 3):
        shares = [batches(digits, AUGMENTS[name], rank=rank, world=world) for rank in range(world)]
        for step, (images, targets) in enumerate(one):
            for rank in range(world):
                assert torch.equal(shares[rank][step][0], images[rank::world])
                assert torch.equal(shares[rank][step][1], targets[rank::world])


def test_batches_are_the_same_in_worker_processes(digits: Data) -> None:
    assert equal(batches(digits), batches(digits, workers=2))
    evaluated = [list(digits.eval_batches("val", SMALL, batch_size=128, workers=workers)) for workers in (0, 2)]
    assert equal(*evaluated)


def test_seed_and_epoch_change_order_and_augmentation(digits: Data) -> None:
    first = batches(digits)
    assert not equal(first, batches(digits, epoch=1))
    assert not equal(first, batches(digits, seed=2))


def test_an_epoch_takes_every_image_once(tmp_path: Path) -> None:
    data = open_data(f"folder:{grey_set(tmp_path / 'set', 24)}", split="train=1")
    orders = [
        list(itertools.chain.from_iterable(greys(images) for images, _ in batches(data, PLAIN, epoch=epoch)))
        for epoch in (0, 1)
    ]
    assert [sorted(order) for order in orders] == [list(range(24))] * 2
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_equal_images_are_augmented_each_in_its_own_way(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    (tmp_path / "set" / "only").mkdir(parents=True)
    for index in range(8):
        noise.save(tmp_path / "set" / "only" / f"{index}.png")
    ((images, _),) = batches(open_data(f"folder:{tmp_path / 'set'}", split="train=1"), Augment(scale_low=0.1))
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_the_last_incomplete_batch_is_dropped_unless_alone(tmp_path: Path) -> None:
    data = open_data(f"folder:{grey_set(tmp_path / 'set', 10)}", split="train=1")
    assert [len(images) for images, _ in batches(data, batch_size=4)] == [4, 4]
    assert [len(images) for images, _ in batches(data, batch_size=40)] == [10]
    assert len(batches(data, batch_size=4)) == data.steps(4)


def test_start_passes_over_batches_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(f"folder:{grey_set(tmp_path / 'set', 24)}", split="train=1")
    whole = batches(data)
    opened: list[str] = []
    real = type(data.images).open
    monkeypatch.setattr(type(data.images), "open", lambda self, name: opened.append(name) or real(self, name))
    assert equal(batches(data, PLAIN, start=1), batches(data, PLAIN)[1:])
    assert len(opened) == 12 + 24
    monkeypatch.undo()
    assert equal(batches(data, start=1), whole[1:])
    assert batches(data, start=2) == []


def state() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)
    return random.getstate(), pickle.dumps(numpy), torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_as_they_were(digits: Data, workers: int) -> None:
    before = state()
    for _ in digits.train_batches(SMALL, EVERYTHING, seed=0, epoch=0, batch_size=12, num_classes=10, workers=workers):
        assert state() == before
    for _ in digits.eval_batches("calib", SMALL, batch_size=64, workers=workers):
        assert state() == before
    assert state() == before


def test_global_generators_do_not_reach_the_samples(digits: Data) -> None:
    first = batches(digits)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert equal(first, batches(digits))


def test_generators_are_put_back_after_an_error() -> None:
    before = state()
    with pytest.raises(ZeroDivisionError), loaders.seeded(1, 2):
        assert random.random() + np.random.rand() + float(torch.rand(1)) / 0
    assert state() == before


@pytest.mark.parametrize("end", ["exhausted", "left", "failed"])
def test_no_worker_process_is_left(digits: Data, tmp_path: Path, end: str) -> None:
    if end == "failed":
        root = grey_set(tmp_path / "set", 12)
        for path in list((root / "only").iterdir())[:6]:
            path.write_bytes(b"no image")
        data = open_data(f"folder:{root}", split="train=1")
        with pytest.raises(DataError, match="unreadable so far"):
            batches(data, batch_size=2, workers=2)
    else:
        stream = digits.train_batches(SMALL, PLAIN, seed=0, epoch=0, batch_size=4, num_classes=10, workers=2)
        next(stream)
        assert len(multiprocessing.active_children()) == 2
        if end == "exhausted":
            list(stream)
        else:
            stream.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_samples_travel_to_processes_that_are_not_forked(digits: Data) -> None:
    samples = loaders.TrainSamples(digits.split("train"), SMALL, EVERYTHING, seed=0, epoch=0, num_classes=10)
    there = pickle.loads(pickle.dumps(samples))
    assert torch.equal(there[3][0], samples[3][0])


# targets


def test_hard_targets_are_class_numbers(digits: Data) -> None:
    ((_, targets), *_) = batches(digits, Augment())
    assert (targets.dtype, targets.shape) == (torch.int64, (12,))


def test_smoothing_spreads_its_share(digits: Data) -> None:
    hard = torch.cat([targets for _, targets in batches(digits, PLAIN)])
    soft = torch.cat([targets for _, targets in batches(digits, PLAIN.model_copy(update={"smoothing": 0.1}))])
    expected = torch.full((len(hard), 10), 0.01).scatter_(1, hard[:, None], 0.91)
    torch.testing.assert_close(soft, expected)


def test_mixup_mixes_image_and_target_by_one_share(tmp_path: Path) -> None:
    # Class 0 is black, class 1 is white: the mixed grey is the share of class 1.
    for name, grey in (("black", 0), ("white", 255)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(16):
            Image.new("RGB", (16, 16), (grey,) * 3).save(tmp_path / "set" / name / f"{index}.png")
    data = open_data(f"folder:{tmp_path / 'set'}", split="train=1")
    for augment in (Augment(mixup=1.0), Augment(cutmix=1.0)):
        ((images, targets),) = batches(data, augment, batch_size=32)
        white = (images * 0.5 + 0.5).mean(dim=(1, 2, 3))
        torch.testing.assert_close(white, targets[:, 1])
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(32))
        mixed = (targets[:, 1] > 0.01) & (targets[:, 1] < 0.99)
        assert 4 < int(mixed.sum()) < 28  # about half of the partners are of the other class
        assert len(set(targets[mixed, 1].tolist())) > 4  # each sample has a share of its own
    ((images, _),) = batches(data, Augment(mixup=1.0), batch_size=32)
    assert bool((images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3)) < 1e-6).all())  # mixup leaves no edge


# broken images


def break_some(root: Path, names: list[str]) -> None:
    for name in names:
        path = root / "only" / name
        path.write_bytes(path.read_bytes()[:40])


def test_evaluation_lacks_a_broken_image_and_names_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = grey_set(tmp_path / "set", 8)
    break_some(root, ["003.png"])
    data = open_data(f"folder:{root}", split="train=0.5,val=0.5")
    data = open_data(f"folder:{root}", split="val=1")
    for workers in (0, 2):
        with caplog.at_level(logging.WARNING, logger="slim"):
            read = list(data.eval_batches("val", SMALL, batch_size=1, workers=workers))
        assert sorted(itertools.chain.from_iterable(greys(images) for images, _ in read)) == [0, 1, 2, 4, 5, 6, 7]
        assert data.unreadable("val") == 1
    (record,) = caplog.records
    assert f"{root}/only/003.png: skipped" in record.getMessage()
    assert (record.name, "\n" in record.getMessage()) == ("slim", False)


@pytest.mark.parametrize(("count", "broken", "stops"), [(8, 1, False), (8, 2, True), (200, 2, False), (200, 3, True)])
def test_one_percent_may_be_broken_and_always_one(tmp_path: Path, count: int, broken: int, stops: bool) -> None:
    root = grey_set(tmp_path / "set", count)
    break_some(root, [f"{index:03d}.png" for index in range(broken)])
    data = open_data(f"folder:{root}", split="val=1")
    stream = data.eval_batches("val", SMALL, batch_size=count)
    if stops:
        with pytest.raises(DataError, match=rf"only/\d+.png: cannot be read .*{broken} unreadable so far, at most"):
            list(stream)
    else:
        assert sum(len(labels) for _, labels in stream) == count - broken
        assert data.unreadable("val") == broken


def test_a_split_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    root = grey_set(tmp_path / "set", 1)
    break_some(root, ["000.png"])
    with pytest.raises(DataError, match="1 unreadable so far"):
        list(open_data(f"folder:{root}", split="val=1").eval_batches("val", SMALL, batch_size=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_a_broken_image_so_batches_keep_their_size(tmp_path: Path, workers: int) -> None:
    root = grey_set(tmp_path / "set", 12)
    break_some(root, ["005.png"])
    data = open_data(f"folder:{root}", split="train=1")
    after = data.split("train").names[(data.split("train").names.index("only/005.png") + 1) % 12]
    read = batches(data, PLAIN, batch_size=4, workers=workers)
    assert [len(images) for images, _ in read] == [4, 4, 4]
    expected = sorted([*(set(range(12)) - {5}), int(after[5:8])])
    assert sorted(itertools.chain.from_iterable(greys(images) for images, _ in read)) == expected
    assert data.unreadable("train") == 1


@pytest.mark.parametrize("augment", [PLAIN, Augment(mixup=1.0)], ids=["plain", "mixup"])
def test_training_on_a_broken_set_stops(tmp_path: Path, augment: Augment) -> None:
    root = grey_set(tmp_path / "set", 12)
    break_some(root, [f"{index:03d}.png" for index in range(10)])
    with pytest.raises(DataError, match=r"only/\d+.png: cannot be read as an image"):
        batches(open_data(f"folder:{root}", split="train=1"), augment)


def test_a_file_removed_after_opening_counts_as_broken(tmp_path: Path) -> None:
    root = grey_set(tmp_path / "set", 4)
    data = open_data(f"folder:{root}", split="val=1")
    (root / "only" / "000.png").unlink()
    assert sum(len(labels) for _, labels in data.eval_batches("val", SMALL, batch_size=4)) == 3


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"GIF89a", b"P6\n9"]
)
def test_whatever_is_no_image_is_skipped(tmp_path: Path, content: bytes) -> None:
    root = grey_set(tmp_path / "set", 4)
    (root / "only" / "000.png").write_bytes(content)
    data = open_data(f"folder:{root}", split="val=1")
    assert sum(len(labels) for _, labels in data.eval_batches("val", SMALL, batch_size=4)) == 3


# the fields


@pytest.mark.parametrize(
    "field", [{"flip": 1.5}, {"scale_low": 0}, {"smoothing": 1}, {"mixup": -1}, {"auto": "nonsense"}, {"flop": 1}]
)
def test_augment_refuses_what_is_out_of_range(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        Augment(**field)


def test_flip_and_crop_do_what_they_say(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, 8:] = 255
    (tmp_path / "set" / "only").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "set" / "only" / "1.png")
    data = open_data(f"folder:{tmp_path / 'set'}", split="train=1")
    for flip, left in ((0, -1), (1, 1)):
        ((images, _),) = batches(data, Augment(flip=flip, scale_low=1))
        assert images[0, 0, 0, 0] == left
    shares = [float(batches(data, Augment(flip=0, scale_low=0.1), epoch=e)[0][0].mean()) for e in range(8)]
    assert len(set(shares)) > 4
