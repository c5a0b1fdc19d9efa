"""Selection of unlabeled images: of each class those that a teacher is surest of, and none that validation knows.

SSLD (Cui et al. 2021, arXiv:2103.05959): near-duplicates of validation images leave the pool, a strong network names
the class of every other image, and of each class the most probable are kept. Where SSLD matches SIFT features, two
images count as near-duplicates here when their perceptual hashes are close, or close enough for embeddings to decide.
Does not check the teacher's classes: they spread the choice, and no label comes of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slim import loaders, pool, sources
from slim.artifact import Artifact, Backbone
from slim.contract import Context, Progress, no_progress
from slim.data import Data
from slim.errors import DataError, PassError, UsageError
from slim.images import FolderImages, Split
from slim.passes.distill.duplicates import Prints, hashes, near, repeated
from slim.passes.distill.teacher import OWN, Teacher, find


@dataclass(frozen=True)
class Rule:
    """Which images are chosen.

    Raises:
        UsageError: a number out of its range.
    """

    per_class: int
    """Most images of one class."""
    max_hamming: int = 10
    """Bits of 64 in which hashes of near-duplicates differ at most; half of them need no second opinion."""
    min_cosine: float = 0.9
    """Least cosine of embeddings of near-duplicates, where hashes differ in more than half of `max_hamming` bits."""

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


class Judged(NamedTuple):
    """An image of the pool that may be chosen."""

    position: int
    name: str
    number: int
    """Of its class."""
    probability: float
    key: bytes
    """Its hash."""


def surest(judged: Sequence[Judged], per_class: int) -> list[Judged]:
    """The `per_class` most probable of each class, class by class; of equals the first by name."""
    order = sorted(judged, key=lambda one: (one.number, -one.probability, one.name))
    return [one for _, same in groupby(order, lambda one: one.number) for one in islice(same, per_class)]


class Hashed(loaders.EvalSamples):
    """Images as the teacher is fed them, each with its `hashes` in the place of a label."""

    def __getitem__(self, index: int) -> loaders.Sample:
        """The image is decoded once for both."""
        name = self.split.names[index]
        try:
            image = self.split.images.open(name)
        except loaders.DECODE_ERRORS as error:
            return None, None, index, {name: loaders.reason(error)}
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


def select(
    split: Split,
    teacher: Artifact,
    data: Data,
    rule: Rule,
    *,
    out: Path,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = no_progress,
) -> Selection:
    """The images of `split` worth showing to a student.

    Unreadable ones are skipped. Of images equal in hash and alike in embedding, the first by name is left.

    Args:
        split: the pool, of `pool_of`.
        teacher: gives classes and embeddings; fed as it was trained.
        data: what its `val` holds must not be chosen.
        rule: how many, and what a near-duplicate is.
        out: where the list will lie.
        batch_size: images of one forward pass.
        workers: reader processes.
        progress: told of the images read.

    Raises:
        UsageError: a batch of no image.
        DataError: no validation images, too many unreadable ones, or nothing is left to choose.
        PassError: the teacher has no embedding, or what it says is no number.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: must be at least 1; raise it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Teacher(teacher, teacher.backbone.input, device=device, precision="fp32")
    judge = Judge(network, device, batch_size, workers, progress)
    known = [prints for _, prints, _ in judge.look(data.split("val"), "validation images")]
    validation = Prints(torch.cat([one.hashes for one in known]), torch.cat([one.embeddings for one in known]))
    found = _new(judge, split, validation, rule)
    unreadable = len(split.unreadable)
    copies = _copies(judge, split, found, rule)
    order = surest([one for one in found if one.position not in copies], rule.per_class)
    counts = pool.Counts(
        pool=len(split),
        unreadable=unreadable,
        near_duplicates=len(split) - unreadable - len(found),
        repeated=len(copies),
        kept=len(order),
    )
    assert isinstance(split.images, FolderImages)
    place = split.images.root
    if not order:
        raise DataError(
            f"--pool {place}: nothing is left of {counts.pool} images: {counts.unreadable} unreadable, "
            f"{counts.near_duplicates} near-duplicates of validation images; give others, or lower --max-hamming"
        )
    outputs = range(teacher.backbone.num_classes)
    classes: Sequence[str | int] = outputs if teacher.labels is None else teacher.labels
    chosen = tuple(pool.Chosen(path=one.name, name=classes[one.number], probability=one.probability) for one in order)
    header = pool.Header(
        root=pool.relative_root(place, out),
        teacher=teacher.digest,
        data=data.id,
        per_class=rule.per_class,
        max_hamming=rule.max_hamming,
        min_cosine=rule.min_cosine,
        counts=counts,
    )
    numbers = Counter(one.number for one in order)
    return Selection(header, chosen, tuple((name, numbers[i]) for i, name in enumerate(classes)))


def pool_of(root: Path, data: Data) -> Split:
    """The images below `root`, in order of their paths.

    Raises:
        DataError: no such folder, no image in it, a link that leads out of it, or validation images alone.
    """
    if not root.is_dir():
        raise DataError(f"--pool {root}: no such folder; give a folder of plain images")
    names = tuple(sources.list_images(root))
    if not names:
        raise DataError(f"--pool {root}: no image in it; give a folder of images ({' '.join(sources.IMAGE_TYPES)})")
    if odd := next((name for name in names if not _is_text(name)), None):
        raise DataError(f"--pool {root}: {odd!r} is not UTF-8, so no list can hold it; rename it")
    pool.check_inside(f"--pool {root}", root, names)
    val = data.split("val")
    if isinstance(val.images, FolderImages):
        theirs = {(val.images.root / name).resolve() for name in val.names}
        if all((root / name).resolve() in theirs for name in names):
            raise DataError(f"--pool {root}: holds validation images of {data.source} and no others; give other images")
    return Split(FolderImages(root, names), names, (-1,) * len(names))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def teacher_of(spec: str, *, trust: bool) -> Artifact:
    """The network called `spec`: a run or artifact folder, or a timm name with its own weights.

    Raises:
        UsageError: there is no such network, and what it may be.
    """
    if spec in OWN:
        raise UsageError(f"--teacher {spec}: there is no stage here; give a run, an artifact or a timm name")
    nobody = Artifact(Backbone(name=spec, num_classes=1), {}, trust=trust)  # `find` reads off it who is trusted
    try:
        return find(spec, Context(reference=nobody))
    except PassError as error:
        raise UsageError(str(error).removeprefix("distill: ")) from error


def _new(judge: Judge, split: Split, validation: Prints, rule: Rule) -> list[Judged]:
    """What the teacher says of the images that are no near-duplicates of validation images."""
    found = []
    for positions, prints, logits in judge.look(split, "pool"):
        known = near(prints, validation, max_hamming=rule.max_hamming, min_cosine=rule.min_cosine)
        # In float64: of a sure teacher, float32 makes many probabilities 1.
        probabilities, numbers = logits.double().softmax(1).max(1)
        columns = (positions, numbers, probabilities, prints.hashes[:, 0])
        rows = zip(*(column[~known.to(column.device)].tolist() for column in columns), strict=True)
        found += [Judged(i, split.names[i], number, sure, bytes(key)) for i, number, sure, key in rows]
    return found


def _copies(judge: Judge, split: Split, found: Sequence[Judged], rule: Rule) -> set[int]:
    """Positions of images that repeat another. Those that share a hash are looked at once more, hash by hash."""
    numbers = Counter(one.key for one in found)
    shared = sorted((one.key, one.name, one.position) for one in found if numbers[one.key] > 1)
    if not shared:
        return set()
    again = judge.look(split.take([position for _, _, position in shared]), "copies within the pool")
    seen = (
        (shared[int(i)], embedding)
        for at, prints, _ in again
        for i, embedding in zip(at, prints.embeddings, strict=True)
    )
    copies = set()
    for _, same in groupby(seen, lambda one: one[0][0]):
        images, embeddings = zip(*same, strict=True)
        repeats = repeated(embeddings, rule.min_cosine)
        copies |= {position for (_, _, position), repeat in zip(images, repeats, strict=True) if repeat}
    return copies
