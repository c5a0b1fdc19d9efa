"""Where images come from: digits, class folders, tar files, torchvision's arrays; and how they fall into splits.

timm's folder reader lists the images of one class folder at a time. Given a whole root it takes the innermost folder
for the class, and asked for `val` on a root with train/ and test/ it returns both.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import os
import tarfile
import tempfile
import zlib
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from slim.errors import DataError, did_you_mean
from slim.images import ArrayImages, FolderImages, Images, Split

SPLIT_NAMES = ("train", "val", "calib")
IMAGE_TYPES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TORCHVISION = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist")
DIGITS_VAL = 500
"""Images of `digits` held out for validation, of 1797."""


Found = tuple[Images, tuple[str, ...], dict[str, Split]]
"""What a source offers: its images, its class names, its splits."""


@cache
def imagenet_names() -> tuple[str, ...]:
    """WordNet ids of the 1000 ImageNet classes, in output order."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def imagenet_labels() -> tuple[str, ...]:
    """Descriptions of the 1000 ImageNet classes, in output order."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_descriptions())


def parse_split(spec: str) -> dict[str, float]:
    """`train=0.9,val=0.1` as shares by name. Raises DataError for a wrong name, share or sum."""
    shares: dict[str, float] = {}
    for entry in spec.split(","):
        name, _, text = (part.strip() for part in entry.partition("="))
        if name not in SPLIT_NAMES:
            raise DataError(f"--split {spec}: unknown split {name!r}{did_you_mean(name, SPLIT_NAMES)}")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if name in shares or not 0 < share <= 1:
            raise DataError(f"--split {spec}: {entry!r}: each split once, its share in (0, 1]; try train=0.9,val=0.1")
        shares[name] = share
    if (total := math.fsum(shares.values())) > 1:  # plainly added, 0.33 + 0.56 + 0.11 is more than 1
        raise DataError(f"--split {spec}: shares add up to {total:g}, at most 1 can be given away; lower one")
    return shares


def read_digits(source: str, place: str) -> Found:
    """scikit-learn's 1797 handwritten digits, 32x32; train and val are fixed."""
    if place:
        raise DataError(f"data {source}: digits takes no path; write digits")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 8x8, 17 levels
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small]
    images = ArrayImages("digits", {"digits": np.stack(large)}, {"digits": bunch.target.astype(np.int64)})
    everything = _array_split(images, "digits")
    order = everything.hash_order(seed=0)  # the split is part of the dataset: no seed moves it
    train, val = sorted(order[DIGITS_VAL:]), sorted(order[:DIGITS_VAL])
    return images, tuple("0123456789"), {"train": everything.take(train), "val": everything.take(val)}


def read_torchvision(source: str, place: str) -> Found:
    """`NAME@/path`: one of TORCHVISION as torchvision keeps it on disk; its test set is val."""
    name, _, path = place.partition("@")
    if name not in TORCHVISION:
        raise DataError(f"data {source}: unknown torchvision dataset {name!r}{did_you_mean(name, TORCHVISION)}")
    root = existing(source, path)
    from timm.data import create_dataset

    pixels: dict[str, npt.NDArray[np.uint8]] = {}
    labels: dict[str, npt.NDArray[np.int64]] = {}
    for split, timms in (("train", "train"), ("val", "validation")):
        try:
            dataset = create_dataset(f"torch/{name}", root=str(root), split=timms, download=False)
        except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
            why = " ".join(str(error).split("You can use")[0].split()) or type(error).__name__
            raise DataError(f"data {source}: torchvision cannot read it: {why}; slim never downloads") from error
        pixels[split], labels[split] = np.asarray(dataset.data), np.asarray(dataset.targets, dtype=np.int64)
    images = ArrayImages(source, pixels, labels)
    return images, tuple(dataset.classes), {split: _array_split(images, split) for split in pixels}


def _array_split(images: ArrayImages, array: str) -> Split:
    return Split(images, images.names(array), tuple(images.labels[array].tolist()))


def existing(source: str, place: str) -> Path:
    """The path as it lies on disk. Raises DataError where there is none."""
    path = Path(place).expanduser()
    if not place or not path.exists():
        raise DataError(f"data {source}: there is no {place or 'path'!r}; give an existing path after the scheme")
    return path


def read_folder(source: str, root: Path, spec: str | None, seed: int) -> Found:
    """Class folders in train/ and val/ (or validation/, test/), or cut by `spec` where there are none."""
    found = _split_folders(source, root)
    if spec is None:
        if "val" not in found:
            raise DataError(
                f"data {source}: no val/, validation/ or test/ with class folders; found {_holds(root)} in {root};"
                " to cut class folders add --split train=0.9,val=0.1"
            )
    elif "val" in found:
        raise DataError(f"data {source}: --split {spec}: there is a {found['val']}/ folder already; drop --split")
    listed = {split: _listing(source, root, folder) for split, folder in (found or {"train": ""}).items()}
    classes = tuple(sorted({name for part in listed.values() for name in part}))
    stray = set(classes) - set(listed.get("train", classes))
    if stray and not set(classes) <= set(imagenet_names()):  # a part of ImageNet may calibrate what all of it judges
        raise DataError(f"data {source}: class {min(stray)!r} is in {found['val']}/ but not in train/; rename it")
    numbers = {name: number for number, name in enumerate(classes)}
    images = FolderImages(root, tuple(path for part in listed.values() for paths in part.values() for path in paths))
    splits = {
        split: Split(
            images,
            tuple(path for paths in part.values() for path in paths),
            tuple(numbers[name] for name, paths in part.items() for _ in paths),
        )
        for split, part in listed.items()
    }
    return images, classes, splits if spec is None else _cut(source, splits["train"], spec, seed)


def _split_folders(source: str, root: Path) -> dict[str, str]:
    """Folders of the splits found: those of the right name that hold folders themselves, as a class may be `train`."""
    there = [name for name in ("train", "val", "validation", "test") if root.joinpath(name).is_dir()]
    there = [name for name in there if _subfolders(root / name)]
    if "val" in there and "validation" in there:
        raise DataError(f"data {source}: both val/ and validation/ in {root}; rename the one that is not meant")
    held_out = [name for name in there if name != "train"]
    return {name: name for name in there if name == "train"} | ({"val": held_out[0]} if held_out else {})


def _listing(source: str, root: Path, folder: str) -> dict[str, list[str]]:
    """Images of each class folder below `folder`, as sorted paths relative to `root`."""
    place = root / folder
    names = _subfolders(place)
    if not names:
        raise DataError(
            f"data {source}: found {_holds(place)} in {place}; images must lie in class folders, such as"
            " cat/1.jpg (plain images go to --unlabeled)"
        )
    listed: dict[str, list[str]] = {}
    for name in names:
        listed[name] = [PurePosixPath(folder, name, path).as_posix() for path in list_images(place / name)]
        if not listed[name]:
            types = " ".join(IMAGE_TYPES)
            raise DataError(f"data {source}: class folder {place / name} holds no image ({types}); fill or remove it")
    return listed


def list_images(folder: Path) -> list[str]:
    """Image files below `folder`, hidden ones left out, as sorted relative paths with forward slashes."""
    from timm.data import create_reader

    try:
        reader = create_reader("", root=str(folder), input_key=";".join(IMAGE_TYPES))
    except RuntimeError:  # timm's word for no image at all; the caller knows which folder to name
        return []
    paths = (PurePosixPath(Path(name).as_posix()) for name in reader.filenames())
    return sorted(path.as_posix() for path in paths if not any(_is_hidden(part) for part in path.parts))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # what macOS packs beside each file of a tar or zip


def _holds(folder: Path) -> str:
    folders, files = _subfolders(folder), sum(entry.is_file() for entry in folder.iterdir())
    named = ", ".join(f"{name}/" for name in folders[:3]) + (", ..." if len(folders) > 3 else "")
    return f"{len(folders)} folders ({named}) and {files} files" if folders else f"{files} files and no folder"


def _cut(source: str, everything: Split, spec: str, seed: int) -> dict[str, Split]:
    """Consecutive runs of the hash order, in the order of SPLIT_NAMES whatever the order of the words."""
    shares, order = parse_split(spec), everything.hash_order(seed)
    splits: dict[str, Split] = {}
    given, share = 0, 0.0
    for name in SPLIT_NAMES:
        if name in shares:
            share += shares[name]
            upto = round(share * len(order))
            if upto == given:
                raise DataError(
                    f"data {source}: --split {spec}: of {len(order)} images none is for {name}; raise its share"
                )
            splits[name], given = everything.take(order[given:upto]), upto
    return splits


def unpacked(source: str, path: Path) -> Path:
    """Folder with the content of a tar file, unpacked into the user's cache the first time it is asked for.

    Keyed by path, size and time of change. Unpacked beside and renamed, so what is there is whole.

    Raises:
        DataError: not a tar file, cut short, or with a member that is not a plain file or folder inside it.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
    place = cache_folder() / f"{path.name.split('.')[0]}-{key.hexdigest()[:16]}"
    if not place.is_dir():
        _unpack(source, path, place)
    inner = _subfolders(place)
    only = len(inner) == 1 and inner[0] not in ("train", "val", "validation", "test") and place / inner[0]
    return only if only and _subfolders(only) else place


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/slim`, or `~/.cache/slim`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slim"


def _unpack(source: str, path: Path, place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tar-", dir=place.parent, ignore_cleanup_errors=True) as beside:
            whole = Path(beside) / "whole"
            with tarfile.open(path) as tar:
                tar.extractall(whole, filter=_plain_member)
            try:
                whole.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was faster, with the same content
                    raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"data {source}: cannot be unpacked into {place.parent}: {error}; is it whole, has XDG_CACHE_HOME room?"
        ) from error
    except DataError as error:
        raise DataError(f"data {source}: {error}") from error


def _plain_member(member: tarfile.TarInfo, place: str) -> tarfile.TarInfo | None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"member {member.name!r} lies outside the folder it unpacks to; pack relative paths")
    if not (member.isfile() or member.isdir()):
        raise DataError(f"member {member.name!r} is a link or device, not a file; pack it with --dereference")
    return tarfile.data_filter(member, place)
