"""Datasets by name: `digits`, `folder:/path`, `tar:/path`, `torchvision:cifar10@/path`. Nothing is ever downloaded.

Splits are resolved here and never guessed: `train` and `val|validation|test` are folders, or `--split` cuts class
folders by a hash of each path, or it is an error that says what was found.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from slim import loaders, sources
from slim.artifact import Preprocessing
from slim.errors import DataError, did_you_mean
from slim.images import FolderImages, Images, Split
from slim.loaders import Augment, Batch
from slim.pool import read_list
from slim.sources import imagenet_labels, imagenet_names

__all__ = ["Augment", "Batch", "Data", "Split", "open_data"]

SCHEMES = ("digits", "folder", "tar", "torchvision")


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset with its splits, labels and order fixed."""

    source: str
    """What `open_data` was asked for."""
    classes: tuple[str, ...]
    """Class folder names, sorted; for arrays the names that come with them, in label order."""
    splits: Mapping[str, Split]
    """`train`, `val`, `calib`, `unlabeled`, as far as there are any."""
    images: Images
    """All labelled images, before any limit."""
    unmapped: Data | None = None
    """The dataset with labels by class folder, where `for_classes` made this one."""
    _pools: dict[tuple[str, ...], Split] = field(init=False, default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        """Fingerprint of the labelled files, whatever the split, seed and limits; computed when first asked for."""
        return self.images.id

    @property
    def unlabeled_id(self) -> str | None:
        """Fingerprint of the unlabeled files, none where there are none."""
        return self.splits["unlabeled"].images.id if self.has("unlabeled") else None

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return split in self.splits

    def split(self, name: str) -> Split:
        """The split of this name. Raises DataError where there is none."""
        if name not in self.splits:
            raise DataError(f"data {self.source}: no split {name!r}; has {', '.join(self.splits)}")
        return self.splits[name]

    def pool(self, splits: Sequence[str]) -> Split:
        """What is trained on: one split, or several one after another. The same object each time, as it counts.

        Raises:
            DataError: there is no such split.
        """
        if len(splits) == 1:
            return self.split(splits[0])
        key = tuple(splits)
        if key not in self._pools:
            self._pools[key] = Split.joined({name: self.split(name) for name in key})
        return self._pools[key]

    def membership(self, *splits: str) -> str:
        """Fingerprint of which images these splits hold, in order: changed by a limit, cut or seed that moves one."""
        digest = hashlib.sha256()
        for name in splits:
            lines = "\n".join((name, *self.split(name).names, ""))
            digest.update(lines.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def apart(self, count: int, seed: int) -> Data:
        """The same data with the last `count` images of train, in hash order, in a split `held` instead.

        The last, for the first are those of calibration.

        Raises:
            DataError: there is no train, or nothing would be left of it.
        """
        train = self.split("train")
        if count >= len(train):
            raise DataError(
                f"data {self.source}: {count} images held out of {len(train)} for training leave none; hold fewer out"
            )
        order = train.hash_order(seed)
        parts = {"train": train.take(order[:-count]), "held": train.take(order[-count:])}
        unmapped = self.unmapped and self.unmapped.apart(count, seed)
        return dataclasses.replace(self, splits={**self.splits, **parts}, unmapped=unmapped)

    def unreadable(self, split: str) -> int:
        """How many images of the split were skipped so far because they cannot be read."""
        return len(self.split(split).unreadable)

    def fits(self, num_classes: int) -> bool:
        """Whether labels can be mapped to `num_classes` outputs."""
        return len(self.classes) == num_classes or self._is_imagenet(num_classes)

    def for_classes(self, num_classes: int) -> Data:
        """The same images with labels that number the outputs of a network of `num_classes`.

        Equal counts map one to one. WordNet folder names map to the 1000 ImageNet classes and may be a subset.

        Raises:
            DataError: the counts differ in any other way.
        """
        if not self.fits(num_classes):
            raise DataError(
                f"data {self.source}: class-count mismatch: {len(self.classes)} class folders, the network has"
                f" {num_classes} outputs; put finetune first, it gives the network a new head"
            )
        original = self.unmapped or self
        if len(self.classes) == num_classes:
            return original
        outputs = {name: index for index, name in enumerate(imagenet_names())}
        mapped = [outputs[name] for name in self.classes]
        splits = {
            name: dataclasses.replace(part, labels=tuple(mapped[i] if i >= 0 else i for i in part.labels))
            for name, part in original.splits.items()
        }
        return dataclasses.replace(self, splits=splits, unmapped=original)

    def labels(self, num_classes: int) -> tuple[str, ...]:
        """Names of the network's outputs, in order: ImageNet descriptions where mapped by WordNet id."""
        self.for_classes(num_classes)
        if not self._is_imagenet(num_classes):
            return self.classes
        return imagenet_labels()

    def eval_batches(
        self, split: str, preprocessing: Preprocessing, *, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) float32 as the network is fed them and labels (B,) int64, in split order.

        Labels of `unlabeled` are -1. Unreadable images are left out, so a batch may be smaller.

        Raises:
            DataError: no such split, or too many images in it cannot be read.
        """
        part = self.split(split)
        starts = range(0, len(part), _at_least_one("batch size", batch_size))
        batches = [list(range(start, min(start + batch_size, len(part)))) for start in starts]
        found = loaders.read(loaders.EvalSamples(part, preprocessing), batches, workers)
        return ((images, labels) for images, labels, _ in found)

    def steps(self, batch_size: int, splits: Sequence[str] = ("train",)) -> int:
        """Batches of one epoch; an incomplete last one counts only where it is the only one."""
        return max(1, len(self.pool(splits)) // _at_least_one("batch size", batch_size))

    def train_batches(
        self,
        preprocessing: Preprocessing,
        augment: Augment,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        num_classes: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        workers: int = 0,
        splits: Sequence[str] = ("train",),
    ) -> Iterator[Batch]:
        """Augmented images of `splits` with their targets, for one rank and one epoch.

        Targets are (B,) int64, or (B, num_classes) float32 where `augment.soft`. `batch_size` is global: rank r has
        positions r, r + world, ... of every batch, so the ranks together see what one process would. `start` batches
        are passed over without decoding. An unreadable image is replaced by the next readable one.

        Raises:
            DataError: no such split, labels beyond `num_classes`, fewer images in a batch than ranks, or too many
                images that cannot be read.
        """
        part = self.pool(splits)
        if max(part.labels) >= num_classes:
            raise DataError(
                f"data {self.source}: class-count mismatch: labels up to {max(part.labels)}, the network has"
                f" {num_classes} outputs; put finetune first, it gives the network a new head"
            )
        if (smallest := min(_at_least_one("batch size", batch_size), len(part))) < world:
            raise DataError(
                f"data {self.source}: a batch of {smallest} images cannot feed {world} processes; start fewer"
            )
        batches = loaders.epoch_batches(
            len(part), seed=seed, epoch=epoch, batch_size=batch_size, rank=rank, world=world
        )
        samples = loaders.TrainSamples(part, preprocessing, augment, seed=seed, epoch=epoch, num_classes=num_classes)
        return (Batch(*found, epoch) for found in loaders.read(samples, batches[start:], workers))

    def views(
        self,
        preprocessing: Preprocessing,
        augment: Augment,
        positions: Sequence[int],
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        num_classes: int,
        workers: int = 0,
        splits: Sequence[str] = ("train",),
    ) -> Iterator[Batch]:
        """The views that `train_batches` shows of these positions in this epoch, in the order asked for."""
        part = self.pool(splits)
        samples = loaders.TrainSamples(part, preprocessing, augment, seed=seed, epoch=epoch, num_classes=num_classes)
        batches = [positions[at : at + batch_size] for at in range(0, len(positions), batch_size)]
        return (Batch(*found, epoch) for found in loaders.read(samples, batches, workers))

    def _is_imagenet(self, num_classes: int) -> bool:
        return num_classes == len(imagenet_names()) and set(self.classes) <= set(imagenet_names())


def open_data(
    source: str,
    *,
    split: str | None = None,
    unlabeled: str | None = None,
    calib: int = 256,
    seed: int = 0,
    limit_train: int | None = None,
    limit_val: int | None = None,
) -> Data:
    """The dataset `source` names: `digits`, `folder:/path`, `tar:/path` or `torchvision:NAME@/path`.

    Args:
        source: scheme and place.
        split: shares such as `train=0.9,val=0.1`, for class folders without train and val.
        unlabeled: a folder of plain images, read recursively, or a list of `slim select-unlabeled`.
        calib: images of the calibration subset: the first of train, or of an explicit calib share, in hash order.
        seed: of that order, and of the cut by `split`.
        limit_train: use only the first so many of train, in hash order.
        limit_val: the same for val.

    Raises:
        DataError: the source, the split or a folder is not what it should be; names what was found and the way out.
    """
    scheme, _, place = source.partition(":")
    if scheme not in SCHEMES:
        hint = f"; write folder:{source}" if Path(source).is_dir() else did_you_mean(scheme, SCHEMES)
        raise DataError(f"data {source!r}: unknown source {scheme!r}{hint}")
    if scheme in ("digits", "torchvision"):
        if split is not None:
            raise DataError(f"data {source}: --split {split}: it has a train and a val split of its own; drop --split")
        read = sources.read_digits if scheme == "digits" else sources.read_torchvision
        images, classes, splits = read(source, place)
    else:
        images, classes, splits = sources.read_folder(source, _root(source, scheme, place), split, seed)
    for name, limit in (("train", limit_train), ("val", limit_val)):
        if limit is not None and name in splits:
            splits[name] = _first(splits[name], _at_least_one(f"limit of {name}", limit), seed)
    if pool := splits.get("calib", splits.get("train")):
        splits["calib"] = _first(pool, _at_least_one("calib", calib), seed)
    if unlabeled is not None:
        splits["unlabeled"] = _unlabeled(unlabeled)
    return Data(source=source, classes=classes, splits=splits, images=images)


def _root(source: str, scheme: str, place: str) -> Path:
    path = sources.existing(source, place)
    if scheme == "folder" and not path.is_dir():
        raise DataError(f"data {source}: {path} is a file, not a folder; write tar:{place} for a tar file")
    if scheme == "tar" and not path.is_file():
        raise DataError(f"data {source}: {path} is a folder, not a tar file; write folder:{place}")
    return path if scheme == "folder" else sources.unpacked(source, path)


def _unlabeled(place: str) -> Split:
    root = sources.existing("--unlabeled", place)
    if not root.is_dir():
        root, names = read_list(root)
    elif not (names := tuple(sources.list_images(root))):
        raise DataError(
            f"--unlabeled {place}: no image in it; give a folder of images ({' '.join(sources.IMAGE_TYPES)})"
        )
    return Split(FolderImages(root, names), names, (-1,) * len(names))


def _first(split: Split, count: int, seed: int) -> Split:
    return split.take(split.hash_order(seed)[:count])


def _at_least_one(what: str, value: int) -> int:
    if value < 1:
        raise DataError(f"data: {what} is {value}, it must be at least 1; raise it")
    return value
