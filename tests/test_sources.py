"""Where images come from: folders, tar files, torchvision's arrays, digits; and their fingerprints."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slim import images, sources
from slim.data import open_data
from slim.errors import DataError


def write_images(root: Path, names: Iterable[str]) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")
    return root


def classes_of(split: str, names: Iterable[str] = ("cat", "dog"), count: int = 3) -> list[str]:
    return [f"{split}/{name}/{i}.png".lstrip("/") for name in names for i in range(count)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slim"


def pack(path: Path, root: Path, mode: str = "w", prefix: str = ".") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(root, arcname=prefix)
    return path


# folder


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_train_and_held_out_folder_are_found(tmp_path: Path, held_out: str) -> None:
    root = write_images(tmp_path, classes_of("train") + classes_of(held_out, count=2))
    data = open_data(f"folder:{root}")
    assert data.classes == ("cat", "dog")
    assert data.split("train").names == tuple(classes_of("train"))
    assert data.split("val").names == tuple(classes_of(held_out, count=2))
    assert data.split("val").labels == (0, 0, 1, 1)


def test_val_is_preferred_to_test(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of("train") + classes_of("test") + classes_of("val", count=1))
    assert open_data(f"folder:{root}").split("val").names == ("val/cat/0.png", "val/dog/0.png")


def test_val_and_validation_together_are_an_error(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of("val") + classes_of("validation"))
    with pytest.raises(DataError, match=r"both val/ and validation/"):
        open_data(f"folder:{root}")


def test_val_alone_is_enough_and_has_no_calib(tmp_path: Path) -> None:
    data = open_data(f"folder:{write_images(tmp_path, classes_of('val'))}")
    assert list(data.splits) == ["val"]


def test_train_alone_says_how_to_cut_it(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of("train", count=10))
    with pytest.raises(DataError, match=r"found 1 folders \(train/\) and 0 files.*--split train=0.9,val=0.1"):
        open_data(f"folder:{root}")
    data = open_data(f"folder:{root}", split="train=0.9,val=0.1")
    assert (len(data.split("train")), len(data.split("val"))) == (18, 2)


def test_class_folders_without_split_are_an_error(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of("", ["ant", "bee", "cat", "dog"]))
    with pytest.raises(DataError, match=r"found 4 folders \(ant/, bee/, cat/, \.\.\.\).*--split"):
        open_data(f"folder:{root}")


def test_split_beside_a_val_folder_is_an_error(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of("train") + classes_of("test"))
    with pytest.raises(DataError, match=r"there is a test/ folder already; drop --split"):
        open_data(f"folder:{root}", split="val=1")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["train/1.png", "car/1.png"])
    assert open_data(f"folder:{root}", split="val=1").classes == ("car", "train")


def test_labels_follow_sorted_names_not_natural_order(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["c2/a.png", "c10/a.png", "C1/a.png"])
    assert open_data(f"folder:{root}", split="val=1").classes == ("C1", "c10", "c2")


def test_images_in_nested_folders_keep_their_class(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["cat/1.png", "cat/tabby/2.png", "dog/puppy/3.png"])
    data = open_data(f"folder:{root}", split="val=1")
    assert data.classes == ("cat", "dog")
    labels = dict(zip(data.split("val").names, data.split("val").labels, strict=True))
    assert labels == {"cat/1.png": 0, "cat/tabby/2.png": 0, "dog/puppy/3.png": 1}


def test_hidden_files_and_folders_are_not_data(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["cat/1.png", "cat/._1.png", ".cache/2.png", "__MACOSX/cat/3.png"])
    data = open_data(f"folder:{root}", split="val=1")
    assert (data.classes, data.split("val").names) == (("cat",), ("cat/1.png",))


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of("train") + classes_of("val"))
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "readme.txt").write_text("no image")
    with pytest.raises(DataError, match=r"class folder .*/train/eel holds no image"):
        open_data(f"folder:{root}")


def test_a_root_of_plain_files_is_an_error(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=r"found 2 files and no folder.*class folders"):
        open_data(f"folder:{root}", split="val=1")
    with pytest.raises(DataError, match=r"found 2 files and no folder"):
        open_data(f"folder:{root}")


def test_a_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of("train") + classes_of("val", ["cat", "Dog"]))
    with pytest.raises(DataError, match=r"class 'Dog' is in val/ but not in train/"):
        open_data(f"folder:{root}")


def test_a_part_of_imagenet_may_train_what_more_of_it_judges(tmp_path: Path) -> None:
    first, second = sources.imagenet_names()[:2]
    root = write_images(tmp_path, classes_of("train", [second]) + classes_of("val", [first, second], count=1))
    data = open_data(f"folder:{root}").for_classes(1000)
    assert (data.split("train").labels, data.split("val").labels) == ((1, 1, 1), (0, 1))


def test_links_out_of_a_folder_are_followed(tmp_path: Path) -> None:
    elsewhere = write_images(tmp_path / "elsewhere", ["1.png"])
    root = write_images(tmp_path / "data", ["cat/1.png"])
    (root / "dog").symlink_to(elsewhere)
    assert open_data(f"folder:{root}", split="val=1").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("folder:/no/such/place", "there is no '/no/such/place'"),
        ("folder:", "there is no 'path'"),
        ("folders:/x", "unknown source 'folders'; did you mean 'folder'"),
        ("digit", "did you mean 'digits'"),
        ("digits:/x", "digits takes no path"),
        ("/usr", "write folder:/usr"),
        ("tar:/usr", "is a folder, not a tar file; write folder:/usr"),
        ("torchvision:cifar11@/usr", "unknown torchvision dataset 'cifar11'; did you mean 'cifar1"),
        ("torchvision:cifar10@/usr", "not found or corrupted.*slim never downloads"),
        ("torchvision:mnist", "there is no 'path'"),
    ],
)
def test_a_wrong_source_says_the_way_out(source: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_data(source)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"is a file, not a folder; write tar:"):
        open_data(f"folder:{tmp_path / 'x.tar'}")


# --split


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("trian=0.5,val=0.5", "unknown split 'trian'; did you mean 'train'"),
        ("train=0.5,val=0.6", "add up to 1.1"),
        ("train=0,val=1", r"'train=0': .* in \(0, 1\]"),
        ("val=1.5", r"in \(0, 1\]"),
        ("val=nan", r"in \(0, 1\]"),
        ("val=half", r"in \(0, 1\]"),
        ("val=0.1,val=0.1", "each split once"),
        ("", "unknown split ''"),
    ],
)
def test_a_wrong_split_says_which_part(spec: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        sources.parse_split(spec)


def test_shares_that_add_up_to_one_only_on_paper_pass() -> None:
    assert sources.parse_split("train=0.33, val=0.56, calib=0.11") == {"train": 0.33, "val": 0.56, "calib": 0.11}


def test_a_cut_is_fixed_by_paths_and_seed_alone(tmp_path: Path) -> None:
    root = write_images(tmp_path / "one", classes_of("", count=20))
    same = write_images(tmp_path / "two", classes_of("", count=20))
    a, b = (open_data(f"folder:{place}", split="train=0.5,val=0.5") for place in (root, same))
    assert a.split("val").names == b.split("val").names
    assert set(a.split("train").names) | set(a.split("val").names) == set(classes_of("", count=20))
    assert not set(a.split("train").names) & set(a.split("val").names)
    turned = open_data(f"folder:{root}", split="val=0.5,train=0.5")
    assert turned.split("val").names == a.split("val").names
    other = open_data(f"folder:{root}", split="train=0.5,val=0.5", seed=1)
    assert set(other.split("val").names) != set(a.split("val").names)


def test_val_may_have_everything(tmp_path: Path) -> None:
    data = open_data(f"folder:{write_images(tmp_path, classes_of(''))}", split="val=1")
    assert (len(data.split("val")), list(data.splits)) == (6, ["val"])


def test_a_share_too_small_for_one_image_is_an_error(tmp_path: Path) -> None:
    root = write_images(tmp_path, classes_of(""))
    with pytest.raises(DataError, match=r"of 6 images none is for val"):
        open_data(f"folder:{root}", split="train=0.95,val=0.05")


# tar


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
def test_a_tar_is_unpacked_once(tmp_path: Path, cache: Path, suffix: str, mode: str) -> None:
    root = write_images(tmp_path / "data", classes_of("train") + classes_of("val"))
    source = f"tar:{pack(tmp_path / f'set.{suffix}', root, mode)}"
    assert open_data(source).id == open_data(f"folder:{root}").id
    (place,) = cache.iterdir()
    stamp = (place / "train" / "cat" / "0.png").stat().st_ino
    assert open_data(source).split("val").names == tuple(classes_of("val"))
    assert [entry.name for entry in cache.iterdir()] == [place.name]
    assert (place / "train" / "cat" / "0.png").stat().st_ino == stamp


def test_a_single_top_folder_is_entered(tmp_path: Path, cache: Path) -> None:
    root = write_images(tmp_path / "data", classes_of("train") + classes_of("val"))
    assert open_data(f"tar:{pack(tmp_path / 'set.tar', root, prefix='set-v1')}").id == open_data(f"folder:{root}").id


def test_a_single_folder_called_train_is_not_entered(tmp_path: Path, cache: Path) -> None:
    root = write_images(tmp_path / "data", classes_of("train"))
    with pytest.raises(DataError, match=r"found 1 folders \(train/\)"):
        open_data(f"tar:{pack(tmp_path / 'set.tar', root)}")


def test_a_changed_tar_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    root = write_images(tmp_path / "data", classes_of("val"))
    before = open_data(f"tar:{pack(tmp_path / 'set.tar', root)}")
    write_images(root, ["val/eel/1.png"])
    after = open_data(f"tar:{pack(tmp_path / 'set.tar', root)}")
    assert (len(before.classes), len(after.classes)) == (2, 3)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("evil", "words"),
    [
        (member("../escaped.png"), r"member '\.\./escaped\.png' lies outside"),
        (member("val/cat/../../../escaped.png"), "lies outside"),
        (member("/tmp/slim-escaped.png"), "member '/tmp/slim-escaped.png' lies outside"),
        (member("val/cat/1.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link or device"),
        (member("val/cat/1.png", tarfile.SYMTYPE, "0.png"), "is a link or device"),
        (member("val/cat/1.png", tarfile.LNKTYPE, "val/cat/0.png"), "is a link or device"),
        (member("val/cat/1.png", tarfile.FIFOTYPE), "is a link or device"),
    ],
    ids=["parent", "parent-inside", "absolute", "link-out", "link", "hard-link", "fifo"],
)
def test_an_evil_tar_is_refused_and_leaves_nothing(
    tmp_path: Path, cache: Path, evil: tarfile.TarInfo, words: str
) -> None:
    root = write_images(tmp_path / "data", classes_of("val"))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(root, arcname=".")
        tar.addfile(evil, io.BytesIO())
    with pytest.raises(DataError, match=words):
        open_data(f"tar:{tmp_path / 'set.tar'}")
    assert list(cache.iterdir()) == []
    assert not list(tmp_path.rglob("escaped.png"))
    assert not Path("/tmp/slim-escaped.png").exists()


def test_a_tar_cut_short_is_never_taken_for_whole(tmp_path: Path, cache: Path) -> None:
    root = write_images(tmp_path / "data", classes_of("val", count=30))
    whole = pack(tmp_path / "set.tar.xz", root, "w:xz").read_bytes()
    (tmp_path / "set.tar.xz").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(DataError, match=r"cannot be unpacked into .*is it whole"):
            open_data(f"tar:{tmp_path / 'set.tar.xz'}")
    assert list(cache.iterdir()) == []


def test_an_interrupted_unpack_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "set.tar", write_images(tmp_path / "data", classes_of("val")))
    seen = []

    def interrupt(info: tarfile.TarInfo, place: str) -> tarfile.TarInfo | None:
        seen.append(info)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return tarfile.data_filter(info, place)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_plain_member", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_data(f"tar:{path}")
    assert list(cache.iterdir()) == []
    assert len(open_data(f"tar:{path}").split("val")) == 6


def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "set.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match="cannot be unpacked"):
        open_data(f"tar:{tmp_path / 'set.tar'}")


# torchvision and digits


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The idx format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each as a big-endian int32.
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for part, count in (("train", 12), ("t10k", 5)):
        labels = (np.arange(count) * 3) % 10
        pixels = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28))
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)
    return tmp_path


def test_torchvision_mnist_keeps_pixels_and_labels(mnist: Path) -> None:
    data = open_data(f"torchvision:mnist@{mnist}")
    assert (len(data.split("train")), len(data.split("val")), len(data.classes)) == (12, 5, 10)
    assert data.split("val").labels == (0, 3, 6, 9, 2)
    for name, label in zip(data.split("train").names, data.split("train").labels, strict=True):
        image = data.images.open(name)
        assert (image.mode, image.size, image.getpixel((5, 5))) == ("RGB", (28, 28), (label * 20,) * 3)


def test_torchvision_id_changes_with_a_pixel_and_with_a_label(mnist: Path) -> None:
    ids = [open_data(f"torchvision:mnist@{mnist}").id]
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = mnist / "MNIST" / "raw" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        ids.append(open_data(f"torchvision:mnist@{mnist}").id)
    assert len(set(ids)) == 3
    assert all(one.startswith("full:") for one in ids)


def test_torchvision_refuses_split_and_broken_files(mnist: Path) -> None:
    with pytest.raises(DataError, match="it has a train and a val split of its own; drop --split"):
        open_data(f"torchvision:mnist@{mnist}", split="val=1")
    (mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match="torchvision cannot read it"):
        open_data(f"torchvision:mnist@{mnist}")


def test_digits_are_real_and_their_split_is_fixed() -> None:
    from sklearn.datasets import load_digits

    data, again = open_data("digits"), open_data("digits", seed=5)
    train, val = data.split("train"), data.split("val")
    assert (len(train), len(val)) == (1297, 500)
    assert not set(train.names) & set(val.names)
    assert (train.names, val.names) == (again.split("train").names, again.split("val").names)
    assert data.classes == tuple("0123456789")
    bunch = load_digits()
    for split in (train, val):
        for name, label in list(zip(split.names, split.labels, strict=True))[:20]:
            number = int(name.split("/")[1])
            assert label == bunch.target[number]
            image = data.images.open(name)
            assert (image.mode, image.size) == ("RGB", (32, 32))
            # Each 4x4 block of the large image resembles the pixel it came from.
            small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
            assert np.corrcoef(small.ravel(), bunch.images[number].ravel())[0, 1] > 0.95


# fingerprint


def test_the_id_is_of_files_alone(tmp_path: Path) -> None:
    root = write_images(tmp_path / "here", classes_of("", count=5))
    moved = write_images(tmp_path / "there", classes_of("", count=5))
    ids = {
        open_data(f"folder:{root}", split="val=1").id,
        open_data(f"folder:{root}", split="train=0.3,val=0.2", seed=3, limit_train=1, calib=1).id,
        open_data(f"folder:{moved}", split="val=1").id,
        open_data(f"folder:{moved}", split="val=1", unlabeled=str(root)).id,
    }
    assert len(ids) == 1
    assert ids.pop().startswith("full:")


@pytest.mark.parametrize("whole", [True, False], ids=["full", "ends"])
def test_the_id_changes_with_one_byte_and_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(images, "FULL_HASH_BYTES", 0)
    root = write_images(tmp_path, classes_of("val"))

    def now() -> str:
        return open_data(f"folder:{root}").id

    before = now()
    assert before.split(":")[0] == ("full" if whole else "ends")
    path = root / "val" / "cat" / "1.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    edited = now()
    os.rename(path, path.with_name("1b.png"))  # keeps its place among the others
    assert len({before, edited, now()}) == 3


def test_of_large_sets_both_ends_of_each_file_count(tmp_path: Path) -> None:
    path = tmp_path / "large"

    def now(position: int) -> str:
        content = bytearray(3 * images.END_BYTES)
        content[position] = 1
        path.write_bytes(content)
        return images.content_hash(path, len(content), whole=False)

    assert len({now(0), now(images.END_BYTES - 1), now(2 * images.END_BYTES), now(3 * images.END_BYTES - 1)}) == 4
    assert now(images.END_BYTES) == now(images.END_BYTES + 1)  # what the method word `ends` owns up to


def test_the_unlabeled_folder_has_an_id_of_its_own(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", classes_of("val"))
    plain = write_images(tmp_path / "plain", ["a.png", "deep/er/b.png"])
    data = open_data(f"folder:{root}", unlabeled=str(plain))
    assert data.split("unlabeled").names == ("a.png", "deep/er/b.png")
    assert data.unlabeled_id not in (None, data.id)
    assert open_data(f"folder:{root}").unlabeled_id is None


def test_an_unlabeled_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--unlabeled .*: no image in it"):
        open_data("digits", unlabeled=str(tmp_path))
    with pytest.raises(DataError, match=r"there is no '/no/such'"):
        open_data("digits", unlabeled="/no/such")
