"""Chosen images of a pool, as JSON lines: what `slim select-unlabeled` writes and `--unlabeled` reads.

The first line says from what, by whom and by which rule; then comes one line for each image, whose path is relative to
the pool and stays in it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slim import store
from slim.errors import DataError
from slim.sources import IMAGE_TYPES

FORMAT = "slim-unlabeled/1"
LINE_BYTES = 1 << 20
"""Longest line that is read; a file of another kind may be one line of gigabytes."""
AGAIN = "write it again with `slim select-unlabeled`"

Count = Annotated[int, Field(ge=0)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, serialize_by_alias=True, validate_by_name=True)


class Counts(_Line):
    """What became of the images of the pool."""

    pool: Count
    """Image files in it."""
    unreadable: Count
    """Of these, not to be decoded."""
    near_duplicates: Count
    """Near-duplicates of a validation image, removed."""
    repeated: Count
    """Copies of another image of the pool, removed."""
    kept: Count
    """Chosen: the lines that follow."""


class Header(_Line):
    """The first line."""

    format: Literal["slim-unlabeled/1"] = "slim-unlabeled/1"
    root: str
    """The pool: absolute, or relative to the folder of the list."""
    teacher: str
    """Digest of the network that gave classes and probabilities."""
    data: str
    """Fingerprint of the dataset whose validation images were kept out."""
    per_class: Annotated[int, Field(ge=1)]
    """Most images of one class."""
    max_hamming: int
    """Bits in which the perceptual hashes of near-duplicates differ at most."""
    min_cosine: float
    """Least cosine of the teacher's embeddings of near-duplicates."""
    counts: Counts


class Chosen(_Line):
    """One image."""

    path: str
    """Relative to the pool, with forward slashes."""
    name: str | int = Field(alias="class")
    """The class the teacher gives it: its name, or its number where the teacher knows no names."""
    probability: Annotated[float, Field(ge=0, le=1)]
    """Of that class, by the teacher."""


def relative_root(pool: Path, path: Path) -> str:
    """The `root` of a list at `path`: relative where the pool lies beside or below it, as both then move together."""
    pool, folder = pool.resolve(), path.resolve().parent
    return pool.relative_to(folder).as_posix() if pool.is_relative_to(folder) else str(pool)


def write_list(path: Path, header: Header, chosen: Sequence[Chosen]) -> None:
    """Write the list whole. Raises StoreError when the disk is full or the place not writable."""
    assert header.counts.kept == len(chosen)
    lines = (one.model_dump_json(ensure_ascii=True) for one in (header, *chosen))
    store.write_text(path, "\n".join(lines) + "\n")


def is_list(path: Path) -> bool:
    """Whether there is such a list at `path`, whole or not."""
    try:
        with _opened(path) as file:
            _header(path, file)
    except DataError:
        return False
    return True


def read_list(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The pool and the images listed, all of them there.

    Raises:
        DataError: not such a list, a damaged line, an image that is missing or lies outside the pool, or no image.
    """
    with _opened(path) as file:
        header = _header(path, file)
        names = tuple(one.path for one in _chosen(path, file))
    if len(names) != header.counts.kept:
        raise DataError(
            f"--unlabeled {path}: lists {len(names)} images, its first line says {header.counts.kept}; {AGAIN}"
        )
    if not names:
        raise DataError(f"--unlabeled {path}: no image in it; {AGAIN} from another pool")
    root = path.parent / header.root
    if not root.is_dir():
        raise DataError(f"--unlabeled {path}: its pool {root} is no folder here; put it back, or {AGAIN}")
    check_inside(f"--unlabeled {path}", root, names)
    return root, names


def check_inside(place: str, root: Path, names: Iterable[str]) -> None:
    """Every name is a file below `root`, whatever links lie on the way.

    Raises:
        DataError: one is missing, or leads out of `root`.
    """
    real = root.resolve()
    folders: dict[PurePosixPath, bool] = {}
    for name in names:
        plain = PurePosixPath(name)
        if not name or plain.is_absolute() or ".." in plain.parts or "\0" in name:
            raise DataError(f"{place}: {name!r} leaves the pool; paths are relative to it, without `..`")
        try:
            mode = (root / name).lstat().st_mode
            if plain.parent not in folders:  # resolved once: a pool has few folders and very many files
                folders[plain.parent] = (root / plain.parent).resolve().is_relative_to(real)
            linked = stat.S_ISLNK(mode)
            inside = folders[plain.parent] and (not linked or (root / name).resolve().is_relative_to(real))
            there = stat.S_ISREG((root / name).stat().st_mode) if linked else stat.S_ISREG(mode)
        except OSError as error:
            raise DataError(f"{place}: {root / name}: {error.strerror}; put it back, or {AGAIN}") from error
        if not inside:
            raise DataError(f"{place}: {name!r} is a link that leaves the pool {root}; copy what it leads to into it")
        if not there:
            raise DataError(f"{place}: {root / name} is no file; put it back, or {AGAIN}")


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"--unlabeled {path}: cannot be read: {error.strerror}") from error


def _header(path: Path, file: IO[bytes]) -> Header:
    line = file.readline(LINE_BYTES)
    if f'"{FORMAT.partition("/")[0]}/'.encode() not in line:
        types = " ".join(IMAGE_TYPES)
        raise DataError(
            f"--unlabeled {path}: is no list of images; give a folder of images ({types}), or what "
            "`slim select-unlabeled` wrote"
        )
    try:
        return Header.model_validate_json(line)
    except ValidationError as error:
        raise DataError(f"--unlabeled {path}: line 1: {_first(error)}; {AGAIN}") from error


def _chosen(path: Path, file: IO[bytes]) -> Iterator[Chosen]:
    seen: set[str] = set()
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 2):
        try:
            one = Chosen.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"--unlabeled {path}: line {number}: {_first(error)}; {AGAIN}") from error
        if one.path in seen:
            raise DataError(f"--unlabeled {path}: line {number}: {one.path!r} was listed before; {AGAIN}")
        seen.add(one.path)
        yield one


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
