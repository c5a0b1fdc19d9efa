"""A teacher's softened outputs for every augmented view, kept as top-k, so that later trainings need no teacher.

Fast knowledge distillation (Shen and Xing 2022, arXiv:2112.01528) keeps the teacher's largest probabilities per view;
TinyViT (Wu et al. 2022, arXiv:2207.10666) replays the view from its seed. Here a view is a function of (run seed,
epoch, position in the split), so the seed is part of the cache's key and a record is the top-k alone. Does not keep
features, does not choose what the key is made of, and does not wait for other processes.

    index.json          key, sizes, k and the mass it reached; written once, when k is chosen, and never changed
    00012-00003.bin     epoch 12, shard 3: sha256, then one record per position; see `record_dtype`
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from slim import store
from slim.contract import Progress
from slim.errors import PassError, StoreError

FORMAT = "slim-targets/1"
INDEX = "index.json"
SHARD = 65_536
"""Positions of one file; a kill loses at most so many."""
SAMPLE = 1024
"""Views of the first shard that k is chosen by."""
MOST_CLASSES = 65_536
"""What a uint16 can number."""
USUAL_K = 10
"""TinyViT's k for ImageNet-1k: what sizes are estimated with before k is chosen."""
HEADER = 32
"""Bytes of the digest before the records."""
ROUNDING = 2.0**-11
"""Largest relative error of a probability stored as float16..."""
FLOOR = 2.0**-25
"""...and largest absolute one below its normal range: half the least positive float16. Least weight of any class."""
# In bf16 a batch of another size adds up in another order, and results near the middle of two bf16 numbers round the
# other way (2^-8 of the value, in every layer). Emulated on an ImageNet MobileNetV2, its sums disturbed by 1e-6 before
# each rounding: the logits move by 1.6 % of the largest of them on average and by 3.9 % at most. Another teacher, or
# another view, moves them by about as much as they are large.
NOISE = 2.0**-4
"""Share of the largest logit by which a logit may differ when the same teacher sees the same view again."""

Views = Callable[[int, Sequence[int]], Iterable[Tensor]]
"""`views(epoch, positions)` -> batches of images (b, C, H, W), in the order of `positions`."""
Teach = Callable[[Tensor], Tensor]
"""`teacher(images)` -> logits (b, K)."""


class Index(BaseModel):
    """index.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    key: dict[str, str]
    images: int
    classes: int
    temperature: float
    mass: float
    """Mean share of the probability that k had to retain."""
    reached: float
    """What it retains, over the views k was chosen by."""
    k: int
    shard: int
    digest: str
    """sha256 over everything above."""


class Targets:
    """A cache of targets in a folder; see `open`."""

    def __init__(self, folder: Path, key: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
        self.folder, self._key, self._wanted = folder, dict(key), dict(wanted)
        self.images, self.classes, self.temperature = wanted["images"], wanted["classes"], wanted["temperature"]
        self._mapped: dict[tuple[int, int], npt.NDArray[Any]] = {}
        self._index = self._read()

    @classmethod
    def open(
        cls, folder: Path, key: Mapping[str, str], *, images: int, classes: int, temperature: float, mass: float
    ) -> Self:
        """Begin a cache, or open one with the same key. Nothing is written before `fill`.

        Args:
            folder: where it lies.
            key: everything the targets depend on, by name.
            images: positions of one epoch.
            classes: outputs of the teacher.
            temperature: the softening, above 0.
            mass: mean share of the probability that the top k retain, in (0, 1].

        Raises:
            StoreError: the folder holds a cache with another key, a damaged one or something else; too many classes.
        """
        if classes > MOST_CLASSES:
            raise StoreError(
                f"{folder}: {classes} classes, a record numbers at most {MOST_CLASSES}; train with the live teacher"
            )
        wanted = {"images": images, "classes": classes, "temperature": float(temperature), "mass": float(mass)}
        return cls(Path(folder), key, wanted)

    @property
    def k(self) -> int | None:
        """Classes of a record; none before the first `fill`."""
        return self._index.k if self._index else None

    @property
    def reached(self) -> float | None:
        """Mean mass that k retains, over the views it was chosen by; none before the first `fill`."""
        return self._index.reached if self._index else None

    def size_bytes(self, epochs: int) -> int:
        """Bytes of so many epochs. Before k is chosen an estimate with USUAL_K: soft teachers need more."""
        return bytes_needed(self.images, epochs, self.k or min(self.classes, USUAL_K), shard=self._shard)

    def missing(self, epochs: int) -> list[tuple[int, int]]:
        """(epoch, shard) of what is not there yet, in order."""
        there = set(_names(self.folder))
        return [pair for pair in self._pairs(epochs) if _file_name(*pair) not in there]

    def fill(
        self, epochs: int, views: Views, teacher: Teach, *, progress: Progress, rank: int = 0, world: int = 1
    ) -> None:
        """Compute what is missing of `epochs` epochs; what is there is checked for damage and kept.

        Rank r does every `world`-th shard and returns when it is done: before `lookup` the caller waits for them all.
        The first fill passes SAMPLE views, or one shard if that is less, through the teacher to choose k.

        Raises:
            StoreError: a damaged shard; more or fewer views than positions; the disk is full.
            PassError: the teacher's output has the wrong shape or is not finite.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be created: {error.strerror}; give another folder") from error
        self._index = self._index or self._read() or self._begin(views, teacher, rank)
        # By number, not by place in `missing`, which gets shorter while other processes work.
        mine = [pair for number, pair in enumerate(self._pairs(epochs)) if number % world == rank]
        absent = set(self.missing(epochs))
        for pair in mine:
            if pair not in absent:
                self._records(*pair)
        absent &= set(mine)
        if not absent:
            return
        with progress("teacher's outputs", sum(len(self._positions(shard)) for _, shard in absent)) as advance:
            for epoch, shard in sorted(absent):
                records = np.empty(len(self._positions(shard)), record_dtype(self._index.k))
                for start, logits in self._outputs(epoch, self._positions(shard), views, teacher):
                    index, prob = top_k(logits, self.temperature, self._index.k)
                    records["index"][start : start + len(logits)] = index.cpu().numpy()
                    records["prob"][start : start + len(logits)] = prob.cpu().numpy()
                    advance(len(logits), f"epoch {epoch}")
                digest = self._digest(epoch, shard, records)
                store.write_bytes(self.folder / _file_name(epoch, shard), digest + records.tobytes())

    def lookup(self, epoch: int, positions: Tensor) -> Tensor:
        """Log-probabilities (B, K) float32 at the cache's temperature, on the CPU. positions: (B,) int64.

        Raises:
            StoreError: a shard that is missing or damaged.
        """
        records = self._taken(epoch, positions.cpu().numpy())
        return log_probs(*_tensors(records), self.classes)

    def check(self, sample: int, seed: int, epochs: int, views: Views, teacher: Teach) -> dict[str, float]:
        """Compute `sample` of the stored records again, drawn by `seed`.

        Returns:
            `records` compared; `max_abs_error` of a stored probability; `index_mismatch`, the share whose most probable
            class differs; `mass`, the mean that the records retain.

        Raises:
            StoreError: nothing is stored, or a record is not what this teacher gives for this view; see `agrees`.
        """
        there = set(self._pairs(epochs)) - set(self.missing(epochs))
        where = self._drawn(sorted(there), sample, seed)
        if not where:
            raise StoreError(f"{self.folder}: no targets of {epochs} epochs to check; fill the cache first")
        worst, mismatches, mass = 0.0, 0, 0.0
        for epoch, group in groupby(where, key=itemgetter(0)):
            positions = [position for _, position in group]
            for start, logits in self._outputs(epoch, positions, views, teacher):
                part, logits = positions[start : start + len(logits)], logits.cpu()
                index, prob = _tensors(self._taken(epoch, np.array(part)))
                again = softened(logits, self.temperature)
                bad = (~agrees(index, prob, logits, self.temperature)).nonzero()
                if len(bad):
                    row, now = int(bad[0]), int(again[int(bad[0])].argmax())
                    raise StoreError(
                        f"{self.folder}: epoch {epoch}, position {part[row]}: stored is class {int(index[row, 0])} with"
                        f" {float(prob[row, 0]):.4f}, this teacher and view give class {now}"
                        f" {float(again[row, now]):.4f}, beyond rounding; fill another folder"
                    )
                worst = max(worst, float((prob - again.gather(1, index)).abs().max()))
                mismatches += int((index[:, 0] != logits.argmax(1)).sum())
                mass += float(prob.sum())
        shares = {"index_mismatch": mismatches / len(where), "mass": mass / len(where)}
        return {"records": len(where), "max_abs_error": worst, **shares}

    @property
    def _shard(self) -> int:
        return self._index.shard if self._index else SHARD

    def _pairs(self, epochs: int) -> list[tuple[int, int]]:
        return [(epoch, shard) for epoch in range(epochs) for shard in range(math.ceil(self.images / self._shard))]

    def _positions(self, shard: int) -> range:
        return range(shard * self._shard, min((shard + 1) * self._shard, self.images))

    def _drawn(self, stored: Sequence[tuple[int, int]], sample: int, seed: int) -> list[tuple[int, int]]:
        """(epoch, position), in order, of up to `sample` records of these shards."""
        ends = np.cumsum([0, *(len(self._positions(shard)) for _, shard in stored)])
        total = int(ends[-1])
        drawn = np.sort(np.random.default_rng(seed).choice(max(total, 1), min(sample, total), replace=False))
        places = np.searchsorted(ends, drawn, "right") - 1
        return [
            (stored[place][0], self._positions(stored[place][1])[int(number - ends[place])])
            for place, number in zip(places, drawn, strict=True)
        ]

    def _read(self) -> Index | None:
        """The index, none where nothing was begun."""
        # Listed first: where another process is filling, the index was there before any shard.
        names = _names(self.folder)
        if not (self.folder / INDEX).is_file():
            if names:
                raise StoreError(
                    f"{self.folder}: exists and is not a cache of targets (no {INDEX}); give another folder"
                )
            return None
        index = _index_in(self.folder / INDEX)
        differences = _differences(index.key, self._key)
        for name, value in self._wanted.items():
            for text in _differences({name: str(getattr(index, name))}, {name: str(value)}).values():
                differences.setdefault(name, text)
        if differences:
            raise StoreError(f"{self.folder}: its targets have {', '.join(differences.values())}; give another folder")
        return index

    def _begin(self, views: Views, teacher: Teach, rank: int) -> Index:
        """Choose k and write the index; where another process came first, its index stands."""
        positions = range(min(SAMPLE, SHARD, self.images))
        share = torch.zeros(self.classes, dtype=torch.float64)
        for _, logits in self._outputs(0, positions, views, teacher):
            share += retained(logits.cpu(), self.temperature).sum(0)
        share /= len(positions)
        k = least_k(share, self._wanted["mass"])
        reached = min(float(share[k - 1]), 1.0)
        content = {"format": FORMAT, "key": self._key, **self._wanted, "reached": reached, "k": k, "shard": SHARD}
        content["digest"] = store.content_digest(content)
        _write_first(self.folder / INDEX, json.dumps(content, indent=1).encode(), rank)
        index = self._read()
        assert index is not None  # written above
        return index

    def _outputs(
        self, epoch: int, positions: Sequence[int], views: Views, teacher: Teach
    ) -> Iterator[tuple[int, Tensor]]:
        """The teacher's logits (b, K) for the views at `positions`, and how many came before."""
        done, of = 0, f"epoch {epoch}, positions {positions[0]} to {positions[-1]}"
        for images in views(epoch, positions):
            if done + len(images) > len(positions):
                raise StoreError(f"{self.folder}: {of}: more views than the {len(positions)} positions; give one each")
            with torch.no_grad():
                logits = teacher(images).float()
            if logits.shape != (len(images), self.classes):
                raise PassError(
                    f"targets: {of}: the teacher gave {tuple(logits.shape)}, not {(len(images), self.classes)};"
                    " give a teacher with the student's classes"
                )
            if not logits.isfinite().all():
                raise PassError(f"targets: {of}: the teacher's output is not finite; run it in fp32")
            yield done, logits
            done += len(images)
        if done != len(positions):
            raise StoreError(f"{self.folder}: {of}: {done} views for {len(positions)} positions; give one each")

    def _taken(self, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The records (B,) at these positions, copied."""
        if self._index is None:
            raise StoreError(f"{self.folder}: holds no targets yet; fill the cache first")
        assert len(positions) == 0 or (positions.min() >= 0 and positions.max() < self.images)  # the loader's
        taken = np.empty(len(positions), record_dtype(self._index.k))
        shards = positions // self._shard
        for shard in np.unique(shards):
            rows = shards == shard
            taken[rows] = self._records(epoch, int(shard))[positions[rows] - shard * self._shard]
        return taken

    def _records(self, epoch: int, shard: int) -> npt.NDArray[Any]:
        """A shard, memory-mapped; its size and digest are checked when it is opened."""
        if (epoch, shard) in self._mapped:
            return self._mapped[epoch, shard]
        assert self._index is not None  # whoever asks has an index
        # Each mapping holds a file descriptor, of which a process has about a thousand.
        if any(other != epoch for other, _ in self._mapped):
            self._mapped.clear()
        path = self.folder / _file_name(epoch, shard)
        if not path.is_file():
            raise StoreError(f"{path}: no such file; fill the cache for {epoch + 1} epochs first")
        dtype = record_dtype(self._index.k)
        size = HEADER + len(self._positions(shard)) * dtype.itemsize
        whole = np.memmap(path, np.uint8, "r") if path.stat().st_size == size else None
        if whole is None or self._digest(epoch, shard, whole[HEADER:]) != whole[:HEADER].tobytes():
            raise StoreError(
                f"{path}: truncated, edited or of another cache; delete it, the next fill computes it again"
            )
        self._mapped[epoch, shard] = whole[HEADER:].view(dtype)
        return self._mapped[epoch, shard]

    def _digest(self, epoch: int, shard: int, records: npt.NDArray[Any]) -> bytes:
        """sha256 over index, place and records: a shard from elsewhere is found as a damaged one is."""
        assert self._index is not None  # whoever asks has an index
        digest = hashlib.sha256(f"{self._index.digest} {epoch} {shard}\n".encode())
        digest.update(records.view(np.uint8).data)
        return digest.digest()


def record_dtype(k: int) -> np.dtype[np.void]:
    """One record: `index` k x uint16 class, `prob` k x float16 probability, most probable first; little-endian."""
    return np.dtype([("index", "<u2", (k,)), ("prob", "<f2", (k,))])


def bytes_needed(images: int, epochs: int, k: int, *, shard: int = SHARD) -> int:
    """Bytes of the shards of a cache: 4 k for every view, and a digest for every shard."""
    return epochs * (images * record_dtype(k).itemsize + math.ceil(images / shard) * HEADER)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Softmax (B, K) float32 of logits (B, K) at `temperature`."""
    return torch.softmax(logits.float() / temperature, dim=1)


def top_k(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable of K classes, (B, k) int64, and their probabilities, (B, k) float16. logits: (B, K)."""
    prob, index = softened(logits, temperature).topk(k, dim=1)
    return index, prob.half()


def retained(logits: Tensor, temperature: float) -> Tensor:
    """Probability of the 1, 2, ... K most probable classes, (B, K) float64. logits: (B, K)."""
    return torch.softmax(logits.double() / temperature, dim=1).sort(dim=1, descending=True).values.cumsum(1)


def least_k(share: Tensor, mass: float) -> int:
    """Least k that retains `mass`. share: (K,) ascending, of the 1, 2, ... K most probable classes."""
    # Rounding can leave the last share a little under 1.
    return min(int((share < mass).sum()) + 1, len(share))


def log_probs(index: Tensor, prob: Tensor, classes: int) -> Tensor:
    """Log-probabilities (B, classes) float32 of stored records; what the top k leave goes evenly to the other classes.

    No class has less than FLOOR before all are scaled to sum to 1: float16 rounds anything smaller to 0, and the k may
    round to a sum of 1 or more.

    Args:
        index: (B, k) int64, distinct in a row.
        prob: (B, k) float.
        classes: K.
    """
    prob, others = prob.double(), classes - prob.shape[1]
    rest = ((1 - prob.sum(1, keepdim=True)) / max(others, 1)).clamp(min=FLOOR)
    top = prob.clamp(min=FLOOR)
    total = top.sum(1, keepdim=True) + others * rest
    spread = (rest / total).log().float().repeat(1, classes)
    return spread.scatter_(1, index, (top / total).log().float())


def tolerance(mass: float, *, classes: int, k: int, spread: float) -> float:
    """Most that KL(cached || s) and KL(teacher || s) can differ, in nat, for a student s and top k that hold `mass`.

    Of one view, or of the mean over views at their mean mass. At temperature T the student's distribution is the
    softened one; a loss multiplied by T^2 has T^2 times this tolerance.

    Cut: with t = 1 - mass, n = K - k, p~ and s~ teacher and student renormalised on those n classes and u uniform on
    them, the two differ by t * (KL(p~ || s~) - KL(u || s~)). Neither KL is negative; the first is at most
    -log min s~ <= log n + spread, the second at most spread.

    Rounding: float16 and FLOOR move at most d = ROUNDING + (k + K) * FLOOR of the mass. The cross-entropy then moves by
    at most d * spread, and the entropy by d * log(K - 1) + h(d), h the binary entropy (Audenaert 2007,
    arXiv:quant-ph/0610146).

    Args:
        mass: share of the teacher's probability that the top k hold.
        classes: K, at least 2.
        k: classes of a record.
        spread: the student's largest log-probability minus its least, the largest over the views.
    """
    others, moved = classes - k, ROUNDING + (k + classes) * FLOOR
    cut = (1 - mass) * (math.log(others) + spread) if others > 1 else 0.0  # a single class gets exactly what is left
    entropy = -moved * math.log(moved) - (1 - moved) * math.log1p(-moved)
    return cut + moved * (math.log(classes - 1) + spread) + entropy


def agrees(index: Tensor, prob: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Whether each record (B,) bool can come from a teacher that now gives these logits.

    Where no logit moves by more than d = NOISE * the largest, no log-odds move by more than 2 d / T, and no class can
    have been the most probable that is now behind by more. Beyond that a probability has its float16 rounding.

    Args:
        index: (B, k) int64.
        prob: (B, k) float, as stored.
        logits: (B, K).
        temperature: of `prob`.
    """
    scaled = logits.double() / temperature
    moves = 2 * NOISE * scaled.abs().amax(1, keepdim=True)
    log_prob = torch.log_softmax(scaled, dim=1)
    found = log_prob.gather(1, index)
    odds = torch.logit(found.exp())
    low = (odds - moves).sigmoid() * (1 - ROUNDING) - FLOOR
    high = (odds + moves).sigmoid() * (1 + ROUNDING) + FLOOR
    values = ((prob >= low) & (prob <= high)).all(1)
    return values & (log_prob.amax(1) - found[:, 0] <= moves[:, 0])


def _tensors(records: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Classes (B, k) int64 and probabilities (B, k) float32 of records (B,)."""
    return torch.from_numpy(records["index"].astype(np.int64)), torch.from_numpy(records["prob"].astype(np.float32))


def _file_name(epoch: int, shard: int) -> str:
    return f"{epoch:05d}-{shard:05d}.bin"


def _names(folder: Path) -> list[str]:
    """Files of the folder, none where there is no folder; without those half written, whose names begin with a dot."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read as a folder: {error.strerror}; give another folder") from error


def _index_in(path: Path) -> Index:
    try:
        data = json.loads(path.read_bytes())
        written, recorded = data["format"], data["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not an index of targets ({error}); delete the folder to begin again") from error
    if written != FORMAT:
        raise StoreError(f"{path}: format {written!r} is not {FORMAT!r}; use the slim that wrote it")
    if store.content_digest(data) != recorded:
        raise StoreError(f"{path}: edited or damaged; restore it from a copy, or delete the folder to begin again")
    try:
        return Index.model_validate(data)
    except ValidationError as error:
        raise StoreError(f"{path}: {error.errors()[0]['msg']}; use the slim that wrote it") from error


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """`name old, not new` by name, both cut to where they begin to differ."""
    found = {}
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, "none"), new.get(name, "none")
        if before != now:
            same = [a == b for a, b in zip(before, now, strict=False)]
            start = max(0, [*same, False].index(False) - 8) if max(len(before), len(now)) > 32 else 0
            found[name] = f"{name} {_cut(before, start)}, not {_cut(now, start)}"
    return found


def _cut(text: str, start: int) -> str:
    return ("..." if start else "") + text[start : start + 32] + ("..." if len(text) > start + 32 else "")


def _write_first(path: Path, data: bytes, rank: int) -> None:
    """Write beside and link, so that of several processes the first one's file stands, and is whole."""
    partial = path.with_name(f".{path.name}.{rank}")
    store.write_bytes(partial, data)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}; give a folder on another disk") from error
    finally:
        partial.unlink()
