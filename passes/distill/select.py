"""Selection of unlabeled images: of each class those that a teacher is surest of, and none that validation knows.

SSLD (Cui et al. 2021, arXiv:2103.05959): near-duplicates of validation images leave the pool, a strong network names
the class of every other image, and of each class the most probable are kept. Where SSLD matches SIFT features, two
images count as near-duplicates here when their perceptual hashes and the teacher's embeddings both say so. Does not
check the teacher's classes: they spread the choice, and no label comes of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import imagehash
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from slim import loaders, pool, sources
from slim.artifact import Artifact, Backbone
from slim.contract import Context, Progress, no_progress
from slim.data import Data
from slim.errors import DataError, PassError, UsageError
from slim.images import FolderImages, Split
from slim.passes.distill.teacher import OWN, Teacher, find

CHUNK = 16_384
"""Validation images compared at a time."""


@dataclass(frozen=True)
class Rule:
    """Which images are chosen.

    Raises:
        UsageError: a number out of its range.
    """

    per_class: int
    """Most images of one class."""
    max_hamming: int = 12
    """Bits of 64 in which hashes of near-duplicates differ at most; see `near`."""
    min_cosine: float = 0.8
    """Least cosine of embeddings of near-duplicates; see `near`."""

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise UsageError(f"--per-class {self.per_class}: must be at least 1; raise it")
        if not 0 <= self.max_hamming <= 64:
            raise UsageError(f"--max-hamming {self.max_hamming}: a hash has 64 bits; give 0 to 64")
        if not -1 <= self.min_cosine <= 1:
            raise UsageError(f"--min-cosine {self.min_cosine:g}: a cosine is in [-1, 1]; give one")


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how many of each class."""

    header: pool.Header
    chosen: tuple[pool.Chosen, ...]
    """Class by class, the most probable first."""
    kept: tuple[tuple[str | int, int], ...]
    """Every class of the teacher, by name or by number where it knows no names, and how many images it has."""


@dataclass(frozen=True)
class Prints:
    """What N images are known again by."""

    hashes: Tensor
    """(N, 2, 8) uint8: the 64 bits of each image, and of its mirror image."""
    embeddings: Tensor
    """(N, width) float32 of length 1, the teacher's."""


def hashes(image: Image.Image) -> Tensor:
    """Perceptual hashes (2, 8) uint8 of an image and of its mirror image, 64 bits each."""
    both = (imagehash.phash(seen).hash for seen in (image, ImageOps.mirror(image)))
    return torch.from_numpy(np.stack([np.packbits(bits) for bits in both]))


def signs(packed: Tensor) -> Tensor:
    """Bits packed as (..., 8) uint8 -> (..., 64) float32, 1 where set and -1 where not: products of these are exact."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> places) & 1).flatten(-2).float() * 2 - 1


def hamming(ours: Tensor, theirs: Tensor) -> Tensor:
    """Bits in which N images, either way round, differ from M: (N, 2, 8), (M, 2, 8) uint8 -> (N, M) float32."""
    return (64 - (signs(ours) @ signs(theirs[:, 0]).T).amax(1)) / 2


def near(ours: Prints, theirs: Prints, rule: Rule) -> Tensor:
    """(N,) bool: which of N images are near-duplicates of any of M, both by hash and by embedding."""
    found = torch.zeros(len(ours.hashes), dtype=torch.bool, device=ours.hashes.device)
    for start in range(0, len(theirs.hashes), CHUNK):
        part = slice(start, start + CHUNK)
        alike = hamming(ours.hashes, theirs.hashes[part]) <= rule.max_hamming
        found |= (alike & (ours.embeddings @ theirs.embeddings[part].T >= rule.min_cosine)).any(1)
    return found


def repeated(embeddings: Iterable[Tensor], min_cosine: float) -> list[bool]:
    """Of images with one hash: whether each repeats one before it. Embeddings (width,) of length 1."""
    kept: list[Tensor] = []
    found = []
    for one in embeddings:
        found.append(bool(kept) and bool((torch.stack(kept) @ one >= min_cosine).any()))
        if not found[-1]:
            kept.append(one)
    return found


def surest(classes: Sequence[int], probabilities: Sequence[float], names: Sequence[str], per_class: int) -> list[int]:
    """Positions of the `per_class` most probable of each class, class by class; of equals the first by name."""
    order = sorted(range(len(names)), key=lambda i: (classes[i], -probabilities[i], names[i]))
    return [i for _, same in groupby(order, lambda i: classes[i]) for i in list(same)[:per_class]]


class Hashed(loaders.EvalSamples):
    """Images as the teacher is fed them, each with its `hashes` in the place of a label."""

    def __getitem__(self, index: int) -> loaders.Sample:
        """The image is decoded once for both."""
        name = self.split.names[index]
        try:
            image = self.split.images.open(name)
        except loaders.DECODE_ERRORS as error:
            return None, None, index, {name: " ".join(f"{type(error).__name__}: {error}".split())}
        return self.transform(image), hashes(image), index, {}


@dataclass(frozen=True)
class Judge:
    """A teacher that looks at many images."""

    teacher: Teacher
    device: torch.device
    batch_size: int
    workers: int
    progress: Progress

    @torch.inference_mode()
    def look(self, split: Split, title: str) -> Iterator[tuple[Tensor, Prints, Tensor]]:
        """Positions of the readable images, their prints, and logits (B, classes), batch by batch.

        Raises:
            DataError: too many images cannot be read.
            PassError: the teacher has no embedding, or what it says of an image is no number.
        """
        starts = range(0, len(split), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(split))) for start in starts]
        with self.progress(title, len(split)) as advance:
            for images, hashed, positions in loaders.read(Hashed(split, self.teacher.input), batches, self.workers):
                said = self.teacher(images.to(self.device), embedding=True)
                wrong = ~(said.logits.isfinite().all(1) & said.embedding.isfinite().all(1))
                if wrong.any():
                    place = split.images.place(split.names[int(positions[wrong.cpu()][0])])
                    raise PassError(f"select-unlabeled: what the teacher says of {place} is no number; take another")
                yield positions, Prints(hashed.to(self.device), F.normalize(said.embedding, dim=1)), said.logits
                advance(len(positions))
