"""A teacher's softened outputs for every augmented view, kept as top-k, so that later trainings need no teacher.

TinyViT (Wu et al. 2022, arXiv:2207.10666) stores a seed per view and replays the view from it. Here a view is a
function of (run seed, epoch, position in the split), so the seed is part of the cache's key and a record is the top-k
alone. Does not keep features, and does not choose what the key is made of.

    index.json          key, k and the mass it reached; written once, when k is chosen, and never changed
    00012-00003.bin     epoch 12, shard 3: sha256, then one record per position; see `records`
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from slim import distributed, store
from slim.contract import Progress
from slim.errors import PassError, StoreError
from slim.passes.distill import records

INDEX = "index.json"
SHARD = 65_536
"""Positions of one file; a kill loses at most so many. Part of the format."""
SAMPLE = 1024
"""Views of the first epoch that k is chosen by."""
USUAL_K = 10
"""TinyViT's k for ImageNet-1k: what sizes are estimated with before k is chosen."""
HEADER = 32
"""Bytes of the digest before the records."""
OPEN = 512
"""Shards mapped at a time, which is more than an epoch of 33 million images has."""

Views = Callable[[int, Sequence[int]], Iterable[Tensor]]
"""`views(epoch, positions)` -> batches of images (b, C, H, W), in the order of `positions`."""
Teach = Callable[[Tensor], Tensor]
"""`teacher(images)` -> logits (b, K)."""


class Index(BaseModel):
    """index.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["slim-targets/1"] = "slim-targets/1"
    key: dict[str, str]
    k: int
    """Classes of a record."""
    reached: float
    """Mean share of the probability that they retain, over the views k was chosen by."""
    digest: str = ""
    """sha256 over everything above."""


class Targets:
    """A cache of targets in a folder; see `open`."""

    def __init__(
        self, folder: Path, key: Mapping[str, str], images: int, classes: int, temperature: float, mass: float
    ) -> None:
        self.folder, self.images, self.classes, self.temperature, self.mass = folder, images, classes, temperature, mass
        sizes = {"positions": images, "outputs": classes, "temperature": float(temperature), "mass": float(mass)}
        self._key = {**key, **{name: str(value) for name, value in sizes.items()}}
        self._records = lru_cache(OPEN)(self._mapped)
        self._index = self._read()

    @classmethod
    def open(
        cls, folder: Path, key: Mapping[str, str], *, images: int, classes: int, temperature: float, mass: float
    ) -> Self:
        """Begin a cache, or open one with the same key. Nothing is written before `fill`.

        `key` names everything the targets depend on; `images` counts the positions of one epoch, `classes` the outputs
        of the teacher; `temperature` is above 0; `mass`, in (0, 1], is what the top k retain on average.

        Raises:
            StoreError: the folder holds a cache with another key, a damaged one or something else; too many classes.
        """
        if classes > records.MOST_CLASSES:
            most = f"a record numbers at most {records.MOST_CLASSES}"
            raise StoreError(f"{folder}: {classes} classes, {most}; train with the live teacher")
        return cls(Path(folder), key, images, classes, temperature, mass)

    @property
    def k(self) -> int | None:
        """Classes of a record; none before the first `fill`."""
        return self._index.k if self._index else None

    def size_bytes(self, epochs: int) -> int:
        """Bytes of so many epochs. Before k is chosen an estimate with USUAL_K: soft teachers need more."""
        return bytes_needed(self.images, epochs, self.k or min(self.classes, USUAL_K), shard=SHARD)

    def missing(self, epochs: int) -> list[tuple[int, int]]:
        """(epoch, shard) of what is not there yet, in order."""
        return [pair for pair in self._pairs(epochs) if not self._path(*pair).is_file()]

    def fill(
        self, epochs: int, views: Views, teacher: Teach, *, progress: Progress, rank: int = 0, world: int = 1
    ) -> None:
        """Compute what is missing of `epochs` epochs; what is there is checked for damage and kept.

        The first fill passes SAMPLE views through the teacher to choose k; rank 0 does, and the others wait. Then rank
        r does every `world`-th shard and returns when it is done: before `lookup` the caller waits for them all.

        Raises:
            StoreError: a damaged shard; more or fewer views than positions; the disk is full.
            PassError: the teacher's output has the wrong shape or is not finite.
        """
        self._index = distributed.on_main(lambda: self._read() or self._begin(views, teacher))
        # By number, not by place in `missing`, which gets shorter while other processes work.
        mine = self._pairs(epochs)[rank::world]
        absent = sorted(set(mine) & set(self.missing(epochs)))
        for pair in sorted(set(mine) - set(absent)):
            self._records(*pair)
        if not absent:
            return
        with progress("teacher's outputs", sum(len(self._positions(shard)) for _, shard in absent)) as advance:
            for epoch, shard in absent:
                parts = []
                for logits in self._outputs(epoch, self._positions(shard), views, teacher):
                    parts.append(records.packed(*records.top_k(logits, self.temperature, self._index.k)))
                    advance(len(logits), f"epoch {epoch}")
                found = np.concatenate(parts)
                digest = _digest(self._index, epoch, shard, found)
                store.write_bytes(self._path(epoch, shard), digest + found.tobytes())

    def lookup(self, epoch: int, positions: Tensor) -> Tensor:
        """Log-probabilities (B, K) float32 at the cache's temperature, on the CPU. positions: (B,) int64.

        Raises:
            StoreError: a shard that is missing or damaged.
        """
        return records.log_probs(*self._stored(epoch, positions.cpu().numpy()), self.classes)

    def check(self, sample: int, seed: int, epochs: int, views: Views, teacher: Teach) -> dict[str, float]:
        """Compute `sample` of the records again, at least 1, drawn by `seed` from those of `epochs` filled epochs.

        Returns:
            `records` compared; `max_abs_error` of a stored probability; `index_mismatch`, the share whose most probable
            class differs; `mass`, the mean that the records retain.

        Raises:
            StoreError: a shard is missing or damaged, or a record is not what this teacher gives for this view; see
                `records.agrees`.
        """
        total = epochs * self.images
        drawn = np.sort(np.random.default_rng(seed).choice(total, min(sample, total), replace=False))
        worst, mismatches, mass = 0.0, 0, 0.0
        for epoch in np.unique(drawn // self.images).tolist():
            positions = drawn[drawn // self.images == epoch] % self.images
            logits = torch.cat([part.cpu() for part in self._outputs(epoch, positions.tolist(), views, teacher)])
            index, prob = self._stored(epoch, positions)
            again = records.softened(logits, self.temperature)
            good = records.agrees(index, prob, logits, self.temperature)
            if not good.all():
                row = int(good.int().argmin())
                raise StoreError(
                    f"{self.folder}: epoch {epoch}, position {positions[row]}: stored is class {index[row, 0]:d} with"
                    f" {prob[row, 0]:.4f}, this teacher and view give class {again[row].argmax():d} with"
                    f" {again[row].max():.4f}, beyond rounding; fill another folder"
                )
            worst = max(worst, float((prob - again.gather(1, index)).abs().max()))
            mismatches += int((index[:, 0] != again.argmax(1)).sum())
            mass += float(prob.sum())
        shares = {"index_mismatch": mismatches / len(drawn), "mass": mass / len(drawn)}
        return {"records": len(drawn), "max_abs_error": worst, **shares}

    def _pairs(self, epochs: int) -> list[tuple[int, int]]:
        return [(epoch, shard) for epoch in range(epochs) for shard in range(math.ceil(self.images / SHARD))]

    def _path(self, epoch: int, shard: int) -> Path:
        return self.folder / f"{epoch:05d}-{shard:05d}.bin"

    def _positions(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, self.images))

    def _read(self) -> Index | None:
        """The index, none where nothing was begun."""
        # Listed first: where another run is filling, the index was there before any shard.
        taken = self.folder.is_file() or any(self.folder.glob("[!.]*"))
        index = index_in(self.folder)
        if index is None and taken:
            raise StoreError(f"{self.folder}: exists and is not a cache of targets (no {INDEX}); give another folder")
        if index is not None and index.key != self._key:
            differences = ", ".join(_differences(index.key, self._key))
            raise StoreError(f"{self.folder}: its targets have {differences}; give another folder")
        return index

    def _begin(self, views: Views, teacher: Teach) -> Index:
        """Choose k and write the index; where another run came first, its index stands."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be created: {error.strerror}; give another folder") from error
        positions = range(min(SAMPLE, self.images))
        share = torch.zeros(self.classes, dtype=torch.float64)
        for logits in self._outputs(0, positions, views, teacher):
            share += records.retained(logits.cpu(), self.temperature).sum(0) / len(positions)
        k = records.least_k(share, self.mass)
        index = Index(key=self._key, k=k, reached=min(float(share[k - 1]), 1.0))
        index = index.model_copy(update={"digest": store.content_digest(index.model_dump())})
        first = self._read()
        if first is None:
            store.write_text(self.folder / INDEX, index.model_dump_json(indent=1))
        return first or index

    def _outputs(self, epoch: int, positions: Sequence[int], views: Views, teacher: Teach) -> Iterator[Tensor]:
        """The teacher's logits (b, K) for the views at `positions`, in order."""
        done, of = 0, f"epoch {epoch}, positions {positions[0]} to {positions[-1]}"
        for images in views(epoch, positions):
            done += len(images)
            if done > len(positions):
                break
            with torch.no_grad():
                logits = teacher(images).float()
            if logits.shape != (shape := (len(images), self.classes)):
                given = f"the teacher gave {tuple(logits.shape)}, not {shape}"
                raise PassError(f"targets: {of}: {given}; give a teacher with the student's classes")
            if not logits.isfinite().all():
                raise PassError(f"targets: {of}: the teacher's output is not finite; run it in fp32")
            yield logits
        if done != len(positions):
            raise StoreError(f"{self.folder}: {of}: {done} views for {len(positions)} positions; give one each")

    def _stored(self, epoch: int, positions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Classes (B, k) int64 and probabilities (B, k) float32 of the records at these positions."""
        if self._index is None:
            raise StoreError(f"{self.folder}: holds no targets yet; fill the cache first")
        assert ((positions >= 0) & (positions < self.images)).all()  # the loader's
        taken = np.empty(len(positions), records.record_dtype(self._index.k))
        shards = positions // SHARD
        for shard in np.unique(shards):
            rows = shards == shard
            taken[rows] = self._records(epoch, int(shard))[positions[rows] - shard * SHARD]
        return records.unpacked(taken)

    def _mapped(self, epoch: int, shard: int) -> npt.NDArray[Any]:
        """A shard, memory-mapped, its size and digest checked; called once per shard through `_records`."""
        assert self._index is not None  # whoever asks has an index
        path = self._path(epoch, shard)
        if not path.is_file():
            raise StoreError(f"{path}: no such file; fill the cache for {epoch + 1} epochs first")
        dtype = records.record_dtype(self._index.k)
        size = HEADER + len(self._positions(shard)) * dtype.itemsize
        if path.stat().st_size == size:
            # Not numpy's map: each of those holds a file descriptor.
            whole = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
            if _digest(self._index, epoch, shard, whole[HEADER:]) == whole[:HEADER].tobytes():
                return whole[HEADER:].view(dtype)
        raise StoreError(f"{path}: truncated, edited or of another cache; delete it, the next fill computes it again")


def bytes_needed(images: int, epochs: int, k: int, *, shard: int = SHARD) -> int:
    """Bytes of the shards of a cache: 4 k for every view, and a digest for every shard."""
    return epochs * (images * records.record_dtype(k).itemsize + math.ceil(images / shard) * HEADER)


def index_in(folder: Path) -> Index | None:
    """The index of the cache in `folder`, whatever its key; none where there is none.

    Raises:
        StoreError: it is damaged, or of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        way_out = "use the slim that wrote it, or delete the folder to begin again"
        raise StoreError(f"{path}: not an index that this slim reads; {way_out}") from error
    if store.content_digest(index.model_dump()) != index.digest:
        raise StoreError(f"{path}: edited or damaged; restore it from a copy, or delete the folder to begin again")
    return index


def _digest(index: Index, epoch: int, shard: int, found: npt.NDArray[Any]) -> bytes:
    """sha256 over index, place and records: a shard from elsewhere is found as a damaged one is."""
    digest = hashlib.sha256(f"{index.digest} {epoch} {shard}\n".encode())
    digest.update(found.view(np.uint8).data)
    return digest.digest()


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """`name old, not new` of what differs."""
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, "none"), new.get(name, "none")
        if before != now:
            # From a little before they begin to differ: an augmentation is a long text.
            first = next(place for place, (a, b) in enumerate(zip_longest(before, now)) if a != b)
            shown = slice(max(first - 8, 0), first + 24)
            yield f"{name} {before[shown]}, not {now[shown]}"
