"""Latencies of subnets that were measured, and where: a table is good for one device, one target and one network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from slim.errors import StoreError
from slim.passes.elastic import subnets
from slim.passes.elastic.space import Subnet

FORMAT = "slim-table/2"


@dataclass(frozen=True)
class Origin:
    """What latencies are of."""

    device: str
    """Fingerprint of the device (see slim/environment.py)."""
    target: str
    """In the words of `--target`."""
    network: str
    """Digest of the elastic network that subnets are cut out of, or of the structure of one that is not elastic."""


@dataclass(frozen=True)
class Row:
    """One subnet, measured as a whole network."""

    subnet: Subnet
    ms: float
    low: float
    """Lower end of the 95 % interval, ms."""
    high: float
    """Upper end of the 95 % interval, ms."""
    held_out: bool
    """Whether errors are of it, and nothing is fitted to it."""


def as_table(origin: Origin, rows: Sequence[Row]) -> dict[str, JsonValue]:
    """Plain JSON, of some rows or of all."""
    dumped: list[JsonValue] = [
        {**subnets.as_json(row.subnet), "ms": row.ms, "low": row.low, "high": row.high, "held_out": row.held_out}
        for row in rows
    ]
    return {"format": FORMAT, **asdict(origin), "rows": dumped}


def is_finished(data: Mapping[str, Any]) -> bool:
    """Whether all was measured, and a model fitted to it."""
    return "terms" in data


def rows_of(data: Mapping[str, Any], origin: Origin) -> list[Row]:
    """The rows of a table.

    Raises:
        StoreError: it is of another device, target or network, or no such table.
    """
    if data.get("format") != FORMAT:
        raise StoreError(f"latency table: format {data.get('format')!r} is not {FORMAT!r}; measure again")
    for what, here in asdict(origin).items():
        if data.get(what) != here:
            raise StoreError(
                f"latency table: it was measured for {what} {data.get(what)!r}, not {here!r}; measure again"
            )
    return [Row(subnets.from_json(row), row["ms"], row["low"], row["high"], row["held_out"]) for row in data["rows"]]


def read_table(path: str) -> dict[str, Any]:
    """A table's JSON.

    Raises:
        StoreError: there is no such file, or it is not JSON.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: no latency table ({error}); make it by slim table build") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path}: no latency table, but {type(found).__name__}; make it by slim table build")
    return found


def sources(path: str) -> dict[str, str]:
    """What `Pass.sources` says of a table: a digest of its content. Raises StoreError."""
    return {"table": hashlib.sha256(json.dumps(read_table(path), sort_keys=True).encode()).hexdigest()}
