"""From the images of a split to batches: how they are decoded, augmented and grouped.

Every sample is a function of (seed, epoch, position in the split) alone, so batches are the same for any number of
worker processes and any number of ranks. timm's transforms draw from Python's, numpy's and torch's global generators;
this file alone seeds those, for one sample at a time, and puts them back.

timm's own `ImageDataset` is not used to decode: where an image is broken it silently returns the next one.
"""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from slim.artifact import Preprocessing
from slim.errors import DataError
from slim.images import Split

UNREADABLE_SHARE = 0.01
"""Share of a split that may be unreadable before reading stops; one image is always allowed."""

# What Pillow raises on broken files: OSError for most, SyntaxError for PNG chunks, the rest from single decoders.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

Sample = tuple[Tensor | None, Tensor | None, int, dict[str, str]]
"""Image, target, position in the split, and the names of what could not be read, with the reason."""
log = logging.getLogger("slim")


class Batch(NamedTuple):
    """B augmented images of one epoch. A view is a function of (seed, epoch, position) alone."""

    images: Tensor
    """(B, 3, H, W) float32, normalised as the network wants them."""
    target: Tensor
    """(B,) int64, or (B, classes) float32 where targets are soft; -1 or a row of zeros where there is no label."""
    positions: Tensor
    """(B,) int64, the place of each image in what is trained on."""
    epoch: int


class Augment(BaseModel):
    """Random changes to training images; timm's transforms under short names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a left-right flip, in [0, 1]; 0 where left and right mean something, as in digits."""
    scale_low: float = Field(default=0.5, gt=0, le=1)
    """Least share of the image's area that a random crop keeps, in (0, 1]; 1 is the centre crop."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Largest relative change of brightness, contrast and saturation, in [0, 1]; 0 is off."""
    auto: str | None = None
    """timm's auto-augment string, such as `rand-m9-mstd0.5`; replaces color_jitter."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup's Beta distribution, 0 or more; 0 is off."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of cutmix's Beta distribution, 0 or more; 0 is off. With mixup, each is used half the time."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target spread over all classes, in [0, 1)."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle of the image is replaced by noise, in [0, 1]."""

    @field_validator("auto")
    @classmethod
    def _known_to_timm(cls, value: str | None) -> str | None:
        if value is not None:
            from timm.data import create_transform

            try:
                create_transform(32, is_training=True, auto_augment=value)
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(f"{value!r} is not an auto-augment string of timm, such as rand-m9-mstd0.5") from error
        return value

    @property
    def soft(self) -> bool:
        """Whether targets are distributions over the classes instead of class numbers."""
        return self.mixup > 0 or self.cutmix > 0 or self.smoothing > 0


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's, numpy's and torch's global CPU generators start from `key` inside, and are as before afterwards."""
    words = np.random.SeedSequence(key).generate_state(4)
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(words.tobytes())
        np.random.seed(words)
        # Not torch.manual_seed: it would reseed the GPU as well, whose state is not put back here.
        torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def epoch_batches(count: int, *, seed: int, epoch: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Positions of each of this rank's batches: `rank::world` of every global batch of a permutation of `count`.

    The last incomplete batch is dropped, unless it is the only one.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    steps = max(1, count // batch_size)
    return [order[step * batch_size : (step + 1) * batch_size][rank::world] for step in range(steps)]


class EvalSamples(Dataset[Sample]):
    """Images as the network is fed them, in split order, each with its label."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split = split
        self.transform = eval_transform(preprocessing)

    def __getitem__(self, index: int) -> Sample:
        name = self.split.names[index]
        try:
            image = self.split.images.open(name)
        except DECODE_ERRORS as error:
            return None, None, index, {name: reason(error)}
        return self.transform(image), torch.tensor(self.split.labels[index]), index, {}


class TrainSamples(Dataset[Sample]):
    """Augmented images of one epoch, each a function of (seed, epoch, position)."""

    def __init__(
        self, split: Split, preprocessing: Preprocessing, augment: Augment, *, seed: int, epoch: int, num_classes: int
    ) -> None:
        self.split, self.augment, self.num_classes, self.key = split, augment, num_classes, (seed, epoch)
        self.transform = train_transform(preprocessing, augment)
        self.mixup = mixup_of_pairs(augment, num_classes + (min(split.labels) < 0))

    def __getitem__(self, index: int) -> Sample:
        unreadable: dict[str, str] = {}
        sample = self._augmented(index, unreadable)
        if sample is None:
            return None, None, index, unreadable
        image, label = sample
        if self.mixup is not None:
            partner = self._augmented(self._partner(index), unreadable)
            if partner is None:
                return None, None, index, unreadable
            # An image without a label is of a class beyond the others, whose share is then left out.
            labels = torch.tensor([known if known >= 0 else self.num_classes for known in (label, partner[1])])
            with seeded(*self.key, index, 1):
                pair, targets = self.mixup(torch.stack([image, partner[0]]), labels)
            return pair[0], targets[0][: self.num_classes], index, unreadable
        return image, self._target(label), index, unreadable

    def _augmented(self, index: int, unreadable: dict[str, str]) -> tuple[Tensor, int] | None:
        """The image at `index`, or the next readable one, as a batch must have the same size on every rank.

        None where more are unreadable than may be: whoever counts them then stops.
        """
        for position in range(index, index + min(len(self.split), allowed_unreadable(self.split) + 1)):
            name = self.split.names[position % len(self.split)]
            try:
                image = self.split.images.open(name)
            except DECODE_ERRORS as error:
                unreadable[name] = reason(error)
                continue
            with seeded(*self.key, index):
                return self.transform(image), self.split.labels[position % len(self.split)]
        return None

    def _partner(self, index: int) -> int:
        return int(np.random.default_rng([*self.key, index, 2]).integers(len(self.split)))

    def _target(self, label: int) -> Tensor:
        if not self.augment.smoothing:
            return torch.tensor(label)
        if label < 0:
            return torch.zeros(self.num_classes)
        from timm.data.mixup import mixup_target

        soft: Tensor = mixup_target(torch.tensor([label]), self.num_classes, smoothing=self.augment.smoothing)
        return soft[0]


def eval_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform of timm: RGB image -> (3, H, W) float32."""
    from timm.data import create_transform

    transform: Callable[[Image.Image], Tensor] = create_transform(
        **_common(preprocessing), is_training=False, crop_pct=preprocessing.crop
    )
    return transform


def train_transform(preprocessing: Preprocessing, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """The training transform of timm: RGB image -> (3, H, W) float32, drawing from the global generators."""
    from timm.data import create_transform

    transform: Callable[[Image.Image], Tensor] = create_transform(
        **_common(preprocessing),
        is_training=True,
        scale=(augment.scale_low, 1.0),
        hflip=augment.flip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto,
        re_prob=augment.erase,
        re_mode="pixel",
    )
    return transform


def mixup_of_pairs(augment: Augment, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup and cutmix of timm, for a batch of two: ((2, 3, H, W), (2,)) -> ((2, 3, H, W), (2, num_classes))."""
    if not (augment.mixup or augment.cutmix):
        return None
    from timm.data import Mixup

    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
        mode="batch",
    )
    return mixup


def read(
    samples: EvalSamples | TrainSamples, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of the given positions: images (B, 3, H, W) float32, their targets, and the positions that could be read.

    Raises:
        DataError: more of the split is unreadable than UNREADABLE_SHARE allows, or all of it.
    """
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]  # any sized iterable of index lists will do
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),  # else starting an epoch draws from the global generator
    )
    for images, targets, positions, unreadable in loader:
        _count_unreadable(samples.split, unreadable)
        if images is not None:
            yield images, targets, positions


def collate(samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor | None, Tensor | None, dict[str, str]]:
    """Stack what could be read; hand on the names of what could not, as this may run in a worker process."""
    unreadable = {name: why for _, _, _, names in samples for name, why in names.items()}
    images = [image for image, _, _, _ in samples if image is not None]
    targets = [target for _, target, _, _ in samples if target is not None]
    positions = torch.tensor([position for image, _, position, _ in samples if image is not None])
    return (
        (torch.stack(images), torch.stack(targets), positions, unreadable) if images else (None, None, None, unreadable)
    )


def allowed_unreadable(split: Split) -> int:
    """How many images of the split may be skipped."""
    return max(1, int(len(split) * UNREADABLE_SHARE))


def _count_unreadable(split: Split, found: Mapping[str, str]) -> None:
    for name, why in found.items():
        if name not in split.unreadable:
            split.unreadable[name] = why
            log.warning("%s: skipped, it cannot be read as an image: %s", split.images.place(name), why)
    count, allowed = len(split.unreadable), allowed_unreadable(split)
    if count > allowed or count == len(split):
        name, why = next(iter(split.unreadable.items()))
        raise DataError(
            f"{split.images.place(name)}: cannot be read as an image ({why}); {count} unreadable so far, at most"
            f" {allowed} of {len(split)} may be; remove or replace them"
        )


def reason(error: Exception) -> str:
    """Why an image cannot be read, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _common(preprocessing: Preprocessing) -> dict[str, Any]:
    if preprocessing.size[0] != 3:
        raise DataError(
            f"preprocessing: {preprocessing.size[0]} channels, but images are read as RGB; use a network of 3 channels"
        )
    return {
        "input_size": preprocessing.size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
    }
