"""Images by name, and ordered parts of them: what a dataset is made of, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from slim.errors import DataError

FULL_HASH_BYTES = 2_000_000_000
"""Datasets up to this size are hashed whole; of larger ones only the ends of each file."""
END_BYTES = 65_536
"""Bytes hashed at either end of a file of a larger dataset."""


class Images(Protocol):
    """A store of images, each found by its name."""

    @property
    def id(self) -> str:
        """Fingerprint of the content: the method, a colon, 64 hex digits."""

    def open(self, name: str) -> Image.Image:
        """The decoded image in RGB. Raises what the decoder raises on a broken file."""

    def place(self, name: str) -> str:
        """Where the image lies, for messages."""


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files below one folder."""

    root: Path
    names: tuple[str, ...]
    """Every file that belongs to the dataset, as a path relative to `root` with forward slashes."""

    @cached_property
    def id(self) -> str:
        """`full:` or `ends:` and a sha256 over the sorted (relative path, size, content hash) of every file.

        Raises:
            DataError: a file that cannot be read at all.
        """
        try:
            sizes = {name: (self.root / name).stat().st_size for name in self.names}
            whole = sum(sizes.values()) <= FULL_HASH_BYTES
            digest = hashlib.sha256()
            for name in sorted(self.names):
                content = content_hash(self.root / name, sizes[name], whole=whole)
                digest.update(f"{name}\0{sizes[name]}\0{content}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise DataError(f"data {self.root}: {error.filename} cannot be read: {error.strerror}") from error
        return f"{'full' if whole else 'ends'}:{digest.hexdigest()}"

    def open(self, name: str) -> Image.Image:
        """The decoded image in RGB."""
        with Image.open(self.root / name) as image:
            return image.convert("RGB")

    def place(self, name: str) -> str:
        """Its path."""
        return str(self.root / name)


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images that come as arrays; `train/000012` names the thirteenth image of the array `train`."""

    source: str
    pixels: Mapping[str, npt.NDArray[np.uint8]]
    """(N, H, W) or (N, H, W, 3) by array name."""
    labels: Mapping[str, npt.NDArray[np.int64]]
    """(N,) by array name; part of the fingerprint, as class folders are part of a path."""

    @cached_property
    def id(self) -> str:
        """`full:` and a sha256 over names, shapes and bytes of every array."""
        digest = hashlib.sha256()
        for name in sorted(self.pixels):
            for array in (self.pixels[name], self.labels[name]):
                digest.update(f"{name}\0{array.dtype}\0{array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return f"full:{digest.hexdigest()}"

    def names(self, array: str) -> tuple[str, ...]:
        """Names of all images of one array, in its order."""
        return tuple(f"{array}/{index:06d}" for index in range(len(self.pixels[array])))

    def open(self, name: str) -> Image.Image:
        """The image in RGB."""
        array, _, index = name.partition("/")
        return Image.fromarray(self.pixels[array][int(index)]).convert("RGB")

    def place(self, name: str) -> str:
        """Source, array and position."""
        return f"{self.source}:{name}"


@dataclass(frozen=True, eq=False)
class JoinedImages:
    """Images of several stores; `train/x.jpg` is what the part `train` calls `x.jpg`."""

    parts: Mapping[str, Images]

    @cached_property
    def id(self) -> str:
        """`joined:` and a sha256 over the names and fingerprints of the parts."""
        lines = "".join(f"{name}\0{part.id}\n" for name, part in sorted(self.parts.items()))
        return f"joined:{hashlib.sha256(lines.encode()).hexdigest()}"

    def open(self, name: str) -> Image.Image:
        """The image in RGB."""
        part, _, inner = name.partition("/")
        return self.parts[part].open(inner)

    def place(self, name: str) -> str:
        """Where the part has it."""
        part, _, inner = name.partition("/")
        return self.parts[part].place(inner)


@dataclass(frozen=True, eq=False)
class Split:
    """An ordered part of a dataset."""

    images: Images
    names: tuple[str, ...]
    labels: tuple[int, ...]
    """Output number of each image; -1 where there is none."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Images skipped so far and why, by name, in the order they were met; filled while batches are read."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int]) -> Split:
        """The images at these positions, in this order."""
        return Split(self.images, tuple(self.names[i] for i in indices), tuple(self.labels[i] for i in indices))

    @classmethod
    def joined(cls, parts: Mapping[str, Split]) -> Split:
        """The images of all `parts`, one after another."""
        return cls(
            JoinedImages({part: split.images for part, split in parts.items()}),
            tuple(f"{part}/{name}" for part, split in parts.items() for name in split.names),
            tuple(label for split in parts.values() for label in split.labels),
        )

    def hash_order(self, seed: int) -> list[int]:
        """Positions ordered by sha256(name, seed): a shuffle that no file added or removed elsewhere disturbs."""
        return sorted(range(len(self)), key=lambda i: hash_key(self.names[i], seed))


def hash_key(name: str, seed: int) -> bytes:
    """What `hash_order` sorts by."""
    return hashlib.sha256(f"{name}\0{seed}".encode(errors="surrogateescape")).digest()


def content_hash(path: Path, size: int, *, whole: bool) -> str:
    """sha256 of a file, or of its first and last END_BYTES unless `whole`."""
    with path.open("rb") as file:
        if whole or size <= 2 * END_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        head = file.read(END_BYTES)
        file.seek(size - END_BYTES)
        return hashlib.sha256(head + file.read(END_BYTES)).hexdigest()
